"""The ledger: each claim of the log this tutorial was created from, its evidence, and a verdict.

A verdict is computed from records, configs, data sheets and vLLM's source, so it changes when they do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.base import page, records
from helpers.base.machine import GIB, Machine
from helpers.base.page import Table
from helpers.compare import cards, roofline, sizing
from helpers.compare.cost import DAYS_A_MONTH
from helpers.compare.sizing import Budget
from helpers.measure import result_tables
from helpers.model import schemes, shapes, sizes
from helpers.model.model import Model
from helpers.model.schemes import AWQ, FP8, SCHEMES, SchemeError
from helpers.model.sizes import GROUP_SIZES

HOLDS, PARTLY, FALSE, OPEN = VERDICTS = "holds", "partly", "false", "not measured"

NEAR = 0.05  # a figure this close to a claimed one counts as that


@dataclass(frozen=True)
class Evidence:
    """What the claims are held against: this machine and its records, those of others, and models.

    ``rows`` are the chosen model's on this machine; ``others`` are of other machines or cited.
    """

    machine: Machine
    model: Model
    rows: list[dict]
    others: list[dict]

    @property
    def models(self) -> dict[str, Model]:
        """Every model whose config is at hand, by title."""
        return sizing.known_models(self.model)

    def smaller(self, scheme: str) -> dict[str, float]:
        """By model: how many times smaller the weights get, from the config."""
        size = sizes.predicted_weights_bytes
        return {t: size("baseline", m.folder) / size(scheme, m.folder) for t, m in self.models.items()}

    def faster(self, scheme: str) -> dict[str, list[float]]:
        """A scheme's throughput by device, the baseline's as 1: every model and batch on record."""
        found: dict[str, list[float]] = {}
        for device, _, ratio in self._ratios(scheme):
            found.setdefault(device, []).append(ratio)
        return found

    def baseline_wins(self) -> tuple[int, int]:
        """In how many measured cases no quantized weights were faster than 16 bits, and of how many.

        Faster is more than ``roofline.SAME`` beyond: less than that two runs differ by.
        """
        best: dict[tuple, float] = {}
        for name, scheme in SCHEMES.items():
            for _, case, ratio in self._ratios(name) if scheme.weight_bits < 16 else ():
                best[case] = max(ratio, best.get(case, 0))
        return sum(ratio <= 1 + roofline.SAME for ratio in best.values()), len(best)

    def _ratios(self, scheme: str) -> Iterator[tuple[str, tuple, float]]:
        """Device, case (an origin at a batch size) and ratio."""
        for origin, rows in records.by_origin(self.rows + self.others).items():
            for batch, ratio in roofline.ratios(rows, scheme).items():
                yield rows[0]["device"], (origin, batch), ratio

    def cited(self) -> dict | None:
        """The first record that was cited from the log itself."""
        return next((row for row in self.others if row.get("cited")), None)


@dataclass(frozen=True)
class Finding:
    """The evidence in words, the verdict, and whether this machine's measurements are part of it."""

    evidence: str
    verdict: str
    measured: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim as the log words it, the section it stands in, and how it is checked."""

    said: str
    where: str
    check: Callable[[Evidence], Finding]


def _spread(values: Iterable[float], form: str = "{:.2f}") -> str:
    values = list(values)
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _by_device(found: dict[str, list[float]]) -> str:
    return "; ".join(f"{_spread(ratios)} on {device}" for device, ratios in found.items())


def _near(value: float, claimed: float) -> bool:
    return abs(value / claimed - 1) <= NEAR


def _compression(scheme: str, claimed: float) -> Callable[[Evidence], Finding]:
    def check(seen: Evidence) -> Finding:
        whole = seen.smaller(scheme)
        rule = schemes.scheme(scheme)
        group = GROUP_SIZES[0]
        matrix = 16 / (rule.weight_bits + 8 * rule.group_bytes / group)
        groups = f", groups of {group}," if rule.group_bytes else ""
        text = (
            f"One matrix{groups} {matrix:.2f} times; whole models {_spread(whole.values())}, by their configs"
        )
        if all(_near(factor, claimed) for factor in whole.values()):
            return Finding(text, HOLDS)
        return Finding(text, PARTLY if _near(matrix, claimed) else FALSE)

    return check


def _fp8_hardware(seen: Evidence) -> Finding:
    found = {name: FP8.way(cards.card(name).machine) for name in ("L4", "A100 80GB", "H100 SXM", "T4")}
    text = "; ".join(f"{name}: {way.name}" for name, way in found.items())
    eight = [way.arithmetic_bits == 8 for name, way in found.items() if name != "T4"]
    return Finding(text, HOLDS if all(eight) else PARTLY if any(eight) else FALSE)


def _w4_hardware(seen: Evidence) -> Finding:
    volta = Machine("cuda", "V100", 0, sm=7.0)
    way = AWQ.way(cards.card("T4").machine)
    try:
        AWQ.way(volta)
    except SchemeError as error:
        return Finding(f"{error} There: {way.why} ({way.source})", FALSE)
    return Finding(way.why, PARTLY)


def _speed(scheme: str, claimed: float, what: str) -> Callable[[Evidence], Finding]:
    def check(seen: Evidence) -> Finding:
        found = seen.faster(scheme)
        if not found:
            return Finding(f"No record of {scheme} running as itself", OPEN, measured=True)
        text = f"{what}, baseline = 1: {_by_device(found)}"
        enough = [ratio >= claimed * (1 - NEAR) for ratios in found.values() for ratio in ratios]
        return Finding(text, HOLDS if all(enough) else PARTLY if any(enough) else FALSE, measured=True)

    return check


def _baseline_only(seen: Evidence) -> Finding:
    wins, cases = seen.baseline_wins()
    if not cases:
        return Finding("No quantized scheme was measured beside a baseline", OPEN, measured=True)
    text = f"Nothing was faster than 16 bits in {wins} of {cases} measured cases (machine, model, batch)"
    return Finding(text, FALSE if wins == cases else PARTLY if wins else HOLDS, measured=True)


def _prequantized(seen: Evidence) -> Finding:
    made = [row for row in seen.rows if row["scheme"] == "awq"]
    if not made:
        return Finding("No AWQ checkpoint was tried here yet: run 03_awq", OPEN, measured=True)
    text = "It needs a checkpoint, which vLLM does not make while loading, but no hub: one was made here"
    return Finding(text, PARTLY, True)


def _weights(seen: Evidence) -> Finding:
    row, size = seen.cited(), sizes.predicted_weights_bytes("baseline", shapes.shape("phi-2").folder)
    if row is None:
        return Finding("The cited record is missing", OPEN)
    text = f"Phi-2's config gives {size / GIB:.2f} GiB ({size / 1e9:.2f} GB): what the log calls GB is GiB"
    return Finding(text, HOLDS if _near(row["weights_bytes"], size) else FALSE)


def _rate(seen: Evidence) -> Finding:
    row = seen.cited()
    if row is None:
        return Finding("The cited record is missing", OPEN)
    work, card = roofline.step(shapes.shape("phi-2"), "baseline"), cards.card("L4")
    moved = work.weights * row["output_tokens_per_s"]
    share = moved / card.bandwidth
    text = f"{moved / 1e9:.0f} GB/s of weights read, {share:.0%} of an L4's {card.bandwidth / 1e9:.0f} GB/s"
    return Finding(text, HOLDS if share <= 1 else FALSE)


def _blocks(seen: Evidence) -> Finding:
    row = seen.cited()
    if row is None:
        return Finding("The cited record is missing", OPEN)
    found = sizing.reconcile([row], {row["model"]: shapes.shape("phi-2")})[0]
    text = f"{row['kv_cache_tokens']:,} tokens x {found.token:,} bytes are {found.cache / GIB:.2f} GiB; with "
    text += f"the weights that leaves {found.rest / GIB:.2f} GiB of 0.9 x {row['memory_bytes'] / GIB:.2f} GiB"
    return Finding(text, HOLDS if 0 <= found.rest <= 2 * GIB else FALSE)


def _half(seen: Evidence) -> Finding:
    factor = seen.smaller("fp8")[shapes.shape("phi-2").title]
    text = (
        f"Phi-2 gets {factor:.2f} times smaller, a reduction of {1 - 1 / factor:.0%}: embedding and head stay"
    )
    return Finding(text, HOLDS if _near(factor, 2) else FALSE)


def _blamed(seen: Evidence) -> Finding:
    card = cards.card("L4")
    way = FP8.way(card.machine)
    text = "The message itself: 43.06 MiB free, 21.98 GiB held by this process: two models at once. "
    text += f"An L4 (SM {card.sm}) has {way.name}"
    return Finding(text, FALSE if way.arithmetic_bits == 8 else HOLDS)


# The load that "fits" means where the log names none: its own max_model_len, for a few requests at once.
LOAD = {"context": 2048, "concurrency": 8}


def _mistral(scheme: str) -> Budget:
    return sizing.budget(shapes.shape("mistral-7b"), scheme, cards.card("L4").memory, **LOAD)


def _requires_a100(seen: Evidence) -> Finding:
    here = _mistral("baseline")
    text = (
        f"{here.weights / 1e9:.1f} GB of weights; with {LOAD['concurrency']} requests of {LOAD['context']:,} "
    )
    text += f"tokens {here.total / GIB:.1f} of an L4's usable {here.usable / GIB:.1f} GiB"
    return Finding(text, FALSE if here.fits else HOLDS)


def _fits_l4(seen: Evidence) -> Finding:
    here = _mistral("awq")
    verb = "fits" if here.fits else "does not fit"
    text = f"{here.weights / 1e9:.1f} GB of weights, not 7; {verb}, with room "
    text += f"for {here.tokens:,} tokens of KV cache"
    return Finding(text, (HOLDS if _near(here.weights, 7e9) else PARTLY) if here.fits else FALSE)


def _months(seen: Evidence) -> Finding:
    found = [day * DAYS_A_MONTH for day in LOG_PRICES.values()]
    text = "; ".join(
        f"${day:.2f} x {DAYS_A_MONTH} = ${day * DAYS_A_MONTH:.0f}" for day in LOG_PRICES.values()
    )
    return Finding(f"{text}. A price is an input", HOLDS if found == [324, 792] else FALSE)


def _saved(seen: Evidence) -> Finding:
    a_day = LOG_PRICES["A100 80GB"] - LOG_PRICES["L4"]
    here = _mistral("baseline")
    room, more = (_mistral(name).tokens // LOAD["context"] for name in ("baseline", "awq"))
    text = (
        f"The subtraction is right (${a_day:.2f}), its reason is not: 16 bits fit the L4 as well. There is "
    )
    text += f"room for {room} requests at once, in four bits for {more}: the load decides what that saves"
    return Finding(text, PARTLY if here.fits else HOLDS)


def _divided(scheme: str, compression: float, said: float) -> Callable[[Evidence], Finding]:
    def check(seen: Evidence) -> Finding:
        rent = LOG_PRICES["L4"] * DAYS_A_MONTH
        text = f"${rent:.0f} / {compression} = ${rent / compression:.2f}: the rent of one L4 divided by a "
        text += "compression ratio. The rent stays; tokens for it change by the speed"
        found = seen.faster(scheme)
        if found:
            text += f" (baseline = 1: {_by_device(found)})"
        dearer = any(ratio < compression * (1 - NEAR) for ratios in found.values() for ratio in ratios)
        return Finding(text, FALSE if dearer else HOLDS if found else OPEN, measured=True)

    return check


def _contradiction(seen: Evidence) -> Finding:
    one, other = (price * DAYS_A_MONTH for price in LOG_PRICES.values())
    text = f"The same baseline costs ${other:.0f} (an A100) in the cost analysis and ${one:.0f} (an L4) here"
    return Finding(text, FALSE if one != other else HOLDS)


def _accuracy(seen: Evidence) -> Finding:
    rows = [row for row in seen.rows if row["scheme"] in ("fp8", "fp8_file") and row.get("recovery")]
    kept = list(dict.fromkeys(result_tables.kept(row) for row in rows))
    published = "published: 99 to 100 % of BF16's accuracy (arXiv 2411.02355)"
    if not kept:
        return Finding(f"Not measured here; {published}", OPEN, measured=True)
    text = f"{' and '.join(kept)} of the baseline's accuracy kept here; {published}"
    sure = min(row.get("recovery_low", row["recovery"]) for row in rows) >= 0.95
    return Finding(text, HOLDS if sure else PARTLY, measured=True)


def _argument(seen: Evidence) -> Finding:
    """Look the argument's deprecation up in the vLLM that is installed, without importing it."""
    package = importlib.util.find_spec("vllm")
    file = "model_executor/model_loader/weight_utils.py"
    source = Path(package.origin).parent / file if package else None
    if source is None or not source.exists():
        return Finding("vLLM's source is not here to look it up in", OPEN)
    gone = "use --quantization fp8_per_tensor instead" in source.read_text(encoding="utf-8")
    text = (
        "Still accepted" + (", deprecated: vLLM asks for fp8_per_tensor" if gone else "") + f" (vllm/{file})"
    )
    return Finding(text, PARTLY if gone else HOLDS)


