"""What a feature gave: the same requests without and with it, as a table and as a figure of ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from helpers.base.figure import Figure, label_bar, panels
from helpers.base.page import Note, Table, measured

# By feature, the field that says whether it was on, its colour and its mark.
LOOKS = {
    "speculation": ("speculative", "#0072B2", "o"),
    "prefix caching": ("shared", "#AD7A00", "s"),
    "structured output": ("kept_to", "#009E73", "^"),
    "LoRA": ("adapter", "#BF6795", "D"),
}
TEXTS = {"copied": "n-gram, answer repeats the prompt", "drawn": "n-gram, new text"}
SAME = ("device", "scheme", "feature", "text", "users")


def pairs(rows: Sequence[Mapping]) -> list[tuple[Mapping, Mapping]]:
    """The newest measurement without and with each feature, of the same scheme, text and users."""
    found: dict[tuple, dict[bool, Mapping]] = {}
    for row in sorted(rows, key=lambda row: [*LOOKS].index(row["feature"])):
        switch = LOOKS[row["feature"]][0]
        found.setdefault(tuple(map(row.get, SAME)), {})[row[switch]] = row
    return [(of[False], of[True]) for of in found.values() if len(of) == 2]


def times(without: Mapping, with_: Mapping) -> tuple[float, float, float]:
    """The rate with a feature as a multiple of that without: of the medians, least and most of the runs."""
    ratio = _rate(with_) / _rate(without)
    return ratio, with_["low"] / without["high"], with_["high"] / without["low"]


def _rate(row: Mapping) -> float:
    return row["answers_per_s"] if "answers_per_s" in row else row["tokens_per_s"]


def name(row: Mapping) -> str:
    """A feature, the text it was tried on, and the scheme where it is not 16 bits."""
    other = {"prefix caching": "shared prefix", "structured output": "JSON schema", "LoRA": "LoRA"}
    scheme = row.get("scheme", "baseline")
    title = TEXTS[row["text"]] if "text" in row else other[row["feature"]]
    return title + f", {scheme}" * (scheme != "baseline")


def _besides(without: Mapping, with_: Mapping) -> str:
    """What a feature is judged by besides its rate."""
    if "acceptance" in with_:
        return f"{with_['acceptance'] or 0:.0%} accepted"
    if "valid" in with_:
        return f"{without['valid']:.0%}, then {with_['valid']:.0%} valid"
    if "changed" in with_:
        return f"{with_['changed']} of {with_['users']} answers changed"
    if without["hits"]:  # some of what should have been new was in the cache already
        return "-"
    return f"TTFT {1000 * without['ttft_s']:,.0f}, then {1000 * with_['ttft_s']:,.0f} ms"


def compared(rows: Sequence[Mapping], mark: Callable[[str], object] = measured) -> Table:
    """Rates without and with each feature; ``mark=str`` for what is on record."""
    lines = []
    for without, with_ in pairs(rows):
        form = "{:,.2f} requests/s" if "answers_per_s" in with_ else "{:,.0f} tok/s"
        ratio, least, most = times(without, with_)
        cells = [
            *(form.format(_rate(row)) for row in (without, with_)),
            f"x {ratio:.2f} ({least:.2f} to {most:.2f})", _besides(without, with_),
        ]  # fmt: skip
        lines.append([name(with_), with_["users"], *map(mark, cells)])
    return Table(["feature", "users", "without", "with", "times", "and"], lines)


def ratios(rows: Sequence[Mapping], title: str) -> Figure | Note:
    """Draw each feature's ratio as a dot, and what the slowest and fastest runs allow as a line."""
    found = pairs(rows)
    if not found:
        return Note("No feature was measured both without and with: there is no ratio to draw.")
    figure, [[axes]] = panels(size=(8, 1.2 + 0.34 * len(found)))
    axes.axvline(1, color="black", linewidth=1)
    words = []
    for place, (without, with_) in enumerate(found):
        _, colour, marker = LOOKS[with_["feature"]]
        ratio, least, most = times(without, with_)
        axes.hlines(place, least, most, color=colour, linewidth=2)
        axes.plot(ratio, place, marker, color=colour, markersize=8)
        label_bar(axes, most, place, f"{ratio:.2f}")
        words.append(f"{name(with_)}, {_users(with_)}: {ratio:.2f} ({least:.2f} to {most:.2f})")
    axes.set_yticks(range(len(found)), [f"{name(with_)}, {_users(with_)}" for _, with_ in found])
    axes.set(xlabel="rate with it, without it = 1", title=title, ylim=(len(found) - 0.5, -0.5))
    axes.set_xlim(0, 1.15 * max(times(*pair)[2] for pair in found))
    axes.grid(alpha=0.3, axis="x")
    return Figure(
        figure,
        f"{title}. A dot for each feature, the rate with it as a multiple of that without, and a line from "
        f"the least to the most that the runs allow. {'; '.join(words)}.",
    )


def _users(row: Mapping) -> str:
    return f"{row['users']} user" + "s" * (row["users"] > 1)
