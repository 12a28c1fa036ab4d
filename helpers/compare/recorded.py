"""What a step took on a GPU beyond what its memory and arithmetic allow, and on what: from records."""

import functools
import itertools
import re
import statistics

from helpers.base import records
from helpers.base.records import REFERENCE
from helpers.compare import cards, roofline, sizing
from helpers.model import schemes, sizes

MODEL = "Qwen3-8B"  # of which every way is on record, those of older GPUs too
MODELS = (MODEL, "Mistral-7B")
UNTOLD = "other kernels"

# By what a kernel is called: products of matrices (cuBLAS's nvjet, CUTLASS, Marlin, Machete, Humming), and
# attention with its cache, which CUTLASS makes, too.
_KINDS = {
    "attention and cache": re.compile(r"[Ff]lash|reshape_and_cache|unified_attention|reduce_segments"),
    "matrix products": re.compile(r"nvjet|[Gg]emm|marlin::|humming<|splitKreduce"),
}


def steps(model: str = MODEL) -> dict[str, dict]:
    """By way a model's step of one request after a prompt of 16 tokens: its kernels' microseconds, and
    ``step_us``, the same without the profiler."""
    found, _ = records.recorded(REFERENCE, "steps.jsonl", ("model", "way", "batch", "longest"))
    timed, steps_ = decoded(records.deployments()), {}
    for row in found:
        same = timed.get((model, row["way"], 1))
        if same and (row["model"], row["batch"]) == (model, 1):
            steps_[row["way"]] = same[1] | row | {"step_us": 1e6 / same[1]["output_tokens_per_s"]}
    return steps_


def decoded(rows: list[dict]) -> dict[tuple[str, str, int], dict[int, dict]]:
    """By model, way and GPUs the records of engines that decode after prompts of 16 tokens, by batch."""
    found: dict[tuple[str, str, int], dict[int, dict]] = {}
    for row in rows:
        if row["prompt_tokens"] == 16 and "output_tokens_per_s" in row:
            found.setdefault((row["model"], row["way"], row.get("gpus", 1)), {})[row["batch"]] = row
    return found


def breakdown(row: dict) -> dict[str, float]:
    """Where the microseconds of one of the ``steps`` go, by kind of kernel.

    What the GPU was not busy for is ``GPU waits``; kernels that are not named are among the others.
    """
    parts = dict.fromkeys(("matrix products", "attention and cache", UNTOLD), 0.0)
    for kernel, us, _ in row["longest"]:
        parts[next((kind for kind, name in _KINDS.items() if name.search(kernel)), UNTOLD)] += us
    parts[UNTOLD] += row["gpu_us"] - sum(parts.values())
    return parts | {"GPU waits": max(0.0, row["step_us"] - row["gpu_us"])}


def share_of_bound(row: dict) -> float:
    """A dense model's tokens/s as a share of what reading its weights once a step allows, at that batch."""
    return reading_us(row) * row["output_tokens_per_s"] / row["batch"] / 1e6


def reading_us(row: dict) -> float:
    """Microseconds that reading a dense model's weights takes at the bandwidth measured beside it; of the
    embedding table a token reads a row."""
    embedding = 2 * sizes.layout(sizing.known_models()[row["model"]].folder).count("embedding")
    return 1e6 * (row["weights_bytes"] - embedding) / row["copy_bandwidth"]


def beyond(way: str, batch: float) -> float:
    """Seconds a layer that a step of ``batch`` tokens takes beyond its bytes and operations: on a line
    between two batch sizes on record, or on from the last two. An FP8 cache that was not recorded with these
    weights is taken to add nothing."""
    found = _beyond(way) or _beyond(way.removesuffix(", FP8 cache"))
    (low, before), (high, after) = next(
        ((one, other) for one, other in itertools.pairwise(found) if batch <= other[0]), found[-2:]
    )
    return max(0.0, before + (after - before) * (batch - low) / (high - low))


@functools.cache
def _beyond(way: str) -> list[tuple[int, float]]:
    """The same of each batch size on record: the mean of the models that have the way."""
    found: dict[int, list[float]] = {}
    for row in records.deployments():
        if row["model"] not in MODELS or (row["way"], row["prompt_tokens"]) != (way, 16):
            continue
        work = roofline.step(sizing.known_models()[row["model"]], row["scheme"])
        card, took = cards.card(row["device"]), row["batch"] / row["output_tokens_per_s"]
        eight = schemes.scheme(row["scheme"]).way(card.machine).arithmetic_bits == 8 and "Marlin" not in way
        computes = roofline.COMPUTES * card.rate(8 if eight else 16)
        least = work.seconds(row["batch"], row["copy_bandwidth"], computes, 16)
        found.setdefault(row["batch"], []).append(max(0.0, took - least) / work.layout.layers)
    return [(batch, statistics.mean(found[batch])) for batch in sorted(found)]


@functools.cache
def exchange_s() -> float:
    """Seconds of an all-reduce of two GPUs over NVLink for one request: the median on record."""
    return statistics.median(
        us / calls / 1e6
        for row in records.parallel()
        if (row["gpus"], row["batch"]) == (2, 1)
        for kernel, us, calls in row.get("longest", ())
        if "cross_device_reduce" in kernel
    )
