"""Does it fit? The bytes of the KV cache and the rest, the GPUs to choose from, and a check against vLLM.

What is computed here comes from a model's config and a data sheet; ``reconcile`` sets it beside what
vLLM reported on the machines that records are of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from helpers.base.machine import GIB
from helpers.compare.cards import Card, SizingError
from helpers.model import schemes, shapes, sizes
from helpers.model.model import Model
from helpers.model.schemes import SCHEMES, SchemeError
from helpers.model.shapes import CONFIGS

# -- the model ----------------------------------------------------------------------------------


def kv_token_bytes(config: dict, value_bytes: int = 2) -> int:
    """Bytes that one token's keys and values take in all layers: 2 x layers x KV heads x head size x bytes.

    *KV heads* are what grouped-query attention (GQA) saves on: Mistral-7B has 8 for its 32 query heads,
    Phi-2 one for each. A sliding window is not counted on, so for a model that has one this is an upper
    bound.

    Raises:
        SizingError: no attention as transformers' configs describe it, or a compressed cache (MLA).
    """
    config = config.get("text_config", config)  # a model that also sees images
    if config.get("kv_lora_rank"):
        raise SizingError("This model compresses its KV cache (MLA), which this formula does not describe.")
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    size = config.get("head_dim") or (heads and config.get("hidden_size", 0) // heads)
    if not (layers and heads and size):
        raise SizingError(
            "The config names no num_hidden_layers, num_attention_heads or hidden_size: not a transformer "
            "with a KV cache that can be computed from it."
        )
    return 2 * layers * (config.get("num_key_value_heads") or heads) * size * value_bytes


def config_of(model: Model) -> dict:
    """Return a model's config with its class's defaults filled in.

    Raises:
        SizingError: it has none that can be read.
    """
    from transformers import AutoConfig

    try:
        written = dict(model.config)
        kind = written.pop("model_type")
        return {**AutoConfig.for_model(kind, **written).to_dict(), "model_type": kind}
    except (OSError, KeyError, ValueError) as error:
        raise SizingError(
            f"{model.title} has no config.json that can be read ({type(error).__name__}), so nothing can be "
            "computed for it. Name a model folder, a hub model or one of the shapes that come with this."
        ) from error


# -- does it fit --------------------------------------------------------------------------------

# What vLLM needs beside weights and cache was 0.6 GiB on the L4 on record and 1.3 to 3.5 GiB on the H200:
# it grows with the model and with the card, since vLLM takes larger batches there. So a fit with less room
# than this is close.
MARGIN = 2 * GIB


@dataclass(frozen=True)
class Budget:
    """What a deployment takes of one GPU, in bytes; ``usable`` is what vLLM may take of its memory.

    ``rest`` is what vLLM needs beside weights and cache: the CUDA context, activations, CUDA graphs.
    """

    scheme: str
    weights: int
    kv_cache: int
    rest: int
    usable: int
    token: int  # bytes of one token in the KV cache

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.kv_cache + self.rest

    @property
    def fits(self) -> bool:
        """Whether that is no more than vLLM may take."""
        return self.total <= self.usable

    @property
    def close(self) -> bool:
        """Whether it fits, but a rest as large as the largest on record (``MARGIN`` more) would not."""
        return self.fits and self.total + MARGIN > self.usable

    @property
    def verdict(self) -> str:
        """In words: ``fits``, ``close`` or ``no``."""
        return "close" if self.close else "fits" if self.fits else "no"

    @property
    def tokens(self) -> int:
        """Tokens of KV cache that the memory leaves room for, of all requests together."""
        return max(0, self.usable - self.weights - self.rest) // self.token


def budget(
    model: Model,
    scheme: str,
    memory: int,
    *,
    context: int,
    concurrency: int,
    utilization: float = 0.9,
    rest: int = GIB,
) -> Budget:
    """What ``concurrency`` requests of ``context`` tokens each take under a scheme, in ``memory`` bytes.

    The scheme is taken at its word about the bytes; whether the GPU runs it is ``schemes``' business.

    Raises:
        SizingError, SchemeError: nothing can be computed from this model's config, or not this scheme.
    """
    token = kv_token_bytes(config_of(model), schemes.scheme(scheme).kv_bytes)
    weights = sizes.predicted_weights_bytes(scheme, model.folder)
    cache = token * context * concurrency
    return Budget(scheme, weights, cache, rest, math.floor(memory * utilization), token)


def budgets(model: Model, names: Iterable[str], one: Card, **load) -> dict[str, Budget | str]:
    """A card's budget for each scheme, or the sentence that says why it does not run there."""
    found: dict[str, Budget | str] = {}
    for name in names:
        try:
            schemes.scheme(name).way(one.machine)
            found[name] = budget(model, name, one.memory, **load)
        except SchemeError as error:
            found[name] = str(error)
    return found


# -- beside what vLLM reported ------------------------------------------------------------------


@dataclass(frozen=True)
class Reconciled:
    """One record's KV cache, as vLLM reported it and as it follows from the config.

    ``rest`` is what is left of vLLM's share of the memory after weights and cache: what the cards'
    budgets have to assume. None where the size of the memory or of the weights is not on record.
    """

    row: dict
    token: int
    cache: int
    rest: int | None


def recorded_token_bytes(row: dict, model: Model) -> int:
    """Bytes that one token took in the KV cache of a record's engine: four a value where it ran in FP32."""
    value = schemes.scheme(row["scheme"]).kv_bytes
    if row.get("kv_cache_dtype") == "fp8":  # beside a scheme that leaves the cache alone
        value = 1
    elif row.get("dtype") == "float32":
        value = 4
    return kv_token_bytes(config_of(model), value)


def reconcile(rows: Iterable[dict], known: dict[str, Model], utilization: float = 0.9) -> list[Reconciled]:
    """Set each record's reported KV cache beside the config's bytes; one a model, machine and scheme.

    Those of one model on one machine stand together, whenever they were recorded.

    Args:
        known: models by the title that records call them; records of other models are passed over.
        utilization: vLLM's share of the memory where a record does not name it.
    """
    found: dict[tuple, Reconciled] = {}
    for row in rows:
        model = known.get(row["model"])
        if model is None or not row["kv_cache_tokens"] or row["scheme"] not in SCHEMES:
            continue
        token = recorded_token_bytes(row, model)
        cache, weights = token * row["kv_cache_tokens"], row["weights_bytes"]
        # On a CPU the cache's size is set, whatever the memory.
        memory = row.get("memory_bytes") or (row.get("device_bytes") if row.get("driver") else None)
        share = row.get("utilization") or utilization
        rest = round(memory * share) - weights - cache if memory and weights else None
        key = row["model"], row["device"], memory, row["scheme"], token, row.get("recorded")
        found[key] = Reconciled(row, token, cache, rest)
    places = list(dict.fromkeys(key[:3] for key in found))
    return [found[key] for key in sorted(found, key=lambda key: places.index(key[:3]))]


def known_models(*more: Model) -> dict[str, Model]:
    """The models whose configs are at hand, by title: the shapes that come with this, and ``more``."""
    return {model.title: model for model in (*map(shapes.shape, CONFIGS), *more)}
