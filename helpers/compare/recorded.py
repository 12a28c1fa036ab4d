"""What was recorded of vLLM's settings on a GPU, and which of them were fastest."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from helpers.base import records
from helpers.base.records import DECODING_ALONE, NINE_TIMES, REFERENCE
from helpers.compare import cards, roofline
from helpers.model.model import Model
from helpers.model.schemes import SCHEMES, SchemeError

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
    profiled = [run for run in runs if not with_prompts(run)] or runs
    kernels = {
        batch: min(
            (run["busy"][batch] for run in profiled), key=lambda seen: (not _told(seen), seen["gpu_us"])
        )
        for batch in runs[-1]["busy"]
    }
    alone = sorted(runs, key=lambda run: run["of_the_bound"])[len(runs) // 2]
    found = runs[-1] | {
        "tokens_per_s": {batch: statistics.median(rate) for batch, rate in rates.items()},
        "runs": {batch: sorted(rate) for batch, rate in rates.items()},
        "of_the_bound": alone["of_the_bound"],
        "copy_bandwidth": alone.get("copy_bandwidth"),
        "busy": kernels,
    }
    if not all("beside" in run for run in runs):
        found.pop("beside", None)
    if long := [run["long"] for run in runs if "long" in run]:  # the first runs on record had none
        found["long"] = long[-1]
    return found


def with_prompts(row: dict) -> bool:
    """Whether a row's profile holds the reading of the prompts: next to nothing for one request, a good part
    for many, whose parts then add up to more than their step.
    """
    return row["protocol"] < DECODING_ALONE


def _told(seen: dict) -> bool:
    """Whether the kernels that are named take enough of the GPU's time to say where it goes."""
    return sum(us for us, _ in seen["longest"].values()) >= NAMED * seen["gpu_us"]


def recorded_starts(folder: Path = REFERENCE) -> list[dict]:
    """The starts on record, of every machine."""
    return records.recorded(folder, "starts.jsonl", ("start", "start_s", "device", "model"))[0]


def against_baseline(rows: list[dict], batch: int) -> list[float | None]:
    """Each row's tokens/s as a multiple of the baseline's under vLLM's own settings, in the rows' order: the
    one baseline of every ratio in these lessons. None for a row without a rate at that batch size.
    """
    base = next(row for row in rows if (row["scheme"], row["variant"]) == ("baseline", DEFAULTS))
    return [_rate(row, batch) / _rate(base, batch) or None for row in rows]


def _rate(row: dict, batch: int) -> float:
    """A row's tokens/s at a batch size, 0 where it has none."""
    return row["tokens_per_s"].get(str(batch), 0.0)


def fastest(rows: list[dict], scheme: str, batch: int) -> str:
    """The variant of a scheme that gives the most tokens/s at a batch size."""
    ours = [row for row in rows if row["scheme"] == scheme]
    return max(ours, key=lambda row: _rate(row, batch))["variant"]


def notable(rows: list[dict], batches: Sequence[int]) -> list[dict]:
    """The rows of vLLM's own choice and of what was fastest at a batch size, scheme by scheme."""
    found = {}
    for row in sorted(rows, key=lambda row: [*SCHEMES].index(row["scheme"])):
        names = [DEFAULTS, *(fastest(rows, row["scheme"], batch) for batch in batches)]
        if row["variant"] in names:
            found[row["scheme"], row["variant"]] = row
    return list(found.values())


def arguments(scheme: str, batch: int, long: bool = False, folder: Path = REFERENCE) -> dict:
    """``vllm.LLM`` arguments of the variant that decoded fastest at a batch size, on the GPU on record.

    After prompts of 16 tokens, or with ``long`` after those of 1,024. For another model, another GPU or
    another batch it may be another. Variants that take another checkpoint are left out.

    Raises:
        SchemeError: no variant of the scheme is on record under that load.
    """
    rows = [row for row in recorded(folder) if row["scheme"] == scheme and "hf_overrides" not in row["args"]]
    if long:
        rates = [{b: of["tokens_per_s"] for b, of in row.get("long", {}).items()} for row in rows]
        rows = [row | {"tokens_per_s": found} for row, found in zip(rows, rates, strict=True)]
    rows = [row for row in rows if _rate(row, batch)]
    if not rows:
        after = " after long prompts" if long else ""
        raise SchemeError(f"No variant of {scheme!r} is on record at batch size {batch}{after}.")
    title = fastest(rows, scheme, batch)
    args = dict(next(row["args"] for row in rows if row["variant"] == title))
    args.pop("kernel_config")  # of the measurement, as the graphs' sizes are
    compilation = {k: v for k, v in args.pop("compilation_config").items() if k != "cudagraph_capture_sizes"}
    return args | ({"compilation_config": compilation} if compilation else {})


def breakdown(row: dict, batch: int = 1) -> dict[str, float] | None:
    """Where the microseconds of a step go, by kind of kernel, or None where too few kernels are named.

    The step is the one timed without the profiler; what the GPU was not busy for is ``GPU waits``, a least
    figure where the record is ``with_prompts``. None, too, for a row without a rate at that batch.
    """
    seen, rate = row["busy"][str(batch)], _rate(row, batch)
    if not rate or not _told(seen):
        return None
    step = 1e6 * batch / rate
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
