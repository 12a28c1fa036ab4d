"""Ctrl+C at moments when it must wait, or must be heard: while an engine or a child starts or ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable


def _takes_interrupts() -> bool:
    """Whether Ctrl+C comes here: not in a thread, nor where a shell's background job ignores it."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)


@contextlib.contextmanager
def interrupts_that_insist():
    """Raise KeyboardInterrupt each second from the first Ctrl+C on, until the block is left.

    vLLM swallows one that comes during the handshake with its child, and then waits ten minutes for it.
    """
    if not _takes_interrupts():
        yield
        return

    def insist(*_):
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    old = {number: signal.signal(number, insist) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupts_deferred():
    """Let the block finish when Ctrl+C comes, then raise KeyboardInterrupt once.

    If the block fails, its own error counts.
    """
    if not _takes_interrupts():
        yield
        return
    came = []
    old = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
    if came:
        raise KeyboardInterrupt


def on_interrupted_cell(finish: Callable[[], object]) -> None:
    """In a notebook, call ``finish`` after the first cell from now on that Ctrl+C ends; elsewhere nothing."""
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return

    def look(result) -> None:
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            shell.events.unregister("post_run_cell", look)
            finish()

    shell.events.register("post_run_cell", look)
