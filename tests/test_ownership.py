"""What is taken down with an engine, and what is not: other processes' shared memory stays."""

import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import setproctitle

from helpers.engine import borrowed, children
from helpers.engine.borrowed import Settings
from helpers.engine.children import Belongings
from helpers.model.schemes import FP8_FILE

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("/dev/shm")
# Another notebook on this machine, whose engine starts at the same time.
NEIGHBOUR = """
import multiprocessing, sys
from multiprocessing import shared_memory
lock = multiprocessing.get_context("spawn").Lock()
block = shared_memory.SharedMemory(create=True, size=4096)
print(lock._semlock.name, block.name, flush=True)
sys.stdin.read()
block.close(); block.unlink()
"""
# An engine's process that is killed: nobody maps what it leaves.
KILLED = """
import os, signal
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None
block = shared_memory.SharedMemory(create=True, size=4096)
print(block.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


# A notebook's kernel, with an engine's process that takes no SIGTERM, as one that hangs.
OWNER = """
import multiprocessing, time
from helpers.engine import children
from tests.test_ownership import deaf
children.ENGINE_PATIENCE_S = 1.0
context = multiprocessing.get_context("spawn")
ours, theirs = context.Pipe()
with children.children_bound_to_this():
    child = context.Process(target=deaf, args=(theirs,))
    child.start()
ours.recv()
print(child.pid, flush=True)
time.sleep(300)
"""


def deaf(connection):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection.send(True)
    time.sleep(300)


def seconds_to_end(owner: str) -> float:
    """Kill a program once it has printed its child's pid; seconds until that child has ended, too."""
    command = [sys.executable, "-c", owner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
        process.wait()
    begun = time.monotonic()
    _, alive = psutil.wait_procs([child], timeout=20)
    try:
        assert all(one.status() == psutil.STATUS_ZOMBIE for one in alive)
        return time.monotonic() - begun
    finally:
        for one in alive:
            one.kill()


def test_an_engine_that_takes_no_sigterm_ends_with_its_killed_kernel():
    assert 0.5 < seconds_to_end(OWNER) < 15  # asked first, and killed when that had no effect


# The parent is gone before its child says that it wants to end with it.
LATE = """
import os, subprocess, sys, time
child = "import sys, time; time.sleep(1); from helpers.base import processes; "
child += "processes.end_with(int(sys.argv[1])); time.sleep(300)"
print(subprocess.Popen([sys.executable, "-c", child, str(os.getpid())]).pid, flush=True)
time.sleep(300)
"""


def test_a_child_whose_parent_was_killed_before_it_could_say_so_ends_too():
    assert seconds_to_end(LATE) < 15


def main_in_a_child(connection):
    connection.send(getattr(sys.modules["__main__"], "__file__", "no file"))


SCRIPT = """
import multiprocessing
from helpers.engine import children
from tests.test_ownership import main_in_a_child
context = multiprocessing.get_context("spawn")
ours, theirs = context.Pipe()
print("the program runs", flush=True)
with children.children_bound_to_this():
    context.Process(target=main_in_a_child, args=(theirs,)).start()
print(ours.recv())
"""


@pytest.mark.parametrize("piped", [False, True])
def test_a_script_without_a_guard_and_a_piped_program_can_start_an_engine(tmp_path, piped):
    """multiprocessing would run the first again in its child, without end, and not find the second."""
    script = tmp_path / "no guard.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-" if piped else str(script)],
        input=SCRIPT if piped else None, capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "the program runs\nno file\n", done.stderr[-1500:]


def test_the_main_program_is_as_before_once_the_engine_is_built():
    main = sys.modules["__main__"]
    before = {name: vars(main).get(name) for name in ("__file__", "__spec__")}
    with children.children_bound_to_this():
        given = multiprocessing.spawn.get_preparation_data("engine")
        assert not {"init_main_from_path", "init_main_from_name"} & set(given)
    assert {name: vars(main).get(name) for name in before} == before


def test_a_neighbours_semaphore_and_shared_memory_stay_and_what_a_killed_one_left_goes():
    owned = Belongings()
    with owned.watched():
        command = [sys.executable, "-c", NEIGHBOUR]
        neighbour = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        semaphore, block = neighbour.stdout.readline().split()
        killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    theirs = [SHARED / f"sem.{semaphore.strip('/')}", SHARED / block]
    left = SHARED / killed.stdout.strip()
    try:
        assert all(path.exists() for path in [*theirs, left])
        owned.end()
        assert all(path.exists() for path in theirs)
        assert not left.exists()
    finally:
        neighbour.communicate()
        left.unlink(missing_ok=True)
    assert neighbour.returncode == 0


