"""Figures of what was measured: memory, speed, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from helpers.base import page
from helpers.base.figure import (
    DOTTED,
    HATCHES,
    PARTS,
    Figure,
    batch_axis,
    label_bar,
    log_axis,
    panels,
)
from helpers.base.page import Note
from helpers.measure import result_tables
from helpers.model import sizes, ways
from helpers.model.schemes import SCHEMES, bound_look, look
from helpers.model.sizes import held


def _names(rows: list[dict]) -> list[str]:
    """The records' schemes, in one order everywhere."""
    order = [*SCHEMES]
    return sorted(
        {row["scheme"] for row in rows},
        key=lambda name: (name not in order, order.index(name) if name in order else 0, name),
    )


def compared(rows: list[dict]) -> Figure:
    """Draw weights and throughput of several schemes' records side by side."""
    result_tables.one_origin(rows)
    names, batches = _names(rows), sorted({row["batch"] for row in rows})
    figure, [[left, right]] = panels(2, (9, 4.4))
    weights = [
        next(row["weights_bytes"] or 0 for row in rows if row["scheme"] == name) / 2**20 for name in names
    ]
    bars = left.bar(names, weights, color=[look(name)["color"] for name in names], edgecolor="white")
    written = {row["scheme"] for row in rows if ways.expanded(row)}
    for bar, name in zip(bars, names, strict=True):
        bar.set_hatch("//" if name in written else "")
    left.bar_label(bars, fmt="{:,.0f}")
    predicted = {row["scheme"]: sizes.held(row) / 2**20 for row in rows}
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
    batch_axis(right, batches)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    return Figure(
        figure,
        "Left, a bar of the weights in memory for each scheme, its predicted size as a black mark. Right, "
        f"{unit}, against the batch size, a line for each that ran as itself. Schemes: "
        f"{page.measured(', '.join(names))}.",
    )


# -- 04: records compared -----------------------------------------------------------------------


def memory(rows: list[dict], token_bytes: Mapping[str, int]) -> Figure | Note:
    """Draw where an engine's memory went, a bar a scheme, as measured.

    Args:
        rows: records of one origin; ``token_bytes``: bytes of a token in the KV cache, by scheme.
    """
    result_tables.one_origin(rows)
    known = [row for row in rows if row["weights_bytes"] and row.get("total_bytes")]
    by_scheme = {name: next(row for row in known if row["scheme"] == name) for name in _names(known)}
    if not by_scheme:
        return Note("No record here says what its weights took, so there is no memory to draw.")
    figure, [[axes]] = panels(size=(8, 1.6 + 0.45 * len(by_scheme)))
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
        label_bar(axes, 0, place, f"{sizes['weights'] / 2**20:,.0f}")
        predicted = held(row) / 2**20
        label = None if place else "weights, predicted"
        axes.plot(predicted, place, "|", color="black", markersize=20, markeredgewidth=2, label=label)
        words.append(f"{name}: {', '.join(f'{part} {page.mib(size)}' for part, size in sizes.items())}")
    axes.set(xlabel="MiB, as the operating system or the driver counts", ylim=(len(by_scheme) - 0.5, -0.5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    labels = [f"{name}\nwritten out" if ways.expanded(row) else name for name, row in by_scheme.items()]
    axes.set_yticks(range(len(by_scheme)), labels)
    figure.legend(loc="outside lower center", ncols=4)
    alt = (
        "A bar for each scheme: weights, KV cache and the rest of what its engine took, one after the other. "
    )
    return Figure(figure, alt + str(page.measured("; ".join(words))))


def speed(rows: list[dict], bounds: Mapping[str, Sequence[float]], batches: Sequence[int]) -> Figure | Note:
    """Draw throughput and the time between two tokens against the batch, with each scheme's bound.

    Args:
        rows: records of one origin; ``bounds``: by scheme the most tokens/s at each of ``batches``.
    """
    result_tables.one_origin(rows)
    rows = [row for row in rows if row["scheme"] in bounds and not ways.expanded(row)]
    names = _names(rows)
    if not names:
        return Note("No speed was measured here, so there is none to draw.")
    figure, [[left, right]] = panels(2, (9.5, 4.6))
    for name in names:
        points = sorted((row["batch"], row["output_tokens_per_s"]) for row in rows if row["scheme"] == name)
        xs, ys = zip(*points, strict=True)
        left.plot(xs, ys, label=name, **look(name))
        right.plot(xs, [1e3 * batch / rate for batch, rate in points], label=name, **look(name))
        left.plot(batches, bounds[name], **bound_look(name))
    style = {"color": "#444444", "marker": "o", "mfc": "white", "linestyle": DOTTED}
    left.plot([], [], **style, label="dotted: bandwidth bound of each")
    left.set(ylabel="output tokens per second", title="Everyone together")
    right.set(ylabel="milliseconds a token (TPOT)", title="One request")
    for axes in (left, right):
        batch_axis(axes, sorted({*batches}))
        log_axis(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    ends = {
        name: max((row["batch"], row["output_tokens_per_s"]) for row in rows if row["scheme"] == name)
        for name in names
    }
    words = "; ".join(f"{name} {rate:,.0f} tok/s at batch {batch}" for name, (batch, rate) in ends.items())
    return Figure(
        figure,
        "Left, output tokens per second against the batch size, a line for each scheme, and dotted the most "
        "its bandwidth allows. Right, milliseconds between two tokens of one request. "
        f"{page.measured(words)}",
    )


def quality(rows: list[dict]) -> Figure | Note:
    """Draw what each scheme did to the answers against the size of its weights; lower left is better."""
    result_tables.one_origin(rows)
    compared = [row for row in rows if row.get("kl_mean")]
    points = {name: next(row for row in compared if row["scheme"] == name) for name in _names(compared)}
    if not points:
        return Note(
            "No scheme's answers were compared with the baseline's here, so there is nothing to draw."
        )
    figure, [[axes]] = panels(size=(7, 3.8))
    widest = max(row["predicted_weights_bytes"] for row in rows) / 2**20
    for name, row in points.items():
        size = row["predicted_weights_bytes"] / 2**20
        axes.plot(size, row["kl_mean"], markersize=10, **(look(name) | {"linestyle": "none"}))
        left = size > 0.6 * widest  # of its mark there is no room to the right
        axes.annotate(
            f"{name}: {row['top1']:.0%} same top token", (size, row["kl_mean"]), (-9 if left else 9, 0),
            textcoords="offset points", ha="right" if left else "left", va="center",
        )  # fmt: skip
    base = next(iter(row for row in rows if row["scheme"] == "baseline"), None)
    if base:
        size = base["predicted_weights_bytes"] / 2**20
        axes.axvline(size, color=look("baseline")["color"], linewidth=1)
        axes.annotate(
            "16 bits", (size, 1), (-5, -5), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="right", va="top", color=look("baseline")["color"],
        )  # fmt: skip
    axes.set(xlabel="weights as they are stored, MiB", ylabel="mean KL from 16 bits, nats")
    log_axis(axes)
    means = [row["kl_mean"] for row in points.values()]
    axes.set(xlim=(0, 1.1 * widest), ylim=(0.6 * min(means), 2 * max(means)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    words = "; ".join(f"{name} {row['kl_mean']:.3f} nats" for name, row in points.items())
    return Figure(
        figure,
        "A marker for each scheme: its weights to the right, the divergence of its answers from the "
        f"baseline's upwards. {page.measured(words)}",
    )
