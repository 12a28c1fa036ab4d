"""`make book`: the site builds without a warning, shows what is stored, and needs nothing from elsewhere."""

import json
import os
import re
import subprocess
import sys

import pytest

from helpers.tools import extras
from tests import browser
from tests.scratch import REPO
from tests.test_book import NAMES

ADDRESS = "https://github.com/you/yours"
COLAB = "https://colab.research.google.com/github/you/yours/blob/main"
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with the options of `make book` and an address of its sources."""
    extras.ensure("book")
    recipe = (REPO / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"-m sphinx (.*-W.*) -d \S+ \. ", recipe)[1].split()
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", *options, "-d", folder / "doctrees", ".", folder / "html"]
    address = os.environ | {"REPOSITORY": ADDRESS}
    done = subprocess.run(command, cwd=REPO, env=address, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def page(site, name: str) -> str:
    return (site / f"notebooks/{name}.html").read_text(encoding="utf-8")


def test_the_contents_lead_to_every_page_from_every_page(site):
    first = (site / "index.html").read_text(encoding="utf-8")
    for name in (*NAMES, "ANSWERS", "GLOSSARY", "REFERENCES", "OTHER_WAYS"):
        assert f'href="notebooks/{name}.html"' in first
        assert f'href="{name}.html"' in page(site, NAMES[3]) or name == NAMES[3]


def test_the_search_knows_the_words_of_the_lessons(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    terms = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))["terms"]
    assert {"rooflin", "perplex", "calibr"} <= terms.keys()


@every
def test_a_page_shows_the_stored_pictures_and_folds_what_the_lesson_folds(name, site):
    found = page(site, name)
    cells = json.loads((REPO / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    shown = "".join("".join(output.get("text/html", "")) for output in outputs)
    pictures = re.findall(r"png;base64,([^\"]{200})", shown)
    assert pictures
    assert all(picture in found for picture in pictures), "of a widget its first values"
    assert "import colab" not in found
    assert len(re.findall(r'<div class="cell [^"]*tag_hide-(?:input|cell)', found)) == 2  # checks, solution
    assert f"{COLAB}/notebooks/{name}.ipynb" in found


@every
def test_a_page_loads_nothing_from_elsewhere(name, site):
    loaded = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]+)"', page(site, name))
    assert len(loaded) > 5
    assert not [address for address in loaded if re.match(r"(https?:)?//", address)]


# A page of the site with the names that JupyterLab's pages have, for tests/look.js.
AS_IN_JUPYTERLAB = """() => {
  const name = (what, as) => document.querySelectorAll(what).forEach(one => one.classList.add(as));
  name('.bd-article', 'jp-NotebookPanel');
  name('.cell_output', 'jp-OutputArea-output');
  name('.bd-article section > :is(p, ul, table, blockquote)', 'jp-MarkdownOutput');
}"""


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium: apt install chromium")
@pytest.mark.parametrize(("width", "theme"), [(800, "light"), (1200, "dark"), (1600, "dark")])
def test_pages_are_legible_no_wider_than_the_window_and_their_figures_dark_in_the_dark(width, theme, site):
    with browser.chromium() as chromium:
        seen = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        problems = lambda: seen.evaluate(f"raw => ({browser.LOOK}).problems(raw)", browser.RAW)  # noqa: E731
        for name in NAMES:
            seen.goto((site / f"notebooks/{name}.html").as_uri())
            assert seen.evaluate("document.documentElement.scrollWidth") == width
            seen.evaluate(AS_IN_JUPYTERLAB)
            assert problems() == [], name
            looks = "all => all.map(one => getComputedStyle(one).filter)"
            figures = seen.eval_on_selector_all(".bd-article img", looks)
            assert [look for look in figures if ("invert" in look) != (theme == "dark")] == []
        seen.add_style_tag(content=".cell_output * { color: #777 !important; background: #777 !important }")
        assert any("contrast" in problem for problem in problems())
