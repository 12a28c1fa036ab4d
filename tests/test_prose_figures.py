"""No number in prose without a source: digits in Markdown cells against ``prose_figures.yaml``."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LISTED = yaml.safe_load((Path(__file__).parent / "prose_figures.yaml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What is not prose: code blocks and spans, displayed formulas, the targets of links, numbered lists.
NOT_PROSE = (r"```.*?```", r"\$\$.*?\$\$", r"`[^`]*`", r"\]\([^)]*\)", r"(?m)^\d+\. ")
FIGURE = re.compile(r"[\w$.,%:/+-]*\d[\w.,%:/+-]*")


def figures(markdown: str) -> set[str]:
    """The words of a text that contain a digit, without the punctuation around them."""
    for pattern in NOT_PROSE:
        markdown = re.sub(pattern, " ", markdown, flags=re.S)
    return {word.strip(".,:-/") for word in FIGURE.findall(markdown)}


def prose(notebook: dict) -> str:
    """All Markdown of a notebook."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def words(entries: dict | None) -> set[str]:
    """The listed figures of a section, whatever their sources."""
    return {word for listed in (entries or {}).values() for word in str(listed).split()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_in_prose_has_a_source(path):
    found = figures(prose(json.loads(path.read_text(encoding="utf-8"))))
    own = words(LISTED["notebooks"].get(path.stem))
    unlisted = found - own - words(LISTED["names"])
    assert not unlisted, (
        f"in the prose of {path.stem}, without a source in prose_figures.yaml: {sorted(unlisted)}"
    )
    assert own <= found, f"listed for {path.stem} and not in its prose: {sorted(own - found)}"


def test_a_measured_number_in_prose_would_be_found():
    text = "It ran at 42.0 tok/s, 1.9x faster ($324/month), in `8` cells [of 3](x4.html):\n\n1. At 50 %."
    assert figures(text) == {"42.0", "1.9x", "$324/month", "3", "50"}
