"""Many parameter sets through the runner: some at once, none repeated, one table and one file of records.

    python -m helpers.tools.run 00_start_here 01_baseline -f sets.yaml --jobs 2
    python -m helpers.tools.run --resume runs/latest

A set is a run of its own in `set-<n>/`: another process, another kernel, another folder. `batch.json` says
what was asked for, `records.jsonl` has the records of all sets, `summary.csv` a line a notebook.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from helpers.base import files, processes
from helpers.tools.plan import (
    RECORDS,
    RESULTS,
    Refused,
    Result,
    check,
    digest,
    lines,
    make_folder,
    shown,
    write_result,
)

FILE = "batch.json"

PATIENCE_S = 20.0  # for interrupted sets to end their kernels; less than the supervisor's own patience


@dataclass(frozen=True)
class Set:
    """One parameter set: its name and folder, its values as given, the digest of each notebook with them.

    ``takes`` are those of the values that each notebook has a parameter for.
    """

    name: str
    folder: Path
    parameters: dict[str, Any]
    wanted: dict[str, str]
    takes: dict[str, set[str]]

    def last(self) -> dict[str, dict]:
        """The last attempt at each notebook, as the set's run wrote it down."""
        rows = filter(None, _lines(self.folder / RESULTS))
        return {row["notebook"]: row for row in rows if row["notebook"] in self.wanted}

    def open(self) -> list[str]:
        """The notebooks still to run: not finished, or finished from another text or with other values."""
        last = self.last()
        done = {name for name, row in last.items() if row["status"] == "ok"}
        return [n for n, digest in self.wanted.items() if n not in done or last[n]["digest"] != digest]

    def records(self) -> Iterator[dict]:
        """The records of the last attempt at each notebook: one that was repeated counts once."""
        kept = [range(*row["records"]) for row in self.last().values()]
        for number, row in enumerate(_lines(self.folder / RECORDS)):
            if row and any(number in lines for lines in kept):
                yield {**row, "set": self.name, "parameters": self.parameters}


@dataclass(frozen=True)
class Batch:
    """A checked batch: its sets, and how many of them may run at once."""

    out: Path
    sets: list[Set]
    jobs: int
    timeout: int
    notebooks: Path


