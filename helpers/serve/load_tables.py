"""Tables and figures of a server: its settings, what became of requests, its doors, its load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from helpers.base import page
from helpers.base.figure import BOUND, Figure
from helpers.base.page import Table
from helpers.model.schemes import look
from helpers.serve.load import KEEPS, closed, knee, opened, sustained


def settings(found) -> Table:
    """A ``settings.Settings``: every variable, what it means, its default and its value here."""
    fields, facts = type(found).model_fields, found.facts()
    rows = [
        [name.upper(), field.description, _default(field), page.measured(facts[name.upper()] or "-")]
        for name, field in fields.items()
    ]
    return Table(["variable", "meaning", "default", "here"], rows, texts=["meaning"])


def _default(field) -> str:
    if field.default_factory:
        return "generated"
    return "-" if field.default is None else str(field.default)


def outcomes(found: Mapping[str, Mapping[str, int]], plain: Iterable[str] = ()) -> Table:
    """Counts of ``clients.count`` by what was done; ``plain`` names outcomes that are the same everywhere."""
    names = list(next(iter(found.values())))
    rows = [
        [what, *(count[name] if name in plain else page.measured(count[name]) for name in names)]
        for what, count in found.items()
    ]
    return Table(["", *names], rows)


def doors(found) -> Table:
    """``doors.open_doors``: which routes answer without the key."""
    rows = [
        [f"{door.method} {door.path}", "open" if door.open else "asks for the key", door.without_key]
        for door in sorted(found, key=lambda door: (not door.open, door.path, door.method))
    ]
    return Table(["route", "without the key", "status"], rows)


def refusals(found, width: int = 110) -> Table:
    """``doors.refusals``: status and first words of each refusal."""
    rows = [[bad.what, bad.status, _short(bad.text, width)] for bad in found]
    return Table(["bad request", "status", "message"], rows, texts=["message"])


def _short(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 2] + " …"


def levels(found: Mapping[str, list]) -> Table:
    """``load.Level``s by scheme, a row a level; a 95th percentile of too few requests is not shown."""
    columns = ["load", "requests", "offered", "answered", "in time", "goodput", "output, tok/s"]
    columns += [f"{name}, {part}" for name in ("TTFT", "TPOT", "ITL") for part in ("median", "95 %")]
    rows = [
        [f"{scheme}, {_name(level)}", *_figures(level)] for scheme, rows in found.items() for level in rows
    ]
    return Table(columns, rows)


def _name(level) -> str:
    if level.share is None:
        return f"{level.concurrency} client{'s' if level.concurrency > 1 else ''}"
    return f"{level.share:g} of capacity"


def _figures(level) -> list[page.measured]:
    times = (
        (level.ttft_s, level.ttft_p95_s),
        (level.tpot_s, level.tpot_p95_s),
        (level.itl_s, level.itl_p95_s),
    )
    cells = [
        f"{level.completed}",
        f"{level.rate:.2f} /s" if level.rate else "-",
        f"{level.requests_per_s:.2f} /s",
        f"{level.kept:.0%}",
        f"{level.goodput:.2f} /s",
        f"{level.output_tokens_per_s:,.0f}",
    ]
    for median, p95 in times:
        cells += [page.ms(median), page.ms(p95) if level.enough else "-"]
    return [page.measured(cell) for cell in cells]


def load(found: Mapping[str, list], objective) -> Figure:
    """Draw ``load.Level``s by scheme: throughput and waiting of closed loops, what open ones got in time."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4.3), layout="constrained")
    counts, words, limit = set(), [], {"color": BOUND, "linestyle": "--"}
    for place, (scheme, rows) in enumerate(found.items()):
        style = look(scheme) | {"label": scheme}
        clients = [level.concurrency for level in closed(rows)]
        counts.update(clients)
        left.plot(clients, [level.output_tokens_per_s for level in closed(rows)], **style)
        best = knee(rows)
        left.plot(best.concurrency, best.output_tokens_per_s, "o", ms=16, mfc="none", color=limit["color"])
        middle.plot(clients, [level.ttft_s * 1e3 for level in closed(rows)], **style)
        for level in closed(rows):
            if level.enough:  # a bar from the median up; beside the other schemes', not over them
                span = [level.ttft_s * 1e3, level.ttft_p95_s * 1e3]
                middle.plot([level.concurrency * 1.04**place] * 2, span, color=style["color"], lw=1.5)
        rates = [level.rate for level in opened(rows)]
        right.plot(rates, [level.kept * 100 for level in opened(rows)], **style)
        # The line that ends a scheme's range carries its marker, empty.
        most = {"linestyle": ":", "markevery": [1], "mfc": "white"}
        right.plot([sustained(rows)] * 3, [0, 10, 105], **look(scheme) | most)
        words.append(
            f"{scheme}: the knee at {best.concurrency} clients with {best.output_tokens_per_s:,.0f} tok/s, "
            f"{sustained(rows):.2f} requests/s sustained"
        )
    left.set(xlabel="clients at once", ylabel="output tokens per second", title="Throughput (knee circled)")
    middle.axhline(objective.ttft_ms, **limit, label="objective")
    middle.set(xlabel="clients at once", ylabel="TTFT, ms", title="Waiting (bars: up to 95 %)")
    right.axhline(KEEPS * 100, **limit)
    middle.plot([], [], color="#444444", marker="o", mfc="white", linestyle=":", label="what it sustains")
    right.set(xlabel="requests offered per second", ylabel="requests in time, %", ylim=(0, 105))
    right.set_title("Within the objective")
    for axes in (left, middle):
        axes.set_xscale("log")
        axes.set_xticks(sorted(counts), [str(count) for count in sorted(counts)])
        axes.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    alt = (
        "Three panels. Output tokens per second against the clients at once, the knee circled. The time to "
        "the first token, median and up to the 95th percentile, beside its objective. The share of requests "
        "in time against the rate offered, beside the rate that the server sustains. "
    )
    return Figure(figure, alt + str(page.measured("; ".join(words))))
