"""What ``make test`` runs, the cheapest failure first, and a table of where the time went.

    python -m tests.ci            style, tests, the notebooks run once and what replays that run
    python -m tests.ci --all      also 06, the slow tests, the browser; notebooks with their own parameters

Each notebook is executed once, by the runner that readers use, and everything that judges it looks at that
execution: nbval's comparison with the stored outputs, and the pictures. One small notebook is run by
nbval's own kernel besides. A step that fails ends the run, once those beside it have ended. Copies and logs
go to build/executed/.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
# They start engines in their process, and one server; two of them have a core each.
ENGINES = ["engine", "faults", "interrupt", "measure", "ownership", "quality"]
SERVERS = ["server"]
WHOLE = ["router"]
HEADLESS = {"TUTORIAL_HEADLESS": "1", "TUTORIAL_MODEL": "embedded"}
NBVAL = ["-p", "tests.nbval_gate", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]


class StepError(Exception):
    """A step that failed; what it said is above the table."""


class Run:
    """Steps, one after the other, in the repository's root; name, status and seconds of each are kept."""

    def __init__(self):
        self.steps: list[tuple[str, str, float]] = []

    def __call__(self, name: str, *arguments: str, **environment: str) -> None:
        """Run ``python -m`` with these arguments as a step.

        Raises:
            StepError: its exit code was not 0.
        """
        print(f"\n== {name}: {' '.join(arguments)[:100]}", flush=True)
        self._step(name, arguments, environment, None)

    def beside(self, *steps: tuple[str, tuple[str, ...], dict[str, str]]) -> None:
        """Run steps, two at a time, each on a half of the cores; what one said is shown when it has ended.

        Two engines that share two cores wait for each other's threads and take several times as long; on
        one each they take little longer than alone, for much of a start keeps no more than one busy.

        Raises:
            StepError: the exit code of one was not 0; the others have ended, too.
        """
        cores = sorted(os.sched_getaffinity(0))
        halves = [half for half in (cores[::2], cores[1::2]) if half]
        names = ", ".join(name for name, *_ in steps)
        print(f"\n== beside each other, each shown when it has ended: {names}", flush=True)

        def step(name: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
            with tempfile.TemporaryFile() as said:
                try:
                    self._step(name, arguments, environment, said)
                finally:
                    said.seek(0)
                    print(f"\n== {name}: {' '.join(arguments)[:100]}\n{said.read().decode()}", flush=True)

        # A thread's cores are those of its children.
        with ThreadPoolExecutor(
            len(halves), initializer=lambda: os.sched_setaffinity(0, halves.pop())
        ) as pool:
            try:
                for one in [pool.submit(step, *one) for one in steps]:
                    one.exception()  # however it ended, the others go on
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
        if any(status != "ok" for _, status, _ in self.steps):
            raise StepError("beside")

    def _step(self, name: str, arguments: Sequence[str], environment: dict[str, str], output) -> None:
        begun, status = time.monotonic(), "interrupted"
        try:
            command = [sys.executable, "-m", *arguments]
            env = os.environ | environment
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=output).returncode
            status = "failed" if code else "ok"
        finally:
            self.steps.append((name, status, time.monotonic() - begun))
        if code:
            raise StepError(name)


def words(parameters: dict[str, str]) -> tuple[str, ...]:
    """Parameters as the runner's arguments."""
    return tuple(word for pair in parameters.items() for word in ("-p", *pair))


def tests(names: Sequence[str]) -> tuple[str, ...]:
    """Test files as pytest's arguments."""
    return tuple(f"tests/test_{name}.py" for name in names)


def without(names: Sequence[str]) -> tuple[str, ...]:
    """The same, to be left out."""
    return tuple(f"--ignore={path}" for path in tests(names))


def everything(run: Run, slow: bool = False) -> None:
    """All steps of `make test`; ``slow`` adds what `make test-all` adds, one step after the other."""
    names = COMPARED + SLOW * slow
    paths = [f"notebooks/{name}.ipynb" for name in names]
    run("style", "ruff", "check", ".")
    run("format", "ruff", "format", "--check", ".")
    run("notebook files", "pytest", *tests(FILES))  # a noisy or dull one need not be run to be refused
    shutil.rmtree(EXECUTED, ignore_errors=True)
    shutil.rmtree(BUILD / "short", ignore_errors=True)
    executed = ("helpers.tools.run", *names, "--out", str(EXECUTED))
    if slow:
        run("tests", "pytest", "tests", *without(FILES), "-m", "not browser", "--durations=25")
        run("notebooks", *executed, **HEADLESS)
    else:
        quick = ("-m", "not slow", "--durations=25")
        once = ("helpers.tools.run", "06_production", "--out", str(BUILD / "short"), *words(ONCE))
        run.beside(  # the long ones first, so that both halves end together
            ("notebooks", (*executed, *words(SHORT)), HEADLESS),
            ("tests of engines", ("pytest", *tests(ENGINES), *quick), {}),
            ("other tests", ("pytest", "tests", *without(FILES + ENGINES + SERVERS + WHOLE), *quick), {}),
            ("tests of a server", ("pytest", *tests(SERVERS), *quick), {}),
            ("06, one server", once, HEADLESS),
        )
        run("tests of two servers", "pytest", *tests(WHOLE), *quick)
    recorded = ("-p", "tests.replay", "--replay", str(EXECUTED), "--continue-on-collection-errors")
    run("nbval", "pytest", *NBVAL, *recorded, *paths)
    kernel = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300")
    run("nbval with a kernel", "pytest", *NBVAL, *kernel, f"notebooks/{REAL}.ipynb", **HEADLESS)
    if slow:
        run("browser", "pytest", "tests", "-m", "browser")  # 04 reads the records of the run above


def finish(work: Callable[[Run], None]) -> int:
    """Do the work, then show the table and the machine, however it ended; 0 if all went well."""
    run, code, begun = Run(), 0, time.monotonic()
    try:
        work(run)
    except StepError:
        code = 1
    except KeyboardInterrupt:
        code = 130
    print(f"\n{'step':20} seconds")
    for name, status, seconds in [*run.steps, ("together", "", time.monotonic() - begun)]:
        print(f"{name:20} {seconds:7.0f}  {status}".rstrip())
    machine = detect()  # how long a step takes, and what a notebook shows, depends on it
    print(f"on {machine.label}, {generation(machine) or 'older than all'}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.ci", description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also what is slow")
    slow = parser.parse_args(arguments).all
    return finish(lambda run: everything(run, slow))


if __name__ == "__main__":
    sys.exit(main())
