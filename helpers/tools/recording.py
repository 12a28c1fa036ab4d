"""What every recording shares: rounds of processes, lines that name their machine, parts that may fail.

Starting an engine or a server is most of what it costs here, and most of a start is one core compiling. So a
round starts its processes at once, all in the GPU's memory together, and then has one after the other
measure: meanwhile the others wait for requests, and the GPU is its own. A GPU's time is dear: lines are
written as they come, and where one fails the others go on.
"""

import contextlib
import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from helpers.base import records
from helpers.base.machine import detect, visible_gpus
from helpers.base.records import PROTOCOL
from helpers.serve.child import Child

DONE = {"done": True}  # a job's last line
PATIENCE_S = 600  # a process that says nothing for that long is given up


def sharing(cache_bytes: int, batches: Iterable[int]) -> dict:
    """Arguments of an engine or a server that shares its GPU: its cache's size, CUDA graphs for what is asked
    of it, and no kernels compiled ahead of the first request, for a shorter start."""
    return {
        "kv_cache_memory_bytes": cache_bytes,
        "gpu_memory_utilization": 0.02,  # checked against what is free; the cache's size is given
        "compilation_config": {"cudagraph_capture_sizes": [*batches]},
        "kernel_config": {"enable_jit_warmup": False},
    }


def write(path: Path, row: dict) -> None:
    """Append a line to a recording's file, with how, on which machine and when it was measured; print it."""
    row = {"protocol": PROTOCOL, **records.stamp(detect()), **row}
    records.append(path, [row], fields=())
    print(json.dumps(row, ensure_ascii=False)[:400], flush=True)


def run_parts(parts: dict[str, Callable[[], None]]) -> int:
    """Make each part of a recording, also after one that failed; return the exit code."""
    failed = 0
    for name, work in parts.items():
        begun = time.perf_counter()
        try:
            work()
        except Exception:
            traceback.print_exc()
            failed = 1
        print(name, f"{time.perf_counter() - begun:.0f} s", flush=True)
    return failed


@dataclass(frozen=True)
class Job:
    """A process of a round: its log's name, what its lines say, its work and how many GPUs that takes.

    ``work`` names a generator, ``"helpers.tools.grid:work"``, which is given ``arguments`` and a folder for
    further logs. Once it is ready it yields what is true of all its lines, then each line, and last ``DONE``.
    """

    name: str
    row: dict
    work: str
    arguments: tuple
    gpus: int = 1


def run_round(jobs: list[Job], file: Path) -> None:
    """Start jobs beside each other, then have one after the other measure, a line of ``file`` each time."""
    with contextlib.ExitStack() as stack:
        started = []
        for job in jobs:
            gpus = ",".join(map(str, visible_gpus()[: job.gpus]))  # numbered as the driver does
            logs, asked = str(file.parent / "logs" / job.name), (job.work, *job.arguments)
            child = Child(f"{__name__}:_work", Path(f"{logs}.log"), *asked, logs, CUDA_VISIBLE_DEVICES=gpus)
            started.append((stack.enter_context(child), job.row))
        ready = [(child, row | first) for child, row in started if (first := _said(child))]
        for child, row in ready:
            child.tell(go=True)
            while (found := _said(child)) and found != DONE:
                write(file.with_stem(found.pop("file", file.stem)), row | found)
                child.tell(go=True)
            child.close()


def _said(child: Child) -> dict | None:
    """What a process says next; one that has ended, or hangs, is killed, and its log says why."""
    found = child.line(time.monotonic() + PATIENCE_S)
    if found is None:
        print(f"{child.log.name}: {child.cause}", flush=True)
        child.close()
    return found


def _work(say: Callable[..., None], work: str, *arguments) -> None:
    """A job's process: it is told when it may go on, since others are measured meanwhile."""
    for found in pkgutil.resolve_name(work)(*arguments):
        say(**found)
        sys.stdin.readline()
