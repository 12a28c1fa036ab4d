"""Run the notebooks headless, in order of name; nothing that they start outlives the run.

    python -m helpers.run                                all of notebooks/
    python -m helpers.run 01_baseline -p max_tokens 50   one of them, with another value
    python -m helpers.run --store                        run, then keep the outputs in notebooks/
    python -m helpers.run 01_baseline -f sets.yaml       a list of parameter sets: helpers/batch.py

Executed copies, `records.jsonl`, `results.jsonl` (how each notebook went) and `logs/` go to `runs/<time>/`,
which `runs/latest` then names.
Exit code: 0 all went well, 1 a notebook failed or was skipped, 2 an argument was refused, 130 Ctrl+C,
143 SIGTERM. Several runs at once must be several processes: each ends *all* that was started below it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from helpers import secrets
from helpers.processes import owned_processes, supervised

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
RECORDS, RESULTS = "records.jsonl", "results.jsonl"
CELL_TIMEOUT_S = 900
SHUTDOWN_S = 10.0  # for a kernel to end: an engine interrupted in mid-flight needs 6 s to let go
KERNEL_ENVIRONMENT = {
    "TUTORIAL_HEADLESS": "1",  # no live progress bars: nobody watches, and they fill the outputs
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the debugger's message about frozen modules
}


class Refused(ValueError):
    """A name, a parameter or a folder that cannot be meant; nothing was started."""


@dataclass(frozen=True)
class Notebook:
    """A notebook before it runs: its text, its parameters' defaults, the notebooks it needs."""

    path: Path
    text: str
    defaults: dict[str, Any]
    needs: list[str]
    cells: int  # code cells


@dataclass(frozen=True)
class Plan:
    """A checked request: what runs, with which values (by notebook), and where its files go."""

    notebooks: list[Notebook]
    values: dict[str, dict[str, Any]]
    out: Path
    timeout: int
    store: bool


@dataclass(frozen=True)
class Result:
    """How one notebook went. `status` is ok, failed, skipped or interrupted; `path` the executed copy."""

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""
    path: Path | None = None


# ---- checking, before anything starts and before papermill is imported


def plan_run(
    names: Sequence[str], out: str | Path | None, parameters: Mapping[str, Any] | None,
    timeout: int, store: bool, notebooks: Path,
) -> Plan:  # fmt: skip
    """Check a request (the arguments of `run_notebooks`) and make its folder, or raise Refused."""
    chosen, values = check(names, parameters, timeout, store, notebooks)
    folder = make_folder(out, notebooks.parent / "runs")
    for notebook in chosen:
        if "out_dir" in notebook.defaults:
            values[notebook.path.stem]["out_dir"] = str(folder)
    return Plan(chosen, values, folder, timeout, store)


def check(
    names: Sequence[str], parameters: Mapping[str, Any] | None, timeout: int, store: bool, notebooks: Path
) -> tuple[list[Notebook], dict[str, dict[str, Any]]]:
    """Check a request without touching the disk; return the notebooks and their values, or raise Refused."""
    if timeout <= 0:
        raise Refused(f"a cell's time must be above 0 s, not {timeout}")
    if store and parameters:
        raise Refused("--store keeps what the notebooks say by themselves: run it without -p")
    known = sorted(path.stem for path in notebooks.glob("[!.]*.ipynb"))
    wanted = {name.removeprefix("notebooks/").removesuffix(".ipynb") for name in names}
    if not known:
        raise Refused(f"no notebooks in {notebooks}")
    for name in wanted - set(known):
        raise Refused(f"no notebook {name!r}; there are: {', '.join(known)}")
    chosen = [_read(notebooks / f"{name}.ipynb") for name in known if not wanted or name in wanted]
    return chosen, _values(chosen, parameters or {})


def digest(notebook: Notebook, values: Mapping[str, Any]) -> str:
    """A notebook's cells and values in short: what its results hold for, whatever outputs are stored."""
    asked = {name: value for name, value in sorted(values.items()) if name != "out_dir"}
    cells = ["".join(cell["source"]) for cell in json.loads(notebook.text)["cells"]]
    return hashlib.sha256(f"{cells!r}\n{asked!r}".encode()).hexdigest()


