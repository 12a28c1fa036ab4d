"""Ctrl+C as a reader presses it: the real Jupyter kernel, interrupted as JupyterLab does it."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from subprocess import DEVNULL
from types import SimpleNamespace

import psutil
import pytest
from jupyter_client.manager import KernelManager

from helpers.base import interrupts
from helpers.engine import release
from tests.conftest import SWAP, left_behind, shared_memory

OPENING = """
import os
from tests.conftest import ask
from helpers.engine import release as room
from helpers.engine.engine import open_engine
small = dict(max_model_len=512, kv_cache_memory_bytes=256 * 2**20, log_dir={logs!r})
"""
AGAIN = """
engine = open_engine(**small)
with engine:
    print(ask(engine, "What is the capital of France? Answer with one word."))
print("SETTLED", room.settled_memory())
"""
FIRST = f"""{AGAIN}
import torch
assert torch.set_num_threads is torch._C.set_num_threads, "vLLM's own is left"
"""


class Kernel:
    """A Python's kernel, by default this one's, and what its cells said."""

    def __init__(self, python: str | Path = sys.executable, **where):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.kernel_spec.argv[0] = str(python)
        self.manager.start_kernel(stdout=DEVNULL, stderr=DEVNULL, **where)
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(60)

    def restart(self) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel(now=True)
        self._connect()

    def run(
        self,
        code: str,
        interrupt_when: str | None = None,
        after_s: float = 0.0,
        again_after_s: tuple[float, ...] = (),
        until: str | None = None,
        timeout_s: float = 120,
    ) -> tuple[str, str]:
        """Run a cell; return its text and its error's name, or leave it running once it has said ``until``.

        Interrupt it once it has said a word, and again after each of some pauses.
        """
        message, said, error, self.reason, self.traceback = self.client.execute(code), "", "", "", ""
        stop = time.monotonic() + timeout_s
        while time.monotonic() < stop:
            reply = self.client.get_iopub_msg(timeout=timeout_s)
            if reply["parent_header"].get("msg_id") != message:
                continue
            content = reply["content"]
            said += content.get("text", "")
            error, self.reason = content.get("ename", error), content.get("evalue", self.reason)
            self.traceback += "\n".join(content.get("traceback", ()))
            if interrupt_when and interrupt_when in said:
                for pause in (after_s, *again_after_s):
                    time.sleep(pause)
                    self.manager.interrupt_kernel()
                interrupt_when = None
            if until and until in said:
                return said, error
            if reply["msg_type"] == "status" and content["execution_state"] == "idle":
                return said, error
        raise TimeoutError(f"the cell did not end; it said {said!r}")

    def settled(self, said: str) -> int:
        return int(re.search(r"SETTLED (\d+)", said)[1])

    def children(self) -> list:
        """Its descendants, less Python's own tracker, which serves until the kernel ends."""
        found = psutil.Process(self.manager.provisioner.pid).children(recursive=True)
        return [child for child in found if "resource_tracker" not in " ".join(child.cmdline())]

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


GENERATING = (
    "engine = open_engine(**small)\nwith engine:\n"
    '    print("GO", flush=True)\n    ask(engine, "Tell a story.", 400)'
)
LOADING = 'print("GO", flush=True)\nengine = open_engine(**small)\nwith engine:\n    print("LOADED")'
RELEASING = 'engine = open_engine(**small)\nwith engine:\n    pass\nprint("PAST")'


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel that was interrupted while it imported vLLM, and has had an engine since."""
    kernel = Kernel()
    kernel.run(OPENING.format(logs=str(tmp_path_factory.mktemp("logs"))))
    begun = time.monotonic()
    _, error = kernel.run(LOADING, interrupt_when="GO", after_s=1.0)
    kernel.cut = SimpleNamespace(error=error, traceback=kernel.traceback, took=time.monotonic() - begun)
    kernel.cut.imported, _ = kernel.run("import sys; print('vllm.v1.engine.core' in sys.modules)")
    said, error = kernel.run(FIRST)
    assert not error, said
    assert "Paris" in said
    kernel.reference = kernel.settled(said)
    yield kernel
    kernel.close()


def test_an_interrupt_during_the_import_ends_with_it_and_accuses_nobody(kernel):
    assert kernel.cut.error == "KeyboardInterrupt"
    assert "did not come back" not in kernel.cut.traceback
    assert kernel.cut.imported == "True\n", "the import was cut short"
    assert kernel.cut.took < release.DEADLINE_S, "it waited for memory that no engine held"


@pytest.mark.parametrize(
    ("cell", "word", "after_s"),
    [
        pytest.param(LOADING, "GO", 1.0, id="load"),
        pytest.param(GENERATING, "GO", 1.5, id="generate", marks=pytest.mark.slow),
        pytest.param(RELEASING, "ready", 0.5, id="release", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_is_as_good_as_before(kernel, cell, word, after_s):
    left = []
    for _ in range(2):  # what is left once is a module or the heap's own; a leak is left each time
        said, error = kernel.run(cell, interrupt_when=word, after_s=after_s)
        assert error == "KeyboardInterrupt", said
        assert "LOADED" not in said
        assert "PAST" not in said
        said, error = kernel.run(AGAIN)
        assert not error, said
        assert "Paris" in said
        left.append(kernel.settled(said) - kernel.reference)
        kernel.reference = kernel.settled(said)
    assert min(left) < 2 * SWAP, f"{left} bytes left after an interrupt and another engine, twice"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "word", "after_s"),
    [(LOADING, "GO", 6.0), (GENERATING, "GO", 1.5), (RELEASING, "ready", 0.5)],
    ids=["load", "generate", "release"],
)
def test_and_with_the_engine_in_a_child_as_on_a_gpu(kernel, cell, word, after_s):
    shared = shared_memory()
    cell = cell.replace("(**small)", "(**small, in_child=True)")
    said, error = kernel.run(cell, interrupt_when=word, after_s=after_s)
    assert error == "KeyboardInterrupt", said
    assert "LOADED" not in said
    assert "PAST" not in said
    left = [child for child in kernel.children() if child.is_running()]
    assert not left
    assert not left_behind(shared)
    said, error = kernel.run(AGAIN)
    assert not error, said
    assert "Paris" in said


def test_where_ctrl_c_is_ignored_it_stays_ignored():
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for waits in (interrupts.interrupts_deferred, interrupts.interrupts_that_insist):
            with waits():
                os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


def test_ctrl_c_in_a_block_that_must_end_comes_once_after_it():
    with pytest.raises(KeyboardInterrupt), interrupts.interrupts_deferred():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        ended = True
    assert ended
