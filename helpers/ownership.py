"""What an engine takes hold of in this process and must give back: processes, memory, signals, settings."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import re
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers import hardware
from helpers.hardware import MIB


@dataclass
class Settings:
    """What an in-process engine changes in this process and must not leave changed."""

    environment: dict[str, str]
    affinity: set[int] | None
    started: dict[str, str] | None = None  # the environment with the engine's own variables
    set_num_threads: object = None
    threads: int = 0
    onednn: bool = True

    @classmethod
    def save(cls) -> Settings:
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        saved = cls(dict(os.environ), affinity)
        if "torch" in sys.modules:
            saved._save_threads()
        return saved

    def _save_threads(self) -> None:
        import torch

        self.set_num_threads, self.threads = torch.set_num_threads, torch.get_num_threads()
        self.onednn = torch.backends.mkldnn.enabled

    def engine_started(self) -> None:
        """Tell the engine's variables, which go with it, from those that the reader sets from now on."""
        self.started = dict(os.environ)

    def restore(self) -> None:
        """Undo it: vLLM pins threads to cores, replaces torch.set_num_threads, sets variables; oneDNN too."""
        self._restore_environment()
        if self.affinity is not None:
            os.sched_setaffinity(0, self.affinity)
        if self.set_num_threads is not None:
            import torch

            torch.set_num_threads = self.set_num_threads
            torch.set_num_threads(self.threads)
        if "torch" in sys.modules:
            import torch

            torch.backends.mkldnn.set_flags(_enabled=self.onednn)

    def _restore_environment(self) -> None:
        now = dict(os.environ)
        started = now if self.started is None else self.started
        for name in self.environment.keys() | started.keys():
            before, then = self.environment.get(name), started.get(name)
            if before == then or now.get(name) != then:
                continue  # the engine left it alone, or the reader has set it since
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def without_onednn() -> None:
    """Have torch compute without oneDNN in this process; ``Settings.restore`` undoes it.

    On a CPU with AMX torch gives an FP8 product to oneDNN, which has only its reference code for it: 256 rows
    took 3.2 s where torch's own way took 5 ms.
    """
    import torch

    torch.backends.mkldnn.set_flags(_enabled=False)


class Belongings:
    """Child processes and shared memory that came with an engine, so that they can go with it."""

    def __init__(self):
        self._processes: list = []
        self._shared: set[Path] = set()

    @contextlib.contextmanager
    def watched(self):
        """Take down what appears while the block runs, also when it fails."""
        import psutil

        me, folder = psutil.Process(), Path("/dev/shm")
        old_shared, old_processes = set(folder.glob("*")), set(me.children(recursive=True))
        try:
            yield
        finally:
            # Python's own tracker of shared memory serves the whole process and ends with it.
            tracker = multiprocessing.resource_tracker._resource_tracker._pid
            born = set(me.children(recursive=True)) - old_processes
            self._processes = [process for process in born if process.pid != tracker]
            self._shared = set(folder.glob("*")) - old_shared

    def end(self, patience_s: float = 5.0) -> None:
        """End the processes that are still there and unlink shared memory that nobody maps any more."""
        import psutil

        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        stubborn = psutil.wait_procs(self._processes, timeout=patience_s)[1]
        for process in stubborn:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(stubborn, timeout=patience_s)
        multiprocessing.active_children()  # reaps those that have ended
        for path in self._shared:
            with contextlib.suppress(OSError):  # its owner took it away meanwhile
                if _an_engines(path) and not _mapped(path):
                    path.unlink()
        self._processes, self._shared = [], set()


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
    """Children that multiprocessing spawns inside get a group of their own, and end with this process.

    Jupyter sends Ctrl+C to the kernel's whole group. An engine that is killed by the interrupt that the
    kernel means to handle leaves shared memory behind, or its client waiting for ten minutes. And an engine
    whose kernel was killed would live on and keep the GPU's memory: vLLM does not watch its parent.
    """
    original = multiprocessing.util.spawnv_passfds

    def spawn(path, args, passfds):
        engine = any(b"spawn_main" in os.fsencode(arg) for arg in args)  # else the resource tracker
        for descriptor in passfds:
            os.set_inheritable(descriptor, True)
        try:
            return spawn_bound([path, *args[1:]], tracker=not engine)
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


