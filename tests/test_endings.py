"""A notebook that ends badly while its engine runs: no process, no shared memory, and the next engine starts.

The engine is in a child of the kernel, as it is on a GPU. Slow: each waits for real engines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.test_interrupt import Kernel
from tests.test_run import as_from_a_terminal, command, environment, worker_of, write_notebook

pytestmark = pytest.mark.slow

IMPORTS = """
import time
from helpers.engine import open_engine
small = dict(max_model_len=512, kv_cache_memory_bytes=256 * 2**20, log_dir={logs!r})
print("READY")
"""
IN_CHILD = (
    'with open_engine(**small, in_process=False) as engine:\n    print("GO", flush=True)\n    time.sleep(600)'
)
PARIS = """
with open_engine(**small{more}) as engine:
    print(engine.ask("What is the capital of France?", 20).outputs[0].text)
"""


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def gone(processes, shared: set[str], within_s: float = 20.0) -> tuple[list, set[str]]:
    """What is still there of processes and shared memory once all is gone, or the time is up."""
    stop = time.monotonic() + within_s
    while True:
        left = [process for process in processes if process.is_running() and process.status() != "zombie"]
        new = shared_memory() - shared
        if not (left or new) or time.monotonic() > stop:
            return left, new
        time.sleep(0.2)


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel()
    said, error = kernel.run(IMPORTS.format(logs=str(tmp_path / "logs")))
    assert not error, said
    yield kernel
    kernel.close()


def start_and_leave_running(kernel: Kernel) -> set[psutil.Process]:
    """Open an engine in a child and return the kernel's descendants, the kernel's own process with them."""
    message, said, stop = kernel.client.execute(IN_CHILD), "", time.monotonic() + 120
    while "GO" not in said and time.monotonic() < stop:
        reply = kernel.client.get_iopub_msg(timeout=120)
        if reply["parent_header"].get("msg_id") == message:
            said += reply["content"].get("text", "")
    assert "GO" in said
    process = psutil.Process(kernel.manager.provisioner.pid)
    found = {process, *process.children(recursive=True)}
    assert len(found) > 1, "the engine has a process of its own"
    return found


@pytest.mark.parametrize("how", ["SIGKILL", "restart"])
def test_a_kernel_that_is_killed_or_restarted_takes_its_engine_along(kernel, how):
    shared = shared_memory()
    processes = start_and_leave_running(kernel)
    if how == "SIGKILL":
        os.kill(kernel.manager.provisioner.pid, signal.SIGKILL)
    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(60)
    assert gone(processes, shared) == ([], set())
    said, error = kernel.run(IMPORTS.format(logs="logs") + PARIS.format(more=""))
    assert not error, said
    assert "Paris" in said


def test_a_kernel_that_is_shut_down_politely_leaves_nothing(kernel):
    shared = shared_memory()
    processes = start_and_leave_running(kernel)
    kernel.manager.shutdown_kernel(now=False)
    assert gone(processes, shared) == ([], set())


def test_ctrl_c_again_and_again_while_generating(kernel):
    cell = (
        'with open_engine(**small) as engine:\n    print("GO", flush=True)\n'
        '    engine.ask("Tell a long story.", 450)\nprint("PAST")'
    )
    for pause in (0.01, 0.05, 0.3):
        message, said, error = kernel.client.execute(cell), "", ""
        while True:
            reply = kernel.client.get_iopub_msg(timeout=120)
            if reply["parent_header"].get("msg_id") != message:
                continue
            content = reply["content"]
            said += content.get("text", "")
            error = content.get("ename", error)
            if "GO" in said and content.get("text"):
                time.sleep(1.0)
                for _ in range(5):
                    kernel.manager.interrupt_kernel()
                    time.sleep(pause)
            if reply["msg_type"] == "status" and content["execution_state"] == "idle":
                break
        assert error == "KeyboardInterrupt"
        assert "PAST" not in said
        said, error = kernel.run(PARIS.format(more=""))
        assert not error, said
        assert "Paris" in said


def test_two_notebooks_at_once_on_one_machine(tmp_path):
    kernels = [Kernel(), Kernel()]
    shared = shared_memory()
    try:
        for kernel in kernels:
            said, error = kernel.run(IMPORTS.format(logs=str(tmp_path / "logs")))  # the same folder for both
            assert not error, said
        cells = [kernel.client.execute(PARIS.format(more=", in_process=False")) for kernel in kernels]
        for kernel, message in zip(kernels, cells, strict=True):
            reply = kernel.client.get_shell_msg(timeout=240)
            while reply["parent_header"].get("msg_id") != message:
                reply = kernel.client.get_shell_msg(timeout=240)
            assert reply["content"]["status"] == "ok", reply["content"]
        assert len(list((tmp_path / "logs").glob("*.log"))) == 2, "two engines wrote into one log"
    finally:
        for kernel in kernels:
            kernel.close()
    assert gone([], shared) == ([], set())


WITH_ENGINE = """
import pathlib, time
from helpers.engine import open_engine
with open_engine(max_model_len=512, kv_cache_memory_bytes=256 * 2**20, log_dir=out_dir, in_process=False):
    pathlib.Path(out_dir, "open").write_text("")
    time.sleep(600)
"""
RUNS = {
    "cell timeout": (["--timeout", "60"], None, 1),
    "SIGTERM": ([], lambda runner: runner.terminate(), 143),
    "SIGKILL": ([], lambda runner: runner.kill(), -9),
    "SIGKILL to worker": ([], lambda runner: worker_of(runner).kill(), 137),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_ends_in_the_middle_of_an_engine_leaves_nothing(tmp_path, name):
    more, action, code = RUNS[name]
    shared = shared_memory()
    write_notebook(tmp_path / "notebooks", "01_end", WITH_ENGINE)
    runner = subprocess.Popen(
        command(tmp_path / "notebooks", "--out", str(tmp_path / "out"), *more),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=as_from_a_terminal,
    )  # fmt: skip
    stop = time.monotonic() + 120
    while not (tmp_path / "out" / "open").exists() and time.monotonic() < stop:
        time.sleep(0.2)
    processes = psutil.Process(runner.pid).children(recursive=True)
    assert len(processes) >= 3, "worker, kernel, engine"
    if action:
        action(runner)
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(timeout=90)
    assert runner.returncode == code
    assert gone(processes, shared) == ([], set())
