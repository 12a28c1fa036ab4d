"""Tables and figures of a server: what became of requests, what it refused, its load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from helpers.base import page
from helpers.base.figure import BOUND, Figure, name_ends, panels
from helpers.base.page import Table
from helpers.model.schemes import look
from helpers.serve.load import closed


def outcomes(found: Mapping[str, Mapping[str, int]], plain: Iterable[str] = ()) -> Table:
    """Counts of ``clients.count`` by what was done; ``plain`` names outcomes that are the same everywhere."""
    names = list(next(iter(found.values())))
    rows = [
        [what, *(count[name] if name in plain else page.measured(count[name]) for name in names)]
        for what, count in found.items()
    ]
    return Table(["", *names], rows)


def refusals(found, width: int = 110) -> Table:
    """``doors.refusals``: status and first words of each refusal."""
    rows = [[bad.what, bad.status, _short(bad.text, width)] for bad in found]
    return Table(["bad request", "status", "message"], rows, texts=["message"])


def _short(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 2] + " …"


def levels(found: Mapping[str, list]) -> Table:
    """``load.Level``s by scheme, a row a level; the records have every percentile."""
    columns = ["load", "requests", "answered", "in time", "output", "TTFT, median", "TPOT, median"]
    rows = [
        [f"{scheme}, {_name(level)}", *_figures(level)] for scheme, rows in found.items() for level in rows
    ]
    return Table(columns, rows)


def _name(level) -> str:
    if level.share is None:
        return f"{level.concurrency} client{'s' if level.concurrency > 1 else ''}"
    return f"{level.share:g} of the best"


def _figures(level) -> list[page.measured]:
    cells = [
        f"{level.completed}" + (f" of {level.completed + level.failed}" if level.failed else ""),
        f"{level.requests_per_s:.2f} /s" + (f" of {level.rate:.2f}" if level.rate else ""),
        f"{level.kept:.0%}",
        f"{level.output_tokens_per_s:,.0f} tok/s",
        page.ms(level.ttft_s),
        page.ms(level.tpot_s),
    ]
    return [page.measured(cell) for cell in cells]


def load(found: Mapping[str, list], objective) -> Figure:
    """Draw the closed loops of ``load.Level``s by scheme: what more clients at once give, and wait."""
    figure, [[left, right]] = panels(2, (9, 3.8))
    limit = {"color": BOUND, "linestyle": "--"}
    right.axhline(objective.ttft_ms, **limit)
    words = []
    for scheme, rows in found.items():
        style, clients = look(scheme), [level.concurrency for level in closed(rows)]
        left.plot(clients, [level.output_tokens_per_s for level in closed(rows)], **style)
        right.plot(clients, [level.ttft_s * 1e3 for level in closed(rows)], **style)
        first, *_, last = [closed(rows)[0], *closed(rows)]
        words.append(
            f"{scheme}: {first.output_tokens_per_s:,.0f} tok/s and {first.ttft_s * 1e3:,.0f} ms for "
            f"{first.concurrency}, {last.output_tokens_per_s:,.0f} tok/s and {last.ttft_s * 1e3:,.0f} ms for "
            f"{last.concurrency}"
        )
    left.set(title="Everybody together", ylabel="output tokens per second", ylim=(0, None))
    right.set(title="One user waits", ylabel="TTFT, ms", ylim=(0, None))
    counts = sorted({level.concurrency for rows in found.values() for level in closed(rows)})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("clients at once")
        axes.grid(alpha=0.3)
    for axes, pick in (
        (left, lambda level: level.output_tokens_per_s),
        (right, lambda level: level.ttft_s * 1e3),
    ):
        ends = {
            scheme: (closed(rows)[-1].concurrency, pick(closed(rows)[-1]), look(scheme)["color"])
            for scheme, rows in found.items()
        }
        more = {"objective": (counts[-1], objective.ttft_ms, limit["color"])} if axes is right else {}
        name_ends(axes, ends | more)
    alt = (
        "Left, output tokens per second of all clients together against how many there are; right, the "
        "median time to the first token, beside the dashed objective. "
    )
    return Figure(figure, alt + str(page.measured("; ".join(words))))
