"""The ways to deploy a model on GPUs: what each takes of the memory, and what it should give.

A way is a scheme on the fewest GPUs that hold the load. Its speed is the roofline's: bytes over the card's
bandwidth or operations over its rate, whichever takes longer, and added to it what a step of the same kernel
took beyond that on the GPU that is on record, layer by layer. That is an estimate from above. Where the very
case was measured, here or on record, the measured ratio stands instead.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from helpers.base import records
from helpers.base.machine import GIB
from helpers.compare import cards, recorded, roofline, sizing
from helpers.compare.cards import Card, SizingError
from helpers.compare.published import ACCURACY, CHECKPOINTS, Kept
from helpers.compare.roofline import Step
from helpers.compare.sizing import Budget
from helpers.model import formats, schemes, shapes, sizes, ways
from helpers.model.formats import Quantized
from helpers.model.layout import MATRICES, Layout, LayoutError, full_config
from helpers.model.model import Model
from helpers.model.schemes import Scheme, SchemeError, Way

_KV = "_fp8_kv"
# What one deploys, the gentlest first. A checkpoint that is quantized already goes as it is.
OFFERED = (
    "baseline", "fp8_kv", "fp8", "fp8_fp8_kv", "int8", "int8_fp8_kv", "awq", "awq_fp8_kv",
    "nvfp4", "nvfp4_fp8_kv",
)  # fmt: skip
AS_IT_IS = "as_it_is"
GPUS = (1, 2, 4, 8)
NEAR = 0.03  # a config's count and an index that differ by no more agree
REACHED = 0.88  # of a data sheet's bandwidth: a copy on an H200 moves 4,227 of its 4,800 GB/s
ESTIMATE = "roofline, and beyond it what a step on an H200 took"


@dataclass(frozen=True)
class Load:
    """What is asked: ``gpus`` cards, ``users`` requests at once that hold ``context`` tokens each.

    Raises:
        SizingError: a number that cannot be; the message says what is allowed.
    """

    card: Card
    gpus: int = 1
    context: int = 4096
    users: int = 16

    def __post_init__(self):
        for name, value, most in (
            ("gpus", self.gpus, 8),
            ("context", self.context, 10_000_000),
            ("users", self.users, 100_000),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise SizingError(f"{name} must be a whole number from 1 to {most:,}, not {value!r}.")


@dataclass(frozen=True)
class Gain:
    """Tokens/s as a multiple of 16 bits', and where that is from: ``measured here``, a record, or a bound."""

    ratio: float
    source: str


@dataclass(frozen=True)
class Option:
    """One way to deploy, on ``gpus``; ``needs`` is the fewest that hold the load (None: more than eight).

    ``budget`` is what it takes of them together. ``per_s`` are tokens a second of all users together,
    ``alone_per_s`` of one alone, both estimated from above. Where it is ``refused`` nothing else is known.
    """

    scheme: str
    title: str
    kept: Kept
    refused: str = ""
    gpus: int = 1
    needs: int | None = None
    budget: Budget | None = None
    per_s: float = 0.0
    alone_per_s: float = 0.0
    alone: Gain | None = None
    together: Gain | None = None
    command: str = ""
    to_make: bool = False  # the checkpoint that the command names
    step: Step | None = field(default=None, repr=False)
    way: Way | None = field(default=None, repr=False)

    @property
    def weights(self) -> int:
        """Bytes of weights."""
        return self.budget.weights if self.budget else 0

    @property
    def users(self) -> int:
        """Requests that run at once; others wait their turn."""
        return self.budget.at_once if self.budget else 0

    @property
    def fits(self) -> bool:
        """Whether all run at once."""
        return self.budget is not None and self.budget.spare >= 0


