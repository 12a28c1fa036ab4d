"""Work in a process of its own, which says line by line what it found: a load, a part of a recording."""

import contextlib
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.base.files import ROOT
from helpers.base.machine import VLLM_ENVIRONMENT
from helpers.base.processes import end_with
from helpers.faults.log import root_cause


class Child(contextlib.AbstractContextManager):
    """``work(say, *job)`` in a process group of its own, which ends with its owner.

    ``work`` is named, ``"helpers.serve.load:work"``. What it and vLLM print goes to ``log``; ``line``
    returns what it says by ``say(name=value, ...)``, and ``tell`` is read by its standard input.
    """

    def __init__(self, work: str, log: Path, *job, **variables: str):
        self.log = log
        self._read, write = os.pipe()
        words = json.dumps([os.getpid(), write, work, job])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, words],
                stdin=subprocess.PIPE, stdout=out, stderr=out, pass_fds=(write,), cwd=ROOT, text=True,
                env=os.environ | VLLM_ENVIRONMENT | variables,
                process_group=0,  # and no session: see serve.owned
            )  # fmt: skip
        os.close(write)
        self._rest, self.closed = b"", False

    def __exit__(self, *_) -> None:
        self.close()

    def tell(self, **what) -> None:
        """Give it a line; one that has died does not read it, and says no more either."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def line(self, until: float = float("inf")) -> dict | None:
        """What it says next; None when it has not come by ``until`` (``time.monotonic``) or never will."""
        while b"\n" not in self._rest:
            # Its number stays its own until ``close`` has killed its group.
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if select.select([self._read], [], [], 0.0 if ended else 0.5)[0]:
                if not (more := os.read(self._read, 65536)):
                    return None
                self._rest += more
            elif ended or time.monotonic() > until:
                return None
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """Kill it and what it started, also where it has ended itself; a second time nothing."""
        if self.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self._read)
        self.closed = True

    @property
    def cause(self) -> str:
        """Why it ended or hangs, as far as its log says."""
        text = self.log.read_text(errors="replace")
        return (root_cause(text) or text.strip()[-300:] or "it said nothing")[-400:]


def _main(owner: int, pipe: int, work: str, job: list) -> None:
    end_with(owner)
    os.set_inheritable(pipe, False)
    out = os.fdopen(pipe, "w", buffering=1)  # open to the end: when it closes, the log has the error
    pkgutil.resolve_name(work)(lambda **row: out.write(json.dumps(row) + "\n"), *job)


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
