"""Many parameter sets through the runner: some at once, none repeated, one table of answers.

    python -m helpers.tools.run 00_start_here 01_baseline -f sets.yaml --jobs 2
    python -m helpers.tools.run --resume runs/latest

A set is a run of its own in `set-<n>/`, in a process of its own. `batch.json` says what was asked for,
`records.jsonl` has the records of all sets, `summary.csv` a line for each record: the answers.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from helpers.base import files, processes, records
from helpers.compare.advise import GOALS
from helpers.tools.plan import RECORDS, RESULTS, Refused, check, digest, lines, make_folder, shown

FILE = "batch.json"

# How ``compare.advise`` shows an answer as text: the load, then the sentence.
_ADVICE = re.compile(rf".+ on .+ for (?:{'|'.join(GOALS)})\n\n((?:.+\n)+)")

PATIENCE_S = 20.0  # for interrupted sets to end their kernels; less than the supervisor's own patience

# What a line of the summary says of a record, where the record has it.
ANSWERS = (
    *("scheme", "model", "device", "batch", "output_tokens_per_s", "ttft_s", "weights_bytes"),
    *("kv_cache_tokens", "perplexity"),
)


@dataclass(frozen=True)
class Set:
    """One parameter set: its folder, its values as given, the digest of each notebook with them.

    ``takes`` are those of the values that each notebook has a parameter for.
    """

    name: str
    folder: Path
    parameters: dict[str, Any]
    wanted: dict[str, str]
    takes: dict[str, set[str]]

    def results(self) -> dict[str, dict]:
        """The last attempt at each notebook, as the set's run wrote it down."""
        found = records.read(self.folder / RESULTS, ("notebook", "status", "digest"))[0]
        return {row["notebook"]: row for row in found if row["notebook"] in self.wanted}

    def open(self) -> list[str]:
        """The notebooks still to run: not finished, or finished from another text or with other values."""
        done = {name: row["digest"] for name, row in self.results().items() if row["status"] == "ok"}
        return [name for name, wanted in self.wanted.items() if done.get(name) != wanted]

    def records(self) -> Iterator[tuple[str, dict]]:
        """Each record of the last attempt at each notebook, with the notebook's name."""
        written = lines(self.folder / RECORDS)
        for name, row in self.results().items():
            for line in written[slice(*row["records"])]:
                with contextlib.suppress(ValueError):  # cut short by a kill
                    yield name, json.loads(line)

    def recommended(self, name: str) -> str:
        """The sentence of a notebook's first advice; nothing where it gives none."""
        try:
            cells = json.loads((self.folder / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        except (OSError, ValueError, KeyError):
            return ""
        data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
        texts = ("".join(shown.get("text/plain", "")) for shown in data)
        return next((" ".join(found[1].split()) for text in texts if (found := _ADVICE.match(text))), "")


@dataclass(frozen=True)
class Batch:
    """A checked batch: its sets, and how many of them may run at once."""

    out: Path
    sets: list[Set]
    jobs: int
    timeout: int
    notebooks: Path


def plan(
    names: Sequence[str],
    sets: Sequence[Mapping[str, Any]],
    out: str | None,
    jobs: int,
    timeout: int,
    notebooks: Path,
) -> Batch:
    """Check every set before one starts, and write down what was asked for.

    Raises:
        Refused: no set, one that a notebook cannot take, or an unusable folder.
    """
    if not sets:
        raise Refused("the list of parameter sets is empty")
    asked = {"notebooks": list(names), "sets": [dict(values) for values in sets]}
    _checked(asked, Path(), jobs, timeout, notebooks)
    folder = make_folder(out, notebooks.parent / "runs")
    if (folder / FILE).exists():
        raise Refused(f"{folder} holds a batch already; go on with it with --resume, or name another --out")
    files.write_whole(folder / FILE, json.dumps(asked, indent=1, ensure_ascii=False) + "\n")
    return _checked(asked, folder, jobs, timeout, notebooks)


def resume(folder: str | Path, jobs: int, timeout: int, notebooks: Path) -> Batch:
    """Take up the batch in a folder.

    Raises:
        Refused: there is none, or its sets do not suit the notebooks any more.
    """
    try:
        asked = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"no list of sets to go on with in {folder} ({error})") from None
    return _checked(asked, Path(folder).resolve(), jobs, timeout, notebooks)


def _checked(asked: dict, out: Path, jobs: int, timeout: int, notebooks: Path) -> Batch:
    if jobs < 1:
        raise Refused(f"--jobs must be at least 1, not {jobs}")
    width, sets = len(str(len(asked["sets"]))), []
    for number, given in enumerate(asked["sets"], 1):
        name = f"{number:0{width}}"
        try:
            chosen, values = check(asked["notebooks"], given, timeout, False, notebooks)
        except Refused as refused:
            raise Refused(f"set {name}: {refused}") from None
        wanted = {one.path.stem: digest(one, values[one.path.stem]) for one in chosen}
        takes = {stem: set(taken) for stem, taken in values.items()}
        sets.append(Set(name, out / f"set-{name}", given, wanted, takes))
    return Batch(out, sets, jobs, timeout, notebooks)


def work(batch: Batch, stream: TextIO = sys.stdout) -> int:
    """Run what is not finished, at most ``batch.jobs`` sets at once; return the exit code.

    A set that fails does not stop the others. However this ends, the table and the records of what there
    is are written, and no process stays.
    """
    try:
        with files.locked(batch.out / FILE):
            try:
                _run_sets(batch, stream)
            finally:
                print(_report(batch), file=stream)
    except BlockingIOError:
        print(f"helpers.tools.run: {batch.out} is being run by another process", file=sys.stderr)
        return 2
    return int(any(one.open() for one in batch.sets))


def _run_sets(batch: Batch, stream: TextIO) -> None:
    waiting = [one for one in batch.sets if one.open()]
    running: dict[subprocess.Popen, Set] = {}
    if finished := len(batch.sets) - len(waiting):
        print(f"{finished} of {len(batch.sets)} sets are finished already.", file=stream)
    if (jobs := min(batch.jobs, len(waiting))) > 1:
        print(f"{jobs} at once share this machine: alone, each would measure a higher speed.", file=stream)
    with processes.owned_processes():
        try:
            while waiting or running:
                while waiting and len(running) < batch.jobs:
                    one = waiting.pop(0)
                    running[_start(one, batch)] = one
                for process in [process for process in running if process.poll() is not None]:
                    one = running.pop(process)
                    print(f"set {one.name} ended, exit code {process.returncode}", file=stream, flush=True)
                time.sleep(0.05)
        except KeyboardInterrupt:
            for process in running:
                process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + PATIENCE_S
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            raise


def _start(one: Set, batch: Batch) -> subprocess.Popen:
    """Start a set's open notebooks in a process of their own; what that says goes to `logs/`."""
    one.folder.mkdir(exist_ok=True)
    names = one.open()
    # A value that only finished notebooks have a parameter for would be refused.
    taken = set().union(*(one.takes[name] for name in names))
    given = {name: value for name, value in one.parameters.items() if name in taken}
    values = one.folder / "parameters.yaml"
    values.write_text(json.dumps(given, ensure_ascii=False) + "\n", encoding="utf-8")  # is YAML, too
    command = [sys.executable, "-m", "helpers.tools.run", *names, "--out", one.folder, "-f", values]
    command += ["--timeout", str(batch.timeout), "--notebooks", batch.notebooks]
    with _log(batch, one).open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _log(batch: Batch, one: Set) -> Path:
    return batch.out / "logs" / f"{one.folder.name}.log"


# ---- what is shown and kept


def _report(batch: Batch) -> str:
    """Write the records and the answers of all sets; return a table of how each notebook went."""
    merged, answers = [], []
    table = ["", f"set  {'notebook':20}  seconds  status"]
    for one in batch.sets:
        results, measured = one.results(), list(one.records())
        merged += [row | {"set": one.name, "parameters": one.parameters} for _, row in measured]
        for name in one.wanted:
            unwritten = "died: its runner wrote nothing down" if _log(batch, one).exists() else "not run"
            row = results.get(name) or {"status": unwritten, "seconds": 0.0, "error": ""}
            table.append(f"{one.name:>3}  {name:20}  {row['seconds']:7.1f}  {row['status']}")
            if row["status"] not in ("ok", "not run"):
                chosen = ", ".join(f"{key}={value!r}" for key, value in one.parameters.items()) or "defaults"
                table += [f"    {row['error'] or shown(_log(batch, one))}", f"    with {chosen}"]
            head = {"set": one.name, "notebook": name, "status": row["status"], "seconds": row["seconds"]}
            head |= {"error": row["error"], "recommended": one.recommended(name)}
            for found in [found for where, found in measured if where == name] or [{}]:
                told = {column: found[column] for column in ANSWERS if column in found}
                answers.append(head | told | one.parameters)
    files.write_whole(
        batch.out / RECORDS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in merged)
    )
    _write_csv(
        batch.out / "summary.csv", answers, sorted({name for one in batch.sets for name in one.parameters})
    )
    where = shown(batch.out)
    table += ["", f"answers  {where}/summary.csv", f"records  {where}/{RECORDS} ({len(merged)})"]
    if any(one.open() for one in batch.sets):
        table.append(f"go on    {shown(Path(sys.executable))} -m helpers.tools.run --resume {where}")
    return "\n".join(table)


def _write_csv(path: Path, rows: list[dict], values: list[str]) -> None:
    """A table with the set and its values first, then what became of it."""
    columns = ["set", "notebook", *values, "status", "seconds", "error", "recommended", *ANSWERS]
    with io.StringIO() as text:
        writer = csv.DictWriter(text, list(dict.fromkeys(columns)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_whole(path, text.getvalue())