def _read(path: Path) -> Notebook:
    """A notebook without nbformat, which takes 0.3 s to import."""
    text, defaults = path.read_text(encoding="utf-8"), {}
    try:
        content = json.loads(text)
        code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        for cell in code:
            if "parameters" in cell["metadata"].get("tags", ()):
                defaults.update(_literals("".join(cell["source"])))
        needs = content["metadata"].get("tutorial", {}).get("needs", [])
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        raise Refused(f"{path.name} cannot be read as a notebook with parameters: {error!r}") from None
    return Notebook(path, text, defaults, needs, sum(bool("".join(c["source"]).strip()) for c in code))


def _literals(source: str) -> Iterator[tuple[str, Any]]:
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
                yield name, ast.literal_eval(value)
            case _:
                raise ValueError(f"not `name = literal`: {ast.unparse(statement)}")


def _values(chosen: list[Notebook], parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each notebook's share of the parameters, as the types of its defaults."""
    values: dict[str, dict[str, Any]] = {notebook.path.stem: {} for notebook in chosen}
    known = sorted({name for notebook in chosen for name in notebook.defaults} - {"out_dir"})
    for name in parameters:
        if name not in known:
            hint = "set it with --out DIR" if name == "out_dir" else f"known: {', '.join(known) or 'none'}"
            raise Refused(f"no parameter {name!r} here; {hint}")
        if secrets.remove(str(parameters[name])) != str(parameters[name]):
            raise Refused(f"parameter {name} holds a secret, which the copy would keep: use the environment")
    for notebook, name in itertools.product(chosen, parameters):
        if name in notebook.defaults:
            value, default, where = parameters[name], notebook.defaults[name], notebook.path.stem
            try:
                values[where][name] = _converted(value, default)
            except ValueError:
                kind = f"{type(default).__name__} (default {default!r})"
                raise Refused(f"parameter {name} of {where} must be of type {kind}, not {value!r}") from None
    return values


def _converted(value: Any, default: Any) -> Any:
    """`value` as the type of `default`; text for a list stays text, which the notebook splits."""
    kind = type(default)
    if not isinstance(value, str):
        if default is None or type(value) is kind or (type(value), kind) == (int, float):
            return value
        raise ValueError
    if kind is bool:
        return ("false", "true").index(value.lower()) == 1
    if kind in (int, float):
        return kind(value)
    if default is None:  # no type to go by: a number, True, False or None if it reads as one
        with contextlib.suppress(SyntaxError, ValueError):
            literal = ast.literal_eval(value)
            return literal if literal is None or isinstance(literal, int | float) else value
    return value


def _from_file(path: str | None) -> dict[str, Any] | list[dict[str, Any]]:
    """A parameter set, names and values in YAML as papermill's own -f takes them, or a list of such sets."""
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"cannot read the parameters in {path}: {error}") from None
    sets = found if isinstance(found, list) else [found]
    if not all(isinstance(values, dict) for values in sets):
        raise Refused(f"{path} has no lines of the form `name: value`, and no list of sets of such lines")
    sets = [{str(name): value for name, value in values.items()} for values in sets]
    return sets if isinstance(found, list) else sets[0]


