"""The shipped nginx.conf in a real nginx: what it lets through, what it says itself, where it tries again."""

import contextlib
import json
import os
import signal
import socket
import threading
import time

import httpx
import openai
import pytest

from tests.nginx import Upstream, newer, nginx, said


@contextlib.contextmanager
def proxied(folder, *statuses: int, **options):
    """Upstreams with these answers behind nginx; yields its port and them."""
    with contextlib.ExitStack() as stack:
        upstreams = [stack.enter_context(Upstream(status)) for status in statuses]
        ports = [upstream.server_port for upstream in upstreams]
        yield stack.enter_context(nginx(folder, *ports, **options)), upstreams


def names(answer: list[str], done: threading.Event) -> int:
    """A name server on a port of its own, that says for every name what ``answer`` holds at the moment."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind(("127.0.0.1", 0))
    listener.settimeout(0.2)

    def serve() -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                asked, where = listener.recvfrom(512)
                question = asked[12 : asked.index(b"\0", 12) + 5]
                found = [answer[0]] * (question[-3] == 1)  # type A; nothing for others
                head = asked[:2] + b"\x81\x80\0\1\0" + bytes([len(found)]) + b"\0\0\0\0"
                record = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4"
                listener.sendto(
                    head + question + b"".join(record + socket.inet_aton(a) for a in found), where
                )
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def test_a_server_that_was_made_anew_is_found_at_its_new_address(tmp_path):
    """upstream.conf asks the name server again; it takes nginx 1.27.3 or later."""
    address, done = ["127.0.0.1"], threading.Event()
    with Upstream() as old, Upstream(host="127.0.0.2", port=old.server_port) as new:
        replaced = {"127.0.0.11 valid=5s": f"127.0.0.1:{names(address, done)} valid=1s ipv6=off"}
        replaced |= {"vllm:8000": f"vllm:{old.server_port}"}
        with nginx(tmp_path, upstream="upstream.conf", program=newer(), **replaced) as port:
            stop = time.monotonic() + 10
            while not old.asked and time.monotonic() < stop:
                said(port, "GET", "/v1/models")
            address[0] = "127.0.0.2"
            while not new.asked and time.monotonic() < stop:
                time.sleep(0.1)
                assert said(port, "GET", "/v1/models")[0] == 200
        done.set()
        assert old.asked
        assert new.asked


def test_methods_that_the_key_does_not_guard_are_refused(tmp_path):
    with proxied(tmp_path, 200) as (port, [upstream]):
        codes = {said(port, method, "/v1/models")[0] for method in ("OPTIONS", "PUT", "TRACE")}
        assert codes <= {403, 404, 405}
        assert not upstream.asked


def test_the_key_reaches_the_server_from_either_header(tmp_path):
    with proxied(tmp_path, 200) as (port, [upstream]):
        said(port, "GET", "/v1/models", Authorization="Bearer one")
        said(port, "GET", "/v1/models", x_api_key="two")
        said(port, "GET", "/v1/models", Authorization="Bearer one", x_api_key="two")
        said(port, "GET", "/v1/models")
    sent = [headers.get("Authorization") for _, headers in upstream.asked]
    assert sent == ["Bearer one", "Bearer two", "Bearer one", None]
    assert all(len(headers["X-Request-Id"]) == 32 for _, headers in upstream.asked)


def test_a_key_is_changed_without_a_gap(tmp_path):
    """Two keys are taken, then one, by a file and a reload; requests all the while are answered."""
    (tmp_path / "keys").mkdir()
    theirs = "t" * 43
    file = tmp_path / "keys/users.map"
    file.write_text(f'"Bearer {theirs}" "Bearer vllms";\n')
    with proxied(tmp_path, 200) as (port, [upstream]):
        said(port, "GET", "/v1/models", Authorization=f"Bearer {theirs}")
        said(port, "GET", "/v1/models", x_api_key=theirs)
        file.unlink()
        os.kill(int((tmp_path / "nginx.pid").read_text()), signal.SIGHUP)
        stop = time.monotonic() + 10
        while upstream.asked[-1][1]["Authorization"] != f"Bearer {theirs}" and time.monotonic() < stop:
            assert said(port, "GET", "/v1/models", Authorization=f"Bearer {theirs}")[0] == 200
    sent = [headers["Authorization"] for _, headers in upstream.asked]
    assert sent[:2] == ["Bearer vllms"] * 2
    assert sent[-1] == f"Bearer {theirs}", "which vLLM answers with 401"


def test_the_proxys_own_errors_are_openais(tmp_path):
    """Each kind once: no such path, too large, too many, nobody there."""
    body = "x" * 1_100_000
    with proxied(tmp_path, 200, **{"rate=20r/s": "rate=1r/m", "burst=100": "burst=3"}) as (port, _):
        replies = [said(port, "GET", "/metrics"), said(port, "POST", "/v1/completions", body)]
        while replies[-1][0] != 429 and len(replies) < 10:
            replies.append(said(port, "GET", "/v1/models"))
    with nginx(tmp_path / "2", 9) as port:  # nobody listens there
        replies.append(said(port, "GET", "/v1/models"))
    found = {status: (headers, text) for status, headers, text in replies if status != 200}
    assert list(found) == [404, 413, 429, 502]
    for headers, text in found.values():
        assert headers["Content-Type"] == "application/json"
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    assert [headers["Retry-After"] for headers, _ in found.values()] == [None, None, "1", "5"]


@pytest.mark.parametrize("refusal", [500, 503])
def test_a_server_that_refuses_or_is_gone_costs_nobody_an_answer_and_is_not_forgotten(tmp_path, refusal):
    """What one says that drains or is full; the other answers all, and the first again once it can."""
    with proxied(tmp_path, refusal, 200) as (port, [first, second]):
        codes = [said(port, "POST", "/v1/completions", "{}")[0] for _ in range(20)]
        assert set(codes) == {200}
        assert len(first.asked) > 5, "asked, each time"
        assert len(second.asked) == 20
        first.status = 200
        before = len(first.asked)
        codes = [said(port, "POST", "/v1/completions", "{}")[0] for _ in range(20)]
        assert set(codes) == {200}
        assert len(first.asked) - before > 5, "no penalty time"
        second.__exit__()
        codes = [said(port, "POST", "/v1/completions", "{}")[0] for _ in range(20)]
        assert set(codes) == {200}, "no connection"


def test_openais_client_tries_again_as_it_is_told(tmp_path):
    """Full, then not: the library alone gets its answer, after the seconds that the header says."""
    with proxied(tmp_path, 503) as (port, [upstream]):
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="k", http_client=httpx.Client(trust_env=False)
        )
        threading.Timer(1.0, setattr, (upstream, "status", 200)).start()
        begun = time.monotonic()
        client.completions.with_raw_response.create(model="m", prompt="Hi")
        assert len(upstream.asked) == 2
        assert 2 <= time.monotonic() - begun < 3


def test_a_reload_and_a_polite_end_lose_no_request(tmp_path):
    """SIGHUP under load, then SIGQUIT: what runs is answered."""
    with Upstream(after_s=0.5) as upstream, nginx(tmp_path, upstream.server_port) as port:
        codes = []

        def ask() -> None:
            codes.append(said(port, "POST", "/v1/completions", "{}")[0])

        for signum in (signal.SIGHUP, signal.SIGHUP, signal.SIGQUIT):
            clients = [threading.Thread(target=ask) for _ in range(16)]
            for client in clients:
                client.start()
            time.sleep(0.25)
            os.kill(int((tmp_path / "nginx.pid").read_text()), signum)
            for client in clients:
                client.join()
    assert codes == [200] * 48
