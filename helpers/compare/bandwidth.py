"""What this machine can move and multiply at most, measured."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from helpers.base import machine
from helpers.base.machine import MIB


def copy_bandwidth(seconds: float = 0.5) -> float:
    """Measured memory bandwidth in bytes per second: a large copy, counting bytes read and written.

    On a GPU the copy runs in a process of its own, so that this one never holds a CUDA context.
    """
    if machine.detect().kind == "cuda":
        done = subprocess.run([sys.executable, "-c", _GPU_COPY], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    return _cpu_copy_bandwidth(seconds)


_GPU_COPY = """
import torch
a = torch.empty(2**31, dtype=torch.uint8, device="cuda"); b = torch.empty_like(a)
for _ in range(3): b.copy_(a)
times = []
for _ in range(9):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(); b.copy_(a); end.record(); torch.cuda.synchronize()
    times.append(begin.elapsed_time(end) / 1e3)
print(2 * a.numel() / sorted(times)[len(times) // 2])
"""


ROUNDS = 5  # at least; the first one of a process can be many times slower than the rest


def _cpu_copy_bandwidth(seconds: float) -> float:
    """Every core copies a buffer of its own, four times any cache; the best of ``ROUNDS`` or more.

    Both buffers are written to beforehand: memory that is touched for the first time has to be found by the
    system, and in a virtual machine by its host, which takes up to forty times as long as the copy.
    """
    import numpy as np

    cores, size = machine.usable_cores(), 128 * MIB
    source = [np.ones(size, np.uint8) for _ in range(cores)]
    target = [np.ones(size, np.uint8) for _ in range(cores)]  # np.zeros would not touch it
    best, rounds, stop = 0.0, 0, time.perf_counter() + seconds
    while time.perf_counter() < stop or rounds < ROUNDS:
        rounds += 1
        begin = time.perf_counter()
        threads = [threading.Thread(target=np.copyto, args=pair) for pair in zip(target, source, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, 2 * size * cores / (time.perf_counter() - begin))
    return best


def matmul_rate(seconds: float = 0.5, dtype: str = "bfloat16") -> float:
    """Measured arithmetic in operations/s: matrices of a type multiplied, two operations a multiplication.

    On a GPU in 16 bits, and in a process of its own, as ``copy_bandwidth``.
    """
    if machine.detect().kind == "cuda":
        done = subprocess.run([sys.executable, "-c", _GPU_MATMUL], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    import torch

    size = 512
    left = torch.ones(size, size, dtype=getattr(torch, dtype))
    best, rounds, stop = 0.0, 0, time.perf_counter() + seconds
    while time.perf_counter() < stop or rounds < ROUNDS:
        rounds += 1
        begin = time.perf_counter()
        torch.matmul(left, left)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


_GPU_MATMUL = """
import torch
n = 8192; a = torch.ones(n, n, dtype=torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16,
                         device="cuda"); b = a @ a
times = []
for _ in range(9):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(); torch.matmul(a, a, out=b); end.record(); torch.cuda.synchronize()
    times.append(begin.elapsed_time(end) / 1e3)
print(2 * n**3 / sorted(times)[len(times) // 2])
"""
