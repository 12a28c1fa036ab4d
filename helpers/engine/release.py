"""How an engine's memory comes back, and the proof that it did."""

import contextlib
import ctypes
import functools
import gc
import math
import os
import sys
import time
import traceback
import weakref
from dataclasses import dataclass

from helpers.base.holders import who_holds
from helpers.base.machine import MIB, Machine, anonymous_memory, gpu_memory_each
from helpers.engine.children import Belongings
from helpers.engine.errors import EngineClosedError

DEADLINE_S = 30.0  # how long released memory may take to come back before that is an error
NEGLIGIBLE = 4 * MIB  # nobody waits for the last of these
LEFT_GPU = 64 * MIB  # what the driver's count may differ by after a release, a GPU
# The same on a CPU. A swap alone leaves less than 20 MB (the tests insist); more may be the reader's own.
LEFT_CPU = 96 * MIB
LEFT_FIRST = 256 * MIB  # the first engine of a process leaves modules behind that vLLM imports late


def clear_frames(error: BaseException | None) -> None:
    """Drop the local variables an exception's traceback pins: IPython keeps the last one for %debug."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def empty_runner(runner: object | None) -> None:
    """Drop an in-process engine's weights and KV cache from the inside.

    Reference counts alone would not do: a traceback, a variable or a cache may still refer to it.
    """
    if runner is None:
        return
    model = getattr(runner, "model", None)
    for module in list(model.modules()) if model is not None else []:
        module._parameters.clear()
        module._buffers.clear()
        vars(module).pop("cpu_linear", None)  # oneDNN's repacked copy of a weight
        vars(module).pop("kv_cache", None)  # a layer's share of the cache
    vars(runner).clear()


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
    """Have threads that start from now on make no heaps of their own: what is freed there is not given back.

    glibc trims the free end of the main heap only: tens of MiB that a thread of vLLM once used would look
    held for ever. The heaps that there are already stay in use, so this comes before vLLM.
    """
    arena_max = -8  # M_ARENA_MAX in glibc's malloc.h
    ctypes.CDLL("libc.so.6").mallopt(arena_max, 1)


def give_back_garbage() -> None:
    """Collect garbage and give freed heap pages back to the operating system (glibc keeps them otherwise)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True)
class Release:
    """What a release gave back, in bytes; a figure for each GPU, or one for a CPU.

    ``before`` and ``after`` were in use before the engine and after its release (anonymous memory of this
    process and the engine's on a CPU, the driver's count on a GPU), ``held`` while it was open.
    ``first`` marks the first engine in this process, which leaves lazily imported modules behind.
    """

    before: tuple[int, ...]
    held: tuple[int, ...]
    after: tuple[int, ...]
    seconds: float
    first: bool

    @property
    def left(self) -> int:
        """Bytes that stayed behind, on the GPU where most did; negative when more came back than taken."""
        return max(after - before for before, after in zip(self.before, self.after, strict=True))

    def __str__(self) -> str:
        note = ", modules that vLLM imports late" if self.first and self.left > MIB else ""
        before, held, after = (
            " + ".join(f"{size / MIB:,.0f}" for size in sizes) + " MiB"
            for sizes in (self.before, self.held, self.after)
        )
        return (
            f"Released in ‹{self.seconds:.1f} s›. Memory before ‹{before}›, open ‹{held}›, after ‹{after}›. "
            f"Left behind: ‹{self.left / MIB:+,.0f} MiB{note}›."
        )


class MemoryWatch:
    """Memory in use before, while and after an engine: of each GPU, or of this process and the engine's."""

    def __init__(self, machine: Machine, children: Belongings):
        self._machine, self._children = machine, children
        self.before: tuple[int, ...] = ()
        self.first = False

    def start(self) -> None:
        """Note what is in use without the engine: garbage and freed heap pages are given back first.

        What is left is frozen until the release, which spares vLLM's start some seconds: it collects garbage
        six times, and going through 600,000 objects of its own import takes half a second each time.
        """
        gc.unfreeze()
        give_back_garbage()
        gc.freeze()
        self.before = self.in_use()

    def in_use(self) -> tuple[int, ...]:
        """Bytes in use now."""
        if self._machine.kind == "cuda":
            return gpu_memory_each()
        pids = ["self", *(process.pid for process in self._children.processes)]
        return (sum(map(anonymous_memory, pids)),)

    def added(self) -> int:
        """Bytes in use now that were not before, on all GPUs together."""
        return sum(self.in_use()) - sum(self.before)

    def too_much(self, release: Release) -> bool:
        """Whether more stayed behind than a release may leave."""
        if self._machine.kind == "cuda":
            return release.left > LEFT_GPU
        return release.left > (LEFT_FIRST if self.first else LEFT_CPU)

    def wait_until_back(self, held: tuple[int, ...], begun: float) -> Release:
        """Wait until the memory is back or the deadline is over; ``begun`` is ``time.perf_counter``'s.

        Threads that end give theirs a moment later: what may stay is read when it no longer falls.
        """
        stop, last = time.perf_counter() + DEADLINE_S, math.inf
        while True:
            give_back_garbage()  # not in `_shut_down`, whose names still refer to the engine
            now = self.in_use()
            found = Release(self.before, held, now, time.perf_counter() - begun, self.first)
            settled = last - sum(now) <= MIB and not self.too_much(found)
            if found.left < NEGLIGIBLE or settled or time.perf_counter() >= stop:
                return found
            last = sum(now)
            time.sleep(0.1)

    def held_message(self, release: Release, scheme: str) -> str:
        """A sentence on memory that did not come back, and who holds it."""
        holders = [f"this process ({os.getpid()}): a variable that still refers to the model or its outputs"]
        if self._machine.kind == "cuda":
            holders = [str(holder) for holder in who_holds(self._machine)]
        return (
            f"{release.left / MIB:,.0f} MiB did not come back within {DEADLINE_S:.0f} s of releasing the "
            f"engine ({scheme}). Held by: {'; '.join(holders) or 'no process the driver can name'}. "
            "Delete what refers to it, or restart the kernel."
        )


class Released:
    """Stands where a released engine was, for whoever kept a reference to the ``LLM``; it says ``why``."""

    def __init__(self, why: str):
        self._why = why

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise EngineClosedError(self._why)


@contextlib.contextmanager
def watched_loading(engine):
    """Note in ``engine.runner`` the in-process model runner, in ``engine.loading_bytes`` what loading adds.

    The runner, so that its tensors can be dropped even if building the engine fails later. The memory,
    because summing the parameters would be wrong: oneDNN repacks the weights and empties the originals.
    """
    if not engine.in_process:
        yield
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        engine.runner = weakref.ref(self)
        before = settled_memory()
        result = original(self, *args, **kwargs)
        engine.loading_bytes = settled_memory() - before
        return result

    CPUModelRunner.load_model = load_model
    try:
        yield
    finally:
        CPUModelRunner.load_model = original


def settled_memory() -> int:
    """This process's anonymous memory in bytes, garbage and freed heap pages given back first."""
    give_back_garbage()
    return anonymous_memory()
