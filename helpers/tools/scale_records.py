"""Several GPUs, recorded: one engine on all against a server on each behind a router, at rising load.

    python -m helpers.tools.scale_records --out notebooks/reference/h200 serving    13 minutes on two H200s
    python -m helpers.tools.scale_records --out notebooks/reference/h200 large      10 minutes
    python -m helpers.tools.scale_records --out notebooks/reference/h200 endings     6 minutes

``serving`` has Mistral-7B's shape with the embedded model's vocabulary, so that its tokenizer serves: one
server, one a GPU behind vllm-router, one on all GPUs (tensor parallel), one with a rank a GPU (data
parallel), with one front end, the process that hands out tokens, and with one a rank. All run at once with
the same KV cache a GPU, and only the one that is asked computes; the order is mixed anew each repeat. Then
one of the router's servers is killed in mid-load.
``large`` has Llama-3.1-70B's: in FP8 a server on each GPU, then (both do not fit) in 16 bits one on all.
``endings`` ends an engine on two GPUs in five ways. A line of ``scale.jsonl`` is written as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil

from helpers.base.machine import GIB, MIB, detect, gpu_memory_each
from helpers.engine.engine import open_engine
from helpers.measure.speed import decode_prompts, random_prompts
from helpers.model.model import Model, cache_folder
from helpers.serve import clients
from helpers.serve.child import Child
from helpers.serve.command import flags, free_ports
from helpers.serve.load import Generator, Level, Objective
from helpers.serve.router import SOONER, Router, places
from helpers.serve.server import Server
from helpers.tools.deployments import WAYS
from helpers.tools.grid import slug
from helpers.tools.recording import run_parts, stamp, write
from helpers.tools.served import server, start, worded

LENGTHS = {"input_tokens": 512, "output_tokens": 128}
KV_BYTES = 17 * GIB  # of each GPU and server: 139,264 tokens of this shape in 16 bits
CLIENTS = (1, 16, 64)  # at once, and then as many as one server takes and half of that, for each GPU
FULL = 256
FRONT_ENDS = "data parallel, a front end each"
LARGE_FULL = 64  # its prompts take ten times as long to read
REPEATS = 3
LARGE_KV_BYTES = 20 * GIB  # 65,536 tokens of this one on each GPU


# -- serving ----------------------------------------------------------------------------------------


def arms(out: Path) -> dict[str, Server | Router]:
    """The five ways, not started; ``one`` is the first of the router's servers."""
    gpus = detect().count
    model, same = _shape("mistral-7b", "bf16", KV_BYTES)
    together, logs = places(detect(), 1, each=gpus)[0], out / "logs"
    router = _router(model, logs, same)
    ranks = {"data_parallel_size": gpus, **same}
    return {
        "one": router.servers[0],
        "router": router,
        "tensor parallel": server(model, logs, together, tensor_parallel_size=gpus, **same),
        "data parallel": server(model, logs, together, **ranks),
        FRONT_ENDS: server(model, logs, together, Served, api_server_count=gpus, **ranks),
    }


class Served(Server):
    """A server that ``vllm serve`` starts, with several front ends if it is told so."""

    def _command_line(self) -> list[str]:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *flags(self.args)]


def _shape(name: str, way: str, kv_bytes: int) -> tuple[Model, dict]:
    """A model with words, and the arguments of all its servers."""
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8, *range(16, 512, 32), 512]}
    same = {"kv_cache_memory_bytes": kv_bytes, "gpu_memory_utilization": 0.02, "compilation_config": graphs}
    return worded(name, way, cache_folder() / f"scale-{name}-{way}"), same


def _router(model: Model, logs: Path, same: dict) -> Router:
    """A router before a server a GPU; none of them is started."""
    host = "127.0.0.1"
    port, watched = free_ports(host, 2)
    args = {"host": host, "port": port, "prometheus_port": watched, "policy": "round_robin", **SOONER}
    apart = [server(model, logs, place, **same) for place in places(detect(), detect().count)]
    router = Router(apart[0].settings, args, logs, {})
    router.servers = apart
    return router


def serving(out: Path) -> None:
    """Every way at every level, three times in mixed order; then a kill; then the memory is back."""
    before, ways = gpu_memory_each(), arms(out)
    shape = {"model": "Mistral-7B", "scheme": "baseline", "kv_cache_bytes_a_gpu": KV_BYTES}
    with _running(ways):
        _loaded(ways, out, shape)
        write(out / "scale.jsonl", stamp() | _killed(ways["router"]))
    write(out / "scale.jsonl", stamp() | {"what": "memory", "before_bytes": before, **_left([], before)})


