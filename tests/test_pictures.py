"""The check of the pictures: what may differ between machines passes, and each way to rot is planted."""

import base64
import functools
import io
import re

import numpy as np
import pytest
from nbformat.v4 import new_output
from PIL import Image, ImageDraw, PngImagePlugin

from helpers.compare import comparison_figures
from helpers.measure import result_figures
from helpers.measure.speed import Speed
from tests import pictures
from tests.test_show import a_row


@functools.cache
def roofline(factor: float = 1.0):
    """A measured figure."""
    speeds = [Speed(b, *(factor * b * rate for rate in (10.0, 9.0, 12.0)), 0.1, 3, 16) for b in (1, 8)]
    return comparison_figures.roofline(speeds, bound_tokens_per_s=40.0, most_tokens_per_s=700.0)


@functools.cache
def compared(*names: str):
    """A measured figure of as many schemes as run on a machine."""
    return result_figures.compared([a_row(name, 1, 20.0, 300 - 50 * n, 200) for n, name in enumerate(names)])


@functools.cache
def grids(scale: float = 1.0):
    """A figure of what is the same everywhere."""
    return comparison_figures.grids(np.linspace(-1, 1, 4000) ** 3 * scale + (scale - 1), "x")


def output(figure, png: bytes | None = None, both: bool = True):
    """A cell's output of a figure, with another picture in its place if one is given."""
    old, new = (base64.b64encode(one).decode() for one in (figure.png, png or figure.png))
    page = figure._repr_html_()
    data = {
        "text/plain": repr(figure),
        "image/png": new,
        "text/html": page.replace(old, new) if both else page,
    }
    return new_output("execute_result", data)


def painted(figure, box, colour="white") -> bytes:
    """A figure's PNG with a rectangle painted over, its texts kept."""
    image = Image.open(io.BytesIO(figure.png))
    words = PngImagePlugin.PngInfo()
    for key, text in image.text.items():
        words.add_itxt(key, text)
    image = image.convert("RGB")
    ImageDraw.Draw(image).rectangle(box or (0, 0, *image.size), fill=colour)
    raw = io.BytesIO()
    image.save(raw, "png", pnginfo=words)
    return raw.getvalue()


def text_box(figure, wanted: str) -> tuple[int, ...]:
    shown = pictures.drawn(pictures.pictures([output(figure)])[0])
    return tuple(next(box for text, box in shown["texts"] if text == wanted))


def numbers_below(figure) -> tuple[int, ...]:
    """The row between the axes and their name, across the picture."""
    shown = pictures.drawn(pictures.pictures([output(figure)])[0])
    _, _, right, bottom = shown["axes"][0]["box"]
    return 0, int(bottom) + 2, int(right), int(bottom) + 26


@pytest.mark.parametrize(
    ("stored", "executed"),
    [
        (roofline(), roofline()),
        (roofline(), roofline(7.0)),
        (compared("baseline", "awq"), compared("baseline", "awq", "int8", "fp8")),
        (grids(), grids()),
    ],
    ids=["the same", "other speeds", "other schemes", "computed"],
)
def test_what_may_differ_between_machines_passes(stored, executed):
    assert pictures.problems([output(stored)], [output(executed)]) == []


def unlabelled():
    figure = roofline.__wrapped__()
    figure.figure.axes[0].set_xlabel("")
    return figure


PLANTED = {
    "blank": (lambda: output(roofline(), painted(roofline(), None)), "marks cannot be seen"),
    "a blank axes": (
        lambda: output(roofline(), painted(roofline(), (70, 60, 690, 340))),
        "cannot be seen|blank",
    ),
    "lost": (lambda: new_output("execute_result", {"text/plain": repr(roofline())}), "0 pictures are stored"),
    "swapped": (lambda: output(roofline(), compared("baseline").png), "another picture's"),
    "swapped with its like": (lambda: output(compared("fp8"), compared("awq").png), "another picture's"),
    "swapped with its words": (lambda: output(compared("baseline")), "axes are stored"),
    "two pictures": (lambda: output(roofline(), roofline(2.0).png, both=False), "not the same"),
    "a label lost": (lambda: output(unlabelled()), "x: stored ''"),
    "a label painted over": (
        lambda: output(roofline(), painted(roofline(), text_box(roofline(), "output tokens per second"))),
        "'output tokens per second' cannot be seen",
    ),
    "numbers painted over": (
        lambda: output(roofline(), painted(roofline(), numbers_below(roofline()))),
        "no numbers or names",
    ),
    "without its data": (lambda: output(roofline(), painted_bare()), "does not say what it shows"),
}


def painted_bare() -> bytes:
    raw = io.BytesIO()
    Image.open(io.BytesIO(roofline().png)).convert("RGB").save(raw, "png")
    return raw.getvalue()


@pytest.mark.parametrize("name", PLANTED)
def test_rot_is_found_in_a_measured_picture(name):
    stored, words = PLANTED[name]
    found = pictures.problems([stored()], [output(roofline())])
    assert found
    assert any(re.search(words, problem) for problem in found), found


def test_a_computed_picture_that_is_stale_is_found():
    assert pictures.problems([output(grids())], [output(grids(1.5))]) == [
        "axes 0: other values are drawn than stored"
    ]


def test_nothing_drawn_is_found():
    figure = roofline.__wrapped__()
    axes = figure.figure.axes[0]
    for artist in [*axes.lines, *axes.collections]:
        artist.remove()
    found = pictures.problems([output(figure)], [output(roofline())])
    assert "the stored picture: nothing is drawn in axes 0" in found
