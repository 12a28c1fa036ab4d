"""What a feature gave: the same requests without and with it, as a table and as a figure of ratios."""

from collections.abc import Mapping, Sequence

from helpers.base.figure import Figure, panels
from helpers.base.page import Table, measured
from helpers.model import schemes

# By feature, the field that says whether it was on, and what tables call it.
FEATURES = {
    "speculation": ("speculative", "n-gram"),
    "prefix caching": ("shared", "shared prefix"),
    "structured output": ("kept_to", "JSON schema"),
    "LoRA": ("adapter", "LoRA"),
}
TEXTS = {"copied": ", answer repeats the prompt", "drawn": ", new text", None: ""}
SAME = ("device", "scheme", "feature", "text", "users")


def pairs(rows: Sequence[Mapping]) -> list[tuple[Mapping, Mapping]]:
    """The newest measurement without and with each feature, of the same scheme, text and users."""
    found: dict[tuple, dict[bool, Mapping]] = {}
    for row in sorted(rows, key=lambda row: [*FEATURES].index(row["feature"])):
        switch, _ = FEATURES[row["feature"]]
        found.setdefault(tuple(map(row.get, SAME)), {})[row[switch]] = row
    return [(of[False], of[True]) for of in found.values() if len(of) == 2]


def times(without: Mapping, with_: Mapping) -> tuple[float, float, float]:
    """The rate with a feature as a multiple of that without: of the medians, least and most of the runs."""
    ratio = _rate(with_) / _rate(without)
    return ratio, with_["low"] / without["high"], with_["high"] / without["low"]


def _rate(row: Mapping) -> float:
    return row["answers_per_s"] if "answers_per_s" in row else row["tokens_per_s"]


def name(row: Mapping) -> str:
    """A feature, and the text it was tried on."""
    return FEATURES[row["feature"]][1] + TEXTS[row.get("text")]


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


def compared(rows: Sequence[Mapping]) -> Table:
    """Rates without and with each feature, as this machine measured them."""
    lines = []
    for without, with_ in pairs(rows):
        form = "{:,.2f} requests/s" if "answers_per_s" in with_ else "{:,.0f} tok/s"
        cells = [*(form.format(_rate(row)) for row in (without, with_)), _ratio(without, with_)]
        cells.append(_besides(without, with_))
        lines.append([name(with_), with_["users"], *map(measured, cells)])
    return Table(["feature", "users", "without", "with", "times", "and"], lines)


def _ratio(without: Mapping, with_: Mapping) -> str:
    return "x {:.2f} ({:.2f} to {:.2f})".format(*times(without, with_))


def by_scheme(rows: Sequence[Mapping], titles: Mapping[str, str]) -> Table:
    """Each feature's ratio in each scheme; ``titles`` has the schemes' columns."""
    cells = [
        [*key, *(_ratio(*of[scheme]) if scheme in of else "-" for scheme in titles)]
        for key, of in _by_load(rows).items()
    ]
    return Table(["feature", "users", *titles.values()], cells)


def _by_load(rows: Sequence[Mapping]) -> dict[tuple[str, int], dict[str, tuple[Mapping, Mapping]]]:
    """The pairs by feature and users, and by scheme."""
    found: dict[tuple, dict[str, tuple]] = {}
    for pair in pairs(rows):
        found.setdefault((name(pair[1]), pair[1]["users"]), {})[pair[1]["scheme"]] = pair
    return found


def ratios(rows: Sequence[Mapping], title: str, titles: Mapping[str, str]) -> Figure:
    """Draw each feature's ratio in each scheme as a dot, and what the slowest and fastest runs allow."""
    found = {
        f"{feature}, {users} user" + "s" * (users > 1): {scheme: times(*pair) for scheme, pair in of.items()}
        for (feature, users), of in _by_load(rows).items()
    }
    figure, [[axes]] = panels(size=(8, 1.4 + 0.44 * len(found)))
    axes.axvline(1, color="black", linewidth=1)
    for at, (scheme, title_) in enumerate(titles.items()):
        look = {key: value for key, value in schemes.look(scheme).items() if key != "linestyle"}
        here = [(place, of[scheme]) for place, of in enumerate(found.values()) if scheme in of]
        heights = [place + 0.22 * (at - (len(titles) - 1) / 2) for place, _ in here]
        middle, least, most = zip(*(ratio for _, ratio in here), strict=True)
        axes.hlines(heights, least, most, color=look["color"], linewidth=1.5)
        axes.plot(middle, heights, linestyle="", markersize=6, label=title_, **look)
    axes.set_yticks(range(len(found)), [*found])
    axes.set(
        xlabel="rate with it, without it = 1", title=title, ylim=(len(found) - 0.5, -0.5), xlim=(0, None)
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3, axis="x")
    words = [
        f"{label}: " + ", ".join(f"{titles[scheme]} {ratio[0]:.2f}" for scheme, ratio in of.items())
        for label, of in found.items()
    ]
    return Figure(
        figure,
        f"{title}. A dot for each feature and scheme, the rate with the feature as a multiple of that "
        f"without, and a line from the least to the most that the runs allow. {'; '.join(words)}.",
    )
