"""What keeps a figure, a widget or a stored output from readers, as sentences: an empty list is no barrier.

The ratios are those of WCAG 2.2: 4.5:1 for text (1.4.3), 3:1 for what a picture draws (1.4.11), and nothing
that only a colour says (1.4.1).
"""

import itertools
import re
from collections.abc import Iterator

from bs4 import BeautifulSoup
from matplotlib.colors import to_hex, to_rgba

TEXT, GRAPHICS = 4.5, 3.0


def contrast(one, other) -> float:
    """WCAG's contrast ratio of two opaque colours, 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour) -> float:
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgba(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def over(colour, ground, alpha: float | None = None):
    """A colour as it looks on an opaque ground."""
    *parts, own = to_rgba(colour)
    share = own if alpha is None else own * alpha
    return tuple(share * a + (1 - share) * b for a, b in zip(parts, to_rgba(ground), strict=False))


# -- figures --------------------------------------------------------------------------------------------


def of_figure(figure) -> list[str]:
    """All that is wrong with a matplotlib figure."""
    figure.draw_without_rendering()
    return [*transparent(figure), *faint(figure), *colour_alone(figure), *unreadable(figure)]


def transparent(figure) -> Iterator[str]:
    """A ground that lets a dark page through."""
    if to_rgba(figure.get_facecolor())[3] < 1:
        yield "the figure's ground is transparent"


def _lines(axes) -> list:
    """The lines that show something, but for those that only fill the legend."""
    return [line for line in axes.lines if line.get_visible() and len(line.get_xdata())]


def faint(figure) -> Iterator[str]:
    """Lines, bars and texts that hardly stand out from what is behind them."""
    for axes in _panels(figure):
        ground = over(axes.get_facecolor(), figure.get_facecolor())
        bars = [(patch.get_window_extent(), patch) for patch in axes.patches if patch.get_visible()]
        for line in _lines(axes):
            colour = over(line.get_color(), ground, line.get_alpha())
            if contrast(colour, ground) < GRAPHICS:
                yield f"line {_name(line)} has {contrast(colour, ground):.1f}:1"
        for _, patch in bars:  # a pale one may have an edge that stands out
            colours = [patch.get_facecolor(), *([patch.get_edgecolor()] if patch.get_linewidth() else [])]
            ratio = max(contrast(over(colour, ground, patch.get_alpha()), ground) for colour in colours)
            if ratio < GRAPHICS:
                yield f"bar {_name(patch)} has {ratio:.1f}:1"
        for text in _texts(axes):
            behind = _behind(text, bars, ground)
            ratio = contrast(over(text.get_color(), behind, text.get_alpha()), behind)
            if ratio < TEXT:
                yield f"text {text.get_text()!r} has {ratio:.1f}:1"


def _behind(text, bars: list, ground):
    """The colour behind a text's middle: its own box, the bar that it stands on, or the ground."""
    (x0, y0), (x1, y1) = text.get_window_extent().get_points()
    for box, patch in bars:
        if box.contains((x0 + x1) / 2, (y0 + y1) / 2):
            ground = over(patch.get_facecolor(), ground, patch.get_alpha())
    frame = text.get_bbox_patch()
    return over(frame.get_facecolor(), ground, frame.get_alpha()) if frame else ground


def colour_alone(figure) -> Iterator[str]:
    """Lines or bars of one panel that differ in nothing but their colour."""
    for axes in _panels(figure):
        for one, other in itertools.combinations(_lines(axes), 2):
            if _look(one) == _look(other) and to_hex(one.get_color()) != to_hex(other.get_color()):
                yield f"lines {_name(one)} and {_name(other)} differ in colour alone"
        for one, other in itertools.combinations(_unnamed_bars(axes), 2):
            if one[1] == other[1] and one[0] != other[0]:
                yield f"bars {one[0]} and {other[0]} differ in colour alone"


def _look(line) -> tuple:
    """What a line shows beside its colour. A row of marks that has a tick of its own is named by it."""
    levels, ticks = {float(y) for y in line.get_ydata()}, line.axes.get_yticks()
    level = levels.pop() if len(levels) == 1 else None
    named = (
        level is not None
        and level in ticks
        and line.axes.get_yticklabels()[list(ticks).index(level)].get_text()
    )
    filled = to_hex(line.get_markerfacecolor(), keep_alpha=True) == to_hex(line.get_color(), keep_alpha=True)
    return line.get_marker(), str(line._unscaled_dash_pattern), filled, line.get_markersize(), named