# -- the model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A model as it can be counted: its layout, how it is quantized already, and how far it can be split.

    ``stored`` are the bytes of a checkpoint that is quantized already, ``longest`` the context it was made
    for; among more GPUs than ``kv_heads`` the cache is copied, not divided (MLA has one).
    """

    model: Model
    layout: Layout
    quantized: Quantized | None
    stored: int | None
    heads: int
    kv_heads: int
    longest: int
    note: str = ""

    @property
    def names(self) -> list[str]:
        """The ways there are to look at."""
        return [*((AS_IT_IS, AS_IT_IS + _KV) if self.quantized else ()), *OFFERED]

    def rule(self, name: str) -> Scheme:
        """The scheme of a way: of a checkpoint as it is, the one whose kernels read it."""
        if not name.startswith(AS_IT_IS):
            return schemes.scheme(name)
        if self.quantized.kind == "bitsandbytes":
            raise SchemeError(
                "vLLM 0.32 reads bitsandbytes only with a plugin (vllm-bnb-plugin), not on its own."
            )
        rule = schemes.scheme(self.quantized.kind)
        if name == AS_IT_IS and self.quantized.kv_bytes == 2:
            return rule
        return schemes.with_fp8_cache(rule, rule.name + _KV, rule.title)

    def title(self, name: str) -> str:
        """What readers call a way."""
        if not name.startswith(AS_IT_IS):
            return schemes.scheme(name).title
        return f"as it is ({self.quantized.title})" + (", FP8 KV cache" if name != AS_IT_IS else "")


def counted(model: Model) -> Counted:
    """Count a model.

    Raises:
        LayoutError: it cannot be counted; the message says why.
    """
    text = sizes.config_text(model.folder)
    config = full_config(text).get_text_config(decoder=True)
    counts, quantized = sizes.layout(model.folder), formats.quantized(json.loads(text))
    stored, index, note = None, formats.index_bytes(model.folder), ""
    if quantized:
        stored = formats.stored_bytes(counts, quantized.of)
        if index and abs(stored / index - 1) > NEAR:
            note = (
                f"Its index says {index / GIB:.1f} GiB, its config {stored / GIB:.1f} GiB: the index counts."
            )
        stored = index or stored

    def first(*names, default):
        return next(
            (value for name in names if isinstance(value := getattr(config, name, None), int) and value),
            default,
        )

    heads = first("num_attention_heads", default=1)
    shared = first("num_key_value_heads", "num_kv_heads", default=heads)
    single = getattr(config, "kv_lora_rank", None) or (
        getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    )
    longest = first("max_position_embeddings", default=10_000_000)
    return Counted(model, counts, quantized, stored, heads, 1 if single else shared, longest, note)


# -- the options --------------------------------------------------------------------------------------------


def options(model: Counted, load: Load, rows: list[dict] | None = None) -> list[Option]:
    """Every way to deploy a model under a load; what cannot be has the reason.

    Args:
        rows: records of this machine, whose ratios stand before any estimate.
    """
    found = [option(model, name, load) for name in model.names]
    base = next((one for one in found if one.scheme == "baseline" and one.step), None)
    if base and (base.needs or 0) > load.gpus:  # a rival: 16 bits, on more GPUs
        rival = option(model, "baseline", replace(load, gpus=base.needs))
        more = f" on {base.needs} GPUs"
        found.append(replace(rival, scheme=rival.scheme + more, title=rival.title + more))
    return [_with_gains(one, model, load, rows) if one.step else one for one in found]


def option(model: Counted, name: str, load: Load) -> Option:
    """One way, without its gains."""
    as_it_is = name.startswith(AS_IT_IS)
    one = Option(name, model.title(name), Kept("as released", 0, ""))
    try:
        rule = model.rule(name)
        one = replace(one, kept=_kept(rule, as_it_is))
        if model.quantized and not as_it_is:
            why = f"The checkpoint is quantized already ({model.quantized.title}): it is served as it is."
            return replace(one, refused=why)
        way = rule.way(load.card.machine)
        held = model.quantized.of if as_it_is else _everywhere(sizes.format_of(rule, model.layout, way))
        stored = (
            model.stored
            if as_it_is
            else sizes.weights_bytes(model.layout, sizes.format_of(rule, model.layout))
        )
    except (SchemeError, LayoutError) as error:
        return replace(one, refused=str(error))
    step = roofline.step_of(model.layout, held, rule.kv_bytes)
    gpus, needs, budget = _placed(model, stored, step.value_bytes, load)
    one = replace(one, gpus=gpus, needs=needs, budget=budget, step=step, way=way)
    command, to_make = _command(model, one, gpus if one.users else needs or gpus, load)
    return replace(one, command=command, to_make=to_make)


def _everywhere(format):
    """The same format for every matrix that schemes quantize."""
    return lambda one: format if one.part in MATRICES else None


def _kept(rule: Scheme, as_it_is: bool) -> Kept:
    """What is published of a scheme: of its weights, and of the cache where both are rounded."""
    name = rule.name if rule.name in ACCURACY else rule.name.removesuffix(_KV)
    weights = Kept("as released", 0, "") if as_it_is else ACCURACY.get(name, ACCURACY["baseline"])
    if rule.kv_bytes == 2 or name == rule.name:
        return weights
    cache = ACCURACY["fp8_kv"]
    sources = "; ".join(filter(None, (weights.source, cache.source)))
    return Kept(f"{weights.says}, a little less", weights.loss + 0.5, sources)


def _placed(model: Counted, weights: int, value_bytes: int, load: Load) -> tuple[int, int | None, Budget]:
    """The fewest of the GPUs that hold a load, or all of them where those do not; how many would, and what
    it takes of those it is placed on."""
    budgets = {
        gpus: sizing.budget(
            model.layout,
            weights,
            value_bytes,
            load.card,
            context=load.context,
            users=load.users,
            gpus=gpus,
            copies=gpus / min(gpus, model.kv_heads),
        )
        for gpus in GPUS
        if model.heads % gpus == 0
    }
    needs = next((gpus for gpus, one in budgets.items() if one.spare >= 0), None)
    gpus = needs if needs and needs <= load.gpus else max(n for n in budgets if n <= load.gpus)
    return gpus, needs, budgets[gpus]


def _command(model: Counted, one: Option, gpus: int, load: Load) -> tuple[str, bool]:
    """The line that starts the server, and whether the checkpoint that it names has still to be made."""
    name, _, revision = model.model.name.partition("@")
    base = one.scheme.removesuffix(_KV)
    file = (
        None
        if base == AS_IT_IS or not schemes.EVERY.get(base, schemes.BASELINE).file
        else CHECKPOINTS.get(name, {}).get(base)
    )
    to_make = base in schemes.EVERY and schemes.EVERY[base].file and not file
    words = ["vllm", "serve", file or (f"./{model.model.title}-{base}" if to_make else name)]
    words += ["--revision", revision] if revision and not file and not to_make else []
    if one.way.args.get("dtype") == "float16":
        words += ["--dtype", "float16"]
    for argument, flag in (("quantization", "--quantization"), ("kv_cache_dtype", "--kv-cache-dtype")):
        words += (
            [flag, one.way.args[argument]]
            if argument in one.way.args and (argument != "quantization" or base != AS_IT_IS)
            else []
        )
    words += ["--max-model-len", str(load.context)]
    words += ["--tensor-parallel-size", str(gpus)] if gpus > 1 else []
    return shlex.join(words), to_make


# -- what they should give ----------------------------------------------------------------------------------


def _with_gains(one: Option, model: Counted, load: Load, rows: list[dict] | None) -> Option:
    """The same with its tokens/s and its gains over 16 bits.

    For one user 16 bits run on the same GPUs, as if they fitted; for all of them on the fewest that hold the
    load, and what counts is what one GPU gives.
    """
    plain, way = roofline.step_of(model.layout, lambda _: None, 2), schemes.BASELINE.way(load.card.machine)
    _, sixteen, _ = _placed(model, 2 * model.layout.total, 2, load)
    batch = min(load.users, one.users) or load.users
    alone, together = (rate(one.step, one.way, load, one.gpus, users) for users in (1, batch))
    others = sixteen or one.gpus
    first = alone / rate(plain, way, load, one.gpus, 1)
    all_of_them = together / one.gpus / (rate(plain, way, load, others, load.users) / others)
    gains = [Gain(first, ESTIMATE), Gain(all_of_them, ESTIMATE)]
    if one.gpus == 1:
        gains[0] = _measured(one, model, load, 1, rows) or gains[0]
        if one.fits and others == 1:
            gains[1] = _measured(one, model, load, load.users, rows) or gains[1]
    return replace(one, per_s=together, alone_per_s=alone, alone=gains[0], together=gains[1])


def gains(
    model: Counted, card: Card, names: Sequence[str], users: Sequence[int]
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """By scheme and users at once what is expected of a card, for ``comparison_figures.gains``; of contexts
    so short that all fit."""
    found = {name: {} for name in names}
    for count in users:
        for one in options(model, Load(card, users=count, context=128)):
            if one.scheme in found:
                found[one.scheme][count] = (one.together.ratio,) * 3
    return found


def _measured(one: Option, model: Counted, load: Load, users: int, rows: list[dict] | None) -> Gain | None:
    """The ratio that was measured of this very case: here, or by a record of the same card."""
    reference = [row for row in (*recorded_rows(), *deployed()) if row["device"].endswith(load.card.name)]
    for found, where in ((rows or [], "measured here"), (reference, f"recorded on an {load.card.name}")):
        same = [
            row for row in found
            if row["model"] == model.model.title and row["scheme"] in (one.scheme, "baseline")
            and (row["scheme"] == "baseline" or row.get("way") == one.way.name)
        ]  # fmt: skip
        for origin in sorted(
            records.by_origin(same).values(), key=lambda its: -(its[0].get("prompt_tokens") or 0)
        ):
            ratio = _between(roofline.ratios(origin, one.scheme), users)
            if ratio and (origin[0].get("prompt_tokens") or 0) <= load.context:
                return Gain(ratio, f"{where}, {origin[0]['prompt_tokens']} tokens in")
    return None


def _between(ratios: dict[int, float], users: int) -> float | None:
    """The ratio at so many users: as recorded, or between the two batch sizes next to it."""
    below = max((batch for batch in ratios if batch <= users), default=None)
    above = min((batch for batch in ratios if batch >= users), default=None)
    if below is None or above is None:
        return None
    part = math.log(users / below) / math.log(above / below) if above > below else 0.0
    return ratios[below] + part * (ratios[above] - ratios[below])


@functools.cache
def deployed() -> list[dict]:
    """Large models on record, with the kernels that vLLM chose; no mixtures, whose experts were random."""
    titles = {title: name for name, title in shapes.TITLES.items()}
    return [
        row | {"way": schemes.scheme(row["scheme"]).way(cards.card(row["device"]).machine).name}
        for row in records.deployments()
        if row["chosen_by"] == "vLLM" and row["scheme"] in schemes.EVERY
        if not sizes.layout(shapes.shape(titles[row["model"]]).folder).experts
    ]


@functools.cache
def recorded_rows() -> list[dict]:
    """The records of other machines that were measured."""
    return [row for row in records.elsewhere()[0] if not row.get("cited")]


def estimated(model: Counted, row: dict) -> float:
    """The tokens/s that would have been expected of a record, at the bandwidth measured beside it."""
    card, rule = cards.card(row["device"]), schemes.scheme(row["scheme"])
    way = ways.recorded(row) or rule.way(card.machine)
    held = _everywhere(sizes.format_of(rule, model.layout, way))
    step = roofline.step_of(model.layout, held, rule.kv_bytes)
    card = replace(card, bandwidth=row["copy_bandwidth"] / REACHED)
    return rate(step, way, Load(card, 1, row["prompt_tokens"] + 64, row["batch"]), 1, row["batch"])


@functools.cache
def _beyond(scheme: str, variant: str) -> dict[int, float]:
    """Seconds a layer, by batch, that a step on record took beyond its bytes and operations."""
    row = next(row for row in recorded.recorded() if (row["scheme"], row["variant"]) == (scheme, variant))
    model, card = shapes.shape(row["model"].lower()), cards.card(row["device"])
    work, rule = roofline.step(model, scheme), schemes.scheme(scheme)
    bits = 16 if "Marlin" in variant else rule.way(card.machine).arithmetic_bits
    found = {}
    for batch, rate in row["tokens_per_s"].items():
        least = work.seconds(int(batch), row["copy_bandwidth"], card.rate(bits), 16)
        found[int(batch)] = max(0.0, int(batch) / rate - least) / model.config["num_hidden_layers"]
    return found


def _rest(way: Way, batch: float, layers: int) -> float:
    """Seconds that a step of ``batch`` tokens takes beyond the roofline, on a line between two records."""
    found = sorted(_beyond(*way.timed).items())
    (low, before), (high, after) = next(
        ((one, other) for one, other in itertools.pairwise(found) if batch <= other[0]), found[-2:]
    )
    return layers * max(0.0, before + (after - before) * (batch - low) / (high - low))


def rate(work: Step, way: Way, load: Load, gpus: int, batch: int) -> float:
    """Tokens/s of ``batch`` requests, at most: what GPUs tell each other is left out."""
    card = load.card
    bandwidth, arithmetic = REACHED * card.bandwidth, card.rate(way.arithmetic_bits)
    least = work.seconds(batch, gpus * bandwidth, gpus * arithmetic, load.context)
    return batch / (least + _rest(way, batch, work.layout.layers))
