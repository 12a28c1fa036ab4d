"""What ``make test`` runs, the cheapest failure first, and a table of where the time went.

    python -m tests.ci                    style, tests, the notebooks run once and what replays that run
    python -m tests.ci --all              the slow tests, 05, and the notebooks with their own parameters
    python -m tests.ci --notebooks DIR    replay the executed copies in DIR instead of running the notebooks

Each notebook is executed once, by the runner that readers use, and everything that judges it looks at that
execution: nbval's comparison with the stored outputs, the pictures, the mutants. One small notebook is
run by nbval's own kernel besides. The first step that fails ends the run.

The table goes to the terminal and, as Markdown and JSON, to build/; the copies and logs to build/executed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
EXECUTED = BUILD / "executed"
# In their order, because 04 reads what 01 to 03 wrote. 05 is left to --all: its server is tested among the
# others, and three more starts of it take minutes.
COMPARED = ["00_start_here", "01_baseline", "02_fp8", "03_awq", "04_compare_and_cost", "06_when_it_fails"]
SLOW = ["05_production"]
# Less time a measurement and less text a comparison: what is measured gets rougher, what is compared
# must not change. On a CPU without AVX-512, which emulates FP8, it saves minutes.
SHORT = {"seconds": "0.2", "quality_tokens": "512"}
REAL = "00_start_here"  # small, without an engine: nbval's own kernel runs it, too
NBVAL = ["-p", "tests.nbval_gate", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]


@dataclass(frozen=True)
class Step:
    """One row of the table: seconds that passed, and seconds of processors' time, children included."""

    name: str
    status: str
    seconds: float
    cpu_seconds: float | None = None


class StepError(Exception):
    """A step that failed; what it said is above the table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 0 if all went well, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.ci", description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also what is slow")
    parser.add_argument("--notebooks", metavar="DIR", type=Path, help="executed copies, instead of running")
    given = parser.parse_args(arguments)
    BUILD.mkdir(exist_ok=True)
    steps: list[Step] = []
    names = COMPARED + SLOW * given.all
    try:
        _steps(steps, names, given)
        code = 0
    except StepError:
        code = 1
    except KeyboardInterrupt:
        code = 130
    print(table(steps))
    write(steps)
    return code


def _steps(steps: list[Step], names: list[str], given: argparse.Namespace) -> None:
    python = [sys.executable, "-m"]
    run = _Runner(steps)
    run("style", [*python, "ruff", "check", "."])
    run("format", [*python, "ruff", "format", "--check", "."])
    run("tests", [*python, "pytest", "tests", *([] if given.all else ["-m", "not slow"]), "--durations=25"])
    executed = given.notebooks or EXECUTED
    if not given.notebooks:
        shutil.rmtree(EXECUTED, ignore_errors=True)
        short = [] if given.all else [word for pair in SHORT.items() for word in ("-p", *pair)]
        run("notebooks", [*python, "helpers.run", *names, "--out", str(executed), *short])
        steps.extend(_notebooks(executed, names))
    replay = [*python, "pytest", *NBVAL, "-p", "tests.replay", "--replay", str(executed), "--mutants"]
    replay += ["--continue-on-collection-errors"]
    run("nbval, pictures, mutants", [*replay, *(f"notebooks/{name}.ipynb" for name in names)])
    real = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300", f"notebooks/{REAL}.ipynb"]
    run(f"nbval's kernel, {REAL[:2]}", [*python, "pytest", *NBVAL, *real])


class _Runner:
    """Runs commands in the repository's root, as a headless reader of the embedded model would."""

    def __init__(self, steps: list[Step]):
        self.steps = steps

    def __call__(self, name: str, command: list[str]) -> None:
        environment = os.environ | {"TUTORIAL_HEADLESS": "1", "TUTORIAL_MODEL": "embedded"}
        if name == "tests":
            environment.pop("TUTORIAL_MODEL")
        print(f"\n== {name}: {' '.join(command[1:])[:100]}", flush=True)
        started, cpu = time.monotonic(), _cpu()
        status = "interrupted"
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment).returncode
            status = "failed" if code else "ok"
        finally:
            self.steps.append(Step(name, status, time.monotonic() - started, _cpu() - cpu))
        if code:
            raise StepError(name)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _notebooks(folder: Path, names: list[str]) -> list[Step]:
    """A row a notebook, from what papermill noted in its executed copy; a part of the row above."""
    found = []
    for name in names:
        path = folder / f"{name}.ipynb"
        note = json.loads(path.read_text())["metadata"].get("papermill", {}) if path.exists() else {}
        found.append(Step(f"  {name}", "part", note.get("duration") or 0.0))
    return found


def table(steps: list[Step]) -> str:
    """The steps in a table, parts indented, with the sum of the whole ones."""
    whole = [step for step in steps if step.status != "part"]
    total = Step("together", "", sum(s.seconds for s in whole), sum(s.cpu_seconds or 0 for s in whole))
    width = max(len(step.name) for step in [*steps, total])
    lines = ["", f"{'step':{width}}  seconds  of CPU  status"]
    for step in [*steps, total]:
        cpu = "" if step.cpu_seconds is None else f"{step.cpu_seconds:.0f}"
        lines.append(f"{step.name:{width}}  {step.seconds:7.0f}  {cpu:>6}  {step.status.replace('part', '')}")
    return "\n".join(line.rstrip() for line in lines)


def write(steps: list[Step]) -> None:
    """Keep the table in build/, for people and for programs."""
    rows = [
        f"| {re.sub('^  ', '&nbsp;&nbsp;', step.name)} | {step.seconds:.0f} | "
        f"{'' if step.cpu_seconds is None else f'{step.cpu_seconds:.0f}'} | {step.status} |"
        for step in steps
    ]
    head = ["| step | seconds | seconds of CPU | status |", "|---|---|---|---|"]
    (BUILD / "times.md").write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    (BUILD / "times.json").write_text(json.dumps([asdict(step) for step in steps], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
