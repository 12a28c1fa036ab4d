"""Tables of what was measured: speed, records, answers."""

from __future__ import annotations

from collections.abc import Iterable

from helpers.base import page
from helpers.base.page import Table
from helpers.model import ways


def speeds(found) -> Table:
    """A table of ``speed.Speed``, one row a batch size."""
    return Table(
        ["batch", "output tokens", "slowest to fastest run", "TTFT", "TPOT"],
        [
            [
                speed.batch,
                page.measured(f"{speed.output_tokens_per_s:,.1f} tok/s"),
                page.measured(f"{speed.low:,.1f} to {speed.high:,.1f} tok/s"),
                page.measured(page.ms(speed.ttft_s)),
                page.measured(f"{speed.tpot_s * 1e3:,.1f} ms"),
            ]
            for speed in found
        ],
    )


def records(rows: list[dict]) -> Table:
    """Records side by side, one row a scheme and batch size."""
    one_origin(rows)
    return Table(
        ["scheme", "batch", "weights", "output tokens", "TTFT", "perplexity", "runs as"],
        [
            [
                row["scheme"],
                row["batch"],
                page.measured(page.mib(row["weights_bytes"]) if row["weights_bytes"] else "not measured"),
                page.measured(f"{row['output_tokens_per_s']:,.1f} tok/s"),
                page.measured(page.ms(row["ttft_s"])),
                page.measured(f"{row['perplexity']:.2f}" if row["perplexity"] else "not measured"),
                page.measured(row["kernel"]),
            ]
            for row in rows
        ],
    )


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
        rows.append([name, *map(page.measured, texts)])
    return Table(columns, rows)


def recoveries(found: dict) -> Table:
    """A table of ``task.Recovery`` by scheme."""
    columns = ["scheme", "items", "right before", "now", "lost", "gained", "recovery, 95 % interval"]
    return Table(
        columns,
        [
            [
                name,
                seen.items,
                page.measured(f"{seen.baseline:.1%}"),
                page.measured(f"{seen.scheme:.1%}"),
                page.measured(seen.lost),
                page.measured(seen.gained),
                page.measured(f"{seen.ratio:.1%} ({seen.low:.0%} to {seen.high:.0%})"),
            ]
            for name, seen in found.items()
        ],
    )


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
    table = [
        [name, *_against(by_scheme.get(name, {}), by_scheme.get("baseline", {}), batches)]
        for name in names or by_scheme
    ]
    return Table(columns, table)


def _against(found: dict[int, dict], base: dict[int, dict], batches: list[int]) -> list[page.measured]:
    """One scheme's cells of ``side_by_side``; all of them depend on what was measured here."""
    if not found or not base:
        return [page.measured("not measured here")] * (4 + len(batches))
    one, zero = next(iter(found.values())), next(iter(base.values()))
    known = zero["weights_bytes"] and one["weights_bytes"]
    cells = [page.mib(zero["weights_bytes"] - one["weights_bytes"]) if known else "not measured"]
    if ways.expanded(one):  # no kernel reads its format here
        cells[-1] = "none: written out here"
    cells += ["-" if ways.expanded(one) else _ratio(found.get(batch), base.get(batch)) for batch in batches]
    return [page.measured(cell) for cell in [*cells, *_quality(one)]]


def _quality(row: dict) -> list[str]:
    """Mean KL, same top token and recovery of a record."""
    cells = [
        form.format(row[key]) if row.get(key) is not None else "-"
        for key, form in (("kl_mean", "{:.4f} nats"), ("top1", "{:.1%}"))
    ]
    return [*cells, kept(row) if row.get("recovery") is not None else "-"]


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
