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


def table(by_lesson: dict[str, Counter]) -> str:
    """The kinds that took most first, a column for each lesson by its number."""
    together = sum(by_lesson.values(), Counter())
    heads = [name.partition("_")[0] for name in by_lesson]
    lines = [f"{'seconds':22}{'all':>7}" + "".join(f"{head:>6}" for head in heads)]
    for kind, seconds in [*together.most_common(), ("together", together.total())]:
        each = [of.total() if kind == "together" else of[kind] for of in by_lesson.values()]
        lines.append(
            f"{kind:22}{seconds:>7.0f}" + "".join(f"{one:>6.0f}" if one else f"{'':6}" for one in each)
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table of a run's folder; 2 where it holds no executed copy."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.tools.profile", description="Where a run's time went."
    )
    parser.add_argument("folder", type=Path, help="a folder of executed notebooks, such as runs/latest")
    folder = parser.parse_args(arguments).folder
    if not (found := {name: of for name, of in profile(folder).items() if of}):
        print(
            f"{folder} has no executed notebook: `make run` keeps its copies in runs/latest.", file=sys.stderr
        )
        return 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
