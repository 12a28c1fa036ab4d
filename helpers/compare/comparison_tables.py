"""Tables for readers. Nothing here measures, and nothing here knows how numbers were got.

What depends on the machine is wrapped in ``measured``, so that readers can tell it from what is computed
and the same everywhere; the notebook tests compare everything outside the marks.
"""

from collections.abc import Iterable, Mapping

from helpers.base import page
from helpers.base.page import Table
from helpers.compare import roofline
from helpers.measure.result_tables import marked, titled
from helpers.model import schemes
from helpers.model.schemes import SCHEMES


def ways(found: Mapping[str, object]) -> Table:
    """How this machine runs each scheme, and why: ``schemes.Way`` by the scheme's title."""
    rows = [[title, way.name, way.why] for title, way in found.items()]
    return marked(["scheme", "runs here as", "because"], rows, texts=["runs here as", "because"])


def predictions(sizes: Mapping[str, int]) -> Table:
    """Predicted bytes of weights by the scheme's title, the first one being the yardstick."""
    base = next(iter(sizes.values()))
    rows = [[title, page.mib(size), f"{base / size:.2f} times"] for title, size in sizes.items()]
    return Table(["scheme", "weights, predicted", "smaller"], rows)


def errors(found: Mapping[str, Mapping[str, float]]) -> Table:
    """Relative rounding errors: rows by format, columns by who shares a scale."""
    columns = list(next(iter(found.values())))
    rows = [[form, *(f"{cells[column]:.1%}" for column in columns)] for form, cells in found.items()]
    return Table(["rounding error", *columns], rows)


def paths(found: Mapping[str, Mapping[str, str]], here: str | None) -> Table:
    """How each hardware generation runs each scheme (``cards.paths``), the row of this machine marked."""
    names = list(next(iter(found.values())))
    rows = [
        [title, page.measured("this machine" if title == here else ""), *(ways[name] for name in names)]
        for title, ways in found.items()
    ]
    titles = [schemes.scheme(name).title for name in names]
    return Table(["hardware", "", *titles], rows, texts=["", *titles])


def reconciled(found: Iterable) -> Table:
    """``sizing.reconcile``: what vLLM reported beside the config's bytes, of recorded machines."""
    rows = []
    for one in found:
        row = one.row
        name = f"{row['model']} on {row['device']}"
        if row.get("memory_bytes") and row.get("device_bytes"):
            name += f", given {page.mib(row['memory_bytes'])}"
        besides = row.get("kv_cache_dtype") == "fp8" and row["scheme"] != "fp8_kv"
        cells = [name, titled(row["scheme"]) + (" and FP8 KV cache" if besides else "")]
        cells += [f"{one.predicted:,}", f"{row['kv_cache_tokens']:,}"]
        off = f"{row['kv_cache_tokens'] / one.predicted - 1:+.1%}"
        rows.append([*cells, off, f"{one.rest / 2**30:.2f} GiB"])
    columns = ["record", "scheme", "tokens, predicted", "reported by vLLM", "off by", "left over"]
    return Table(columns, rows)


def sides(rows: list[dict], names: Iterable[str]) -> Table:
    """At which batch sizes each scheme was faster than the baseline, as fast as far as the runs tell, and
    slower. Records of one machine."""
    table = []
    for name in names:
        found = roofline.ranges(rows, name)
        cells = ["no kernel timed here"] * 3
        if found:
            kinds = ([str(batch) for batch, one in found.items() if one.side == of] for of in (1, 0, -1))
            cells = [", ".join(batches) or "none" for batches in kinds]
        table.append([titled(name), *cells])
    return marked(["scheme", "faster at batch", "as fast at", "slower at"], table)


def offers(found: Iterable) -> Table:
    """``cost.Offer``: what serves a load, the cheapest first, and why the others do not."""
    columns = ["scheme", "GPUs", "requests at once in one", "tokens/s of one, at most", "used", "a day"]
    columns.append("a million, at this load")
    rows = []
    for offer in found:
        cells = [f"none: {offer.why_not}", *["-"] * 5]
        if not offer.why_not:
            cells = [f"{offer.count} x {offer.card}", offer.batch]
            cells += [f"{offer.tokens_per_s:,.0f}", f"{offer.used:.0%}"]
            cells += [f"${offer.per_day:,.2f}", f"${offer.per_million:,.2f}"]
        rows.append([offer.title, *cells])
    return Table(columns, rows)


def advice(found) -> Table:
    """``cost.Recommended``: the scheme to deploy and what spoke against each of the others.

    A row a scheme, in one order, so that the table has the same shape on every machine.
    """
    rows = []
    for name in SCHEMES:
        why = found.why if name == found.scheme else found.against.get(name, "not measured here")
        rows.append([titled(name), "deploy" if name == found.scheme else "-", why])
    return marked(["scheme", "", "because"], rows, texts=["", "because"])
