"""What an engine's log says: its error lines and the root cause."""

from __future__ import annotations

import re

# What vLLM puts before a line of a child, and before a line of its logger.
_PREFIX = re.compile(r"^(?:\([^()]+ pid=\d+\) )+(?:(?:ERROR|CRITICAL) \d\d-\d\d \S+ \[\S+?\] ?)?|"
                     r"^(?:ERROR|CRITICAL) \d\d-\d\d \S+ \[\S+?\] ?")  # fmt: skip

# Lines that report no error, whatever words are in them. A step that fails dumps vLLM's whole configuration.
_CALM = re.compile(r"^(?:\([^()]+ pid=\d+\) )*(?:(?:DEBUG|INFO|WARNING)(?: \d\d-\d\d|:)|"
                   r"ERROR \d\d-\d\d \S+ \[\S*dump_input\.py:\d+\])")  # fmt: skip

# The end of a Python traceback: an exception's name and its message, which an `assert` mostly has not. The
# word "Error" alone is anybody's, and a task is cancelled because of something else.
_ERROR = re.compile(
    r"^(?!Error$|(?:\w+\.)*CancelledError$)"
    r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:_\w+)?|(?:\w+\.)+(?:Unsupported|TimeoutExpired))"
    r"(?:: (.+))?$"
)

# Errors that only say that another one happened.
ECHOES = (
    "Engine core initialization failed",
    "EngineCore encountered",
    "See root cause above",
    "EngineDeadError",
    "See stack trace (above)",
    "the engine's process ended",
)


def error_lines(log: str) -> list[str]:
    """Return the lines of a log that may report an error, without what vLLM puts before them."""
    return [
        _PREFIX.sub("", line).rstrip() for line in log.splitlines() if line.strip() and not _CALM.match(line)
    ]


def root_cause(log: str) -> str | None:
    """Return the first error of ``log`` that is not an echo of another, as ``Name: message``."""
    for line in error_lines(log):
        found = _ERROR.match(line.strip())
        if found and not any(echo in line for echo in ECHOES):
            name, message = found[1].rsplit(".", 1)[-1], found[2]
            return f"{name}: {_of_pydantic(message, log)}" if message else name
    return None


def _of_pydantic(message: str, log: str) -> str:
    """What pydantic says on the line below "1 validation error for ...", which is the cause."""
    if not re.match(r"\d+ validation errors? for ", message):
        return message
    below = re.search(re.escape(message) + r"\s*\n.*?Value error, (.*?) \[type=", log, re.DOTALL)
    return below[1] if below else message


def short(error: BaseException) -> str:
    """Return ``Name: message`` without what pydantic adds around the sentence that matters."""
    message = str(error)
    if found := re.search(r"Value error, (.*?) \[type=", message, re.DOTALL):
        message = found[1]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def specific(lines: list[str]) -> list[str]:
    return [line for line in lines if not any(echo in line for echo in ECHOES)]


def multiline(log: str) -> list[str]:
    """The error lines as one text, for a message that runs over several; echoes would drop all of it."""
    return ["\n".join(specific(error_lines(log)))]


def first_traceback(log: str) -> str:
    """The first traceback of a log, up to and with its error."""
    lines = error_lines(log)
    starts = [
        number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")
    ]
    if not starts:
        return ""
    for end in range(starts[0], len(lines)):
        if _ERROR.match(lines[end].strip()):
            return "\n".join(lines[starts[0] : end + 1])
    return "\n".join(lines[starts[0] :])
