"""The notebooks as a reader has them: opened and run in JupyterLab, every control moved, every page read.

Slow: a server, a browser, and two notebooks run.
"""

import shutil

import pytest

from tests import browser
from tests.browser import ROOT
from tests.test_book import NOTEBOOKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium: apt install chromium"),
]
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
        assert view.said == []


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_stored_outputs_are_legible_in_both_themes(name, lab, chromium):
    with browser.view(chromium, lab, name) as view:
        assert view.ground() == 1
        assert view.problems() == []
        view.theme("dark")
        assert view.ground() < 0.05
        assert view.problems() == []
        assert view.said == []


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
    "a picture is shrunk to 25 %": f'<img style="width:10px" alt="{WORD}" src="{PICTURE}">',
    "a picture is shrunk to 50 %": f'<img width="10" alt="{WORD}" src="{PICTURE}">',
    "a picture is shrunk to 60 %": f'<img width="40" style="width:24px" alt="{WORD}" src="{PICTURE}">',
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
