"""Figures for readers: each a picture with a text that says the same, and one look for a scheme everywhere.

A scheme has one colour, one marker, one line style and one hatch, so that no figure depends on colour
alone. Nothing here measures. What cannot be drawn becomes a sentence (``show.Note``), never an empty plot.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import textwrap
from collections.abc import Mapping, Sequence

from helpers import drawn, schemes
from helpers.show import COLOURS, Note, measured, mib, one_origin

MARKERS = {
    "baseline": "o",
    "fp8": "s",
    "fp8_file": "D",
    "fp8_kv": "v",
    "awq": "^",
    "rounded": "X",
    "int8": "P",
}
LINES = {
    "baseline": "-",
    "fp8": "--",
    "fp8_file": "-.",
    "fp8_kv": (0, (4, 1, 1, 1, 1, 1)),  # dots alone are the bounds
    "awq": "-",
    "rounded": (0, (2, 1)),
    "int8": "--",
}
DOTTED = (0, (1, 2))
OTHER = {"color": "#444444", "marker": "*", "linestyle": "-"}  # a scheme that has no look of its own
HATCHES = {"weights": "", "KV cache": "//", "rest": ".."}
FITS = {"fits": "fits", "close": "close", "no": "does not fit"}
PARTS = {"weights": "#0072B2", "KV cache": "#AD7A00", "rest": "#808080"}


def look(scheme: str) -> dict:
    """Matplotlib's arguments for a scheme's line: the same everywhere."""
    if scheme not in MARKERS:
        return OTHER
    return {"color": COLOURS[scheme], "marker": MARKERS[scheme], "linestyle": LINES[scheme]}


def _bound(scheme: str) -> dict:
    """The same for what limits it: dotted, and ending in the scheme's marker, left empty."""
    return look(scheme) | {"linestyle": DOTTED, "linewidth": 1, "mfc": "white", "markevery": [-1]}


class Figure:
    """A figure and its alternative text, shown as ``<img alt=...>`` wherever HTML is, else as a picture.

    ``alt`` says in words what the picture shows; whatever in it depends on the machine is ``measured``.
    ``exact`` says that what is drawn is computed and the same everywhere.
    """

    def __init__(self, figure, alt: str, exact: bool = False):
        import matplotlib.pyplot as plt

        plt.close(figure)  # shown where it is returned, and not once more at the end of the cell
        self.figure, self.alt, self.exact = figure, " ".join(alt.split()), exact

    @property
    def axes(self):
        """The figure's axes."""
        return self.figure.axes

    @functools.cached_property
    def png(self) -> bytes:
        """The picture, with its text and what is drawn inside (``drawn``).

        32 colours are more than a plot has, and a quarter of the bytes. An octree keeps the rare ones apart.
        """
        from PIL import Image, PngImagePlugin

        raw, small, words = io.BytesIO(), io.BytesIO(), PngImagePlugin.PngInfo()
        self.figure.savefig(raw, format="png", dpi=drawn.DPI)
        words.add_itxt("Description", self.alt)
        words.add_itxt("Drawn", drawn.read_back(self.figure, self.exact), zip=True)
        few = Image.open(raw).convert("RGB").quantize(32, method=Image.Quantize.FASTOCTREE)
        few.save(small, "png", optimize=True, pnginfo=words)
        return small.getvalue()

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode()
        return (
            f'<img style="max-width:100%" alt="{html.escape(self.alt)}" src="data:image/png;base64,{data}">'
        )

    def _repr_png_(self):
        return self.png, {"alt": self.alt}


def _names(rows: list[dict]) -> list[str]:
    """The records' schemes, in one order everywhere."""
    order = [*schemes.SCHEMES]
    return sorted(
        {row["scheme"] for row in rows},
        key=lambda name: (name not in order, order.index(name) if name in order else 0, name),
    )


def _plots(columns: int = 1, size: tuple[float, float] = (7, 4), rows: int = 1):
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def _batches(axes, batches: Sequence[int]) -> None:
    """A logarithmic axis of batch sizes, each of them named."""
    axes.set_xscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("batch size (requests at once)")
    axes.grid(alpha=0.3, which="major")


def _log(axes, form: str = "") -> None:
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


def _words(axes, x: float, y: float, text: str) -> None:
    """A text to the right of a bar's end, readable across whatever line it meets."""
    white = {"color": "white", "pad": 0.5}
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", bbox=white, zorder=3)


