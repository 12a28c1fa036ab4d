"""Reference runs: what a whole machine gives, measured once and kept for every reader to compare with.

    python -m helpers.tools.reference --out notebooks/reference/my-gpu              every section, in order
    python -m helpers.tools.reference --out notebooks/reference/my-gpu swaps        one of them

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
from pathlib import Path

import nbformat

from helpers.base import machine
from helpers.base.machine import GIB
from helpers.engine.engine import open_engine
from helpers.model import embedded, lookup
from helpers.model.model import EMBEDDED
from helpers.tools import grid, sections
from helpers.tools.deployments import ROUNDS
from helpers.tools.features import features
from helpers.tools.plan import RESULTS
from helpers.tools.sections import CONTEXT, ENVELOPE, GRAPHS, KERNELS, MODELS, ROOT, SCHEMES, two_engines
from helpers.tools.served import served
from helpers.tools.variants import MODEL, choose_variants, tuned


def warm(wanted: list[tuple[str, str, dict]], at_once: int = 6) -> None:
    """Build engines once, several at a time, so that vLLM's compile cache has what the runs need.

    Compiling takes most of a first start and one core of many; the engines measured later start alone.
    """
    for name in {name for name, _, _ in wanted}:
        lookup.resolve(name)
    with ThreadPoolExecutor(at_once) as pool:
        for (name, scheme, _), seconds, error in pool.map(_warm_one, wanted):
            print("warm", name, scheme, f"{seconds:.0f} s", error, flush=True)


def to_warm(sections: list[str], names: list[str], tried=SCHEMES, only=()) -> list[tuple[str, str, dict]]:
    """Model, scheme and arguments of the engines that these sections start."""
    found = []
    if "records" in sections:
        found += [(name, scheme, GRAPHS) for name, scheme in itertools.product(names, tried)]
    if "kernels" in sections:
        found += [(MODEL, "awq", GRAPHS | args) for args in KERNELS]
    if "envelope" in sections:
        found += [(MODEL, scheme, CONTEXT | more) for scheme, more in ENVELOPE]
    if "settings" in sections:
        # What is tuned by timing it must have the GPU to itself: it is compiled when it is measured.
        variants = [(scheme, args) for scheme, _, args in choose_variants(only) if not tuned(args)]
        found += [(MODEL, scheme, args) for scheme, args in variants]
    return found


def _warm_one(wanted: tuple[str, str, dict]) -> tuple[tuple, float, str]:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "helpers.tools.reference", "--build", json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return wanted, time.perf_counter() - begun, done.stderr[-400:] if done.returncode else ""


def build(name: str, scheme: str, args: dict) -> None:
    """Build one engine and let the process end with it; others may hold the GPU meanwhile."""
    args |= {"kv_cache_memory_bytes": GIB, "gpu_memory_utilization": 0.02}
    engine = open_engine(name, scheme, **args)
    os.environ |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_LEVEL": "WARNING"}
    from vllm import LLM

    LLM(**engine.args).llm_engine.engine_core.shutdown()


# -- the lessons themselves ---------------------------------------------------------------------------


RECIPES = ("fp8", "int8", "rtn", "awq")  # of model.checkpoints, as the lessons ask for them

STARTED = re.compile(r"^(?:vLLM is ready|The server \(\w+\) answers) after ‹([\d.]+) s›", re.M)


def lessons(out: Path, names: Sequence[str] = ()) -> None:
    """Run the lessons with the embedded model, all or those of ``names``, and keep how each went.

    The quantized checkpoints are made before, all at once; every line has the seconds that this took.
    """
    folder = out / "logs/lessons"
    shutil.rmtree(folder, ignore_errors=True)
    made_s = _make_checkpoints()
    command = [sys.executable, "-m", "helpers.tools.run", *names, "--out", str(folder.absolute())]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TUTORIAL_MODEL": EMBEDDED})
    if (folder / RESULTS).exists():
        found = of_lessons(folder)
        sections.write(
            out / "lessons.jsonl", [sections.stamp() | row | {"checkpoints_s": made_s} for row in found]
        )
    if done.returncode:
        raise RuntimeError(f"A lesson did not run to its end (exit code {done.returncode}): {folder}")


def _make_checkpoints() -> float:
    """Make the embedded model and the checkpoints of it that the lessons use; return the seconds."""
    begun = time.perf_counter()
    embedded.prepare()
    command = [sys.executable, "-m", "helpers.model.checkpoints"]
    with ThreadPoolExecutor(len(RECIPES)) as pool:
        made = pool.map(lambda one: subprocess.run([*command, one, EMBEDDED], cwd=ROOT), RECIPES)
    if failed := [recipe for recipe, done in zip(RECIPES, made, strict=True) if done.returncode]:
        raise RuntimeError(f"Checkpoints that were not made: {', '.join(failed)}")
    return round(time.perf_counter() - begun, 1)


def of_lessons(folder: Path) -> list[dict]:
    """How each lesson went in a folder of ``helpers.tools.run``: seconds, and of these how many for starts.

    ``starting_s`` has the seconds of each engine and server until it was ready.
    """
    found = []
    for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        copy = nbformat.read(folder / f"{result['notebook']}.ipynb", as_version=4)
        printed = [output.get("text", "") for cell in copy.cells for output in cell.get("outputs", [])]
        starts = [float(seconds) for text in printed for seconds in STARTED.findall(text)]
        row = {"lesson": result["notebook"], "status": result["status"], "seconds": result["seconds"]}
        found.append(row | {"starting_s": starts})
    return found


SECTIONS = {
    "records": sections.measure_records,
    "deployments": grid.deployments,
    "served": served,
    "features": features,
    "kernels": sections.kernels,
    "envelope": sections.envelope,
    "failure": sections.failure,
    "swaps": sections.swaps,
    "settings": sections.settings_section,
    "starts": sections.starts_section,
    "crosscheck": sections.crosscheck_section,
    "parallel": sections.parallel,
    "lessons": lessons,
}


ANYWHERE = {"crosscheck", "features"}  # what also tells something where there is no GPU


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.tools.reference", description=__doc__.split("\n")[0]
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder of the files, such as notebooks/reference/my-gpu")
    parser.add_argument("--models", default=",".join(MODELS), help="for records (%(default)s)")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="for records (%(default)s)")
    parser.add_argument(
        "--variant", action="append", default=[], help="for settings: a name, or a part of several"
    )
    parser.add_argument("--warm-only", action="store_true", help="fill compile caches, measure nothing")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="fill compile caches, N at once")
    parser.add_argument("--rounds", default="", help=f"for deployments: of {', '.join(ROUNDS)}")
    parser.add_argument("--seconds", type=float, default=3600, help="for deployments and for served")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--two-engines", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.build:
        build(*json.loads(given.build))
        return 0
    if given.work:
        grid.work(*json.loads(given.work))
    if given.two_engines:
        two_engines()
        return 0
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are: {', '.join(SECTIONS)}")
    if given.out is None:
        parser.error("--out names the folder for the files")
    rounds = given.rounds.split(",") if given.rounds else []
    if unknown := set(rounds) - set(ROUNDS):
        parser.error(f"no round {', '.join(sorted(unknown))}; there are: {', '.join(ROUNDS)}")
    if machine.detect().kind != "cuda" and not set(given.sections or [""]) <= ANYWHERE:
        parser.error(
            "reference runs are for a GPU, and this machine shows none "
            f"({' and '.join(sorted(ANYWHERE))} run here, too)"
        )
    names, tried, only = given.models.split(","), given.schemes.split(","), given.variant
    more = {"records": [names, tried], "settings": [only], "served": [given.seconds]}
    more["deployments"] = [rounds, given.seconds]
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
