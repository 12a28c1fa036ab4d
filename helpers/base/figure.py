"""What every figure shares: axes, names of lines and bars, and the alternative text."""

import base64
import functools
import html
import io
from collections.abc import Mapping, Sequence

DPI = 200  # twice a notebook's pixels: sharp on any screen
DOTTED = (0, (1, 2))


class Figure:
    """A figure and its alternative text, shown as ``<img alt=...>`` wherever HTML is, else as a picture.

    ``alt`` says in words what the picture shows; whatever in it depends on the machine is ``measured``.
    """

    def __init__(self, figure, alt: str):
        import matplotlib.pyplot as plt

        plt.close(figure)  # shown where it is returned, and not once more at the end of the cell
        self.figure, self.alt = figure, " ".join(alt.split())
        self.width = round(figure.get_figwidth() * DPI / 2)  # pixels of a page: half of the picture's

    @functools.cached_property
    def png(self) -> bytes:
        """The picture, with its alternative text inside."""
        from PIL import Image, PngImagePlugin

        raw, small, words = io.BytesIO(), io.BytesIO(), PngImagePlugin.PngInfo()
        self.figure.savefig(raw, format="png", dpi=DPI)
        words.add_itxt("Description", self.alt)
        # 256 colours are more than a plot has, and a third of the bytes; without dithering lines stay clean.
        few = Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(small, "png", optimize=True, pnginfo=words)
        return small.getvalue()

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode()
        return (
            f'<img width="{self.width}" style="max-width:100%" alt="{html.escape(self.alt)}" '
            f'src="data:image/png;base64,{data}">'
        )

    def _repr_png_(self):
        return self.png, {"alt": self.alt, "width": self.width}


def panels(columns: int = 1, size: tuple[float, float] = (7, 4), rows: int = 1):
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def batch_axis(axes, batches: Sequence[int]) -> None:
    """A logarithmic axis of batch sizes, each of them named."""
    axes.set(xscale="log", xlabel="batch size (requests at once)")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3, which="major")


def log_axis(axes, form: str = "") -> None:
    """A logarithmic y axis with ticks at 1, 2 and 5, numbers as people write them: 1,000 and not 10^3."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    # Where all values lie close together the ticks do, too: 1.6 and 1.8, which must not both be called 2.
    axes.yaxis.set_major_formatter(
        lambda value, _: (form or ("{value:,.0f}" if value >= 100 else "{value:.3g}")).format(value=value)
    )
    axes.grid(alpha=0.3, which="major")


def name_ends(axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write each line's name beside its end, apart from the others: name -> x, y and colour of that point.

    A thread leads to the end where that is not beside the name. Call it when the axes have their limits and
    scales.
    """
    lines = {name: 1 + name.count("\n") for name in ends}
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((to_axes.transform(end[:2])[1], name) for name, end in ends.items())
    heights: list[float] = []
    for (height, name), (_, below) in zip(placed, placed[:1] + placed, strict=False):
        gap = 0.03 + 0.0275 * (lines[name] + lines[below])  # the least distance, of the axes' height
        heights.append(max(height, heights[-1] + gap if heights else height))
    over = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for height, (_, name) in zip(heights, placed, strict=True):
        x, y, colour = ends[name]
        axes.text(1.03, height - over, name, transform=axes.transAxes, va="center")
        across, up = to_axes.transform((x, y))
        if max(abs(1 - across), abs(height - over - up)) < 0.01:  # a thread would look like a minus
            continue
        thread = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            "", (x, y), (1.025, height - over), textcoords="axes fraction", arrowprops=thread,
            annotation_clip=False,
        )  # fmt: skip


def bar_axes(axes, names: Sequence[str], longest: float, what: str, title: str) -> None:
    """The axes of horizontal bars, one a name and the first on top, of so much of what."""
    axes.set(xlim=(0, longest), xlabel=what, ylim=(len(names) - 0.5, -0.5), title=title)
    axes.set_yticks(range(len(names)), names)


def label_bar(axes, x: float, y: float, text: str) -> None:
    """A text to the right of a bar's end, readable across whatever line it meets."""
    white = {"color": "white", "pad": 0.5}
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", bbox=white, zorder=3)
