"""Tables and figures of several servers and GPUs, from this run and from the recordings."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from helpers.base import page
from helpers.base.figure import DOTTED, Figure, log_axis, panels
from helpers.base.page import Note, Table

MISSING = "Nothing is recorded yet: python -m helpers.tools.scale_records, on two GPUs."
# Ways to use two GPUs; colours of the page's palette, in an order that colour-blind readers can tell.
LOOKS = {
    "one": ("#808080", "o", "one server, one GPU"),
    "router": ("#0072B2", "s", "two servers, a router"),
    "data parallel": ("#009E73", "^", "one server, two ranks"),
    "tensor parallel": ("#D55E00", "D", "one server on two GPUs"),
}


def outgrown(rows: list[dict], batches: tuple[int, ...] = (1, 64)) -> Table | Note:
    """A model that one GPU does not hold in 16 bits: tokens a second, of all GPUs and of each."""
    rows = [row for row in rows if row["model"] == "Llama-3.1-70B"]
    if not rows:
        return Note(MISSING)
    columns = ["weights", "GPUs", "KV cache, tokens", *(f"tok/s at {b}" for b in batches), "a GPU"]
    table = []
    for row in sorted(rows, key=lambda row: (row["gpus"], row["scheme"])):
        rates = [row["tokens_per_s"][str(batch)] for batch in batches]
        shown = [f"{rate:,.0f}" for rate in [*rates, rates[-1] / row["gpus"]]]
        table.append([row["scheme"], row["gpus"], f"{row['kv_cache_tokens']:,}", *shown])
    caption = f"{rows[0]['model']} on {rows[0]['device']}, recorded"
    return Table(columns, table, caption)


def ways(rows: list[dict]) -> Figure | Note:
    """What two GPUs buy: tokens a second for a user against tokens a second for a GPU."""
    loads = [row for row in rows if row.get("what") == "load"]
    if not loads:
        return Note(MISSING)
    figure, axes = panels(size=(7.2, 4.2))
    (axes,), said = axes[0], []
    for way, (colour, marker, name) in LOOKS.items():
        points = []
        for clients, level in reversed(_levels(loads, way).items()):
            each = median(row["output_tokens_per_s"] for row in level) / level[0]["gpus"]
            points.append((1 / median(row["tpot_s"] for row in level), each, clients))
        if not points:
            continue
        users, gpus, _ = zip(*points, strict=True)
        axes.plot(users, gpus, color=colour, marker=marker)
        axes.annotate(name, (users[-1], gpus[-1]), (8, 4), textcoords="offset points", color=colour)
        for user, gpu, count in points:
            axes.annotate(f"{count}", (user, gpu), (0, -13), textcoords="offset points", fontsize=8)
        said.append(f"{name}: " + ", ".join(f"{u:.0f} and {g:,.0f} at {c} clients" for u, g, c in points))
    axes.set_xlabel("tokens/s for each user")
    axes.set_ylabel("tokens/s for each GPU")
    axes.margins(x=0.25)
    log_axis(axes)
    alt = f"Tokens a second for each user, and for each GPU, on {loads[0]['device']}. " + "; ".join(said)
    return Figure(figure, alt + ".")


def _levels(loads: list[dict], way: str) -> dict[int, list[dict]]:
    """The repeats of each level of a way, by its clients."""
    counts = sorted({row["clients"] for row in loads if row["way"] == way})
    return {n: [row for row in loads if (row["way"], row["clients"]) == (way, n)] for n in counts}


def served(rows: list[dict]) -> Table | Note:
    """The recorded loads as a table: requests a second with their range over the repeats, TTFT and TPOT."""
    loads = [row for row in rows if row.get("what") == "load"]
    if not loads:
        return Note(MISSING)
    table = []
    for way, (_, _, name) in LOOKS.items():
        for clients, level in _levels(loads, way).items():
            rates = [row["requests_per_s"] for row in level]
            waits = [page.ms(median(row[key] for row in level)) for key in ("ttft_s", "tpot_s")]
            spread = f"{min(rates):.1f} to {max(rates):.1f}"
            table.append([name, clients, f"{median(rates):.1f}", spread, *waits])
    columns = ["way", "clients", "requests/s", "range", "TTFT", "TPOT"]
    return Table(columns, table, f"{loads[0]['device']}, recorded")


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
