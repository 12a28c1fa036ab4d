"""A new notebook with the parts that every lesson has: `make notebook NAME=09_my_question`.

It runs as it is, and says in each cell what belongs there. The set-up cell is the other notebooks' own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from helpers.base.files import ROOT

NOTEBOOKS = ROOT / "notebooks"

TITLE = """# {question}

**The answer in three lines**, with what would overrule it.

<img src="pictures/{name}.png" width="640" alt="What the figure that carries the answer shows">

**You need** the set-up; no GPU. **It takes** a minute. **Before:** [{before}]({before}.ipynb)."""

IMPORTS = """from helpers.base import page
from helpers.base.page import Table
from helpers.model import inputs, schemes, sizes
"""

PARAMETERS_TEXT = (
    "What each parameter means. Literals only, so that `make run` and papermill can replace them."
)

PARAMETERS = """model = "auto"
out_dir = "../runs/lab"
"""

CHECKS = "lesson = inputs.check(model=model, out_dir=out_dir)"

PREDICT_TEXT = """## What is claimed stands in the heading

Guess first: what should come out? What is the same on every machine is printed plainly, and the tests
compare it; what was measured stands in ‹angle quotes›, with its unit."""

PREDICT = """predicted = {
    scheme.title: sizes.predicted_weights_bytes(scheme.name, lesson.model.folder)
    for scheme in schemes.SCHEMES.values()
}
Table(["scheme", "weights"], [[title, page.mib(size)] for title, size in predicted.items()])
"""

EXERCISE = """What it means: one sentence or two.

## Exercise

Something to work out. Then unfold."""

SOLUTION = """print(f"{predicted['Baseline (16-bit)'] / 2:,.0f} weights")"""

FOLDED = {"jupyter": {"source_hidden": True}}


def cells(name: str, question: str, before: str, set_up: str) -> list:
    """The cells of a lesson that answers ``question`` and follows the notebook ``before``."""
    from nbformat.v4 import new_code_cell, new_markdown_cell

    return [
        new_markdown_cell(TITLE.format(name=name, question=question, before=before)),
        new_code_cell(set_up, metadata=FOLDED),
        new_code_cell(IMPORTS.strip()),
        new_markdown_cell(PARAMETERS_TEXT),
        new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]}),
        new_code_cell(CHECKS, metadata=FOLDED),
        new_markdown_cell(PREDICT_TEXT),
        new_code_cell(PREDICT.strip()),
        new_markdown_cell(EXERCISE),
        new_code_cell(SOLUTION, metadata=FOLDED | {"tags": ["solution"]}),
        new_markdown_cell("What the reader takes away."),
    ]


def write(name: str, question: str, notebooks: Path = NOTEBOOKS) -> Path:
    """Write the notebook and return its path.

    Raises:
        ValueError: a name that does not say its place in the order, or that is taken.
    """
    import nbformat
    from nbformat.v4 import new_notebook

    path, others = notebooks / f"{name}.ipynb", sorted(notebooks.glob("[!.]*.ipynb"))
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name):
        raise ValueError(f"a name is two digits and words, such as 09_my_question, not {name!r}")
    if path.exists():
        raise ValueError(f"{path.name} is there already")
    first = json.loads(others[0].read_text(encoding="utf-8"))["cells"]
    set_up = "".join(next(cell["source"] for cell in first if cell["cell_type"] == "code"))
    before = max((other.stem for other in others if other.stem < name), default=others[0].stem)
    nbformat.write(new_notebook(cells=cells(name, question, before, set_up)), path)
    return path


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.tools.skeleton", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("name", help="two digits and words, such as 09_my_question")
    parser.add_argument("--question", default="What does it cost, and is it worth it?")
    given = parser.parse_args(arguments)
    try:
        print(f"Written: notebooks/{write(given.name, given.question).name}. Open it with `make lab`.")
    except ValueError as error:
        print(f"helpers.tools.skeleton: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
