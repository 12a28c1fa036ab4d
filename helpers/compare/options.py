"""The ways to deploy a model on GPUs: what each takes of the memory, and what it should give.

A way is a scheme on the fewest GPUs that hold the load. To write a token takes the roofline's time: bytes
over the card's bandwidth or operations over its rate, whichever takes longer, and added to it what a step of
its kind took beyond that on an H200, layer by layer; other GPUs have other kernels. Where the very case is
on record, the measured ratio stands instead. To read a prompt takes its operations. What GPUs tell each other
is counted over NVLink, as two H200s took for one request; over PCIe, and of prompts, it is left out. That is
an estimate.
"""

import functools
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from helpers.base import records
from helpers.compare import cards, published, recorded, roofline, sizing
from helpers.compare.cards import Card
from helpers.compare.counting import AS_IT_IS, FP8_CACHE, Counted
from helpers.compare.published import Kept
from helpers.compare.roofline import Step
from helpers.compare.sizing import Budget, Load
from helpers.model import formats, schemes, sizes
from helpers.model.layout import LayoutError
from helpers.model.schemes import Scheme, SchemeError, Way

GPUS = (1, 2, 4, 8)
# Requests in one step: vLLM's own limit (max_num_seqs) below 70 GiB and on an A100; else it is 1,024.
# Source: vllm/engine/arg_utils.py, default_max_num_seqs.
MOST_AT_ONCE = 256
REACHED = 0.88  # of a data sheet's bandwidth: a copy on an H200 moves 4,227 of its 4,800 GB/s
READING = 0.55  # of its operations/s: prompts of a Qwen3-8B on an H200 were read at 0.56 in FP8, 0.64 in BF16
ESTIMATE = "roofline, and beyond it what a step on an H200 took"
MORE = 1.3  # a way that rounds more must give so many times as much: an estimate can be off by a quarter
A_LITTLE = 1.1  # one that rounds a little more: the cache besides, or FP8, which loses next to nothing
SAME = 1.05  # and of two that round alike, one is better only beyond this


@dataclass(frozen=True)
class Gain:
    """Tokens/s as a multiple of 16 bits', and where that is from: a record or an estimate."""

    ratio: float
    source: str


@dataclass(frozen=True)
class Option:
    """One way to deploy under a load, on ``gpus``; ``needs`` is the fewest that hold it (None: over eight).

    ``budget`` is what it takes of them together. ``serves`` is the model or checkpoint that vLLM is given
    (``to_make``: there is none yet), ``args`` its arguments. ``one_per_s`` are the tokens/s of one user, and
    ``writing_s`` the seconds of a GPU for a token of an answer, all users at once: as ``alone`` and
    ``together`` have them, recorded or estimated. Where it is ``refused`` no more is known.
    """

    scheme: str
    title: str
    kept: Kept
    load: Load = field(repr=False)
    refused: str = ""
    gpus: int = 1
    needs: int | None = None
    budget: Budget | None = None
    step: Step | None = field(default=None, repr=False)
    way: Way | None = field(default=None, repr=False)
    alone: Gain | None = None
    together: Gain | None = None
    one_per_s: float = 0.0
    writing_s: float = math.inf
    serves: str = ""
    args: dict = field(default_factory=dict)
    to_make: bool = False

    def rate(self, batch: int, gpus: int | None = None) -> float:
        """Tokens/s that ``batch`` requests write, their prompts not counted: on its GPUs, or on so many.

        Two all-reduces a layer and GPU over NVLink; over PCIe, where none was recorded, they are left out.
        """
        gpus, card, layers = gpus or self.gpus, self.load.card, self.step.layout.layers
        bandwidth = gpus * REACHED * card.bandwidth
        arithmetic = gpus * roofline.COMPUTES * card.rate(self.way.arithmetic_bits, self.way.integers)
        least = self.step.seconds(batch, bandwidth, arithmetic, self.load.context)
        exchange = recorded.exchange_s() * 2 * layers if gpus > 1 and card.nvlink else 0.0
        return batch / (least + recorded.beyond(self.way.timed, batch) * layers + exchange)

    @property
    def reading_s(self) -> float:
        """Seconds of a GPU for the tokens of a prompt that come to a token of its answer."""
        rate = READING * self.load.card.rate(self.way.arithmetic_bits, self.way.integers)
        return self.load.prompts * self.step.operations / rate

    @property
    def per_s(self) -> float:
        """Tokens of answers a second of all users together, their prompts read besides."""
        return self.gpus / (self.writing_s + self.reading_s)

    def dollars(self, price_per_day: float) -> float:
        """What a million tokens of answers cost at full use."""
        return self.gpus * price_per_day / (self.per_s * 86_400) * 1e6

    def as_json(self, price: float | None) -> dict:
        """What ``--json`` prints of it."""
        gain = None
        if self.together and self.users:
            gain = {"at_1": round(self.alone.ratio, 3), "at_users": round(self.together.ratio, 3)}
            gain |= {"from": self.alone.source, "from_at_users": self.together.source}
        return {
            "scheme": self.scheme,
            "weights_bytes": self.budget and self.budget.weights,
            "fits": self.fits,
            "users": self.users,
            "gain": gain,
            "command": self.command or None,
            "refused": self.refused or None,
            "gpus": self.gpus,
            "gpus_needed": self.needs,
            "accuracy": self.kept.says,
            "dollars_per_million_tokens": round(self.dollars(price), 4) if price and self.users else None,
        }

    @property
    def command(self) -> str:
        """The line that starts the server."""
        return shlex.join(["vllm", "serve", self.serves, *flags(self.args)]) if self.serves else ""

    @property
    def users(self) -> int:
        """Requests that run at once; others wait their turn."""
        return self.budget.at_once if self.budget else 0

    @property
    def fits(self) -> bool:
        """Whether all run at once."""
        return self.budget is not None and self.budget.spare >= 0


