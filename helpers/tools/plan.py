"""What a run of the notebooks was asked for, checked before it starts."""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from helpers.base import redact
from helpers.base.files import ROOT

NOTEBOOKS = ROOT / "notebooks"

CELL_TIMEOUT_S = 900


class Refused(ValueError):
    """A name, a parameter or a folder that cannot be meant; nothing was started."""


@dataclass(frozen=True)
class Notebook:
    """A notebook before it runs: its text, its parameters' names, the notebooks it needs."""

    path: Path
    text: str
    parameters: list[str]
    needs: list[str]


@dataclass(frozen=True)
class Result:
    """How one notebook went. `status` is ok, failed, skipped or interrupted."""

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """A checked request: what runs, with which values (by notebook), where its files go, and how it went."""

    notebooks: list[Notebook]
    values: dict[str, dict[str, Any]]
    out: Path
    timeout: int
    store: bool
    results: list[Result] = field(default_factory=list)


def plan_run(
    names: Sequence[str] = (),
    out: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: int = CELL_TIMEOUT_S,
    store: bool = False,
    notebooks: Path = NOTEBOOKS,
) -> Plan:
    """Check a request, before papermill is imported, and make its folder.

    Args:
        names: such as `01_baseline`; all if empty.
        out: the folder of copies, records and logs; by default a new one in `runs/`, beside `notebooks`.
        parameters: new values by name; a notebook gets those that its parameters cell knows, and checks them.
        timeout: seconds that one cell may take.
        store: once all have succeeded, their outputs go into the notebooks themselves.

    Raises:
        Refused: an unknown notebook or parameter, a secret in one, an unusable folder.
    """
    if store and parameters:
        raise Refused("--store keeps what the notebooks say by themselves: run it without -p")
    chosen = _chosen(names, notebooks)
    values = _values(chosen, parameters or {})
    folder = make_folder(out, notebooks.parent / "runs")
    for notebook in chosen:
        if "out_dir" in notebook.parameters:
            values[notebook.path.stem]["out_dir"] = str(folder)
    return Plan(chosen, values, folder, timeout, store)


def _chosen(names: Sequence[str], notebooks: Path) -> list[Notebook]:
    known = sorted(path.stem for path in notebooks.glob("[!.]*.ipynb"))
    wanted = {name.removeprefix("notebooks/").removesuffix(".ipynb") for name in names}
    for name in wanted - set(known):
        raise Refused(f"no notebook {name!r}; there are: {', '.join(known)}")
    return [_read(notebooks / f"{name}.ipynb") for name in known if not wanted or name in wanted]


def _read(path: Path) -> Notebook:
    """A notebook without nbformat, which takes 0.3 s to import."""
    text, parameters = path.read_text(encoding="utf-8"), []
    try:
        content = json.loads(text)
        for cell in content["cells"]:
            if "parameters" in cell["metadata"].get("tags", ()):
                parameters += re.findall(r"^(\w+) *(?::.*)?= ", "".join(cell["source"]), re.MULTILINE)
        needs = content["metadata"].get("tutorial", {}).get("needs", [])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{path.name} cannot be read as a notebook: {error!r}") from None
    return Notebook(path, text, parameters, needs)


def _values(chosen: list[Notebook], parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each notebook's share of the parameters."""
    known = sorted({name for notebook in chosen for name in notebook.parameters} - {"out_dir"})
    for name, value in parameters.items():
        if name not in known:
            hint = "set it with --out DIR" if name == "out_dir" else f"known: {', '.join(known) or 'none'}"
            raise Refused(f"no parameter {name!r} here; {hint}")
        if redact.remove(str(value)) != str(value):
            raise Refused(f"parameter {name} holds a secret, which the copy would keep: use the environment")
    return {
        notebook.path.stem: {name: value for name, value in parameters.items() if name in notebook.parameters}
        for notebook in chosen
    }


def parameters(file: str | None, pairs: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """A set in YAML, as papermill's -f takes it; pairs of name and value win over it."""
    found = {}
    try:
        if file is not None:
            found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"cannot read the parameters in {file}: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"{file} has no lines of the form `name: value`")
    return {str(name): value for name, value in found.items()} | {name: _typed(text) for name, text in pairs}


def _typed(text: str) -> Any:
    """A value of the command line: a number, True or False as YAML reads it, else the text as it is."""
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return read if isinstance(read, int | float) else text


def make_folder(out: str | Path | None, runs: Path) -> Path:
    """Make a run's folder, by default a new one that `latest` then names, or raise Refused."""
    try:
        folder = runs / time.strftime("%Y%m%d-%H%M%S") if out is None else Path(out).absolute()
        # Raises for the second of two runs in one second.
        (folder / "logs").mkdir(parents=True, exist_ok=out is not None)
        if out is None:
            link = runs / f".latest-{os.getpid()}"
            link.symlink_to(folder.name)
            link.replace(runs / "latest")  # atomic: there is always a latest run
        return folder
    except OSError as error:
        raise Refused(f"cannot make the run's folder: {error}; name another with --out DIR") from None


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
