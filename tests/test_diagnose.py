"""The diagnosis of real texts, of what is not in the catalogue, and of what is none of vLLM's business.

tests/logs holds what vLLM and its neighbours really said; the first line of each file says where that was
recorded, or, where the hardware cannot be had, in which source the text was read. tests/test_faults.py
provokes failures anew with the real engine.
"""

import ctypes
import json
import linecache
import re
import subprocess
import sys
import time
import tomllib
import traceback
from pathlib import Path

import jsonschema
import nbformat
import papermill
import pytest

from helpers.base import holders, parameters
from helpers.base.holders import Holder
from helpers.base.parameters import ParameterError
from helpers.faults import catalogue, explain, whose
from helpers.faults.log import ECHOES, error_lines, root_cause
from helpers.faults.report import Report
from tests.test_interrupt import Kernel

TEXTS = tomllib.loads(Path(__file__).with_name("faults.toml").read_text(encoding="utf-8"))
REPO = Path(__file__).resolve().parent.parent
LOGS = sorted((Path(__file__).parent / "logs").glob("*.log"))
SERVER_LOG = Path(__file__).resolve().parent.parent / "notebooks/server.log"  # which 08 reads
HERE = object()  # a machine whose memory ``held`` says who holds
ECHO = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


def holder(where: str = "GPU 0", ours: bool = False, orphan: bool = False) -> Holder:
    whose = "an engine that this process started" if ours else "another process"
    return Holder("VLLM::EngineCore", 99, whose, 130_000, where, ours, orphan)


@pytest.fixture(autouse=True)
def held(monkeypatch) -> list[Holder]:
    """Who holds memory is the test's to say, and nobody unless it does."""
    found: list[Holder] = []
    monkeypatch.setattr(holders, "who_holds", lambda machine: found)
    return found


def recorded(path: Path) -> tuple[str, str]:
    """A file's diagnosis and its text. ``name--2.log`` is a second text of the same failure."""
    origin, _, text = path.read_text(encoding="utf-8").partition("\n")
    assert origin.startswith(("# recorded on ", "# read in ")), origin
    return path.stem.partition("--")[0], text


# -- recorded texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_a_recorded_text_has_its_diagnosis(path, held, monkeypatch):
    name, text = recorded(path)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork" if name == "fork-after-openmp" else "spawn")
    if name in ("another-engine", "another-process", "out-of-gpu-memory-taken"):
        held.append(holder(ours=name == "another-engine"))
    report = explain.explain(log=text, machine=HERE)
    assert report.name == name, report
    assert report.evidence
    assert "(not said)" not in report.what + " ".join(report.do)
    assert report.holders in (None, tuple(held))


@pytest.mark.parametrize(
    "case", TEXTS["case"], ids=lambda case: f"{case['name']}-{case['from'].rpartition('/')[2]}"
)
def test_a_text_has_its_name_and_its_advice(case):
    report = explain.explain(log=case["text"])
    said = "\n".join([report.what, *report.do])
    assert report.name == case["name"], report
    assert re.search(case.get("says", ""), said), said
    assert not re.search(case.get("never", "(?!)"), said), said
    assert "(not said)" not in said
    assert not re.search(r"\{\w*\}", report.what), report.what


@pytest.mark.parametrize(
    "before",
    [
        "vllm-1  | {}",
        "[llm]   | {}",
        "2026-11-28T20:00:00.123456789Z {}",
        "2026-11-28T20:00:00.123Z stderr F {}",
        "2026-11-28 20:00:00.123 | {}",
        "Nov 28 20:00:00 host vllm[123]: {}",
        "[pod/llm-0/vllm] {}",
        "[rank0]: {}",
        "(RayWorkerWrapper pid=5, ip=10.0.0.3) {}",
        "\x1b[36m(EngineCore pid=3)\x1b[0;0m {}",
        "vllm  | 2026-11-28T20:00:00Z (APIServer pid=1) {}",
        "(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402] {}",
        "ERROR 11-23 18:00:01 engine.py:366] {}",
        '{"log": %s, "stream": "stderr"}',
    ],
)
def test_whatever_stands_before_a_message_it_is_the_same_message(before):
    for case in TEXTS["case"]:
        lines = case["text"].strip("\n").splitlines()
        form = (lambda line: before % json.dumps(line)) if "%s" in before else before.format
        assert explain.explain(log="\n".join(map(form, lines))).name == case["name"], case


