"""Run the notebooks headless, in order of name; nothing that they start outlives the run.

    python -m helpers.tools.run                                all of notebooks/
    python -m helpers.tools.run 01_baseline -p max_tokens 50   one of them, with another value
    python -m helpers.tools.run --store                        run, then keep the outputs in notebooks/
    python -m helpers.tools.run 01_baseline -f set.yaml        with the values of a file

Executed copies, `records.jsonl`, `results.jsonl` (how each notebook went) and `logs/` go to `runs/<time>/`,
which `runs/latest` then names.
Exit code: 0 all went well, 1 a notebook failed or was skipped, 2 an argument was refused, 130 Ctrl+C,
143 SIGTERM. Several runs at once must be several processes: each ends *all* that was started below it.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from helpers.base import files, processes, redact
from helpers.base.records import append
from helpers.tools import pictures, store
from helpers.tools.plan import CELL_TIMEOUT_S, Notebook, Plan, Refused, Result, parameters, plan_run, shown

RECORDS, RESULTS = "records.jsonl", "results.jsonl"

SHUTDOWN_S = 10.0  # for a kernel to end: an engine interrupted in mid-flight needs 6 s to let go

KERNEL_ENVIRONMENT = {
    "TUTORIAL_HEADLESS": "1",  # no live progress bars: nobody watches, and they fill the outputs
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the debugger's message about frozen modules
}


# ---- running


def run_plan(plan: Plan) -> list[Result]:
    """Run notebooks in order of name and end every process they leave behind; one result a notebook.

    One that fails raises nothing; those that need it are skipped. How each went is in ``plan.results``, too,
    which an interrupted run has as far as it came. A line is printed for each, for a terminal a bar besides.
    """
    results, width = plan.results, max(len(name) for name in ["notebook", *plan.values])

    def finish(result: Result) -> None:
        results.append(result)
        row = {"notebook": result.name, "status": result.status, "seconds": round(result.seconds, 1)}
        append(plan.out / RESULTS, [row | {"error": result.error}], fields=())
        said = f"skipped: {result.error}" if result.status == "skipped" else result.status
        print(f"{result.name:{width}}  {result.seconds:7.1f}  {said}", flush=True)

    print(f"{'notebook':{width}}  seconds  status", flush=True)
    with processes.owned_processes() as end_leftovers:
        for notebook in plan.notebooks:
            name, status, error = notebook.path.stem, "failed", ""
            if lacking := [r.name for r in results if r.name in notebook.needs and r.status != "ok"]:
                finish(Result(name, "skipped", error=f"needs {', '.join(lacking)}"))
                continue
            at, begun = _Cell(), time.monotonic()
            try:
                error = _execute(notebook, plan, at)
                status = "failed" if error else "ok"
            except KeyboardInterrupt:
                status, error = "interrupted", str(at)
                raise
            finally:
                end_leftovers()
                # A token that a cell printed, or that an exception or vLLM's log quoted, is not kept.
                kept = [
                    plan.out / notebook.path.name,
                    plan.out / RECORDS,
                    *(plan.out / "logs").rglob("*.log"),
                ]
                with contextlib.suppress(OSError):  # a full disk: then the files are as they were
                    redact.clean(kept)
                finish(Result(name, status, time.monotonic() - begun, redact.remove(error)))
        if plan.store and all(result.status == "ok" for result in results):
            _store(plan)
    return results


class _Cell:
    """Which cell runs, as [n] in the executed copy, where the injected parameters are a cell, too."""

    number = 0

    def __call__(self, **_: Any) -> None:
        """papermill's hook, called when a code cell starts."""
        self.number += 1

    def __str__(self) -> str:
        return f"cell {self.number}" if self.number else "before the first cell"


def _execute(notebook: Notebook, plan: Plan, at: _Cell) -> str:
    """Run one notebook in a kernel of its own; what went wrong, in a line, or nothing."""
    from papermill import execute_notebook

    name = notebook.path.stem
    # Sockets that are files of a folder of its own: of ports, two runs at once may choose the same one.
    with (
        (plan.out / "logs" / f"{name}.log").open("a", encoding="utf-8") as log,
        tempfile.TemporaryDirectory() as sockets,
    ):
        try:
            execute_notebook(
                notebook.path,
                plan.out / notebook.path.name,
                parameters=plan.values[name],
                cwd=notebook.path.parent,  # as in JupyterLab
                language="python",
                kernel_name="python3",
                kernel_manager_class=_kernel_manager(log, sockets),
                execution_timeout=plan.timeout,
                on_cell_execute=at,
                progress_bar={"desc": name, "leave": False} if sys.stdout.isatty() else False,
                stdout_file=log,
                stderr_file=log,
            )
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # and then ending the kernel failed
                raise error.__context__ from None
            traceback.print_exc(file=log)
            return f"{at}: {_last_words(error, plan.timeout)}"
    return ""


