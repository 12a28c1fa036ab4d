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
from contextlib import contextmanager
from pathlib import Path

from helpers import hardware, measure, models, roofline, schemes
from helpers.engine import EngineError, open_engine

MODEL = "shape:mistral-7b"
BATCHES = (1, 64, 256)
# One graph compiled for one request alone: Inductor then tunes it, and writes its own kernel for the
# product of a matrix and one vector, which reads faster than the general one. Costs a longer first start.
ALONE = {"compile_sizes": [1]}
FUSED = {"pass_config": {"fuse_norm_quant": True, "fuse_act_quant": True}}


def _variant(compilation: dict | None = None, **args) -> dict:
    return {"compilation_config": {"cudagraph_capture_sizes": list(BATCHES)} | (compilation or {})} | args


VARIANTS: dict[str, dict[str, dict]] = {
    "baseline": {
        "vLLM's defaults": _variant(),
        "compiled for batch 1": _variant(ALONE),
        "compiled for batch 1, FP16": _variant(ALONE, dtype="float16"),
        "no async scheduling": _variant(async_scheduling=False),
    },
    "fp8": {
        "vLLM's defaults": _variant(),
        "fused quantization": _variant(FUSED),
        "torch's kernel": _variant(linear_backend="torch"),
        "torch's kernel, compiled for batch 1": _variant(ALONE | FUSED, linear_backend="torch"),
        "Marlin (W8A16)": _variant(linear_backend="marlin"),
        "per channel": _variant(quantization="fp8_per_channel"),
    },
    "awq": {
        "vLLM's defaults": _variant(),
        "Marlin": _variant(linear_backend="marlin"),
        "Marlin, FP16": _variant(linear_backend="marlin", dtype="float16"),
        "Marlin, compiled for batch 1": _variant(ALONE, linear_backend="marlin"),
    },
}


def settings(out: Path, name: str = MODEL, only: str = "") -> list[dict]:
    """Time every variant; return a row each: tokens a second by batch, share of the bound, top kernels."""
    model, bandwidth, rows = models.resolve(name), hardware.copy_bandwidth(), []
    for scheme, variants in VARIANTS.items():
        for title, args in variants.items():
            if only and only not in (scheme, f"{scheme}: {title}"):
                continue
            row = {"model": model.title, "scheme": scheme, "variant": title, "args": args}
            row["copy_bandwidth"] = round(bandwidth)
            try:
                row |= _time(model, scheme, args, bandwidth, out)
            except (EngineError, schemes.SchemeError) as error:
                row["error"] = str(error)[-600:]
            rows.append(row)
            print(row, flush=True)
    return rows


def _time(model: models.Model, scheme: str, args: dict, bandwidth: float, out: Path) -> dict:
    with open_engine(model, scheme, log_dir=out / "logs", **args) as engine:
        speeds = measure.speed(engine, list(BATCHES), seconds=0.6)
        kernels = busy(engine)
    bound = roofline.step(model, scheme, engine.machine).bound(1, bandwidth)
    return {
        "start_s": round(engine.start_s, 1),
        "kernels": engine.kernels,
        "tokens_per_s": {speed.batch: round(speed.output_tokens_per_s, 1) for speed in speeds},
        "of_the_bound": round(speeds[0].output_tokens_per_s / bound, 4),
        "busy": kernels,
    }


def busy(engine, most: int = 8) -> dict:
    """Profile one request's decoding; microseconds a step on the GPU, together and of the longest kernels."""
    llm = engine.llm
    llm.collective_rpc("profile_start")
    rate, _ = measure._decode(engine, 1, 16, 0.25, random.Random(1))
    found = next(filter(None, llm.collective_rpc("profile_stop")))
    steps = max(1, found["steps"])
    longest = {name: [round(us / steps, 1), count / steps] for name, count, us in found["kernels"][:most]}
    return {
        "step_us": round(1e6 / rate, 1),
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


def starts(out: Path, name: str = MODEL, scheme: str = "baseline") -> list[dict]:
    """Seconds of a first start, of the same again, and of an eager one; and what eager costs at batch 1."""
    rows = []
    with _fresh_caches():
        for title, args in (("first", {}), ("second", {}), ("eager", {"enforce_eager": True})):
            begun = time.perf_counter()
            with open_engine(name, scheme, log_dir=out / "logs", **args) as engine:
                whole = time.perf_counter() - begun
                (speed,) = measure.speed(engine, [1], seconds=0.6)
            row = {"model": engine.model.title, "scheme": scheme, "start": title}
            row |= {"start_s": round(engine.start_s, 1), "with_import_s": round(whole, 1)}
            rows.append(row | {"batch_1_tokens_per_s": round(speed.output_tokens_per_s, 1)})
    return rows
