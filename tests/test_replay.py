"""The recorded execution in nbval's hands: the same verdicts as with a kernel, and each kind of rot found."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.base.files import ROOT
from helpers.tools import plan, run

RULES = ROOT / "tests" / "nbval_sanitize.cfg"
SOURCES = [
    "import sys",
    "print('one')\nprint('two')",
    "print('three ‹0.1 s› four')",
    "print('out'); print('err', file=sys.stderr); 'result'",
    "print('five')\nsys.stdout.flush()\ndisplay('shown')\nprint('six')",
]


def nbval(folder: Path, *arguments: str) -> tuple[set[str], str]:
    """Run pytest on a folder of notebooks; the names of what failed, and all that it said."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-q"]
    command += ["--rootdir", str(folder), "--continue-on-collection-errors"]
    command += ["--nbval-sanitize-with", str(RULES), *arguments, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    named = r"^(?:FAILED|ERROR) (?:\S*/)?([\w.]+::[\w ]*\w|[\w.]+\.ipynb)"  # a message may follow
    failed = set(re.findall(named, done.stdout, re.M))
    assert bool(failed) == bool(done.returncode), done.stdout + done.stderr
    return failed, done.stdout


def replay(stored: Path, executed: Path, *arguments: str) -> tuple[set[str], str]:
    return nbval(stored, "-p", "tests.replay", "--replay", str(executed), *arguments)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A small notebook, run by the runner: the folder of its executed copy and of its stored outputs."""
    base = tmp_path_factory.mktemp("replay")
    (base / "notebooks").mkdir()
    path = base / "notebooks" / "00_small.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in SOURCES]), path)
    [result] = run.run_plan(plan.plan_run(out=base / "executed", store=True, notebooks=path.parent))
    assert result.status == "ok", result
    return base


def planted(base: Path, folder: Path, changes: dict) -> Path:
    """Copies of the stored notebook and of its execution, one a change; ``changes`` edit the stored one."""
    for name, change in changes.items():
        notebook = nbformat.read(base / "notebooks" / "00_small.ipynb", 4)
        change(notebook.cells)
        for part in ("notebooks", "executed"):
            (folder / part).mkdir(exist_ok=True)
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
        shutil.copy(base / "executed" / "00_small.ipynb", folder / "executed" / f"{name}.ipynb")
    return folder


def text(number: int, new: str):
    def change(cells):
        cells[number].outputs[0].text = new

    return change


def ignored(cells):
    text(4, "seven\n")(cells)
    cells[4].metadata["tags"] = ["nbval-ignore-output"]


def together(*changes):
    return lambda cells: [change(cells) for change in changes]


ERROR = new_output("error", ename="ValueError", evalue="no", traceback=["no"])
# What is changed in the stored notebook, and which of its cells nbval must then fail.
CHANGES = {
    "good": (together(text(2, "three ‹9.9 s› four\n"), ignored), set()),
    "bad": (
        together(
            lambda cells: cells[0].outputs.append(new_output("stream", text="more")),
            text(1, "one\n"),
            text(2, "thr3e ‹0.1 s› four\n"),
            lambda cells: cells[3].outputs.pop(0),
        ),
        {0, 1, 2, 3},
    ),
    "unmarked": (
        together(text(2, "three 0.1 s four\n"), lambda cells: cells[1].outputs.append(ERROR)),
        {1, 2},
    ),
    "between": (text(2, "three ‹0.1 s› four ‹5 s›\n"), {2}),
}


def test_the_replay_gives_the_verdicts_of_a_kernel(executed, tmp_path):
    folder = planted(executed, tmp_path, {name: change for name, (change, _) in CHANGES.items()})
    expected = {f"{name}.ipynb::Cell {cell}" for name, (_, cells) in CHANGES.items() for cell in cells}
    played, _ = replay(folder / "notebooks", folder / "executed")
    real, _ = nbval(folder / "notebooks", "--nbval", "--nbval-current-env")
    assert played == expected
    assert real == expected


def test_a_difference_is_shown_with_the_next_step(executed, tmp_path):
    folder = planted(executed, tmp_path, {"01_old": text(1, "one\n2\n")})
    failed, said = replay(folder / "notebooks", folder / "executed")
    assert failed == {"01_old.ipynb::Cell 1"}
    assert "-2\n+two\n" in said
    assert 'make notebooks NOTEBOOKS="01_old"' in said


def test_an_execution_that_is_not_this_notebooks_is_no_proof(executed, tmp_path):
    folder = planted(executed, tmp_path, {"edited": lambda cells: cells[4].update(source="print('six')")})
    planted(executed, tmp_path, {"missing": lambda cells: None, "failed": lambda cells: None})
    (folder / "executed" / "missing.ipynb").unlink()
    path = folder / "executed" / "failed.ipynb"
    copy = nbformat.read(path, 4)
    copy.cells[3].outputs = [ERROR]
    copy.cells[4].update(outputs=[], execution_count=None)
    nbformat.write(copy, path)
    failed, said = replay(folder / "notebooks", folder / "executed")
    assert failed == {"edited.ipynb", "missing.ipynb", "failed.ipynb::Cell 3", "failed.ipynb::Cell 4"}
    assert "edited.ipynb was edited since" in said
    assert "missing.ipynb was not executed" in said
    assert "Cell execution caused an exception" in said
    assert "This cell was not reached" in said


def stripped(cells):
    for cell in cells:
        cell.update(outputs=[], execution_count=None)


def mostly_ignored(cells):
    for cell in cells[1:]:
        cell.metadata["tags"] = ["nbval-ignore-output"]


def test_a_notebook_of_which_too_little_is_compared_fails_though_nbval_passes_it(executed, tmp_path):
    changes = {"fine": lambda cells: None, "stripped": stripped, "ignored": mostly_ignored}
    folder = planted(executed, tmp_path, changes)
    blind, _ = replay(folder / "notebooks", folder / "executed")
    assert not blind
    failed, said = replay(folder / "notebooks", folder / "executed", "-p", "tests.nbval_gate")
    assert failed == {"stripped.ipynb", "ignored.ipynb"}
    assert "stripped.ipynb: 5 code cells are stored without having been run" in said
