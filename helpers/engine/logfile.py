"""vLLM's output into a file, a quiet progress bar for the reader.

vLLM writes in three ways: its logger's handler (bound to whatever ``sys.stdout`` was when vLLM was
configured), Python prints and progress bars, and file descriptors 1 and 2 (C++ code, and children,
which inherit them). All three are pointed at one file.
"""

import contextlib
import functools
import logging
import os
import sys
from pathlib import Path

from helpers.base import processes
from helpers.engine.errors import EngineError

CHATTY = ("vllm", "torch", "transformers")  # loggers whose lines belong in the file, not in the notebook


def new_log_file(log_dir: Path, scheme: str) -> Path:
    """A path that no engine has used yet: <dir>/<scheme>-1.log, -2.log, ..."""
    number = 1
    while (path := log_dir / f"{scheme}-{number}.log").exists():
        number += 1
    return path.absolute()


class LogFile:
    """One engine's log: everything written while ``capturing()``, and its logger's lines until ``close``.

    Raises:
        EngineError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Appending, so that lines of several processes never overwrite each other.
            self._stream = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        except OSError as error:
            raise EngineError(
                f"The engine's log cannot be written: {error}. Name another folder: open_engine(log_dir=...)."
            ) from None
        self._handlers: list[logging.StreamHandler] = []

    @contextlib.contextmanager
    def capturing(self):
        """Send this process's output, and that of children started inside, to the file."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(self._stream.fileno(), 1)
        os.dup2(self._stream.fileno(), 2)
        try:
            with contextlib.redirect_stdout(self._stream), contextlib.redirect_stderr(self._stream):
                yield
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)

    def follow(self, *loggers: str) -> None:
        """Keep these loggers' lines going to the file, also after ``capturing()`` has ended."""
        for handler in [handler for name in loggers for handler in logging.getLogger(name).handlers]:
            if type(handler) is logging.StreamHandler:  # not its subclasses: files, a test runner's own
                self._handlers.append(handler)
                handler.setStream(self._stream)

    def close(self) -> None:
        """Flush the file; lines that loggers write later go nowhere rather than to the reader.

        On a full disk the last lines are lost: a release must not fail of that.
        """
        for handler in self._handlers:
            with contextlib.suppress(OSError):
                handler.flush()
            handler.stream = _nowhere()  # setStream would flush, and keep the old one when that fails
        self._handlers.clear()
        with contextlib.suppress(OSError):
            self._stream.flush()


@functools.cache
def _nowhere():
    return open(os.devnull, "w")  # noqa: PTH123  lives as long as the process


# What vLLM logs on its way up, in order, and what to call it.
PHASES = (
    ("Initializing a V1 LLM engine", "reading the model's configuration"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "preparing the weights for this machine's kernels"),
    ("KV cache size", "reserving the KV cache"),
    ("init engine", "almost ready"),
)


def starting(log_file: Path) -> contextlib.AbstractContextManager[None]:
    """A bar, where somebody watches, that follows a start-up log while the block runs."""

    def look() -> tuple[int, int, str]:
        text = log_file.read_text(errors="replace") if log_file.exists() else ""
        reached = ["importing vLLM", *(label for marker, label in PHASES if marker in text)]
        return len(reached), len(PHASES) + 1, reached[-1]

    return processes.progress(look)
