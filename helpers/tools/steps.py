"""Steps of the set-up: commands, one after the other, and their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


class SetupError(RuntimeError):
    """The set-up cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Step:
    """A command that has ended, and everything it printed."""

    title: str
    returncode: int
    output: str

    def must(
        self, advice: str = "Run it again; if it stays, remove the environment (`make clean`) first."
    ) -> None:
        """Raise SetupError with the last lines if it failed."""
        if self.returncode:
            raise SetupError(f"The step `{self.title}` failed:\n{tail(self.output)}\n{advice}")


def run(title: str, command: list[str | Path]) -> Step:
    """Run a command to its end and print a line with its seconds.

    Whatever ends this function ends the command, too, and its children: they are in a session of its own.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        print(f"{time.perf_counter() - begun:6.1f} s  {title}", flush=True)
        log.seek(0)
        return Step(title, process.returncode, log.read().decode(errors="replace"))


def tail(text: str, lines: int = 12) -> str:
    """The last lines of a program's output, indented."""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:]) or "    (it said nothing)"
