"""What a run prints while it works, and at its end."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from helpers.tools.plan import RECORDS, Plan, Result, shown

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


def report_lines(results: list[Result], plan: Plan) -> str:
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