LOG_PRICES = {"L4": 10.80, "A100 80GB": 26.40}  # dollars a day, the log's; it does not say which A100

CLAIMS = (
    Claim("FP8: compression 2.0x", "Selection guide", _compression("fp8", 2.0)),
    Claim("W4A16 (AWQ): compression 3.7x", "Selection guide", _compression("awq", 3.7)),
    Claim("FP8 needs L4, A100, H100 (Ampere+)", "Selection guide", _fp8_hardware),
    Claim("W4A16 runs on any GPU (CPU decompression)", "Selection guide", _w4_hardware),
    Claim("FP8: good accuracy", "Selection guide", _accuracy),
    Claim(
        "Start with FP8: 2x cost savings", "Recommendations", _speed("fp8", 2.0, "Tokens for the same rent")
    ),
    Claim(
        "W4A16 for maximum savings: 3.7x", "Recommendations", _speed("awq", 3.7, "Tokens for the same rent")
    ),
    Claim("Baseline only for development or validation", "Recommendations", _baseline_only),
    Claim("W4A16 requires a pre-quantized model from HuggingFace", "Recommendations", _prequantized),
    Claim("Loading model weights took 5.1933 GB", "Example 1", _weights),
    Claim("Throughput: 42.0 tokens/sec", "Example 1", _rate),
    Claim("# GPU blocks: 2881", "Example 1", _blocks),
    Claim("Memory savings: 2x compression (50% reduction)", "Example 2", _half),
    Claim("Expected speedup: 2-3x", "Example 2", _speed("fp8", 2.0, "Throughput")),
    Claim("Out of memory: your GPU may not support FP8", "Example 2", _blamed),
    Claim("Mistral-7B in FP16 requires an A100 (26GB model)", "Cost analysis", _requires_a100),
    Claim("Mistral-7B in W4A16 fits on an L4 (7GB)", "Cost analysis", _fits_l4),
    Claim("$10.80/day is $324/month, $26.40/day $792", "Cost analysis", _months),
    Claim("Savings: $15.60/day", "Cost analysis", _saved),
    Claim('QUANTIZATION = "fp8"', "Example 4", _argument),
    Claim("Quantization is production standard: always use it", "Summary", _baseline_only),
    Claim("Baseline: $324/month", "Summary", _contradiction),
    Claim("FP8: $162/month (50% savings)", "Summary", _divided("fp8", 2.0, 162)),
    Claim("W4A16: $87/month (73% savings)", "Summary", _divided("awq", 3.7, 87)),
)


def findings(seen: Evidence) -> dict[Claim, Finding]:
    """Check every claim; the order is the log's."""
    return {claim: claim.check(seen) for claim in CLAIMS}


def table(found: dict[Claim, Finding]) -> Table:
    """The ledger as a table; what this machine's records decide is marked as measured."""
    rows = []
    for claim, finding in found.items():
        cells = [finding.evidence, finding.verdict]
        rows.append([claim.said, claim.where, *(map(page.measured, cells) if finding.measured else cells)])
    columns = ["the log says", "in its", "evidence", "verdict"]
    return Table(columns, rows, texts=columns)


def figures_of_the_log(row: dict) -> Table:
    """Set the cited record's three figures beside Phi-2's config and an L4's data sheet, step by step."""
    phi, card = shapes.shape("phi-2"), cards.card("L4")
    work, config = roofline.step(phi, "baseline"), sizing.config_of(phi)
    found = sizing.reconcile([row], {row["model"]: phi})[0]
    moved, rate = work.weights * row["output_tokens_per_s"], row["output_tokens_per_s"]
    memory, share, size = row["memory_bytes"], row["utilization"], row["predicted_weights_bytes"]
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    values = config["hidden_size"] // config["num_attention_heads"]
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
