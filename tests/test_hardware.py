"""What the machine is taken for: this one against the system's own tools, others by planted answers."""

import ctypes.util
import importlib.util
import mmap
import os
import subprocess
import sys
from types import MappingProxyType, SimpleNamespace

import pytest

from helpers.base import machine as machine_module
from helpers.base.machine import GIB, MIB, Machine, anonymous_memory, detect, visible_gpus
from helpers.engine import arguments

L4 = Machine(kind="cuda", name="NVIDIA L4", memory_bytes=24 * GIB, sm=8.9, driver="580.1", cores=8)


@pytest.fixture(autouse=True)
def fresh():
    detect.cache_clear()
    yield
    detect.cache_clear()


def test_this_cpu_is_what_the_system_says(monkeypatch):
    monkeypatch.setattr(machine_module, "visible_gpus", list)
    machine = detect()
    told = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    assert machine.kind == "cpu"
    assert machine.name in told
    assert machine.cores == len(os.sched_getaffinity(0))
    for flag in ("avx2", "avx512f", "amx_bf16"):
        assert (flag in machine.isa) == (f" {flag} " in f"{told} ".replace("\n", " \n"))
    assert machine.name in machine.label


def test_onednns_own_limit_hides_wider_instructions(monkeypatch):
    monkeypatch.setattr(machine_module, "visible_gpus", list)
    for narrow in ("AVX2", "AVX2_VNNI_2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", narrow)
        assert detect().isa <= {"avx2"}
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    whole = machine_module._detect_cpu().isa
    for wide in ("AVX512_CORE_BF16", "AVX10_1_512"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", wide)
        assert machine_module._detect_cpu().isa == {flag for flag in whole if "amx" not in flag}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert machine_module._detect_cpu().isa == whole


class Two:
    """The driver of a machine with two GPUs, the second one shared out, as nvidia-ml-py has it."""

    NVMLError = KeyError
    UUIDS = MappingProxyType({"GPU-8932f937": ("GPU", 0), "GPU-8932aaaa": ("GPU", 1), "MIG-5c": ("MIG", 1)})
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetCount = staticmethod(lambda: 2)
    nvmlDeviceGetHandleByUUID = staticmethod(lambda name: Two.UUIDS[name])
    nvmlDeviceGetDeviceHandleFromMigDeviceHandle = staticmethod(lambda part: ("GPU", part[1]))
    nvmlDeviceGetIndex = staticmethod(lambda handle: {("GPU", 0): 0, ("GPU", 1): 1}[handle])
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: ("GPU", index))
    nvmlDeviceGetCudaComputeCapability = staticmethod(lambda handle: (8, 9))
    nvmlDeviceGetName = staticmethod(lambda handle: "NVIDIA L4")
    nvmlSystemGetDriverVersion = staticmethod(lambda: "580.1")
    nvmlDeviceGetMemoryInfo = staticmethod(lambda handle: SimpleNamespace(total=24 * GIB))


def test_a_gpu_is_read_from_the_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Two)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = detect()
    assert (machine.kind, machine.name, machine.sm, machine.count) == ("cuda", "NVIDIA L4", 8.9, 2)
    assert machine.facts()["Compute capability"] == "SM 8.9"
    assert machine.facts()["GPU"] == "2 x NVIDIA L4"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1, 0", [1, 0]),
        ("", []),
        ("7,1", []),
        ("0,-1,1", [0]),  # CUDA stops at the first that is none
        ("GPU-8932aaaa,GPU-8932f937", [1, 0]),
        ("GPU-8932f937,GPU-none,1", [0]),
        ("MIG-5c", [1]),
        ("MIG-none", []),
    ],
)
def test_only_visible_gpus_count(monkeypatch, chosen, expected):
    monkeypatch.setitem(sys.modules, "pynvml", Two)
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == expected


def test_anonymous_memory_sees_what_is_allocated():
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        before = anonymous_memory()
        for page in range(0, 64 * MIB, mmap.PAGESIZE):
            block[page] = 1
        grown = anonymous_memory() - before
    assert 60 * MIB < grown < 68 * MIB


def test_the_first_measurement_of_a_process_is_worth_as_much_as_the_next():
    """Memory that nobody had touched made it up to forty times smaller, in a virtual machine."""
    code = "from helpers.compare import bandwidth as h; print(*(h.copy_bandwidth() for _ in range(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *later = map(float, done.stdout.split())
    assert first > max(later) / 4
    assert 1e8 < first < 1e12 or machine_module.detect().kind == "cuda", "a CPU's memory, and no cache"


def test_the_compiler_from_pip_finds_its_other_library_and_what_was_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    monkeypatch.setattr(ctypes.util, "find_library", {}.get)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": spec}.get)
    assert arguments.compiling(L4, {}) == {}  # CUDA came another way
    library = tmp_path / "cu13/lib/libnvrtc.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    (library.parent / "libnvrtc-builtins.so.13.0").touch()
    for _ in range(2):  # a second engine adds nothing
        found = arguments.compiling(L4, {})
        assert found == {"LD_LIBRARY_PATH": f"/mine:{library.parent}"}
        monkeypatch.setenv("LD_LIBRARY_PATH", found["LD_LIBRARY_PATH"])
    monkeypatch.setattr(ctypes.util, "find_library", {"nvrtc-builtins": "libnvrtc-builtins.so.13.0"}.get)
    assert arguments.compiling(L4, {}) == {}  # it is where the loader looks anyway
    monkeypatch.setattr(ctypes.util, "find_library", {}.get)
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    assert arguments.compiling(L4, {}) == {}
