"""A list of parameter sets, with real papermill and real kernels on tiny notebooks (no vLLM)."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.compare.advise import advise
from helpers.tools import batch, run
from helpers.tools.batch import FILE, Set
from helpers.tools.plan import RESULTS, Result, write_result
from tests.test_run import (
    ROOT,
    SLEEP,
    START_SLEEPERS,
    as_from_a_terminal,
    command,
    environment,
    left_over,
    write_notebook,
)  # fmt: skip

# Writes a record with the time it took its place and the time it left it.
RECORD = """
import json, os, pathlib, time
begun = time.time()
time.sleep(0.3)
with open(pathlib.Path(out_dir, "records.jsonl"), "a") as file:
    file.write(json.dumps({"notebook": NAME, "steps": steps, "begun": begun, "ended": time.time(),
        "scheme": "fp8", "output_tokens_per_s": 10.0 * steps}) + "\\n")
"""
# The record is there before this fails, as a measurement is that a later cell wastes.
FAIL = "assert steps != 3 or os.path.exists('mended'), 'set 3 is not mended'"
PARAMETERS = "out_dir = ''\nsteps = 1\nrate = 0.5"


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, *arguments), cwd=folder.parent, env=environment(), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight sets over two notebooks, three at once, of which one fails; then resumed, mended, and again."""
    base = tmp_path_factory.mktemp("batch of eight")
    folder = base / "notebooks"
    write_notebook(folder, "01_a", RECORD.replace("NAME", "'a'"), parameters=PARAMETERS)
    write_notebook(folder, "02_b", RECORD.replace("NAME", "'b'"), FAIL, parameters=PARAMETERS)
    write_notebook(folder, "03_not_chosen", "1/0")
    (base / "sets.yaml").write_text("".join(f"- steps: {number}\n" for number in range(1, 9)))
    runs = [start(folder, "01_a", "02_b", "-f", "sets.yaml", "-p", "rate", "2", "--jobs", "3")]
    out = (base / "runs/latest").resolve()
    kept = {path: path.read_bytes() for path in (out / "summary.csv", out / "records.jsonl")}
    (folder / "mended").touch()
    runs += [start(folder, "--resume", "runs/latest", "--jobs", "3") for _ in range(2)]
    return out, runs, kept


def statuses(out: str) -> list[tuple[str, str, str]]:
    return re.findall(r"^ +(\d)  (\w+) +\d+\.\d  (.*)$", out.partition("\nset  notebook")[2], re.MULTILINE)


def test_a_failing_set_stops_no_other_and_the_exit_code_says_so(eight):
    _, (first, _, _), _ = eight
    assert first.returncode == 1
    assert first.stderr == ""
    wanted = [
        (str(n), name, "failed" if (n, name) == (3, "02_b") else "ok")
        for n in range(1, 9)
        for name in ("01_a", "02_b")
    ]
    assert statuses(first.stdout) == wanted
    assert "    cell 4: AssertionError: set 3 is not mended\n    with steps=3, rate='2'\n" in first.stdout
    assert f"go on    {sys.executable} -m helpers.tools.run --resume runs/" in first.stdout


def test_no_more_than_three_at_once(eight):
    out, _, _ = eight
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    at_once = [sum(other["begun"] <= row["begun"] < other["ended"] for other in rows) for row in rows]
    begun = {n: min(row["begun"] for row in rows if row["steps"] == n) for n in range(1, 9)}
    ended = {n: max(row["ended"] for row in rows if row["steps"] == n) for n in range(1, 9)}
    sets = [sum(begun[m] <= begun[n] < ended[m] for m in begun if m != 3) for n in begun if n != 3]
    assert max(at_once) <= 3
    assert 2 <= max(sets) <= 3, "some at once, and never more than asked for"


def test_only_what_failed_is_repeated(eight):
    out, (_, second, third), _ = eight
    assert second.returncode == third.returncode == 0
    assert second.stdout.startswith("7 of 8 sets are finished already.\n")
    assert third.stdout.startswith("8 of 8 sets are finished already.\n\nset  notebook")
    assert [status for *_, status in statuses(second.stdout)] == ["ok"] * 16
    assert "go on" not in third.stdout
    attempts = {
        path.parent.name: len(path.read_text().splitlines()) for path in out.glob("set-*/results.jsonl")
    }
    assert attempts == {f"set-{n}": 3 if n == 3 else 2 for n in range(1, 9)}


