"""What this machine can move and multiply at most, measured."""

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from helpers.base import machine
from helpers.base.machine import MIB

SECONDS, ROUNDS = 0.5, 5  # at least; the first round of a process can be many times slower than the rest


def copy_bandwidth() -> float:
    """Measured memory bandwidth in bytes per second: a large copy, counting bytes read and written.

    On a CPU every core copies a buffer of its own, four times any cache. Both buffers are written to
    beforehand: memory that is touched for the first time has to be found by the system, and in a virtual
    machine by its host, which takes up to forty times as long as the copy.
    """
    if machine.detect().kind == "cuda":
        return _on_gpu("a = torch.empty(2**31, dtype=torch.uint8, device='cuda'); b = torch.empty_like(a)",
                       "b.copy_(a)", "2 * a.numel()")  # fmt: skip
    import numpy as np

    cores, size = machine.usable_cores(), 128 * MIB
    source = [np.ones(size, np.uint8) for _ in range(cores)]
    target = [np.ones(size, np.uint8) for _ in range(cores)]  # np.zeros would not touch it
    with ThreadPoolExecutor(cores) as pool:
        return 2 * size * cores / _shortest(lambda: list(pool.map(np.copyto, target, source)))


def matmul_rate(dtype: str = "bfloat16") -> float:
    """Measured arithmetic in operations/s: matrices of a type multiplied, two operations a multiplication."""
    if machine.detect().kind == "cuda":
        type_ = "torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16"
        return _on_gpu(f"a = torch.ones(8192, 8192, dtype={type_}, device='cuda'); b = a @ a",
                       "torch.matmul(a, a, out=b)", "2 * 8192**3")  # fmt: skip
    import torch

    left = torch.ones(512, 512, dtype=getattr(torch, dtype))
    return 2 * 512**3 / _shortest(lambda: torch.matmul(left, left))


def _shortest(work: Callable[[], object]) -> float:
    """The seconds of the fastest round."""
    took, stop = [], time.perf_counter() + SECONDS
    while time.perf_counter() < stop or len(took) < ROUNDS:
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return min(took)


def _on_gpu(prepare: str, work: str, amount: str) -> float:
    """The amount of work a second, in a process of its own: so this one never holds a CUDA context."""
    code = _GPU.format(prepare=prepare, work=work, amount=amount)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


_GPU = """
import torch
{prepare}
for _ in range(3): {work}
times = []
for _ in range(9):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(); {work}; end.record(); torch.cuda.synchronize()
    times.append(begin.elapsed_time(end) / 1e3)
print({amount} / sorted(times)[len(times) // 2])
"""
