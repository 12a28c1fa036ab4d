"""The notebooks as a reader has them: opened and run in JupyterLab, every control moved, every page read.

Slow: a server, a browser, and two notebooks run. ``pytest -m browser -k pictures`` keeps its pictures in
``build/screenshots`` (or in ``$SCREENSHOTS``), of every notebook in the light and in the dark theme.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import browser
from tests.browser import ROOT
from tests.test_book import NOTEBOOKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium: apt install chromium"),
]
PICTURES = Path(os.environ.get("SCREENSHOTS") or ROOT / "build/screenshots")
# What 01 to 03 measured here, in a run of the tests or by a reader; 04 measures what is missing.
RECORDS = [ROOT / "build/executed/records.jsonl", ROOT / "runs/lab/records.jsonl"]
RUN_S = 900  # most seconds for all cells of a notebook: 04 without records starts every engine


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    for records in [file for file in RECORDS if file.exists()][:1]:
        (folder / "served/runs/lab").mkdir(parents=True)
        shutil.copy(records, folder / "served/runs/lab")
    with browser.lab(folder) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as running:
        yield running


@pytest.mark.timeout(RUN_S + 300)
@pytest.mark.parametrize(("name", "controls"), [("00_start_here", 6), ("04_compare", 10)])
def test_run_all_and_every_control_moves_in_both_themes(name, controls, lab, chromium):
    with browser.view(chromium, lab, name, fresh=True) as view:
        view.run_all(RUN_S)
        assert view.problems() == []
        assert len(view.controls()) == controls  # two of a number: a box and its slider
        for control in view.controls():
            assert view.move(control) >= 1
        assert view.problems() == []
        view.theme("dark")
        assert view.move(view.controls()[0]) >= 1
        assert view.problems() == []
        view.photograph(PICTURES / f"{name}_run_dark.png")
        assert view.said == []


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_pictures_as_stored_are_legible_in_both_themes(name, lab, chromium):
    with browser.view(chromium, lab, name) as view:
        grounds, problems = {}, {}  # judged last: the pictures are wanted most where something is wrong
        for theme in browser.THEMES:
            view.theme(theme)
            grounds[theme] = view.photograph(PICTURES / f"{name}_{theme}.png")
            problems[theme] = view.problems()
        assert problems == {theme: [] for theme in browser.THEMES}
        assert view.said == []
    assert grounds["light"] == (255, 255, 255)
    assert max(grounds["dark"]) < 64


# -- what is looked for is found ------------------------------------------------------------------------

WORD = "a word of some length "
PICTURE = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='40' height='40'/%3E"
PLANTED = {
    "clipped": f'<div style="overflow:auto; white-space:nowrap"><table><th>{WORD * 9}</table></div>',
    "contrast": f'<p style="color:#999; background:#fff">{WORD}</p>',
    "text over text": f'<p>{WORD}</p><p style="margin-top:-2.2em">{WORD}</p>',
    "set as a formula": f"<p>{WORD} <mjx-container>324/month</mjx-container></p>",
    "raw": "<pre>VBox(children=(IntSlider(value=3),))</pre>",
    "a picture has no alternative text": f'<img src="{PICTURE}">',
    "a picture is shrunk": f'<img style="width:10px" alt="{WORD}" src="{PICTURE}">',
    "a picture is broken": f'<img alt="{WORD}" src="data:image/png;base64,AAAA">',
}


def test_planted_faults_are_seen_and_heard(lab, chromium):
    with browser.view(chromium, lab, "00_start_here") as view:
        assert view.problems() == []
        for said, fault in PLANTED.items():
            view.plant(fault)
            assert any(said in line for line in view.problems()), said
            view.plant("")
            assert view.problems() == [], said
        view.page.evaluate("console.error('planted'); setTimeout(() => { throw Error('thrown') })")
        view.page.wait_for_timeout(200)
        assert view.said == ["planted", "uncaught: thrown"]
        view.plant(f'<div class="widget-vbox"><input type="number"><p class="widget-html">{WORD}</p></div>')
        with pytest.raises(AssertionError, match="nothing changed"):
            view.move(view.page.locator("#planted input"))


@pytest.mark.parametrize(("source", "said"), [
    ("raise ValueError('planted')", "failed"), ("import sys; print('planted', file=sys.stderr)", "failed"),
    ("import matplotlib.pyplot as plt; plt.plot([1])", "raw: "),
])  # fmt: skip
def test_a_cell_that_fails_is_seen(source, said, lab, chromium):
    import nbformat

    cells = [nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("print('after')")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab.folder / "notebooks/planted.ipynb"
    )
    with browser.view(chromium, lab, "planted", fresh=True) as view:
        view.run_all(60)
        assert any(line.startswith(said) for line in view.problems())
