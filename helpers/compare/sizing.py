"""Does it fit? The bytes of the KV cache and the rest, the GPUs to choose from, and a check against vLLM.

What is computed here comes from a model's config and a data sheet; ``reconcile`` sets it beside what
vLLM reported on the machines that records are of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from helpers.base.machine import GIB
from helpers.compare.cards import Card
from helpers.model import layout, schemes, shapes, sizes
from helpers.model.model import Model
from helpers.model.schemes import SCHEMES, SchemeError
from helpers.model.shapes import CONFIGS

# -- the model ----------------------------------------------------------------------------------


def kv_token_bytes(config: dict, value_bytes: int = 2) -> int:
    """Bytes that one token's keys and values take in all layers that keep them, windows ignored.

    Of the usual attention that is 2 x layers x KV heads x head size x bytes. *KV heads* are what
    grouped-query attention (GQA) saves on: Mistral-7B has 8 for its 32 query heads, Phi-2 one for each.

    Raises:
        LayoutError: the config cannot be counted; the message says why.
    """
    return layout.read(json.dumps(config, default=str)).kv_token_bytes(value_bytes)


def config_of(model: Model) -> dict:
    """Return a model's config, of the part that reads text, with its class's defaults filled in.

    Raises:
        LayoutError: it has none that can be read.
    """
    config = layout.full_config(sizes.config_text(model.folder)).get_text_config(decoder=True)
    return config.to_dict() | {"model_type": config.model_type}


# -- does it fit --------------------------------------------------------------------------------

# What vLLM needs beside weights and cache was 0.6 GiB on the L4 on record and 1.3 to 3.5 GiB on the H200:
# it grows with the model and with the card, since vLLM takes larger batches there. So a fit with less room
# than this is close.
MARGIN = 2 * GIB
UTILIZATION = 0.92  # of the memory, vLLM's default (vllm/config/cache.py)


@dataclass(frozen=True)
class Budget:
    """What a deployment takes of one GPU, in bytes; ``usable`` is what vLLM may take of its memory.

    ``rest`` is what vLLM needs beside weights and cache: the CUDA context, activations, CUDA graphs.
    ``request`` is what one request keeps in the cache, ``token`` what a token does where no window ends.
    """

    scheme: str
    weights: int
    request: int
    requests: int
    rest: int
    usable: int
    token: int

    @property
    def kv_cache(self) -> int:
        """What all requests together keep."""
        return self.request * self.requests

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
        return self.room // max(1, self.token)

    @property
    def room(self) -> int:
        """Bytes that are left for the KV cache."""
        return max(0, self.usable - self.weights - self.rest)

    @property
    def at_once(self) -> int:
        """Requests that run at once; the others wait for their turn."""
        return self.room // max(1, self.request)


def budget(
    model: Model,
    scheme: str,
    memory: int,
    *,
    context: int,
    concurrency: int,
    utilization: float = UTILIZATION,
    rest: int = GIB,
) -> Budget:
    """What ``concurrency`` requests of ``context`` tokens each take under a scheme, in ``memory`` bytes.

    The scheme is taken at its word about the bytes; whether the GPU runs it is ``schemes``' business.

    Raises:
        LayoutError, SchemeError: nothing can be computed from this model's config, or not this scheme.
    """
    counts, value = sizes.layout(model.folder), schemes.scheme(scheme).kv_bytes
    weights = sizes.predicted_weights_bytes(scheme, model.folder)
    request, token = counts.request_bytes(context, value), counts.kv_token_bytes(value)
    return Budget(scheme, weights, request, concurrency, rest, math.floor(memory * utilization), token)


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
    return sizes.layout(model.folder).kv_token_bytes(value)


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
