"""A pytest plugin: nbval judges an execution that was recorded, instead of running the notebook again.

    python -m helpers.tools.run --out build/executed
    pytest -p tests.nbval_gate -p tests.replay --replay build/executed \
        --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks

The runner's executed copy takes the kernel's place: each cell is "executed" by sending nbval the messages
that the real kernel sent. Collecting, sanitizing and comparing remain nbval's own. On top of that come
the pictures, which nbval cannot see, and with ``--mutants`` the mutants of every compared output.
"""

from __future__ import annotations

import copy
import difflib
from collections import Counter, deque
from pathlib import Path

import nbformat
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError

from tests import marks, mutants, pictures

_tally: dict[str, Counter] = {}  # mutants by notebook


def pytest_addoption(parser):
    group = parser.getgroup("replay", "nbval on a recorded execution")
    group.addoption("--replay", metavar="DIR", help="the folder with the executed copies of the notebooks")
    group.addoption("--mutants", action="store_true", help="corrupt each stored output: nbval must notice")


def pytest_collect_file(file_path, parent):
    if parent.config.option.replay and file_path.suffix == ".ipynb":
        return ReplayedNotebook.from_parent(parent, path=file_path)


class Recording:
    """What nbval asks a kernel for, answered from the code cells of an executed copy."""

    def __init__(self, cells: list):
        self.cells, self.number, self._messages = cells, 0, deque()

    def is_alive(self) -> bool:
        return True

    def execute_cell_input(self, source: str, allow_stdin=None) -> str:
        """Queue what the kernel sent when it ran this cell."""
        cell = self.cells[self.number]
        self._messages = deque(_message(output["output_type"], output) for output in cell.outputs)
        self._messages.append(_message("status", {"execution_state": "idle"}))
        return "recorded"

    def get_message(self, stream: str, timeout=None) -> dict:
        return self._messages.popleft()

    def await_reply(self, msg_id, timeout=None) -> None:
        """Every reply has come long ago."""

    await_idle = await_reply

    def stop(self) -> None:
        """There is no process."""

    interrupt = stop


def _message(kind: str, content) -> dict:
    return {"msg_type": kind, "parent_header": {"msg_id": "recorded"}, "content": content}


class ReplayedNotebook(IPyNbFile):
    """A notebook whose cells nbval compares with an executed copy."""

    def setup(self):
        self.setup_sanitize_files()
        self.kernel = Recording(self.executed)

    def collect(self):
        path = Path(self.config.option.replay) / self.path.name
        if not path.exists():
            raise self.CollectError(f"{self.path.name} was not executed: there is no {path}")
        self.executed = code_cells(nbformat.read(path, as_version=4))
        self.cells = [
            ReplayedCell.from_parent(
                self, name=one.name, cell_num=one.cell_num, cell=one.cell, options=one.options
            )
            for one in super().collect()
        ]
        if [cell.cell.source for cell in self.cells] != [cell.source for cell in self.executed]:
            raise self.CollectError(f"{self.path.name} was edited since {path} was executed: run it again")
        yield from self.cells
        for cell in self.cells:
            if pictures.pictures(cell.cell.outputs) or pictures.pictures(cell.recorded.outputs):
                yield PictureItem.from_parent(self, name=f"Picture of {cell.name}", cell=cell)
        if self.config.option.mutants:
            yield MutantsItem.from_parent(self, name="mutants")

    @property
    def next_step(self) -> str:
        """What to do when the execution is right and the stored output is not."""
        return f'If the new output is right:  make notebooks NOTEBOOKS="{self.path.stem}"'