def spawn_bound(command: list, tracker: bool = False) -> int:
    """Start a Python program in a process of its own group that ends with this one; return its pid.

    It takes all signals: what a caller blocks for a moment, a child would keep blocked. multiprocessing's
    resource ``tracker`` alone is to inherit that, unblocks by itself once it ignores them, and outlives the
    others to remove what they left.
    """
    path, args = _bound(command[0], list(command) if tracker else _watching(list(command)))
    mask = {} if tracker else {"setsigmask": []}
    return os.posix_spawn(path, args, dict(os.environ), setpgroup=0, **mask)


# A process can only ask for this itself: SIGTERM (15) once its parent has ended (prctl 1). The wish stays
# with the process when it becomes another program.
_BIND = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[3:])"
)


# SIGTERM is a wish: an engine that hangs in compiled code does not take it. After five seconds vLLM's client
# kills one, but here that died with its owner. So a thread in the child sees to its end.
_WATCH = """
import os as _os, threading as _threading, time as _time
def _watch(owner={owner}, patience={patience}):
    while _os.getppid() == owner:
        _time.sleep(0.5)
    _time.sleep(patience)
    _os.kill(_os.getpid(), 9)
_threading.Thread(target=_watch, name="owner-watch", daemon=True).start()
"""
PATIENCE_S = 5.0  # from the owner's end to killing a child that has not ended; vLLM's own patience


def _watching(command: list) -> list:
    """The same ``python -c`` command, with the watch ahead of its program."""
    place = command.index("-c") + 1
    watch = _WATCH.format(owner=os.getpid(), patience=PATIENCE_S)
    return [*command[:place], watch + command[place], *command[place + 1 :]]


def _bound(path, args: list) -> tuple:
    if sys.platform != "linux":
        return path, args
    return sys.executable, [sys.executable, "-I", "-S", "-c", _BIND, str(os.getpid()), path, *args]


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


