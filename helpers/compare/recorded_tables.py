"""Tables and figures of what was recorded on a GPU with other settings and kernels."""

from collections.abc import Sequence

from helpers.base.figure import Figure, bar_axes, label_bar, panels
from helpers.base.page import Note
from helpers.compare import recorded

KINDS = {  # of what takes a decoding step's time: colour and hatch
    "matrix products": ("#0072B2", ""),
    "attention and cache": ("#AD7A00", "//"),
    "other kernels": ("#808080", ".."),
    "GPU waits": ("#FFFFFF", "xx"),
}


def steps(rows: Sequence[dict], shares: bool = False) -> Figure:
    """Draw where a decoding step's time goes, a bar for each of ``recorded.steps``: by kind of kernel in
    microseconds or, for several models, in ``shares`` of the step; and what reading the weights takes at the
    memory's bandwidth."""
    figure, [[axes]] = panels(size=(8, 1.6 + 0.37 * len(rows)))
    names = [f"{row['model']}, {row['way']}" if shares else row["way"] for row in rows]
    words, longest = [], 0.0
    for place, row in enumerate(rows):
        parts = recorded.breakdown(row)
        unit, left = 100 / sum(parts.values()) if shares else 1.0, 0.0
        for kind, (colour, hatch) in KINDS.items():
            edge = "black" if colour == "#FFFFFF" else "white"
            style = {"color": colour, "hatch": hatch, "edgecolor": edge, "height": 0.7}
            axes.barh(place, unit * parts[kind], left=left, label=None if place else kind, **style)
            left += unit * parts[kind]
        least, bound = unit * recorded.reading_us(row), recorded.share_of_bound(row)
        mark = None if place else "reading the weights, at least"
        axes.plot(least, place, "|", color="black", markersize=24, markeredgewidth=3, label=mark)
        label_bar(axes, left, place, f"{bound:.0%} of the bound")
        told = ", ".join(f"{kind} {unit * us:,.0f}" for kind, us in parts.items())
        words.append(f"{names[place]}: {told}, at least {least:,.0f}, {bound:.0%} of the bound")
        longest = max(longest, left)
    title = f"{rows[0]['device']}, {rows[0]['batch']} request"
    title = title if shares else f"{rows[0]['model']} on {title}"
    what = "% of a step" if shares else "microseconds of a step"
    bar_axes(axes, names, 1.5 * longest, what, title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if shares:
        axes.set_xticks(range(0, 101, 20))
    figure.legend(loc="outside lower center", ncols=3)
    return Figure(figure, f"{title}, {what}. {'; '.join(words)}.")


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
