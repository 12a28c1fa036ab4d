"""Figures, widgets and stored outputs are also for readers who do not see pictures, or not their colours.

Each check is tried on something that it must catch, so that one which has gone blind fails here.
"""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest

from helpers.base import widgets
from helpers.base.records import REFERENCE
from helpers.base.widgets import Choice, Slider
from helpers.compare import cards, comparison_figures, recorded, recorded_tables, roofline
from helpers.compare.cost import Offer
from helpers.compare.counting import OFFERED, counted
from helpers.compare.options import option
from helpers.compare.sizing import Load
from helpers.faults import log_figure
from helpers.measure import result_figures
from helpers.measure.speed import Speed
from helpers.model import shapes
from helpers.model.schemes import EVERY, SCHEMES, look
from helpers.serve import load_tables
from helpers.serve.load import Level
from tests import accessible
from tests.test_book import NOTEBOOKS
from tests.test_show import a_row

BATCHES = [1, 8, 32, 64, 256]


def rows() -> list[dict]:
    """Records of every scheme, of the sizes that the embedded model has on a CPU."""
    found = []
    for place, name in enumerate(SCHEMES):
        for batch in BATCHES:
            rate, size = 60 * batch**0.8 / (1 + place), 260 - 25 * place
            more = {"kl_mean": 0.05 * place, "top1": 1 - 0.05 * place, "recovery": 0.9, "prompt_tokens": 16}
            more |= {"total_bytes": 1400 * 2**20, "kv_cache_tokens": 20_000, "way": "x", "dtype": "bfloat16"}
            found.append(a_row(name, batch, rate, size, size, **more))
    return found


def levels(scale: float) -> list[Level]:
    """Levels of load as a server with two cores gives them, ``scale`` times as fast."""
    times = {"ttft_s": 0.2, "tpot_s": 0.08, "tpot_p95_s": 0.1, "e2e_s": 1.4}
    rest = {"completed": 9, "failed": 0, "seconds": 8.0} | times
    closed = [
        Level(n, None, None, requests_per_s=scale * n**0.5, goodput=scale * n**0.4, ttft_p95_s=0.1 * n,
              output_tokens_per_s=scale * 16 * n**0.5, **rest)
        for n in (1, 4, 16)
    ]  # fmt: skip
    opened = [
        Level(None, share, 4 * share * scale, requests_per_s=3 * share * scale, ttft_p95_s=share,
              goodput=3 * share * scale * (1.1 - share / 2), output_tokens_per_s=50.0, **rest)
        for share in (0.5, 0.8, 1.5)
    ]  # fmt: skip
    return closed + opened


def budgets() -> dict:
    mistral, load = counted(shapes.shape("mistral-7b")), Load(cards.card("L4"), users=16)
    found = [option(mistral, name, load) for name in OFFERED]
    return {one.scheme: one.budget or one.refused for one in found}


def offers() -> list[Offer]:
    ways = [(card, name) for card in ("L4", "A100 80GB") for name in SCHEMES]
    return [
        Offer(card, name, 10.0 + n, SCHEMES[name].title, count=1 + n, tokens_per_s=900.0, used=0.4)
        for n, (card, name) in enumerate(ways)
    ]