def titled(connection, title):
    if title:
        setproctitle.setproctitle(title)  # in place of its command line
    connection.send(True)
    time.sleep(300)


@pytest.mark.parametrize("title", ["", "VLLM::EngineCore"])
def test_what_another_thread_starts_while_an_engine_does_stays_when_that_goes(title):
    owned, context = Belongings(), multiprocessing.get_context("spawn")
    command = [sys.executable, "-c", "import time; time.sleep(300)"]
    ours, end = context.Pipe()
    engine = context.Process(target=titled, args=(end, title), daemon=True)
    theirs = context.Process(target=time.sleep, args=(300,), daemon=True)
    with owned.watched(), children.children_bound_to_this(), ThreadPoolExecutor(1) as another:
        engine.start()
        ours.recv()
        another.submit(theirs.start).result()
        program = another.submit(subprocess.Popen, command).result()
    owned.end()
    assert not psutil.pid_exists(engine.pid)
    assert theirs.is_alive()
    assert program.poll() is None
    for one in (theirs, program):
        one.kill()


@pytest.fixture
def others():
    """A place in /dev/shm by name; what a test puts there is gone after it."""
    made = []

    def place(name: str) -> Path:
        made.append(SHARED / name)
        return made[-1]

    yield place
    for path in made:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)


THREAD = """
import ctypes, sys, threading
from helpers.base import machine
from helpers.engine import release
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def work():
    libc.free(libc.malloc(30 << 20))  # freed once, blocks up to this size come from a heap
    blocks = [libc.malloc(1 << 20) for _ in range(40)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    for block in blocks:
        libc.free(block)
if sys.argv[1] == "one":
    release.one_heap()
before = machine.anonymous_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
release.give_back_garbage()
print((machine.anonymous_memory() - before) >> 20)
"""


def test_what_a_thread_freed_is_given_back():
    """Without the setting 40 MiB stay: glibc's, and no engine's."""
    left = {}
    for heaps in ("many", "one"):
        command = [sys.executable, "-c", THREAD, heaps]
        left[heaps] = int(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        )
    assert left["many"] > 30
    assert left["one"] < 5


def test_what_others_put_into_shared_memory_while_an_engine_starts_stays(others):
    """A copied model, joblib's folder, another user's block: none is mapped, and none stops the release."""
    copied, folder = others("my_model.safetensors"), others("joblib_memmapping_folder_1_2")
    odd, block, left = others("psm_0ddba11"), others("psm_0ddba12"), others("torch_1_2_3")
    owned = Belongings()
    with owned.watched():
        copied.write_text("weights")
        folder.mkdir()
        odd.mkdir()  # an engine's name, but no block
        block.touch()
        left.touch()
        if os.getuid() == 0:
            os.chown(block, 54321, 54321)  # a user who has no name here, as in another container
    owned.end()
    assert all(path.exists() for path in (copied, folder, odd))
    assert block.exists() == (os.getuid() == 0)
    assert not left.exists()


@pytest.mark.parametrize(
    "name", ["psm_e2817b9a", "sem.mp-8i3gjx89", "torch_421_1804289383_0", "vllm_mm_VQ6EAOKbQdSnFkRmVUQAAA",
             "29500-tp:0-[0-1]-cpushm_0", "nccl-Ab3dE9", "cuda.shm.0.1a2b.1"],
)  # fmt: skip
def test_names_that_engines_give_are_known(others, name):
    path, owned = others(name), Belongings()
    with owned.watched():
        path.touch()
    owned.end()
    assert not path.exists()


@pytest.mark.parametrize("started", [True, False])
def test_a_variable_that_the_reader_sets_meanwhile_stays(monkeypatch, started):
    """Once the engine has started; one that did not start leaves everything as it was."""
    for name in ("THEIRS", "BOTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KEPT", "before")
    settings = Settings()
    for name in ("KEPT", "THEIRS", "BOTH"):
        monkeypatch.setenv(name, "the engine's")
    if started:
        settings.engine_started()
    monkeypatch.setenv("BOTH", "mine")
    settings.restore()
    found = {name: os.environ.get(name) for name in ("KEPT", "THEIRS", "BOTH")}
    assert found == {"KEPT": "before", "THEIRS": None, "BOTH": "mine" if started else None}


def test_onednn_is_off_in_torch_for_an_engine_that_asks_and_back_on_afterwards():
    import torch

    settings = Settings()
    settings.save_threads()
    assert torch.backends.mkldnn.enabled
    borrowed.without_onednn()
    assert not torch.backends.mkldnn.enabled
    settings.restore()
    assert torch.backends.mkldnn.enabled
    assert {way.name for way in FP8_FILE.ways if not way.onednn} == {"FP8 emulated"}
