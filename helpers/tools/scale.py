"""Several GPUs, recorded: one engine on all against a server on each behind a router, at rising load.

``serving`` has Mistral-7B's shape with the embedded model's vocabulary, so that its tokenizer serves: one
server, one a GPU behind vllm-router, one on all GPUs (tensor parallel), one with a rank a GPU (data
parallel). All run at once with the same KV cache a GPU, and only the one that is asked computes; the order is
mixed anew each repeat. Then one of the router's servers is killed in mid-load.
``large`` has Llama-3.1-70B's: in FP8 a server on each GPU, then (both do not fit) in 16 bits one on all.
``endings`` ends an engine on two GPUs in five ways. A line of ``scale.jsonl`` is written as it is measured.
"""

import contextlib
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil

from helpers.base.machine import GIB, MIB, detect, gpu_memory_each
from helpers.engine.engine import open_engine
from helpers.measure.speed import decode_prompts, random_prompts
from helpers.model.model import Model
from helpers.serve import clients
from helpers.serve.child import Child
from helpers.serve.command import free_ports
from helpers.serve.load import Generator, Objective
from helpers.serve.owned import start_in_turn
from helpers.serve.router import SOONER, Router, places
from helpers.serve.server import Server
from helpers.tools.grid import slug
from helpers.tools.recording import sharing, write
from helpers.tools.served import server, worded

LENGTHS = {"input_tokens": 512, "output_tokens": 128}
KV_BYTES = 17 * GIB  # of each GPU and server: 139,264 tokens of this shape in 16 bits
CLIENTS = (1, 16, 64)  # at once, and then as many as one server takes and half of that, for each GPU
FULL = 256
LARGE_FULL = 64  # its prompts take ten times as long to read
REPEATS = 3
LARGE_KV_BYTES = 20 * GIB  # 65,536 tokens of this one on each GPU
GRAPHS = [1, 2, 4, 8, *range(16, 512, 32), 512]


# -- serving ----------------------------------------------------------------------------------------


def serving(out: Path) -> None:
    """Every way at every level, three times in mixed order; then a kill; then the memory is back."""
    before, gpus, logs = gpu_memory_each(), detect().count, out / "logs"
    model, same = worded("mistral-7b", "bf16"), sharing(KV_BYTES, GRAPHS)
    router = _router(model, logs, same)
    ways = {
        "one": router.servers[0],
        "router": router,
        "tensor parallel": server(model, logs, tensor_parallel_size=gpus, **same),
        "data parallel": server(model, logs, data_parallel_size=gpus, **same),
    }
    with _running(ways):
        shape = {"model": model.title, "scheme": "baseline", "kv_cache_bytes_a_gpu": KV_BYTES}
        _load(ways, out, shape, FULL)
        write(out / "scale.jsonl", _killed(router))
    write(out / "scale.jsonl", {"what": "memory", "before_bytes": before, **_left([], before)})


def large(out: Path) -> None:
    """Llama-3.1-70B on the same GPUs: a server in FP8 on each, and one in 16 bits on all."""
    logs, same = out / "logs", sharing(LARGE_KV_BYTES, GRAPHS)
    eight, sixteen = worded("llama-3.1-70b", "fp8"), worded("llama-3.1-70b", "bf16")
    together = server(sixteen, logs, tensor_parallel_size=detect().count, **same)
    ways = {"fp8": {"router": _router(eight, logs, same)}, "baseline": {"tensor parallel": together}}
    for scheme, way in ways.items():
        with _running(way):
            shape = {"model": eight.title, "scheme": scheme, "kv_cache_bytes_a_gpu": LARGE_KV_BYTES}
            _load(way, out, shape, LARGE_FULL)


def _router(model: Model, logs: Path, same: dict) -> Router:
    """A router before a server a GPU; none of them is started."""
    host = "127.0.0.1"
    port, watched = free_ports(host, 2)
    args = {"host": host, "port": port, "prometheus_port": watched, "policy": "round_robin", **SOONER}
    apart = [server(model, logs, place, **same) for place in places(detect(), detect().count)]
    router = Router(apart[0].settings, args, logs, {})
    router.servers = apart
    return router


@contextlib.contextmanager
def _running(ways: dict[str, Server | Router]) -> Iterator[None]:
    """All servers started beside each other, then the routers, and all of them ended."""
    routers = [way for way in ways.values() if isinstance(way, Router)]
    servers = {one for way in ways.values() for one in (way.servers if way in routers else [way])}
    with contextlib.ExitStack() as stack:
        for one in (*servers, *routers):
            stack.callback(one.kill)
        start_in_turn(list(servers), routers)
        yield