def test_one_summary_and_one_file_of_records(eight):
    out, (first, *_), kept = eight
    before = list(csv.DictReader(kept[out / "summary.csv"].decode().splitlines()))
    after = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert list(before[0])[:4] == ["set", "notebook", "rate", "steps"]
    rates = [(row["scheme"], float(row["output_tokens_per_s"])) for row in after]
    assert rates == [("fp8", 10.0 * n) for n in range(1, 9) for _ in "ab"], "the answers, not seconds only"
    assert [row["status"] for row in before].count("failed") == 1
    assert [row["status"] for row in after] == ["ok"] * 16
    assert [row["steps"] for row in after] == [str(n) for n in range(1, 9) for _ in "ab"]
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [(row["set"], row["notebook"], row["parameters"]) for row in rows] == [
        (str(n), name, {"steps": n, "rate": "2"}) for n in range(1, 9) for name in "ab"
    ], "each measurement once, though one notebook was run twice"
    assert len((out / "set-3/records.jsonl").read_text().splitlines()) == 3
    assert f"answers  runs/{out.name}/summary.csv" in first.stdout


def test_a_notebook_or_value_that_changed_is_not_finished(eight, monkeypatch):
    out, _, _ = eight
    folder = out.parent.parent / "notebooks"
    plan = batch.resume(out, 1, 9, folder)
    assert [one.open() for one in plan.sets] == [[]] * 8
    text = (folder / "02_b.ipynb").read_text()
    (folder / "02_b.ipynb").write_text(text.replace('"outputs": []', '"outputs": [], "new": 1'))
    assert [one.open() for one in batch.resume(out, 1, 9, folder).sets] == [[]] * 8
    (folder / "02_b.ipynb").write_text(text.replace("not mended", "not yet mended"))
    assert [one.open() for one in batch.resume(out, 1, 9, folder).sets] == [["02_b"]] * 8
    (folder / "02_b.ipynb").write_text(text)


