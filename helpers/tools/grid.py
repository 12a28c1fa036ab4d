"""Engines that start beside each other and are measured alone: a round of ``deployments.ROUNDS``.

Starting an engine is most of what an engine costs here, and most of a start is one core compiling. So a round
starts its engines at once, all in the GPU's memory together, and then measures one after the other: while one
is measured the others wait for requests, and the GPU is its own. Lines land as they come.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from helpers.base.processes import end_with
from helpers.measure.speed import decode_prompts, random_prompts
from helpers.tools.deployments import GPU, MODELS, ROUNDS, WAYS, engine_args
from helpers.tools.sections import stamp, write

TIMES = 9
WINDOW_S = 0.12
READY_S = 210  # an engine that is not ready by then is given up, and its line says so
START_S = 100  # a round takes longer than that before it has a figure
MORE_S = 60  # that many seconds after the one before it, too
PRIVATE = ("model", "worker_extension_cls", "use_tqdm_on_load")  # arguments that say nothing to a reader


# -- one engine, in a process of its own ---------------------------------------------------------------


def work(owner: int, model: str, way: str, loads: list) -> None:
    """Start an engine, say so, wait for the word, measure each load, and write a line for each."""
    end_with(owner)
    out = os.fdopen(int(os.environ["GRID_LINES"]), "w", buffering=1)

    def say(**row) -> None:
        out.write(json.dumps(row) + "\n")

    from vllm import LLM

    folder = Path(tempfile.mkdtemp()) / MODELS[model][0]
    begun = time.perf_counter()
    args = engine_args(model, way, tuple(map(tuple, loads)), folder)
    llm = LLM(**args)
    cache = llm.llm_engine.vllm_config.cache_config
    weights = [found for found in llm.collective_rpc("weights_bytes") if found]
    say(
        ready=True,
        start_s=round(time.perf_counter() - begun, 1),
        weights_bytes=sum(weights) or None,
        kv_cache_bytes=args["kv_cache_memory_bytes"],
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
    out.close()
    os._exit(0)  # who started it ends its process group


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
        "busy": True,
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
            gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
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


class Worker:
    """One engine's process, its log, and the lines it writes."""

    def __init__(self, model: str, way: str, loads: tuple, logs: Path):
        self.model, self.way = model, way
        self.log = logs / f"{model}-{slug(way)}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._read, write = os.pipe()
        environment = os.environ | {
            "GRID_LINES": str(write), "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_COLOR": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        job = json.dumps([os.getpid(), model, way, loads])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "helpers.tools.reference", "--work", job],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write,), env=environment, text=True,
                start_new_session=True,
            )  # fmt: skip
        os.close(write)
        self._rest = b""

    def line(self, until: float) -> dict | None:
        """The next line, None when it has not come by ``until`` or the process is gone."""
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            if not (more := os.read(self._read, 65536)):
                return None
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._read)

    @property
    def kernels(self) -> list[str]:
        """What vLLM's log says it chose."""
        text = self.log.read_text(errors="replace")
        named = re.findall(r"(?:Selected|Using) '?(\w*(?:Kernel|MARLIN|TRITON|CUTLASS|HUMMING)\w*)'?", text)
        found = named + re.findall(r"Using '?(\w+)'? (?:attention|\w* ?MoE) backend", text)
        return list(dict.fromkeys(found))

    @property
    def cause(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "Error" in line]
        return (lines or ["no error in its log"])[0][-400:]


def run_round(name: str, out: Path, logs: Path, until: float) -> None:
    """Start a round's engines beside each other, then measure one after the other."""
    begun = time.monotonic()
    workers = [Worker(*one, logs) for one in ROUNDS[name]]
    file, common = out / "deployments.jsonl", stamp()
    try:
        ready, latest = [], begun + READY_S
        for worker in workers:
            first = worker.line(min(until, latest))
            latest = min(latest, time.monotonic() + MORE_S)
            what = {"model": MODELS[worker.model][0], "way": worker.way, "scheme": WAYS[worker.way].scheme}
            what["chosen_by"] = "us" if WAYS[worker.way].forced else "vLLM"  # the kernel
            if first is None:
                waited = round(time.monotonic() - begun, 1)
                write(file, [common | what | {"error": worker.cause, "after_s": waited}])
                worker.end()
                continue
            first.pop("ready")
            ready.append((worker, common | what | first | {"kernels": worker.kernels, "weights": "random"}))
        print(f"{name}: {len(ready)} engines ready after {time.monotonic() - begun:.0f} s", flush=True)
        for worker, row in ready:
            _measured(worker, row | {"beside": len(ready) - 1}, file, until)
    finally:
        for worker in workers:
            if worker.process.returncode is None:
                worker.end()
    print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


def _measured(worker: Worker, row: dict, file: Path, until: float) -> None:
    begun = time.monotonic()
    worker.go()
    while (found := worker.line(until)) is not None and "done" not in found:
        name = "steps.jsonl" if found.pop("busy", False) else file.name
        write(file.with_name(name), [row | found])
    worker.end()
    how = "" if found else f", cut short: {worker.cause}"
    print(f"{worker.model} {worker.way}: {time.monotonic() - begun:.0f} s{how}", flush=True)


def deployments(out: Path, names: list[str], seconds: float) -> None:
    """Measure rounds, by default all, for so long; a round that could not come to its end is left out."""
    until = time.monotonic() + seconds
    for name in names or [name for name in ROUNDS if name != "tiny"]:
        if until - time.monotonic() < START_S:
            print(f"{name}: left out, {until - time.monotonic():.0f} s are too few", flush=True)
        else:
            run_round(name, out, out / "logs", until)