def plan(
    names: Sequence[str], sets: Sequence[Mapping[str, Any]], out: str | None,
    jobs: int, timeout: int, notebooks: Path,
) -> Batch:  # fmt: skip
    """Check every set before one starts, and write down what was asked for.

    Raises:
        Refused: no set, one that a notebook cannot take, or an unusable folder.
    """
    if not sets:
        raise Refused("the list of parameter sets is empty")
    asked = {"notebooks": list(names), "sets": [dict(values) for values in sets]}
    batch = _checked(asked, None, jobs, timeout, notebooks)
    folder = make_folder(out, notebooks.parent / "runs")
    if (folder / FILE).exists():
        raise Refused(f"{folder} holds a batch already; go on with it with --resume, or name another --out")
    (folder / FILE).write_text(json.dumps(asked, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return _checked(asked, folder, batch.jobs, timeout, notebooks)


def resume(folder: str | Path, jobs: int, timeout: int, notebooks: Path) -> Batch:
    """Take up the batch in a folder.

    Raises:
        Refused: there is none, or its sets do not suit the notebooks any more.
    """
    try:
        asked = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        last = max(
            Path(folder).absolute().parent.glob(f"*/{FILE}"),
            key=lambda file: file.stat().st_mtime,
            default=None,
        )
        hint = f"; the last list of sets beside it is in {shown(last.parent)}" if last else ""
        raise Refused(f"no list of sets to go on with in {folder} ({error}){hint}") from None
    return _checked(asked, Path(folder).resolve(), jobs, timeout, notebooks)


def _checked(asked: dict, out: Path | None, jobs: int, timeout: int, notebooks: Path) -> Batch:
    if jobs < 1:
        raise Refused(f"--jobs must be at least 1, not {jobs}")
    width, sets = len(str(len(asked["sets"]))), []
    for number, given in enumerate(asked["sets"], 1):
        name = f"{number:0{width}}"
        try:
            chosen, values = check(asked["notebooks"], given, timeout, False, notebooks)
        except Refused as refused:
            raise Refused(f"set {name}: {refused}") from None
        wanted = {n.path.stem: digest(n, values[n.path.stem]) for n in chosen}
        takes = {stem: set(taken) for stem, taken in values.items()}
        sets.append(Set(name, (out or Path()) / f"set-{name}", given, wanted, takes))
    return Batch(out or Path(), sets, jobs, timeout, notebooks)


def work(batch: Batch, stream: TextIO = sys.stdout) -> int:
    """Run what is not finished, at most ``batch.jobs`` sets at once; return the exit code.

    A set that fails does not stop the others. However this ends, the table and the records of what there
    is are written, and no process stays.
    """
    with _only_one(batch.out) as mine:
        if not mine:
            print(f"helpers.tools.run: {batch.out} is being run by another process", file=sys.stderr)
            return 2
        try:
            _run_sets(batch, stream)
        finally:
            print(_report(batch), file=stream)
        return int(any(one.open() for one in batch.sets))


def _run_sets(batch: Batch, stream: TextIO) -> None:
    waiting, running = [one for one in batch.sets if one.open()], []

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    if finished := len(batch.sets) - len(waiting):
        say(f"{finished} of {len(batch.sets)} sets are finished already.")
    if (jobs := min(batch.jobs, len(waiting))) > 1:
        say(f"{jobs} at once share this machine: alone, each would measure a higher speed.")
    with processes.owned_processes():
        try:
            while waiting or running:
                while waiting and len(running) < batch.jobs:
                    running.append(Running(waiting.pop(0), batch))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    one.account()
                    for name in one.names:
                        say(_row(_facts(one.set, name)))
                time.sleep(0.05)
        except KeyboardInterrupt:
            _interrupt([one.process for one in running])
            raise


class Running:
    """A set's open notebooks in a process of their own; what that says goes to `logs/`."""

    def __init__(self, one: Set, batch: Batch):
        self.set, self.names = one, one.open()
        self.log = batch.out / "logs" / f"{one.folder.name}.log"
        one.folder.mkdir(exist_ok=True)
        self._before = len(_lines(one.folder / RESULTS))
        # A value that only finished notebooks have a parameter for would be refused.
        taken = set().union(*(one.takes[name] for name in self.names))
        given = {name: value for name, value in one.parameters.items() if name in taken}
        values = one.folder / "parameters.yaml"
        values.write_text(json.dumps(given, ensure_ascii=False) + "\n", encoding="utf-8")  # is YAML, too
        command = [sys.executable, "-m", "helpers.tools.run", *self.names, "--out", one.folder, "-f", values]
        command += ["--timeout", str(batch.timeout), "--notebooks", batch.notebooks]
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def account(self) -> None:
        """Write down as failed what the process did not live to write down itself."""
        rows = filter(None, _lines(self.set.folder / RESULTS)[self._before :])
        told = {row["notebook"] for row in rows}
        error = f"its runner ended with exit code {self.process.returncode}; see {shown(self.log)}"
        for name in self.names:
            if name not in told:
                write_result(self.set.folder, Result(name, "failed", error=error))


def _interrupt(processes: list[subprocess.Popen]) -> None:
    """Ctrl+C for every set, and the time to end its kernels and to write down where it was."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[bool]:
    """Whether this process is the only one that runs the batch; the kernel frees the lock at its end."""
    with (out / FILE).open(encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


# ---- what is shown and kept

COLUMNS = ("set", "notebook", "status", "seconds", "error")


def _facts(one: Set, name: str) -> dict:
    """A line of the summary: how a notebook went with a set."""
    last = one.last().get(name, {"status": "not run", "seconds": 0.0, "error": ""})
    return {"set": one.name, "notebook": name, **{column: last[column] for column in COLUMNS[2:]}}


def _row(facts: dict, width: int = 0) -> str:
    return f"{facts['set']:>3}  {facts['notebook']:{width}}  {facts['seconds']:7.1f}  {facts['status']}"


def _report(batch: Batch) -> str:
    """Write the records and the summary of all sets; return the table, under each failure its cause."""
    merged = [json.dumps(row, ensure_ascii=False) + "\n" for one in batch.sets for row in one.records()]
    facts = [(one, _facts(one, name)) for one in batch.sets for name in one.wanted]
    names = sorted({name for one in batch.sets for name in one.parameters})
    lines = [{**{name: one.parameters.get(name, "") for name in names}, **row} for one, row in facts]
    files.replace_text(batch.out / "records.jsonl", "".join(merged))
    with io.StringIO() as text:
        writer = csv.DictWriter(text, [*COLUMNS, *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        files.replace_text(batch.out / "summary.csv", text.getvalue())
    width = max(len(row["notebook"]) for _, row in facts)
    table = ["", f"set  {'notebook':{width}}  seconds  status"]
    for one, row in facts:
        table.append(_row(row, width))
        if row["error"]:
            table.append(f"    {row['error']}")
            table.append(
                f"    with {', '.join(f'{n}={v!r}' for n, v in one.parameters.items()) or 'defaults'}"
            )
    where = shown(batch.out)
    table += ["", f"summary  {where}/summary.csv", f"records  {where}/records.jsonl ({len(merged)})"]
    if any(one.open() for one in batch.sets):
        python = shlex.quote(shown(Path(sys.executable)))
        table.append(f"go on    {python} -m helpers.tools.run --resume {shlex.quote(where)}")
    return "\n".join(table)


def _lines(path: Path) -> list[dict | None]:
    """The objects of a file of JSON lines; None for a line that was cut short."""
    found = []
    for line in lines(path):
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(None)
    return found