def test_one_process_at_a_time_runs_a_batch(eight, capsys):
    out, _, _ = eight
    with (out / FILE).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert batch.work(batch.resume(out, 1, 9, out.parent.parent / "notebooks")) == 2
    assert "is being run by another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("- steps: 1\n- stesp: 2\n", [], "set 2: no parameter 'stesp'"),
        ("- steps: 1\n- steps: many\n", [], "set 2: parameter steps of 01_a must be of type int"),
        ("- steps: 1\n- 2\n", [], "no list of sets"),
        ("[]", [], "empty"),
        ("- steps: 1\n", ["--jobs", "0"], "--jobs must be at least 1"),
        ("- steps: 1\n", ["--store"], "not what a list of sets says"),
        ("- steps: 1\n", ["--resume", "runs/latest"], "--resume takes notebooks and sets from its folder"),
    ],
)
def test_a_bad_set_is_refused_before_anything_starts(tmp_path, capsys, text, more, message):
    write_notebook(tmp_path / "notebooks", "01_a", parameters=PARAMETERS)
    (tmp_path / "sets.yaml").write_text(text)
    arguments = ["--notebooks", str(tmp_path / "notebooks"), "-f", str(tmp_path / "sets.yaml"), *more]
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_value_of_a_finished_notebook_alone_does_not_stop_the_rest(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_a", "assert context == 8", parameters="out_dir = ''\ncontext = 1")
    write_notebook(
        folder, "02_b", "import os\nassert steps == 2 and os.path.exists('mended')", parameters=PARAMETERS
    )
    (tmp_path / "sets.yaml").write_text("- {context: 8, steps: 2}\n")
    first = start(folder, "-f", "sets.yaml")
    assert [status for *_, status in statuses(first.stdout)] == ["ok", "failed"]
    (folder / "mended").touch()
    second = start(folder, "--resume", "runs/latest")
    assert second.returncode == 0, second.stdout
    assert [status for *_, status in statuses(second.stdout)] == ["ok", "ok"]
    assert [row["error"] for row in csv.DictReader((tmp_path / "runs/latest/summary.csv").open())] == ["", ""]


def test_ctrl_c_leaves_no_process_and_can_be_resumed(tmp_path):
    mark = f"{os.getpid()}77"
    once = "if pathlib.Path('again').exists(): raise SystemExit(0)"
    folder = tmp_path / "notebooks"
    sleepers = START_SLEEPERS.replace('b"2\\n"', 'b"4\\n"')  # two of each of two kernels
    write_notebook(folder, "01_a", f"import pathlib\n{once}", sleepers.format(mark=mark), SLEEP)
    (tmp_path / "sets.yaml").write_text("- {}\n- {}\n- {}\n")
    arguments = command(
        folder, "-f", str(tmp_path / "sets.yaml"), "--jobs", "2", "--out", str(tmp_path / "out")
    )
    runner = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=as_from_a_terminal,
    )  # fmt: skip
    kernels, deadline = [tmp_path / f"out/set-{n}/kernel" for n in (1, 2)], time.monotonic() + 60
    while (
        not all(kernel.exists() and kernel.read_text() for kernel in kernels) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    numbers = [int(kernel.read_text()) for kernel in kernels]
    time.sleep(0.5)
    os.killpg(runner.pid, signal.SIGINT)
    said, _ = runner.communicate(timeout=60)
    left = [process for number in numbers for process in left_over(mark, number)]
    for process in left:
        process.kill()
    assert left == []
    assert runner.returncode == 130
    assert [status for *_, status in statuses(said)] == ["interrupted", "interrupted", "not run"]
    assert "--resume" in said
    assert "Traceback" not in said
    (folder / "again").touch()
    resumed = start(folder, "--resume", str(tmp_path / "out"), "--jobs", "3")
    assert [status for *_, status in statuses(resumed.stdout)] == ["ok"] * 3


def test_a_set_that_died_while_it_wrote_is_open_and_says_where_to_look(tmp_path):
    one = Set("1", tmp_path / "set-1", {}, {"01_a": "x", "02_b": "x"}, {"01_a": set(), "02_b": set()})
    one.folder.mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/set-1.log").write_text("Killed")
    write_result(one.folder, Result("01_a", "failed", error="one\u2028two"), "x")
    with (one.folder / RESULTS).open("a") as file:
        file.write('{"notebook": "02_')
    assert one.open() == ["01_a", "02_b"]
    said = batch._report(batch.Batch(tmp_path, [one], 1, 9, tmp_path))
    assert "one\u2028two" in said
    assert (
        f"02_b                      0.0  died: its runner wrote nothing down\n    {tmp_path}/logs/set-1.log"
        in said
    )
    write_result(one.folder, Result("02_b", "ok"), "x")
    assert one.open() == ["01_a"]


def test_what_a_set_was_advised_is_in_its_lines(tmp_path):
    """The sentence as the real advice says it; the first one only, and nothing of a notebook without."""
    answer = advise("qwen3-8b", "L4", users=20, context=4096, goal="throughput")
    one = Set("1", tmp_path / "set-1", {"gpu": "L4"}, {"00_a": "x", "01_b": "x"}, {})
    one.folder.mkdir()
    shown = [{"data": {"text/plain": text}} for text in ("a table", repr(answer), repr(answer))]
    (one.folder / "00_a.ipynb").write_text(json.dumps({"cells": [{}, {"outputs": shown}]}))
    batch._report(batch.Batch(tmp_path, [one], 1, 9, tmp_path))
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(row["gpu"], row["recommended"]) for row in rows] == [("L4", answer.sentence), ("L4", "")]
    assert answer.sentence.startswith("Deploy ")


# --- papermill itself, on a notebook of the collection


def test_papermill_takes_p_and_f_on_one_notebook(tmp_path):
    (tmp_path / "set.yaml").write_text("gpu: T4\ncontext: 2048\n")
    arguments = ["notebooks/00_start_here.ipynb", str(tmp_path / "out.ipynb"), "--cwd", "notebooks"]
    arguments += ["-f", str(tmp_path / "set.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *arguments, "-p", "context", "8192"],
        cwd=ROOT, env=environment(TUTORIAL_HEADLESS="1", TUTORIAL_MODEL="embedded"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Qwen3-8B on T4: 20 x 8,192 tokens." in (tmp_path / "out.ipynb").read_text()
