"""Several GPUs, recorded: one engine on two against two behind a router, at rising load.

    python -m helpers.tools.scale_records --out notebooks/reference/h200 serving    9 minutes on two H200s
    python -m helpers.tools.scale_records --out notebooks/reference/h200 engines    9 minutes

``serving`` has Mistral-7B's shape with the embedded model's vocabulary, so that its tokenizer serves: one
server, two behind vllm-router, one on two GPUs (tensor parallel), one with two ranks (data parallel). All run
at once with the same KV cache a GPU, and only the one that is asked computes; the order is mixed anew each
repeat. Then one of the two servers is killed at 256 clients. ``engines`` has Llama-3.1-70B's shape. Each line
of ``scale.jsonl`` and ``parallel.jsonl`` is written as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from helpers.base.machine import GIB, detect, gpu_memory_each
from helpers.engine.engine import open_engine
from helpers.measure.memory import measure_memory
from helpers.measure.speed import measure_speed
from helpers.model.model import cache_folder
from helpers.serve import clients
from helpers.serve.child import Child
from helpers.serve.command import free_ports
from helpers.serve.load import Objective, bench
from helpers.serve.router import SOONER, Router, places
from helpers.serve.server import Server
from helpers.tools.recording import run_parts, stamp, write
from helpers.tools.served import server, start, worded

LENGTHS = {"input_tokens": 512, "output_tokens": 128}
KV_BYTES = 24 * GIB  # of each GPU and server: 196,608 tokens of this shape in 16 bits
LEVELS = {"one": (16, 256), "tensor parallel": (16, 256, 512), "data parallel": (16, 256, 512)}
LEVELS["router"] = LEVELS["data parallel"]
REPEATS = 3


# -- serving ----------------------------------------------------------------------------------------


def arms(out: Path) -> dict[str, Server | Router]:
    """The four ways, not started; ``one`` is the first of the router's two servers."""
    model, logs = worded("mistral-7b", "bf16", cache_folder() / "scale-mistral-7b"), out / "logs"
    same = {"kv_cache_memory_bytes": KV_BYTES, "gpu_memory_utilization": 0.2}
    both, host = places(detect(), 1, each=2)[0], "127.0.0.1"
    two = [server(model, logs, place, **same) for place in places(detect(), 2)]
    port, watched = free_ports(host, 2)
    args = {"host": host, "port": port, "prometheus_port": watched}
    router = Router(two[0].settings, {**args, "policy": "round_robin", **SOONER}, logs, {})
    router.servers = two
    return {
        "one": two[0],
        "router": router,
        "tensor parallel": server(model, logs, both, tensor_parallel_size=2, **same),
        "data parallel": server(model, logs, both, data_parallel_size=2, **same),
    }


def serving(out: Path) -> None:
    """Every way at every level, three times in mixed order; then a kill; then the memory is back."""
    before, ways = sum(gpu_memory_each()), arms(out)
    router = ways["router"]
    servers = [*router.servers, ways["tensor parallel"], ways["data parallel"]]
    with contextlib.ExitStack() as stack:
        for one in (*servers, router):
            stack.callback(one.kill)
        if failed := start(servers):
            raise RuntimeError("\n".join(failed.values()))
        router.start()  # its servers run already
        starts = {name: round(way.start_s, 1) for name, way in ways.items()}
        print(f"all ready: {starts}", flush=True)
        _loaded(ways, out, starts)
        write(out / "scale.jsonl", stamp() | _killed(router))
    memory = {"what": "memory", "before_bytes": before, "after_bytes": sum(gpu_memory_each())}
    write(out / "scale.jsonl", stamp() | memory)


def _loaded(ways: dict, out: Path, starts: dict) -> None:
    """Every level of every way, in mixed order; the first round is short, warms up and does not count."""
    rng, objective = random.Random(0), Objective(ttft_ms=1000, tpot_ms=50)
    for repeat in range(REPEATS + 1):
        for way in rng.sample(sorted(ways), len(ways)):
            levels = [*LEVELS[way]] if repeat else [256]
            asked = {"concurrencies": levels, "shares": [], "objective": objective, **LENGTHS}
            for level in bench(ways[way], **asked, log_dir=out / "logs/load"):
                if repeat:
                    row = {"what": "load", "way": way, "clients": level.concurrency, "repeat": repeat}
                    row |= {"start_s": starts[way], "gpus": 1 if way == "one" else 2}
                    write(out / "scale.jsonl", stamp() | row | asdict(level))


def _killed(router: Router, concurrency: int = 256) -> dict:
    """One of two servers is killed at 256 clients: what becomes of every request."""
    begun = time.perf_counter()
    with clients.crowd(router, clients.numbered(12 * concurrency), concurrency, timeout_s=60) as crowd:
        crowd.wait_until_running(concurrency // 2)
        router.servers[0].crash()
        outcomes = crowd.outcomes()
    row = {"what": "kill", "clients": concurrency, **clients.count(outcomes)}
    row |= {"slowest_s": round(max(outcome.seconds for outcome in outcomes), 2)}
    return row | {"seconds": round(time.perf_counter() - begun, 2)}


# -- engines ----------------------------------------------------------------------------------------


def engines(out: Path, name: str = "shape:llama-3.1-70b") -> None:
    """A model that outgrows a GPU: 8 and 4 bits on one (at once, a GPU each), 16 and 8 bits on two."""
    failed = []
    for turn in ([("fp8", "0"), ("awq", "1")], [("baseline", "0,1")], [("fp8", "0,1")]):
        with contextlib.ExitStack() as stack:
            for child in [stack.enter_context(_child(out, name, *one)) for one in turn]:
                if (row := child.line()) is None:
                    failed.append(child.cause)
                else:
                    write(out / "parallel.jsonl", stamp() | row)
    if failed:
        raise RuntimeError("\n".join(failed))


def _child(out: Path, name: str, scheme: str, gpus: str) -> Child:
    logs, count = out / "logs", len(gpus.split(","))
    log = logs / f"parallel-{scheme}-{count}.log"
    work = "helpers.tools.scale_records:engine"
    return Child(work, log, name, scheme, count, str(logs), CUDA_VISIBLE_DEVICES=gpus)


def engine(say, name: str, scheme: str, gpus: int, logs: str) -> None:
    """One engine, in a process of its own: what a model takes and gives on so many GPUs."""
    args = {"compilation_config": {"cudagraph_capture_sizes": [1, 16, 64, 256]}}
    with open_engine(name, scheme, log_dir=logs, tensor_parallel_size=gpus, **args) as opened:
        speeds = measure_speed(opened, [1, 16, 64, 256], seconds=3.0, runs=5)
        memory = measure_memory(opened)
    row = {"model": opened.model.title, "scheme": scheme, "gpus": gpus, "start_s": round(opened.start_s, 1)}
    row |= {"kv_cache_tokens": memory.kv_cache_tokens, "weights_bytes": memory.weights}
    for named, key in (("tokens_per_s", "output_tokens_per_s"), ("low", "low"), ("high", "high")):
        row[named] = {speed.batch: round(getattr(speed, key), 1) for speed in speeds}
    say(**row)


PARTS = {"serving": serving, "engines": engines}


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scale_records", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="serving, engines (default: both)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    given = parser.parse_args(words)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if detect().kind != "cuda" or detect().count < 2:
        parser.error(f"this is for two GPUs, and this machine shows {detect().count} ({detect().name})")
    return run_parts({part: partial(PARTS[part], given.out) for part in given.parts or PARTS})


if __name__ == "__main__":
    sys.exit(main())