@contextlib.contextmanager
def interrupts_that_insist(every_s: float = 1.0):
    """Raise KeyboardInterrupt again and again from the first Ctrl+C on, until the block is left.

    vLLM swallows one that comes during the handshake with its child, and then waits ten minutes for it.
    """
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def insist(*_):
        signal.setitimer(signal.ITIMER_REAL, every_s)
        raise KeyboardInterrupt

    old = {number: signal.signal(number, insist) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupts_deferred():
    """Let the block finish when Ctrl+C comes, then raise KeyboardInterrupt once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    old = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
    if came:
        raise KeyboardInterrupt


def clear_frames(error: BaseException | None) -> None:
    """Drop the local variables an exception's traceback pins: IPython keeps the last one for %debug."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def empty_runner(runner) -> None:
    """Drop an in-process engine's weights and KV cache from the inside.

    Reference counts alone would not do: a traceback, a variable or a cache may still refer to it.
    """
    if runner is None:
        return
    model = getattr(runner, "model", None)
    for module in list(model.modules()) if model is not None else []:
        module._parameters.clear()
        module._buffers.clear()
        for name in (
            "cpu_linear",
            "kv_cache",
        ):  # oneDNN's repacked copy of a weight, a layer's share of the cache
            module.__dict__.pop(name, None)
    runner.__dict__.clear()


def leave_distributed() -> None:
    """Undo vLLM's one-process torch.distributed group; a second engine would find it still there."""
    if "vllm.distributed.parallel_state" not in sys.modules:
        return  # vLLM could not even be imported
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with contextlib.suppress(Exception):  # never set up, or torn down by vLLM already
        cleanup_dist_env_and_memory()


# Where vLLM keeps modules between engines. The next model would be given the rotary embedding again,
# emptied; and what online quantization notes of a layer refers to the layer, so its weak keys stay.
_KEPT = {
    "vllm.model_executor.layers.rotary_embedding": ("_ROPE_DICT",),
    "vllm.model_executor.model_loader.reload.layerwise": ("LAYERWISE_INFO", "LOADING_LAYERS"),
}


def forget_caches() -> None:
    """Empty the caches that vLLM and transformers keep between engines; they pin configs and models."""
    for module, names in _KEPT.items():
        for name in names:
            if kept := getattr(sys.modules.get(module), name, None):
                kept.clear()
    for found in gc.get_objects():
        if type(found) is functools._lru_cache_wrapper:
            module = getattr(found, "__module__", None) or ""
            if module.startswith(("vllm.", "transformers.")):
                found.cache_clear()


def one_heap() -> None:
    """Have threads that start from now on make no heaps of their own, which ``trim_heap`` cannot give back.

    glibc trims the free end of the main heap only: tens of MiB that a thread of vLLM once used would look
    held for ever. The heaps that there are already stay in use, so this comes before vLLM.
    """
    arena_max = -8  # M_ARENA_MAX in glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(arena_max, 1)


def trim_heap() -> None:
    """Give freed heap pages back to the operating system (glibc keeps them otherwise)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True)
class Holder:
    """A process that holds memory: ``where`` is ``GPU 0`` or ``memory``; ``ours``: this one's.

    ``orphan``: an engine's process whose owner has ended, so that nobody will end it either.
    """

    name: str
    pid: int
    whose: str
    mib: int
    where: str
    ours: bool = False
    orphan: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.pid}), {self.whose}: {self.mib:,} MiB of {self.where}"


HOLDS = 256 * MIB  # less than this is nobody's engine


def holders(machine: hardware.Machine) -> list[Holder]:
    """Who holds memory now, most first: on a GPU as the driver lists it, on a CPU as the system does."""
    found = _gpu_holders() if machine.kind == "cuda" else _cpu_holders()
    return sorted(found, key=lambda holder: -holder.mib)


def _gpu_holders() -> list[Holder]:
    import pynvml

    found = []
    for index in hardware.visible_gpus():
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            found.append(_holder(process.pid, process.usedGpuMemory or 0, f"GPU {index}"))
    return found


def _cpu_holders() -> list[Holder]:
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
            if process.memory_info().rss > HOLDS and (held := hardware.anonymous_memory(process.pid)) > HOLDS:
                found.append(_holder(process.pid, held, "memory"))
    return found


def _holder(pid: int, held: int, where: str) -> Holder:
    import psutil

    me = psutil.Process()
    try:
        process = psutil.Process(pid)
        name, parents = process.name(), {parent.pid for parent in process.parents()}
    except psutil.Error:  # seen by the driver, not from inside this container
        return Holder("a process outside this container", pid, "not visible from here", held // MIB, where)
    if pid == me.pid:
        return Holder(name, pid, "this process", held // MIB, where, ours=True)
    if me.pid in parents:
        return Holder(name, pid, "an engine that this process started", held // MIB, where, ours=True)
    if _orphan(process):
        whose = f"an engine whose owner has ended; end it with `kill {pid}`"
        return Holder(name, pid, whose, held // MIB, where, orphan=True)
    return Holder(name, pid, "another process", held // MIB, where)


def _orphan(process) -> bool:
    """Whether a process was started by a Python that has ended: an engine's, by its name or its command line.

    Its parent is then what collects orphans, and that is no Python (in a container it may be, as process 1,
    the owner itself). vLLM calls its processes VLLM::EngineCore, VLLM::Worker and so on; before that they
    are multiprocessing's.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        command = " ".join(process.cmdline())
        engine = command.startswith("VLLM::") or "multiprocessing.spawn" in command
        return engine and (parent is None or not _python(parent))
    return False


def _python(process) -> bool:
    """Whether a process is a Python, also one that calls itself something else."""
    import psutil

    names = [process.name(), *process.cmdline()[:1]]
    with contextlib.suppress(psutil.Error, OSError):  # another user's
        names.append(process.exe())
    return any("python" in name or name.startswith("VLLM::") for name in names)


def on_interrupted_cell(finish: Callable[[], object]) -> None:
    """In a notebook, call ``finish`` after the first cell from now on that Ctrl+C ends; elsewhere nothing."""
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return

    def look(result) -> None:
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            shell.events.unregister("post_run_cell", look)
            finish()

    shell.events.register("post_run_cell", look)
