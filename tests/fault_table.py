"""The table of faults: what was provoked, where, what it was called, and what stayed behind.

    python -m pytest tests --faults build/faults.jsonl
    python -m tests.fault_table build/faults.jsonl

Tests add a row through the fixture ``table``, after they have looked. A row that comes again replaces the
one before, so that the tests can be run in pieces.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.base.machine import MIB
from helpers.faults import explain

# How a fault was had, in the order of the table's parts.
HOW = {
    "engine": "provoked with a real vLLM engine or server on this machine",
    "system": "provoked with real processes, disks, archives and a hub on this machine",
    "recorded": "recorded earlier from a real run",
    "source": "read in the source: the hardware cannot be had here",
    "control": "slips of a reader's own cell, none of which is vLLM's",
}
BACK = "with its process"  # memory of a process that has ended


@dataclass(frozen=True)
class Row:
    """One fault. ``left`` is bytes of memory that stayed in this process, None where it had taken none;
    ``processes`` how many more there are than before."""

    how: str
    fault: str
    where: str
    diagnosis: str
    expected: str
    left: int | None = None
    processes: int | None = None

    @property
    def right(self) -> bool:
        return self.diagnosis == self.expected


class Table:
    """Collects rows; writes each at once, since a test run may be ended."""

    def __init__(self, path: Path | None):
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, how: str, fault: str, where: str, diagnosis: str, expected: str, **left) -> None:
        row = Row(how, fault, where, diagnosis, expected, **left)
        assert row.how in HOW
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def check(self, how: str, fault: str, where: str, error: BaseException, expected: str, **left):
        """Diagnose ``error``, note the row, and insist on the diagnosis; return the report."""
        report = explain.explain(error)
        self.add(how, fault, where, report.name, expected, **left)
        assert report.name == expected, report
        return report


def read(path: Path) -> list[Row]:
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    newest = {(row.how, row.fault, row.where): row for row in rows}
    return sorted(newest.values(), key=lambda row: list(HOW).index(row.how))


def markdown(rows: list[Row]) -> str:
    """The table, and under it the counts."""
    head = ("fault", "where", "diagnosis", "memory left", "processes left")
    lines = []
    for how, meaning in HOW.items():
        mine = [row for row in rows if row.how == how]
        if not mine:
            continue
        lines += [
            f"\n**{meaning[0].upper()}{meaning[1:]}** ({len(mine)})\n",
            _line(head),
            _line(("---",) * len(head)),
        ]
        lines += [_line(_shown(row)) for row in mine if how != "control"]
        if how == "control":
            lines += [_line((row.fault, row.where, row.diagnosis, "", "")) for row in mine if not row.right]
    counts = Counter(row.how for row in rows)
    names = {row.expected for row in rows if row.how in ("engine", "system")}
    wrong = Counter(row.how for row in rows if not row.right)
    lines += ["", *(f"{counts[how]:4} {meaning}" for how, meaning in HOW.items())]
    lines += [f"{len(names):4} different diagnoses of the faults provoked here"]
    lines += [f"{sum(wrong.values()) - wrong['control']:4} faults with another diagnosis than expected"]
    lines += [f"{wrong['control']:4} of {counts['control']} of the control misdiagnosed"]
    return "\n".join(lines) + "\n"


def _shown(row: Row) -> tuple[str, ...]:
    left = BACK if row.left is None and row.processes is not None else ""
    left = f"{row.left / MIB:+.0f} MiB" if row.left is not None else left
    diagnosis = row.diagnosis if row.right else f"{row.diagnosis} (expected {row.expected})"
    return row.fault, row.where, diagnosis, left, "" if row.processes is None else str(row.processes)


def _line(cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    text = markdown(read(source))
    source.with_suffix(".md").write_text(text)
    print(text)
