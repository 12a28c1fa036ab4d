"""A log's lines without what stands before a message, and the first error among them.

The same message reaches a reader behind many things: the child that wrote it, vLLM's level and file, a
container's name, a cluster's time, a colour. What is read is the message.
"""

import functools
import json
import re

MOST = 10_000  # lines from either end of what reports errors in a log that are searched
LONGEST = 4_000  # characters from either end of a line: some messages list every tensor of a model

_COLOUR = re.compile(r"(?:\x1b|\^\[)\[[\d;]*[A-Za-z]")
_TIME = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?"
# One of the things that stand before a message; they are taken off until none is left.
_BEFORE = re.compile(
    r"(?:[\w./-]+|\[[\w.-]+\]) +\| ?(?=\S|$|  )"  # docker compose: vllm-1  |
    r"|\[pod/[^\]]+\] "  # kubectl logs --prefix
    rf"|\[?{_TIME}\]?(?: std(?:out|err) [FP]| \|)? ?"  # kubectl --timestamps, CRI, a cloud's
    r"|[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ [\w.-]+(?:\[\d+\])?: ?"  # journald
    r"|\[?rank ?\d+\]: ?"  # torchrun
    r"|\((?:[^()]+ )?pid=\d+[^()]*\) ?"  # vLLM's children, Ray's workers
    r"|\[[\w./-]+\.py:\d+\] ?"  # a file alone
    r"|-? ?[\w.]+ - (?=(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) )"  # Python's logging: name - LEVEL
    r"|\| (?=(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) )"  # loguru: time | LEVEL | place - message
)
_LEVEL = re.compile(
    r"(?:- )?\[?(TRACE|DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL|FATAL)\]?"
    r"(?: \d\d-\d\d \d\d:\d\d:\d\d \[?([\w./-]+):\d+\] ?|:(?:[\w.]+:)?\s*| +[-|] | {2,}| (?=\[)|$)"
)
# vLLM's own head, wherever it stands: whatever is before it, a message follows it.
_HEAD = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[?[\w./-]+:\d+\] ?")
_CALM, _LOUD = {"TRACE", "DEBUG", "INFO", "WARN", "WARNING"}, {"ERROR", "CRITICAL", "FATAL"}
# The end of a Python traceback: an exception's name and its message, which an `assert` mostly has not. The
# word "Error" alone is anybody's, and a task is cancelled because of something else.
_ERROR = re.compile(
    r"^(?!Error$|(?:\w+\.)*CancelledError$)"
    r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:_\w+)?|(?:\w+\.)+(?:Unsupported|TimeoutExpired|\w*Timeout))"
    r"(?:: (.+))?$"
)
# What reports an error without being a Python exception: argparse, a shell, a container, a server's logger.
_OTHER = re.compile(
    r"^(?:[\w./ -]+: )?error: |^(?:FATAL|fatal)[: ]|: command not found$|^Error response from "
)
_WORDS = re.compile(
    r"(?i)\berrors?\b|\bexception\b|\bfail(?:ed|ure)\b|\bkilled\b|\bfatal\b|core dumped|exit code"
)
# Errors that only say that another one happened.
ECHOES = (
    "Engine core initialization failed",
    "EngineCore encountered",
    "See root cause above",
    "EngineDeadError",
    "See stack trace",
    "EngineCore failed to start",
    "Background loop has errored already",
    "Engine process failed to start",
    "Engine loop is not running",
    "WorkerProc initialization failed",
    "WorkerProc failed to start",
    "Failed core proc(s)",
    "Executor failed.",
    "Got fatal signal from worker processes",
    "Process EngineCore",
    "the engine's process ended",
)
# A process that was ended by a signal: an echo that says something itself.
SIGNALLED = re.compile(r"Failed core proc\(s\): \{[^}]*: -\d+\}|exit code:? (?:-\d+|137)\b")


def plain(text: str) -> str:
    """``text`` without colours."""
    return _COLOUR.sub("", text)


def message(line: str) -> tuple[str, str]:
    """Return a line's level, where it has one, and its message without what stands before it."""
    line = plain(line)
    if line.startswith('{"'):
        line = _of_json(line)
    if head := _HEAD.search(line, 0, 300):
        line = line[head.start() :]
    line = _bare(line)
    level = ""
    if found := _LEVEL.match(line):
        level, line = found[1], _bare(line[found.end() :])
        if (found[2] or "").endswith("dump_input.py"):
            level = "INFO"  # a step that fails dumps vLLM's whole configuration, as an error
    return level, line.rstrip()


def _bare(line: str) -> str:
    while found := _BEFORE.match(line):
        line = line[found.end() :]
    return line


