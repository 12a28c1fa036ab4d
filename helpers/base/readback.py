"""What a figure shows, read back from its axes: kept in the PNG itself, beside the alternative text.

A notebook test compares texts and cannot see. With this it can tell a picture that lost its labels, was
left blank or stands in another one's place, although measured heights differ from machine to machine.
Pillow reads it: ``Image.open(file).text["Description"]`` for the words, ``["Drawn"]`` for this, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

DPI = 200  # of the pictures, twice what a page shows them at; the boxes below are in their pixels


def read_back(figure, exact: bool) -> str:
    """Describe a Matplotlib figure as JSON.

    Args:
        exact: the values follow from configs and parameters and are the same on every machine.

    Returns:
        ``axes``: of each visible one its labels, title, legend, box and ``marks`` (what is drawn: kind,
        label, colour, number of points, and smallest, largest and mean of x and y); ``texts``: every text
        with its box. Boxes are pixels of the picture: left, top, right, bottom.
    """
    figure.set_dpi(DPI)  # a notebook's own setting would give the boxes another scale
    figure.canvas.draw()
    height = figure.bbox.height
    shown = [axes for axes in figure.axes if axes.get_visible()]
    return json.dumps(
        {
            "exact": exact,
            "axes": [_axes(axes, height) for axes in shown],
            "legend": [text.get_text() for legend in figure.legends for text in legend.get_texts()],
            "texts": [
                [text.get_text(), _box(text, height)] for text in _texts(figure, shown) if text.get_text()
            ],
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _axes(axes, height: float) -> dict:
    legend = axes.get_legend()
    return {
        "title": axes.get_title(),
        "x": axes.get_xlabel(),
        "y": axes.get_ylabel(),
        "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
        "legend_box": _box(legend, height) if legend else [],
        "box": _box(axes, height, axes.bbox),
        "marks": [*_marks(axes)],
    }


def _marks(axes) -> Iterator[dict]:
    """Lines with at least a point, and bars; the bars of one axes are one mark."""
    for line in axes.lines:
        if len(line.get_xdata()):
            colour = (line.get_color(), line.get_alpha() or 1)
            yield _mark("line", line.get_label(), colour, line.get_xdata(), line.get_ydata())
    if bars := axes.patches:
        corners = [bar.get_corners() for bar in bars if hasattr(bar, "get_corners")]
        ends = [corner[2] for corner in corners]  # opposite to where the bar begins
        yield _mark("bars", "", bars[0].get_facecolor(), [x for x, _ in ends], [y for _, y in ends])


def _mark(kind: str, label: object, colour, xs, ys) -> dict:
    from matplotlib.colors import to_hex, to_rgba

    *rgb, alpha = to_rgba(colour)
    seen = to_hex([alpha * part + 1 - alpha for part in rgb])  # on white
    label = "" if str(label).startswith("_") else str(label)  # Matplotlib's own names for what has none
    values = {"points": len(xs), "xs": _spread(xs), "ys": _spread(ys)}
    return {"kind": kind, "label": label, "colour": seen, **values}


def _spread(values) -> list[float]:
    """Smallest, largest and mean."""
    numbers = [float(value) for value in values if not isinstance(value, str)]  # categories have names
    if not numbers:
        return []
    return [float(f"{n:.6g}") for n in (min(numbers), max(numbers), sum(numbers) / len(numbers))]


def _texts(figure, shown: list) -> Iterator:
    """Titles, labels, legends and annotations that can be seen; ticks are left to ``box``'s surroundings."""
    for axes in shown:
        yield from (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
        yield from axes.get_legend().get_texts() if axes.get_legend() else ()
    for legend in figure.legends:
        yield from legend.get_texts()


def _box(artist, height: float, extent=None) -> list[int]:
    extent = extent if extent is not None else artist.get_window_extent()
    return [round(extent.x0), round(height - extent.y1), round(extent.x1), round(height - extent.y0)]
