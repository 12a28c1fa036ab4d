"""The runner, with real papermill and real kernels on tiny notebooks (no vLLM)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.base.files import ROOT
from helpers.tools import plan, run

DUMP = "import json, os, pathlib, sys\npathlib.Path(out_dir, '{}').write_text(json.dumps({}))"


def write_notebook(folder: Path, name: str, *sources: str, parameters="out_dir = ''", needs=()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    cells = [new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    metadata = {"tutorial": {"needs": list(needs)}}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {name}"), *cells], metadata=metadata), path)
    return path


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "helpers.tools.run", "--notebooks", str(folder), *arguments]


def environment(**more: str) -> dict[str, str]:
    """This one's without conftest's, and what keeps a kernel from capturing what its children print."""
    others = ("TUTORIAL_HEADLESS", "PYTEST_CURRENT_TEST")
    own = {name: value for name, value in os.environ.items() if name not in others}
    return {**own, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "notebooks"


# ---- one run of six notebooks from the command line, looked at from all sides


# A child writes to a pipe that a thread of the kernel reads: it takes a moment, and may come last.
CHILD = "import time; os.system('echo from a child'); time.sleep(1)"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    base = tmp_path_factory.mktemp("a space and ü")
    folder = base / "notebooks"
    facts = "{'cwd': os.getcwd(), 'python': sys.executable, 'headless': os.environ['TUTORIAL_HEADLESS'], "
    facts += "'path': os.environ['PYTHONPATH']}"
    write_notebook(folder, "05_late", DUMP.format("late", 1), needs=["01_good"])
    write_notebook(folder, "01_good", DUMP.format("facts", facts), CHILD)
    write_notebook(folder, "02_bad", "raise ValueError('first line\\nlast line')", "print('never')")
    write_notebook(folder, "03_needs_bad", "print('never')", needs=["02_bad"])
    write_notebook(folder, "04_needs_skipped", "print('never')", needs=["03_needs_bad"])
    (folder / ".ipynb_checkpoints").mkdir()
    kernel = base / "home/.local/share/jupyter/kernels/python3/kernel.json"  # of another environment
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["false"], "display_name": "Python 3", "language": "python"}))
    # Outside a virtual environment, a user's kernels come before those of the environment.
    env = environment(HOME=str(base / "home"), JUPYTER_PREFER_ENV_PATH="0")
    env["PYTHONPATH"] += f"{os.pathsep}{base}/mine"
    done = subprocess.run(command(folder), cwd=base, env=env, capture_output=True, text=True)
    done.base, done.out = base, (base / "runs/latest").resolve()
    return done


def test_a_line_a_notebook_then_where_everything_is(mixed):
    rows = [
        ("01_good", "ok"),
        ("02_bad", "failed"),
        ("03_needs_bad", "skipped: needs 02_bad"),
        ("04_needs_skipped", "skipped: needs 03_needs_bad"),
        ("05_late", "ok"),
    ]
    assert mixed.stdout.startswith("notebook ")  # without a terminal's bar
    assert re.findall(r"^(\d\d_\w+) +\d+\.\d  (.*)$", mixed.stdout, re.MULTILINE) == rows
    where = mixed.out.relative_to(mixed.base)
    assert mixed.stdout.endswith(f"\ncopies   {where}\nrecords  none written\n")
    assert (mixed.base / "runs/latest").readlink() == Path(mixed.out.name)
    assert (mixed.stderr, mixed.returncode) == ("", 1)


def test_a_failure_names_cell_exception_copy_and_log(mixed):
    where = mixed.out.relative_to(mixed.base)
    assert (
        "\n02_bad, cell 3: ValueError: last line\n"
        f"    copy {where}/02_bad.ipynb\n"
        f"    log  {where}/logs/02_bad.log\n"
    ) in mixed.stdout
    executed = nbformat.read(mixed.out / "02_bad.ipynb", 4)
    assert [c.execution_count for c in executed.cells if c.cell_type == "code"] == [1, 2, 3, None]
    assert "ValueError: first line" in (mixed.out / "logs/02_bad.log").read_text()


def test_the_kernel_is_this_python_in_the_notebooks_folder(mixed):
    facts = json.loads((mixed.out / "facts").read_text())
    path = facts.pop("path")
    assert facts == {"cwd": str(mixed.base / "notebooks"), "python": sys.executable, "headless": "1"}
    assert path == os.pathsep.join(
        [str(ROOT), str(ROOT), f"{mixed.base}/mine"]
    )  # its helpers, then the reader's


def test_what_a_child_process_prints_is_in_the_copy_and_the_log(mixed):
    outputs = nbformat.read(mixed.out / "01_good.ipynb", 4).cells[-1].outputs
    assert "".join(output.text for output in outputs) == "from a child\n"
    assert "from a child\n" in (mixed.out / "logs/01_good.log").read_text()


# ---- what is refused


REFUSED = {
    "unknown notebook": (["03_x"], r"'03_x'.*01_a, 02_b"),
    "unknown parameter": (["-p", "stesp", "3"], r"'stesp'.*known: flag, model, rate, steps"),
    "parameter of an unchosen notebook": (["02_b", "-p", "steps", "3"], r"'steps'.*known: flag"),
    "out_dir": (["-p", "out_dir", "/tmp"], r"--out DIR"),
    "store with parameters": (["--store", "-p", "steps", "3"], r"without -p"),
    "a secret": (["-p", "model", "hf_" + "Zz9" * 11], r"parameter model holds a secret, .* use the environ"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_starts(folder, capsys, arguments, message):
    write_notebook(folder, "01_a", parameters="out_dir = ''\nsteps = 1\nrate: float = 0.5\nmodel = 'm'")
    write_notebook(folder, "02_b", parameters="flag = False")
    assert run.main(["--notebooks", str(folder), *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "Zz9" not in said
    assert not (folder.parent / "runs").exists()


def test_an_unusable_folder_is_refused(folder, capsys):
    path = write_notebook(folder, "01_a")
    assert run.main(["--notebooks", str(folder), "--out", f"{path}/inside"]) == 2
    assert "--out DIR" in capsys.readouterr().err


# ---- what a run is given


def test_each_notebook_gets_its_parameters_as_yaml_reads_them(folder, tmp_path):
    names = ["steps", "rate", "flag", "model", "sizes", "kept"]
    defaults = "\n".join(["out_dir = ''", *(f"{name} = 7" for name in names)])
    shown = "{%s}" % ", ".join(f"'{name}': {name}" for name in names)  # noqa: UP031
    write_notebook(folder, "01_a", DUMP.format("a", shown), parameters=defaults)
    write_notebook(folder, "02_b", "assert 'out_dir' not in globals() and steps == 3", parameters="steps = 1")
    texts = {"steps": "3", "rate": "2.5", "flag": "False", "model": "why: what?", "sizes": "1,8,32"}
    before = subprocess.Popen(["sleep", "1000"])
    try:
        asked = plan.plan_run(
            ["notebooks/02_b.ipynb", "01_a"],
            out=tmp_path / "there",
            parameters=plan.parameters(None, texts.items()),
            notebooks=folder,
        )
        results = run.run_plan(asked)
        assert before.poll() is None, "the runner ended a process that it had not started"
    finally:
        before.kill()
        before.wait()
    assert [(r.name, r.status, r.error) for r in results] == [(n, "ok", "") for n in ("01_a", "02_b")]
    assert (tmp_path / "there/01_a.ipynb").exists()
    wanted = {"steps": 3, "rate": 2.5, "flag": False, "model": "why: what?", "sizes": "1,8,32", "kept": 7}
    assert json.loads((tmp_path / "there/a").read_text()) == wanted
    assert not (tmp_path / "runs").exists(), "--out needs no link to the latest run"


def test_a_second_run_of_the_same_second_is_refused_and_the_first_stays_the_latest(folder, monkeypatch):
    write_notebook(folder, "01_a")
    monkeypatch.setattr(time, "strftime", lambda _: "20250101-120000")
    first = plan.plan_run(notebooks=folder).out
    with pytest.raises(plan.Refused, match="File exists"):
        plan.plan_run(notebooks=folder)
    assert (first.parent / "latest").resolve() == first


TELLS = """
import os, pathlib, sys
secret = os.environ["MY_TOKEN"]
print("printed", secret)
print("to the log", secret, file=sys.__stderr__, flush=True)
os.system("echo from a child $MY_TOKEN")
pathlib.Path(out_dir, "logs", "baseline-1.log").write_text(f"vLLM says {secret}")
pathlib.Path(out_dir, "records.jsonl").write_text('{"model": "' + secret + '"}')
secret
"""


def test_a_secret_that_a_cell_tells_is_in_nothing_that_a_run_leaves(folder, tmp_path):
    """Printed, a result, by a child, in vLLM's log, in a record, in an exception, in the run's own report."""
    write_notebook(folder, "01_tells", TELLS, "raise ValueError(f'a bad key: {secret}')")
    secret = 'planted "5ecret" väl'
    done = subprocess.run(
        command(folder, "--out", str(tmp_path / "out")), env=environment(MY_TOKEN=secret),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    texts = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(texts) == {
        "01_tells.ipynb",
        "01_tells.log",
        "baseline-1.log",
        "records.jsonl",
        "results.jsonl",
    }
    texts["report"] = done.stdout + done.stderr
    for name, text in texts.items():
        assert "5ecret" not in text, name
        assert "[removed]" in text, name
    copy = nbformat.read(tmp_path / "out" / "01_tells.ipynb", 4)
    (tells,) = [cell for cell in copy.cells if cell.source == TELLS]  # code is as it was
    assert tells.outputs[0].text.startswith("printed [removed]")


# ---- storing


def test_storing_twice_gives_the_same_bytes_without_time_or_place(folder):
    path = write_notebook(folder, "01_a", "print('one')", "", "from IPython.display import HTML\n1 + 1", "x")
    original = nbformat.read(path, 4)
    original.cells[-1] = new_code_cell("y = 1", metadata={"tags": ["kept"], "execution": {"a": "2025"}})
    original.metadata.update(widgets={"state": {}}, papermill={"duration": 1}, kernelspec={"name": "mine"})
    nbformat.write(original, path)
    stored = []
    for _ in range(2):
        assert [r.status for r in run.run_plan(plan.plan_run(store=True, notebooks=folder))] == ["ok"]
        stored.append(path.read_bytes())
    assert stored[0] == stored[1]
    result = nbformat.read(path, 4)
    nbformat.validate(result)
    code = [cell for cell in result.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, None, 3, 4]
    assert code[1].outputs[0].text == "one\n"
    assert code[3].outputs[0].execution_count == 3
    assert [(c.id, c.source) for c in result.cells] == [(c.id, c.source) for c in original.cells]
    assert [dict(cell.metadata) for cell in code] == [
        {"tags": ["parameters"]},
        {},
        {},
        {},
        {"tags": ["kept"]},
    ]
    assert result.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
        "tutorial": {"needs": []},
    }


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; print('in', os.getcwd())", r"cell 2 shows a path .*; print it relative"),
        ("open('01_a.ipynb', 'a').write(' ')", "edited while it ran"),
        ("1/0", "ZeroDivisionError"),
    ],
    ids=["path", "edited", "failed"],
)
def test_nothing_is_stored_when_one_notebook_must_not_be(folder, source, reason):
    first = write_notebook(folder, "00_fine", "print('fine')")
    write_notebook(folder, "01_a", source)
    before = first.read_bytes()
    asked = plan.plan_run(store=True, notebooks=folder)
    fine, bad = run.run_plan(asked)
    assert (fine.status, bad.status) == ("ok", "failed")
    assert re.search(reason, bad.error)
    assert first.read_bytes() == before
    assert "fine" in nbformat.read(asked.out / "00_fine.ipynb", 4).cells[-1].outputs[0].text


# ---- leaving no process behind

# Two processes that detach themselves as an engine or a server might: one in a session of its own,
# one that is also orphaned at once and does not listen to SIGTERM.
START_SLEEPERS = """
import os, pathlib, subprocess, time
subprocess.Popen(["sleep", "1000.{mark}"], start_new_session=True)
subprocess.run(["sh", "-c", "trap '' TERM; setsid sleep 1000.{mark} &"], check=True)
while subprocess.run(["pgrep", "-c", "-f", "^sleep 1000.{mark}"], capture_output=True).stdout != b"2\\n":
    time.sleep(0.05)
