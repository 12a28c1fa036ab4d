"""Tables of large models deployed in several ways: what they give alone, together, and behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from helpers.base.machine import GIB
from helpers.base.page import Table
from helpers.compare import sizing
from helpers.compare.cost import HOURS_A_DAY, per_million
from helpers.model import sizes


def share_of_bound(row: dict) -> float:
    """A dense model's tokens/s as a share of what reading its weights once a step allows, at that batch."""
    known = sizing.known_models()[row["model"]]
    embedding = 2 * sizes.layout(known.folder).embedding  # rows of it are read
    bound = row["batch"] * row["copy_bandwidth"] / (row["weights_bytes"] - embedding)
    return row["output_tokens_per_s"] / bound


def decoding(rows: list[dict], ways: Sequence[str], batches: Sequence[int] = (1, 8, 64, 256)) -> Table:
    """Tokens/s by batch size after prompts of 16 tokens, and the share of the bandwidth bound at batch 1."""
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        if row["prompt_tokens"] == 16 and row["way"] in ways:
            found.setdefault((row["model"], row["way"]), {})[row["batch"]] = row
    lines = []
    for (model, way), of in found.items():
        rates = [f"{of[batch]['output_tokens_per_s']:,.0f}" if batch in of else "-" for batch in batches]
        weights = f"{of[batches[0]]['weights_bytes'] / GIB:.1f} GiB"
        lines.append([f"{model}, {way}", weights, *rates, f"{share_of_bound(of[1]):.0%}"])
    heads = [f"{batches[0]} request", *(f"{batch}" for batch in batches[1:])]
    return Table(["model, way", "weights", *heads, "of the bound"], lines)


def long_contexts(rows: list[dict], without: str, with_: str) -> Table:
    """What an FP8 cache gives by context and batch: tokens/s with it as a multiple of without."""
    rates = {
        (row["model"], row["prompt_tokens"], row["batch"], row["way"]): row["output_tokens_per_s"]
        for row in rows
    }
    lines = [
        [model, f"{prompt:,}", batch, f"{rate:,.0f}", f"{rates[model, prompt, batch, with_] / rate:.2f}"]
        for (model, prompt, batch, way), rate in rates.items()
        if way == without and batch > 1 and (model, prompt, batch, with_) in rates
    ]
    return Table(["model", "prompt", "requests", f"tok/s, {without}", f"{with_}: times"], lines)


def served(rows: list[dict], price_per_day: float, objective: str = "prompt") -> Table:
    """Open loops under an objective: what was asked, kept and paid for a million tokens of those kept."""
    lines = []
    for row in rows:
        if "rate" not in row:
            continue
        tokens = row["goodput"][objective] * row["output_tokens"]
        dollars = f"${per_million(price_per_day / HOURS_A_DAY, tokens):.2f}" if tokens else "-"
        times = (f"{row[name]['p95_ms']:.0f} ms" for name in ("ttft", "tpot"))
        kept = f"{row['kept'][objective]:.0%}"
        lines.append([row["way"], f"{row['rate']:.1f} requests/s", *times, kept, dollars])
    heads = ["way", "asked", "TTFT, 95 %", "TPOT, 95 %", "kept", "a million tokens"]
    return Table(heads, lines)
