"""Engines of large models without weights, each measured alone: the rounds of ``deployments.ROUNDS``."""

import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from helpers.base.machine import detect
from helpers.base.records import PROMPT_TOKENS
from helpers.compare.bandwidth import copy_bandwidth
from helpers.engine.engine import open_engine
from helpers.measure.memory import measure_memory
from helpers.measure.speed import decode_prompts, measure_speed, random_prompts
from helpers.model import shapes
from helpers.tools.deployments import ROUNDS, WAYS, Run, engine_args, shape
from helpers.tools.recording import DONE, Job, run_round

RUNS, RUN_S = 9, 0.12  # of a load, and the seconds that each decodes


def slug(way: str) -> str:
    """A way's name as a file's."""
    return re.sub(r"\W+", "-", way)


def deployments(out: Path, names: list[str] | None = None) -> None:
    """Measure rounds, by default all that this machine has the GPUs for."""
    bandwidth, have = round(copy_bandwidth()), detect().count
    fits = [name for name, runs in ROUNDS.items() if max(run.gpus for run in runs) <= have]
    for which in names or fits:
        begun, jobs = time.monotonic(), []
        for run in ROUNDS[which]:
            way, name = WAYS[run.way], f"{run.model}-{slug(run.way)}-{run.gpus}"
            row = {"model": shapes.TITLES[run.model], "way": run.way, "scheme": way.scheme, "gpus": run.gpus}
            row |= {"weights": "random", "copy_bandwidth": bandwidth}
            ours = {"linear_backend", "kernel_config", "attention_backend"} & way.args.keys()
            row |= {"chosen_by": "us" if ours else "vLLM"}
            jobs.append(Job(name, row, f"{__name__}:work", tuple(run), run.gpus))
        run_round(jobs, out / "deployments.jsonl")
        print(f"{which}: {time.monotonic() - begun:.0f} s", flush=True)


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
        speeds, steps = ("deployments", "steps") if gpus == 1 else ("parallel", "parallel")
        for prompt, batch in loads:
            (found,) = measure_speed(llm, [batch], prompt_tokens=prompt, seconds=RUNS * RUN_S, runs=RUNS)
            figures = {name: round(value, 5) for name, value in asdict(found).items()}
            yield {"file": speeds, "runs": RUNS, **figures}
        for batch in (1, 64):
            yield {"file": steps, "batch": batch, "prompt_tokens": PROMPT_TOKENS, **busy(llm, batch)}
        yield DONE


def busy(llm, batch: int) -> dict:
    """Where a step's microseconds go: on the GPU together, and in the longest kernels, with their calls."""
    engine = llm.engine
    prompts = random_prompts(engine.model.config["vocab_size"], batch, PROMPT_TOKENS, random.Random(0))
    longest = engine.args["max_model_len"] - PROMPT_TOKENS
    decode_prompts(llm, prompts, 0.25, longest, decoding=partial(llm.collective_rpc, "profile_start"))
    found = next(filter(None, llm.collective_rpc("profile_stop")))
    steps = max(1, found["steps"])
    return {
        "steps": steps,
        "gpu_us": round(sum(us for _, _, us in found["kernels"]) / steps, 1),
        "longest": [
            [name, round(us / steps, 1), round(count / steps, 1)] for name, count, us in found["kernels"][:14]
        ],
    }
