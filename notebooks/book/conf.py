"""`make book`: a static site of the README and the notebooks, from their stored outputs; nothing is run.

With REPOSITORY, the address of a copy on GitHub, each page links to its source and to Colab. Formulas become
MathML, which browsers draw themselves, so that the pages need no network.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parent.parent.parent
REPOSITORY = os.environ.get("REPOSITORY", "")

project = "Which quantization for my model on my GPU?"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
html_title = f"Quantized deployment with vLLM {release}"
language = "en"


def pages(*patterns: str) -> list[str]:
    """Pages by their place in the repository, without their ending."""
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).with_suffix("").as_posix() for path in found]


PARTS = {
    "Lessons": pages("notebooks/0*.ipynb"),
    "Appendices": pages("notebooks/9*.ipynb"),
    "To look up": pages("notebooks/*.md", "notebooks/deploy/*.md"),
    "The project": pages("CONTRIBUTING.md", "CHANGELOG.md", "NOTICE.md"),
}
root_doc = "README"
include_patterns = ["README.md", *(f"{page}.*" for part in PARTS.values() for page in part)]
exclude_patterns = ["**/.*"]

extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "Unfold", "Fold"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_dmath_allow_digits = False  # between two prices, $1 and $2, there is no formula
myst_heading_anchors = 6
html_math_renderer = "mathml"
suppress_warnings = ["misc.highlighting_failure"]  # a line of Colab's in a block of Python

html_theme = "sphinx_book_theme"
html_theme_options = {
    "navbar_persistent": [],
    "footer_content_items": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_copy_source = False


def setup(app) -> None:
    """Sphinx calls it: what the options above do not say."""
    app.connect("source-read", prepare)
    app.connect("build-finished", first_page)
    app.add_html_math_renderer("mathml", (inline, None), (block, None))


def prepare(app, name: str, source: list[str]) -> None:
    """The contents at the README's end; folded cells of a notebook folded here, too."""
    if name == root_doc:
        source[0] += "".join(contents(*part) for part in PARTS.items())
    elif app.env.doc2path(name).suffix == ".ipynb":
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            fold(cell)
        source[0] = json.dumps(notebook)


def contents(caption: str, part: list[str]) -> str:
    """A part of the table of contents, which stands beside every page."""
    lines = [f":caption: {caption}", ":hidden:", "", *(f"{Path(page).name} <{page}>" for page in part)]
    return "\n".join(["\n", "```{toctree}", *lines, "```", ""])


def fold(cell: dict) -> None:
    """Fold what JupyterLab folds, a solution with its output; leave out the line for Colab."""
    tags = cell["metadata"].setdefault("tags", [])
    if "import colab" in "".join(cell["source"]):
        tags.append("remove-cell")
    elif "solution" in tags:
        tags.append("hide-cell")
    elif cell["metadata"].get("jupyter", {}).get("source_hidden"):
        tags.append("hide-input")


def inline(translator, node) -> None:
    """A formula in a line."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block(translator, node) -> None:
    """A formula of its own."""
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def first_page(app, error) -> None:
    """The README is the page that a folder's address leads to."""
    if not error:
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")