# -- the ways --------------------------------------------------------------------------------------------


def options(model: Counted, load: Load) -> list[Option]:
    """Every way to deploy a model under a load; what cannot be has the reason."""
    found = [option(model, name, load) for name in model.names]
    base = option(model, "baseline", load)
    if not model.quantized and (base.needs or 0) > load.gpus:  # a rival: 16 bits, on more GPUs
        rival = option(model, "baseline", replace(load, gpus=base.needs))
        found.append(replace(rival, scheme=f"baseline on {base.needs} GPUs"))
    return [_with_gains(one, base, model.model.title) if one.step else one for one in found]


def option(model: Counted, name: str, load: Load) -> Option:
    """One way, without its gains."""
    rule = model.rule(name)
    one = Option(name, rule.title, _kept(rule), load)
    try:
        way = rule.way(load.card.machine)
        if name.startswith(AS_IT_IS):
            held, stored = model.quantized.of, model.stored
        else:
            held = sizes.format_of(rule, model.layout, way)
            stored = formats.stored_bytes(model.layout.tensors, sizes.format_of(rule, model.layout))
    except (SchemeError, LayoutError) as error:
        return replace(one, refused=str(error))
    step = roofline.step_of(model.layout, held, rule.kv_bytes)
    gpus, needs, budget = _placed(model, stored, step.value_bytes, load)
    one = replace(one, gpus=gpus, needs=needs, budget=budget, step=step, way=way)
    return replace(one, **_served(model, rule, way, gpus if one.users else needs or gpus, load))


def _kept(rule: Scheme) -> Kept:
    """What is published of a scheme: of its weights, and of the cache where both are rounded."""
    known = {AS_IT_IS: Kept("as released", 0, "")} | published.kept()
    if rule.name in known:
        return known[rule.name]
    weights, cache = known[rule.name.removesuffix(FP8_CACHE)], known["fp8_kv"]
    sources = "; ".join(filter(None, (weights.source, cache.source)))
    return Kept(f"{weights.says}; cache {cache.says}", weights.loss + cache.loss, sources)


def _placed(model: Counted, weights: int, value_bytes: int, load: Load) -> tuple[int, int | None, Budget]:
    """The fewest of the GPUs that hold a load, or all of them where those do not; how many would, and what
    it takes of those it is placed on."""
    budgets = {}
    for gpus in (number for number in GPUS if model.layout.heads % number == 0):
        copies = gpus / min(gpus, model.layout.kv_heads)
        budgets[gpus] = sizing.budget(model.layout, weights, value_bytes, load, gpus, copies)
    needs = next((gpus for gpus, one in budgets.items() if one.spare >= 0), None)
    gpus = needs if needs and needs <= load.gpus else max(n for n in budgets if n <= load.gpus)
    return gpus, needs, budgets[gpus]


