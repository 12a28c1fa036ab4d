"""What a running server answers to whom: every route tried with and without the key, and bad requests.

The list of routes is the server's own (``/openapi.json``), with those it leaves out of that list. Nothing
here is looked up in vLLM's source: a new version with a new route shows it.
"""

import json
from dataclasses import dataclass

import httpx

from helpers.serve import clients
from helpers.serve.errors import ServerError

# Routes that FastAPI and the metrics' own application add without listing them.
UNLISTED = (("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/redoc"))

GUARDED = (401, 403)


@dataclass(frozen=True)
class Door:
    """One route, and the status codes it answers with and without the key.

    A request without a body that a handler could use: any code but ``GUARDED`` says that it got past the
    key, also 400 or 422.
    """

    method: str
    path: str
    without_key: int
    with_key: int

    @property
    def open(self) -> bool:
        return self.without_key not in GUARDED


def routes(server) -> list[tuple[str, str]]:
    """Methods and paths of a server, sorted by path.

    Raises:
        ServerError: it keeps its list to itself, as one in production should.
    """
    reply = server.get("/openapi.json")
    if reply.status_code != 200:
        raise ServerError("This server lists no routes: open_server(..., disable_fastapi_docs=False) does.")
    listed = reply.json()["paths"].items()
    found = {(method.upper(), path) for path, methods in listed for method in methods}
    return sorted(found | set(UNLISTED), key=lambda route: (route[1], route[0]))


def open_doors(server) -> list[Door]:
    """Try every route of a server with the key and without it."""
    found = []
    with httpx.Client(base_url=server.url, timeout=30.0, trust_env=False) as client:
        for method, path in routes(server):
            # Not a message any handler accepts, so that no handler does anything.
            body = None if method == "GET" else {}
            url = path.replace("{", "").replace("}", "")
            codes = [
                client.request(method, url, headers=headers, json=body).status_code
                for headers in ({}, server.headers)
            ]
            found.append(Door(method, path, *codes))
    return found


def generates_without_key(server) -> str:
    """Ask ``/invocations``, which the key does not guard, for an answer; return the text, empty if none."""
    body = {
        "model": server.name,
        "messages": [{"role": "user", "content": "What is the capital of France? Answer with one word."}],
        "max_tokens": 8,
        "temperature": 0.0,
    }
    reply = httpx.post(server.url + "/invocations", json=body, timeout=60.0, trust_env=False)
    return reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else ""


@dataclass(frozen=True)
class Refusal:
    what: str
    status: int
    text: str


def refusals(server) -> list[Refusal]:
    """Send each kind of bad request once; the server has to refuse it and go on."""
    chat = {"model": server.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    too_long = [{"role": "user", "content": "hello " * (server.args["max_model_len"] + 1)}]
    huge = [{"role": "user", "content": "a" * 10_000_000}]
    malformed = json.dumps(chat).removesuffix("}").encode()
    key = server.headers
    cases = {
        "no key": ({}, {"json": chat}),
        "wrong key": ({"Authorization": "Bearer wrong"}, {"json": chat}),
        "unknown model": (key, {"json": chat | {"model": "gpt-none"}}),
        "prompt longer than the context": (key, {"json": chat | {"messages": too_long}}),
        "malformed JSON": (key | {"Content-Type": "application/json"}, {"content": malformed}),
        "max_tokens of -1": (key, {"json": chat | {"max_tokens": -1}}),
        "a body of 10 MB": (key, {"json": chat | {"messages": huge}}),
    }
    found = []
    with httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as client:
        for what, (headers, request) in cases.items():
            reply = client.post("/v1/chat/completions", headers=headers, **request)
            found.append(Refusal(what, reply.status_code, clients.message(reply)))
    return found
