"""Reference runs: what a whole machine gives, measured once and kept for every reader to compare with.

    python -m helpers.tools.reference --out notebooks/reference/my-gpu              every section, in order
    python -m helpers.tools.reference --out notebooks/reference/my-gpu features     one of them

For a GPU (``features`` also for a CPU); the models are the embedded one (real weights, so its answers are
compared, too) and shapes of larger ones (``helpers.model.shapes``: true memory and speed, no words). Each
section appends JSON lines to a file of its name, so that a section can be repeated alone; every line names
its machine and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from pathlib import Path

from helpers.base import machine, records
from helpers.base.machine import MIB
from helpers.base.records import PROTOCOL
from helpers.compare.bandwidth import copy_bandwidth
from helpers.engine.engine import open_engine
from helpers.engine.errors import EngineError
from helpers.measure import divergence, speed, task, trial
from helpers.measure.memory import measure_memory
from helpers.model import lookup, sizes
from helpers.model.model import Model, ModelError
from helpers.model.schemes import SchemeError
from helpers.tools import grid
from helpers.tools.deployments import ROUNDS
from helpers.tools.features import features
from helpers.tools.recording import run_parts, stamp, write
from helpers.tools.served import served

MODELS = ("embedded", "shape:mistral-7b")
SCHEMES = ("baseline", "fp8", "awq", "fp8_kv", "int8")
BATCHES = (1, 8, 32, 64, 256)
LONG, LONG_BATCHES = (
    1024,
    (1, 8, 64),
)  # the other input length, in tokens; batches that a lesson's time allows
# CUDA graphs for the batch sizes that are measured and for no others, and no kernels compiled ahead of the
# first request: a start then takes seconds less.
GRAPHS = {
    "compilation_config": {"cudagraph_capture_sizes": list(BATCHES)},
    "kernel_config": {"enable_jit_warmup": False},
}


def measure_records(out: Path) -> None:
    """Every model under every scheme: bytes, speed at two input lengths, start and release; answers if it
    has words. What a scheme refuses (a kernel, a model class) is printed and left out.
    """
    extra = {"protocol": PROTOCOL, "copy_bandwidth": round(copy_bandwidth()), "args": GRAPHS}
    for name in MODELS:
        model, reference = lookup.resolve(name), None
        for scheme in SCHEMES:
            try:
                rows, reference = _one(model, scheme, reference, out)
            except (EngineError, SchemeError, ModelError) as error:
                print(f"{name} {scheme}: {error}", flush=True)
                continue
            records.append(out / "records.jsonl", [row | extra for row in rows])


def _one(model: Model, scheme: str, reference, out: Path) -> tuple[list[dict], object]:
    """A model under a scheme, as the lessons' records have it; the baseline's answers for those after it."""
    compared, recovered, perplexity = None, None, None
    with opened(model, scheme, out) as engine:
        # Nine runs: with three, two recordings of 256 requests differed by more than the schemes do.
        speeds = speed.measure_speed(engine, list(BATCHES), seconds=1.8, runs=9)
        speeds += speed.measure_speed(engine, list(LONG_BATCHES), seconds=0.6, prompt_tokens=LONG)
        memory = measure_memory(engine)
        if not model.shape_only and scheme == "baseline":
            reference = divergence.keep_reference(engine, out / "logs/reference")
            perplexity = reference.perplexity
        elif reference is not None:
            compared = divergence.compare(engine, reference)
            recovered = task.recovery(reference.answers, task.answer(engine))
    rows = trial.as_rows(
        engine,
        speeds,
        memory,
        predicted_weights_bytes=sizes.predicted_weights_bytes(scheme, model.folder),
        perplexity=perplexity,
        quality=compared,
        recovery=recovered,
    )
    return rows, reference


@contextlib.contextmanager
def opened(model: Model, scheme: str, out: Path):
    """``open_engine``, and a line in ``swaps.jsonl`` once it is released: each engine here is a swap."""
    begun = time.perf_counter()
    with open_engine(model, scheme, log_dir=out / "logs", **GRAPHS) as llm:
        engine = llm.engine
        yield engine
    row = {
        "swap": next(_swaps),
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
    write(out / "swaps.jsonl", stamp() | row)


_swaps = itertools.count(1)  # the engines that this process has had

SECTIONS = ("records", "deployments", "served", "features")
ANYWHERE = {"features"}  # what also tells something where there is no GPU


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.tools.reference", description=__doc__.split("\n")[0]
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder of the files, such as notebooks/reference/my-gpu")
    parser.add_argument("--rounds", default="", help=f"for deployments: of {', '.join(ROUNDS)}")
    parser.add_argument("--seconds", type=float, default=3600, help="for all sections but records")
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are: {', '.join(SECTIONS)}")
    if given.out is None:
        parser.error("--out names the folder for the files")
    rounds = given.rounds.split(",") if given.rounds else []
    if unknown := set(rounds) - set(ROUNDS):
        parser.error(f"no round {', '.join(sorted(unknown))}; there are: {', '.join(ROUNDS)}")
    if machine.detect().kind != "cuda" and not set(given.sections or [""]) <= ANYWHERE:
        parser.error("reference runs are for a GPU, and this machine shows none (features run here, too)")
    work = {
        "records": lambda: measure_records(given.out),
        "deployments": lambda: grid.deployments(given.out, rounds, given.seconds),
        "served": lambda: served(given.out, given.seconds),
        "features": lambda: features(given.out, given.seconds),
    }
    return run_parts({section: work[section] for section in given.sections or SECTIONS})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
