"""Engines that start beside each other and are measured alone: a round of ``deployments.ROUNDS``.

Starting an engine is most of what an engine costs here, and most of a start is one core compiling. So a round
starts its engines at once, all in the GPU's memory together, and then measures one after the other: while one
is measured the others wait for requests, and the GPU is its own. Lines land as they come.
"""

from __future__ import annotations

import contextlib
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from helpers.base.machine import detect, visible_gpus
from helpers.compare.bandwidth import copy_bandwidth
from helpers.measure.speed import decode_prompts, random_prompts
from helpers.serve.child import Child
from helpers.tools.deployments import GPU, MODELS, ROUNDS, WAYS, Run, engine_args
from helpers.tools.recording import stamp, write

TIMES = 9
WINDOW_S = 0.12
READY_S = 210  # an engine that is not ready by then is given up, and its line says so
START_S = 100  # a round takes longer than that before it has a figure
MORE_S = 60  # that many seconds after the one before it, too
FILES = {"longest": "steps", "feature": "features"}  # by what a line has, where it is written
PRIVATE = ("model", "worker_extension_cls", "use_tqdm_on_load")  # arguments that say nothing to a reader


# -- one engine, in a process of its own ---------------------------------------------------------------


def work(say, model: str, way: str, loads: list, gpus: str) -> None:
    """Start an engine, say so, wait for the word, measure each load, and say a line for each."""
    from vllm import LLM

    folder = Path(tempfile.mkdtemp()) / MODELS[model][0]
    begun = time.perf_counter()
    run = Run(model, way, tuple(map(tuple, loads)), gpus)
    args = engine_args(model, way, run.loads, folder, run.count)
    llm = LLM(**args)
    cache = llm.llm_engine.vllm_config.cache_config
    weights = [found for found in llm.collective_rpc("weights_bytes") if found]
    say(
        start_s=round(time.perf_counter() - begun, 1),
        weights_bytes=sum(weights) or None,
        kv_cache_bytes=args["kv_cache_memory_bytes"] * run.count,
        kv_cache_tokens=cache.num_gpu_blocks * cache.block_size,
        args={key: value for key, value in args.items() if key not in PRIVATE},
    )
    sys.stdin.readline()
    rng, vocabulary = random.Random(0), MODELS[model][1]["vocab_size"]
    for prompt, batch in loads:
        say(**measure(llm, vocabulary, batch, prompt, args["max_model_len"], rng))
    for batch in (1, 64) if GPU else ():
        prompts = random_prompts(vocabulary, batch, 16, rng)
        say(batch=batch, prompt_tokens=16, **busy(llm, prompts, args["max_model_len"] - 16))
    say(done=True)


def measure(llm, vocabulary: int, batch: int, prompt: int, longest: int, rng) -> dict:
    """Nine times of decoding at one load: of nine runs, or three each of three where prompts take long."""

    def decode(tokens: int, count: int, seconds: float, windows: int) -> tuple[list[float], list[float]]:
        prompts = random_prompts(vocabulary, count, tokens, rng)
        return decode_prompts(llm, prompts, seconds, longest - tokens, windows=windows)

    runs = TIMES if batch * prompt <= 8192 else 3
    decode(min(prompt, 64), batch, 0.0, 1)
    if prompt > 16 and batch == 1:
        decode(prompt, 1, 0.0, 1)  # what is compiled when first needed
    rates, first, filled = [], [], []
    with Clocks() as clocks:
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
        **clocks.found,
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


