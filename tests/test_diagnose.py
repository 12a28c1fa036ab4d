"""The diagnosis of real texts, of what is not in the catalogue, and of what is none of vLLM's business.

tests/logs holds what vLLM and its neighbours really said; the first line of each file says where that was
recorded, or, where the hardware cannot be had, in which source the text was read. tests/test_faults.py
provokes failures anew with the real engine.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from helpers.base import holders, parameters, redact
from helpers.base.holders import Holder
from helpers.base.parameters import ParameterError
from helpers.faults import explain
from helpers.faults.catalogue import CATALOGUE
from helpers.faults.log import ECHOES, error_lines, root_cause, short
from helpers.faults.report import LONGEST_EVIDENCE, Report
from tests.test_interrupt import Kernel

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
def test_a_recorded_text_has_its_diagnosis(path, held, monkeypatch, table):
    name, text = recorded(path)
    origin = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork" if name == "fork-after-openmp" else "spawn")
    if name in ("another-engine", "another-process", "out-of-gpu-memory-taken"):
        held.append(holder(ours=name == "another-engine"))
    report = explain.explain(log=text, machine=HERE)
    how = "recorded" if origin.startswith("recorded") else "source"
    table.add(how, path.stem, origin, report.name, name)
    assert report.name == name, report
    assert report.evidence
    assert "(not said)" not in report.what + " ".join(report.do)
    assert report.holders in (None, tuple(held))


def test_there_are_enough_of_them_and_every_entry_is_whole():
    assert len({recorded(path)[0] for path in LOGS}) >= 24
    names = [entry.name for entry in CATALOGUE]
    assert len(names) == len(set(names))
    for entry in CATALOGUE:
        assert 1 <= len(entry.do) <= 3, entry.name
        assert entry.what.endswith("."), entry.name
        assert entry.read, entry.name
        assert entry.seen, entry.name
    assert {recorded(path)[0] for path in LOGS} <= set(names)


@pytest.mark.parametrize("path", [*LOGS, SERVER_LOG], ids=lambda path: path.stem)
def test_no_recorded_text_names_a_machine_or_holds_a_secret(path):
    text = path.read_text(encoding="utf-8")
    for trace in ("/root/", "/home/", "/work/", "hf_", "sk-"):
        assert trace not in text


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


def test_the_cause_in_the_childs_words_and_not_the_echo():
    assert root_cause(CHILD) == "ValueError: Something new (1/2 GiB) is amiss"


@pytest.mark.parametrize(
    "log",
    [
        "",
        "INFO all is well",
        "the word Error: in a sentence",
        "Error",
        "ErrorHandler: started",
        "Errors: 0",
        "    except NotImplementedError:",
        "    raise AssertionError",
        "Unsupported: a word of ours",
        "TimeoutExpired",
        "asyncio.exceptions.CancelledError",  # of a server that is stopped: a consequence
    ],
)
def test_a_log_without_an_error_has_no_cause(log):
    assert root_cause(log) is None


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


def test_an_engine_that_died_without_a_word_shows_the_traceback_there_is():
    log = 'Traceback (most recent call last):\n  File "core.py", line 1, in run\n' + str(ECHO)
    report = explain.explain(ECHO, log)
    assert report.name == "engine-died"
    assert 'File "core.py", line 1' in str(report)


def test_an_exceptions_module_is_left_out():
    assert (
        root_cause("torch.OutOfMemoryError: CUDA out of memory.") == "OutOfMemoryError: CUDA out of memory."
    )


def test_pydantics_frame_around_a_message_is_left_out():
    error = ValueError("1 validation error for X\\n  Value error, too long [type=value_error, input_value=1]")
    assert short(error) == "ValueError: too long"


@pytest.mark.parametrize("name", ["fp8-per-tensor-on-cpu", "argument-refused", "script-without-guard"])
def test_a_servers_last_line_changes_no_diagnosis(name):
    text = recorded(LOGS[0].with_name(f"{name}.log"))[1]
    report = explain.explain(ECHO, f"{text}\nRuntimeError: {ECHO}\n")
    assert report.name == name


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


def test_what_fits_is_not_offered_where_nothing_does():
    assert "free the memory first" in explain.explain(ECHO, FREE.format(free="1.0")).do[2]


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


@pytest.mark.parametrize(
    "said",
    [
        "torch.AcceleratorError: CUDA error: out of memory",
        "RuntimeError: Triton Error [CUDA]: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "torch.distributed.DistBackendError: NCCL error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_a_full_gpu_in_the_words_of_every_library(held, said):
    assert explain.explain(ECHO, said).name == "model-too-large"
    held.append(holder(ours=True))
    assert explain.explain(ECHO, said).name == "out-of-gpu-memory-taken"


def test_the_context_is_a_number_whatever_the_model_calls_it():
    text = recorded(LOGS[0].with_name("context-too-long--2.log"))[1]
    assert explain.explain(ECHO, text).do == ("max_model_len=1024 or less",)


@pytest.mark.parametrize(
    "said", ["OSError: [Errno 122] Disk quota exceeded: '/x'", "x: Disk quota exceeded (os error 122)"]
)
def test_a_quota_is_a_full_disk_too(said):
    assert explain.explain(ECHO, said).name == "disk-full"


DUMP = (
    "(EngineCore pid=99) ERROR 08-01 12:00:00 [dump_input.py:72] Dumping input data for V1 LLM engine "
    "(v0.32.0) with config: model='/m', trust_remote_code=True, \n"
)
ADVICE = (
    "RuntimeError: Failed to load the processor. If the processor is a custom processor not yet available "
    "in the HuggingFace transformers library, consider setting `trust_remote_code=True` in LLM"
)


@pytest.mark.parametrize(
    "log",
    [
        DUMP + "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "ValueError: Tokenizer class X does not exist or is not currently imported.\n" + ADVICE,
    ],
    ids=["dumped", "advised"],
)
def test_only_a_model_with_code_of_its_own_is_said_to_have_some(log):
    assert explain.explain(ECHO, log).name == "unknown"


def test_a_log_alone_comes_from_elsewhere_and_names_nobody_here(held):
    held.append(holder(ours=True))
    report = explain.explain(log=SEED)
    assert (report.name, report.holders) == ("model-too-large", None)
    assert "Who holds" not in str(report) + report._repr_html_()
    assert (
        explain.explain(log="ERROR 11-02 04:23:37 [core.py:99] RuntimeError: something new").holders is None
    )
    assert explain.explain(ECHO, SEED).name == "out-of-gpu-memory-taken", "with its exception it failed here"


# -- the control: failures that are the reader's own -------------------------------------------------------

OWN = {
    "a name": "engin.ask('x')",
    "division": "1 / 0",
    "a key that sounds like vLLM": "{}['quantization']",
    "an index": "[][3]",
    "an attribute": "None.outputs",
    "their own ValueError in our words": "raise ValueError('group size must divide max_model_len')",
    "their own file": "open('no-such-config.json')",
    "their own JSON": "__import__('json').loads('{')",
    "their own assert": "assert 'FP8' == 'AWQ', 'out of memory'",
    "their own import": "import a_module_that_nobody_has",
    "types": "'a' + 1",
    "wrong arguments": "(lambda a: a)(quantization='fp8')",
    "recursion": "f = lambda n: f(n + 1)\nf(0)",
    "unicode": "b'\\xff'.decode('utf-8')",
    "a child of theirs": "__import__('subprocess').run(['false'], check=True)",
    "a timeout of theirs": "raise TimeoutError('the engine did not answer')",
    "a number": "int('bfloat16')",
    "numpy shapes": "import numpy as np\nnp.ones(3) @ np.ones(4)",
    "a connection of theirs": "import socket\nsocket.create_connection(('127.0.0.1', 1), timeout=1)",
    "syntax": "exec('quantization = = 4')",
    "torch shapes": "import torch\ntorch.ones(2, 3) @ torch.ones(4, 5)",
    "torch types": "import torch\ntorch.ones(2, dtype=torch.int64).softmax(0, dtype='bfloat16')",
    "a plot": "import matplotlib.pyplot as plt\nplt.plot([1, 2], [1, 2, 3])",
    "a picture": "import matplotlib.pyplot as plt\nplt.imread('CUDA.png')",
    "a table": "import pandas as pd\npd.DataFrame({'scheme': []})['gpu_memory_utilization']",
    "a message of theirs about CUDA": "raise RuntimeError('CUDA out of memory. I made this up')",
    "a message of theirs about memory": "raise MemoryError('no KV cache left')",
    "a check of theirs": "assert False, 'No available memory for the cache blocks'",
    "a message of theirs about the disk": "raise OSError(28, 'No space left on device')",
    "a message of theirs about remote code": "raise ValueError('set trust_remote_code=True')",
    "a port in their text": "raise ValueError('Address already in use: 8000')",
    "a file of theirs": "open('model.safetensors')",
    "safetensors of theirs": "from pathlib import Path\nPath('model-00001.safetensors').read_bytes()",
    "their own class": "class EngineDeadError(Exception): pass\nraise EngineDeadError('my engine')",
    "a sum of theirs": "sum(['Free memory on device cuda:0', 'is less than desired'])",
    "a missing key in a message": "'{scheme} has no kernel'.format(name='fp8')",
    "an interrupt of a dict": "d = {'fp8': 1}\nfor k in d: d.pop(k)",
    "a file named like a fault": "open('no chat template.txt')",
    "another file named like a fault": "open('Missing files.csv')",
    "words of theirs about a key": "try: {}['k']\nexcept KeyError as e: "
    "raise RuntimeError('group_size must be one of 1, 2') from e",
    "words of theirs without a key": "try: {}['k']\nexcept KeyError: raise OSError('Address already in use')",
}
CALM = """\
INFO 11-23 18:00:00 [gpu_worker.py:1013] Free memory on device (11.81/139.8 GiB) on startup. Desired GPU \
memory utilization is (0.9, 125.82 GiB).
WARNING 11-23 18:00:00 [x.py:1] No space left on device? CUDA out of memory. trust_remote_code=True
(EngineCore pid=9) INFO 11-23 18:00:00 [x.py:1] Cannot find the config file for awq
"""


@pytest.mark.parametrize(
    "log", ["", CALM, CHILD, FREE.format(free="1.0")], ids=["none", "calm", "child", "old error"]
)
@pytest.mark.parametrize("code", OWN.values(), ids=OWN)
def test_a_slip_in_the_readers_own_cell_is_not_blamed_on_vllm(code, log, request, table):
    cell = compile(code, "<cell>", "exec")
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        exec(cell, {})
    report = explain.explain(caught.value, log)
    fault, _, given = request.node.callspec.id.rpartition("-")
    table.add("control", fault, f"own cell, log: {given}", report.name, "own-code")
    assert report.name == "own-code", report
    assert type(caught.value).__name__ in report.what
    assert "vLLM has no part in it" in report.what


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
    assert explain._is_library(file)


def test_a_calm_log_has_no_diagnosis():
    assert explain.explain(log=CALM).name == "unknown"


def test_what_the_system_says_is_known_whoever_asked_for_it():
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "w") as file:  # noqa: PTH123
        file.write("x")
        file.flush()
    assert explain.explain(caught.value).name == "disk-full"


def test_a_missing_driver_library_is_known_by_what_the_loader_says():
    with pytest.raises(OSError, match="libcuda") as caught:
        ctypes.CDLL("libcuda.so.000")  # no machine has this one
    assert explain.explain(caught.value).name == "no-driver"


def test_the_limit_of_open_files_is_known_by_what_the_system_says(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))  # noqa: PTH208
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            files.extend((tmp_path / "x").open("a") for _ in range(64))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()
    assert explain.explain(caught.value).name == "too-many-open-files"


# -- what is not known -------------------------------------------------------------------------------------


def test_an_unknown_failure_says_so_and_shows_the_root_traceback(tmp_path):
    report = explain.explain(ECHO, CHILD)
    assert not report.known
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
    assert explain.explain().name == "engine-died"


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


# -- secrets -----------------------------------------------------------------------------------------------

PLANTED = "planted-5ecret-value"
TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"OSError: token {TOKEN} is not valid",
        f"\x1b[38;5;124m{TOKEN}\x1b[39m",
        json.dumps({"output": f"the token:\n{TOKEN}"}),
        f"url?token%3D{TOKEN}",
        "non-default args: {'model': 'x', 'api_key': ['" + PLANTED + "'], 'port': 8000}",
        f"command: vllm serve --api-key {PLANTED} --port 8000",
        f"headers: {{'Authorization': 'Bearer {PLANTED}'}}",
        f"Authorization: Basic {PLANTED}",
        f"proxy http://user:{PLANTED}@proxy:3128 refused",
        f"the value {PLANTED} of a variable",
    ],
)
def test_secrets_are_removed(text, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", PLANTED)
    shown = redact.redact(text)
    assert PLANTED not in shown
    assert TOKEN not in shown
    assert "[removed]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "Command '['vllm', 'serve', 'm', '--api-key', '§']' returned",
        '"cmd": "vllm serve --api-key=\\"§\\" m"',
        "x-api-key: §",
        "(b'x-api-key', b'§')",
        "redis://:§@host:6379/0",
        "https://§-0123456789@github.com/x/y",
        "gho_§ ghs_§",
        "api_key=['§', 'other-§'], port=1",
        "AWS_SECRET_ACCESS_KEY=§ GH_TOKEN=§-1",
        "environ({'MY_TOKEN': '§-1', 'DB_PASSWORD': '§!'})",
        "login(token='§-1')",
        "Authorization: Bearer §",
        "(b'authorization', b'Bearer §')",
        "curl -H 'Bearer §-long-pass'",
        'api_key\x1b[38;5;241m=\x1b[39m\x1b[38;5;124m"\x1b[39m\x1b[38;5;124m§\x1b[39m',
    ],
)
def test_a_secret_of_another_process_is_known_by_its_place(text):
    shown = redact.redact(text.replace("§", "correcthorsebat"))
    assert "correcthorsebat" not in shown
    assert "[removed]" in shown
    assert redact.redact(shown) == shown


def test_half_a_secret_is_not_left_where_evidence_is_cut(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", PLANTED)
    start = "RuntimeError: "
    said = start + "y" * (LONGEST_EVIDENCE - len(start) - 20) + f" {PLANTED} and more words"
    for report in (explain.explain(log=said), explain.explain(RuntimeError(said.removeprefix(start)))):
        assert PLANTED[:9] not in report.evidence


def test_long_lines_are_searched_for_secrets_in_a_moment():
    started = time.monotonic()
    for text in (
        "a" * 200_000,
        "A" * 200_000,
        "TOKEN" * 40_000,
        "api_key " * 25_000,
        "api_key=" + " " * 200_000,
    ):
        assert redact.redact(text) == text
    assert time.monotonic() - started < 20  # a second; tried again at every letter it takes minutes


@pytest.mark.parametrize("path", [*LOGS, SERVER_LOG], ids=lambda path: path.stem)
def test_in_what_vllm_says_nothing_is_taken_for_a_secret(path):
    text = path.read_text(encoding="utf-8")
    assert redact.remove(text) == text


def test_what_is_no_secret_stays():
    text = "max_tokens=100, tokenizer='x', 5 tokens/s, key 'a' not found, basic knowledge, Token 7 of 9"
    text += ", VLLM_API_KEY=... vllm serve, a bearer certificate, bearer authentication"
    text += ", authorization, of course"
    text += ", max_tokens=50, bos_token='<s>', eos_token_id=2, tokens=512, pad_token='<|endoftext|>'"
    text += (
        ", 'eos_token': '</s>', EOS_TOKEN = '<|im_end|>', PAD_TOKEN_ID=151643, token='Paris', hf_token=None"
    )
    text += ", MAX_NUM_BATCHED_TOKENS=8192, TOKENIZERS_PARALLELISM=false, decoded_token='Paris1234'"
    text += ", http://localhost:8000/v1, ssh://git@github.com, task-12345678, stop_token_ids=[151645]"
    assert redact.redact(text) == text


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")), ids=str)
def test_in_what_the_lessons_say_nothing_is_taken_for_a_secret(path):
    text = path.read_text(encoding="utf-8")
    assert redact._notebook(text) == text


def test_a_planted_secret_is_in_no_part_of_a_report_or_its_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", PLANTED)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    log = CHILD.replace("Something new", f"Something new {PLANTED} {TOKEN}")
    report = explain.explain(ECHO, log)
    everything = [str(report), report._repr_html_(), report.log, report.trace]
    with zipfile.ZipFile(report.bundle(tmp_path / "diagnosis.zip")) as archive:
        assert set(archive.namelist()) == {"report.txt", "facts.json", "log.txt"}
        everything += [archive.read(name).decode() for name in archive.namelist()]
        facts = json.loads(archive.read("facts.json"))
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["settings"]["HF_TOKEN"] == "[removed]"
    for text in everything:
        assert PLANTED not in text
        assert TOKEN not in text


def test_diagnosing_imports_neither_torch_nor_vllm():
    code = "import sys\nfrom helpers.faults import explain\nexplain.explain(log='x')\n"
    code += "assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_pydantic_says_on_the_next_line_is_the_cause():
    log = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, Expecting value: line 1 column 1 (char 0) [type=value_error, input_value=Args]\n"
        "    For further information visit the documentation\n"
    )
    assert root_cause(log) == "ValidationError: Expecting value: line 1 column 1 (char 0)"
    assert root_cause(log.splitlines()[0]) == "ValidationError: 1 validation error for VllmConfig"
