"""A new notebook with the parts that every lesson has: `make notebook NAME=07_my_question`.

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

Why the question matters, in two sentences.

**You will be able to** say what the reader can do afterwards.

**You need** the set-up from the README; no GPU. **It takes** a minute. \
**Before:** [{before}]({before}.ipynb)."""

PARAMETERS_TEXT = """The parameters: what each means and which values make sense. Literals only, so that
`make run` and papermill can replace them."""

PARAMETERS = """model = "auto"
out_dir = "../runs/lab"
"""

CHECKS_TEXT = "They are checked before anything is loaded."

CHECKS = """out = Path(parameters.text("out_dir", out_dir))
machine = hardware.detect()
chosen = models.resolve(models.default(machine) if model == "auto" else parameters.text("model", model))
print(f"Model: {chosen.title}.")
"""

PREDICT_TEXT = """## Predict

What should come out, and why? A figure that is the same on every machine is printed plainly, and the tests
compare it; one that was measured stands in ‹angle quotes›, with its unit."""

PREDICT = """predicted = {
    scheme.title: schemes.predicted_weights_bytes(scheme.name, chosen.folder)
    for scheme in schemes.SCHEMES.values()
}
show.Table(["scheme", "weights"], [[title, show.mib(size)] for title, size in predicted.items()])
"""

SUMMARY = """What it means: one sentence after each cell.

## Summary

* What the reader takes away."""


def cells(question: str, before: str, set_up: str) -> list:
    """The cells of a lesson that answers ``question`` and follows the notebook ``before``."""
    from nbformat.v4 import new_code_cell, new_markdown_cell

    parameters = new_code_cell(PARAMETERS.strip())
    parameters.metadata["tags"] = ["parameters"]
    imports = "from pathlib import Path\n\nfrom helpers import hardware, models, parameters, schemes, show"
    return [
        new_markdown_cell(TITLE.format(question=question, before=before)),
        new_markdown_cell("## Set-up"),
        new_code_cell(set_up),
        new_code_cell(imports),
        new_markdown_cell(PARAMETERS_TEXT),
        parameters,
        new_markdown_cell(CHECKS_TEXT),
        new_code_cell(CHECKS.strip()),
        new_markdown_cell(PREDICT_TEXT),
        new_code_cell(PREDICT.strip()),
        new_markdown_cell(SUMMARY),
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
        raise ValueError(f"a name is two digits and words, such as 07_my_question, not {name!r}")
    if path.exists():
        raise ValueError(f"{path.name} is there already")
    first = json.loads(others[0].read_text(encoding="utf-8"))["cells"]
    set_up = "".join(next(cell["source"] for cell in first if cell["cell_type"] == "code"))
    before = max((other.stem for other in others if other.stem < name), default=others[0].stem)
    nbformat.write(new_notebook(cells=cells(question, before, set_up)), path)
    return path


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.tools.skeleton", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("name", help="two digits and words, such as 07_my_question")
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