def large(out: Path) -> None:
    """Llama-3.1-70B on the same GPUs: a server in FP8 on each, and one in 16 bits on all."""
    for way in ("fp8", "bf16"):
        model, same = _shape("llama-3.1-70b", way, LARGE_KV_BYTES)
        if way == "fp8":
            ways = {"router": _router(model, out / "logs", same)}
        else:
            place = places(detect(), 1, each=detect().count)[0]
            together = server(model, out / "logs", place, tensor_parallel_size=detect().count, **same)
            ways = {"tensor parallel": together}
        shape = {"model": "Llama-3.1-70B", "scheme": WAYS[way].scheme, "kv_cache_bytes_a_gpu": LARGE_KV_BYTES}
        with _running(ways):
            _loaded(ways, out, shape, LARGE_FULL)


@contextlib.contextmanager
def _running(ways: dict[str, Server | Router]) -> Iterator[None]:
    """All servers started beside each other, and ended."""
    routers = [way for way in ways.values() if isinstance(way, Router)]
    behind = [one for router in routers for one in router.servers]
    servers = behind + [way for way in ways.values() if way not in (*routers, *behind)]
    with contextlib.ExitStack() as stack:
        for one in (*servers, *routers):
            stack.callback(one.kill)
        if failed := start(servers):
            raise RuntimeError("\n".join(failed.values()))
        for router in routers:
            router.start()  # its servers run already
        print("all ready:", {name: round(way.start_s, 1) for name, way in ways.items()}, flush=True)
        yield


def _loaded(ways: dict, out: Path, shape: dict, full: int = FULL) -> None:
    """Every level of every way, in mixed order, up to ``full`` clients for each GPU. The first round is
    short, warms up and does not count."""
    rng, objective = random.Random(0), Objective(ttft_ms=1000, tpot_ms=50)
    with Generator(out / "logs/load") as generator:
        for repeat in range(REPEATS + 1):
            for way in rng.sample(sorted(ways), len(ways)):
                gpus = 1 if way == "one" else detect().count
                levels = sorted({*CLIENTS, full // 2 * gpus, full * gpus}) if repeat else [full]
                asked = {"concurrencies": levels, "shares": [], "objective": objective, **LENGTHS}
                for level in generator.bench(ways[way], **asked):
                    if repeat:
                        row = {
                            "what": "load",
                            "weights": "random",
                            "way": way,
                            "gpus": gpus,
                            "repeat": repeat,
                        }
                        row |= {"front_ends": gpus if way in ("router", FRONT_ENDS) else 1}
                        row |= {"start_s": round(ways[way].start_s, 1)}
                        write(out / "scale.jsonl", stamp() | shape | LENGTHS | row | _of(level))


def _of(level: Level) -> dict:
    """A closed loop's figures; times in seconds."""
    found = asdict(level)
    return {"clients": found.pop("concurrency")} | {
        name: value for name, value in found.items() if value is not None
    }


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
        with Child("helpers.tools.scale_records:held", log, str(out / "logs")) as child:
            if (found := child.line()) is None:
                raise RuntimeError(child.cause)
            owner = psutil.Process(found["pid"])
            family, held = [owner, *owner.children(recursive=True)], gpu_memory_each()
            if how == "a worker killed":
                family[-1].kill()
            elif number:
                owner.send_signal(number)
            else:
                child.tell(end=True)
            row = {"what": "ending", "how": how, "model": "Mistral-7B", **TWO}
            child.line()  # until it has ended
            row |= _left(family, before)
        row |= {"processes": len(family), "before_bytes": before, "held_bytes": held}
        write(out / "scale.jsonl", stamp() | row)


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


PARTS = {"serving": serving, "large": large, "endings": endings}


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scale_records", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    given = parser.parse_args(words)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if detect().kind != "cuda" or detect().count < 2:
        parser.error(
            f"this is for two GPUs or more, and this machine shows {detect().count} ({detect().name})"
        )
    return run_parts({part: partial(PARTS[part], given.out) for part in given.parts or PARTS})


if __name__ == "__main__":
    sys.exit(main())
