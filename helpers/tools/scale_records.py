"""Several GPUs, recorded: one engine on two against two behind a router, at rising load.

    python -m helpers.tools.scale_records --out notebooks/reference/h200 serving    6 minutes on two H200s
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
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from helpers.base import processes
from helpers.base.files import ROOT
from helpers.base.machine import GIB, detect, gpu_memory_used
from helpers.measure.memory import measure_memory
from helpers.measure.speed import measure_speed
from helpers.model import lookup, schemes, shapes
from helpers.model.model import EMBEDDED, Model, cache_folder
from helpers.serve import clients, command, load, settings
from helpers.serve.router import SOONER, Router, places
from helpers.serve.server import Server
from helpers.tools import sections

INPUT, OUTPUT = 512, 128  # tokens a request
KV_BYTES = 24 * GIB  # of each GPU and server: 196,608 tokens of this shape in 16 bits
LEVELS = {"one": (16, 256), "tensor parallel": (16, 256, 512), "data parallel": (16, 256, 512)}
LEVELS["router"] = LEVELS["data parallel"]
REPEATS, ROUNDS = 3, 2
TOGETHER = {"FP8": ("fp8", 0), "AWQ": ("awq", 1)}  # engines of one GPU each, side by side


# -- serving ----------------------------------------------------------------------------------------


def served_model() -> Model:
    """Mistral-7B's shape with the embedded model's tokenizer and vocabulary: a folder without weights."""
    words, folder = lookup.resolve(EMBEDDED), cache_folder() / "scale-mistral-7b"
    folder.mkdir(parents=True, exist_ok=True)
    for path in words.folder.glob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, folder)
    same = {name: words.config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    (folder / "config.json").write_text(json.dumps(shapes.CONFIGS["mistral-7b"] | same))
    return Model(str(folder), "Mistral-7B", folder, "folder")


def arms(out: Path) -> dict[str, Server | Router]:
    """The four ways, not started; ``one`` is the first of the router's two servers."""
    found, model, way = settings.load(None, max_num_seqs=512), served_model(), schemes.scheme("baseline").way
    common = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "kv_cache_memory_bytes": KV_BYTES,
        "gpu_memory_utilization": 0.2,
        "enable_prefix_caching": False,
    }

    def server(place: dict, **more) -> Server:
        own = found.model_copy(update={"server_port": 0})
        folder, config = str(model.folder), model.config
        args = command.arguments(own, detect(), way(detect()), folder, model.title, config) | common | more
        return Server(own, model, model, way(detect()), args, out / "logs", place)

    both = places(detect(), 1, each=2)[0]
    port, watched = command.free_ports("127.0.0.1", 2)
    router_args = {"host": "127.0.0.1", "port": port, "policy": "round_robin"}
    router_args |= {"prometheus_port": watched, **SOONER}
    router = Router(found, router_args, out / "logs", {})
    router.servers = [server(place) for place in places(detect(), 2)]
    return {
        "one": router.servers[0],
        "router": router,
        "tensor parallel": server(both, tensor_parallel_size=2),
        "data parallel": server(both, data_parallel_size=2),
    }


def serving(out: Path) -> None:
    """Every way at every level, three times in mixed order; then a kill; then the memory is back."""
    before, begun = gpu_memory_used(), time.perf_counter()
    ways = arms(out)
    owners = [ways["router"], ways["tensor parallel"], ways["data parallel"]]
    with contextlib.ExitStack() as stack:
        for owner in owners:  # side by side: launched at once, waited for in turn
            owner.prepare()
            stack.callback(owner.kill)
        for server in [*ways["router"].servers, *owners[1:]]:
            if server.log_file is None:
                server.prepare()
            server.launch()
        for server in [*ways["router"].servers, *owners[1:]]:
            server.wait_until_ready()
            print(server.log_file.name, f"{server.start_s:.0f} s", flush=True)
        owners[0].launch()
        owners[0].wait_until_ready()
        starts = {name: round(way.start_s, 1) for name, way in ways.items()}
        print(f"all ready after {time.perf_counter() - begun:.0f} s: {starts}", flush=True)
        _loaded(ways, out, starts)
        _killed(ways["router"], out)
    sections.write(
        out / "scale.jsonl",
        [sections.stamp() | {"what": "memory", "before_bytes": before, "after_bytes": gpu_memory_used()}],
    )


def _loaded(ways: dict, out: Path, starts: dict) -> None:
    targets = {name: way.url for name, way in ways.items()}
    first = ways["one"]
    same = load.arguments(first.url, str(first.checkpoint.folder), first.name, INPUT, OUTPUT)
    job = {"owner": os.getpid(), "targets": targets, "same": same | {"goodput": ["ttft:1000", "tpot:50"]}}
    own = {"OPENAI_API_KEY": first.settings.api_key, "VLLM_LOGGING_COLOR": "0", "NO_PROXY": "127.0.0.1"}
    command_line = [sys.executable, "-m", "helpers.tools.scale_records", "--load", json.dumps(job)]
    with (
        (out / "logs/scale-load.log").open("w") as log,
        subprocess.Popen(
            command_line, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=os.environ | own
        ) as child,
    ):
        for line in child.stdout:
            if line.startswith('{"what"'):
                row = json.loads(line)
                extra = {"start_s": starts[row["way"]], "gpus": 1 if row["way"] == "one" else 2}
                sections.write(out / "scale.jsonl", [sections.stamp() | row | extra])
    if child.returncode:
        raise RuntimeError(f"the load generator ended with {child.returncode}: see {out}/logs/scale-load.log")


