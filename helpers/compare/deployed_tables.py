"""Tables of large models deployed in several ways: what they give alone, together, and behind HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from helpers.base.machine import GIB
from helpers.base.page import Table
from helpers.compare import recorded, sizing
from helpers.compare.cost import HOURS_A_DAY, per_million
from helpers.model import sizes
from helpers.serve.load import KEEPS


def share_of_bound(row: dict) -> float:
    """A dense model's tokens/s as a share of what reading its weights once a step allows, at that batch."""
    return recorded.reading_us(row) * row["output_tokens_per_s"] / row["batch"] / 1e6


def decoding(rows: list[dict], ways: Sequence[str], batches: Sequence[int] = (1, 8, 64, 256)) -> Table:
    """Tokens/s by batch size after prompts of 16 tokens, and the share of the bandwidth bound at batch 1.

    A mixture of experts has no such share: how many experts a batch reads is not on record.
    """
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        if row["prompt_tokens"] == 16 and row["way"] in ways:
            found.setdefault((row["model"], row["way"]), {})[row["batch"]] = row
    lines = []
    models = dict.fromkeys(model for model, _ in found)
    for model, way in (pair for pair in itertools.product(models, ways) if pair in found):
        of = found[model, way]
        experts = sizes.layout(sizing.known_models()[model].folder).experts
        rates = [f"{of[batch]['output_tokens_per_s']:,.0f}" if batch in of else "-" for batch in batches]
        weights = f"{of[batches[0]]['weights_bytes'] / GIB:.1f} GiB"
        lines.append([f"{model}, {way}", weights, *rates, "-" if experts else f"{share_of_bound(of[1]):.0%}"])
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


def reading(rows: list[dict], model: str, batch: int = 64, prompt: int = 1024) -> Table:
    """How fast each way read so many prompts at once: tokens/s until all had a first token, 16 bits = 1."""
    found = {
        row["way"]: batch * prompt / row["all_first_tokens_s"]
        for row in rows
        if (row["model"], row["batch"], row["prompt_tokens"]) == (model, batch, prompt)
        and "FP8 cache" not in row["way"]
    }
    lines = [[way, f"{rate:,.0f}", f"{rate / found['bf16']:.2f}"] for way, rate in found.items()]
    return Table([f"{model}, {batch} x {prompt:,} tokens", "tokens/s read", "bf16 = 1"], lines)


def served(rows: list[dict], price_per_day: float, objective: str = "prompt") -> Table:
    """Open loops under an objective: each way's highest rate that kept it, and the next that was tried.

    Dollars are of the rate that came and the share that was kept: until the last answer is there passes more
    time than requests come in.
    """
    loads: dict[tuple[str, str, str], list[dict]] = {}
    for row in sorted((row for row in rows if "rate" in row), key=lambda row: row["rate"]):
        loads.setdefault((row["model"], row["way"], row.get("measured_at", "")), []).append(row)
    lines = []
    for (model, way, _), of in sorted(
        loads.items(), key=lambda item: (item[0][0], _best(item[1], objective))
    ):
        kept = _best(of, objective)
        more = [row for row in of if row["rate"] > kept]
        next_ = f"{more[0]['rate']:.1f} ({more[0]['kept'][objective]:.0%})" if more else "-"
        if not kept:
            lines.append([f"{model}, {way}", "-", next_, "-", "-", "-"])
            continue
        row = next(row for row in of if row["rate"] == kept)
        tokens = row["rate"] * row["kept"][objective] * row["output_tokens"]
        dollars = f"${per_million(price_per_day / HOURS_A_DAY, tokens):.2f}"
        times = [f"{row[name]['p95_ms']:.0f} ms" for name in ("ttft", "tpot")]
        lines.append([f"{model}, {way}", f"{row['rate']:.1f}", next_, *times, dollars])
    heads = [
        "model, way",
        "requests/s kept",
        "next tried (kept)",
        "TTFT, 95 %",
        "TPOT, 95 %",
        "a million written",
    ]
    return Table(heads, lines)


def _best(of: list[dict], objective: str) -> float:
    """The highest rate that kept an objective, below the best that was ever answered, where a queue grows for
    as long as the load lasts; 0 if none did."""
    return max(
        (row["rate"] for row in of if row["share"] < 1 and row["kept"][objective] >= KEEPS), default=0.0
    )
