"""Does it fit? Weights, KV cache and the rest beside what vLLM may take, and a check against its reports.

What is computed here comes from a model's config and a data sheet; ``reconcile`` sets it beside what
vLLM reported on the machines that records are of.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from helpers.base import parameters
from helpers.base.machine import GIB
from helpers.compare.cards import Card
from helpers.model import schemes, shapes, sizes
from helpers.model.layout import Layout
from helpers.model.model import Model
from helpers.model.shapes import CONFIGS

# What vLLM needs beside weights and cache was 0.6 GiB on the L4 on record, 1.4 to 1.5 GiB on the H200 given
# an L4's memory, and 2.1 to 3.5 GiB given all of its own: vLLM takes larger batches there. Counted with is
# ``REST`` of its memory, at least ``LEAST_REST``; a fit that leaves less than ``MARGIN`` besides is close.
REST, LEAST_REST = 0.025, 3 * GIB // 2
MARGIN = 2 * GIB
UTILIZATION = 0.92  # of the memory, vLLM's default (vllm/config/cache.py)


@dataclass(frozen=True)
class Load:
    """What is asked: ``gpus`` cards, ``users`` requests at once that hold ``context`` tokens each, with
    ``prompts`` tokens of prompt that have to be read for each token of an answer.

    Raises:
        ParameterError: a number that cannot be; the message says what is allowed.
    """

    card: Card
    gpus: int = 1
    context: int = 4096
    users: int = 16
    prompts: float = 0.0

    def __post_init__(self):
        for name in ("gpus", "context", "users"):
            parameters.checked(name, getattr(self, name))
        parameters.number("prompts", self.prompts, 0, 10_000)


@dataclass(frozen=True)
class Budget:
    """What a deployment takes of its GPUs together, in bytes; ``usable`` is what vLLM may take of them.

    ``rest`` is what vLLM needs beside weights and cache: the CUDA context, activations, CUDA graphs.
    ``request`` is what one request keeps in the cache, ``token`` what a token does where no window ends.
    """

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
    def spare(self) -> int:
        """What is left; below 0 what is missing."""
        return self.usable - self.total

    @property
    def verdict(self) -> str:
        """``fits``, ``close`` (a rest as large as the largest on record would not) or ``no``."""
        return "no" if self.spare < 0 else "close" if self.spare < MARGIN else "fits"

    @property
    def room(self) -> int:
        """Bytes that are left for the KV cache."""
        return max(0, self.usable - self.weights - self.rest)

    @property
    def tokens(self) -> int:
        """Tokens of KV cache that this is room for, of all requests together."""
        return self.room // max(1, self.token)

    @property
    def at_once(self) -> int:
        """Requests that run at once; the others wait for their turn."""
        return self.room // max(1, self.request)


def rest(memory: int) -> int:
    """What vLLM is counted to need of a card beside weights and cache."""
    return max(LEAST_REST, round(REST * memory))


def budget(
    counts: Layout, weights: int, value_bytes: int, load: Load, gpus: int = 1, copies: float = 1.0
) -> Budget:
    """What a load takes of so many of its cards, beside so many bytes of weights.

    ``value_bytes`` is what a key or value takes; ``copies`` how often the cache is kept: more than once where
    there are fewer KV heads than GPUs.
    """
    memory = load.card.memory
    return Budget(
        weights=weights,
        request=max(1, round(copies * counts.request_bytes(load.context, value_bytes))),
        requests=load.users,
        rest=gpus * rest(memory),
        usable=gpus * int(memory * UTILIZATION),
        token=round(copies * counts.kv_token_bytes(value_bytes)),
    )


# -- beside what vLLM reported ------------------------------------------------------------------


@dataclass(frozen=True)
class Reconciled:
    """One record's KV cache, as vLLM reported it and as it follows from the config.

    ``rest`` is what is left of vLLM's share of the memory after weights and cache: what the cards'
    budgets have to assume; ``predicted`` are the tokens that they would allow.
    """

    row: dict
    token: int
    cache: int
    rest: int
    predicted: int


def recorded_token_bytes(row: dict, model: Model) -> int:
    """Bytes that one token took in the KV cache of a record's engine: four a value where it ran in FP32."""
    value = schemes.scheme(row["scheme"]).kv_bytes
    if row.get("kv_cache_dtype") == "fp8":  # beside a scheme that leaves the cache alone
        value = 1
    elif row.get("dtype") == "float32":
        value = 4
    return sizes.layout(model.folder).kv_token_bytes(value)


def reconcile(rows: Iterable[dict], known: dict[str, Model]) -> list[Reconciled]:
    """Set each GPU record's reported KV cache beside the config's bytes; one a model, machine and scheme.

    Args:
        known: models by the title that records call them; records of other models are passed over.
    """
    found: dict[tuple, Reconciled] = {}
    for row in rows:
        if model := known.get(row["model"]):
            token = recorded_token_bytes(row, model)
            memory = row.get("memory_bytes") or row["device_bytes"]
            share = round(memory * (row.get("utilization") or 0.9))  # that where a record does not say
            cache = token * row["kv_cache_tokens"]
            room = share - sizes.predicted_weights_bytes(row["scheme"], model.folder) - rest(memory)
            key = row["model"], row["device"], memory, row["scheme"], token
            found[key] = Reconciled(row, token, cache, share - row["weights_bytes"] - cache, room // token)
    return list(found.values())


def known_models(*more: Model) -> dict[str, Model]:
    """The models whose configs are at hand, by title: the shapes that come with this, and ``more``."""
    return {model.title: model for model in (*map(shapes.shape, CONFIGS), *more)}
