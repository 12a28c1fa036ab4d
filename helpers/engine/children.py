"""The child processes and shared memory of an engine, and how they end with it or with their owner."""

import contextlib
import multiprocessing.connection
import multiprocessing.util
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

ENGINE_PATIENCE_S = 5.0  # until one that was asked to end, or lost its owner, is killed; vLLM's own patience


class Belongings:
    """Child processes and shared memory that came with an engine, so that they can go with it."""

    def __init__(self):
        self.processes: list[psutil.Process] = []
        self._shared: set[Path] = set()

    @contextlib.contextmanager
    def watched(self):
        """Note what appears while the block runs, also when it fails; processes only where ``_is_ours``."""
        me, folder = psutil.Process(), Path("/dev/shm")
        old_shared, old_processes = set(folder.glob("*")), set(me.children())
        try:
            yield
        finally:
            for child in set(me.children()) - old_processes:
                with contextlib.suppress(psutil.Error):  # it has ended
                    if _is_ours(child):
                        self.processes += [child, *child.children(recursive=True)]
            self._shared = set(folder.glob("*")) - old_shared

    def end(self) -> None:
        """End the processes that are still there and unlink shared memory that nobody maps any more."""
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        stubborn = psutil.wait_procs(self.processes, timeout=ENGINE_PATIENCE_S)[1]
        for process in stubborn:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, still_there = psutil.wait_procs(stubborn, timeout=ENGINE_PATIENCE_S)
        multiprocessing.active_children()  # reaps those that have ended
        for path in self._shared:
            with contextlib.suppress(OSError):  # its owner took it away meanwhile
                if _an_engines(path) and not _mapped(path):
                    path.unlink()
        self.processes, self._shared = still_there, set()


def _is_ours(child: psutil.Process) -> bool:
    """Whether a child is an engine, by its watch or the title it takes; others are not ours."""
    command = " ".join(child.cmdline())
    return command.startswith("VLLM::") or "owner-watch" in command


# What engines and servers leave in /dev/shm. Whatever else appears there while one starts is another
# program's: a copy of a model, say, that nobody maps.
_SHARED = re.compile(
    r"psm_[0-9a-f]+"  # multiprocessing.shared_memory, also under vLLM's message queues
    r"|sem\.mp-[a-z0-9_]+"  # multiprocessing.synchronize: locks
    r"|torch_\d+_\d+_\d+"  # tensors that torch shares: torch_{pid}_{number}_{number}
    r"|vllm_(mm|offload|ec)_.+"  # vllm/envs.py, v1/kv_offload, distributed/ec_transfer
    r"|.+-cpushm.*"  # vllm/distributed/device_communicators/cpu_communicator.py
    r"|nccl-\w{6}"  # NCCL between GPUs
    r"|cuda\.shm\.[0-9a-f.]+"  # the NVIDIA driver
)


def _an_engines(path: Path) -> bool:
    """Whether a path in /dev/shm is shared memory of this user, by a name that engines make."""
    found = path.lstat()
    named = _SHARED.fullmatch(path.name) is not None
    return named and stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()


def _mapped(path: Path) -> bool:
    """Whether a process other than this one still maps a file: another notebook's is not ours to remove.

    By its number, not its name: a semaphore is made under another name, which its owner's map keeps.
    """
    number = re.compile(rf" {path.stat().st_ino} +/dev/shm/")
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if maps.parent.name != str(os.getpid()) and number.search(maps.read_text()):
                return True
    return False


@contextlib.contextmanager
def children_bound_to_this():
    """What this thread spawns inside by multiprocessing gets a group of its own, and ends with this process.

    It stands in for ``multiprocessing.util.spawnv_passfds`` while the block runs.
    Jupyter sends Ctrl+C to the kernel's whole group. An engine that is killed by the interrupt that the
    kernel means to handle leaves shared memory behind, or its client waiting for ten minutes. And an engine
    whose kernel was killed would live on and keep the GPU's memory: vLLM does not watch its parent.
    """
    original, thread = multiprocessing.util.spawnv_passfds, threading.get_ident()

    def spawn(path, args, passfds):
        if threading.get_ident() != thread:
            return original(path, args, passfds)
        is_engine = any(b"spawn_main" in os.fsencode(arg) for arg in args)
        # An engine takes all signals: what a caller blocks for a moment, it would keep blocked. Python's own
        # tracker of shared memory inherits that, and outlives the others to remove what they left.
        more = {"setsigmask": []} if is_engine else {}
        for descriptor in passfds:
            os.set_inheritable(descriptor, True)
        try:
            return os.posix_spawn(
                path, _watching(args) if is_engine else args, dict(os.environ), setpgroup=0, **more
            )
        finally:
            for descriptor in passfds:
                os.set_inheritable(descriptor, False)

    multiprocessing.util.spawnv_passfds = spawn
    try:
        with _main_left_alone():
            yield
    finally:
        multiprocessing.util.spawnv_passfds = original


@contextlib.contextmanager
def _main_left_alone():
    """Children spawned inside do not run the main program's file again, as none of a notebook's do.

    multiprocessing has each child import it: a script without ``if __name__ == "__main__"`` would open its
    engine once more in there, and a program read from standard input cannot be imported at all.
    """
    main = sys.modules["__main__"]
    kept = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(kept)


# A process can only ask for this itself: SIGTERM (15) once its parent has ended (prctl 1). That is a wish: an
# engine that hangs in compiled code does not take it, and vLLM's client, which would kill it after five
# seconds, died with its owner. So a thread in the child sees to its end.
_WATCH = """
import ctypes as _ctypes, os as _os, threading as _threading, time as _time
_ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
def _watch(owner={owner}, patience={patience}):
    while _os.getppid() == owner:
        _time.sleep(0.5)
    _time.sleep(patience)
    _os.kill(_os.getpid(), 9)
_threading.Thread(target=_watch, name="owner-watch", daemon=True).start()
"""


def _watching(command: list) -> list:
    """The same ``python -c`` command, with the watch ahead of its program."""
    command = [os.fsdecode(part) for part in command]
    place = command.index("-c") + 1
    watch = _WATCH.format(owner=os.getpid(), patience=ENGINE_PATIENCE_S)
    return [*command[:place], watch + command[place], *command[place + 1 :]]


def wake_on_death(core) -> Callable[[], None]:
    """Wake whoever waits for an engine in a child when its process dies; returns what ends the watch.

    vLLM's client notices the death and stops its own threads, but a ``generate`` that waits for output is
    told nothing and waits for ever (vllm/v1/engine/core_client.py, ``SyncMPClient.get_output``).
    """
    over = threading.Event()
    sentinels = [process.sentinel for process in core.resources.engine_manager.processes]

    def watch() -> None:
        while not over.is_set():
            if multiprocessing.connection.wait(sentinels, timeout=0.5):
                if not over.is_set():
                    wake(core)
                return

    threading.Thread(target=watch, name="engine-watch", daemon=True).start()
    return over.set


def wake(core) -> None:
    """Raise vLLM's EngineDeadError in whatever waits for an engine in a child; others need no waking."""
    if not hasattr(core, "outputs_queue"):
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    core.outputs_queue.put_nowait(EngineDeadError())
    for future in list(core.utility_results.values()):
        with contextlib.suppress(Exception):  # answered at this very moment
            future.set_exception(EngineDeadError())
