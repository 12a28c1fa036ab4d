"""From vLLM's log to the line that says what went wrong.

vLLM's last words in a notebook are often "Engine core initialization failed. See root cause above",
with nothing above: the cause was written by a child, into the log.
"""

from __future__ import annotations

import re

# The end of a Python traceback: an exception's name, a colon, its message.
_ERROR = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?(?:ERROR \S+ \S+ \[\S+\] )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)): (.+)$"
)
# Errors that only say that another one happened.
_ECHOES = (
    "Engine core initialization failed",
    "EngineCore encountered",
    "See root cause above",
    "EngineDeadError",
)


def root_cause(log: str) -> str | None:
    """Return the first error of ``log`` that is not an echo of another, as ``Name: message``."""
    for line in log.splitlines():
        found = _ERROR.match(line.strip())
        if found and not any(echo in line for echo in _ECHOES):
            return f"{found[1].rsplit('.', 1)[-1]}: {found[2]}"
    return None


def short(error: BaseException) -> str:
    """Return ``Name: message`` without what pydantic adds around the sentence that matters."""
    message = str(error)
    if found := re.search(r"Value error, (.*?) \[type=", message, re.DOTALL):
        message = found[1]
    return f"{type(error).__name__}: {message}"
