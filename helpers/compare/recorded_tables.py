"""Tables and figures of what was recorded on a GPU with other settings and kernels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from helpers.base.figure import Figure, label_bar, panels
from helpers.base.page import Note, Table
from helpers.compare import recorded
from helpers.model.schemes import SCHEMES

KINDS = {  # of what takes a decoding step's time: colour and hatch
    "matrix products": ("#0072B2", ""),
    "attention and cache": ("#AD7A00", "//"),
    "other kernels": ("#808080", ".."),
    "GPU waits": ("#FFFFFF", "xx"),
}


def steps(broken: Mapping[str, Mapping[str, float]], least: Mapping[str, float], title: str) -> Figure | Note:
    """Draw where a decoding step's time goes, a bar a variant: microseconds by kind of kernel.

    Args:
        broken: by variant, as ``recorded.breakdown`` gives them; ``least``: for the same names the
            microseconds that reading the weights takes at the memory's bandwidth.
    """
    if not broken:
        return Note("No step is on record whose kernels are named: there is nothing to break down.")
    figure, [[axes]] = panels(size=(8, 1.6 + 0.37 * len(broken)))
    for place, (name, parts) in enumerate(broken.items()):
        left = 0.0
        for kind, (colour, hatch) in KINDS.items():
            edge = "black" if colour == "#FFFFFF" else "white"
            style = {"color": colour, "hatch": hatch, "edgecolor": edge, "height": 0.7}
            axes.barh(place, parts[kind], left=left, label=None if place else kind, **style)
            left += parts[kind]
        mark = None if place else "reading the weights, at least"
        axes.plot(least[name], place, "|", color="black", markersize=24, markeredgewidth=3, label=mark)
        label_bar(axes, left, place, f"{least[name] / left:.0%} of the bound")
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
    return Figure(figure, f"{title}. Microseconds of a step. {words}.")


def emptied(rows: list[dict]) -> Note:
    """The GPU's memory over the engines that one process had in turn, of the longest such process."""
    series: list[list[dict]] = []
    for row in rows:
        if row["swap"] == 1:
            series.append([])
        series[-1].append(row)
    found = max(series, key=len)
    held, left = ([row[name] for row in found] for name in ("device_open_mib", "device_after_mib"))
    after = " to ".join(dict.fromkeys(f"{pick(left):,.1f}" for pick in (min, max)))
    before = found[0]["device_before_mib"]
    return Note(
        f"{len(found)} engines in turn on {found[0]['device']}: {before:,.1f} MiB in use before the first, "
        f"{min(held):,.1f} to {max(held):,.1f} with one open, {after} after each."
    )


def variants(rows: list[dict], batches: Sequence[int]) -> Table:
    """``recorded.recorded``: each setting's tokens/s, least to most, and the median as a multiple of the
    baseline's under vLLM's own settings. A star marks what was timed only while something else ran there.
    """
    rows = sorted(rows, key=lambda row: [*SCHEMES].index(row["scheme"]))
    base = next(row for row in rows if (row["scheme"], row["variant"]) == ("baseline", recorded.DEFAULTS))
    table = []
    for row in rows:
        cells = []
        for batch in map(str, batches):
            rates = list(dict.fromkeys(f"{rate:,.0f}" for rate in row["runs"].get(batch, ())))
            if not rates:
                cells.append("-")
                continue
            spread = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
            cells.append(f"{spread} (x {row['tokens_per_s'][batch] / base['tokens_per_s'][batch]:.2f})")
        names = (name.removesuffix("LinearKernel").removesuffix("ScaledMM") for name in row["kernels"])
        kernels = "; ".join(names) or "cuBLAS, or none named"
        setting = row["variant"] + " *" * ("beside" in row)
        runs = ", ".join(str(len(row["runs"].get(str(batch), ()))) for batch in batches)
        table.append([row["scheme"], setting, kernels, runs, *cells])
    heads = [f"tok/s at batch {batch}" for batch in batches]
    return Table(["scheme", "setting", "kernel", "runs", *heads], table, texts=["setting", "kernel"])
