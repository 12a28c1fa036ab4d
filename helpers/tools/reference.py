"""Reference runs: what a whole machine gives, measured once and kept for every reader to compare with.

    python -m helpers.tools.reference --out notebooks/reference/my-gpu              every section, in order
    python -m helpers.tools.reference --out notebooks/reference/my-gpu features     one of them
    python -m helpers.tools.reference --out notebooks/reference/my-gpu serving      one of those of two GPUs

The models are the embedded one (real weights, so its answers are compared, too) and shapes of larger ones
(``helpers.model.shapes``: true memory and speed, no words). A section appends JSON lines to files, so that it
can be repeated alone; every line names its machine and versions.
"""

import argparse
import itertools
import os
import sys
from functools import partial
from pathlib import Path

from helpers.base import records
from helpers.base.machine import MIB, detect
from helpers.base.records import PROTOCOL
from helpers.compare.bandwidth import copy_bandwidth
from helpers.engine.engine import Engine, open_engine
from helpers.engine.errors import EngineError
from helpers.measure import divergence, speed, task, trial
from helpers.measure.divergence import Reference
from helpers.measure.memory import measure_memory
from helpers.model import lookup
from helpers.model.model import Model, ModelError
from helpers.model.schemes import SchemeError
from helpers.tools import scale
from helpers.tools.deployments import ROUNDS
from helpers.tools.features import features
from helpers.tools.grid import deployments
from helpers.tools.recording import run_parts, write
from helpers.tools.served import served

MODELS = ("embedded", "shape:mistral-7b")
SCHEMES = ("baseline", "fp8", "awq", "fp8_kv", "int8")
BATCHES = (1, 8, 32, 64, 256)  # of which the lessons' engines have CUDA graphs, too
LONG = 1024  # the other input length, in tokens
LONG_BATCHES = (1, 8, 64)  # that a lesson's time allows


def measure_records(out: Path) -> None:
    """Every model under every scheme: bytes, speed at two input lengths, start and release; answers if it
    has words. What a scheme refuses (a kernel, a model class) is printed and left out.
    """
    extra = {"protocol": PROTOCOL, "copy_bandwidth": round(copy_bandwidth())}
    for name in MODELS:
        model, reference = lookup.resolve(name), None
        for scheme in SCHEMES:
            try:
                rows, reference = _one(model, scheme, reference, out)
            except (EngineError, SchemeError, ModelError) as error:
                print(f"{name} {scheme}: {error}", flush=True)
                continue
            records.append(out / "records.jsonl", [row | extra for row in rows])


def _one(model: Model, scheme: str, reference: Reference | None, out: Path) -> tuple[list[dict], Reference]:
    """A model under a scheme, as the lessons' records have it; the baseline's answers for those after it."""
    compared, recovered, perplexity = None, None, None
    with open_engine(model, scheme, log_dir=out / "logs") as llm:
        engine = llm.engine
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
    write(out / "swaps.jsonl", _swap(engine))
    rows = trial.as_rows(engine, speeds, memory, perplexity=perplexity, quality=compared, recovery=recovered)
    return rows, reference


def _swap(engine: Engine) -> dict:
    """What an engine's release gave back: each engine here follows another in the same process."""
    release = engine.release
    return {
        "swap": next(_swaps),
        "process": os.getpid(),
        "model": engine.model.title,
        "scheme": engine.scheme,
        "start_s": round(engine.start_s, 2),
        "release_s": round(release.seconds, 2),
        "device_before_mib": round(sum(release.before) / MIB, 1),
        "device_open_mib": round(sum(release.held) / MIB, 1),
        "device_after_mib": round(sum(release.after) / MIB, 1),
    }


_swaps = itertools.count(1)  # the engines that this process has had

SECTIONS = {"records": measure_records, "deployments": deployments, "served": served, "features": features}
SEVERAL = {"serving": scale.serving, "large": scale.large, "endings": scale.endings}  # of two GPUs or more


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m helpers.tools.reference", description=__doc__.split("\n")[0])
    every, several = SECTIONS | SEVERAL, ", ".join(SEVERAL)
    told = f"of {', '.join(SECTIONS)} (default: these), and on two GPUs or more of {several}"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=told)
    parser.add_argument("--out", type=Path, required=True, help="folder, such as notebooks/reference/my-gpu")
    told = f"for deployments: of {', '.join(ROUNDS)} (default: those that fit)"
    parser.add_argument("--rounds", nargs="+", metavar="ROUND", choices=ROUNDS, help=told)
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - set(every):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are: {', '.join(every)}")
    machine, needed = detect(), 2 if SEVERAL.keys() & given.sections else 1
    if machine.kind != "cuda" or machine.count < needed:
        parser.error(f"this is for {needed} GPU(s) or more, and this machine shows {machine.label}")
    every["deployments"] = partial(deployments, names=given.rounds)
    return run_parts({name: partial(every[name], given.out) for name in given.sections or SECTIONS})


if __name__ == "__main__":
    sys.exit(main())
