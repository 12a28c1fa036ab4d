"""From an exception and vLLM's log to what happened, the line that says so, and what to do next.

    try:
        ...
    except Exception as error:
        print(diagnose.explain(error))      # or, in a cell of its own after a failure: diagnose.explain()

vLLM's last words in a notebook are often "Engine core initialization failed. See root cause above", with
nothing above: the cause was written by a child, into the log. The log is asked exactly where an exception
says that the cause is elsewhere, so that a slip in your own cell is never blamed on an engine.
"""

from __future__ import annotations

import dis
import linecache
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from helpers.base import holders, redact
from helpers.base.files import ROOT
from helpers.base.holders import Holder
from helpers.base.machine import Machine, detect
from helpers.faults import catalogue, log, report
from helpers.faults.catalogue import Entry, Facts
from helpers.faults.log import ECHOES, error_lines, first_traceback, multiline, root_cause, specific
from helpers.faults.report import Report, cut

_SIGNALLED = re.compile(r"Failed core proc\(s\): \{[^}]*: -\d+\}|exit code -\d+")  # a process that was killed

# Where an error that is not the reader's own code comes from.
_MACHINERY = ("vllm", "torch", "transformers", "llmcompressor", "compressed_tensors", "huggingface_hub",
              "safetensors", "openai", "helpers")  # fmt: skip

_PACKAGES = ("site-packages", "dist-packages")  # the second on Debian, and so on Colab


def explain(error: BaseException | None = None, log: str = "", machine: Machine | None = None) -> Report:
    """Return what is known of ``error``, or of the last one that this Python showed.

    Args:
        error: any exception, of an engine, a server or your own cell.
        log: vLLM's output, if there is one; asked where the exception says that the cause is elsewhere.
        machine: what the memory is asked of; with an exception this machine unless given. A log alone may
            come from anywhere, so who holds memory here says nothing about it: nobody is asked.
    """
    if error is None and not log:
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is None:
            return Report("nothing", "Nothing has failed yet.", "No exception and no log were given.")
    if isinstance(report := getattr(error, "report", None), Report):
        return report  # made when it happened
    said, asked = _said(error), _said(error, _made_up)
    echo = error is None or any(mark in line for mark in ECHOES for line in asked)
    lines = asked + (error_lines(log) + multiline(log) if echo else [])
    elsewhere = error is None and machine is None
    holders = None if elsewhere else _holders(machine)
    where = _where(error) + (log if echo else "")
    found = catalogue.lookup(specific(lines), holders or (), where)
    if not found:  # an echo says something itself only where the log has no cause, or by an exit code
        echoes = lines if root_cause(log) is None else [line for line in lines if _SIGNALLED.search(line)]
        found = catalogue.lookup(echoes, holders or (), where)
    if found:
        return _known(*found, holders, log)
    if own := _own_code(error):
        return _own(own, said, log)
    if error is not None and not echo and type(error).__module__.startswith("helpers."):
        return Report("ours", redact.redact(str(error)), cut(redact.redact(said[0])), log=redact.redact(log))
    return _unknown(error, said, log, holders)


def _own(sentence: str, said: list[str], log: str) -> Report:
    return Report(
        "own-code",
        sentence,
        report.cut(redact.redact(said[0])),
        ("Mend that line and run the cell again.",),
        log=redact.redact(log),
    )


def _holders(machine: Machine | None) -> tuple[Holder, ...]:
    """Who holds memory; nobody where neither driver nor system will say: a diagnosis must not fail itself."""
    try:
        return tuple(holders.who_holds(machine or detect()))
    except Exception:
        return ()


def _known(entry: Entry, facts: dict, line: str, holders: Sequence | None, log: str) -> Report:
    orphans = " ".join(str(holder.pid) for holder in holders or () if holder.orphan)
    filled = Facts(facts | {"end_orphans": f"kill {orphans}"})
    return Report(
        entry.name,
        redact.redact(entry.what.format_map(filled)),
        report.cut(redact.redact(line)),
        tuple(redact.redact(step.format_map(filled)) for step in entry.do),
        entry.read,
        tuple(holders) if entry.memory and holders is not None else None,
        redact.redact(first_traceback(log))[-4000:] if entry.name == "engine-died" else "",
        redact.redact(log),
    )


def _unknown(error, said: list[str], log: str, holders: Sequence | None) -> Report:
    evidence = root_cause(log) or (said[0] if said else "no line of the log reports an error")
    trace = first_traceback(log) or ("".join(traceback.format_exception(error)) if error else "")
    return Report(
        "unknown",
        "Not in the catalogue: this failure is not known here, and nothing is guessed.",
        report.cut(redact.redact(evidence)),
        (
            "Read the traceback below, from its end.",
            "report.bundle()      # a file to attach to a bug report",
        ),
        "https://github.com/vllm-project/vllm/issues",
        None if holders is None else tuple(holders),
        redact.redact(trace)[-4000:],
        redact.redact(log),
    )


def _before(error: BaseException) -> BaseException | None:
    """The error that led to this one. One that was only being handled and has its report did not."""
    if error.__cause__ or error.__suppress_context__:
        return error.__cause__
    return None if isinstance(getattr(error.__context__, "report", None), Report) else error.__context__


def _said(error: BaseException | None, leave_out: Callable[[BaseException], bool] | None = None) -> list[str]:
    """``Name: message`` of an exception and of those that led to it, its own first."""
    found, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if not (leave_out and leave_out(error)):
            found.append(log.short(error))
            found += [str(note) for note in getattr(error, "__notes__", ())]
        error = _before(error)
    return found


def _where(error: BaseException | None) -> str:
    """The files that the error came through, and those of the errors that led to it."""
    files = []
    while error is not None and len(files) < 1000:
        files += [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        error = _before(error)
    return "\n".join(files)


def _own_code(error: BaseException | None) -> str | None:
    """A sentence on an error raised by the reader's own code: no frame of it is in vLLM or below."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    if not frames or any(_is_machinery(frame.filename) for frame in frames):
        return None
    own = [frame for frame in frames if not _is_library(frame.filename)]
    if not own:
        return None
    line = (own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno or 0)).strip()
    where = f"line {own[-1].lineno} of your own code" + (f", `{line}`" if line else "")
    return f"{type(error).__name__} in {where}: vLLM has no part in it."


def _made_up(error: BaseException) -> bool:
    """Whether a line of the reader's own raised it (`raise`, `assert`), with words of the reader's own.

    By the instruction that the traceback ends in: C code, such as torch's, raises in a call. What hides the
    error that it came from (`raise ... from None`) may repeat its words.
    """
    if error.__traceback__ is None or (error.__context__ is not None and _before(error) is None):
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and _own_code(error) is not None


def _is_library(path: str) -> bool:
    return any(folder in path for folder in _PACKAGES) or path.startswith(
        (sys.prefix + "/lib", sys.base_prefix + "/lib", "<frozen")
    )


def _is_machinery(path: str) -> bool:
    parts = Path(path).parts
    for folder in _PACKAGES:
        if folder in parts:
            return parts[parts.index(folder) + 1].removesuffix(".py") in _MACHINERY
    return Path(path).is_relative_to(ROOT / "helpers")
