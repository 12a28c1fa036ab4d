"""The ledger: each claim of the log this tutorial was created from, its evidence, and a verdict.

A verdict follows from records, configs, data sheets and vLLM's source, and changes when they do. What is
arithmetic on the log's own figures gets none; what others published is quoted with its source.
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

HOLDS, PARTLY, FALSE, OPEN, NONE = VERDICTS = "holds", "partly", "false", "not measured", "no verdict"

NEAR = 0.05  # a figure this close to a claimed one counts as that; of two speeds neither is the faster


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
        """A scheme's throughput by model and device, the baseline's as 1: every batch on record."""
        found: dict[str, list[float]] = {}
        for place, _, ratio in self._ratios(scheme):
            found.setdefault(place, []).append(ratio)
        return found

    def weights_win(self) -> tuple[int, int, int]:
        """In how many measured cases weights of fewer bits were faster than 16 by more than ``NEAR``, in how
        many slower by more, and of how many. Speed alone: whether the answers are kept is not asked.
        """
        best: dict[tuple, float] = {}
        for name, rule in SCHEMES.items():
            for _, case, ratio in self._ratios(name) if rule.weight_bits < 16 else ():
                best[case] = max(ratio, best.get(case, 0))
        won = sum(ratio > 1 + NEAR for ratio in best.values())
        return won, sum(ratio < 1 - NEAR for ratio in best.values()), len(best)

    def _ratios(self, scheme: str) -> Iterator[tuple[str, tuple, float]]:
        """Model and device, case (an origin at a batch size) and ratio."""
        for origin, rows in records.by_origin(self.rows + self.others).items():
            for batch, ratio in roofline.ratios(rows, scheme).items():
                yield f"{rows[0]['model']} on {rows[0]['device']}", (origin, batch), ratio

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
    """A claim word for word, the section it stands in (of a table, the row and column too), and its check."""

    said: str
    where: str
    check: Callable[[Evidence], Finding]


def _spread(values: Iterable[float], form: str = "{:.2f}") -> str:
    values = list(values)
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _by_place(found: dict[str, list[float]]) -> str:
    return "; ".join(f"{place} {_spread(ratios)}" for place, ratios in found.items())


def _near(value: float, claimed: float) -> bool:
    return abs(value / claimed - 1) <= NEAR


def _compression(scheme: str, claimed: float) -> Callable[[Evidence], Finding]:
    def check(seen: Evidence) -> Finding:
        whole = seen.smaller(scheme)
        rule = schemes.scheme(scheme)
        group = GROUP_SIZES[0]
        matrix = 16 / (rule.weight_bits + 8 * rule.group_bytes / group)
        groups = f" (groups of {group})" if rule.group_bytes else ""
        text = (
            f"One matrix {matrix:.2f} times{groups}; whole models {_spread(whole.values())}, by their configs"
        )
        if all(_near(factor, claimed) for factor in whole.values()):
            return Finding(text, HOLDS)
        return Finding(text, PARTLY if _near(matrix, claimed) else FALSE)

    return check


def _fp8_hardware(seen: Evidence) -> Finding:
    found = {name: FP8.way(cards.card(name).machine) for name in ("L4", "A100 80GB", "H100", "T4")}
    text = "; ".join(f"{name}: {way.name}" for name, way in found.items())
    eight = [way.arithmetic_bits == 8 for name, way in found.items() if name != "T4"]
    return Finding(text, HOLDS if all(eight) else PARTLY if any(eight) else FALSE)


def _w4_hardware(seen: Evidence) -> Finding:
    volta = Machine("cuda", "V100", 0, sm=7.0)
    way = AWQ.way(cards.card("T4").machine)
    try:
        AWQ.way(volta)
    except SchemeError as error:
        return Finding(f"{error} There: {way.why}", FALSE)
    return Finding(way.why, PARTLY)


def _speed(scheme: str, claimed: float, what: str) -> Callable[[Evidence], Finding]:
    def check(seen: Evidence) -> Finding:
        found = seen.faster(scheme)
        if not found:
            return Finding(f"No record of {scheme} running as itself", OPEN, measured=True)
        text = f"{what}, baseline = 1: {_by_place(found)}"
        return Finding(
            text, _reached([r for ratios in found.values() for r in ratios], claimed), measured=True
        )

    return check


def _reached(ratios: list[float], claimed: float) -> str:
    """Whether measured gains reach a claimed one. What misses it by less than twice ``NEAR`` is too close to
    count for either side, so that a percent more or less turns no verdict into its opposite.
    """
    enough = [ratio >= claimed for ratio in ratios]
    short = [ratio < claimed * (1 - 2 * NEAR) for ratio in ratios]
    return HOLDS if any(enough) and not any(short) else FALSE if all(short) else PARTLY


def _always(seen: Evidence) -> Finding:
    won, lost, cases = seen.weights_win()
    if not cases:
        return Finding("No quantized weights were measured beside a baseline", OPEN, measured=True)
    text = (
        f"Fewer bits a weight were faster than 16 in {won} of {cases} cases (machine, model, batch), slower "
        f"in {lost}, within {NEAR:.0%} in {cases - won - lost}. Of answers that says nothing"
    )
    return Finding(text, HOLDS if won == cases else FALSE if lost == cases else PARTLY, measured=True)


def _prequantized(seen: Evidence) -> Finding:
    if not any(row["scheme"] == "awq" for row in seen.rows):
        return Finding("No AWQ checkpoint was tried here yet: run 03_awq", OPEN, measured=True)
    text = "It has to be made before it is loaded: true. One was made here, without a hub, and vLLM ran it"
    return Finding(text, PARTLY, measured=True)


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
    share = UTILIZATION * card.memory / GIB
    text = f"An L4 (SM {card.sm}) has {way.name}. The message is about memory: PyTorch had {ALLOCATED} "
    text += (
        f"GiB, Example 1's engine was given {share:.2f}, so {ALLOCATED - share:.1f} GiB at least were the "
    )
    text += "second model, half loaded, when the last 50 MiB did not fit"
    return Finding(text, FALSE if way.arithmetic_bits == 8 else HOLDS)


UTILIZATION, ALLOCATED = 0.9, 21.44  # the log's gpu_memory_utilization, and GiB in its message

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


def _month(seen: Evidence) -> Finding:
    day = LOG_PRICES["A100 80GB"]
    text = f"By arithmetic: ${day:.2f} x {DAYS_A_MONTH} = ${day * DAYS_A_MONTH:.0f}. A price is an input"
    return Finding(text, NONE)


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
            text += f" (baseline = 1: {_by_place(found)})"
        every = [ratio for ratios in found.values() for ratio in ratios]
        return Finding(text, _reached(every, compression) if every else OPEN, measured=True)

    return check


def _contradiction(seen: Evidence) -> Finding:
    one, other = (price * DAYS_A_MONTH for price in LOG_PRICES.values())
    text = (
        f"By arithmetic: ${one:.0f} rents an L4; in the cost analysis the baseline has an A100, ${other:.0f}"
    )
    return Finding(text, NONE)


def _accuracy(seen: Evidence) -> Finding:
    rows = [row for row in seen.rows if row["scheme"] in ("fp8", "fp8_file") and row.get("recovery")]
    kept = list(dict.fromkeys(result_tables.kept(row) for row in rows))
    published = "Published for large models: 99 to 100 % of BF16's accuracy (arXiv 2411.02355)"
    if not kept:
        return Finding(f"{published}. Not measured here", OPEN, measured=True)
    size = sizes.layout(seen.model.folder).total
    text = f"{published}. Kept here, by a model of {size / 1e6:,.0f}M weights: {' and '.join(kept)}"
    lost = max(row.get("recovery_high", row["recovery"]) for row in rows) < 1 - NEAR
    return Finding(text, PARTLY if lost else HOLDS, measured=True)


def _argument(seen: Evidence) -> Finding:
    """Look the argument's deprecation up in the vLLM that is installed, without importing it."""
    package, file = importlib.util.find_spec("vllm"), "model_executor/model_loader/weight_utils.py"
    source = Path(package.origin).parent / file if package else None
    if source is None or not source.exists():
        return Finding("vLLM's source is not here to look it up in", OPEN)
    gone = "use --quantization fp8_per_tensor instead" in source.read_text(encoding="utf-8")
    deprecated = ", deprecated: vLLM asks for fp8_per_tensor" if gone else ""
    return Finding(f"Still accepted{deprecated} ({source.name})", PARTLY if gone else HOLDS)


