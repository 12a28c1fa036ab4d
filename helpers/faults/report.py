"""A diagnosis, as a card in a notebook and as text elsewhere."""

import html
import json
import os
import sys
import textwrap
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from helpers.base import machine, page, redact
from helpers.base.holders import Holder
from helpers.base.redact import NAME, REMOVED

LONGEST_EVIDENCE, LONGEST_TRACE = 600, 4000  # characters; some messages list every tensor of a model


@dataclass
class Report:
    """What is known of a failure.

    ``name`` is the catalogue's, or ``own-code`` (the reader's cell, or a library that it called), ``ours``
    (an error of these helpers, whose message says it all) or ``unknown``.
    ``holders`` are shown where memory is part of the answer.
    ``trace`` is the root traceback where the cause is not known. Secrets are removed from all of it; from
    ``raw_log``, which may be long, when ``bundle`` writes it.
    """

    name: str
    what: str
    evidence: str
    do: tuple[str, ...] = ()
    read: str = ""
    holders: tuple[Holder, ...] | None = None
    trace: str = ""
    raw_log: str = field(default="", repr=False)

    def __post_init__(self):
        self.what, self.do = redact.redact(self.what), tuple(map(redact.redact, self.do))
        self.evidence = cut(redact.redact(self.evidence))
        self.trace = redact.redact(self.trace[-2 * LONGEST_TRACE :])[-LONGEST_TRACE:]

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
        held = "" if self.holders is None else f'<i class="measured">{_code(chr(10).join(self.held))}</i>'
        steps = "".join(f"<li>{_code(step)}</li>" for step in self.do)
        rows = {
            "Evidence": f"<code>{_code(self.evidence)}</code>",
            "Who holds the memory": held,
            "What to do": steps and f'<ol style="margin:0">{steps}</ol>',
            "Read": _code(self.read),
            "First traceback": self.trace and f"<pre>{html.escape(self.trace)}</pre>",
        }
        body = "".join(
            f'<tr><th scope="row" style="text-align:left;vertical-align:top;white-space:nowrap">{name}</th>'
            f'<td style="text-align:left">{value}</td></tr>'
            for name, value in rows.items()
            if value
        )
        keep = page.as_it_is(self.what + body)
        return f"<p{keep}><b>{_code(self.what)}</b></p><table{keep}><tbody>{body}</tbody></table>"

    def bundle(self, path: str | Path = "diagnosis.zip") -> Path:
        """Write what a bug report needs into one archive, secrets removed; return its path.

        The report, the versions, the hardware, the settings that vLLM reads, and the whole log.
        """
        settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("VLLM_", "CUDA_", "HF_"))}
        settings = {k: REMOVED if NAME.search(k) else v for k, v in settings.items()}
        facts = {
            "versions": machine.versions() | {"python": sys.version.split()[0]},
            "machine": machine.detect().facts(),
            "settings": settings,
        }
        files = {"report.txt": str(self), "facts.json": json.dumps(facts, indent=1), "log.txt": self.raw_log}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, redact.redact(text))
        return Path(path)


def _code(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def cut(text: str, longest: int = LONGEST_EVIDENCE) -> str:
    """Return a text for one line of evidence: without line breaks, and not too long."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 4] + " ..."
