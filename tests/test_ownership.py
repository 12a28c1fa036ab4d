"""What is taken down with an engine, and what is not: other processes' shared memory stays."""

import subprocess
import sys
from pathlib import Path

from helpers.ownership import Belongings

SHARED = Path("/dev/shm")
# Another notebook on this machine, whose engine starts at the same time.
NEIGHBOUR = """
import multiprocessing, sys
from multiprocessing import shared_memory
lock = multiprocessing.get_context("spawn").Lock()
block = shared_memory.SharedMemory(create=True, size=4096)
print(lock._semlock.name, block.name, flush=True)
sys.stdin.read()
block.close(); block.unlink()
"""
# An engine's process that is killed: nobody maps what it leaves.
KILLED = """
import os, signal
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None
block = shared_memory.SharedMemory(create=True, size=4096)
print(block.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_neighbours_semaphore_and_shared_memory_stay_and_what_a_killed_one_left_goes():
    owned = Belongings()
    with owned.watched():
        command = [sys.executable, "-c", NEIGHBOUR]
        neighbour = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        semaphore, block = neighbour.stdout.readline().split()
        killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    theirs = [SHARED / f"sem.{semaphore.strip('/')}", SHARED / block]
    left = SHARED / killed.stdout.strip()
    owned._processes = []  # the neighbour is no child of an engine
    try:
        assert all(path.exists() for path in [*theirs, left])
        owned.end()
        assert all(path.exists() for path in theirs)
        assert not left.exists()
    finally:
        neighbour.communicate()
        left.unlink(missing_ok=True)
    assert neighbour.returncode == 0
