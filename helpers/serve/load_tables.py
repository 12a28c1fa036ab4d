"""Tables and figures of a server: what became of requests, what it refused, its load."""

from collections.abc import Iterable, Mapping

from helpers.base import page
from helpers.base.figure import Figure, panels
from helpers.base.page import Table
from helpers.model import schemes
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
    lines = [" ".join(bad.text.split()) for bad in found]
    short = [line if len(line) <= width else line[: width - 2] + " …" for line in lines]
    rows = [[bad.what, bad.status, text] for bad, text in zip(found, short, strict=True)]
    return Table(["bad request", "status", "message"], rows, texts=["message"])


def levels(found: Mapping[str, list]) -> Table:
    """``load.Level``s by scheme, a row a level; the records have every percentile."""
    columns = ["load", "requests", "answered", "in time", "output", "TTFT, median", "TPOT, median"]
    return Table(columns, [_row(scheme, level) for scheme, rows in found.items() for level in rows])


def _row(scheme: str, level) -> list:
    clients = f"{level.concurrency} client{'s' if level.concurrency != 1 else ''}"
    cells = [
        f"{level.completed}" + (f" of {level.completed + level.failed}" if level.failed else ""),
        f"{level.requests_per_s:.2f} /s" + (f" of {level.rate:.2f}" if level.rate else ""),
        f"{level.kept:.0%}",
        f"{level.output_tokens_per_s:,.0f} tok/s",
        page.ms(level.ttft_s),
        page.ms(level.tpot_s),
    ]
    what = clients if level.share is None else f"{level.share:g} of the best"
    return [f"{schemes.scheme(scheme).title}, {what}", *map(page.measured, cells)]


def load(rows: list) -> Figure:
    """Draw the closed loops of ``load.Level``s: what more clients at once give, and wait."""
    figure, [[left, right]] = panels(2, (9, 3.8))
    loops = closed(rows)
    counts = [level.concurrency for level in loops]
    left.plot(counts, [level.output_tokens_per_s for level in loops], **look("baseline"))
    left.set(title="Everybody together", ylabel="output tokens per second")
    right.plot(counts, [level.ttft_s * 1e3 for level in loops], **look("baseline"))
    right.set(title="One user waits", ylabel="TTFT, ms")
    for axes in (left, right):
        axes.set(xticks=counts, xlim=(0, None), ylim=(0, None), xlabel="clients at once")
        axes.grid(alpha=0.3)
    words = "; ".join(
        f"{row.output_tokens_per_s:,.0f} tok/s and {row.ttft_s * 1e3:,.0f} ms for {row.concurrency}"
        for row in (loops[0], loops[-1])
    )
    alt = (
        "Left, output tokens per second of all clients together against how many there are; right, the "
        "median time to the first token. "
    )
    return Figure(figure, alt + str(page.measured(words)))
