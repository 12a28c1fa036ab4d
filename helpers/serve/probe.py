"""Does the server write tokens? For what restarts it: Kubernetes' probes, compose's health check.

    python -m helpers.serve.probe --deadline 20      # exit code 0: a token came through

/health stays 200 over an engine that hangs, so this asks for one token, with the key. A server that refuses
or is late because it is busy lives all the same: then its own count of tokens must go on. Its token is also
what the alert VllmStuck sees while nobody else asks. Standard library alone: it runs in vLLM's image.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from pathlib import Path

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would be told the key
POLL_S = 0.5


def ask(url: str, path: str, timeout_s: float, body: dict | None = None) -> bytes:
    """GET a path of the server with the key, or POST ``body`` to it; return the answer.

    Raises:
        OSError: no answer within ``timeout_s``, or an HTTP error.
    """
    headers = {"Authorization": f"Bearer {_key()}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, headers | {"Content-Type": "application/json"})
    with DIRECT.open(request, timeout=timeout_s) as reply:
        return reply.read()


def _key() -> str:
    """The key where ``settings`` has it from: a variable, or a file of the folder SECRETS_DIR."""
    if key := os.environ.get("VLLM_API_KEY"):
        return key
    file = Path(os.environ.get("SECRETS_DIR") or ".") / "VLLM_API_KEY"
    return file.read_text().strip() if file.is_file() else ""


def written(url: str, timeout_s: float) -> float:
    """Tokens that the server has written since it started, by its own count."""
    lines = ask(url, "/metrics", timeout_s).decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


def alive(url: str, deadline_s: float) -> str:
    """What shows within ``deadline_s`` that the engine writes tokens.

    Raises:
        OSError: nothing does; the message says what was seen instead.
    """
    stop = time.monotonic() + deadline_s
    before = written(url, deadline_s)
    try:
        name = json.loads(ask(url, "/v1/models", deadline_s))["data"][0]["id"]
        ask(url, "/v1/completions", stop - time.monotonic(), {"model": name, "prompt": "Hi", "max_tokens": 1})
        return "a token came through"
    except OSError as error:
        refused = error
    while (now := written(url, deadline_s)) <= before:  # looked at once even when the time is over
        if time.monotonic() > stop:
            raise OSError(f"{refused}, and no token was written within {deadline_s:g} s")
        time.sleep(POLL_S)
    return f"busy ({refused}), and {now - before:.0f} tokens were written meanwhile"


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code is 0 if the server writes tokens."""
    parser = argparse.ArgumentParser("python -m helpers.serve.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default=f"http://127.0.0.1:{os.environ.get('SERVER_PORT') or 8000}")
    parser.add_argument("--deadline", type=float, default=20.0, metavar="SECONDS")
    given = parser.parse_args(arguments)
    try:
        print(alive(given.url, given.deadline))
    except OSError as error:
        print(f"probe: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
