"""Steps of the set-up: commands that run beside each other, and their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path


class SetupError(RuntimeError):
    """The set-up cannot go on; the message says why and what to do."""


# --- Running commands -----------------------------------------------------------------------------


class Job:
    """A titled command, started at once; what it prints is kept for the error that may follow."""

    def __init__(self, title: str, command: list[str | Path]):
        self.title = title
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the job
        # A session of its own, so that its children can be ended with it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def returncode(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """Everything it printed. To be read after its end."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def end(self) -> None:
        """End it and its children if it still runs."""
        if self.returncode is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def run(*commands: tuple[str, list[str | Path]]) -> list[Job]:
    """Run titled commands beside each other; print a line with its seconds as each ends.

    Whatever ends this function ends the commands too.
    """
    begun = time.perf_counter()
    jobs: list[Job] = []
    try:
        for title, command in commands:
            jobs.append(Job(title, command))
        running = list(jobs)
        while running:
            for job in [job for job in running if job.returncode is not None]:
                print(f"{time.perf_counter() - begun:6.1f} s  {job.title}", flush=True)
                running.remove(job)
            time.sleep(0.02)
    finally:
        for job in jobs:
            job.end()
    return jobs


def must(
    job: Job, advice: str = "Run it again; if it stays, remove the environment (`make clean`) first."
) -> None:
    """Raise SetupError with the last lines of a job that failed."""
    if job.returncode:
        raise SetupError(f"The step `{job.title}` failed:\n{tail(job.output)}\n{advice}")


def tail(text: str, lines: int = 12) -> str:
    """The last lines of a program's output, indented."""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:]) or "    (it said nothing)"


def prepare_environ(venv: Path) -> None:
    """Set what the children inherit."""
    # Where it is set, Python would not write the bytecode that this set-up is to leave behind.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not any(os.environ.get(name) for name in ("UV_CACHE_DIR", "XDG_CACHE_HOME", "HOME")):
        os.environ["UV_CACHE_DIR"] = str(venv.parent / ".cache" / "uv")
