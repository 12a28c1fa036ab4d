"""Which settings come closest to the bandwidth bound: variants of each scheme, and the kernels' times.

    python -m helpers.reference --out DIR settings starts

Batch 1 is bound by reading the weights once a token; what a step takes beyond that is kernels that read
slowly and time in which the GPU waits. Each variant is timed at batch sizes on both sides of the bend, and
its kernels at batch 1 are listed with their microseconds a token.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from helpers import hardware, measure, models, records, roofline, schemes, sizing
from helpers.engine import SOONER, EngineError, open_engine

MODEL = "shape:mistral-7b"
BATCHES = (1, 64, 256)
LONG, LONG_BATCHES = 1024, (1, 64)  # prompts whose reading and keys take time: a kernel may lose there
GRAPHS = [1, 8, 32, 64, 256]  # batch sizes that get a CUDA graph: the reference runs' own, so compiled once
# One graph compiled for one request alone: Inductor then tunes it, and writes its own kernel for the
# product of a matrix and one vector, which reads faster than the general one. Costs a longer first start.
ALONE = {"compile_sizes": [1]}
# Programmatic dependent launch (SM 9.0 on): a kernel that Inductor wrote is set up on the GPU while the one
# before it still runs, and waits there for its data. A step of one request is some 300 short kernels.
_PDL = {"inductor_compile_config": {"triton.enable_pdl": True}}
# Ahead of the first request vLLM runs kernels of every way of sampling, so that they are compiled; without
# that one is compiled when a request first asks for it. Seconds where they are cached, more where not.
NO_WARMUP = {"kernel_config": SOONER["kernel_config"]}


def _variant(compilation: dict | None = None, **args) -> dict:
    graphs = {"cudagraph_capture_sizes": GRAPHS} | (compilation or {})
    return {"compilation_config": graphs, **NO_WARMUP, **args}


# One scale a layer for weights and activations, fixed by calibration: nothing is searched for at each step.
# It takes a checkpoint of that kind (llm-compressor's "FP8"), so it is a choice of format, not a setting.
_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
STATIC_SCALES = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _TENSOR, "input_activations": _TENSOR}},
    "ignore": ["lm_head"],
}
_STATIC = {"quantization": None, "hf_overrides": {"quantization_config": STATIC_SCALES}}

# With static scales vLLM rounds the activation in a hand-written kernel, which no argument turns off:
# an experiment that takes it out (helpers/unfused.py). The other entry keeps its compiled graphs apart.
_UNFUSED = {"worker_extension_cls": "helpers.unfused.Unfused", "additional_config": {"silu": "Inductor's"}}

# A long KV cache is read in parts by several blocks, whose results a second kernel combines: a loss where it
# is short.
_ONE_PART = {"flash_attn_max_num_splits_for_cuda_graph": 1}
# vLLM's hand-written CUDA kernels for norm, activation and rounding to FP8, instead of Inductor's.
_OWN = {"custom_ops": ["+rms_norm", "+silu_and_mul", "+quant_fp8"]}

VARIANTS: dict[str, dict[str, dict]] = {
    "baseline": {
        "vLLM's defaults": _variant(),
        "compiled for batch 1": _variant(ALONE),
        "no async scheduling": _variant(async_scheduling=False),
        "Triton attention": _variant(attention_backend="TRITON_ATTN"),
        "compiled for batch 1, Triton attention": _variant(ALONE, attention_backend="TRITON_ATTN"),
        "compiled for batch 1, Triton attention, PDL": _variant(
            ALONE | _PDL, attention_backend="TRITON_ATTN"
        ),
        "KV cache read in one part": _variant(attention_config=_ONE_PART),
    },
    "fp8": {
        "vLLM's defaults": _variant(),
        "Triton attention": _variant(attention_backend="TRITON_ATTN"),
        "torch's kernel": _variant(linear_backend="torch"),
        "torch's kernel, compiled for batch 1": _variant(ALONE, linear_backend="torch"),
        "torch's kernel, FP8 KV cache": _variant(linear_backend="torch", kv_cache_dtype="fp8"),
        "torch's kernel, vLLM's own rounding": _variant(_OWN, linear_backend="torch"),
        "torch's kernel, Triton attention": _variant(linear_backend="torch", attention_backend="TRITON_ATTN"),
        "Marlin (W8A16)": _variant(linear_backend="marlin"),
        "Humming": _variant(linear_backend="humming"),
        "per channel": _variant(quantization="fp8_per_channel"),
        "static scales": _variant(**_STATIC),
        "static scales, torch's kernel": _variant(linear_backend="torch", **_STATIC),
        "static scales, torch's kernel, FP8 KV cache": _variant(
            linear_backend="torch", kv_cache_dtype="fp8", **_STATIC
        ),
        "static scales, torch's kernel, Triton attention": _variant(
            linear_backend="torch", attention_backend="TRITON_ATTN", **_STATIC
        ),
        "static scales, torch's kernel, Triton attention, FP8 KV cache": _variant(
            linear_backend="torch", attention_backend="TRITON_ATTN", kv_cache_dtype="fp8", **_STATIC
        ),
        "static scales, torch's kernel, Triton attention, Inductor's silu": _variant(
            linear_backend="torch", attention_backend="TRITON_ATTN", **_STATIC, **_UNFUSED
        ),
        "static scales, torch's kernel, Triton attention, Inductor's silu, PDL": _variant(
            _PDL, linear_backend="torch", attention_backend="TRITON_ATTN", **_STATIC, **_UNFUSED
        ),
    },
    "awq": {
        "vLLM's defaults": _variant(),
        "Marlin": _variant(linear_backend="marlin"),
        "Marlin, Triton attention": _variant(linear_backend="marlin", attention_backend="TRITON_ATTN"),
        "Marlin, Triton attention, PDL": _variant(
            _PDL, linear_backend="marlin", attention_backend="TRITON_ATTN"
        ),
        "Humming, Triton attention": _variant(linear_backend="humming", attention_backend="TRITON_ATTN"),
        "Marlin, FP16": _variant(linear_backend="marlin", dtype="float16"),
        "Humming": _variant(linear_backend="humming"),
        "ExLlama, FP16": _variant(linear_backend="exllama", dtype="float16"),
    },
}


def variants(only: Sequence[str] = ()) -> list[tuple[str, str, dict]]:
    """Scheme, title and arguments of variants; those that are tuned while they compile come last.

    ``only`` are whole names, such as ``fp8: per channel``, or parts of several, such as ``Marlin``; empty for
    all.
    """
    found = {
        f"{scheme}: {title}": (scheme, title, args)
        for scheme, of in VARIANTS.items()
        for title, args in of.items()
    }
    wanted = [
        one
        for name, one in found.items()
        if not only or any(part == name or (part not in found and part in name) for part in only)
    ]
    return sorted(wanted, key=lambda variant: tuned(variant[2]))


def tuned(args: dict) -> bool:
    """Whether compiling times kernels on the GPU."""
    return "compile_sizes" in args["compilation_config"]


def settings(out: Path, only: Sequence[str] = (), name: str = MODEL, opened=open_engine) -> Iterator[dict]:
    """Time variants, a row each: tokens/s by batch, with long prompts, too, share of the bound, kernels.

    ``only`` are names or parts of them (``variants``), empty for all; ``opened`` opens an engine as
    ``open_engine`` does.
    """
    model, bandwidth = models.resolve(name), hardware.copy_bandwidth()
    for scheme, title, args in variants(only):
        row = {"model": model.title, "scheme": scheme, "variant": title, "args": args}
        row["copy_bandwidth"] = round(bandwidth)
        try:
            row |= _time(opened(model, scheme, log_dir=out / "logs", **args), bandwidth)
        except (EngineError, schemes.SchemeError) as error:
            row["error"] = str(error)[-600:]
        yield row


def _time(opening, bandwidth: float) -> dict:
    with opening as engine:
        speeds = measure.speed(engine, list(BATCHES), seconds=1.8, runs=9)  # short ones: contexts stay short
        long = measure.speed(engine, list(LONG_BATCHES), prompt_tokens=LONG, seconds=1.0, runs=5)
        kernels = {batch: busy(engine, batch) for batch in (BATCHES[0], BATCHES[-1])}
    bound = roofline.step(engine.model, engine.scheme, engine.machine).bound(1, bandwidth)
    return {
        "start_s": round(engine.start_s, 1),
        "kernels": engine.kernels,
        "tokens_per_s": {speed.batch: round(speed.output_tokens_per_s, 1) for speed in speeds},
        "of_the_bound": round(speeds[0].output_tokens_per_s / bound, 4),
        "long": {
            speed.batch: {
                "prompt_tokens": speed.prompt_tokens,
                "tokens_per_s": round(speed.output_tokens_per_s, 1),
                "ttft_s": round(speed.ttft_s, 4),
            }
            for speed in long
        },
        "busy": kernels,
    }


def busy(engine, batch: int = 1, most: int = 10) -> dict:
    """Profile decoding; microseconds a step, on the GPU together, and of the longest kernels with calls.

    It begins when every request has its first token: the reading of the prompts is no part of a step.
    """
    llm = engine.llm
    start = partial(llm.collective_rpc, "profile_start")
    rate, _ = measure._decode(engine, batch, 16, 0.25, random.Random(1), decoding=start)
    found = next(filter(None, llm.collective_rpc("profile_stop")))
    steps = max(1, found["steps"])
    longest: dict[str, list[float]] = {}
    for name, count, us in found["kernels"][:most]:  # names are cut: several kernels can share one
        us_before, count_before = longest.get(name, (0.0, 0.0))
        longest[name] = [round(us_before + us / steps, 1), count_before + count / steps]
    return {
        "step_us": round(1e6 * batch / rate, 1),
        "gpu_us": round(sum(us for _, _, us in found["kernels"]) / steps, 1),
        "longest": longest,
    }


# -- what was recorded ------------------------------------------------------------------------------

# By what a kernel is called: products of matrices (cuBLAS's nvjet, CUTLASS, Marlin, Machete, Humming, and
# what Inductor makes of a product with one row), and attention with its cache.
_KINDS = {
    "matrix products": re.compile(
        r"nvjet|gemm|Gemm|marlin::|humming<|splitKreduce|triton_red_fused_.*mm_.*t_(view_)?\d"
    ),
    "attention and cache": re.compile(r"[Ff]lash|reshape_and_cache|unified_attention|reduce_segments"),
}
# Profiles of earlier records began with the prompts, whose reading they spread over the steps.
DECODING_ALONE = "2026-11-25T20"
# Since then a batch is timed nine times, with Python's collector held back: before, three times without that,
# which is too short a look at the largest batch, whose steps are a few milliseconds.
NINE_RUNS = "2026-11-26T01:44"
NAMED = 0.85  # of the GPU's time must be of kernels that the record names, or it is not broken down


def recorded(folder: Path = records.REFERENCE) -> list[dict]:
    """The variants on record, of every machine, those that ran; of several runs of one, the best of each.

    What disturbs a run (the host at work for somebody else) only slows it, so the fastest says most about a
    setting; that holds for the baseline, too, which every ratio is taken to.
    """
    found, _ = records.recorded(folder, "settings.jsonl", ("scheme", "variant", "device", "model"))
    runs: dict[tuple, list[dict]] = {}
    for row in found:
        if "tokens_per_s" in row:
            runs.setdefault((row["device"], row["model"], row["scheme"], row["variant"]), []).append(row)
    return [_best_of(same) for same in runs.values()]


def _best_of(runs: list[dict]) -> dict:
    """The newest of one variant's runs, with the fastest rate of each batch size and its shortest kernels.

    It has a rate at the largest batch only if a run with ``NINE_RUNS`` does.
    """
    rates: dict[str, list[float]] = {}
    for run in runs:
        for batch, rate in run["tokens_per_s"].items():
            if int(batch) < BATCHES[-1] or run["measured_at"] >= NINE_RUNS:
                rates.setdefault(batch, []).append(rate)
    profiled = [run for run in runs if not with_prompts(run)] or runs
    kernels = {
        batch: min(
            (run["busy"][batch] for run in profiled), key=lambda seen: (not _told(seen), seen["gpu_us"])
        )
        for batch in runs[-1]["busy"]
    }
    alone = max(runs, key=lambda run: run["of_the_bound"])
    best = runs[-1] | {
        "tokens_per_s": {batch: max(found) for batch, found in rates.items()},
        "of_the_bound": alone["of_the_bound"],
        "copy_bandwidth": alone.get("copy_bandwidth"),
        "busy": kernels,
    }
    if not all("beside" in run for run in runs):
        best.pop("beside", None)
    if long := [run["long"] for run in runs if "long" in run]:  # the first runs on record had none
        best["long"] = long[-1]
    return best


def with_prompts(row: dict) -> bool:
    """Whether a row's profile holds the reading of the prompts: next to nothing for one request, a good part
    for many, whose parts then add up to more than their step.
    """
    return row["measured_at"] < DECODING_ALONE


def _told(seen: dict) -> bool:
    """Whether the kernels that are named take enough of the GPU's time to say where it goes."""
    return sum(us for us, _ in seen["longest"].values()) >= NAMED * seen["gpu_us"]


