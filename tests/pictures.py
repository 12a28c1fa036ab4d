"""What nbval cannot see: whether a stored picture still shows what the code draws.

Each picture carries its alternative text and what was drawn, read back from the axes (``helpers.drawn``).
Measured heights differ from machine to machine, so of a measured figure the labels, the legend and the
kinds of marks are compared; of one that follows from configs, the values too. The pixels then have to
bear it out: there is ink where each text should be and inside each axes.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests import marks

TOLERANCE = 0.02  # of a value of an exact figure, relative
CONTRAST = 60  # of 255: what the lightest and the darkest of a readable text differ at least
NEAR = 60  # of 255, in each of red, green and blue: a line's edge is lighter than the line
INK = 3  # pixels of its colour, at least, that a mark leaves


@dataclass(frozen=True)
class Picture:
    """One output's picture: the PNG in each place where it stands, and the words beside it."""

    pngs: tuple[bytes, ...]
    alts: tuple[str, ...]

    @property
    def image(self) -> Image.Image:
        """The picture, opened."""
        return Image.open(io.BytesIO(self.pngs[0]))


def pictures(outputs: list) -> list[Picture]:
    """The pictures of a cell's outputs."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        page = str(data.get("text/html", ""))
        encoded = [match["png"] for match in re.finditer(marks.PICTURE, page)]
        encoded += [data["image/png"]] if "image/png" in data else []
        if encoded:
            alts = [html.unescape(text) for text in re.findall(r'<img [^>]*alt="([^"]*)"', page)]
            alts.append(str(data.get("text/plain", "")).removeprefix("Figure: "))
            pngs = tuple(base64.b64decode(one.replace("\n", "")) for one in encoded)
            found.append(Picture(pngs, tuple(alts)))
    return found


def problems(stored: list, executed: list) -> list[str]:
    """What is wrong with a cell's stored pictures, a sentence each; ``executed`` is what it drew now."""
    old, new = pictures(stored), pictures(executed)
    if len(old) != len(new):
        return [f"{len(old)} pictures are stored, {len(new)} were drawn"]
    found = []
    for before, now in zip(old, new, strict=True):
        for which, one in (("stored", before), ("executed", now)):
            found += [f"the {which} picture: {problem}" for problem in of_one(one)]
        if not found:
            found += differences(drawn(before), drawn(now))
    return found


def of_one(picture: Picture) -> list[str]:
    """Whether a picture is whole by itself: one picture everywhere, its own words, ink where it should be."""
    try:
        image, shown = picture.image, drawn(picture)
        own = image.text["Description"]
    except (KeyError, OSError, ValueError) as error:
        return [f"it does not say what it shows ({error!r}); draw it with helpers.figures.Figure"]
    found = []
    if len(set(picture.pngs)) > 1 or len(picture.pngs) != 2:
        found.append("the one in the HTML and the one beside it are not the same")
    if any(alt != own for alt in picture.alts):
        found.append(
            f"another picture's: it shows {own[:60]!r}, the text beside it says {picture.alts[0][:60]!r}"
        )
    if not shown["axes"]:
        found.append("it has no axes")
    colours, pixels = (np.asarray(image.convert(mode), dtype=int) for mode in ("RGB", "L"))
    for text, box in shown["texts"]:
        area = _within(pixels, box)
        if not area.size or area.max() - area.min() < CONTRAST:
            found.append(f"the text {text!r} cannot be seen")
    for number, axes in enumerate(shown["axes"]):
        if not axes["marks"]:
            found.append(f"nothing is drawn in axes {number}")
        left, _, right, bottom = axes["box"]
        seen = [_seen(colours, axes, mark["colour"]) for mark in axes["marks"]]
        if sum(seen) < len(seen) / 2:  # some lie outside, or under others
            found.append(f"axes {number}: {len(seen) - sum(seen)} of {len(seen)} marks cannot be seen")
        if len(np.unique(_within(pixels, [left, bottom + 2, right, bottom + 20]))) < 3:
            found.append(f"axes {number} has no numbers or names below it")
    return found


def differences(stored: dict, executed: dict) -> list[str]:
    """What two pictures' read-back data differ in, apart from what may differ between machines."""
    if stored["exact"] != executed["exact"]:
        return ["one is computed, the other measured"]
    if len(stored["axes"]) != len(executed["axes"]):
        return [f"{len(stored['axes'])} axes are stored, {len(executed['axes'])} were drawn"]
    exact, found = stored["exact"], []
    for number, pair in enumerate(zip(stored["axes"], executed["axes"], strict=True)):
        shape, other = (_shape(axes, exact) for axes in pair)
        found += [
            f"axes {number}, {key}: stored {shape[key]!r}, drawn {other[key]!r}"
            for key in shape
            if shape[key] != other[key]
        ]
        if exact and not found and not _close(*pair):
            found.append(f"axes {number}: other values are drawn than stored")
    legends = [one["legend"] if exact else bool(one["legend"]) for one in (stored, executed)]
    if legends[0] != legends[1]:
        found.append(f"legend: stored {stored['legend']}, drawn {executed['legend']}")
    return found


def _shape(axes: dict, exact: bool) -> dict:
    """What is the same on every machine: all words of an exact figure; of a measured one its labels,
    that it has a title and a legend, and which kinds of marks."""
    if exact:
        kinds = [(mark["kind"], mark["label"], mark["points"]) for mark in axes["marks"]]
        return {key: axes[key] for key in ("title", "x", "y", "legend")} | {"marks": kinds}
    return {
        "x": axes["x"],
        "y": axes["y"],
        "title": bool(axes["title"]),
        "legend": bool(axes["legend"]),
        "marks": {mark["kind"] for mark in axes["marks"]},
    }


def _close(stored: dict, executed: dict) -> bool:
    for one, other in zip(stored["marks"], executed["marks"], strict=True):
        for key in ("xs", "ys"):
            if len(one[key]) != len(other[key]):
                return False
            scale = max(map(abs, one[key]), default=0)
            if not np.allclose(one[key], other[key], rtol=TOLERANCE, atol=1e-6 * scale):
                return False
    return True


def _seen(pixels, axes: dict, colour: str) -> bool:
    """Whether a colour stands in an axes outside its legend."""
    pixels = pixels.copy()
    if axes["legend_box"]:
        _within(pixels, axes["legend_box"])[:] = 255
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return (abs(_within(pixels, axes["box"]) - wanted).max(axis=-1) < NEAR).sum() >= INK


def drawn(picture: Picture) -> dict:
    return json.loads(picture.image.text["Drawn"])


def _within(pixels, box: list[int]):
    left, top, right, bottom = (max(0, place) for place in box)
    return pixels[top:bottom, left:right]
