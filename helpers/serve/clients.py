"""Many clients of one server at once, and what became of every single request.

    with crowd(server, numbered(64), concurrency=16) as clients:
        outcomes = clients.outcomes()

A request is lost only if nobody counts it: here each has an outcome, and each answer is checked.
"""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import httpx

HOWS = ("answered", "wrong", "aborted", "refused", "cut off", "hung")
ANSWERED, WRONG, ABORTED, REFUSED, CUT, HUNG = HOWS


@dataclass(frozen=True)
class Request:
    """A body for ``/v1/chat/completions`` and the property its answer must have."""

    body: dict
    holds: Callable[[dict], bool]
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    ``how`` is ``answered`` (the property holds), ``wrong`` (an answer without it), ``aborted`` (the beginning
    of an answer: the status is 200, only ``finish_reason`` says that the server gave up), ``refused`` (an
    HTTP error, ``status`` and ``text`` say which), ``cut off`` (the connection ended) or ``hung`` (nothing
    within the client's time).
    """

    how: str
    status: int | None
    text: str
    seconds: float


def numbered(count: int) -> list[Request]:
    """Short requests, each with a number of its own, answered in one of two words that only it allows.

    The server may choose only between two sentences with the request's own number (structured output), so
    an answer meant for another request, or cut short, shows.
    """

    def one(number: int) -> Request:
        choices = [f"{number} is even", f"{number} is odd"]
        body = _asking(f"Is {number} even or odd?", 32) | {"structured_outputs": {"choice": choices}}
        return Request(body, lambda reply: reply["choices"][0]["message"]["content"] in choices)

    return [one(number) for number in range(count)]


def long(count: int, tokens: int) -> list[Request]:
    """Requests whose answers take exactly ``tokens`` tokens: time enough to stop a server under them."""
    return [exactly(tokens, f"Tell story number {number}.") for number in range(count)]


def exactly(tokens: int, text: str, headers: dict[str, str] | None = None) -> Request:
    """A request whose answer has so many tokens, whatever it says."""
    body = _asking(text, tokens) | {"ignore_eos": True}
    return Request(body, lambda reply: reply["usage"]["completion_tokens"] == tokens, headers or {})


def _asking(text: str, tokens: int) -> dict:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0.0}


def lasting(seconds: float, per_token: float) -> int:
    """Tokens of an answer that takes about so long at ``per_token`` seconds each; a server ends it at 500."""
    return max(24, min(500, round(seconds / per_token))) if per_token > 0 else 500


def streamed(requests: Iterable[Request]) -> list[Request]:
    """The same requests, each answered piece by piece."""
    pieces = {"stream": True, "stream_options": {"include_usage": True}}
    return [replace(request, body=request.body | pieces) for request in requests]


class crowd(contextlib.AbstractContextManager):
    """``concurrency`` clients that send the requests one after another, in the background.

    With ``every_s`` no request is sent before its turn, one each so many seconds: with a client for each
    request that is an open loop, in which a slow server is asked no less.
    """

    def __init__(self, server, requests: Iterable[Request], concurrency: int, timeout_s=120.0, every_s=0.0):
        self._server, self._timeout_s = server, timeout_s
        # A connection a client, kept open, as real clients do.
        self._http = httpx.Client(
            base_url=server.url,
            headers=server.headers,
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            trust_env=False,  # no proxy: the server is on this machine
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="client")
        self._stopping = threading.Event()
        begun = time.monotonic()
        self._futures: list[Future] = [
            self._pool.submit(self._ask, request, begun + at * every_s) for at, request in enumerate(requests)
        ]

    def _ask(self, request: Request, due: float) -> Outcome | None:
        if self._stopping.wait(max(0.0, due - time.monotonic())):
            return None
        begun = time.perf_counter()
        try:
            found = self._answer(request)
        except httpx.ReadTimeout:
            found = HUNG, None, f"nothing within {self._timeout_s:g} s"
        except httpx.HTTPError as error:
            found = CUT, None, type(error).__name__
        return Outcome(*found, time.perf_counter() - begun)

    def _answer(self, request: Request) -> tuple[str, int | None, str]:
        """Send a request; how it ended, its status and its text."""
        body = {"model": self._server.name, **request.body}
        with self._http.stream("POST", "/v1/chat/completions", json=body, headers=request.headers) as reply:
            if reply.status_code != 200:
                reply.read()
                return REFUSED, reply.status_code, message(reply)
            content = _joined(reply.iter_lines()) if body.get("stream") else json.loads(reply.read())
        return judged(request, content), 200, content["choices"][0]["message"]["content"]

    def wait_until_running(self, count: int) -> None:
        """Wait until the server itself says that ``count`` requests are in flight.

        Raises:
            TimeoutError: they were not within a minute, or so few are left that they no longer can be:
                the answers were shorter than the time to look.
        """
        self._wait_until(lambda: in_flight(self._server) >= count, count, f"{count} in flight")

    def wait_until_writing(self) -> None:
        """Wait until the server has written a token since this was called.

        Raises:
            TimeoutError: it had not within a minute, or every request had ended.
        """
        written = lambda: self._server.metrics()["vllm:generation_tokens_total"]  # noqa: E731
        before = written()
        self._wait_until(lambda: written() > before, 1, "a token of theirs")

    def _wait_until(self, seen: Callable[[], bool], least: int, what: str) -> None:
        """Look again and again until it is seen, as long as ``least`` requests have not ended."""
        stop = time.monotonic() + 60
        while time.monotonic() < stop:
            left = sum(not future.done() for future in self._futures)
            if seen():
                return
            if left < least:
                self.stop_asking()
                ends = {how: number for how, number in count(self.outcomes()).items() if number}
                raise TimeoutError(
                    f"{len(self._futures) - left} of {len(self._futures)} requests had ended before {what} "
                    f"was seen. Ask for longer answers. Their ends: {ends}."
                )
            time.sleep(0.02)
        raise TimeoutError(f"{what} was not seen within a minute.")

    def stop_asking(self) -> None:
        """Send no further request; those that were sent have their outcomes."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def outcomes(self) -> list[Outcome]:
        """Wait for every request that was sent; return their outcomes in the order of the requests."""
        results = [future.result() for future in self._futures if not future.cancelled()]
        return [outcome for outcome in results if outcome]

    def __exit__(self, kind, error, tb) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=error is not None)
        self._http.close()


