"""What this machine is: its GPUs or its CPU, as far as it decides which quantization runs how.

``detect()`` asks the NVIDIA driver through NVML (no CUDA context, so nothing is held on the device)
and the operating system; it imports neither torch nor vLLM.
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util
import itertools
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One machine as the schemes see it.

    ``kind`` is ``cuda`` or ``cpu``. ``sm`` is the compute capability (8.9 for an L4), None on a CPU.
    ``memory_bytes`` is one GPU's memory, or the memory this process may use. ``isa`` holds the CPU's
    instruction sets that decide a kernel (``amx_bf16``, ``avx512_bf16``, ``avx512f``, ``avx2``).
    """

    kind: str
    name: str
    memory_bytes: int
    count: int = 1
    sm: float | None = None
    driver: str | None = None
    cores: int = 1
    isa: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """A short name for tables and records, such as ``NVIDIA L4`` or ``AMD EPYC (2 cores)``."""
        return self.name if self.kind == "cuda" else f"{self.name} ({self.cores} cores)"

    def facts(self) -> dict[str, str]:
        """What a reader wants to see of it, in words."""
        if self.kind == "cuda":
            return {
                "GPU": f"{self.count} x {self.name}" if self.count > 1 else self.name,
                "Compute capability": f"SM {self.sm}",
                "GPU memory": f"{self.memory_bytes / GIB:.1f} GiB",
                "Driver": self.driver or "unknown",
            }
        return {
            "CPU": self.name,
            "Cores": str(self.cores),
            "Memory": f"{self.memory_bytes / GIB:.1f} GiB",
            "Instruction sets": ", ".join(sorted(self.isa)) or "none that matter here",
        }


# What /proc/cpuinfo calls the instruction sets that vLLM's CPU kernels ask for.
ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
)


@functools.cache
def detect() -> Machine:
    """Return this machine. A GPU that the driver lists but CUDA_VISIBLE_DEVICES hides does not count."""
    return _detect_gpu() or _detect_cpu()


def visible_gpus() -> list[int]:
    """NVML indices of the GPUs this process may use, in the order of CUDA_VISIBLE_DEVICES if it is set.

    As CUDA reads it: up to the first name that is no GPU's.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        present = list(range(pynvml.nvmlDeviceGetCount()))
    except Exception:  # no library, no driver, or a driver that does not answer: no GPU to us
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    named = (_gpu_index(name.strip(), present) for name in chosen.split(","))
    return list(itertools.takewhile(lambda index: index is not None, named))


def _gpu_index(name: str, present: list[int]) -> int | None:
    """NVML's index of the GPU with a number, with a UUID (or how only its begins), or with a part (MIG)."""
    import pynvml

    if name.isdigit():
        return int(name) if int(name) in present else None
    try:
        if name.startswith("MIG-"):
            part = pynvml.nvmlDeviceGetHandleByUUID(name)
            return pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part))
        handles = {index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in present}
        uuids = {index: _text(pynvml.nvmlDeviceGetUUID(handle)) for index, handle in handles.items()}
    except pynvml.NVMLError:
        return None
    found = [index for index, uuid in uuids.items() if name.startswith("GPU-") and uuid.startswith(name)]
    return found[0] if len(found) == 1 else None


def _detect_gpu() -> Machine | None:
    gpus = visible_gpus()
    if not gpus:
        return None
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(gpus[0])
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Machine(
        kind="cuda",
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        count=len(gpus),
        sm=major + minor / 10,
        driver=_text(pynvml.nvmlSystemGetDriverVersion()),
        cores=usable_cores(),
    )


def _detect_cpu() -> Machine:
    import psutil

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())
    }
    flags = set(fields.get("flags", "").split())
    return Machine(
        kind="cpu",
        name=fields.get("model name") or platform.processor() or platform.machine(),
        memory_bytes=min([psutil.virtual_memory().total, *_cgroup_limit()]),
        cores=usable_cores(),
        isa=frozenset(flag for flag in ISA_FLAGS if flag in flags) & _allowed_isa(),
    )


def _allowed_isa() -> frozenset[str]:
    """ONEDNN_MAX_CPU_ISA=AVX2 hides wider instructions from oneDNN: believe it, as the kernels do."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ("AVX2", "AVX", "SSE41"):
        return frozenset({"avx2"})
    return frozenset(ISA_FLAGS)


def _cgroup_limit() -> list[int]:
    """The container's memory limit in bytes, if there is one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return [int(text)] if text.isdigit() else []
    return []


def usable_cores() -> int:
    """CPU cores this process may run on (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def gpu_memory_used() -> int:
    """Bytes in use on the visible GPUs by everyone, as the driver counts them."""
    import pynvml

    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in visible_gpus()]
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


def anonymous_memory(pid: int | str = "self") -> int:
    """Bytes of memory a process holds that no file backs: its heap, its tensors. Linux only."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Anonymous line")


def copy_bandwidth(seconds: float = 0.5) -> float:
    """Measured memory bandwidth in bytes per second: a large copy, counting bytes read and written.

    On a GPU the copy runs in a process of its own, so that this one never holds a CUDA context.
    """
    if detect().kind == "cuda":
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

    cores, size = usable_cores(), 128 * MIB
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
    if detect().kind == "cuda":
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


def compiling(machine: Machine, args: Mapping[str, object]) -> dict[str, str]:
    """The environment in which an engine compiles what it must, and on a CPU that runs eagerly nothing.

    vLLM has a few small functions compiled all the same (the rank of a token, in vllm/v1/sample/ops). That
    takes g++, which a fresh machine may not have, and fails in a folder whose path has a space.

    On a GPU vLLM takes Humming for 4-bit matrices that no other kernel fits, and that has NVRTC compile its
    kernels in a process of its own. NVRTC from pip does not look beside itself for its other library.
    """
    if machine.kind == "cuda":
        if ctypes.util.find_library("nvrtc-builtins"):  # the system's toolkit has both
            return {}
        spec = importlib.util.find_spec("nvidia")
        roots = spec.submodule_search_locations if spec else ()
        have = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
        more = sorted({str(found.parent) for root in roots for found in Path(root).glob("cu*/lib/libnvrtc*")})
        return {"LD_LIBRARY_PATH": ":".join(dict.fromkeys([*have, *more]))} if more else {}
    return {"TORCHDYNAMO_DISABLE": "1" if args.get("enforce_eager") else "0"}
