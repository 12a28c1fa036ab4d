"""The figure of what schemes did to the answers."""

from helpers.base import page
from helpers.base.figure import Figure, log_axis, panels
from helpers.base.page import Note
from helpers.measure import result_tables
from helpers.model.schemes import EVERY, look


def quality(rows: list[dict]) -> Figure | Note:
    """Draw what each scheme did to the answers against the size of its weights; lower left is better."""
    result_tables.one_origin(rows)
    compared = [row for row in rows if row.get("kl_mean")]
    points = {row["scheme"]: row for row in sorted(compared, key=lambda row: [*EVERY].index(row["scheme"]))}
    if not points:
        return Note(
            "No scheme's answers were compared with the baseline's here, so there is nothing to draw."
        )
    figure, [[axes]] = panels(size=(8, 3.8))
    widest = max(row["predicted_weights_bytes"] for row in rows) / 2**20
    for name, row in points.items():
        size = row["predicted_weights_bytes"] / 2**20
        axes.plot(size, row["kl_mean"], markersize=10, **(look(name) | {"linestyle": "none"}))
        left = size > 0.6 * widest  # of its mark there is no room to the right
        axes.annotate(
            f"{result_tables.titled(name)}: {row['top1']:.0%} same top token",
            (size, row["kl_mean"]), (-9 if left else 9, 0), textcoords="offset points",
            ha="right" if left else "left", va="center",
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
    words = "; ".join(
        f"{result_tables.titled(name)} {row['kl_mean']:.3f} nats" for name, row in points.items()
    )
    return Figure(
        figure,
        "A marker for each scheme: its weights to the right, the divergence of its answers from the "
        f"baseline's upwards. {page.measured(words)}",
    )
