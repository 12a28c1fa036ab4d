"""Engines of large models without weights, each measured alone: the rounds of ``deployments.ROUNDS``."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.base.machine import detect
from helpers.compare.bandwidth import copy_bandwidth
from helpers.engine.engine import open_engine
from helpers.measure.memory import measure_memory
from helpers.measure.speed import decode_prompts, random_prompts
from helpers.model import shapes
from helpers.tools.deployments import ROUNDS, WAYS, Run, engine_args, shape
from helpers.tools.recording import DONE, Job, run_round

TIMES = 9
WINDOW_S = 0.12


def slug(way: str) -> str:
    """A way's name as a file's."""
    return re.sub(r"\W+", "-", way)


def deployments(out: Path, names: list[str] | None = None) -> None:
    """Measure rounds, by default all that this machine has the GPUs for."""
    bandwidth, have = round(copy_bandwidth()), detect().count
    fits = [name for name, runs in ROUNDS.items() if max(run.gpus for run in runs) <= have]
    for name in names or fits:
        begun, jobs = time.monotonic(), []
        for run in ROUNDS[name]:
            way, log = WAYS[run.way], f"{run.model}-{slug(run.way)}-{run.gpus}"
            row = {"model": shapes.TITLES[run.model], "way": run.way, "scheme": way.scheme, "gpus": run.gpus}
            row |= {"weights": "random", "copy_bandwidth": bandwidth}
            row |= {"chosen_by": "us" if way.forced else "vLLM"}
            arguments = (*run, str(out / "logs" / log))
            jobs.append(Job(out / f"logs/{log}.log", row, f"{__name__}:work", arguments, run.gpus))
        run_round(jobs, out / "deployments.jsonl")
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


def work(model: str, way: str, loads: list, gpus: int, logs: str) -> Iterator[dict]:
    """A run's engine: what it is, its speed at each load, then what its steps consist of."""
    run = Run(model, way, loads, gpus)
    args = engine_args(run)
    with open_engine(shape(model, way), log_dir=logs, **args) as llm:
        memory = measure_memory(llm)
        yield {
            "kernels": llm.engine.kernels,
            "start_s": round(llm.engine.start_s, 1),
            "weights_bytes": memory.weights,
            "kv_cache_bytes": args["kv_cache_memory_bytes"] * gpus,
            "kv_cache_tokens": memory.kv_cache_tokens,
            "args": args,
        }
        rng, vocabulary = random.Random(0), llm.engine.model.config["vocab_size"]
        speeds, steps = ("deployments", "steps") if gpus == 1 else ("parallel", "parallel")
        for prompt, batch in loads:
            yield {"file": speeds, **measure(llm, vocabulary, batch, prompt, args["max_model_len"], rng)}
        for batch in (1, 64):
            prompts = random_prompts(vocabulary, batch, 16, rng)
            found = busy(llm, prompts, args["max_model_len"] - 16)
            yield {"file": steps, "batch": batch, "prompt_tokens": 16, **found}
        yield DONE


def measure(llm, vocabulary: int, batch: int, prompt: int, longest: int, rng: random.Random) -> dict:
    """Nine times of decoding at one load: of nine runs, or three each of three where prompts take long."""

    def decode(tokens: int, count: int, seconds: float, windows: int) -> tuple[list[float], list[float]]:
        prompts = random_prompts(vocabulary, count, tokens, rng)
        return decode_prompts(llm, prompts, seconds, longest - tokens, windows=windows)

    runs = TIMES if batch * prompt <= 8192 else 3
    decode(min(prompt, 64), batch, 0.0, 1)
    if prompt > 16 and batch == 1:
        decode(prompt, 1, 0.0, 1)  # what is compiled when first needed
    rates, first, filled = [], [], []
    for _ in range(runs):
        found, ttft = decode(prompt, batch, WINDOW_S, TIMES // runs)
        rates += found
        first += ttft
        filled.append(max(ttft))
    return {
        "batch": batch,
        "prompt_tokens": prompt,
        "output_tokens_per_s": round(statistics.median(rates), 2),
        "low": round(min(rates), 2),
        "high": round(max(rates), 2),
        "times": len(rates),
        "runs": runs,
        "ttft_s": round(statistics.median(first), 5),
        "all_first_tokens_s": round(statistics.median(filled), 5),
    }


def busy(llm, prompts: list[dict], max_tokens: int) -> dict:
    """Where a step's microseconds go: on the GPU together, and in the longest kernels, with their calls."""

    def start() -> None:
        llm.collective_rpc("profile_start")

    decode_prompts(llm, prompts, 0.25, max_tokens, decoding=start)
    found = next(filter(None, llm.collective_rpc("profile_stop")))
    steps = max(1, found["steps"])
    return {
        "steps": steps,
        "gpu_us": round(sum(us for _, _, us in found["kernels"]) / steps, 1),
        "longest": [
            [name, round(us / steps, 1), round(count / steps, 1)] for name, count, us in found["kernels"][:14]
        ],
    }
