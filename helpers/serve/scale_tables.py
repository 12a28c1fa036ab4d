"""Tables and figures of several servers: who gets which request, and how a queue grows."""

from collections.abc import Mapping

from helpers.base import page
from helpers.base.figure import DOTTED, Figure, panels
from helpers.base.page import Table


def policies(found: Mapping[str, Mapping[str, tuple[list[float], float]]]) -> Table:
    """By policy and kind of prompts: requests of each server, and the share of prompt tokens that hit."""
    kinds = list(next(iter(found.values())))
    rows = [
        [policy, *(cell for kind in kinds for cell in _hit(kind_found[kind]))]
        for policy, kind_found in found.items()
    ]
    return Table(["policy", *(name for kind in kinds for name in (kind, "from cache"))], rows)


def _hit(found: tuple[list[float], float]) -> tuple:
    requests, share = found
    shown = " + ".join(f"{count:.0f}" for count in requests)
    return page.measured(shown), page.measured(f"{share:.0%}")


def waiting(queue, marks: Mapping[str, float], predicted: float) -> Figure:
    """Requests waiting by the second, with what happened when, and how many were predicted at most."""
    figure, [[axes]] = panels(size=(7.2, 3.8))
    axes.plot(queue.seconds, queue.waiting, color="#0072B2")
    most = max(queue.waiting, default=0)
    top, end = max(predicted, most) or 1, max([*queue.seconds, *marks.values()])
    beside = {"textcoords": "offset points", "bbox": {"color": "white", "pad": 0.5}}
    axes.axhline(predicted, color="#B34700", linestyle=DOTTED)
    axes.annotate("predicted", (end, predicted), (-3, 4), color="#B34700", ha="right", **beside)
    for at, (name, second) in enumerate(sorted(marks.items(), key=lambda mark: -mark[1])):
        axes.axvline(second, color="#555555", linewidth=0.8)  # each name at a height of its own, in the frame
        side = {"xytext": (-3, 0), "ha": "right"} if second > 0.75 * end else {"xytext": (3, 0)}
        axes.annotate(name, (second, top * (1.08 + 0.1 * at)), **side, **beside)
    axes.set(xlabel="seconds", ylabel="requests waiting", xlim=(0, end))
    axes.set_ylim(0, top * (1.05 + 0.1 * len(marks)))
    told = ", ".join(f"{name} after ‹{second:.0f} s›" for name, second in marks.items())
    return Figure(
        figure,
        f"Requests waiting against seconds: {told}; at most ‹{most:.0f}›, predicted ‹{predicted:.0f}›.",
    )