def _last_words(error: Exception, timeout: int) -> str:
    """The name of what a cell raised (papermill has it in `ename`) and the last line it said."""
    name = getattr(error, "ename", type(error).__name__)
    if name == "CellTimeoutError":
        return f"{name}: no end after {timeout} s; allow more with --timeout"
    if name == "DeadKernelError":
        return f"{name}: the kernel's process crashed or was killed; was there memory left?"
    return f"{name}: " + redact.remove(str(getattr(error, "evalue", error)).strip().rpartition("\n")[2])


def _kernel_manager(log: TextIO, sockets: str) -> type:
    """A manager whose `python3` is this interpreter, whatever a user's own kernelspecs say.

    Without folders to look in, jupyter_client falls back to ipykernel's built-in specification,
    which is `sys.executable -m ipykernel_launcher`.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    environment = os.environ | KERNEL_ENVIRONMENT
    # The notebooks import the very helpers that run them, also where those are not installed.
    paths = [str(files.ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it would make each run compile what no set-up did

    class ThisPython(AsyncKernelManager):
        def __init__(self, **options: Any):
            specs = KernelSpecManager(kernel_dirs=[])
            super().__init__(**options, kernel_spec_manager=specs, shutdown_wait_time=SHUTDOWN_S)
            self.transport, self.connection_file = "ipc", f"{sockets}/kernel.json"

        async def start_kernel(self, **options: Any) -> None:
            await super().start_kernel(**options, env=environment, stdout=log, stderr=log)

    return ThisPython


def _store(plan: Plan) -> None:
    """Write all outputs into the notebooks, or none if one of them must not be stored: its result says so."""
    texts = {}
    for at, notebook in enumerate(plan.notebooks):
        executed = plan.out / notebook.path.name
        try:
            texts[notebook.path] = store.stored_text(notebook.path, notebook.text, executed)
        except ValueError as error:
            plan.results[at] = replace(plan.results[at], status="failed", error=f"not stored: {error}")
    if len(texts) == len(plan.notebooks):
        for path, text in texts.items():
            files.write_whole(path, text)
            pictures.make(path)


# ---- what is shown


def report(plan: Plan) -> str:
    """Under the table: of each failure what to look at, then where everything is."""
    said = [""]
    for result in plan.results:
        if result.status in ("failed", "interrupted"):
            copy, log = plan.out / f"{result.name}.ipynb", plan.out / "logs" / f"{result.name}.log"
            said += [f"{result.name}, {result.error}"]
            said += [f"    copy {shown(copy)}", f"    log  {shown(log)}", ""]
    records = plan.out / RECORDS
    said += [f"copies   {shown(plan.out)}"]
    said += [f"records  {shown(records) if records.exists() else 'none written'}"]
    if plan.store:
        done = [result.status for result in plan.results] == ["ok"] * len(plan.notebooks)
        said += [f"stored   {shown(plan.notebooks[0].path.parent) if done else 'nothing'}"]
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (see the top of this file)."""
    parser = argparse.ArgumentParser("python -m helpers.tools.run", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NOTEBOOK", help="such as 01_baseline (default: all)")
    add("--out", metavar="DIR", help="the folder of copies, records and logs (default: runs/<time>)")
    pair, what = ("NAME", "VALUE"), "another value for the notebooks with this parameter"
    add("-p", dest="parameters", nargs=2, action="append", default=[], metavar=pair, help=what)
    add("-f", dest="file", metavar="FILE", help="a YAML file of such values; -p wins over it")
    add("--store", action="store_true", help="keep the outputs in the notebooks themselves")
    add("--timeout", type=int, default=CELL_TIMEOUT_S, metavar="SECONDS", help="for one cell (%(default)s)")
    add("--notebooks", type=Path, default=files.ROOT / "notebooks", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    given["notebooks"] = given["notebooks"].absolute()
    try:
        given["parameters"] = parameters(given.pop("file"), given["parameters"])
        plan = plan_run(**given)
    except Refused as refused:
        print(f"helpers.tools.run: {refused}", file=sys.stderr)
        return 2

    def work() -> int:
        # Without papermill's, nbclient's and asyncio's words: the table and the log say what matters.
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        try:
            run_plan(plan)
        finally:
            print(report(plan))
        return 0 if all(result.status == "ok" for result in plan.results) else 1

    return processes.supervised(work)


if __name__ == "__main__":
    sys.exit(main())
