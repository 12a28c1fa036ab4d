"""What was recorded of vLLM's settings on a GPU, and which of them were fastest."""

from __future__ import annotations

import functools
import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from helpers.base import records
from helpers.base.records import DECODING_ALONE, NINE_TIMES, REFERENCE
from helpers.compare import cards, roofline
from helpers.model import schemes, shapes
from helpers.model.model import Model
from helpers.model.schemes import SCHEMES

BATCHES = (1, 64, 256)

DEFAULTS = "vLLM's defaults"  # the variant in which vLLM chooses for itself


# -- what was recorded ------------------------------------------------------------------------------

# By what a kernel is called: products of matrices (cuBLAS's nvjet, CUTLASS, Marlin, Machete, Humming, and
# what Inductor makes of a product with one row), and attention with its cache.
_KINDS = {
    "matrix products": re.compile(
        r"nvjet|gemm|Gemm|marlin::|humming<|splitKreduce|triton_red_fused_.*mm_.*t_(view_)?\d"
    ),
    "attention and cache": re.compile(r"[Ff]lash|reshape_and_cache|unified_attention|reduce_segments"),
}

NAMED = 0.85  # of the GPU's time must be of kernels that the record names, or it is not broken down


def recorded(folder: Path = REFERENCE) -> list[dict]:
    """The variants on record, of every machine, those that ran; several runs of one are one row.

    Its rates are medians, since some variants ran once and others six times: the fastest of unequal numbers
    would favour the latter. ``runs`` has every rate, by batch size.
    """
    found, _ = records.recorded(
        folder, "settings.jsonl", ("scheme", "variant", "device", "model", "protocol")
    )
    runs: dict[tuple, list[dict]] = {}
    for row in found:
        if "tokens_per_s" in row:
            runs.setdefault((row["device"], row["model"], row["scheme"], row["variant"]), []).append(row)
    return [_together(same) for same in runs.values()]


def _together(runs: list[dict]) -> dict:
    """The newest of one variant's runs, with the median rate of each batch size and its shortest kernels.

    It has a rate at the largest batch only if a run by ``NINE_TIMES`` does.
    """
    rates: dict[str, list[float]] = {}
    for run in runs:
        for batch, rate in run["tokens_per_s"].items():
            if int(batch) < BATCHES[-1] or run["protocol"] >= NINE_TIMES:
                rates.setdefault(batch, []).append(rate)
    # A profile that began with the reading of the prompts has its time spread over the steps.
    profiled = min(runs, key=lambda run: (run["protocol"] < DECODING_ALONE, *_untold(run["busy"]["1"])))
    alone = sorted(runs, key=lambda run: run["of_the_bound"])[len(runs) // 2]
    found = runs[-1] | {
        "tokens_per_s": {batch: statistics.median(rate) for batch, rate in rates.items()},
        "runs": {batch: sorted(rate) for batch, rate in rates.items()},
        "of_the_bound": alone["of_the_bound"],
        "copy_bandwidth": alone.get("copy_bandwidth"),
        "busy": profiled["busy"],
    }
    if not all("beside" in run for run in runs):
        found.pop("beside", None)
    return found


def _untold(seen: dict) -> tuple[bool, float]:
    """Whether too little of the GPU's time is of kernels that are named, and that time."""
    named = sum(us for us, _ in seen["longest"].values())
    return named < NAMED * seen["gpu_us"], seen["gpu_us"]


def fastest(rows: list[dict], scheme: str, batch: int) -> str:
    """The variant of a scheme that gives the most tokens/s at a batch size."""
    ours = [row for row in rows if row["scheme"] == scheme]
    return max(ours, key=lambda row: row["tokens_per_s"].get(str(batch), 0.0))["variant"]


def notable(rows: list[dict], batches: Sequence[int]) -> list[dict]:
    """The rows of vLLM's own choice and of what was fastest at a batch size, scheme by scheme."""
    found = {}
    for row in sorted(rows, key=lambda row: [*SCHEMES].index(row["scheme"])):
        names = [DEFAULTS, *(fastest(rows, row["scheme"], batch) for batch in batches)]
        if row["variant"] in names:
            found[row["scheme"], row["variant"]] = row
    return list(found.values())


def breakdown(row: dict) -> dict[str, float] | None:
    """Where the microseconds of a step of one request go, by kind of kernel; None where too few are named.

    The step is the one timed without the profiler; what the GPU was not busy for is ``GPU waits``.
    """
    seen = row["busy"]["1"]
    if _untold(seen)[0]:
        return None
    step = 1e6 / row["tokens_per_s"]["1"]
    named = sum(us for us, _ in seen["longest"].values())
    parts = dict.fromkeys([*_KINDS, "other kernels"], 0.0)
    for kernel, (us, _) in seen["longest"].items():
        kind = next((kind for kind, name in _KINDS.items() if name.search(kernel)), "other kernels")
        parts[kind] += us
    parts["other kernels"] += seen["gpu_us"] - named
    return parts | {"GPU waits": max(0.0, step - seen["gpu_us"])}


def least(row: dict, model: Model) -> float:
    """Microseconds that reading the weights of a variant takes at the bandwidth measured beside it."""
    machine = cards.card(row["device"]).machine
    return 1e6 * roofline.step(model, row["scheme"], machine).weights / row["copy_bandwidth"]


def beyond(scheme: str, variant: str, batch: float) -> float:
    """Seconds a layer that a step of ``batch`` tokens takes beyond its bytes and operations: on a line
    between two batch sizes on record, or on from the last two."""
    found = _beyond(scheme, variant)
    (low, before), (high, after) = next(
        ((one, other) for one, other in itertools.pairwise(found) if batch <= other[0]), found[-2:]
    )
    return max(0.0, before + (after - before) * (batch - low) / (high - low))


@functools.cache
def _beyond(scheme: str, variant: str) -> list[tuple[int, float]]:
    """The same of each batch size on record."""
    row = next(row for row in recorded() if (row["scheme"], row["variant"]) == (scheme, variant))
    model, card = shapes.shape(row["model"].lower()), cards.card(row["device"])
    work, entry = roofline.step(model, scheme), schemes.scheme(scheme)
    bits = 16 if "Marlin" in variant else entry.way(card.machine).arithmetic_bits
    found = []
    for batch, rate in sorted((int(batch), rate) for batch, rate in row["tokens_per_s"].items()):
        least = work.seconds(batch, row["copy_bandwidth"], card.rate(bits), 16)
        found.append((batch, max(0.0, batch / rate - least) / work.layout.layers))
    return found


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