def _load(ways: dict[str, Server | Router], out: Path, shape: dict, full: int) -> None:
    """Every level of every way, in mixed order, up to ``full`` clients for each GPU. The first round is
    short, warms up and does not count."""
    rng, objective = random.Random(0), Objective(ttft_ms=1000, tpot_ms=50)
    with Generator(out / "logs/load") as generator:
        for repeat in range(REPEATS + 1):
            for way in rng.sample(sorted(ways), len(ways)):
                gpus = 1 if way == "one" else detect().count
                levels = sorted({*CLIENTS, full // 2 * gpus, full * gpus}) if repeat else [full]
                asked = {"concurrencies": levels, "shares": [], "objective": objective, **LENGTHS}
                row = {"what": "load", "weights": "random", "way": way, "gpus": gpus, "repeat": repeat}
                row |= {"start_s": round(ways[way].start_s, 1), **shape, **LENGTHS}
                for level in generator.bench(ways[way], **asked):
                    if repeat:
                        found = asdict(level) | {"clients": level.concurrency}
                        write(out / "scale.jsonl", row | found)


def _killed(router: Router) -> dict:
    """One of the servers is killed under half of their load: what becomes of every request."""
    begun, concurrency = time.perf_counter(), FULL // 2 * len(router.servers)
    with clients.crowd(router, clients.numbered(12 * concurrency), concurrency, timeout_s=60) as crowd:
        crowd.wait_until_running(concurrency // 2)
        router.servers[0].crash()
        outcomes = crowd.outcomes()
    row = {"what": "kill", "clients": concurrency, **clients.count(outcomes)}
    row |= {"slowest_s": round(max(outcome.seconds for outcome in outcomes), 2)}
    return row | {"seconds": round(time.perf_counter() - begun, 2)}


# -- endings ----------------------------------------------------------------------------------------

# What becomes of an engine on two GPUs: its block ends, its owner is ended, one of its workers is.
ENDINGS = {
    "its block ends": None,
    "Ctrl+C": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "SIGKILL": signal.SIGKILL,
    "a worker killed": None,
}
TWO = {"tensor_parallel_size": 2}
BACK_BYTES, BACK_S = 64 * MIB, 60.0  # of each GPU, and how long that may take


def endings(out: Path) -> None:
    """Each ending of an engine on two GPUs: what is left of its processes, and of its memory on each GPU."""
    for how, number in ENDINGS.items():
        log, before = out / f"logs/ending-{slug(how)}.log", gpu_memory_each()
        with Child(f"{__name__}:held", log, str(out / "logs")) as child:
            if (found := child.line()) is None:
                raise RuntimeError(child.cause)
            owner = psutil.Process(found["pid"])
            family, held = [owner, *owner.children(recursive=True)], gpu_memory_each()
            if how == "a worker killed":
                next(one for one in family if "Worker_TP1" in " ".join(one.cmdline())).kill()
            elif number:
                owner.send_signal(number)
            else:
                child.tell(end=True)
            row = {"what": "ending", "how": how, "model": "Mistral-7B", **TWO}
            child.line()  # until it has ended
            row |= _left(family, before)
        row |= {"processes": len(family), "before_bytes": before, "held_bytes": held}
        write(out / "scale.jsonl", row)


def _left(family: list[psutil.Process], before: tuple[int, ...]) -> dict:
    """What is left once all is gone or ``BACK_S`` are over."""
    begun = time.perf_counter()
    while True:
        left = [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        after, seconds = gpu_memory_each(), time.perf_counter() - begun
        back = all(now <= then + BACK_BYTES for now, then in zip(after, before, strict=True))
        if (back and not left) or seconds > BACK_S:
            return {"left": len(left), "after_bytes": after, "seconds": round(seconds, 2)}
        time.sleep(0.2)


def held(say, logs: str) -> None:
    """An engine on two GPUs that answers until it is told to end, or is ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whose parent is in the background ignores it
    args = {"enforce_eager": True, "gpu_memory_utilization": 0.5, **TWO}
    with open_engine("shape:mistral-7b", log_dir=logs, **args) as llm:
        say(pid=os.getpid())
        while not select.select([sys.stdin], [], [], 0)[0]:
            decode_prompts(llm, random_prompts(32_000, 8, 16, random.Random(0)), 0.5, 500)
