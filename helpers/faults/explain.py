"""From an exception and vLLM's log to what happened, the line that says so, and what to do next.

    try:
        ...
    except Exception as error:
        print(explain(error))      # or, in a cell of its own after a failure: explain()

vLLM's last words in a notebook are often "Engine core initialization failed. See root cause above", with
nothing above: the cause was written by a child, into the log. The log is asked exactly where an exception
says that the cause is elsewhere, so that a slip in your own cell is never blamed on an engine.

A log from anywhere, without Python: ``python -m helpers.explain``.
"""

import sys
import traceback

from helpers.base import holders
from helpers.base.holders import Holder
from helpers.base.machine import Machine, detect
from helpers.faults import catalogue, whose
from helpers.faults import log as logs
from helpers.faults.conditions import Seen
from helpers.faults.report import Report

ISSUES = "https://github.com/vllm-project/vllm/issues"


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
    chain = whose.chain(error)
    said, asked = _said(chain), _said([link for link in chain if not whose.made_up(link)])
    elsewhere = error is None or any(logs.is_echo(line) for line in asked)
    read = log if elsewhere else ""  # an old log beside an exception does not count
    held = None if error is None and machine is None else _held(machine)
    seen = Seen("", 0, read, _where(chain), held, whose.readers_line(error))
    hit = _lookup(asked, logs.error_lines(read), seen, logs.root_cause(read))
    if hit and not whose.cell_of(read, by_raise=True):
        trace = logs.first_traceback(log) if hit.entry.name == "engine-died" else ""
        told = held if hit.entry.memory else None
        return Report(hit.entry.name, hit.what, hit.evidence, hit.do, hit.entry.read, told, trace, log)
    if error is not None and not elsewhere and type(error).__module__.startswith("helpers."):
        return Report("ours", str(error), said[0], raw_log=log)
    first = logs.first_error(read) or (said[0] if said else "")
    if sentence := whose.cell_of(read) if elsewhere else whose.own_code(error):
        return Report("own-code", sentence, first, ("Mend that line and run the cell again.",), raw_log=log)
    return _unknown(error, first, read, held, log)


def _lookup(asked: list[str], lines: list[str], seen: Seen, cause: str | None) -> catalogue.Hit | None:
    """The catalogue's answer, to what reports an error first; an echo's words count where nothing else does.

    Where a log has its cause, an echo says something itself only by an exit code.
    """
    lines = asked + logs.said(lines)
    hit = catalogue.lookup([line for line in lines if not logs.is_echo(line)], seen)
    if hit and hit.entry.tier != "last":
        return hit
    echoes = [line for line in lines if cause is None or logs.SIGNALLED.search(line)]
    return hit or catalogue.lookup(echoes, seen)


def _held(machine: Machine | None) -> tuple[Holder, ...]:
    """Who holds memory; nobody where neither driver nor system will say: a diagnosis must not fail itself."""
    try:
        return tuple(holders.who_holds(machine or detect()))
    except Exception:
        return ()


def _unknown(error, first: str, read: str, held: tuple[Holder, ...] | None, log: str) -> Report:
    """What is not in the catalogue, with the first error of where the cause is said to be."""
    trace = logs.first_traceback(read) or ("".join(traceback.format_exception(error)) if error else "")
    steps = ["report.bundle()      # a file to attach to a bug report"]
    if trace:
        steps.insert(0, "Read the traceback below, from its end.")
    if not first:
        again = "of a container that was started again: kubectl logs --previous"
        steps = [f"Give the log from its beginning; {again}"]
    elif error is not None and not read and logs.is_echo(first):
        steps.insert(0, "explain(error, log=...): what the engine's process wrote is said to have the cause.")
    what = "Not in the catalogue: this failure is not known here, and nothing is guessed."
    first = first or "no line of the log reports an error"
    return Report("unknown", what, first, tuple(steps), ISSUES, held, trace, log)


def _said(chain: list[BaseException]) -> list[str]:
    """``Name: message`` of each exception, with its notes."""
    return [line for link in chain for line in (logs.short(link), *map(str, getattr(link, "__notes__", ())))]


def _where(chain: list[BaseException]) -> str:
    """The frames that an error came through, and those of what led to it, as a traceback has them."""
    frames = [frame for link in reversed(chain) for frame in whose.frames(link)]
    return "".join(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n' for frame in frames)