def _load(job: dict) -> None:
    """The child process: every way, level and repeat with vLLM's benchmark, imported once."""
    processes.end_with(job["owner"])
    run, rng = load.benchmark(), random.Random(0)
    for repeat in range(REPEATS + 1):  # the first is short, warms up and does not count
        for way in rng.sample(sorted(job["targets"]), len(job["targets"])):
            for level in LEVELS[way]:
                if not repeat and level != 256:
                    continue
                given = job["same"] | {"base_url": job["targets"][way], "max_concurrency": level}
                found = run(**given, num_prompts=max(64, ROUNDS * level))
                if repeat:
                    row = {"what": "load", "way": way, "clients": level, "repeat": repeat}
                    print(json.dumps(row | _figures(found)), flush=True)


def _figures(found: dict) -> dict:
    """What is kept of a level: rates, and medians and 95th percentiles in seconds."""
    kept = {"requests_per_s": found["request_throughput"], "output_tokens_per_s": found["output_throughput"]}
    kept |= {"completed": found["completed"], "failed": found["failed"], "seconds": found["duration"]}
    for name in ("ttft", "tpot"):
        kept[f"{name}_s"] = found[f"median_{name}_ms"] / 1e3
        kept[f"{name}_p95_s"] = found[f"p95_{name}_ms"] / 1e3
    return {name: round(value, 4) for name, value in kept.items()}


def _killed(router: Router, out: Path, concurrency: int = 256) -> None:
    """One of two servers is killed at 256 clients: what becomes of every request."""
    begun = time.perf_counter()
    with clients.crowd(router, clients.numbered(12 * concurrency), concurrency, timeout_s=60) as crowd:
        crowd.wait_until_running(concurrency // 2)
        router.servers[0].crash()
        outcomes = crowd.outcomes()
    row = {"what": "kill", "clients": concurrency, **clients.count(outcomes)}
    row |= {"slowest_s": round(max(outcome.seconds for outcome in outcomes), 2)}
    row |= {"seconds": round(time.perf_counter() - begun, 2)}
    sections.write(out / "scale.jsonl", [sections.stamp() | row])


# -- engines ----------------------------------------------------------------------------------------


def engines(out: Path, name: str = "shape:llama-3.1-70b") -> None:
    """A model that outgrows a GPU: 8 and 4 bits on one (at once, a GPU each), 16 and 8 bits on two."""
    command_line = [sys.executable, "-m", "helpers.tools.scale_records", "--out", str(out), "--engine"]
    running = [
        subprocess.Popen(
            [*command_line, json.dumps([name, scheme, 1])],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
        )
        for scheme, gpu in TOGETHER.values()
    ]
    failed = [child.args[-1] for child in running if child.wait()]
    for scheme in ("baseline", "fp8"):
        job = json.dumps([name, scheme, 2])
        failed += [job] if subprocess.run([*command_line, job], cwd=ROOT).returncode else []
    if failed:
        raise RuntimeError(f"not measured: {', '.join(failed)}")


def _engine(out: Path, name: str, scheme: str, gpus: int) -> None:
    graphs = {"compilation_config": {"cudagraph_capture_sizes": [1, 16, 64, 256]}}
    more = graphs | {"tensor_parallel_size": gpus}
    with sections.opened(name, scheme, log_dir=out / "logs", **more) as engine:
        speeds = measure_speed(engine, [1, 16, 64, 256], seconds=3.0, runs=5)
        memory = measure_memory(engine)
    row = {"model": engine.model.title, "scheme": scheme, "gpus": gpus, "start_s": round(engine.start_s, 1)}
    row |= {"kv_cache_tokens": memory.kv_cache_tokens, "weights_bytes": memory.weights}
    for key in ("output_tokens_per_s", "low", "high"):
        named = "tokens_per_s" if key == "output_tokens_per_s" else key
        row[named] = {speed.batch: round(getattr(speed, key), 1) for speed in speeds}
    sections.write(out / "parallel.jsonl", [sections.stamp() | row])


PARTS = {"serving": serving, "engines": engines}


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scale_records", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="serving, engines (default: both)")
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.load:
        return _load(json.loads(given.load))
    if given.engine:
        return _engine(given.out, *json.loads(given.engine))
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if given.out is None:
        parser.error("--out names the folder for the records")
    if detect().kind != "cuda" or detect().count < 2:
        parser.error(f"this is for two GPUs, and this machine shows {detect().count} ({detect().name})")
    (given.out / "logs").mkdir(parents=True, exist_ok=True)
    for part in given.parts or PARTS:
        begun = time.perf_counter()
        PARTS[part](given.out)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    return None


if __name__ == "__main__":
    main()
