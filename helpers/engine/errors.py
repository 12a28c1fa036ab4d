"""What can go wrong with an engine or a server, and the diagnosis that such an error carries."""

import os
from pathlib import Path

from helpers.base import redact
from helpers.faults import explain
from helpers.faults import log as logs
from helpers.faults.report import Report


class EngineError(RuntimeError):
    """An engine that cannot be used; the message says why and what to do.

    ``report`` is the diagnosis, made when it happened: a card in a notebook, the same as text elsewhere.
    """

    report: Report | None = None


class EngineStartError(EngineError):
    """vLLM could not build the engine; the message holds the root cause from its log."""


class EngineDiedError(EngineError):
    """The engine's process ended while it worked; the message says why, if that is known."""


class EngineClosedError(EngineError):
    """The engine was released or interrupted; open a new one."""


class MemoryHeldError(EngineError):
    """After the release the memory did not come back; the message names who holds it."""


def read_log(path: Path | None) -> str:
    """A log so far; empty before there is one."""
    return path.read_text(errors="replace") if path is not None and path.exists() else ""


def diagnosed(
    kind: type[EngineError], sentence: str, log_file: Path, error: Exception | None, otherwise: str
) -> EngineError:
    """An error that says what happened, why in the log's own words, what to do, and where the log is.

    Args:
        error: what to explain beside the log; None where nothing has failed yet, and no advice is due.
        otherwise: the cause where the log names none.
    """
    log, report = read_log(log_file), None
    lines = [sentence, f"Cause: {redact.redact(logs.root_cause(log) or otherwise)}"]
    if error is not None:
        report = explain.explain(error, log)
        lines += filter(None, [report.advice, report.trace])
    found = kind("\n".join([*lines, f"Full log: ‹{os.path.relpath(log_file)}›"]))
    found.report = report
    return found