def recorded_starts(folder: Path = records.REFERENCE) -> list[dict]:
    """The starts on record, of every machine."""
    return records.recorded(folder, "starts.jsonl", ("start", "start_s", "device", "model"))[0]


def against_best(rows: list[dict], batch: int) -> list[float | None]:
    """Each row's tokens/s as a multiple of the fastest baseline's at that batch size, in the rows' order.

    None for a row without a rate there.
    """
    best = max(_rate(row, batch) for row in rows if row["scheme"] == "baseline")
    return [_rate(row, batch) / best or None for row in rows]


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
    for row in sorted(rows, key=lambda row: [*schemes.SCHEMES].index(row["scheme"])):
        names = ["vLLM's defaults", *(fastest(rows, row["scheme"], batch) for batch in batches)]
        if row["variant"] in names:
            found[row["scheme"], row["variant"]] = row
    return list(found.values())


def arguments(scheme: str, batch: int, long: bool = False, folder: Path = records.REFERENCE) -> dict:
    """``vllm.LLM`` arguments of the variant that decoded fastest at a batch size, on the GPU on record.

    After prompts of 16 tokens, or with ``long`` after those of 1,024. For another model, another GPU or
    another batch it may be another: measure yours with ``settings``. Variants that take another checkpoint
    are left out.

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
        raise schemes.SchemeError(f"No variant of {scheme!r} is on record at batch size {batch}{after}.")
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


def least(row: dict, model: models.Model) -> float:
    """Microseconds that reading the weights of a variant takes at the bandwidth measured beside it."""
    machine = sizing.card(row["device"]).machine
    return 1e6 * roofline.step(model, row["scheme"], machine).weights / row["copy_bandwidth"]


@contextmanager
def _fresh_caches():
    """Compile caches in an empty folder: a start in the block is a first one."""
    with tempfile.TemporaryDirectory() as empty:
        names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        old = {name: os.environ.get(name) for name in names}
        os.environ.update({name: f"{empty}/{name.lower()}" for name in names})
        try:
            yield
        finally:
            for name, value in old.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


_VLLMS = {"compilation_config": {}, "kernel_config": {}}  # its own choice of graphs and of kernels
# By title: whether the compile caches are empty, and the arguments. The helpers' own are ``engine.SOONER``.
STARTS = {
    "first": (True, _VLLMS),
    "second": (False, _VLLMS),
    "second, kernels compiled when needed": (False, _VLLMS | NO_WARMUP),
    "eager": (False, _VLLMS | {"enforce_eager": True}),
    "first, as in the lessons": (True, {}),
    "second, as in the lessons": (False, {}),
}


def starts(out: Path, name: str = MODEL, scheme: str = "baseline", opened=open_engine) -> Iterator[dict]:
    """Seconds of first starts, of later ones, and of an eager one; and what each gives at batch 1."""
    with ExitStack() as caches:
        for title, (first, args) in STARTS.items():
            if first:
                caches.close()
                caches.enter_context(_fresh_caches())
            begun = time.perf_counter()
            with opened(name, scheme, log_dir=out / "logs", **args) as engine:
                whole = time.perf_counter() - begun
                (speed,) = measure.speed(engine, [1], seconds=0.6)
            row = {"model": engine.model.title, "scheme": scheme, "start": title, "args": args}
            row |= {"start_s": round(engine.start_s, 1), "with_import_s": round(whole, 1)}
            yield row | {"batch_1_tokens_per_s": round(speed.output_tokens_per_s, 1)}
