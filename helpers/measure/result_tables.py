"""Tables of what was measured: speed, records, answers."""

from collections.abc import Iterable

from helpers.base import page
from helpers.base.page import Table
from helpers.model import ways
from helpers.model.schemes import EVERY


def marked(columns: list[str], rows: Iterable[Iterable], plain: int = 1, texts: Iterable[str] = ()) -> Table:
    """A table in which all but the first ``plain`` cells of a row depend on this machine."""
    cells = map(list, rows)
    return Table(columns, ([*row[:plain], *map(page.measured, row[plain:])] for row in cells), texts=texts)


def titled(name: str) -> str:
    """What tables and figures call a scheme; a name of none ("control") stays as it is."""
    return EVERY[name].title if name in EVERY else name


def speeds(found) -> Table:
    """A table of ``speed.Speed``, one row a batch size."""
    rows = []
    for speed in found:
        rates = [f"{speed.output_tokens_per_s:,.1f} tok/s", f"{speed.low:,.1f} to {speed.high:,.1f} tok/s"]
        rows.append([speed.batch, *rates, page.ms(speed.ttft_s), f"{speed.tpot_s * 1e3:,.1f} ms"])
    return marked(["batch", "output tokens", "slowest to fastest run", "TTFT", "TPOT"], rows)


def records(rows: list[dict]) -> Table:
    """Records side by side, one row a scheme and batch size."""
    one_origin(rows)
    table = []
    for row in rows:
        weights = page.mib(row["weights_bytes"]) if row["weights_bytes"] else "not measured"
        perplexity = f"{row['perplexity']:.2f}" if row["perplexity"] else "not measured"
        took = [f"{row['output_tokens_per_s']:,.1f} tok/s", page.ms(row["ttft_s"])]
        table.append([titled(row["scheme"]), row["batch"], weights, *took, perplexity, row["kernel"]])
    columns = ["scheme", "batch", "weights", "output tokens", "TTFT", "perplexity", "runs as"]
    return marked(columns, table, plain=2)


def one_origin(rows: list[dict]) -> None:
    """Refuse to set records of different machines, models or versions side by side unsaid."""
    more = ("weights", "prompt_tokens", "recorded")
    origins = {(row["model"], row["device"], row["vllm"], *(row.get(n) or "" for n in more)) for row in rows}
    if len(origins) > 1:
        named = "; ".join(sorted(" on ".join(origin[:2]) for origin in origins))
        raise ValueError(f"These records are of different models, machines or versions: {named}.")


def qualities(found: dict) -> Table:
    """A table of ``divergence.Quality`` by scheme; None for one that does not run here."""
    columns = ["against the baseline", "perplexity ratio", "mean KL", "99th percentile KL", "same top token"]
    rows = []
    for name, quality in found.items():
        texts = ["does not run here"] * 4
        if quality:
            texts = [f"{quality.perplexity_ratio:.3f}", f"{quality.kl_mean:.4f} nats"]
            texts += [f"{quality.kl_p99:.3f} nats", f"{quality.top1:.1%}"]
        rows.append([titled(name), *texts])
    return marked(columns, rows)


def recoveries(found: dict) -> Table:
    """A table of ``task.Recovery`` by scheme."""
    rows = []
    for name, seen in found.items():
        kept = f"{seen.ratio:.1%} ({seen.low:.0%} to {seen.high:.0%})"
        right = [f"{seen.baseline:.1%}", f"{seen.scheme:.1%}"]
        rows.append([titled(name), seen.items, *right, seen.lost, seen.gained, kept])
    columns = ["scheme", "items", "right before", "now", "lost", "gained", "recovery, 95 % interval"]
    return marked(columns, rows, plain=2)


def side_by_side(rows: list[dict], names: Iterable[str] = ()) -> Table:
    """Records of one machine and model, a row a scheme: bytes, speed at the smallest and the largest batch,
    and answers, against the baseline. In brackets stands what the slowest and the fastest runs of both allow.

    The saving is the difference of two loads: what a loader adds to each cancels. ``names`` are the schemes
    that get a row, also where they were not measured; by default those of the records.
    """
    one_origin(rows)
    batches = sorted({row["batch"] for row in rows})
    batches = batches[:1] + batches[1:][-1:]
    by_scheme: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_scheme.setdefault(row["scheme"], {})[row["batch"]] = row
    columns = ["scheme", "weights saved", *(f"speed at batch {batch}" for batch in batches)]
    columns += ["mean KL", "same top token", "recovery"]
    base = by_scheme.get("baseline", {})
    found = {name: _against(by_scheme.get(name, {}), base, batches) for name in names or by_scheme}
    return marked(columns, ([titled(name), *cells] for name, cells in found.items()))


def _against(found: dict[int, dict], base: dict[int, dict], batches: list[int]) -> list[str]:
    """One scheme's cells of ``side_by_side``."""
    if not found or not base:
        return ["not measured here"] * (4 + len(batches))
    one, zero = next(iter(found.values())), next(iter(base.values()))
    known = zero["weights_bytes"] and one["weights_bytes"]
    cells = [page.mib(zero["weights_bytes"] - one["weights_bytes"]) if known else "not measured"]
    if ways.expanded(one):  # no kernel reads its format here
        cells[-1] = "none: written out here"
    cells += ["-" if ways.expanded(one) else _ratio(found.get(batch), base.get(batch)) for batch in batches]
    cells.append("-" if one.get("kl_mean") is None else f"{one['kl_mean']:.4f} nats")
    cells.append("-" if one.get("top1") is None else f"{one['top1']:.1%}")
    return [*cells, "-" if one.get("recovery") is None else kept(one)]


def kept(row: dict) -> str:
    """A record's recovery in words, with the interval that its items leave, where that is on record."""
    low, high = row.get("recovery_low"), row.get("recovery_high")
    return f"{row['recovery']:.1%}" + (f" ({low:.0%} to {high:.0%})" if low is not None else "")


def _ratio(row: dict | None, base: dict | None) -> str:
    if not row or not base:
        return "not measured"
    ratio = f"x {row['output_tokens_per_s'] / base['output_tokens_per_s']:.2f}"
    if not row.get("low") or not base.get("low") or row["scheme"] == "baseline":
        return ratio
    return f"{ratio} ({row['low'] / base['high']:.2f} to {row['high'] / base['low']:.2f})"
