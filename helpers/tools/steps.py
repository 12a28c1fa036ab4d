"""Steps of the set-up: commands, alone or two beside each other, and their ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
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

    def must(self, advice: str = "Run it again; if it stays, remove the environment (`make clean`).") -> None:
        """Raise SetupError with the last lines if it failed."""
        if self.returncode:
            raise SetupError(f"The step `{self.title}` failed:\n{tail(self.output)}\n{advice}")


def run(title: str, command: list[str | Path]) -> Step:
    """Run a command to its end and print a line with its seconds."""
    with started(title, command) as step:
        return step()


@contextlib.contextmanager
def started(title: str, command: list[str | Path]) -> Iterator[Callable[[], Step]]:
    """Start a command, beside what the block does; the block calls what it gets to wait for the end.

    However the block ends, the command has ended, too, and its children: they are in a session of its own.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

        def ended() -> Step:
            process.wait()
            print(f"{time.perf_counter() - begun:6.1f} s  {title}", flush=True)
            log.seek(0)
            return Step(title, process.returncode, log.read().decode(errors="replace"))

        try:
            yield ended
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def tail(text: str, lines: int = 12) -> str:
    """The last lines of a program's output, indented."""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:]) or "    (it said nothing)"