# Every function of the helpers that draws, on data like a reader's.
DRAWN = {
    "roofline": lambda: comparison_figures.roofline(
        [Speed(b, 10.0 * b, 9.0 * b, 12.0 * b, 0.1, 16, 0.1) for b in BATCHES], 40.0, 700.0
    ),
    "grids": lambda: comparison_figures.grids(np.random.default_rng(0).normal(size=(64, 64)), "down_proj"),
    "outliers": lambda: comparison_figures.outliers(np.geomspace(1, 99, 99), np.geomspace(1, 9, 99), "mlp"),
    "fits": lambda: comparison_figures.fits(budgets(), "Mistral-7B on L4"),
    "quality": lambda: result_figures.quality(rows()),
    "gains": lambda: comparison_figures.gains({
        f"Mistral-7B on NVIDIA {card}": {name: roofline.ranges(rows(), name) for name in [*SCHEMES][1:]}
        for card in ("H200", "L4")
    }),
    "costs": lambda: comparison_figures.costs(
        {n: {b: 9 / (b + i) for b in BATCHES} for i, n in enumerate(SCHEMES)}, "This machine"
    ),
    "rents": lambda: comparison_figures.rents(offers(), "Mistral-7B: 2 requests/s of 200 tokens, 50% used"),
    "stairs": lambda: comparison_figures.stairs(
        {n: [10.0 * (1 + i), 20.0 * (1 + i), 30.0] for i, n in enumerate(SCHEMES)},
        {n: SCHEMES[n].title for n in ("baseline", "fp8", "awq")}, [0.1, 0.2, 0.3], "Mistral-7B",
    ),
    "steps": lambda: recorded_tables.steps([*recorded.steps().values()][:6]),
    "errors": lambda: log_figure.errors((REFERENCE.parent / "server.log").read_text()),
    "load": lambda: load_tables.load(levels(1.0)),
}  # fmt: skip