def test_every_entry_is_whole_and_has_a_text():
    table = tomllib.loads(catalogue.FILE.read_text(encoding="utf-8"))
    jsonschema.validate(
        table, json.loads(catalogue.FILE.with_suffix(".schema.json").read_text(encoding="utf-8"))
    )
    names = [entry.name for entry in catalogue.entries()]
    assert len(names) == len(set(names))
    for entry in catalogue.entries():
        assert entry.what.endswith((".", "}", ": {said}")), entry.name
    texts = {recorded(path)[0] for path in LOGS} | {case["name"] for case in TEXTS["case"]} - {"unknown"}
    provoked = {"orphaned-engine", "engine-died-no-log"}  # below
    assert texts | provoked == set(names)


def test_a_whole_servers_log_is_told_by_the_child_in_its_middle():
    log = SERVER_LOG.read_text(encoding="utf-8")
    assert log.startswith("# recorded on ")
    last = [line for line in error_lines(log) if "Error: " in line][-1]
    assert any(echo in last for echo in ECHOES), "the last error is an echo"
    report = explain.explain(log=log)
    assert (report.name, report.holders) == ("cpu-memory-share", None)
    assert "1024.0 GiB" in report.what
    assert report.evidence not in "\n".join(log.splitlines()[-30:])


CHILD = """\
(EngineCore pid=99) INFO 11-23 18:00:00 [core.py:133] Initializing a V1 LLM engine (v0.32.0)
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402] EngineCore failed to start.
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402] Traceback (most recent call last):
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402]   File "gpu_worker.py", line 1, in init_device
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402] ValueError: Something new (1/2 GiB) is amiss
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


PYDANTIC = "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", None),
        ("INFO all is well", None),
        ("the word Error: in a sentence", None),
        ("Error", None),
        ("ErrorHandler: started", None),
        ("    except NotImplementedError:", None),
        ("    raise AssertionError", None),
        ("TimeoutExpired", None),
        ("asyncio.exceptions.CancelledError", None),  # of a server that is stopped: a consequence
        (CHILD, "ValueError: Something new (1/2 GiB) is amiss"),  # the child's words, and not the echo
        ("torch.OutOfMemoryError: CUDA out of memory.", "OutOfMemoryError: CUDA out of memory."),
        (PYDANTIC, "ValidationError: 1 validation error for VllmConfig"),
        (f"{PYDANTIC}\n  Value error, Expecting value [type=x, y=1]", "ValidationError: Expecting value"),
    ],
)
def test_the_root_cause_is_an_error_and_no_other_word(log, cause):
    assert root_cause(log) == cause


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("AssertionError", "AssertionError"),
        ("NotImplementedError", "NotImplementedError"),
        ("torch._dynamo.exc.Unsupported: Attempted to call", "Unsupported: Attempted to call"),
        ("subprocess.TimeoutExpired: Command 'x' timed out", "TimeoutExpired: Command 'x' timed out"),
        ("pynvml.NVMLError_LibRmVersionMismatch: RM has", "NVMLError_LibRmVersionMismatch: RM has"),
    ],
)
def test_an_error_without_a_message_or_the_usual_ending_is_a_cause(line, cause):
    log = CHILD.replace("ValueError: Something new (1/2 GiB) is amiss", line)
    assert root_cause(log) == cause
    report = explain.explain(ECHO, log)
    assert (report.name, report.evidence) == ("unknown", cause)
    assert report.trace.endswith(line)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_failures_the_first_in_the_log_is_named(order):
    said = {
        "lora-rank": "ValueError: LoRA rank 64 is greater than max_lora_rank 16.",
        "disk-full": "OSError: [Errno 28] No space left on device",
    }
    names = [*said][::order]
    assert explain.explain(log="\n".join(said[name] for name in names)).name == names[0]


def test_an_engine_that_died_without_a_word_shows_the_traceback_there_is():
    log = 'Traceback (most recent call last):\n  File "core.py", line 1, in run\n' + str(ECHO)
    report = explain.explain(ECHO, log)
    assert report.name == "engine-died"
    assert 'File "core.py", line 1' in str(report)


def test_a_message_over_several_lines_is_found_beside_an_echo():
    said = [
        "ValueError: Failed to find a kernel that can implement the ScaledMM linear layer. Reasons: ",
        "CPUFP8W8A8ScaledMMLinearKernel requires per-channel scales.",
    ]
    log = "EngineCore encountered a fatal error.\n" + "\n".join(["word " * 200, *said, str(ECHO)])
    report = explain.explain(ECHO, log)
    assert report.name == "fp8-per-tensor-on-cpu"
    assert report.evidence.startswith("ValueError: Failed to find a kernel")


# -- one text, several causes ------------------------------------------------------------------------------

FREE = (
    "ValueError: Free memory on device cuda:0 ({free}/139.8 GiB) on startup is less than desired GPU memory "
    "utilization (0.9, 125.82 GiB). Decrease GPU memory utilization or reduce GPU memory used by others."
)


@pytest.mark.parametrize(
    ("free", "who", "name"),
    [
        ("11.81", [holder(ours=True)], "another-engine"),
        ("11.81", [holder()], "another-process"),
        ("11.81", [holder(orphan=True)], "orphaned-engine"),
        ("11.81", [holder(orphan=True), holder(ours=True)], "another-engine"),
        ("11.81", [], "another-process"),  # in a container the driver names nobody
        ("139.1", [], "utilization-too-high"),
    ],
)
def test_who_holds_the_memory_decides(held, free, who, name):
    held += who
    report = explain.explain(ECHO, FREE.format(free=free))
    assert report.name == name
    assert free in report.what
    if name == "orphaned-engine":
        assert report.do[0].startswith("kill 99 ")
    if name == "utilization-too-high":
        assert "gpu_memory_utilization=0.97" in report.do[0]
    elif who:
        assert "130,000 MiB" in str(report)


def test_a_failure_on_the_way_out_of_another_has_its_own_cause(held):
    """As on the GPU: an engine too many, and while that was handled one that asked for little."""
    held.append(holder(ours=True))
    first, second = ValueError(FREE.format(free="13.15")), RuntimeError(str(ECHO))
    second.__context__ = first
    assert explain.explain(second, SEED, HERE).name == "another-engine"
    first.report = explain.explain(first, machine=HERE)  # it has had its diagnosis
    assert explain.explain(second, SEED, HERE).name == "out-of-gpu-memory-taken"
    second.__cause__ = first  # now it says that the first is why
    assert explain.explain(second, SEED, HERE).name == "another-engine"


SEED = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 MiB. GPU 0 has a total capacity of 22.03 "
    "GiB of which 43.06 MiB is free. Including non-PyTorch memory, this process has 21.98 GiB memory in use."
)


def test_the_log_this_project_was_made_from(held):
    """It said: "FP8 requires Ampere+ GPUs. Your GPU may not support FP8"."""
    assert explain.explain(log=SEED, machine=HERE).name == "model-too-large"
    held.append(holder(ours=True))
    report = explain.explain(log=SEED, machine=HERE)
    assert report.name == "out-of-gpu-memory-taken"
    assert "about memory, not about the formats" in report.what
    assert "130,000 MiB" in str(report)
    held[:] = [holder("memory")]  # who holds a computer's main memory is beside the point
    assert explain.explain(log=SEED, machine=HERE).name == "model-too-large"


def test_a_log_alone_comes_from_elsewhere_and_names_nobody_here(held):
    held.append(holder(ours=True))
    report = explain.explain(log=SEED)
    assert (report.name, report.holders) == ("model-too-large", None)
    assert "Who holds" not in str(report) + report._repr_html_()
    assert explain.explain(log="ERROR 11-02 04:23:37 [core.py:99] RuntimeError: new").holders is None
    assert explain.explain(ECHO, SEED).name == "out-of-gpu-memory-taken", "with its exception it failed here"


# -- the control: failures that are the reader's own -------------------------------------------------------

CALM = """\
INFO 11-23 18:00:00 [gpu_worker.py:1013] Free memory on device (11.81/139.8 GiB) on startup. Desired GPU \
memory utilization is (0.9, 125.82 GiB).
WARNING 11-23 18:00:00 [x.py:1] No space left on device? CUDA out of memory. trust_remote_code=True
(EngineCore pid=9) INFO 11-23 18:00:00 [x.py:1] Cannot find the config file for awq
"""


@pytest.mark.parametrize(
    "log", ["", CALM, CHILD, FREE.format(free="1.0")], ids=["none", "calm", "child", "old error"]
)
@pytest.mark.parametrize("own", TEXTS["own"], ids=lambda own: own["slip"])
def test_a_slip_in_the_readers_own_cell_is_not_blamed_on_vllm(own, log):
    cell, expected = compile(own["code"], "<cell>", "exec"), own.get("name", "own-code")
    linecache.cache["<cell>"] = (1, None, own["code"].splitlines(keepends=True), "<cell>")  # as IPython does
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        exec(cell, {})
    report = explain.explain(caught.value, log)
    assert report.name == expected, report
    assert not report.trace, "an old log beside an exception does not count"
    if expected == "own-code":
        assert type(caught.value).__name__ in report.what
        assert "vLLM" in report.what
        assert report.evidence.startswith(type(caught.value).__name__)


@pytest.mark.parametrize(
    "again",
    [
        "raise",
        "raise error",
        "raise RuntimeError('it failed') from error",
        "raise RuntimeError('it failed')",
        "raise RuntimeError(f'it failed: {error}') from None",
    ],
)
def test_an_error_that_a_cell_passes_on_keeps_its_diagnosis(again):
    """`raise` in a cell of the reader's is not where it came from."""
    code = f"try:\n    torch.empty(2**50, dtype=torch.uint8)\nexcept Exception as error:\n    {again}"
    import torch

    with pytest.raises(RuntimeError) as caught:
        exec(compile(code, "<cell>", "exec"), {"torch": torch})
    assert explain.explain(caught.value).name == "out-of-memory"