# -- 01 to 03 -----------------------------------------------------------------------------------


def roofline(
    speeds_, bound_tokens_per_s: float, most_tokens_per_s: float, scheme: str = "baseline"
) -> Figure:
    """Draw measured throughput against batch size beneath the two limits of the roofline.

    Args:
        bound_tokens_per_s: the bandwidth bound of batch 1; it grows with the batch, because one read of the
            weights serves every request in it. ``most_tokens_per_s``: what the arithmetic allows, at any.
    """
    figure, [[axes]] = _plots(size=(7, 4.6))
    batches = [speed.batch for speed in speeds_]
    rates = [speed.output_tokens_per_s for speed in speeds_]
    spread = [
        [rate - speed.low for rate, speed in zip(rates, speeds_, strict=True)],
        [speed.high - rate for rate, speed in zip(rates, speeds_, strict=True)],
    ]
    axes.errorbar(batches, rates, spread, capsize=4, label=f"{scheme}, measured", **look(scheme))
    bound = [bound_tokens_per_s * batch for batch in batches]
    label = "bandwidth bound: weights read once a step"
    axes.plot(batches, bound, color=COLOURS["bound"], linestyle="--", label=label)
    label = "arithmetic bound: two operations a weight and token"
    axes.axhline(most_tokens_per_s, color=COLOURS["bound"], linestyle=DOTTED, label=label)
    axes.set_ylabel("output tokens per second")
    _batches(axes, batches)
    _log(axes)
    figure.legend(loc="outside lower center")  # the lines may be anywhere in the axes
    return Figure(
        figure,
        f"Output tokens per second of {scheme} at each batch size, beneath the dashed line of the bandwidth "
        "bound, which grows with the batch, and the dotted level line of the arithmetic bound.",
    )


