"""Figures: what they draw, what they say in words, and the sentence where there is nothing to draw."""

import base64
import html
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from helpers.base.figure import Figure
from helpers.base.machine import GIB
from helpers.base.page import Note
from helpers.compare import cards, comparison_figures, roofline
from helpers.compare.cost import Offer
from helpers.compare.counting import counted
from helpers.compare.options import option
from helpers.compare.sizing import Load
from helpers.faults import log_figure
from helpers.measure import result_figures
from helpers.measure.speed import Speed
from helpers.model import schemes, shapes
from helpers.model.schemes import AWQ
from tests.test_show import a_row, sanitized

WRITTEN_OUT = next(way.name for way in AWQ.ways if way.expanded)


def test_the_roofline_draws_what_was_measured():
    speeds = [Speed(b, 10.0 * b, 9.0 * b, 12.0 * b, 0.1, 16, 0.1) for b in (1, 8)]
    drawn = comparison_figures.roofline(speeds, bound_tokens_per_s=40.0, most_tokens_per_s=700.0)
    [axes] = drawn.figure.axes
    points = axes.containers[0].lines[0]
    assert list(points.get_ydata()) == [10.0, 80.0]
    bound = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert list(bound.get_ydata()) == [40.0, 700.0], "up to where the limits meet"
    assert axes.get_xlabel() == "batch size (requests at once)"
    assert axes.get_ylabel() == "output tokens per second"
    assert speeds[1].tpot_s == pytest.approx(0.1)


def an_answer(divergence: float) -> Figure:
    return result_figures.quality([a_row("awq", 1, 30.0, 199, 100, kl_mean=divergence, top1=0.9)])


def test_a_figure_is_an_image_with_its_text_and_the_text_is_compared():
    from PIL import Image

    one, other = an_answer(0.1), an_answer(0.2)
    page = one._repr_html_()
    width, alt, data = re.fullmatch(
        r'<img width="(\d+)" style="max-width:100%" alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page
    ).groups()
    assert "‹AWQ weights 0.100 nats›" in alt
    assert base64.b64decode(data) == one.png
    assert repr(one) == f"Figure: {one.alt}"
    assert sanitized(page) == sanitized(other._repr_html_())
    assert sanitized(page) != sanitized(
        comparison_figures.outliers(np.ones(3), np.ones(3), "x")._repr_html_()
    )
    assert one._repr_png_()[1]["alt"] == one.alt
    assert len(one.png) < 60_000
    assert Image.open(io.BytesIO(one.png)).width == 2 * int(width)
    assert 500 <= int(width) <= 1000


def test_schemes_differ_without_colour():
    looks = [schemes.look(name) for name in schemes.EVERY]
    assert len({look["marker"] for look in looks}) == len(looks)
    assert len({look["color"] for look in looks}) == len(looks)
    hatches = [hatch for _, _, hatch in comparison_figures.PARTS.values()]
    assert len({*hatches}) == len(hatches)
    assert schemes.look("unheard of")["marker"] not in {look["marker"] for look in looks}


@pytest.mark.parametrize("name", ["quality", "gains", "costs", "rents", "stairs", "fits"])
def test_nothing_to_draw_is_a_sentence(name):
    arguments = {
        "quality": ([],), "gains": ({},), "costs": ({}, "x"),
        "rents": ([Offer("L4", "awq", 1.0, why_not="2.0 GiB short")], "x"),
        "stairs": ({}, {"awq": "AWQ"}, [1.0], "x"), "fits": ({"fp8_kv": "Needs SM 8.0."}, "x"),
    }  # fmt: skip
    room = result_figures if hasattr(result_figures, name) else comparison_figures
    note = getattr(room, name)(*arguments[name])
    assert isinstance(note, Note)
    assert len(str(note).split()) > 5
    assert html.unescape(note._repr_html_()) == f"<p>{note}</p>"


def test_one_scheme_alone_and_records_of_two_machines_are_not_drawn():
    rows = [a_row("baseline", batch, 20.0 * batch, 300, 200) for batch in (1, 8)]
    assert isinstance(result_figures.quality(rows), Note)
    assert isinstance(comparison_figures.gains({"m on d": {"fp8": roofline.ranges(rows, "fp8")}}), Note)
    with pytest.raises(ValueError, match="m on another"):
        result_figures.quality([*rows, a_row("awq", 1, 20.0, 300, 200, device="another")])