@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])  # the second: Debian and Colab
def test_an_error_of_vllms_own_is_not_called_the_readers(packages, tmp_path):
    file = str(tmp_path / "usr/local/lib/python3.12" / packages / "vllm/engine.py")
    scope: dict = {}
    exec(compile("def step(): raise RuntimeError('something new')", file, "exec"), scope)
    with pytest.raises(RuntimeError) as caught:
        exec(compile("step()", "<cell>", "exec"), scope)
    assert explain.explain(caught.value).name == "unknown"
    assert whose.package(file) == "vllm"


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("d = {}\nprint(d['CUDA out of memory.'])", "own-code"),
        ("# No available memory for the cache\nraise ValueError('Address already in use')", "own-code"),
        ("open('/dev/full', 'w').write('x' * 10**6)", "disk-full"),
        ("import json\njson.loads('{')", "unknown"),
        ("import os\nos.kill(os.getpid(), 9)", "kernel-died"),
    ],
)
def test_what_a_runs_log_quotes_is_diagnosed(cell, name, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbformat.write(notebook, tmp_path / "cell.ipynb")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        papermill.execute_notebook(tmp_path / "cell.ipynb", None, kernel_name="python3", progress_bar=False)
    report = explain.explain(log="".join(traceback.format_exception(caught.value)))
    assert report.name == name, report
    assert report.evidence.partition(":")[0].endswith(("Error", "Kernel died"))


def test_a_hundred_megabytes_are_read_in_linear_time():
    """A fifth of that here, with room for a busy machine; every line reports an error, and none is known."""
    line = "(APIServer pid=1) ERROR 11-23 18:00:00 [serving.py:3] Error code: 404 not divisible by {}\n"
    started = time.process_time()
    report = explain.explain(log="".join(line.format(number) for number in range(200_000)) + CHILD)
    assert time.process_time() - started < 6
    assert report.name == "unknown"


def test_the_command_reads_a_pipe_and_answers_in_a_moment():
    text = "vllm-1  | \x1b[31mERROR\x1b[0m 11-23 18:00:00 [x.py:1] "
    text += "ValueError: LoRA rank 64 is greater than max_lora_rank 16."
    command = [sys.executable, "-X", "importtime", "-m", "helpers.explain", "--json", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=REPO, check=True)
    said = json.loads(done.stdout)
    assert list(said) == ["name", "what", "evidence", "do", "read"]
    assert said["name"] == "lora-rank"
    assert said["do"] == ["max_lora_rank=64      # a server: --max-lora-rank 64"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "vllm", "numpy", "transformers"} & imported


def test_the_command_asks_for_a_log_and_says_where_it_is():
    command = [sys.executable, "-m", "helpers.explain", "--json"]
    done = subprocess.run(command, input="", capture_output=True, text=True, cwd=REPO, check=True)
    said = json.loads(done.stdout)
    assert said["name"] == "unknown"
    assert "kubectl logs" in " ".join(said["do"])
    done = subprocess.run([*command, "no-such.log"], capture_output=True, text=True, cwd=REPO)
    assert (done.returncode, "no-such.log cannot be read" in done.stderr) == (2, True)


def test_a_missing_driver_library_is_known_by_what_the_loader_says():
    with pytest.raises(OSError, match="libcuda") as caught:
        ctypes.CDLL("libcuda.so.000")  # no machine has this one
    assert explain.explain(caught.value).name == "no-driver"


# -- what is not known -------------------------------------------------------------------------------------


def test_an_unknown_failure_says_so_and_shows_the_root_traceback(tmp_path):
    report = explain.explain(ECHO, CHILD)
    assert report.name == "unknown"
    assert "not known here, and nothing is guessed" in report.what
    assert report.evidence == "ValueError: Something new (1/2 GiB) is amiss"
    assert report.trace.startswith("Traceback (most recent call last)")
    assert report.trace.endswith("is amiss")
    assert "Engine core initialization" not in report.trace


def test_without_an_error_it_takes_the_last_one_shown(monkeypatch):
    for name in ("last_exc", "last_value"):
        monkeypatch.delattr(sys, name, raising=False)
    assert explain.explain().name == "nothing"
    monkeypatch.setattr(sys, "last_value", ECHO, raising=False)
    assert explain.explain().name == "engine-died-no-log"
    assert "log=" in explain.explain().do[0]


def test_in_a_notebook_the_cell_after_a_failure_asks_without_an_argument():
    kernel = Kernel()
    try:
        assert kernel.run("answer = 1\nanswer / 0")[1] == "ZeroDivisionError"
        said, error = kernel.run("from helpers.faults import explain\nprint(explain.explain())")
    finally:
        kernel.close()
    assert not error
    assert "ZeroDivisionError in line 2 of your own code, `answer / 0`" in said


def test_a_diagnosis_never_fails_itself(monkeypatch):
    def broken(machine):
        raise OSError("the driver does not answer")

    monkeypatch.setattr(holders, "who_holds", broken)
    assert explain.explain(ECHO, FREE.format(free="1.0")).name == "another-process"


def test_a_report_travels_with_its_error():
    error = ValueError("x")
    error.report = Report("known", "It is known.", "x")
    assert explain.explain(error) is error.report


def test_an_error_of_these_helpers_speaks_for_itself():

    with pytest.raises(ParameterError) as caught:
        parameters.whole("max_tokens", "abc", 1, 9)
    report = explain.explain(caught.value)
    assert report.name == "ours"
    assert report.what == "max_tokens must be a whole number from 1 to 9, not 'abc'."


def test_the_card_has_all_of_the_text_and_no_markup_of_its_own(held):
    held.append(holder())
    report = explain.explain(ECHO, FREE.format(free="11.81") + " <b>&")
    card = report._repr_html_()
    assert "&lt;b&gt;&amp;" in card
    assert "<b>&" not in card
    for words in ("Evidence", "Who holds the memory", "What to do", "nvidia-smi", "Read"):
        assert words in card
        assert words in str(report)