def grids(matrix, name: str) -> Figure:
    """Draw one matrix's histogram with the values that 8-bit and 4-bit formats can hold beneath it.

    Counts are logarithmic, so that the few large weights, which set the scale, are seen as well.
    """
    from helpers import rounding

    figure, [[axes], [below]] = _plots(size=(9, 4.8), rows=2)
    axes.get_gridspec().set_height_ratios([3, 1])
    largest = abs(matrix).max()
    counts, _, _ = axes.hist(matrix.ravel() / largest, bins=201, color=COLOURS["baseline"], log=True)
    axes.set(ylabel="how many weights", xlim=(-1.02, 1.02), ylim=(0.7, 2 * counts.max()))
    axes.tick_params(labelbottom=False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    rows = {"FP8 (E4M3)": ("e4m3", "fp8"), "INT8": ("int8", "int8"), "INT4": ("int4", "awq")}
    names = []
    for place, (title, (form, scheme)) in enumerate(rows.items()):
        values = rounding.grid(form)
        names.append(f"{title}: {len(values)} values")
        style = {"color": COLOURS[scheme], "markersize": 13, "markeredgewidth": 0.7}
        below.plot(values, [place] * len(values), "|", label=names[-1], **style)
    # The axis names the rows, so that nobody has to tell them by their colours.
    below.set_yticks(range(len(rows)), names)
    below.set(xlim=(-1.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
    below.set_xlabel(f"weight of {name}, largest = 1")
    return Figure(
        figure,
        f"Histogram of the weights of {name}: a bell around zero, and a single largest weight far outside. "
        "Beneath it the values of FP8, dense around zero and sparse outside, those of INT8, evenly spaced, "
        "and those of INT4, few and evenly spaced.",
        exact=True,
    )


def compared(rows: list[dict]) -> Figure:
    """Draw weights and throughput of several schemes' records side by side."""
    one_origin(rows)
    names, batches = _names(rows), sorted({row["batch"] for row in rows})
    figure, [[left, right]] = _plots(2, (9, 4.4))
    weights = [
        next(row["weights_bytes"] or 0 for row in rows if row["scheme"] == name) / 2**20 for name in names
    ]
    bars = left.bar(names, weights, color=[look(name)["color"] for name in names], edgecolor="white")
    written = {row["scheme"] for row in rows if schemes.expanded(row)}
    for bar, name in zip(bars, names, strict=True):
        bar.set_hatch("//" if name in written else "")
    left.bar_label(bars, fmt="{:,.0f}")
    predicted = {row["scheme"]: schemes.held(row) / 2**20 for row in rows}
    marks = [predicted[name] for name in names]
    left.plot(names, marks, "_", color="black", markersize=24, markeredgewidth=2, label="predicted")
    if written:
        left.bar(
            names[:1], [0], color="#808080", hatch="//", edgecolor="white", label="written out: not its bytes"
        )
    left.set_ylim(top=1.3 * max(*weights, *marks))  # the legend stands above the bars
    left.legend(loc="upper right", ncols=2)
    left.set(ylabel="weights in memory, MiB", title="Memory")
    left.tick_params(axis="x", labelrotation=30)
    rates = {(row["scheme"], row["batch"]): row["output_tokens_per_s"] for row in rows}
    # A share of the baseline's where there is one: its own rise with the batch would hide the differences.
    share = all(("baseline", batch) in rates for batch in batches)
    for name in names:
        if name in written:  # the baseline's kernels once more: no speed of this scheme
            continue
        xs = [batch for batch in batches if (name, batch) in rates]
        ys = [rates[name, batch] / (rates["baseline", batch] if share else 1) for batch in xs]
        right.plot(xs, ys, label=name, **look(name))
    unit = "output tokens per second" + ", baseline = 1" * share
    highest = max((y for line in right.lines for y in line.get_ydata()), default=1.0)
    right.set(title="Speed", ylabel=unit, ylim=(0, 1.08 * highest))  # no marker is cut in half
    _batches(right, batches)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    return Figure(
        figure,
        "Left, a bar of the weights in memory for each scheme, its predicted size as a black mark. Right, "
        f"{unit}, against the batch size, a line for each that ran as itself. Schemes: "
        f"{measured(', '.join(names))}.",
    )


def outliers(before, scales, name: str) -> Figure:
    """Draw each input channel's mean activation, and AWQ's scale for it.

    Args:
        before: mean absolute activation of each channel; ``scales``: what AWQ multiplied its weights by.
    """
    import numpy as np

    order = np.argsort(before)[::-1]
    figure, [[left, right]] = _plots(2, (9, 4))
    left.plot(before[order] / np.median(before), color=COLOURS["baseline"])
    left.set(yscale="log", title=name)
    left.set(xlabel="channels, largest first", ylabel="mean activation, median channel = 1")
    right.plot(before / np.median(before), scales, ".", color=COLOURS["awq"], markersize=3)
    right.set(xscale="log", xlabel="mean activation, median channel = 1", ylabel="AWQ's scale")
    right.set_ylim(bottom=0)
    right.set_title("Larger activation, finer weights")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return Figure(
        figure,
        f"Left, the mean activations of {name} by channel, largest first: a few stand far above the rest. "
        "Right, AWQ's scale of each channel rises with its activation.",
    )


# -- 00: does it fit ----------------------------------------------------------------------------


def fits(budgets: Mapping[str, object], title: str) -> Figure | Note:
    """Draw what each scheme takes of a card: weights, KV cache and the rest, beside what vLLM may take.

    Args:
        budgets: a ``sizing.Budget`` by scheme, or the sentence that says why it does not run there.
    """
    drawn = {name: one for name, one in budgets.items() if not isinstance(one, str)}
    if not drawn:
        return Note("No scheme runs on this GPU: " + " ".join(map(str, budgets.values())))
    figure, [[axes]] = _plots(size=(8, 1.6 + 0.5 * len(budgets)))
    usable = next(iter(drawn.values())).usable / 2**30
    parts = {"weights": "weights", "KV cache": "kv_cache", "rest": "rest"}
    for place, name in enumerate(budgets):
        left, one = 0.0, drawn.get(name)
        for part, field in parts.items() if one else ():
            width = getattr(one, field) / 2**30
            style = {"color": PARTS[part], "hatch": HATCHES[part], "edgecolor": "white"}
            axes.barh(
                place, width, left=left, label=part if one is next(iter(drawn.values())) else None, **style
            )
            left += width
        text = f"{left:.1f} GiB: {FITS[one.verdict]}" if one else "does not run here"
        _words(axes, left, place, text)
    axes.axvline(usable, color="black", linestyle="--", label=f"vLLM's share, {usable:.1f} GiB")
    longest = max(usable, *(one.total / 2**30 for one in drawn.values()))
    axes.set(xlim=(0, 1.35 * longest), xlabel="GiB", title=title, ylim=(len(budgets) - 0.5, -0.5))
    axes.set_yticks(range(len(budgets)), budgets)
    figure.legend(loc="outside lower center", ncols=4)
    words = [f"{name} {one.total / 2**30:.1f} GiB, {FITS[one.verdict]}" for name, one in drawn.items()]
    text = f"{title}. vLLM's share is {usable:.1f} GiB. Taken by {'; '.join(words)}."
    return Figure(figure, text, exact=True)


# -- 04: records compared -----------------------------------------------------------------------


def memory(rows: list[dict], token_bytes: Mapping[str, int]) -> Figure | Note:
    """Draw where an engine's memory went, a bar a scheme, as measured.

    Args:
        rows: records of one origin; ``token_bytes``: bytes of a token in the KV cache, by scheme.
    """
    one_origin(rows)
    known = [row for row in rows if row["weights_bytes"] and row.get("total_bytes")]
    by_scheme = {name: next(row for row in known if row["scheme"] == name) for name in _names(known)}
    if not by_scheme:
        return Note("No record here says what its weights took, so there is no memory to draw.")
    figure, [[axes]] = _plots(size=(8, 1.6 + 0.45 * len(by_scheme)))
    words = []
    for place, (name, row) in enumerate(by_scheme.items()):
        cache = row["kv_cache_tokens"] * token_bytes[name]
        sizes = {"weights": row["weights_bytes"], "KV cache": cache}
        sizes["rest"] = max(0, row["total_bytes"] - sum(sizes.values()))
        left = 0.0
        for part, size in sizes.items():
            style = {"color": PARTS[part], "hatch": HATCHES[part], "edgecolor": "white"}
            axes.barh(place, size / 2**20, left=left, label=None if place else part, **style)
            left += size / 2**20
        _words(axes, 0, place, f"{sizes['weights'] / 2**20:,.0f}")
        predicted = schemes.held(row) / 2**20
        label = None if place else "weights, predicted"
        axes.plot(predicted, place, "|", color="black", markersize=20, markeredgewidth=2, label=label)
        words.append(f"{name}: {', '.join(f'{part} {mib(size)}' for part, size in sizes.items())}")
    axes.set(xlabel="MiB, as the operating system or the driver counts", ylim=(len(by_scheme) - 0.5, -0.5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    labels = [f"{name}\nwritten out" if schemes.expanded(row) else name for name, row in by_scheme.items()]
    axes.set_yticks(range(len(by_scheme)), labels)
    figure.legend(loc="outside lower center", ncols=4)
    alt = (
        "A bar for each scheme: weights, KV cache and the rest of what its engine took, one after the other. "
    )
    return Figure(figure, alt + str(measured("; ".join(words))))


def speed(rows: list[dict], bounds: Mapping[str, Sequence[float]], batches: Sequence[int]) -> Figure | Note:
    """Draw throughput and the time between two tokens against the batch, with each scheme's bound.

    Args:
        rows: records of one origin; ``bounds``: by scheme the most tokens/s at each of ``batches``.
    """
    one_origin(rows)
    rows = [row for row in rows if row["scheme"] in bounds and not schemes.expanded(row)]
    names = _names(rows)
    if not names:
        return Note("No speed was measured here, so there is none to draw.")
    figure, [[left, right]] = _plots(2, (9.5, 4.6))
    for name in names:
        points = sorted((row["batch"], row["output_tokens_per_s"]) for row in rows if row["scheme"] == name)
        xs, ys = zip(*points, strict=True)
        left.plot(xs, ys, label=name, **look(name))
        right.plot(xs, [1e3 * batch / rate for batch, rate in points], label=name, **look(name))
        left.plot(batches, bounds[name], **_bound(name))
    style = {"color": "#444444", "marker": "o", "mfc": "white", "linestyle": DOTTED}
    left.plot([], [], **style, label="dotted: bandwidth bound of each")
    left.set(ylabel="output tokens per second", title="Everyone together")
    right.set(ylabel="milliseconds a token (TPOT)", title="One request")
    for axes in (left, right):
        _batches(axes, sorted({*batches}))
        _log(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    ends = {
        name: max((row["batch"], row["output_tokens_per_s"]) for row in rows if row["scheme"] == name)
        for name in names
    }
    words = "; ".join(f"{name} {rate:,.0f} tok/s at batch {batch}" for name, (batch, rate) in ends.items())
    return Figure(
        figure,
        "Left, output tokens per second against the batch size, a line for each scheme, and dotted the most "
        f"its bandwidth allows. Right, milliseconds between two tokens of one request. {measured(words)}",
    )


def quality(rows: list[dict]) -> Figure | Note:
    """Draw what each scheme did to the answers against the size of its weights; lower left is better."""
    one_origin(rows)
    compared = [row for row in rows if row.get("kl_mean")]
    points = {name: next(row for row in compared if row["scheme"] == name) for name in _names(compared)}
    if not points:
        return Note(
            "No scheme's answers were compared with the baseline's here, so there is nothing to draw."
        )
    figure, [[axes]] = _plots(size=(7, 4.6))
    for name, row in points.items():
        style = look(name) | {"linestyle": "none"}
        size = row["predicted_weights_bytes"] / 2**20
        axes.plot(
            size, row["kl_mean"], markersize=10, label=f"{name}: {row['top1']:.0%} same top token", **style
        )
    base = next(iter(row for row in rows if row["scheme"] == "baseline"), None)
    if base:
        size = base["predicted_weights_bytes"] / 2**20
        axes.axvline(size, color=COLOURS["baseline"], linewidth=1, label="baseline's size (no divergence)")
    axes.set(xlabel="weights as they are stored, MiB", ylabel="mean KL from 16 bits, nats")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.15 * max(row["kl_mean"] for row in points.values()))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    words = "; ".join(f"{name} {row['kl_mean']:.3f} nats" for name, row in points.items())
    return Figure(
        figure,
        "A marker for each scheme: its weights to the right, the divergence of its answers from the "
        f"baseline's upwards. {measured(words)}",
    )


def gains(
    origins: Mapping[str, list[dict]], allowed: Mapping[str, Mapping[str, Mapping[float, float]]]
) -> Figure | Note:
    """Draw each scheme's throughput as a multiple of the baseline's against the batch, a panel an origin.

    Args:
        origins: records by what they are of; ``allowed``: for the same names what ``roofline.allowed`` says
            of each scheme, drawn dotted.
    """
    from helpers import roofline as theory

    found = {
        title: {name: theory.ratios(rows, name) for name in schemes.SCHEMES if name != "baseline"}
        for title, rows in origins.items()
    }
    found = {title: {n: r for n, r in by.items() if r} for title, by in found.items()}
    found = {title: by for title, by in found.items() if by}
    if not found:
        return Note("No scheme was measured beside a baseline on any machine: there are no gains to draw.")
    columns = min(3, len(found))
    height = -(-len(found) // columns)
    figure, grid = _plots(columns, (max(7, 3.4 * columns), 3.3 * height), height)
    for axes, (title, by) in zip(grid.flat, found.items(), strict=False):
        axes.axhline(1, color=COLOURS["baseline"], linewidth=1)
        for name, ratios in by.items():
            axes.plot(ratios.keys(), ratios.values(), label=name, **look(name))
            most = allowed.get(title, {}).get(name, {})
            axes.plot(most.keys(), most.values(), **_bound(name))
        axes.set_title(title.replace(" on ", "\non "), fontsize="small")
        every = [ratio for ratios in by.values() for ratio in ratios.values()]
        every += [ratio for name in by for ratio in allowed.get(title, {}).get(name, {}).values()]
        _batches(axes, sorted({batch for ratios in by.values() for batch in ratios}))
        _log(axes)
        axes.set_ylim(0.9 * min(0.5, *every), 1.1 * max(2.0, *every))
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("tokens per second, baseline = 1")
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style = {"color": "black", "marker": "o", "mfc": "white", "linestyle": DOTTED}
    handles["dotted: what the roofline allows each"] = grid.flat[0].plot([], [], **style)[0]
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5 if columns > 2 else 3)
    words = "; ".join(
        f"{title}: {', '.join(f'{n} {r[min(r)]:.2f} to {r[max(r)]:.2f}' for n, r in by.items())}"
        for title, by in found.items()
    )
    return Figure(
        figure,
        "For each machine and model a panel: the throughput of each scheme as a multiple of the baseline's, "
        "from the smallest batch to the largest, and dotted the most that the roofline allows it. "
        f"{measured(words)}",
    )


def costs(dollars: Mapping[str, Mapping[int, float]], title: str) -> Figure | Note:
    """Draw dollars a million tokens: by scheme, at each batch size."""
    drawn = {name: by for name, by in dollars.items() if by}
    if not drawn:
        return Note("There is no throughput on record here, so nothing has a cost.")
    figure, [[axes]] = _plots(size=(7, 3.8))
    for name, by in drawn.items():
        axes.plot(by.keys(), by.values(), label=name, **look(name))
    axes.set(ylabel="dollars a million output tokens", title=title)
    _batches(axes, sorted({batch for by in drawn.values() for batch in by}))
    _log(axes, "${value:,.2f}")
    axes.legend(fontsize="small")
    words = "; ".join(f"{name} ${min(by.values()):,.2f} at best" for name, by in drawn.items())
    return Figure(
        figure, f"Dollars a million output tokens against the batch size. {measured(f'{title}: {words}')}"
    )


def rents(offers: Sequence, title: str) -> Figure | Note:
    """Draw the rent a day of each ``cost.Offer`` that can serve a load, the cheapest first."""
    able = [offer for offer in offers if not offer.why_not]
    if not able:
        return Note("None of these GPUs can serve this load: " + "; ".join(
            f"{offer.scheme} on {offer.card}: {offer.why_not}" for offer in offers
        ))  # fmt: skip
    figure, [[axes]] = _plots(size=(8, 1.4 + 0.45 * len(able)))
    for place, offer in enumerate(able):
        axes.barh(place, offer.per_day, color=look(offer.scheme)["color"], edgecolor="black", linewidth=0.5)
        _words(
            axes,
            offer.per_day,
            place,
            f"{offer.count} x {offer.card}, {offer.batch} at once, ${offer.per_million:,.2f} a million",
        )
    axes.set_yticks(range(len(able)), [f"{offer.scheme}, {offer.card}" for offer in able])
    axes.set(xlim=(0, 1.8 * max(offer.per_day for offer in able)), ylim=(len(able) - 0.5, -0.5))
    axes.set(xlabel="dollars a day", title=title)
    words = "; ".join(f"{o.scheme} on {o.count} x {o.card} ${o.per_day:,.2f} a day" for o in able)
    return Figure(figure, f"{title}. {words}.", exact=True)


KINDS = {  # of what takes a decoding step's time: colour and hatch
    "matrix products": ("#0072B2", ""),
    "attention and cache": ("#AD7A00", "//"),
    "other kernels": ("#808080", ".."),
    "GPU waits": ("#FFFFFF", "xx"),
}


def steps(broken: Mapping[str, Mapping[str, float]], least: Mapping[str, float], title: str) -> Figure | Note:
    """Draw where a decoding step's time goes, a bar a variant: microseconds by kind of kernel.

    Args:
        broken: by variant, as ``tuning.breakdown`` gives them; ``least``: for the same names the
            microseconds that reading the weights takes at the memory's bandwidth.
    """
    if not broken:
        return Note("No step is on record whose kernels are named: there is nothing to break down.")
    figure, [[axes]] = _plots(size=(8, 1.6 + 0.37 * len(broken)))
    for place, (name, parts) in enumerate(broken.items()):
        left = 0.0
        for kind, (colour, hatch) in KINDS.items():
            label = None if place else kind
            edge = "black" if colour == "#FFFFFF" else "white"
            axes.barh(
                place,
                parts[kind],
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor=edge,
                label=label,
                height=0.7,
            )
            left += parts[kind]
        mark = None if place else "reading the weights, at least"
        axes.plot(least[name], place, "|", color="black", markersize=24, markeredgewidth=3, label=mark)
        _words(axes, left, place, f"{least[name] / left:.0%} of the bound")
    longest = max(sum(parts.values()) for parts in broken.values())
    axes.set(xlim=(0, 1.5 * longest), xlabel="microseconds a token, one request", title=title)
    axes.set_yticks(range(len(broken)), [textwrap.fill(name, 40) for name in broken])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=3)
    words = "; ".join(
        f"{name}: {', '.join(f'{kind} {us:,.0f}' for kind, us in parts.items())}, at least {least[name]:,.0f}"
        for name, parts in broken.items()
    )
    return Figure(figure, f"{title}. Microseconds of a step. {words}.", exact=True)