def make_folder(out: str | Path | None, runs: Path) -> Path:
    """Make a run's folder, by default a new one that `latest` then names, or raise Refused."""
    try:
        if out is not None:
            folder = Path(out).absolute()
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            return folder
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for number in itertools.count(1):  # mkdir decides between two runs that start in the same second
            folder = runs / (stamp if number == 1 else f"{stamp}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
        (folder / "logs").mkdir()
        link = runs / f".latest-{os.getpid()}"
        link.symlink_to(folder.name)
        link.replace(runs / "latest")  # atomic: there is always a latest run
        return folder
    except OSError as error:
        raise Refused(f"cannot make the run's folder: {error}; name another with --out DIR") from None


# ---- running


def run_notebooks(
    names: Sequence[str] = (),
    out: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: int = CELL_TIMEOUT_S,
    store: bool = False,
    notebooks: Path = NOTEBOOKS,
) -> list[Result]:
    """Run notebooks in order of name and end every process they leave behind.

    Args:
        names: such as `01_baseline`; all if empty.
        out: the folder of copies, records and logs; by default a new one in `runs/`.
        parameters: new values by name; a notebook gets those that its parameters cell knows.
        timeout: seconds that one cell may take.
        store: once all have succeeded, put their outputs into the notebooks themselves.
        notebooks: the folder they are in; `runs/` lies beside it.

    Returns:
        One result a notebook. One that fails raises nothing; those that need it are skipped.

    Raises:
        Refused: an unknown notebook or parameter, a value of the wrong type, an unusable folder.
    """
    return _run(plan_run(names, out, parameters, timeout, store, notebooks), Progress())


def _run(plan: Plan, progress: Progress) -> list[Result]:
    results = progress.results
    with _quiet(), owned_processes() as end_leftovers:
        for notebook in plan.notebooks:
            name, status, error = notebook.path.stem, "failed", ""
            if lacking := [r.name for r in results if r.name in notebook.needs and r.status != "ok"]:
                result = Result(name, "skipped", error=f"needs {', '.join(lacking)}")
                write_result(plan.out, result)
                progress.finish(result)
                continue
            progress.start(name, notebook.cells + bool(plan.values[name]))
            first = len(lines(plan.out / RECORDS))
            try:
                error = _execute(notebook, plan, progress)
                status = "failed" if error else "ok"
            except KeyboardInterrupt:
                status, error = "interrupted", progress.where
                raise
            finally:
                end_leftovers()
                _remove_secrets(plan, notebook)
                result = Result(
                    name, status, progress.seconds, secrets.remove(error), plan.out / notebook.path.name
                )
                of = digest(notebook, plan.values[name])
                write_result(plan.out, result, of, (first, len(lines(plan.out / RECORDS))))
                progress.finish(result)
        if plan.store and all(result.status == "ok" for result in results):
            results[:] = _store(plan, results)
    return results


def _remove_secrets(plan: Plan, notebook: Notebook) -> None:
    """A token that a cell printed, or that an exception or vLLM's log quoted, is not kept."""
    kept = [plan.out / notebook.path.name, plan.out / RECORDS, *(plan.out / "logs").rglob("*.log")]
    with contextlib.suppress(OSError):  # a full disk: then the files are as they were
        secrets.clean(kept)


def write_result(out: Path, result: Result, of: str = "", records: tuple[int, int] = (0, 0)) -> None:
    """Add to `results.jsonl` how a notebook went, of which text and values, and its records' lines."""
    from helpers.records import append  # with it come modules that refusing an argument needs not wait for

    row = {"notebook": result.name, "status": result.status, "seconds": round(result.seconds, 1)}
    row |= {"error": result.error, "digest": of, "records": records}
    append(out / RESULTS, [row], fields=tuple(row))


def lines(path: Path) -> list[str]:
    """The lines of a file, none if it is not there; an error's text may hold what splitlines cuts at."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text.removesuffix("\n").split("\n") if text else []


def _execute(notebook: Notebook, plan: Plan, progress: Progress) -> str:
    """Run one notebook in a kernel of its own; what went wrong, in a line, or nothing."""
    from papermill import execute_notebook

    def literal(path: Path) -> str:  # papermill fills in a path's {braces}
        return str(path).replace("{", "{{").replace("}", "}}")

    with (plan.out / "logs" / f"{notebook.path.stem}.log").open("a", encoding="utf-8") as log:
        try:
            execute_notebook(
                literal(notebook.path),
                literal(plan.out / notebook.path.name),
                parameters=plan.values[notebook.path.stem],
                cwd=notebook.path.parent,  # as in JupyterLab
                language="python",
                kernel_name="python3",
                kernel_manager_class=_kernel_manager(log),
                execution_timeout=plan.timeout,
                on_cell_execute=progress.next_cell,
                progress_bar=False,
                stdout_file=log,
                stderr_file=log,
            )
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # and then ending the kernel failed
                raise error.__context__ from None
            traceback.print_exc(file=log)
            return f"{progress.where}: {_last_words(error, plan.timeout)}"
    return ""


def _last_words(error: Exception, timeout: int) -> str:
    """The name of what a cell raised (papermill has it in `ename`) and the last line it said."""
    name = getattr(error, "ename", type(error).__name__)
    if name == "CellTimeoutError":
        return f"{name}: no end after {timeout} s; allow more with --timeout"
    if name == "DeadKernelError":
        return f"{name}: the kernel's process crashed or was killed; was there memory left?"
    return f"{name}: " + secrets.remove(str(getattr(error, "evalue", error)).strip().rpartition("\n")[2])


def _kernel_manager(log: TextIO) -> type:
    """A manager whose `python3` is this interpreter, whatever a user's own kernelspecs say.

    Without folders to look in, jupyter_client falls back to ipykernel's built-in specification,
    which is `sys.executable -m ipykernel_launcher`.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    environment = os.environ | KERNEL_ENVIRONMENT
    # The notebooks import the very helpers that run them, also where those are not installed.
    paths = [str(NOTEBOOKS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it would make each run compile what no set-up did
    environment.pop("PYTEST_CURRENT_TEST", None)  # with it a kernel does not capture its children's output

    class ThisPython(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _kernel_spec_manager_default(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

        @default("shutdown_wait_time")
        def _shutdown_wait_time_default(self) -> float:
            return SHUTDOWN_S

        async def start_kernel(self, **options: Any) -> None:
            await super().start_kernel(**options, env=environment, stdout=log, stderr=log)

    return ThisPython


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without papermill's, nbclient's and asyncio's logging: the table and the log say what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _store(plan: Plan, results: list[Result]) -> list[Result]:
    """Write all outputs into the notebooks, or none if one of them must not be stored."""
    from helpers import pictures, store

    texts, checked = {}, []
    for notebook, result in zip(plan.notebooks, results, strict=True):
        try:
            executed = plan.out / notebook.path.name
            texts[notebook.path] = store.stored_text(notebook.path, notebook.text, executed)
        except ValueError as error:
            result = replace(result, status="failed", error=f"not stored: {error}")
        checked.append(result)
    for path, text in texts.items() if len(texts) == len(results) else ():
        store.replace_text(path, text)
        with contextlib.suppress(ValueError):  # it shows nothing to make a picture of
            pictures.make(path)
    return checked


# ---- what is shown


@dataclass
class Progress:
    """Results so far and what runs now: on a terminal (`live`) a line that updates itself, on another
    stream a line a finished notebook, without a stream nothing."""

    stream: TextIO | None = None
    live: bool = False
    results: list[Result] = field(default_factory=list)
    cell: int = 0  # as [n] in the executed copy, where the injected parameters are a cell, too

    def start(self, name: str, cells: int) -> None:
        self.cell, self._started, self._over = 0, time.monotonic(), threading.Event()
        if self.live:
            threading.Thread(target=self._draw, args=(name, cells, self._over), daemon=True).start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def where(self) -> str:
        return f"cell {self.cell}" if self.cell else "before the first cell"

    def next_cell(self, **_: Any) -> None:
        """papermill's hook, called when a code cell starts."""
        self.cell += 1

    def _draw(self, name: str, cells: int, over: threading.Event) -> None:
        while not over.wait(0.2):
            line = f"{name}  cell {self.cell} of {cells}  {self.seconds:.0f} s"
            self._show("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])

    def finish(self, result: Result) -> None:
        self.results.append(result)
        if self.live:
            self._over.set()
        self._show("\r\x1b[K" if self.live else f"{_row(result)}\n")

    def _show(self, text: str) -> None:
        if self.stream:
            print(text, end="", file=self.stream, flush=True)


def _row(result: Result, width: int = 0) -> str:
    status = f"skipped: {result.error}" if result.status == "skipped" else result.status
    return f"{result.name:{width}}  {result.seconds:7.1f}  {status}"


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _report(results: list[Result], plan: Plan) -> str:
    """The table, under each failure what to look at, then where everything is."""

    width = max(len(name) for name in ["notebook", *plan.values])
    lines = ["", f"{'notebook':{width}}  seconds  status"]
    for result in results:
        lines.append(_row(result, width))
        if result.path and result.error:
            log = plan.out / "logs" / f"{result.name}.log"
            lines += [f"    {result.error}", f"    copy {shown(result.path)}", f"    log  {shown(log)}"]
    records = plan.out / RECORDS
    lines += ["", f"copies   {shown(plan.out)}"]
    lines += [f"records  {shown(records) if records.exists() else 'none written'}"]
    if plan.store:
        done = len(results) == len(plan.notebooks) and all(result.status == "ok" for result in results)
        lines += [f"stored   {shown(plan.notebooks[0].path.parent) if done else 'nothing'}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (see the top of this file)."""
    parser = argparse.ArgumentParser(prog="python -m helpers.run", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NOTEBOOK", help="such as 01_baseline (default: all)")
    add("--out", metavar="DIR", help="the folder of copies, records and logs (default: runs/<time>)")
    pair, what = ("NAME", "VALUE"), "another value for the notebooks with this parameter"
    add("-p", dest="parameters", nargs=2, action="append", default=[], metavar=pair, help=what)
    add(
        "-f",
        dest="file",
        metavar="FILE",
        help="a YAML file of such values, or a list of sets; -p wins over it",
    )
    add("--jobs", type=int, default=1, metavar="N", help="how many sets of a list at once (%(default)s)")
    add("--resume", metavar="DIR", help="go on with the list of sets that was run in DIR")
    add("--store", action="store_true", help="keep the outputs in the notebooks themselves")
    add("--timeout", type=int, default=CELL_TIMEOUT_S, metavar="SECONDS", help="for one cell (%(default)s)")
    add("--notebooks", type=Path, default=NOTEBOOKS, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    given["notebooks"] = given["notebooks"].absolute()
    try:
        given["parameters"] = dict(given["parameters"])
        found, jobs, folder = _from_file(given.pop("file")), given.pop("jobs"), given.pop("resume")
        if folder is not None or isinstance(found, list):
            return _batch(found, jobs, folder, **given)
        given["parameters"] = found | given["parameters"]
        plan = plan_run(**given)
    except Refused as refused:
        print(f"helpers.run: {refused}", file=sys.stderr)
        return 2

    def work() -> int:
        progress = Progress(sys.stdout, live=sys.stdout.isatty())
        try:
            _run(plan, progress)
        finally:
            print(_report(progress.results, plan))
        return 0 if all(result.status == "ok" for result in progress.results) else 1

    return supervised(work)


def _batch(
    found: list | dict, jobs: int, folder: str | None, *,
    names: list[str], out: str | None, parameters: dict, timeout: int, store: bool, notebooks: Path,
) -> int:  # fmt: skip
    """Start a list of parameter sets, or go on with one; return the exit code."""
    from helpers import batch

    if store:
        raise Refused("--store keeps what the notebooks say by themselves, not what a list of sets says")
    if folder is None:
        sets = [values | parameters for values in found]
        plan = batch.plan(names, sets, out, jobs, timeout, notebooks)
    elif names or found or parameters or out:
        raise Refused(
            "--resume takes notebooks and sets from its folder: only --jobs and --timeout go with it"
        )
    else:
        plan = batch.resume(folder, jobs, timeout, notebooks)
    return supervised(lambda: batch.work(plan))


if __name__ == "__main__":
    from helpers.run import main as imported  # by its name, as helpers.batch does: Refused is one class then

    sys.exit(imported())