def _of_json(line: str) -> str:
    """The message of a line that a container's or a cloud's logger wrote as JSON."""
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    texts = (fields.get(name) for name in ("log", "message", "textPayload", "msg", "MESSAGE"))
    return next((text for text in texts if isinstance(text, str)), line)


@functools.lru_cache(maxsize=2)  # a diagnosis asks the same log several times
def _read(log: str) -> tuple[tuple[str, str], ...]:
    """Level and message of the lines that may report an error; of very many the first and the last."""
    found = []
    for line in log.splitlines():
        if len(line) > 2 * LONGEST:
            line = line[:LONGEST] + " ... " + line[-LONGEST:]
        level, said = message(line)
        if said and level not in _CALM:
            found.append((level, said))
    return tuple(found if len(found) <= 2 * MOST else found[:MOST] + found[-MOST:])


def error_lines(log: str) -> list[str]:
    """Return the lines of a log that may report an error, without what stands before their messages.

    Of a log with more than twice ``MOST`` such lines the middle is left out.
    """
    return [said for _, said in _read(log)]


_FRAME = re.compile(r'\s*File "[^"]*", line \d+')
_SOURCE = re.compile(r"\s{4,}\S|\s*[~^]+$|\s*\.\.\.<|\s*raise \w|-+> ?\d+ |\s{3,}\d+ ")
_NUMBERED = re.compile(r"(?:-{2,}> ?|\s{4,})\d+(?:\s|$)")  # IPython's source lines


def said(lines: list[str]) -> list[str]:
    """The lines without a traceback's source, which may quote any message before it is filled in."""
    kept, after_frame, indented = [], False, False
    for line in lines:
        if _NUMBERED.match(line):
            continue
        frame, source = bool(_FRAME.match(line)), bool(_SOURCE.match(line))
        if not frame and ((source and (after_frame or indented)) or (after_frame and not _ends(line))):
            after_frame, indented = False, source
            continue
        kept.append(line)
        after_frame = indented = frame
    return kept


def _ends(line: str) -> bool:
    return bool(_ERROR.match(line.strip())) or line.startswith(
        ("Traceback ", "During handling", "The above exception")
    )


def is_echo(line: str) -> bool:
    """Whether a line only says that another error happened."""
    return any(echo in line for echo in ECHOES)


def named(line: str) -> str | None:
    """A traceback's last line as ``Name: message``, without the name's module; or nothing."""
    found = _ERROR.match(line.strip())
    if not found:
        return None
    name = found[1].rsplit(".", 1)[-1]
    return f"{name}: {found[2]}" if found[2] else name


def root_cause(log: str) -> str | None:
    """Return the first error of ``log`` that is not an echo of another, as ``Name: message``."""
    lines = error_lines(log)
    for number, line in enumerate(lines):
        if (found := named(line)) and not is_echo(line):
            return _of_pydantic(found, lines[number + 1 : number + 3])
    return None


def first_error(log: str) -> str | None:
    """Return ``root_cause``; without one the first line that reports an error in other words."""
    if found := root_cause(log):
        return found
    told = [(level, said.strip()) for level, said in _read(log) if not is_echo(said)]
    for wanted in (
        lambda level, said: _OTHER.search(said),
        lambda level, said: level in _LOUD and not said.startswith(("Traceback", "File ")),
        lambda level, said: _WORDS.search(said) and not said.startswith(("File ", "raise ", "except ")),
    ):
        if found := next((said for level, said in told if wanted(level, said)), None):
            return found
    return next((said.strip() for said in error_lines(log) if is_echo(said)), None)


def _of_pydantic(said: str, below: list[str]) -> str:
    """What pydantic says below "1 validation error for ...", which is the cause."""
    name, _, text = said.partition(": ")
    if not re.match(r"\d+ validation errors? for ", text):
        return said
    found = re.search(r"Value error, (.*?) \[type=", " ".join(below))
    return f"{name}: {found[1]}" if found else said


def short(error: BaseException) -> str:
    """Return ``Name: message`` without what pydantic adds around the sentence that matters."""
    name, said = type(error).__name__, str(error)
    return _of_pydantic(f"{name}: {said}", said.splitlines()) if said else name


def first_traceback(log: str) -> str:
    """Return the first traceback of a log, up to and with its error."""
    lines = error_lines(log)
    begins = (n for n, line in enumerate(lines) if line.startswith("Traceback (most recent call last)"))
    if (start := next(begins, None)) is None:
        return ""
    ends = (n for n in range(start, len(lines)) if _ERROR.match(lines[n].strip()))
    return "\n".join(lines[start : next(ends, len(lines)) + 1])
