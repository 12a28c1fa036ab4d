"""What every test shares: no live progress bars, and one folder for logs a test."""

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from helpers.base.machine import MIB
from helpers.engine import release
from helpers.engine.children import _mapped
from helpers.engine.engine import open_engine
from helpers.faults import explain

os.environ["TUTORIAL_HEADLESS"] = "1"
# A shell's background job starts with Ctrl+C ignored; the tests of interrupts need it as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)

release.one_heap()  # before any test's threads make heaps of their own, whose free ends look held

# The shortest whole safetensors file: a header of two bytes, no tensor.
NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"

# A small cache and context: the tests ask little, and every engine reserves its cache anew.
SMALL = {"max_model_len": 512, "kv_cache_memory_bytes": 256 * 2**20}


@pytest.fixture
def small(tmp_path):
    """Arguments of ``open_engine`` for a quick engine whose log goes to the test's own folder."""
    return {**SMALL, "log_dir": tmp_path / "logs"}


class SmallDisk:
    """A disk of a size that a test chooses, with a folder for a cache on it."""

    def __init__(self, place: Path):
        self.place, self.cache = place, place / "cache"

    def mount(self) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", self.place]
        return subprocess.run(command, capture_output=True).returncode == 0

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.place], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A small disk, where the system lets one be mounted."""
    disk = SmallDisk(tmp_path / "disk")
    disk.place.mkdir()
    if not disk.mount():
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", disk.place], check=True)  # a log on it may still be open


SWAP = 20_000_000  # bytes that a swap of engines may leave in a warm process


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Import vLLM and take the first engine's lazy imports out of the other tests' way."""
    engine = open_engine(log_dir=tmp_path_factory.mktemp("warm"), max_model_len=512)
    engine.imported_before = "vllm" in sys.modules  # by another test, in this process
    with engine:
        pass
    return engine


@pytest.fixture
def memory_back(warm):
    """Fail a test after which this process holds more than one swap of engines may leave."""
    before = release.settled_memory()
    yield
    left = release.settled_memory() - before
    assert left < SWAP, f"{left / MIB:.0f} MiB left behind"


@pytest.fixture
def nothing_left(tmp_path):
    """Fail a test after which a server's or a router's process still runs; yields what finds those.

    They are known by the log in the test's folder that they write to, whoever's children they are by then.
    """
    import psutil

    def running() -> list:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if Path(f"/proc/{process.pid}/fd/1").readlink().is_relative_to(tmp_path):
                    found.append(process)
        return found

    yield running
    psutil.wait_procs(running(), timeout=20)
    left = running()
    for process in left:
        process.kill()
    assert not left


def ask(engine, question: str, max_tokens: int = 20) -> str:
    """What an engine's instruct model answers, greedily."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return engine.llm.chat([{"role": "user", "content": question}], params)[0].outputs[0].text


def named(error: BaseException, name: str):
    """Insist on an error's diagnosis; return the report."""
    report = explain.explain(error)
    assert report.name == name, report
    return report


def children() -> set:
    """This process's descendants, but for Python's own tracker, which serves until the process ends."""
    import psutil

    tracker = resource_tracker._resource_tracker._pid
    return {child for child in psutil.Process().children(recursive=True) if child.pid != tracker}


SHARED = Path("/dev/shm")


def shared_memory() -> set[Path]:
    """All blocks and semaphores there are now, other programs' too."""
    return set(SHARED.iterdir())


def left_behind(before: set[Path]) -> set[Path]:
    """Shared memory that came since and that no other process maps, as an engine that runs elsewhere does."""
    found = set()
    for path in shared_memory() - before:
        with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
            if not _mapped(path):
                found.add(path)
    return found