def _joined(lines: Iterable[str]) -> dict:
    """The pieces of a streamed answer as one that came whole; without a ``finish_reason`` if no end came."""
    pieces, reason, usage = [], None, {}
    for line in lines:
        if line == "data: [DONE]":
            break
        found = json.loads(line[6:]) if line.startswith("data: ") else {}
        usage = found.get("usage") or usage
        for choice in found.get("choices", ()):
            pieces.append(choice["delta"].get("content") or "")
            reason = choice.get("finish_reason") or reason
    return {"choices": [{"message": {"content": "".join(pieces)}, "finish_reason": reason}], "usage": usage}


def judged(request: Request, content: dict) -> str:
    """What a reply with status 200 is worth: ``ANSWERED``, ``WRONG``, ``ABORTED`` or ``CUT``.

    ``abort`` is vLLM's word for a request that its engine gave up, on its way out above all: what was
    written so far is sent like an answer. And the router ends a stream whose server died as if it were whole.
    """
    reason = content["choices"][0]["finish_reason"]
    if reason is None:
        return CUT
    if reason == "abort":
        return ABORTED
    return ANSWERED if request.holds(content) else WRONG


def in_flight(server) -> int:
    """Requests the server has accepted and not finished, by its own count."""
    found = server.metrics()
    return int(found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"])


def count(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many had each outcome, also none."""
    found = Counter(outcome.how for outcome in outcomes)
    return {how: found[how] for how in HOWS}


def message(reply) -> str:
    """The sentence in an error reply, whichever of vLLM's two forms it has."""
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        return reply.text.strip()
    return error["message"] if isinstance(error, dict) else str(error)


class Repeated(contextlib.AbstractContextManager):
    """Calls functions again and again, each in a thread of its own, as long as its ``with`` block lasts."""

    def __init__(self, every_s: float, *calls: Callable[[], None]):
        self._every_s, self._done = every_s, threading.Event()
        self._threads = [threading.Thread(target=self._repeat, args=(call,), daemon=True) for call in calls]
        for thread in self._threads:
            thread.start()

    def _repeat(self, call: Callable[[], None]) -> None:
        while not self._done.wait(self._every_s):
            call()

    def __exit__(self, *_) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


class Watch(Repeated):
    """A client that asks for /health and for one token, again and again, while something else happens."""

    def __init__(self, server, every_s: float = 0.3):
        self.health: list[object] = []  # HTTP status, or the name of the failure
        self.tokens: list[object] = []
        # A new connection each time, as a load balancer's next user has.
        headers = server.headers | {"Connection": "close"}
        self._http = httpx.Client(base_url=server.url, headers=headers, timeout=10.0, trust_env=False)
        token = {"model": server.name, "prompt": "Hello", "max_tokens": 1}
        super().__init__(
            every_s,
            lambda: self._ask(self.health, "GET", "/health"),
            lambda: self._ask(self.tokens, "POST", "/v1/completions", json=token),
        )

    def _ask(self, said: list, method: str, path: str, **body) -> None:
        try:
            said.append(self._http.request(method, path, **body).status_code)
        except httpx.HTTPError as error:
            said.append(type(error).__name__)

    def said(self, which: str) -> str:
        """The different status codes that ``health`` or ``tokens`` got; failed connections left out."""
        return ", ".join(map(str, sorted({code for code in getattr(self, which) if isinstance(code, int)})))

    def __exit__(self, *_) -> None:
        super().__exit__()
        self._http.close()
