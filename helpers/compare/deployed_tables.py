"""Tables of large models deployed in several ways: what they give alone, together, and behind HTTP."""

import itertools
from collections.abc import Sequence

from helpers.base.machine import GIB
from helpers.base.page import Table
from helpers.compare import recorded, sizing
from helpers.compare.cost import HOURS_A_DAY, per_million
from helpers.model import sizes
from helpers.serve.load import KEEPS

BATCHES = (1, 8, 64, 256)


def decoding(rows: list[dict], ways: Sequence[str]) -> Table:
    """Tokens/s by batch size after prompts of 16 tokens, and the share of the bandwidth bound at batch 1.

    A mixture of experts has no such share: how many experts a batch reads is not on record.
    """
    found = recorded.decoded(rows)
    lines = []
    for model, way in itertools.product(dict.fromkeys(row["model"] for row in rows), ways):
        if of := found.get((model, way, 1)):
            experts = sizes.layout(sizing.known_models()[model].folder).experts
            rates = [f"{of[batch]['output_tokens_per_s']:,.0f}" if batch in of else "-" for batch in BATCHES]
            bound = "-" if experts else f"{recorded.share_of_bound(of[1]):.0%}"
            lines.append([f"{model}, {way}", f"{of[1]['weights_bytes'] / GIB:.1f} GiB", *rates, bound])
    heads = [f"{batch} request" if batch == 1 else str(batch) for batch in BATCHES]
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


def reading(rows: list[dict], model: str) -> Table:
    """How fast each way read 64 prompts at once: tokens/s until all had a first token, 16 bits = 1."""
    load = (model, 64, 1024)
    found = {
        row["way"]: 64 * 1024 / row["all_first_tokens_s"]
        for row in rows
        if (row["model"], row["batch"], row["prompt_tokens"]) == load and "FP8 cache" not in row["way"]
    }
    lines = [[way, f"{rate:,.0f}", f"{rate / found['bf16']:.2f}"] for way, rate in found.items()]
    return Table([f"{model}, 64 x 1,024 tokens", "tokens/s read", "bf16 = 1"], lines)


def served(rows: list[dict], price_per_day: float) -> Table:
    """Open loops under the recorded objective, ``prompt`` answers: each way's highest rate that kept it, and
    the next that was tried.

    Dollars are of the rate that came and the share that was kept: until the last answer is there passes more
    time than requests come in.
    """
    loads: dict[tuple[str, str, str], list[dict]] = {}
    for row in sorted((row for row in rows if "rate" in row), key=lambda row: row["rate"]):
        loads.setdefault((row["model"], row["way"], row.get("measured_at", "")), []).append(row)
    lines = []
    for (model, way, _), of in loads.items():
        # Below the best that was ever answered: from there a queue grows for as long as the load lasts.
        kept = [row for row in of if row["share"] < 1 and row["kept"]["prompt"] >= KEEPS]
        best = kept[-1] if kept else None  # rates climb
        more = [row for row in of if row["rate"] > (best["rate"] if best else 0)]
        next_ = f"{more[0]['rate']:.1f} ({more[0]['kept']['prompt']:.0%})" if more else "-"
        cells = ["-", next_, "-", "-", "-"]
        if best:
            tokens = best["rate"] * best["kept"]["prompt"] * best["output_tokens"]
            times = [f"{best[name]['p95_ms']:.0f} ms" for name in ("ttft", "tpot")]
            dollars = f"${per_million(price_per_day / HOURS_A_DAY, tokens):.2f}"
            cells = [f"{best['rate']:.1f}", next_, *times, dollars]
        lines.append((model, best["rate"] if best else 0, [f"{model}, {way}", *cells]))
    heads = ["model, way", "requests/s kept", "next tried (kept)"]
    heads += ["TTFT, 95 %", "TPOT, 95 %", "a million written"]
    return Table(heads, [cells for _, _, cells in sorted(lines, key=lambda line: line[:2])])
