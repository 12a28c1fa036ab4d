"""A notebook that ends badly while its engine runs: no process, no shared memory, and the next engine starts.

The engine is in a child of the kernel, as it is on a GPU. Slow: each waits for real engines.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from helpers.base import holders, machine
from helpers.faults import explain
from helpers.model import embedded
from tests.test_interrupt import AGAIN, GENERATING, OPENING, Kernel
from tests.test_run import as_from_a_terminal, command, environment, worker_of, write_notebook

pytestmark = pytest.mark.slow
MACHINE = machine.detect()

IN_CHILD = (
    "import time\nengine = open_engine(**small, in_child=True)\nwith engine:\n"
    '    print("GO", flush=True)\n    time.sleep(600)'
)
BARE_ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
FREE_CPU = (
    "ValueError: Available memory on node 0 (1.0/23.5 GiB) on startup is less than desired CPU memory "
    "utilization (0.9, 21.1 GiB)."
)


def shared_by(processes) -> set[Path]:
    """The shared memory that these processes map: theirs, and not that of whatever else runs here."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {Path(line.split()[5]) for line in maps if " /dev/shm/" in line}
    return {path for path in found if path.exists()}


def gone(processes, shared: set[Path]) -> tuple[list, list]:
    """What is still there of processes and shared memory once all is gone, or the time is up."""
    stop = time.monotonic() + 20
    while True:
        left = [process for process in processes if process.is_running() and process.status() != "zombie"]
        files = [path for path in shared if path.exists()]
        if not (left or files) or time.monotonic() > stop:
            return left, files
        time.sleep(0.2)


def ended(processes, shared: set[Path]):
    """Insist that nothing is left."""
    assert shared, "an engine in a child shares memory with its owner"
    assert gone(processes, shared) == ([], [])


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel()
    said, error = kernel.run(OPENING.format(logs=str(tmp_path / "logs")))
    assert not error, said
    yield kernel
    kernel.close()


def start_and_leave_running(kernel: Kernel) -> set[psutil.Process]:
    """Open an engine in a child and return the kernel's descendants, the kernel's own process with them."""
    said, error = kernel.run(IN_CHILD, until="GO")
    assert not error, said
    process = psutil.Process(kernel.manager.provisioner.pid)
    found = {process, *process.children(recursive=True)}
    assert len(found) > 1, "the engine has a process of its own"
    return found


@pytest.mark.parametrize("how", ["SIGKILL", "restart", "shut down"])
def test_a_kernel_that_ends_takes_its_engine_along(kernel, how, tmp_path):
    processes = start_and_leave_running(kernel)
    shared = shared_by(processes)
    if how == "SIGKILL":
        os.kill(kernel.manager.provisioner.pid, signal.SIGKILL)
    if how == "shut down":
        kernel.manager.shutdown_kernel(now=False)
        return ended(processes, shared)
    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(60)
    ended(processes, shared)
    said, error = kernel.run(OPENING.format(logs=str(tmp_path / "logs")) + AGAIN)
    assert not error, said
    assert "Paris" in said


def test_ctrl_c_again_and_again_while_generating(kernel):
    cell = f'{GENERATING}\nprint("PAST")'
    for pause in (0.01, 0.05, 0.3):
        said, error = kernel.run(cell, interrupt_when="GO", after_s=1.0, again_after_s=(pause,) * 4)
        assert error == "KeyboardInterrupt"
        assert "PAST" not in said
        said, error = kernel.run(AGAIN)
        assert not error, said
        assert "Paris" in said


def watch_shared(kernels: list[Kernel], shared: set[Path], over: threading.Event) -> None:
    """Note what the kernels' engines share while they run."""
    while not over.wait(0.3):
        for kernel in kernels:
            with contextlib.suppress(psutil.Error):
                shared |= shared_by(psutil.Process(kernel.manager.provisioner.pid).children(recursive=True))


def test_two_notebooks_at_once_on_one_machine(tmp_path):
    kernels, shared, over = [Kernel(), Kernel()], set(), threading.Event()
    try:
        for kernel in kernels:
            said, error = kernel.run(OPENING.format(logs=str(tmp_path / "logs")))  # the same folder for both
            assert not error, said
        threading.Thread(target=watch_shared, args=(kernels, shared, over)).start()
        in_child = AGAIN.replace("(**small)", "(**small, in_child=True)")
        cells = [kernel.client.execute(in_child) for kernel in kernels]
        for kernel, message in zip(kernels, cells, strict=True):
            reply = kernel.client.get_shell_msg(timeout=240)
            while reply["parent_header"].get("msg_id") != message:
                reply = kernel.client.get_shell_msg(timeout=240)
            assert reply["content"]["status"] == "ok", reply["content"]
        assert len(list((tmp_path / "logs").glob("*.log"))) == 2, "two engines wrote into one log"
    finally:
        over.set()
        for kernel in kernels:
            kernel.close()
    ended([], shared)


# The reader's own vllm.LLM, without these helpers, in a child as on a GPU.
BARE = """
import sys, time
from vllm import LLM
if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], max_model_len=512, kv_cache_memory_bytes=256 * 2**20, enforce_eager=True)
    print("READY", flush=True)
    time.sleep(600)
"""


def test_an_engine_whose_owner_was_killed_is_named_with_what_ends_it(tmp_path):
    """A bare LLM's process outlives its owner and keeps the memory: the report says so, its advice works."""
    (tmp_path / "bare.py").write_text(BARE)
    owner = subprocess.Popen(
        [sys.executable, str(tmp_path / "bare.py"), str(embedded.prepare())], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **BARE_ENVIRONMENT},
    )  # fmt: skip
    while "READY" not in owner.stdout.readline():
        assert owner.poll() is None
    engines = psutil.Process(owner.pid).children(recursive=True)
    shared = shared_by([*engines, psutil.Process(owner.pid)])
    try:
        assert not [holder for holder in holders.who_holds(MACHINE) if holder.orphan], "its owner lives"
        owner.kill()
        owner.wait()
        (orphan,) = [holder for holder in holders.who_holds(MACHINE) if holder.orphan]
        assert orphan.pid in [process.pid for process in engines]
        report = explain.explain(log=FREE_CPU, machine=MACHINE)
        assert f"an engine whose owner has ended; end it with `kill {orphan.pid}`" in str(report)
        subprocess.run(["kill", str(orphan.pid)], check=True)
        assert gone(engines, set())[0] == []
    finally:
        for process in [owner, *engines]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        owner.stdout.close()
        for path in shared:  # a bare engine that is ended leaves it
            path.unlink(missing_ok=True)


WITH_ENGINE = """
import pathlib, time
from helpers.engine.engine import open_engine
with open_engine(max_model_len=512, kv_cache_memory_bytes=256 * 2**20, log_dir=out_dir, in_child=True):
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
    shared = shared_by(processes)
    if action:
        action(runner)
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(timeout=90)
    assert runner.returncode == code
    ended(processes, shared)