class Clocks:
    """The GPU's clock and power while a load is measured, five times a second: their medians."""

    def __enter__(self) -> Clocks:
        self._seen: list[tuple[int, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        with contextlib.suppress(Exception):  # no GPU, no clocks
            import pynvml

            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(visible_gpus()[0])
            while not self._stop.wait(0.2):
                clock = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
                self._seen.append((clock, pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3))

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def found(self) -> dict:
        if not self._seen:
            return {"sm_mhz": None, "power_w": None}
        clocks, powers = zip(*self._seen, strict=True)
        return {"sm_mhz": statistics.median(clocks), "power_w": round(statistics.median(powers), 1)}


# -- a round of engines -----------------------------------------------------------------------------------


def slug(way: str) -> str:
    """A way's name as a file's."""
    return re.sub(r"\W+", "-", way)


def chosen(log: str) -> list[str]:
    """The kernels that vLLM's log says it chose."""
    named = re.findall(r"(?:Selected|Using) '?(\w*(?:Kernel|MARLIN|TRITON|CUTLASS|HUMMING)\w*)'?", log)
    found = named + re.findall(r"Using '?(\w+)'? (?:attention|\w* ?MoE) backend", log)
    return list(dict.fromkeys(found))


def deployments(out: Path, names: list[str], seconds: float) -> None:
    """Measure rounds, by default all, for so long; a round that could not come to its end is left out."""
    until, bandwidth, have = time.monotonic() + seconds, round(copy_bandwidth()), max(1, detect().count)
    fits = [name for name, runs in ROUNDS.items() if max(run.count for run in runs) <= have]
    for name in names or [name for name in fits if name != "tiny"]:
        if until - time.monotonic() < START_S:
            print(f"{name}: left out, {until - time.monotonic():.0f} s are too few", flush=True)
            continue
        jobs = [
            Job(
                {"model": MODELS[run.model][0], "way": run.way, "scheme": WAYS[run.way].scheme,
                 "gpus": run.count, "weights": "random",
                 "chosen_by": "us" if WAYS[run.way].forced else "vLLM", "copy_bandwidth": bandwidth},
                f"{run.model}-{slug(run.way)}-{run.count}", "helpers.tools.grid:work", run, run.gpus,
            )
            for run in ROUNDS[name]
        ]  # fmt: skip
        run_round(name, jobs, out, until)


@dataclass(frozen=True)
class Job:
    """An engine of a round: what each of its lines says, its log, and the work of its process."""

    row: dict
    log: str
    work: str
    arguments: tuple
    gpus: str = "0"


def run_round(name: str, jobs: list[Job], out: Path, until: float) -> None:
    """Start the engines of jobs beside each other, then have one after the other do its work."""
    begun = time.monotonic()
    started: list[tuple[Child, dict]] = []
    try:
        for job in jobs:
            spawn = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "CUDA_VISIBLE_DEVICES": _visible(job.gpus)}
            child = Child(job.work, out / f"logs/{job.log}.log", *job.arguments, **spawn)
            started.append((child, stamp() | job.row))
        ready, latest = [], begun + READY_S
        for child, row in started:
            first = child.line(min(until, latest))
            latest = min(latest, time.monotonic() + MORE_S)
            if first is None:
                row |= {"error": child.cause, "after_s": round(time.monotonic() - begun, 1)}
                write(out / "failed.jsonl", row)
                child.end()
            else:
                kernels = chosen(child.log.read_text(errors="replace"))
                ready.append((child, row | {"kernels": kernels} | first))
        print(f"{name}: {len(ready)} engines ready after {time.monotonic() - begun:.0f} s", flush=True)
        for child, row in ready:
            _measured(child, row | {"beside": len(ready) - 1}, out, until)
    finally:
        for child, _ in started:
            child.end()
    print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


def _visible(gpus: str) -> str:
    """A job's GPUs, counted among those that this process may use, as the driver numbers them."""
    have = visible_gpus()
    return ",".join(str(have[int(gpu)]) for gpu in gpus.split(",")) if have else gpus


def _measured(child: Child, row: dict, out: Path, until: float) -> None:
    child.tell(go=True)
    while (found := child.line(until)) is not None and "done" not in found:
        alone = next((kind for key, kind in FILES.items() if key in found), "deployments")
        kind = "parallel" if row.get("gpus", 1) > 1 else alone
        write(out / f"{kind}.jsonl", row | found)
    if not found:
        print(f"{child.log.name}: cut short: {child.cause}", flush=True)
    child.end()
