"""A process that has imported vLLM already and waits to become the next engine's.

vLLM builds an engine in a spawned child, which imports vLLM once more before it does anything: on a GPU
that is half of the start of an engine whose graphs are cached. A spare does it ahead, while the engine
before loads. It holds no GPU memory, becomes one engine's process, ends with this one, and by itself after
``PATIENCE_S``. Where there is no spare, or one with another environment, an engine starts as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable

PATIENCE_S = 900
CORES = 4  # with fewer, importing ahead would take from the engine that loads
# Open files keep their numbers in a spawned child (what is pickled for it holds them), so a spare keeps
# the numbers below this free of its own.
FILES = 256

# What a spare runs. It reads its orders from a socket: open files and their numbers, the environment, and
# what multiprocessing would have put on its command line.
_PROGRAM = """
import json, os, socket, sys
number, files, patience = map(int, sys.argv[1:4])
sys.path[:] = json.loads(sys.argv[4])
orders = socket.socket(fileno=os.dup2(number, files, inheritable=False))
nothing = os.open(os.devnull, os.O_RDWR)
for number in range(3, files):
    if number != nothing:
        os.dup2(nothing, number, inheritable=False)
MODULES
orders.settimeout(patience)
try:
    text, came, _, _ = socket.recv_fds(orders, 1 << 20, files)
    while text and not text.endswith(b"\\n"):
        more = orders.recv(1 << 20)
        text = text + more if more else b""  # cut short: whoever gave the orders has ended
except TimeoutError:
    text = b""
if not text:
    os._exit(0)
order = json.loads(text)
orders.close()
for number in range(3, files):
    os.close(number)
for copy, number in zip(came, order["numbers"]):
    os.dup2(copy, number)
    os.close(copy)
os.environ.clear()
os.environ.update(order["environ"])
if "OMP_NUM_THREADS" in os.environ:
    import torch
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
import multiprocessing.spawn
sys.argv = ["-c", "--multiprocessing-fork"]
try:
    multiprocessing.spawn.spawn_main(**order["spawn"])
except SystemExit as end:  # its work is done; taking thousands of modules down takes seconds
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else 1)
"""
# What an engine's process has imported by the time it loads weights.
_MODULES = (
    "import vllm.entrypoints.llm, vllm.v1.engine.core, vllm.v1.executor.uniproc_executor\n"
    "import vllm.model_executor.model_loader, vllm.v1.worker."
)
_WORKERS = {"cuda": "gpu.model_runner", "cpu": "cpu_worker"}
_waiting: Spare | None = None  # one is enough: a process has one engine


class Spare:
    """One waiting process, and the environment it was started with."""

    def __init__(self, kind: str, environ: dict[str, str], spawn: Callable):
        self.kind, self.environ = kind, environ
        self._socket, theirs = socket.socketpair()
        program = _PROGRAM.replace("MODULES", _MODULES + _WORKERS[kind])
        command = [sys.executable, "-c", program, str(theirs.fileno()), str(FILES), str(PATIENCE_S)]
        silent = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        with theirs:
            theirs.set_inheritable(True)
            self.pid: int = spawn([*command, json.dumps(sys.path)], environ, silent)

    def alive(self) -> bool:
        """Whether it still waits; reaps it if not."""
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        return False

    def become(self, command: list, descriptors: list[int]) -> int | None:
        """Make it the child of a multiprocessing command line; its pid, or None if that cannot be."""
        spawn = re.search(r"spawn_main\((.*)\)", " ".join(map(os.fsdecode, command)))
        numbers = [1, 2, *descriptors]
        if not spawn or max(numbers) >= FILES or not self.alive():
            self.dismiss()
            return None
        keywords = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", spawn[1])}
        order = {"numbers": numbers, "environ": dict(os.environ), "spawn": keywords}
        text = json.dumps(order).encode() + b"\n"
        with self._socket:
            try:
                self._socket.sendall(text[socket.send_fds(self._socket, [text], numbers) :])
            except OSError:
                return None
        return self.pid

    def dismiss(self) -> None:
        """Let it go: it reads the end of its orders, and ends."""
        self._socket.close()


def useful(kind: str) -> bool:
    """Whether engines start in children here, with a core to spare for the next one's import."""
    return kind == "cuda" and sys.platform == "linux" and (os.cpu_count() or 1) >= CORES


def prepare(kind: str, environ: dict[str, str], spawn: Callable) -> None:
    """Start a spare for the next engine, unless one that fits is waiting."""
    global _waiting
    if _waiting and _waiting.environ == environ and _waiting.alive():
        return
    dismiss()
    _waiting = Spare(kind, environ, spawn)


def take() -> Spare | None:
    """Hand out the spare that waits."""
    global _waiting
    spare, _waiting = _waiting, None
    return spare


def dismiss() -> None:
    """End the spare that waits, if one does."""
    if spare := take():
        spare.dismiss()


def waiting() -> set[int]:
    """The pid of the spare that waits: a process of ours that belongs to no engine."""
    return {_waiting.pid} if _waiting else set()
