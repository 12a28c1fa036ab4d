"""A pytest plugin: nbval judges an execution that was recorded, instead of running the notebook again.

    python -m helpers.tools.run --out build/executed
    pytest -p tests.nbval_gate -p tests.replay --replay build/executed \
        --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks

The runner's executed copy takes the kernel's place: each cell is "executed" by sending nbval the messages
that the real kernel sent. Collecting, sanitizing and comparing remain nbval's own.
"""

import copy
import difflib
from collections import deque
from pathlib import Path

import nbformat
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError

from tests import marks


def pytest_addoption(parser):
    group = parser.getgroup("replay", "nbval on a recorded execution")
    group.addoption("--replay", metavar="DIR", help="the folder with the executed copies of the notebooks")


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

    def format_output_compare(self, key, left, right):
        stored, executed = (
            [line.strip("\n") for line in marks.lines(str(text), key)] for text in (left, right)
        )
        lines = difflib.unified_diff(stored, executed, "stored", "executed", n=0, lineterm="")
        self.comparison_traceback.append(f"{key} differs outside the marks:")
        self.comparison_traceback += [line if len(line) < 400 else f"{line[:400]} ..." for line in lines]

    def repr_failure(self, excinfo):
        said = super().repr_failure(excinfo)
        return f"{said}\n{self.parent.next_step}" if isinstance(excinfo.value, NbCellError) else said
