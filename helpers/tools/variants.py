"""Which settings come closest to the bandwidth bound: variants of each scheme, and the kernels' times.

    python -m helpers.tools.reference --out DIR settings starts

Batch 1 is bound by reading the weights once a token; what a step takes beyond that is kernels that read
slowly and time in which the GPU waits. Each variant is timed at batch sizes on both sides of the bend, and
its kernels at batch 1 are listed with their microseconds a token.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from helpers.compare import recorded, roofline
from helpers.compare.bandwidth import copy_bandwidth
from helpers.engine import engine
from helpers.engine.arguments import SOONER
from helpers.engine.engine import open_engine
from helpers.engine.errors import EngineError
from helpers.measure import speed
from helpers.measure.speed import measure_speed
from helpers.model import lookup
from helpers.model.schemes import SchemeError

MODEL = "shape:mistral-7b"

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
# an experiment that takes it out (unfused.py). The other entry keeps its compiled graphs apart.
_UNFUSED = {
    "worker_extension_cls": "helpers.tools.unfused.Unfused",
    "additional_config": {"silu": "Inductor's"},
}

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


def choose_variants(only: Sequence[str] = ()) -> list[tuple[str, str, dict]]:
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


def settings(
    out: Path, only: Sequence[str] = (), name: str = MODEL, opened=engine.open_engine
) -> Iterator[dict]:
    """Time variants, a row each: tokens/s by batch, with long prompts, too, share of the bound, kernels.

    ``only`` are names or parts of them (``variants``), empty for all; ``opened`` opens an engine as
    ``open_engine`` does.
    """
    model, bandwidth = lookup.resolve(name), copy_bandwidth()
    for scheme, title, args in choose_variants(only):
        row = {"model": model.title, "scheme": scheme, "variant": title, "args": args}
        row["copy_bandwidth"] = round(bandwidth)
        try:
            row |= _time(opened(model, scheme, log_dir=out / "logs", **args), bandwidth)
        except (EngineError, SchemeError) as error:
            row["error"] = str(error)[-600:]
        yield row


def _time(opening, bandwidth: float) -> dict:
    with opening as engine:
        speeds = measure_speed(
            engine, list(recorded.BATCHES), seconds=1.8, runs=9
        )  # short ones: contexts stay short
        long = measure_speed(engine, list(LONG_BATCHES), prompt_tokens=LONG, seconds=1.0, runs=5)
        kernels = {batch: busy(engine, batch) for batch in (recorded.BATCHES[0], recorded.BATCHES[-1])}
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
    rate, _ = speed.decode(engine, batch, 16, 0.25, random.Random(1), decoding=start)
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

# By title: whether the compile caches are empty, and the arguments. Ours are ``arguments.SOONER``.
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
                (speed,) = measure_speed(engine, [1], seconds=0.6)
            row = {"model": engine.model.title, "scheme": scheme, "start": title, "args": args}
            row |= {"start_s": round(engine.start_s, 1), "with_import_s": round(whole, 1)}
            yield row | {"batch_1_tokens_per_s": round(speed.output_tokens_per_s, 1)}