def test_the_fit_is_drawn_and_said_by_scheme():
    mistral, load = counted(shapes.shape("mistral-7b")), Load(cards.card("L4"), users=16)
    found = {name: option(mistral, name, load).budget for name in ("baseline", "awq")}
    figure = comparison_figures.fits(found, "Mistral-7B on L4")
    assert f"baseline {found['baseline'].total / GIB:.1f} GiB, 10 of 16 run" in figure.alt
    assert f"awq {found['awq'].total / GIB:.1f} GiB, fits" in figure.alt
    usable = next(line for line in figure.figure.axes[0].lines if "may take" in line.get_label())
    assert usable.get_xdata()[0] == pytest.approx(0.92 * 22.03, abs=0.01)
    longest = found["baseline"].total / GIB
    assert longest < figure.figure.axes[0].get_xlim()[1] < 1.1 * longest, "no empty half"


def test_gains_are_ratios_with_their_ranges_and_leave_out_what_ran_in_16_bits():
    rows = [
        a_row("baseline", 1, 10.0, 1, 1, low=9.0, high=10.0),
        a_row("fp8", 1, 15.0, 1, 1, low=15.0, high=18.0),
    ]
    rows.append(a_row("awq", 1, 99.0, 1, 1, way=WRITTEN_OUT))
    found = {name: roofline.ranges(rows, name) for name in ("fp8", "awq")}
    assert found == {"fp8": {1: (1.5, 1.5, 2.0)}, "awq": {}}
    figure = comparison_figures.gains({"m on d": found})
    [axes] = figure.figure.axes
    assert max(line.get_ydata()[0] for line in axes.lines) == 1.5
    assert axes.collections[0].get_segments()[0][:, 1].tolist() == [1.5, 2.0]
    assert "FP8 weights 1.50" in figure.alt
    assert "AWQ" not in figure.alt


def test_lines_are_named_at_their_ends_and_the_names_stand_apart():
    points = {
        name: {1: (1.5, 1.5, 1.5), 8: (1.4 + place / 1000,) * 3}
        for place, name in enumerate(("fp8_kv", "int8", "awq"))
    }
    [axes] = comparison_figures.gains({"m on d": points}).figure.axes
    names = [text for text in axes.texts if text.get_text()]
    two_lines = "16-bit weights,\nFP8 KV cache"
    assert {text.get_text() for text in names} == {"16 bits", two_lines, "INT8 W8A8", "AWQ weights"}
    heights = sorted((text.get_position()[1], text.get_text()) for text in names)
    for (low, one), (high, other) in itertools.pairwise(heights):
        assert high - low > (0.1 if two_lines in (one, other) else 0.08)


def test_a_log_shows_its_first_error_as_the_cause_and_each_once():
    log = (Path(__file__).parent.parent / "notebooks/server.log").read_text()
    [axes] = log_figure.errors(log).figure.axes
    said = [text.get_text() for text in axes.texts]
    assert said[0].startswith("60: ValueError: Available memory")
    assert [text.split(":")[0] for text in said] == ["60", "107", "209", "211"]


def test_each_scheme_has_one_bar_and_the_least_rent_is_marked():
    offers = [Offer(card, name, price, count=1) for card, name, price in
              (("L4", "fp8", 21.6), ("A100", "fp8", 26.4), ("A100", "baseline", 26.4))]  # fmt: skip
    [axes] = comparison_figures.rents(offers, "x").figure.axes
    assert [bar.get_width() for bar in axes.patches] == [21.6, 26.4]
    assert [text.get_text().endswith("the least") for text in axes.texts] == [True, False]


def test_rents_are_drawn_at_their_true_height_and_named_with_their_price():
    rents = {"fp8": [10.0, 20.0], "awq": [10.0, 20.0]}
    drawn = comparison_figures.stairs(rents, {"fp8": "FP8", "awq": "AWQ"}, [1.0, 2.0], "x")
    [axes] = drawn.figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [*rents.values()]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["AWQ: $20.00", "FP8: $20.00"]
