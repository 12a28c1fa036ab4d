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
import html
import json
import linecache
import os
import re
import sys
import textwrap
import traceback
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helpers import catalogue, hardware, ownership, secrets

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
_SIGNALLED = re.compile(r"Failed core proc\(s\): \{[^}]*: -\d+\}|exit code -\d+")  # a process that was killed
# Where an error that is not the reader's own code comes from.
_MACHINERY = ("vllm", "torch", "transformers", "llmcompressor", "compressed_tensors", "huggingface_hub",
              "safetensors", "openai", "helpers")  # fmt: skip
_PACKAGES = ("site-packages", "dist-packages")  # the second on Debian, and so on Colab
LONGEST_EVIDENCE = 600  # characters; some messages list every tensor of a model


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


# -- secrets ----------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """Remove secrets, and the home's path."""
    text = secrets.remove(text)
    home = str(Path.home()) if os.environ.get("HOME") else ""
    return text.replace(home, "~") if len(home) > 1 else text


# -- the report -------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What is known of a failure.

    ``name`` is the catalogue's, or ``own-code`` (the reader's cell), ``ours`` (an error of these helpers,
    whose message says it all) or ``unknown``. ``holders`` are shown where memory is part of the answer.
    ``trace`` is the root traceback where the cause is not known. Secrets are removed from all of it.
    """

    name: str
    what: str
    evidence: str
    do: tuple[str, ...] = ()
    read: str = ""
    holders: tuple[ownership.Holder, ...] | None = None
    trace: str = ""
    log: str = field(default="", repr=False)

    @property
    def known(self) -> bool:
        """Whether the cause was found."""
        return self.name != "unknown"

    def __str__(self) -> str:
        first, _, rest = self.advice.partition("\n")
        trace = self.trace and "The first traceback:\n" + textwrap.indent(self.trace, "    ")
        return "\n".join(filter(None, (first, f"Evidence: {self.evidence}", rest, trace)))

    @property
    def held(self) -> list[str]:
        """Who holds memory, in words."""
        return [str(holder) for holder in self.holders or ()] or ["no process that shows from here"]

    @property
    def advice(self) -> str:
        """The report without its evidence and its traceback, for a message that has quoted it already."""
        lines = [f"What happened: {self.what}"]
        if self.holders is not None:
            lines.append(f"Who holds the memory: ‹{'; '.join(self.held)}›")
        if self.do:
            lines += ["What to do:", *(f"  {number}. {step}" for number, step in enumerate(self.do, 1))]
        if self.read:
            lines.append(f"Read: {self.read}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from helpers.show import as_it_is

        rows = [("Evidence", f"<code>{_code(self.evidence)}</code>")]
        if self.holders is not None:
            held = _code("\n".join(self.held))
            rows.append(("Who holds the memory", f'<i class="measured">{held}</i>'))
        if self.do:
            rows.append(
                (
                    "What to do",
                    '<ol style="margin:0">'
                    + "".join(f"<li>{_code(step)}</li>" for step in self.do)
                    + "</ol>",
                )
            )
        if self.read:
            rows.append(("Read", _code(self.read)))
        if self.trace:
            rows.append(("First traceback", f"<pre>{html.escape(self.trace)}</pre>"))
        body = "".join(
            f'<tr><th scope="row" style="text-align:left;vertical-align:top;white-space:nowrap">{name}</th>'
            f'<td style="text-align:left">{value}</td></tr>'
            for name, value in rows
        )
        keep = as_it_is(self.what + body)
        return f"<p{keep}><b>{_code(self.what)}</b></p><table{keep}><tbody>{body}</tbody></table>"

    def bundle(self, path: str | Path = "diagnosis.zip") -> Path:
        """Write what a bug report needs into one archive, secrets removed; return its path.

        The report, the versions, the hardware, the settings that vLLM reads, and the whole log.
        """
        from helpers import records

        settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("VLLM_", "CUDA_", "HF_"))}
        settings = {k: secrets.REMOVED if secrets.NAME.search(k) else v for k, v in settings.items()}
        facts = {
            "versions": records.versions() | {"python": sys.version.split()[0]},
            "machine": hardware.detect().facts(),
            "settings": settings,
        }
        files = {"report.txt": str(self), "facts.json": json.dumps(facts, indent=1), "log.txt": self.log}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, redact(text))
        return Path(path)


def _code(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def explain(
    error: BaseException | None = None, log: str = "", machine: hardware.Machine | None = None
) -> Report:
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
    lines = asked + (error_lines(log) + _multiline(log) if echo else [])
    elsewhere = error is None and machine is None
    holders = None if elsewhere else _holders(machine)
    where = _where(error) + (log if echo else "")
    found = catalogue.lookup(_specific(lines), holders or (), where)
    if not found:  # an echo says something itself only where the log has no cause, or by an exit code
        echoes = lines if root_cause(log) is None else [line for line in lines if _SIGNALLED.search(line)]
        found = catalogue.lookup(echoes, holders or (), where)
    if found:
        return _known(*found, holders, log)
    if own := _own_code(error):
        return _own(own, said, log)
    if error is not None and not echo and type(error).__module__.startswith("helpers."):
        return Report("ours", redact(str(error)), _cut(redact(said[0])), log=redact(log))
    return _unknown(error, said, log, holders)


def _own(sentence: str, said: list[str], log: str) -> Report:
    return Report(
        "own-code",
        sentence,
        _cut(redact(said[0])),
        ("Mend that line and run the cell again.",),
        log=redact(log),
    )


def _holders(machine: hardware.Machine | None) -> tuple[ownership.Holder, ...]:
    """Who holds memory; nobody where neither driver nor system will say: a diagnosis must not fail itself."""
    try:
        return tuple(ownership.holders(machine or hardware.detect()))
    except Exception:
        return ()


def _known(entry: catalogue.Entry, facts: dict, line: str, holders: Sequence | None, log: str) -> Report:
    orphans = " ".join(str(holder.pid) for holder in holders or () if holder.orphan)
    filled = catalogue.Facts(facts | {"end_orphans": f"kill {orphans}"})
    return Report(
        entry.name,
        redact(entry.what.format_map(filled)),
        _cut(redact(line)),
        tuple(redact(step.format_map(filled)) for step in entry.do),
        entry.read,
        tuple(holders) if entry.memory and holders is not None else None,
        redact(_first_traceback(log))[-4000:] if entry.name == "engine-died" else "",
        redact(log),
    )


def _unknown(error, said: list[str], log: str, holders: Sequence | None) -> Report:
    evidence = root_cause(log) or (said[0] if said else "no line of the log reports an error")
    trace = _first_traceback(log) or ("".join(traceback.format_exception(error)) if error else "")
    return Report(
        "unknown",
        "Not in the catalogue: this failure is not known here, and nothing is guessed.",
        _cut(redact(evidence)),
        (
            "Read the traceback below, from its end.",
            "report.bundle()      # a file to attach to a bug report",
        ),
        "https://github.com/vllm-project/vllm/issues",
        None if holders is None else tuple(holders),
        redact(trace)[-4000:],
        redact(log),
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
            found.append(short(error))
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


def _specific(lines: list[str]) -> list[str]:
    return [line for line in lines if not any(echo in line for echo in ECHOES)]


def _multiline(log: str) -> list[str]:
    """The error lines as one text, for a message that runs over several; echoes would drop all of it."""
    return ["\n".join(_specific(error_lines(log)))]


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_EVIDENCE else text[: LONGEST_EVIDENCE - 4] + " ..."


def _first_traceback(log: str) -> str:
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
    return Path(path).parent == Path(__file__).parent