def flags(args: dict) -> list[str]:
    """Arguments of ``vllm.LLM`` as those of ``vllm serve``."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in args.items())
    return [word for pair in pairs for word in pair]


def _served(model: Counted, rule: Scheme, way: Way, gpus: int, load: Load) -> dict:
    """What vLLM is given: the model, its arguments, and whether the checkpoint has still to be made."""
    name, _, revision = model.model.name.partition("@")
    base = rule.name.removesuffix(FP8_CACHE)
    args = way.args | {"max_model_len": load.context}
    if args.get("dtype") != "float16":  # what a checkpoint's own type is not
        args.pop("dtype", None)
    if base == AS_IT_IS:
        args.pop("quantization", None)
    if gpus > 1:
        args["tensor_parallel_size"] = gpus
    if load.users > MOST_AT_ONCE:
        args["max_num_seqs"] = load.users
    if base != AS_IT_IS and rule.needs_checkpoint:
        file = published.figures()["checkpoints"].get(name, {}).get(base)
        return {"serves": file or f"./{model.model.title}-{base}", "args": args, "to_make": not file}
    return {"serves": name, "args": ({"revision": revision} if revision else {}) | args}


# -- what they should give ----------------------------------------------------------------------------------


def _with_gains(one: Option, base: Option, model: str) -> Option:
    """The same with its gains over 16 bits.

    For one user 16 bits run on the same GPUs, as if they fitted; for all of them on the fewest that hold the
    load, and what counts is what one GPU gives.
    """
    gpus, users = base.needs or one.gpus, one.load.users
    plain_s = gpus / base.rate(users, gpus)
    alone = Gain(one.rate(1) / base.rate(1, one.gpus), ESTIMATE)
    writing = Gain(plain_s / one.gpus * one.rate(min(users, one.users) or users), ESTIMATE)
    if one.gpus == 1:
        alone = _recorded(one, model, 1) or alone
        if one.fits and gpus == 1:
            writing = _recorded(one, model, users) or writing
    one_per_s, writing_s = alone.ratio * base.rate(1, one.gpus), plain_s / writing.ratio
    ratio = (plain_s + base.reading_s) / (writing_s + one.reading_s)
    together = replace(writing, ratio=ratio)
    return replace(one, alone=alone, together=together, one_per_s=one_per_s, writing_s=writing_s)


def gains(
    model: Counted, card: Card, names: Sequence[str], users: Sequence[int], prompts: float = 0.0
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """By scheme and users at once what is expected of a card, for ``comparison_figures.gains``; of contexts
    so short that all fit, with ``prompts`` tokens read for each that is written."""
    found = {name: {} for name in names}
    for count in users:
        for one in options(model, Load(card, users=count, context=128, prompts=prompts)):
            if one.scheme in found:
                found[one.scheme][count] = (one.together.ratio,) * 3
    return found


def _recorded(one: Option, model: str, users: int) -> Gain | None:
    """The ratio that was recorded of this very case, on the same card; between two batch sizes on a line."""
    card = one.load.card.name
    same = [
        row
        for row in on_record()
        if row["device"].endswith(card) and row["model"] == model
        if row["scheme"] == "baseline" or row.get("way") == one.way.name
    ]
    longest_first = sorted(records.by_origin(same).values(), key=lambda its: -its[0]["prompt_tokens"])
    for origin in longest_first:
        ratios = {batch: gain.ratio for batch, gain in roofline.ranges(origin, one.scheme).items()}
        tokens = origin[0]["prompt_tokens"]
        if ratios and min(ratios) <= users <= max(ratios) and tokens <= one.load.context:
            ratio = np.interp(math.log(users), [*map(math.log, ratios)], [*ratios.values()])
            return Gain(float(ratio), f"recorded on an {card}, {tokens} tokens in")
    return None


@functools.cache
def on_record() -> list[dict]:
    """What was measured on other machines; of large models with the kernels that vLLM chose, and no mixtures,
    whose experts were random."""
    known = sizing.known_models()
    ours = [row for row in records.elsewhere()[0] if not row.get("cited")]
    measured = {row["model"] for row in ours}  # their ratios stay within what was measured in one session
    return ours + [
        row | {"way": schemes.scheme(row["scheme"]).way(cards.card(row["device"]).machine).name}
        for row in records.deployments()
        if row["chosen_by"] == "vLLM" and row["scheme"] in schemes.EVERY and row["model"] not in measured
        if not sizes.layout(known[row["model"]].folder).experts
    ]


# -- which to take -------------------------------------------------------------------------------------------


def recommended(found: list[Option], goal: str, load: Load) -> Option | None:
    """The way to take: of those that hold the load, or of all where none does, the gentlest that none beats.

    One that rounds more beats it where it gives ``MORE`` times as much, one that rounds a little more
    ``A_LITTLE``, one that rounds as much ``SAME``: what differs by less is equal.
    """
    running = [one for one in found if one.step and one.users and one.gpus <= load.gpus]
    holding = [one for one in running if one.fits]
    ways = sorted(holding or running, key=lambda one: one.kept.loss)  # stable: the simpler stands first
    if goal == "quality" or (goal == "fit" and holding):
        ways = [one for one in ways if one.kept.loss == ways[0].kept.loss]
    for place, one in enumerate(ways):
        rivals = ways[place + 1 :]
        if all(score(other, goal) < _enough(one, other) * score(one, goal) for other in rivals):
            return one
    return None


def _enough(one: Option, other: Option) -> float:
    """How many times as much another way has to give that rounds more than this one, or as much."""
    more = other.kept.loss - one.kept.loss
    return MORE if more >= 1.5 else A_LITTLE if more > 0 else SAME


def score(one: Option, goal: str) -> float:
    """What a way gives of what is asked, a GPU; of latency it is one user's tokens a second."""
    if goal == "fit":
        return one.users / one.gpus
    if goal == "writing":
        return 1 / one.writing_s
    return one.one_per_s if goal == "latency" else one.per_s / one.gpus
