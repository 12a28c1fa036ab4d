"""A server that takes a second to start, in vLLM's place where only processes and addresses matter.

As a program: ``standin.py PORT``. It answers as vLLM does, drains on SIGTERM, and has a child in a session
of its own, as vLLM's engine is, which nobody ends when it is killed. Its shared memory stays then, too.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

A_TOKEN_S = 0.005  # an answer takes that for each token that it may have
running, lock = 0, threading.Lock()


class Answers(BaseHTTPRequestHandler):
    """What a small server answers with, for each test's own to build on."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def say(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


class Handler(Answers):
    def do_GET(self) -> None:
        counts = {"num_requests_running": running, "num_requests_waiting": 0, "generation_tokens_total": 0}
        self.say("".join(f"vllm:{name} {value}\n" for name, value in counts.items()))

    def do_POST(self) -> None:
        global running
        body = json.loads(self.body())
        with lock:
            running += 1
        tokens = body.get("max_tokens", 16)
        time.sleep(tokens * A_TOKEN_S)
        with lock:
            running -= 1
        content = body.get("structured_outputs", {}).get("choice", ["yes"])[0]
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "text": content}
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
        self.say(json.dumps({"id": "1", "choices": [choice | {"finish_reason": "stop"}], "usage": usage}))


def main(port: int) -> None:
    """Serve until SIGTERM, then answer what runs."""
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    segment = Path(f"/dev/shm/psm_{os.getpid():08x}")
    segment.write_bytes(bytes(mmap.PAGESIZE))
    with segment.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(0.05)
    server.socket.close()  # nobody new; not server_close, which waits for connections that are kept open
    while running:
        time.sleep(0.01)
    mapped.close()
    segment.unlink()


def in_vllms_place() -> None:
    """Let every server of this process be one of these."""
    from helpers.serve.server import Server

    Server._command_line = lambda self: [sys.executable, str(Path(__file__)), str(self.args["port"])]


if __name__ == "__main__":
    main(int(sys.argv[1]))
