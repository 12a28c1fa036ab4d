"""What ``make test`` runs, the cheapest failure first, and a table of where the time went.

    python -m tests.ci            style, tests, the notebooks run once and what replays that run
    python -m tests.ci --all      also 06, the slow tests, the browser; notebooks with their own parameters
    python -m tests.ci --replay   no tests, and judge the executed copies of the last run again

Each notebook is executed once, by the runner that readers use, and everything that judges it looks at that
execution: nbval's comparison with the stored outputs, and the pictures. One small notebook is run by
nbval's own kernel besides. The first step that fails ends the run.

The table goes to the terminal and, as Markdown and JSON, to build/; copies and logs to build/executed/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.base.machine import detect
from helpers.compare.cards import generation

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
EXECUTED = BUILD / "executed"
# Left to --all: their servers are tested among the others, and more starts of them take minutes.
SLOW = ["06_production", "07_scale_out"]
# In their order, because 04 reads what 01 to 03 wrote.
COMPARED = sorted({path.stem for path in (ROOT / "notebooks").glob("[!.]*.ipynb")} - {*SLOW})
# Less time a measurement, less text a comparison, shorter answers: what is measured gets rougher, and what
# is compared must not depend on it. On a CPU without AVX-512, which emulates FP8, it saves minutes.
SHORT = {"seconds": "0.2", "quality_tokens": "512", "max_tokens": "8"}
# 06 with one scheme, two levels of load and one stop: a minute of its four, run and not compared.
ONCE = {"short": "True", "levels": "4", "shares": "80", "open_seconds": "2", "requests": "16"}
REAL = "00_start_here"  # small, without an engine: nbval's own kernel runs it, too
FILES = ["notebook_files", "kinds", "lesson_form", "links", "book"]  # they only read what is committed
HEADLESS = {"TUTORIAL_HEADLESS": "1", "TUTORIAL_MODEL": "embedded"}
NBVAL = ["-p", "tests.nbval_gate", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]


class StepError(Exception):
    """A step that failed; what it said is above the table."""


@dataclass(frozen=True)
class Step:
    """One row of the table: seconds that passed, and seconds of processors' time, children included."""

    name: str
    status: str
    seconds: float
    cpu_seconds: float | None = None


class Run:
    """Steps, one after the other, in the repository's root, with a row of the table for each."""

    def __init__(self):
        self.steps: list[Step] = []

    def __call__(self, name: str, *arguments: str, **environment: str) -> None:
        """Run ``python -m`` with these arguments as a step.

        Raises:
            StepError: its exit code was not 0.
        """
        print(f"\n== {name}: {' '.join(arguments)[:100]}", flush=True)
        started, cpu, status = time.monotonic(), _cpu(), "interrupted"
        try:
            command = [sys.executable, "-m", *arguments]
            code = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode
            status = "failed" if code else "ok"
        finally:
            self.steps.append(Step(name, status, time.monotonic() - started, _cpu() - cpu))
        if code:
            raise StepError(name)

    def parts(self, folder: Path, names: Sequence[str]) -> None:
        """A row a notebook, from what papermill noted in its executed copy; they are parts of a step."""
        for name in names:
            path = folder / f"{name}.ipynb"
            note = json.loads(path.read_text())["metadata"].get("papermill", {}) if path.exists() else {}
            self.steps.append(Step(f"  {name}", "", note.get("duration") or 0.0))


def words(parameters: dict[str, str]) -> tuple[str, ...]:
    """Parameters as the runner's arguments."""
    return tuple(word for pair in parameters.items() for word in ("-p", *pair))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def everything(run: Run, slow: bool = False, replay: bool = False) -> None:
    """All steps of `make test`; ``slow`` adds what `make test-all` adds, ``replay`` runs no notebook.

    One after the other: an engine has a thread on either core and waits for both, so two engines at once
    take much more of the processors' time and save little of anybody's.
    """
    names = COMPARED + SLOW * slow
    paths = [f"notebooks/{name}.ipynb" for name in names]
    files = [f"tests/test_{name}.py" for name in FILES]
    run("style", "ruff", "check", ".")
    run("format", "ruff", "format", "--check", ".")
    run("notebook files", "pytest", *files)  # a noisy or dull one need not be run to be refused
    if not replay:
        quick = ("-m", "not browser" if slow else "not slow")
        tests = ("pytest", "tests", *(f"--ignore={path}" for path in files), *quick, "--durations=25")
        short = () if slow else words(SHORT)
        notebooks = ("helpers.tools.run", *names, "--out", str(EXECUTED), *short)
        shutil.rmtree(EXECUTED, ignore_errors=True)
        run("tests", *tests)
        try:
            run("notebooks", *notebooks, **HEADLESS)
        finally:
            run.parts(EXECUTED, names)
        if not slow:
            once = ("helpers.tools.run", "06_production", "--out", str(BUILD / "short"), *words(ONCE))
            shutil.rmtree(BUILD / "short", ignore_errors=True)
            run("06, one server", *once, **HEADLESS)
    recorded = ["-p", "tests.replay", "--replay", str(EXECUTED)]
    recorded += ["--continue-on-collection-errors"]
    run("nbval", "pytest", *NBVAL, *recorded, *paths)
    kernel = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300")
    run("nbval with a kernel", "pytest", *NBVAL, *kernel, f"notebooks/{REAL}.ipynb", **HEADLESS)
    if slow and not replay:
        run("browser", "pytest", "tests", "-m", "browser")  # 04 reads the records of the run above


def where() -> str:
    """This machine and its kind: how long a step takes, and what a notebook shows, depends on both."""
    machine = detect()
    return f"{machine.label}, {generation(machine) or 'older than all'}"


def table(steps: Sequence[Step], seconds: float, gap: str = "  ", frame: str = "") -> list[str]:
    """The steps as lines of a table, parts indented, and all that passed together."""
    total = Step("together", "", seconds, sum(step.cpu_seconds or 0 for step in steps))
    rows = [("step", "seconds", "of CPU", "")]
    for step in (*steps, total):
        cpu = "" if step.cpu_seconds is None else f"{step.cpu_seconds:.0f}"
        rows.append((step.name, f"{step.seconds:.0f}", cpu, step.status))
    width = max(len(row[0]) for row in rows)
    cells = [(f"{row[0]:{width}}", f"{row[1]:>7}", f"{row[2]:>6}", row[3]) for row in rows]
    return [f"{frame}{gap.join(row)}{frame}".rstrip() for row in cells]


def finish(work: Callable[[Run], None], build: Path = BUILD) -> int:
    """Do the work, then show and keep the table, however it ended; 0 if all went well."""
    build.mkdir(exist_ok=True)
    run, code, begun = Run(), 0, time.monotonic()
    try:
        work(run)
    except StepError:
        code = 1
    except KeyboardInterrupt:
        code = 130
    seconds = time.monotonic() - begun
    print("\n" + "\n".join([*table(run.steps, seconds), f"on {where()}"]))
    lines = table(run.steps, seconds, " | ", "|")
    lines.insert(1, "|---|--:|--:|---|")
    (build / "times.md").write_text("\n".join([*lines, "", f"On {where()}.", ""]), encoding="utf-8")
    kept = {"machine": where(), "steps": [asdict(step) for step in run.steps]}
    (build / "times.json").write_text(json.dumps(kept, indent=1) + "\n")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.ci", description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also what is slow")
    parser.add_argument("--replay", action="store_true", help="judge the last run's executed copies again")
    given = parser.parse_args(arguments)
    return finish(lambda run: everything(run, given.all, given.replay))


if __name__ == "__main__":
    sys.exit(main())
