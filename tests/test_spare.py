"""The process that waits to become the next engine's: what becomes of it, and of what it is given."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import engine, hardware, ownership, spare
from helpers.engine import open_engine

ROOT = Path(__file__).resolve().parent.parent
LARGE = 200 * 2**20  # of memory a spare holds once it has imported the most of vLLM


@pytest.fixture
def light(monkeypatch):
    """Spares that import something small instead of vLLM; none is left over."""
    monkeypatch.setattr(spare, "_MODULES", "import fractions #")
    yield dict(os.environ)
    spare.dismiss()


def look(connection, lock):
    """In the child: what it finds."""
    import torch  # not imported by the spare: its folder was on the path it was given

    with lock:
        print("a line for the log", flush=True)
        files = [int(path.name) for path in Path("/proc/self/fd").iterdir() if int(path.name) < spare.FILES]
        found = (os.getpid(), os.environ.get("SAID"), "fractions" in sys.modules, len(files))
        connection.send((*found, torch.__name__))


def spawned(monkeypatch, said="something"):
    """Start a child as vLLM starts its engines; return it, and what it found."""
    context = multiprocessing.get_context("spawn")
    (ours, theirs), lock = context.Pipe(), context.Lock()
    with ownership.children_bound_to_this():
        monkeypatch.setenv("SAID", said)
        child = context.Process(target=look, args=(theirs, lock))
        child.start()
    assert ours.poll(60), "the child said nothing"
    return child, ours.recv()


def test_the_spare_becomes_the_child_that_is_asked_for(light, monkeypatch, capfd):
    spare.prepare("cpu", light, ownership.spawn_bound)
    (waiting,) = spare.waiting()
    child, (pid, said, ahead, files, _) = spawned(monkeypatch)
    child.join(10)
    assert child.pid == pid == waiting
    assert said == "something"  # set after the spare was started
    assert ahead  # it had imported what spares import
    assert child.exitcode == 0
    assert "a line for the log" in capfd.readouterr().out  # its output goes where a child's would
    assert files < 40  # what it held while it waited is closed
    assert spare.waiting() != {waiting}  # and the next one waits


FIRST = """
import multiprocessing, os
from helpers import ownership, spare
from tests.test_spare import signals
spare._MODULES = "import fractions #"
spare.prepare("cpu", dict(os.environ), ownership.spawn_bound)
waiting = spare.waiting()
context = multiprocessing.get_context("spawn")
ours, theirs = context.Pipe()
with ownership.children_bound_to_this():
    child = context.Process(target=signals, args=(theirs,))
    child.start()
print(ours.recv(), {child.pid} == waiting)
(pid,) = spare.waiting()
print(next(line for line in open(f"/proc/{pid}/status") if line.startswith("SigBlk")).split()[1])
child.join()
spare.dismiss()
"""


def signals(connection):
    connection.send(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_the_first_engine_of_a_process_takes_the_spare_and_signals():
    """Ahead of it multiprocessing starts its resource tracker, and blocks SIGTERM while it does.

    On a GPU that tracker took the spare, and the next one was deaf: five seconds until vLLM killed it, and
    it outlived a killed kernel.
    """
    done = subprocess.run(
        [sys.executable, "-c", FIRST], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["set() True", "0" * 16], done.stdout + done.stderr[-1500:]


def test_without_a_spare_a_child_starts_as_ever(light, monkeypatch):
    child, (pid, said, ahead, *_) = spawned(monkeypatch)
    assert (child.pid, said, ahead) == (pid, "something", False)


def test_a_spare_with_another_environment_is_replaced(light):
    spare.prepare("cpu", light, ownership.spawn_bound)
    (first,) = spare.waiting()
    spare.prepare("cpu", light, ownership.spawn_bound)
    assert spare.waiting() == {first}
    spare.prepare("cpu", light | {"CUDA_VISIBLE_DEVICES": "1"}, ownership.spawn_bound)
    assert spare.waiting() != {first}
    os.waitpid(first, 0)  # it ends by itself


def test_a_spare_that_died_is_noticed(light, monkeypatch):
    spare.prepare("cpu", light, ownership.spawn_bound)
    (pid,) = spare.waiting()
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    child, (found, *_) = spawned(monkeypatch)
    assert child.pid == found != pid


def test_a_spare_goes_when_it_is_let_go_and_when_nobody_wants_it(light, monkeypatch):
    monkeypatch.setattr(spare, "PATIENCE_S", 1)
    for end in (spare.dismiss, lambda: time.sleep(1)):
        spare.prepare("cpu", light, ownership.spawn_bound)
        (pid,) = spare.waiting()
        end()
        assert psutil.Process(pid).wait(20) == 0
        spare.take()


def test_a_spare_whose_orders_are_cut_short_ends(light):
    spare.prepare("cpu", light, ownership.spawn_bound)
    waiting = spare.take()
    waiting._socket.sendall(b'{"numbers": [')
    waiting.dismiss()
    try:
        assert psutil.Process(waiting.pid).wait(20) == 0
    finally:
        if waiting.alive():
            os.kill(waiting.pid, signal.SIGKILL)


def test_engines_of_a_gpu_use_one_and_those_in_this_process_do_not(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert spare.useful("cuda")
    assert not spare.useful("cpu")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert not spare.useful("cuda")


@pytest.mark.slow
def test_an_engine_in_a_spare_works_and_leaves_nothing(tmp_path, monkeypatch):
    """The second engine's process has imported vLLM before it is asked for; after it only a spare is left."""
    monkeypatch.setattr(spare, "useful", lambda kind: True)
    starts, before = [], {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        for number in range(2):
            waiting = spare.waiting()
            with open_engine("embedded", log_dir=tmp_path, in_process=False) as opened:
                core = opened.llm.llm_engine.engine_core.resources.engine_manager.processes[0]
                assert not waiting or {core.pid} == waiting
                answer = opened.ask("What is the capital of France? Answer with one word.", 10)
                assert "Paris" in answer.outputs[0].text
                assert "EngineCore" in opened.log  # its log went to this engine's file
                # The next spare imports meanwhile: what it then holds is no part of this engine.
                grown = time.monotonic() + 60
                while min(map(hardware.anonymous_memory, spare.waiting())) < LARGE:
                    assert time.monotonic() < grown
                    time.sleep(0.2)
            starts.append(opened.start_s)
            left = {child.pid for child in psutil.Process().children(recursive=True)}
            tracker = engine.own.multiprocessing.resource_tracker._resource_tracker._pid
            assert left - before <= {tracker, *spare.waiting()}, number
        print(f"started in {starts[0]:.1f} and {starts[1]:.1f} s")
    finally:
        spare.dismiss()