SAME_RENT = "Tokens for the same rent"
LOG_PRICES = {"L4": 10.80, "A100 80GB": 26.40}  # dollars a day, the log's; it does not say which A100

GUIDE, ADVICE, COST = "Selection guide", "Recommendations", "Cost analysis"
CLAIMS = (
    Claim("2.0x", f"{GUIDE}: FP8, Compression", _compression("fp8", 2.0)),
    Claim("3.7x", f"{GUIDE}: W4A16 (AWQ), Compression", _compression("awq", 3.7)),
    Claim("L4, A100, H100 (Ampere+)", f"{GUIDE}: FP8, GPU Needs", _fp8_hardware),
    Claim("Any GPU (CPU decompression)", f"{GUIDE}: W4A16 (AWQ), GPU Needs", _w4_hardware),
    Claim("Production deployment, good accuracy", f"{GUIDE}: FP8, Best For", _accuracy),
    Claim("Start with FP8 - easiest to deploy, 2x cost savings", ADVICE, _speed("fp8", 2.0, SAME_RENT)),
    Claim("Use W4A16 for maximum savings - 3.7x compression", ADVICE, _speed("awq", 3.7, SAME_RENT)),
    Claim("Baseline only for development or accuracy validation", ADVICE, _always),
    Claim("W4A16 requires pre-quantized model from HuggingFace", ADVICE, _prequantized),
    Claim("Loading model weights took 5.1933 GB", "Example 1", _weights),
    Claim("Throughput: 42.0 tokens/sec", "Example 1", _rate),
    Claim("# GPU blocks: 2881", "Example 1", _blocks),
    Claim("Memory savings: 2x compression (50% reduction)", "Example 2", _half),
    Claim("Expected speedup: 2-3x faster inference", "Example 2", _speed("fp8", 2.0, "Throughput")),
    Claim("Your GPU may not support FP8 quantization", "Example 2", _blamed),
    Claim("Requires A100 (26GB model)", f"{COST}: Baseline FP16", _requires_a100),
    Claim("Cost: $26.40/day ($792/month)", f"{COST}: Baseline FP16", _month),
    Claim("Fits on L4! (7GB compressed)", f"{COST}: W4A16 (AWQ)", _fits_l4),
    Claim("Savings: $15.60/day", COST, _saved),
    Claim('os.getenv("QUANTIZATION", "fp8")', "Example 4", _argument),
    Claim("Quantization is production standard - always use it!", "Summary", _always),
    Claim("$324/month", "Summary: Baseline (FP16)", _contradiction),
    Claim("$162/month  (50% savings)", "Summary: FP8 Quantized", _divided("fp8", 2.0, 162)),
    Claim("$87/month   (73% savings)", "Summary: W4A16 Quantized", _divided("awq", 3.7, 87)),
)


def findings(seen: Evidence) -> dict[Claim, Finding]:
    """Check every claim; the order is the log's."""
    return {claim: claim.check(seen) for claim in CLAIMS}


def table(found: dict[Claim, Finding], *sections: str) -> Table:
    """The ledger as a table, of claims whose place begins with one of ``sections`` (all without any).

    What this machine's records decide is marked as measured.
    """
    rows = []
    for claim, finding in found.items():
        if not claim.where.startswith(sections or ""):
            continue
        cells = [finding.verdict, finding.evidence]
        rows.append([claim.said, claim.where, *(map(page.measured, cells) if finding.measured else cells)])
    columns = ["you may have read", "in the log's", "verdict", "evidence"]
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
