"""Who holds memory: the processes that the driver or the operating system names."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from helpers.base import machine
from helpers.base.machine import MIB, Machine


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


def who_holds(machine: Machine) -> list[Holder]:
    """Who holds memory now, most first: on a GPU as the driver lists it, on a CPU as the system does."""
    found = _gpu_holders() if machine.kind == "cuda" else _cpu_holders()
    return sorted(found, key=lambda holder: -holder.mib)


def _gpu_holders() -> Iterator[Holder]:
    import pynvml

    for index in machine.visible_gpus():
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            yield _holder(process.pid, process.usedGpuMemory or 0, f"GPU {index}")


def _cpu_holders() -> Iterator[Holder]:
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
            if process.memory_info().rss > HOLDS and (held := machine.anonymous_memory(process.pid)) > HOLDS:
                yield _holder(process.pid, held, "memory")


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
