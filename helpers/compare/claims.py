"""The ledger: each claim of the log this tutorial was created from, its evidence, and a verdict.

The claims are data (``claims.toml``). Speeds and answers are held against records, so that a verdict changes
when they do; what is arithmetic on the log's own figures gets none.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.base import page, records
from helpers.base.machine import GIB
from helpers.base.page import Table
from helpers.compare import cards, published, roofline, sizing
from helpers.compare.roofline import SAME, Times
from helpers.measure import result_tables
from helpers.model import shapes, sizes
from helpers.model.model import Model
from helpers.model.schemes import SCHEMES

HOLDS, PARTLY, FALSE, OPEN, NONE = VERDICTS = "holds", "partly", "false", "not measured", "no verdict"


@dataclass(frozen=True)
class Claim:
    """A claim word for word, and the section it stands in (of a table, the row and column too).

    Without a ``check`` it has its ``verdict``; ``scheme`` and the ``claimed`` gain are what a check is of.
    """

    said: str
    where: str
    evidence: str = ""
    verdict: str = OPEN
    check: str = ""
    scheme: str = ""
    claimed: float = 0.0


CLAIMS = tuple(
    Claim(**one)
    for one in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["claim"]
)


def findings(model: Model, rows: list[dict], others: list[dict]) -> dict[Claim, Claim]:
    """Return each claim with the evidence and the verdict that it has now; the order is the log's.

    Args:
        rows: the model's records on this machine; ``others`` are of other machines or cited.
    """
    checks = {"accuracy": _accuracy, "speed": _speed, "always": _always}
    found = {claim: claim for claim in CLAIMS}
    for claim in CLAIMS:
        if claim.check:
            evidence, verdict = checks[claim.check](claim, model, rows + others)
            found[claim] = replace(claim, evidence=evidence, verdict=verdict)
    return found


def _gains(rows: list[dict], scheme: str) -> Iterator[tuple[str, tuple, Times]]:
    """Model and device, case (an origin at a batch size) and a scheme's throughput beside the baseline's."""
    for origin, its in records.by_origin(rows).items():
        for batch, one in roofline.ranges(its, scheme).items():
            yield f"{its[0]['model']} on {its[0]['device']}", (origin, batch), one


def _speed(claim: Claim, _model: Model, rows: list[dict]) -> tuple[str, str]:
    """Whether gains, measured or published, reach a claimed one.

    What saves nine tenths of the time that is claimed to be saved is too close to count for either side, so
    that a percent more or less turns no verdict into its opposite.
    """
    places: dict[str, list[float]] = {}
    for place, _, one in _gains(rows, claim.scheme):
        places.setdefault(place, []).append(one.ratio)
    if not places:
        return f"No record of {claim.scheme} running as itself", OPEN
    for line in published.figures()["speed"]:
        if line["scheme"] == claim.scheme and "shape" in line:
            places[f"published, {line['model']} on {line['card']}"] = [line["ratio"]]
    spreads = []
    for place, ratios in places.items():
        ends = dict.fromkeys(f"{pick(ratios):.2f}" for pick in (min, max))
        spreads.append(f"{place} {' to '.join(ends)}")
    every = [ratio for ratios in places.values() for ratio in ratios]
    short = [1 - 1 / ratio < (1 - 2 * SAME) * (1 - 1 / claim.claimed) for ratio in every]
    reached = max(every) >= claim.claimed and not any(short)
    text = f"{claim.evidence}, baseline = 1: {'; '.join(spreads)}"
    return text, HOLDS if reached else FALSE if all(short) else PARTLY


def _always(_claim: Claim, _model: Model, rows: list[dict]) -> tuple[str, str]:
    """In how many cases weights of fewer bits were faster than 16, beyond what the runs differ by."""
    best: dict[tuple, Times] = {}
    for name, scheme in SCHEMES.items():
        for _, case, one in _gains(rows, name) if scheme.weight_bits < 16 else ():
            best[case] = max(one, best.get(case, one), key=lambda gain: (gain.side, gain.ratio))
    if not best:
        return "No quantized weights were measured beside a baseline", OPEN
    sides = [one.side for one in best.values()]
    won, lost, level = sides.count(1), sides.count(-1), sides.count(0)
    text = (
        f"The fastest of the formats measured beat 16 bits in {won} of {len(best)} cases (machine, model, "
        f"batch), was slower in {lost}, within {SAME:.0%} or their runs in {level}. "
        "Of answers that says nothing"
    )
    return text, HOLDS if won == len(best) else FALSE if lost == len(best) else PARTLY


def _accuracy(claim: Claim, model: Model, rows: list[dict]) -> tuple[str, str]:
    """Whether a record of this model, here or elsewhere, says that answers are lost."""
    rows = [row for row in rows if row["scheme"] in ("fp8", "fp8_file") and row.get("recovery")]
    rows = [row for row in rows if row["model"] == model.title]
    kept = dict.fromkeys(f"{result_tables.kept(row)} on {row['device']}" for row in rows)
    if not kept:
        return f"{claim.evidence}. Not measured here", OPEN
    size = sizes.layout(model.folder).total
    text = f"{claim.evidence}. Kept by a model of {size / 1e6:,.0f}M weights: {'; '.join(kept)}"
    lost = any(row.get("recovery_high", row["recovery"] + SAME) < 1 for row in rows)
    return text, PARTLY if lost else HOLDS


def table(found: dict[Claim, Claim], *sections: str) -> Table:
    """The ledger as a table, of claims whose place begins with one of ``sections`` (all without any).

    What this machine's records decide is marked as measured.
    """
    rows = []
    for claim, finding in found.items():
        if not claim.where.startswith(sections or ""):
            continue
        cells = [finding.verdict, finding.evidence]
        rows.append([claim.said, claim.where, *(map(page.measured, cells) if claim.check else cells)])
    columns = ["you may have read", "in the log's", "verdict", "evidence"]
    return Table(columns, rows, texts=columns)


def figures_of_the_log(row: dict) -> Table:
    """Set the cited record's three figures beside Phi-2's config and an L4's data sheet, step by step."""
    phi, card = shapes.shape("phi-2"), cards.card("L4")
    work, [found] = roofline.step(phi, "baseline"), sizing.reconcile([row], {row["model"]: phi})
    moved, rate = work.weights * row["output_tokens_per_s"], row["output_tokens_per_s"]
    memory, share, size = row["memory_bytes"], row["utilization"], row["predicted_weights_bytes"]
    layers, heads = phi.config["num_hidden_layers"], phi.config["num_attention_heads"]
    values = phi.config["hidden_size"] // heads
    return page.facts(
        {
            "Weights by the config": f"{size / 1e9:.4f} GB = {size / GIB:.4f} GiB",
            "Weights in the log": f"{row['weights_bytes'] / GIB:.4f} GB, which must be GiB",
            "Read for a token (without the embedding table)": f"{work.weights / 1e9:.2f} GB",
            "At the log's tokens/s": f"{rate} x {work.weights / 1e9:.2f} GB = {moved / 1e9:.0f} GB/s",
            "Of an L4's bandwidth": f"{moved / card.bandwidth:.0%} of {card.bandwidth / 1e9:.0f} GB/s",
            "KV cache, a token": f"2 x {layers} x {heads} x {values} x 2 = {found.token:,} bytes",
            "KV cache in the log": f"{row['kv_cache_tokens']:,} tokens = {found.cache / GIB:.2f} GiB",
            "Weights and KV cache": f"{(row['weights_bytes'] + found.cache) / GIB:.2f} GiB",
            "vLLM's share": f"{share} x {memory / GIB:.2f} GiB = {share * memory / GIB:.2f} GiB",
            "Left for context, activations, CUDA graphs": f"{found.rest / GIB:.2f} GiB",
        }
    )