pathlib.Path(out_dir, "new").write_text(str(os.getpid()))
pathlib.Path(out_dir, "new").rename(pathlib.Path(out_dir, "kernel"))
"""
SLEEP = "time.sleep(1000)"


def worker_of(runner: subprocess.Popen) -> psutil.Process:
    return psutil.Process(runner.pid).children()[0]


# name: last cell, extra arguments, what is done to the runner, its exit code, what it says
ENDINGS = {
    "normal end": ("1", [], None, 0, "01_end .* ok"),
    "failing cell": ("1/0", [], None, 1, "cell 4: ZeroDivisionError: division by zero"),
    "cell timeout": (SLEEP, ["--timeout", "6"], None, 1, "cell 4: CellTimeoutError: .* 6 s; .* --timeout"),
    "kernel SIGKILL": ("os.kill(os.getpid(), 9)", [], None, 1, "cell 4: DeadKernelError"),
    "SIGINT to group": (SLEEP, [], lambda r: os.killpg(r.pid, signal.SIGINT), 130, "01_end .* interrupted"),
    "SIGTERM": (SLEEP, [], lambda r: r.terminate(), 143, "01_end .* interrupted"),
    "SIGHUP": (SLEEP, [], lambda r: r.send_signal(signal.SIGHUP), 129, "01_end .* interrupted"),
    "SIGKILL": (SLEEP, [], lambda r: r.kill(), -9, ""),
    "SIGKILL to group": (SLEEP, [], lambda r: os.killpg(r.pid, signal.SIGKILL), -9, ""),
    "SIGKILL to worker": (SLEEP, [], lambda r: worker_of(r).kill(), 137, "worker was killed by signal 9"),
}


def left_over(mark: str, kernel: int) -> list[psutil.Process]:
    """The two sleepers and the kernel, as far as they still run."""
    running = psutil.process_iter(["cmdline"])  # empty for a zombie
    return [
        process
        for process in running
        if process.info["cmdline"] == ["sleep", f"1000.{mark}"]
        or (process.info["cmdline"] and process.pid == kernel)
    ]


def as_from_a_terminal() -> None:
    """Undo what a shell's background job (SIGINT) and nohup (SIGHUP) would have the runner ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def end_in_one_way(base: Path, number: int, last_cell, more, action) -> dict:
    mark = f"{os.getpid()}{number}"
    write_notebook(base / "notebooks", "01_end", START_SLEEPERS.format(mark=mark), last_cell)
    runner = subprocess.Popen(
        command(base / "notebooks", "--out", str(base / "out"), *more),
        env=environment(), stdout=(base / "said").open("w"), stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=as_from_a_terminal,
    )  # fmt: skip
    kernel, deadline = base / "out/kernel", time.monotonic() + 30
    while not (kernel.exists() and kernel.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid, started = int(kernel.read_text()), time.monotonic()
    during = left_over(mark, pid) if last_cell == SLEEP else None
    if action:
        time.sleep(0.5)  # the last cell is running by then
        action(runner)
    runner.wait(timeout=60)
    while runner.returncode == -9 and left_over(mark, pid) and time.monotonic() < started + 20:
        time.sleep(0.1)  # a killed runner cannot wait: its worker cleans up after it
    after, seconds = left_over(mark, pid), time.monotonic() - started
    for process in after:
        process.kill()
    said = (base / "said").read_text()
    return {"during": during, "after": after, "code": runner.returncode, "said": said, "seconds": seconds}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """All at once, since most of the time is spent waiting."""
    with ThreadPoolExecutor(4) as pool:
        futures = {
            name: pool.submit(end_in_one_way, tmp_path_factory.mktemp("end"), number, *ending[:3])
            for number, (name, ending) in enumerate(ENDINGS.items())
        }
    return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", ENDINGS)
def test_however_a_run_ends_no_process_is_left(endings, name):
    *_, action, code, message = ENDINGS[name]
    ending = endings[name]
    if ending["during"] is not None:
        assert len(ending["during"]) == 3, "two sleepers and a kernel should have been running"
    assert ending["after"] == []
    assert ending["code"] == code
    assert re.search(message, ending["said"])
    if action is None:
        assert ending["said"].startswith("notebook "), "nothing is printed but the report"
    assert "Traceback" not in ending["said"]
    assert ending["seconds"] < 25


def test_the_seeds_models_are_parameter_sets_that_the_notebooks_know():
    sets = sorted((ROOT / "notebooks" / "parameters").glob("*.yaml"))
    assert [path.stem for path in sets] == ["mistral-7b-awq", "phi-2"]
    for path in sets:
        for name in ("00_start_here", "01_baseline"):
            known = plan._read(ROOT / "notebooks" / f"{name}.ipynb").parameters
            assert set(plan.parameters(str(path))) <= set(known)


def test_a_file_that_holds_no_parameters_is_refused(tmp_path, capsys):
    (tmp_path / "set.yaml").write_text("steps: 3\nmodel: a\n")
    assert plan.parameters(str(tmp_path / "set.yaml")) == {"steps": 3, "model": "a"}
    for text in ("- 1\n", "a: [\n"):
        (tmp_path / "bad.yaml").write_text(text)
        assert run.main(["-f", str(tmp_path / "bad.yaml")]) == 2
    assert run.main(["-f", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_each_file_of_a_folder_is_a_run_and_only_what_is_not_finished_is_repeated(folder, tmp_path):
    """By make: three files, two at once, of which one fails; then that is mended."""
    mended = "import os\nassert steps != 2 or os.path.exists('mended')"
    write_notebook(folder, "01_a", mended, parameters="steps = 1")
    (tmp_path / "sets").mkdir()
    for number in (1, 2, 3):
        (tmp_path / f"sets/{number}.yaml").write_text(f"steps: {number}\n")
    make = ["make", "-k", "-j2", "-o", "setup", "-f", ROOT / "Makefile", "sets", "SETS=sets"]
    make += [f"VENV={sys.prefix}", "NOTEBOOKS=--notebooks notebooks"]
    asked = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    assert subprocess.run(make, **asked).returncode == 2
    (folder / "mended").touch()
    assert subprocess.run(make, **asked).returncode == 0
    results = {n: (tmp_path / f"runs/sets/{n}/results.jsonl").read_text() for n in (1, 2, 3)}
    assert {n: re.findall(r'"status": "(\w+)"', text) for n, text in results.items()} == {
        1: ["ok"], 2: ["failed", "ok"], 3: ["ok"],
    }  # fmt: skip


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
    assert "Qwen3-8B on T4 (15 GiB): 20 x 8,192 tokens" in (tmp_path / "out.ipynb").read_text()
