"""Where the seconds of a run went, by kind and by lesson: ``python -m helpers.tools.profile runs/latest``.

An executed copy has each cell's seconds, and its outputs say how long vLLM's import and every start took.
The rest of a cell counts as what the cell asks for, by the name that it calls.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import nbformat

from helpers.base.page import Table

# What a cell prints of its starts, and what the rest of a cell is, the first that fits.
TOLD = {
    "import of vLLM": r"importing vLLM took ‹([\d.]+) s›",
    "start of an engine": r"vLLM is ready after ‹([\d.]+) s›",
    "start of a server": r"The server \([\w ]+\) answers after ‹([\d.]+) s›",
    "start of a router": r"The router \([\w ]+\) and \d+ servers answer after ‹([\d.]+) s›",
}
REST = {
    "load on servers": r"\.bench\(|clients\.crowd|run_batch|rate\(router|first_token_ms\(",
    "making a checkpoint": r"checkpoints\.(made|make)|oneshot",
    "quality: prefills": r"trial\.|keep_reference|reference_of|divergence\.compare|task\.answer",
    "speed: decoding": r"measure_speed|bandwidth",
    "faults, provoked": r"except \w*Error|except \w*Exception",
    "imports": r"^(from|import) ",
}


def seconds_by_kind(cell) -> Counter:
    """A code cell's seconds by kind; empty for one that did not run."""
    took = cell.metadata.get("papermill", {}).get("duration") or 0.0
    said = "".join(output.get("text", "") for output in cell.get("outputs", ()))
    found = Counter({kind: sum(map(float, re.findall(told, said))) for kind, told in TOLD.items()})
    if (told := found.total()) > took:  # side by side: each said how long it took
        found = Counter({kind: seconds * took / told for kind, seconds in found.items()})
    fits = (kind for kind, calls in REST.items() if re.search(calls, cell.source, re.MULTILINE))
    found[next(fits, "everything else")] += max(0.0, took - found.total())
    return +found


def profile(folder: Path) -> dict[str, Counter]:
    """Seconds by kind of every executed copy in a folder, by its name."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        found[path.stem] = sum((seconds_by_kind(c) for c in cells if c.cell_type == "code"), Counter())
    return found


def table(by_lesson: dict[str, Counter]) -> Table:
    """The kinds that took most first, a column for each lesson by its number."""
    together = sum(by_lesson.values(), Counter())
    columns = {"all": together} | {name.partition("_")[0]: of for name, of in by_lesson.items()}
    rows = [
        [kind, *(f"{of[kind]:.0f}" if of[kind] else "" for of in columns.values())]
        for kind, _ in together.most_common()
    ]
    rows.append(["together", *(f"{of.total():.0f}" for of in columns.values())])
    return Table(["seconds", *columns], rows)


def main(arguments: list[str] | None = None) -> int:
    """Print the table of a run's folder; 2 where it holds no executed copy."""
    parser = argparse.ArgumentParser("python -m helpers.tools.profile", description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path, help="a folder of executed notebooks, such as runs/latest")
    folder = parser.parse_args(arguments).folder
    if not (found := {name: of for name, of in profile(folder).items() if of}):
        print(
            f"{folder} has no executed notebook: `make run` keeps its copies in runs/latest.", file=sys.stderr
        )
        return 2
    print(table(found).aligned())
    return 0


if __name__ == "__main__":
    sys.exit(main())