def _unnamed_bars(axes) -> set[tuple[str, str | None]]:
    """Colour and hatch of the bars that do not stand alone at a tick with a name that is no number."""
    bars = {patch: patch.get_window_extent() for patch in axes.patches if patch.get_visible()}
    named = set()
    for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
        for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False):  # may be off
            at = axes.transData.transform((tick, tick))[0 if axis is axes.xaxis else 1]
            here = [bar for bar, box in bars.items() if getattr(box, low) <= at <= getattr(box, high)]
            if len(here) == 1 and re.search("[A-Za-z]", label.get_text()):
                named.update(here)
    return {(to_hex(bar.get_facecolor()), bar.get_hatch()) for bar in bars if bar not in named}


def unreadable(figure) -> Iterator[str]:
    """Texts over texts, and texts that leave the picture."""
    page = figure.bbox
    texts = [text for axes in _panels(figure) for text in _texts(axes)]
    for legend in [*figure.legends, *(axes.get_legend() for axes in _panels(figure) if axes.get_legend())]:
        texts += legend.get_texts()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for text, box in boxes:
        if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1:
            yield f"text {text!r} leaves the picture"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if wide > 1 and high > 1:
            yield f"text {one!r} lies over {other!r}"


def _panels(figure) -> list:
    return [axes for axes in figure.axes if axes.get_visible()]


def _texts(axes) -> list:
    found = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
    for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
        found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        found.append(axis.get_offset_text())
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def _name(artist) -> str:
    label = str(artist.get_label())
    return repr(label) if label and not label.startswith("_") else to_hex(_colour(artist))


def _colour(artist):
    return artist.get_color() if hasattr(artist, "get_color") else artist.get_facecolor()


# -- widgets --------------------------------------------------------------------------------------------


def of_widget(widget) -> list[str]:
    """Controls, in a widget or below it, without a name.

    A box, a menu or a button is named by its description. A slider's is beside it and not its name in the
    page: one without a description passes with a tooltip, next to a box of the same value.
    """
    found = [line for child in getattr(widget, "children", ()) for line in of_widget(child)]
    kind = type(widget).__name__
    if kind == "HTML":
        return [*found, *of_html(widget.value)]
    names = [getattr(widget, "description", ""), "Slider" in kind and getattr(widget, "tooltip", "")]
    if hasattr(widget, "value") and not any(name and name.strip() for name in names):
        found.append(f"{kind} has no name")
    return found


# -- stored outputs -------------------------------------------------------------------------------------


def of_notebook(notebook: dict) -> list[str]:
    """All that is wrong with a notebook's stored outputs and its prose, as ``cell 3: ...``."""
    found = []
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            lines = [line for output in cell["outputs"] for line in of_output(output)]
        else:
            lines = list(of_markdown("".join(cell["source"])))
        found += [f"cell {place}: {line}" for line in lines]
    return found


def of_output(output: dict) -> Iterator[str]:
    """Pictures without an alternative text, and what is said of ``text/html`` in ``of_html``."""
    data, metadata = output.get("data", {}), output.get("metadata", {})
    for kind in data:
        if kind.startswith("image/") and not _says(metadata.get(kind, {}).get("alt")):
            yield f"{kind} has no alternative text"
    yield from of_html("".join(data.get("text/html", "")))


def _says(text: str | None) -> bool:
    """Whether an alternative text says something: a sentence, and no file's or object's name."""
    return bool(text) and len(text.split()) >= 5 and not text.startswith("<")


def of_html(text: str) -> Iterator[str]:
    """Pictures without alternative text, tables without headings, colours that fit one theme only, and
    prices that a notebook would set as a formula: a text between two dollar signs.
    """
    page = BeautifulSoup(text, "html.parser")
    for image in page.find_all("img"):
        if not _says(image.get("alt")):
            yield "<img> has no alternative text"
    for tag in page.find_all(True):
        styled = re.search(r"(^|;)\s*(color|background)", tag.get("style", ""))
        if styled or tag.get("color") or tag.get("bgcolor"):
            yield f"<{tag.name}> has a colour of its own, in the light theme as in the dark"
    for table in page.find_all("table"):
        if not table.find("th"):
            yield f"a table with {len(table.find_all('td'))} cells has no heading"
    for words in page.find_all(string=re.compile(r"\$[^$]*\$")):
        if not any("mathjax_ignore" in parent.get("class", ()) for parent in words.parents):
            yield f"{words[:40]!r} would be set as a formula"


def of_markdown(source: str) -> Iterator[str]:
    """Pictures in prose without a text."""
    for text in re.findall(r"!\[([^\]]*)\]\(", source):
        if not _says(text):
            yield f"a picture in prose says only {text!r}"
    yield from of_html(re.sub(r"```.*?```|`[^`]*`", "", source, flags=re.DOTALL) if "<img" in source else "")
