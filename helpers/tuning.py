"""Which settings come closest to the bandwidth bound: variants of each scheme, and the kernels' times.

    python -m helpers.reference --out DIR settings starts

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
from contextlib import contextmanager
from pathlib import Path

from helpers import hardware, measure, models, roofline, schemes
from helpers.engine import EngineError, open_engine

MODEL = "shape:mistral-7b"
BATCHES = (1, 64, 256)
GRAPHS = [1, 8, 32, 64, 256]  # batch sizes that get a CUDA graph: the reference runs' own, so compiled once
# One graph compiled for one request alone: Inductor then tunes it, and writes its own kernel for the
# product of a matrix and one vector, which reads faster than the general one. Costs a longer first start.
ALONE = {"compile_sizes": [1]}
# Ahead of the first request vLLM compiles kernels of every way of sampling, 15 to 30 s of each start; without
# that a kernel is compiled when a request first asks for it.
NO_WARMUP = {"kernel_config": {"enable_jit_warmup": False}}


def _variant(compilation: dict | None = None, **args) -> dict:
    graphs = {"cudagraph_capture_sizes": GRAPHS} | (compilation or {})
    return {"compilation_config": graphs, **NO_WARMUP, **args}


VARIANTS: dict[str, dict[str, dict]] = {
    "baseline": {
        "vLLM's defaults": _variant(),
        "compiled for batch 1": _variant(ALONE),
        "no async scheduling": _variant(async_scheduling=False),
    },
    "fp8": {
        "vLLM's defaults": _variant(),
        "torch's kernel": _variant(linear_backend="torch"),
        "torch's kernel, compiled for batch 1": _variant(ALONE, linear_backend="torch"),
        "Marlin (W8A16)": _variant(linear_backend="marlin"),
        "per channel": _variant(quantization="fp8_per_channel"),
    },
    "awq": {
        "vLLM's defaults": _variant(),
        "Marlin": _variant(linear_backend="marlin"),
        "Marlin, FP16": _variant(linear_backend="marlin", dtype="float16"),
    },
}


def variants(only: Sequence[str] = ()) -> list[tuple[str, str, dict]]:
    """Scheme, title and arguments of variants; those that are tuned while they compile come last.

    ``only`` are parts of their names, such as ``fp8: Marlin``; empty for all.
    """
    found = [(scheme, title, args) for scheme, of in VARIANTS.items() for title, args in of.items()]
    wanted = [one for one in found if not only or any(part in f"{one[0]}: {one[1]}" for part in only)]
    return sorted(wanted, key=lambda variant: tuned(variant[2]))


def tuned(args: dict) -> bool:
    """Whether compiling times kernels on the GPU."""
    return "compile_sizes" in args["compilation_config"]


def settings(out: Path, only: Sequence[str] = (), name: str = MODEL, opened=open_engine) -> Iterator[dict]:
    """Time variants; a row each: tokens a second by batch, share of the bound, the longest kernels.

    ``only`` are parts of their names ("fp8: Marlin"), empty for all; ``opened`` opens an engine as
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
        speeds = measure.speed(engine, list(BATCHES), seconds=0.6)
        kernels = {batch: busy(engine, batch) for batch in (BATCHES[0], BATCHES[-1])}
    bound = roofline.step(engine.model, engine.scheme, engine.machine).bound(1, bandwidth)
    return {
        "start_s": round(engine.start_s, 1),
        "kernels": engine.kernels,
        "tokens_per_s": {speed.batch: round(speed.output_tokens_per_s, 1) for speed in speeds},
        "of_the_bound": round(speeds[0].output_tokens_per_s / bound, 4),
        "busy": kernels,
    }


def busy(engine, batch: int = 1, most: int = 10) -> dict:
    """Profile decoding; microseconds a step, on the GPU together, and of the longest kernels with calls."""
    llm = engine.llm
    llm.collective_rpc("profile_start")
    rate, _ = measure._decode(engine, batch, 16, 0.25, random.Random(1))
    found = next(filter(None, llm.collective_rpc("profile_stop")))
    steps = max(1, found["steps"])
    longest = {name: [round(us / steps, 1), count / steps] for name, count, us in found["kernels"][:most]}
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


STARTS = {
    "first": {},
    "second": {},
    "second, kernels compiled when needed": NO_WARMUP,
    "eager": {"enforce_eager": True},
}


def starts(out: Path, name: str = MODEL, scheme: str = "baseline", opened=open_engine) -> Iterator[dict]:
    """Seconds of a first start, of later ones, and of an eager one; and what each gives at batch 1."""
    with _fresh_caches():
        for title, args in STARTS.items():
            begun = time.perf_counter()
            with opened(name, scheme, log_dir=out / "logs", **args) as engine:
                whole = time.perf_counter() - begun
                (speed,) = measure.speed(engine, [1], seconds=0.6)
            row = {"model": engine.model.title, "scheme": scheme, "start": title, "args": args}
            row |= {"start_s": round(engine.start_s, 1), "with_import_s": round(whole, 1)}
            yield row | {"batch_1_tokens_per_s": round(speed.output_tokens_per_s, 1)}