def code_cells(notebook) -> list:
    """The code cells of an executed copy that are the notebook's own."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", ())
    ]


class ReplayedCell(IPyNbCell):
    """nbval's item, with the recorded cell of the same number and a shorter account of a difference."""

    silent = False  # no account at all: while thousands of mutants are judged nobody reads it

    @property
    def recorded(self):
        """The executed copy's cell."""
        return self.parent.executed[self.cell_num]

    def runtest(self):
        self.parent.kernel.number = self.cell_num
        if self.recorded.execution_count is None and self.cell.source.strip():
            self.raise_cell_error("This cell was not reached when the notebook was executed")
        kept = self.cell.outputs
        self.cell.outputs = copy.deepcopy(kept)  # nbval joins streams in place: a second look would differ
        try:
            super().runtest()
        finally:
            self.cell.outputs = kept

    def passes(self) -> bool:
        """nbval's verdict on the cell as it is stored now."""
        self.silent = True
        try:
            self.runtest()
        except NbCellError:
            return False
        except pytest.skip.Exception:
            return True
        finally:
            self.silent = False
        return True

    def format_output_compare(self, key, left, right):
        if self.silent:
            return
        stored, executed = (
            [line.strip("\n") for line in marks.lines(str(text), key)] for text in (left, right)
        )
        lines = difflib.unified_diff(stored, executed, "stored", "executed", n=0, lineterm="")
        self.comparison_traceback.append(f"{key} differs outside the marks:")
        self.comparison_traceback += [line if len(line) < 400 else f"{line[:400]} ..." for line in lines]

    def repr_failure(self, excinfo):
        said = super().repr_failure(excinfo)
        return f"{said}\n{self.parent.next_step}" if isinstance(excinfo.value, NbCellError) else said


class PictureItem(pytest.Item):
    """A cell's pictures, stored and executed: what is drawn, and that it can be seen."""

    def __init__(self, *, cell: ReplayedCell, **more):
        super().__init__(**more)
        self.cell = cell

    def runtest(self):
        found = pictures.problems(self.cell.cell.outputs, self.cell.recorded.outputs)
        if found:
            pytest.fail("\n".join([*found, self.parent.next_step]), pytrace=False)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name}::{self.name}"


class MutantsItem(pytest.Item):
    """All mutants of a notebook: each must fail its own cell and no other."""

    def runtest(self):
        tally, problems = judge(self.parent.cells)
        _tally[self.path.name] = tally
        if problems:
            pytest.fail("\n".join(problems), pytrace=False)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name}::{self.name}"


def judge(cells: list[ReplayedCell]) -> tuple[Counter, list[str]]:
    """Count mutants by operator and those killed; a sentence for each survivor and each hidden line."""
    tally, problems = Counter(), []
    if red := [cell.name for cell in cells if not cell.passes()]:
        return tally, [f"not compared: {', '.join(red)} must pass before it can be corrupted"]
    for cell in cells:
        if cell.options["skip"] or not cell.options["check"] or not cell.cell.outputs:
            continue
        kept = cell.cell.outputs
        if cell.cell.get("id") not in mutants.WHOLE_LINES:
            problems += [
                f"{cell.name}: nothing of this line is compared: {line}"
                for line in mutants.hidden_lines(kept)
            ]
        for mutant in mutants.mutants(kept):
            cell.cell.outputs = mutant.outputs
            failed = [one.cell_num for one in cells if not one.passes()]
            cell.cell.outputs = kept
            tally[mutant.operator] += 1
            if failed == [cell.cell_num]:
                tally["killed"] += 1
            else:
                problems.append(f"{cell.name}, {mutant.where}: {mutant.operator} survived; failed: {failed}")
    return tally, problems


def pytest_terminal_summary(terminalreporter):
    if not _tally:
        return
    terminalreporter.section("mutants of the stored outputs")
    for name, tally in sorted(_tally.items()):
        made = tally.total() - tally["killed"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.items()) if kind != "killed")
        terminalreporter.line(f"{name}: {tally['killed']} of {made} killed ({kinds})")
    made = sum(tally.total() - tally["killed"] for tally in _tally.values())
    killed = sum(tally["killed"] for tally in _tally.values())
    terminalreporter.line(f"together: {killed} of {made} killed")