def test_every_function_that_draws_is_drawn_here():
    found = {
        name
        for module in (comparison_figures, load_tables, log_figure, recorded_tables, result_figures)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if "Figure" in str(function.__annotations__.get("return"))
    }
    assert found == set(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_legible_to_everybody(name):
    drawn = DRAWN[name]()
    assert accessible.of_figure(drawn.figure) == []
    shown = {"image/png": drawn.png, "text/html": drawn._repr_html_()}
    assert list(accessible.of_output({"data": shown, "metadata": {"image/png": drawn._repr_png_()[1]}})) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_have_words(path):
    assert accessible.of_notebook(json.loads(path.read_text(encoding="utf-8"))) == []


CONTROLS = {
    "whole": Slider("requests at once", 1, 256, 16),
    "share": Slider("utilization", 0.05, 1.0, 0.5, 0.05),
    "one of": Choice("GPU", ["L4", "T4"], "L4"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_each_control_has_a_name(name):
    import ipywidgets

    control, drawn = CONTROLS[name], DRAWN["roofline"]()
    shown = widgets.explore(lambda x: drawn, x=control).live()
    assert accessible.of_widget(shown) == []
    with pytest.raises(ValueError, match="needs a label"):
        widgets.explore(lambda x: drawn, x=replace(control, label=" "))
    assert accessible.of_widget(ipywidgets.VBox([shown, ipywidgets.IntSlider(3)])) == [
        "IntSlider has no name"
    ]


def test_colours_of_schemes_stand_out_from_the_page():
    colours = {name: look(name)["color"] for name in EVERY}
    assert {n: c for n, c in colours.items() if accessible.contrast(c, "white") < accessible.GRAPHICS} == {}
    assert accessible.contrast("black", "white") == pytest.approx(21)
    assert accessible.contrast("#767676", "white") == pytest.approx(4.54, abs=0.01)  # WCAG's own example


# -- each check catches what it is there for ------------------------------------------------------------


def axes_with(draw):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    draw(axes)
    plt.close(figure)
    return figure


def twice(axes, **second):
    axes.plot([1, 2], color="#0072B2", marker="o", label="one")
    axes.plot([2, 1], **{"color": "#D55E00", "marker": "o", "label": "other"} | second)


PLANTED = {
    "the ground is transparent": (lambda a: a.figure.set_facecolor("none"), "ground is transparent"),
    "a pale line": (lambda a: a.plot([1, 2], color="#E69F00", label="pale"), "line 'pale' has 2."),
    "a line made pale": (lambda a: a.plot([1, 2], color="#0072B2", alpha=0.4, label="thin"), "'thin' has"),
    "a pale bar": (lambda a: a.bar(["x"], [1], color="#BBBBBB"), "bar #bbbbbb has 1.9:1"),
    "a grey text": (lambda a: a.set_title("so grey", color="#999999"), "text 'so grey' has 2.8:1"),
    "a white text beside its bar": (
        lambda a: (a.barh([0, 1], [1, 9], color="#0072B2"), a.text(4, 0, "astray", color="white")),
        "text 'astray' has 1.0:1",
    ),
    "lines of two colours": (twice, "lines 'one' and 'other' differ in colour alone"),
    "bars of two colours": (
        lambda a: (a.bar([1], [1], color="#0072B2"), a.bar([2], [1], color="#D55E00")),
        "differ in colour alone",
    ),
    "bars of two colours in one place": (
        lambda a: (a.barh(["x"], [1], color="#0072B2"), a.barh(["x"], [1], left=[1], color="#D55E00")),
        "differ in colour alone",
    ),
    "text over text": (
        lambda a: (a.text(0.5, 0.5, "one text"), a.text(0.52, 0.5, "another")),
        "'one text' lies over 'another'",
    ),
    "labels that meet": (
        lambda a: a.set_xticks([0, 0.1, 0.2], ["a long label", "another one", "a third"]), "lies over"
    ),
    "text that leaves the picture": (lambda a: a.text(0.9, 0.5, "a long text " * 5), "leaves the picture"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_of_a_figure_is_caught(name):
    draw, said = PLANTED[name]
    assert any(said in line for line in accessible.of_figure(axes_with(draw)))


@pytest.mark.parametrize(
    "second", [{"marker": "s"}, {"linestyle": "--"}, {"mfc": "white"}, {"color": "#0072B2"}]
)
def test_lines_that_differ_otherwise_pass(second):
    assert list(accessible.colour_alone(axes_with(lambda axes: twice(axes, **second)))) == []


def a_cell(kind: str = "code", source: str = "", **output) -> dict:
    return {"cells": [{"cell_type": kind, "source": [source], "outputs": [output] if output else []}]}


ALT = "A picture of a bell around zero."
FAULTS = {
    "a picture without a text": (a_cell(data={"image/png": "x"}, metadata={}), "image/png has no"),
    "with an object's name": (
        a_cell(data={"image/png": "x"}, metadata={"image/png": {"alt": "<Figure size 9x4 with 3 Axes>"}}),
        "image/png has no alternative text",
    ),
    "with a word": (
        a_cell(data={"image/svg+xml": "x"}, metadata={"image/svg+xml": {"alt": "plot"}}), "svg+xml has no"
    ),
    "<img> without a text": (a_cell(data={"text/html": ["<p><img ", 'src="x"></p>']}), "<img> has no"),
    "a colour of one theme": (a_cell(data={"text/html": '<td style="a:b;color:#333">'}), "colour of its own"),
    "a ground of one theme": (a_cell(data={"text/html": '<tr bgcolor="white"></tr>'}), "colour of its own"),
    "prices": (a_cell(data={"text/html": "<p>from $324/month to $87/month</p>"}), "'from $324/month to $87"),
    "a table without headings": (a_cell(data={"text/html": "<table><td>1</td></table>"}), "has no heading"),
    "a picture in prose": (a_cell("markdown", "![](x.png)"), "a picture in prose says only ''"),
    "an <img> in prose": (a_cell("markdown", '<img src="x.png">'), "<img> has no"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_of_a_notebook_is_caught(name):
    notebook, said = FAULTS[name]
    found = accessible.of_notebook(notebook)
    assert len(found) == 1
    assert said in found[0]
    assert found[0].startswith("cell 0: ")


def test_what_has_words_passes():
    good = {"image/png": "x", "text/html": f'<table><th>a</th><td><img alt="{ALT}"></td></table>'}
    assert accessible.of_notebook(a_cell(data=good, metadata={"image/png": {"alt": ALT}})) == []
