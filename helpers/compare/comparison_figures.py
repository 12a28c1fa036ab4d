"""Figures for readers: each a picture with a text that says the same, and one look for a scheme everywhere.

A scheme has one colour, one marker, one line style and one hatch, so that no figure depends on colour
alone. Nothing here measures. What cannot be drawn becomes a sentence (``page.Note``), never an empty plot.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from helpers.base.figure import DOTTED, Figure, bar_axes, batch_axis, label_bar, log_axis, name_ends, panels
from helpers.base.machine import GIB
from helpers.base.page import Note
from helpers.compare import rounding
from helpers.measure.result_tables import titled
from helpers.model.schemes import look

# -- 01 to 03 -----------------------------------------------------------------------------------

BOUND = "#555555"  # what limits a speed


def roofline(speeds_, bound_tokens_per_s: float, most_tokens_per_s: float) -> Figure:
    """Draw the baseline's measured throughput against batch size beneath the two limits of the roofline.

    Args:
        bound_tokens_per_s: the bandwidth bound of batch 1; it grows with the batch, because one read of the
            weights serves every request in it. ``most_tokens_per_s``: what the arithmetic allows, at any.
    """
    figure, [[axes]] = panels(size=(8, 4.2))
    batches = [speed.batch for speed in speeds_]
    rates, low, high = np.array([(one.output_tokens_per_s, one.low, one.high) for one in speeds_]).T
    style = look("baseline")
    axes.errorbar(batches, rates, [rates - low, high - rates], capsize=4, **style)
    first, last = batches[0], batches[-1]
    corner = max(last, most_tokens_per_s / bound_tokens_per_s)  # where the two limits meet
    limited = [bound_tokens_per_s * first, bound_tokens_per_s * corner]
    axes.plot([first, corner], limited, color=BOUND, linestyle="--")
    axes.axhline(most_tokens_per_s, color=BOUND, linestyle=DOTTED)
    batch_axis(axes, batches)
    log_axis(axes)
    beside = {"textcoords": "offset points", "va": "center"}
    axes.annotate("measured", (last, rates[-1]), (9, 0), color=style["color"], **beside)
    middle = (first * corner) ** 0.5, bound_tokens_per_s * (first * corner) ** 0.5
    axes.annotate("weights read\nonce a step", middle, (-9, 9), color=BOUND, ha="right", **beside)
    axes.annotate("arithmetic", (first, most_tokens_per_s), color=BOUND, va="bottom")
    axes.set_xlim(right=1.1 * max(corner, last * max(2, last / first) ** 0.35))
    axes.set_ylabel("output tokens per second")
    axes.spines[["top", "right"]].set_visible(False)
    return Figure(
        figure,
        "Output tokens per second of Baseline (16-bit) at each batch size, beneath the dashed line of the "
        "bandwidth bound, which grows with the batch until it meets the dotted level line of the arithmetic "
        "bound.",
    )


def grids(matrix, name: str) -> Figure:
    """Draw one matrix's histogram with the values that 8-bit and 4-bit formats can hold beneath it.

    Counts are logarithmic, so that the few large weights, which set the scale, are seen as well.
    """
    figure, [[axes], [below]] = panels(size=(9, 4.8), rows=2)
    axes.get_gridspec().set_height_ratios([3, 1])
    largest = abs(matrix).max()
    counts, _, _ = axes.hist(matrix.ravel() / largest, bins=201, color=look("baseline")["color"], log=True)
    axes.set(ylabel="how many weights", xlim=(-1.02, 1.02), ylim=(0.7, 2 * counts.max()))
    axes.tick_params(labelbottom=False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    rows = {"FP8 (E4M3)": ("e4m3", "fp8"), "INT8": ("int8", "int8"), "INT4": ("int4", "awq")}
    names = []
    for place, (title, (form, scheme)) in enumerate(rows.items()):
        values = rounding.grid(form)
        names.append(f"{title}: {len(values)} values")
        style = {"color": look(scheme)["color"], "markersize": 13, "markeredgewidth": 0.7}
        below.plot(values, [place] * len(values), "|", label=names[-1], **style)
    # The axis names the rows, so that nobody has to tell them by their colours.
    below.set_yticks(range(len(rows)), names)
    below.set(xlim=(-1.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
    below.set_xlabel(f"weight of {name}, largest = 1")
    return Figure(
        figure,
        f"Histogram of the weights of {name}: a bell around zero, and a few weights far outside. "
        "Beneath it the values of FP8, dense around zero and sparse outside, those of INT8, evenly spaced, "
        "and those of INT4, few and evenly spaced.",
    )


def outliers(before, scales, name: str) -> Figure:
    """Draw each input channel's mean activation, and AWQ's factor for it.

    Args:
        before: mean absolute activation of each channel; ``scales``: what AWQ multiplied its weights by.
    """
    order = np.argsort(before)[::-1]
    figure, [[left, right]] = panels(2, (9, 4))
    left.plot(before[order] / np.median(before), color=look("baseline")["color"])
    left.set(yscale="log", title=name)
    left.set(xlabel="channels, largest first", ylabel="mean activation, median channel = 1")
    right.plot(before / np.median(before), scales, ".", color=look("awq")["color"], markersize=3)
    right.set(xscale="log", xlabel="mean activation, median channel = 1", ylabel="AWQ's factor")
    right.set_ylim(bottom=0)
    right.set_title("Mostly: larger activation, larger scale")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return Figure(
        figure,
        f"Left, the mean activations of {name} by channel, largest first: a few stand far above the rest. "
        "Right, AWQ's factor for each channel mostly rises with its activation.",
    )


# -- 00: does it fit ----------------------------------------------------------------------------


PARTS = {  # of a budget, by its field: what readers call it, its colour and its hatch
    "weights": ("weights", "#0072B2", ""),
    "kv_cache": ("KV cache", "#AD7A00", "//"),
    "rest": ("rest", "#808080", ".."),
}
FITS = {"fits": "#00563F", "close": "#7A5600", "no": "black"}


def fits(budgets: Mapping[str, object], title: str) -> Figure | Note:
    """Draw what each scheme takes of a card: weights, KV cache and the rest, beside what vLLM may take.

    Args:
        budgets: a ``sizing.Budget`` by scheme, or the sentence that says why it does not run there.
    """
    drawn = {name: one for name, one in budgets.items() if not isinstance(one, str)}
    if not drawn:
        return Note("No scheme runs on this GPU: " + " ".join(map(str, budgets.values())))
    figure, [[axes]] = panels(size=(8, 1.6 + 0.5 * len(budgets)))
    across, names = axes.get_yaxis_transform(), list(budgets)
    left = np.zeros(len(drawn))
    for field, (part, colour, hatch) in PARTS.items():
        width = np.array([getattr(one, field) / GIB for one in drawn.values()])
        style = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        axes.barh([names.index(name) for name in drawn], width, left=left, label=part, **style)
        left += width
    for place, one in enumerate(budgets.values()):
        text, style = "does not run here", {"color": FITS["no"]}
        if not isinstance(one, str):
            text = f"{one.total / GIB:.1f} GiB: {_holds(one)}"
            style = {"color": FITS[one.verdict], "weight": "normal" if one.verdict == "no" else "bold"}
        axes.text(1.015, place, text, transform=across, va="center", **style)
    usable = next(iter(drawn.values())).usable / GIB
    axes.axvline(usable, color="black", linestyle="--", label=f"vLLM may take {usable:.1f} GiB")
    bar_axes(axes, names, 1.03 * max(usable, *left), "GiB", title)
    figure.legend(loc="outside lower center", ncols=4)
    words = [f"{name} {one.total / GIB:.1f} GiB, {_holds(one)}" for name, one in drawn.items()]
    text = f"{title}. vLLM may take {usable:.1f} GiB. Taken by {'; '.join(words)}."
    return Figure(figure, text)


def _holds(one) -> str:
    """Whether all requests run at once, and how many do where some wait their turn."""
    if one.verdict != "no":
        return one.verdict
    return f"{one.at_once} of {one.requests} run" if one.at_once else "does not fit"


# -- lines of schemes, named at their ends ------------------------------------------------------


def _ends(lines: Mapping[str, tuple[str, float, float]]) -> dict[str, tuple[float, float, str]]:
    """What ``name_ends`` takes: by scheme its name for readers, and the last point of its line."""
    return {textwrap.fill(name, 18): (x, y, look(scheme)["color"]) for scheme, (name, x, y) in lines.items()}


def gains(places: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> Figure | Note:
    """Draw each scheme's throughput as a multiple of the baseline's against the batch, a panel a place.

    Args:
        places: by title and scheme what ``roofline.ranges`` gives: ratio, least and most at each batch size;
            on record or computed, so the same everywhere.
    """
    places = {title: {n: r for n, r in by.items() if r} for title, by in places.items()}
    places = {title: by for title, by in places.items() if by}
    if not places:
        return Note("No scheme was measured beside a baseline on any machine: there are no gains to draw.")
    figure, [row] = panels(len(places), (1.2 + 3.9 * len(places), 3.8))
    every = [
        value for by in places.values() for points in by.values() for one in points.values() for value in one
    ]
    words = []
    for axes, (title, by) in zip(row, places.items(), strict=True):
        plain = look("baseline")["color"]
        axes.axhline(1, color=plain, linewidth=1)
        for name, points in by.items():
            ratios, low, high = zip(*points.values(), strict=True)
            axes.plot(list(points), ratios, **look(name))
            axes.vlines(list(points), low, high, color=look(name)["color"], linewidth=1)
        axes.set_title(title, fontsize="medium")
        batch_axis(axes, sorted({batch for points in by.values() for batch in points}))
        axes.set_ylim(min(0.75, 0.95 * min(every)), max(2.0, 1.05 * max(every)))
        ends = _ends({name: (titled(name), max(p), p[max(p)][0]) for name, p in by.items()})
        name_ends(axes, ends | {"16 bits": (axes.get_xlim()[1], 1.0, plain)})
        told = [f"{titled(name)} {p[min(p)][0]:.2f} to {p[max(p)][0]:.2f}" for name, p in by.items()]
        words.append(f"{title}: {', '.join(told)}")
    row[0].set_ylabel("tokens per second, 16 bits = 1")
    alt = "The throughput of each scheme as a multiple of 16 bits', from the smallest batch to the largest. "
    return Figure(figure, f"{alt}{'; '.join(words)}.")


def costs(dollars: Mapping[str, Mapping[int, float]], title: str) -> Figure | Note:
    """Draw dollars a million tokens: by scheme, at each batch size on record."""
    drawn = {name: by for name, by in dollars.items() if by}
    if not drawn:
        return Note("There is no throughput on record here, so nothing has a cost.")
    figure, [[axes]] = panels(size=(7, 3.6))
    for name, by in drawn.items():
        axes.plot(by.keys(), by.values(), **look(name))
    axes.set(ylabel="dollars a million output tokens", title=title)
    batch_axis(axes, sorted({batch for by in drawn.values() for batch in by}))
    log_axis(axes, "${value:,.2f}")
    name_ends(axes, _ends({name: (titled(name), max(by), by[max(by)]) for name, by in drawn.items()}))
    words = [f"{titled(name)} ${by[min(by)]:,.2f} to ${by[max(by)]:,.3f}" for name, by in drawn.items()]
    return Figure(
        figure, f"Dollars a million output tokens, falling with the batch. {title}: {'; '.join(words)}."
    )


def rents(offers: Sequence, title: str) -> Figure | Note:
    """Draw the least rent of each scheme that can serve a load, the cheapest first, from ``cost.Offer``s."""
    least: dict = {}
    for offer in sorted(offers, key=lambda offer: offer.per_day):
        if not offer.why_not:
            least.setdefault(offer.scheme, offer)
    able = list(least.values())
    if not able:
        why = "; ".join(f"{offer.scheme} on {offer.card}: {offer.why_not}" for offer in offers)
        return Note(f"None of these GPUs can serve this load: {why}")
    figure, [[axes]] = panels(size=(8, 1.2 + 0.45 * len(able)))
    words = []
    for place, offer in enumerate(able):
        best = offer.per_day == able[0].per_day
        style = {"edgecolor": "black", "linewidth": 2 if best else 0.5}
        axes.barh(place, offer.per_day, color=look(offer.scheme)["color"], **style)
        what = f"{offer.count} x {offer.card}"
        label_bar(axes, offer.per_day, place, f"{what}: ${offer.per_day:,.2f} a day" + ", the least" * best)
        words.append(f"{offer.title} on {what} ${offer.per_day:,.2f} a day")
    bar_axes(axes, [one.title for one in able], 1.75 * able[-1].per_day, "dollars a day", title)
    return Figure(figure, f"{title}. {'; '.join(words)}.")


def stairs(
    rents: Mapping[str, Sequence[float]], names: Mapping[str, str], rates: Sequence[float], title: str
) -> Figure | Note:
    """Draw the least rent against the load, in the steps of whole GPUs.

    Args:
        rents: by scheme what ``cost.least_rents`` gives at each of the ``rates``; ``names`` what readers call
            a scheme, of those that are drawn.
    """
    drawn = {name: rents[name] for name in names if name in rents}
    if not drawn:
        return Note("None of these GPUs can serve such requests.")
    figure, [[axes]] = panels(size=(8, 3.8))
    words = []
    for place, (name, by) in enumerate(drawn.items()):
        climbs = [n for n in range(1, len(by)) if by[n] != by[n - 1]]
        # Where they cost the same, all are seen: each is thinner than those beneath it.
        style = look(name) | {"linewidth": 2 + 1.5 * (len(drawn) - 1 - place), "markevery": climbs}
        axes.plot(rates, by, drawstyle="steps-pre", **style)
        told = [f"${by[0]:,.2f}", *(f"${by[n]:,.2f} from {rates[n]:.3g}" for n in climbs)]
        words.append(f"{names[name]} {', '.join(told)}")
    axes.set(xlabel="requests a second", ylabel="dollars a day", title=title)
    axes.set(xlim=(0, rates[-1]), ylim=(0, 1.2 * max(max(by) for by in drawn.values())))
    axes.grid(alpha=0.3)
    ends = {name: (f"{names[name]}: ${by[-1]:,.2f}", rates[-1], by[-1]) for name, by in drawn.items()}
    name_ends(axes, _ends(ends))
    return Figure(figure, f"The least rent a day against requests a second. {title}: {'; '.join(words)}.")
