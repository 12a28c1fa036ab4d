"""The table of faults: what was provoked, where, what it was called, and what stayed behind.

    python -m pytest tests --faults build/faults.jsonl
    python -m tests.fault_table build/faults.jsonl

Tests add a row through the fixture ``table``, after they have looked. A row that comes again replaces the
one before, so that the tests can be run in pieces.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers.base.machine import MIB
from helpers.faults import explain

# How a fault was had, in the order of the table.
HOW = {
    "engine": "provoked with a real vLLM engine or server on this machine",
    "system": "provoked with real processes, disks, archives and a hub on this machine",
    "recorded": "recorded earlier from a real run",
    "source": "read in the source: the hardware cannot be had here",
    "control": "slips of a reader's own cell, none of which is vLLM's",
}


class Table:
    """Collects rows; writes each at once, since a test run may be ended."""

    def __init__(self, path: Path | None):
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        how: str,
        fault: str,
        where: str,
        diagnosis: str,
        expected: str,
        left: int | None = None,
        processes: int | None = None,
    ) -> None:
        """One fault. ``left`` is bytes of memory that stayed in this process, None where it had taken none;
        ``processes`` how many more there are than before."""
        memory = "" if left is None else f"{left / MIB:+.0f} MiB"
        named = diagnosis if diagnosis == expected else f"{diagnosis} (expected {expected})"
        row = [list(HOW).index(how), fault, where, named, memory, "" if processes is None else processes]
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def check(self, how: str, fault: str, where: str, error: BaseException, expected: str, **left):
        """Diagnose ``error``, note the row, and insist on the diagnosis; return the report."""
        report = explain.explain(error)
        self.add(how, fault, where, report.name, expected, **left)
        assert report.name == expected, report
        return report


def markdown(path: Path) -> str:
    """The rows as one table a way of having had them, with how many there are and how many were misnamed."""
    newest = {tuple(row[:3]): row for row in map(json.loads, path.read_text().splitlines())}
    lines = []
    for number, meaning in enumerate(HOW.values()):
        mine = [row for row in newest.values() if row[0] == number]
        wrong = sum("(expected " in row[3] for row in mine)
        lines += [f"\n**{meaning[0].upper()}{meaning[1:]}**: {len(mine)}, {wrong} misnamed\n"]
        lines += ["| fault | where | diagnosis | memory left | processes left |", "|---|---|---|---|---|"]
        for row in mine:
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row[1:]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    text = markdown(source)
    source.with_suffix(".md").write_text(text)
    print(text)
