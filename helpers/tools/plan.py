"""What a run of the notebooks was asked for, checked before it starts."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.base import redact
from helpers.base.files import ROOT
from helpers.base.records import append

NOTEBOOKS = ROOT / "notebooks"

CELL_TIMEOUT_S = 900

RECORDS, RESULTS = "records.jsonl", "results.jsonl"


class Refused(ValueError):
    """A name, a parameter or a folder that cannot be meant; nothing was started."""


@dataclass(frozen=True)
class Notebook:
    """A notebook before it runs: its text, its parameters' defaults, the notebooks it needs."""

    path: Path
    text: str
    defaults: dict[str, Any]
    needs: list[str]


@dataclass(frozen=True)
class Plan:
    """A checked request: what runs, with which values (by notebook), where its files go, and how it went."""

    notebooks: list[Notebook]
    values: dict[str, dict[str, Any]]
    out: Path
    timeout: int
    store: bool
    results: list[Result] = field(default_factory=list)


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
    names: Sequence[str] = (),
    out: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: int = CELL_TIMEOUT_S,
    store: bool = False,
    notebooks: Path = NOTEBOOKS,
) -> Plan:
    """Check a request and make its folder.

    Args:
        names: such as `01_baseline`; all if empty.
        out: the folder of copies, records and logs; by default a new one in `runs/`, beside `notebooks`.
        parameters: new values by name; a notebook gets those that its parameters cell knows.
        timeout: seconds that one cell may take.
        store: once all have succeeded, their outputs go into the notebooks themselves.

    Raises:
        Refused: an unknown notebook or parameter, a value of the wrong type, an unusable folder.
    """
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
        for cell in content["cells"]:
            if "parameters" in cell["metadata"].get("tags", ()):
                defaults.update(_literals("".join(cell["source"])))
        needs = content["metadata"].get("tutorial", {}).get("needs", [])
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        raise Refused(f"{path.name} cannot be read as a notebook with parameters: {error!r}") from None
    return Notebook(path, text, defaults, needs)


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
        if redact.remove(str(parameters[name])) != str(parameters[name]):
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


def from_file(path: str | None) -> dict[str, Any] | list[dict[str, Any]]:
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


def write_result(out: Path, result: Result, of: str = "", records: tuple[int, int] = (0, 0)) -> None:
    """Add to `results.jsonl` how a notebook went, of which text and values, and its records' lines."""

    row = {"notebook": result.name, "status": result.status, "seconds": round(result.seconds, 1)}
    row |= {"error": result.error, "digest": of, "records": records}
    append(out / RESULTS, [row], fields=tuple(row))


def lines(path: Path) -> list[str]:
    """The lines of a file, none if it is not there; an error's text may hold what splitlines cuts at."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text.removesuffix("\n").split("\n") if text else []


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
