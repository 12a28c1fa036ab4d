"""A large model's shape behind HTTP, deployed four ways under the same load and the same objective.

    python -m helpers.tools.served --out DIR --tokenizer FOLDER --seconds 400

The shape's vocabulary is made that of a tokenizer which is there, so that vLLM's server can read prompts and
``vllm bench serve`` can write them. The servers start beside each other and are loaded one after the other.
Closed loops first (a fixed number of clients), then open ones (requests as a Poisson process) at shares of
the best rate that the closed ones found. From each request's own times, so that any objective can be set later.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from helpers.tools import grid

START = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
MODEL = "qwen3-8b"
WAYS_SERVED = ("bf16", "fp8", "fp8+fp8_cache", "awq_marlin")
CLIENTS = (1, 16, 64, 192)
SHARES = (0.5, 0.7, 0.85, 1.0)
OPEN_S = 7.0
LENGTHS = {"input_tokens": 1024, "output_tokens": 128}
# Time to a first token and per token after it, in ms: a chat that feels prompt, and one that merely reads on.
OBJECTIVES = {"prompt": (500.0, 20.0), "patient": (2000.0, 50.0)}
CACHE_BYTES = 20 * 2**30  # the same for every way: 8-bit keys and values fit twice
READY_S = 200


def folder_of(way: str, tokenizer: Path, out: Path, model: str = MODEL) -> Path:
    """A folder that a server can be given: the shape with this tokenizer's vocabulary, and its files."""
    folder = out / "served" / f"{model}-{way.replace('+', '-')}"
    config = grid.shape(model, way, folder)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    own = json.loads((tokenizer / "config.json").read_text())
    same = ("vocab_size", "bos_token_id", "eos_token_id")
    config |= {key: own[key] for key in same if key in own}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One ``vllm serve``, its port and its log; ended with its whole process group."""

    def __init__(self, way: str, folder: Path, logs: Path):
        self.way, self.folder, self.port = way, folder, free_port()
        self.log = logs / f"served-{way.replace('+', '-')}.log"
        args = {
            "model": folder, "served-model-name": "m", "host": "127.0.0.1", "port": self.port,
            "load-format": "dummy", "max-model-len": 2048, "gpu-memory-utilization": 0.02,
            "kv-cache-memory-bytes": CACHE_BYTES,
            "kernel-config": json.dumps({"enable_jit_warmup": False}),
            "compilation-config": json.dumps(
                {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256]}),
            **{key.replace("_", "-"): value for key, value in grid.WAYS[way].args.items()},
        }  # fmt: skip
        if not grid.GPU:
            for name in ("gpu-memory-utilization", "compilation-config", "kernel-config"):
                args.pop(name)
            args["kv-cache-memory-bytes"] = 2**29
        command = [sys.executable, "-c", START]
        for name, value in args.items():
            command += [f"--{name}", str(value)]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        self.args = {key: str(value) for key, value in args.items() if key not in ("model", "port")}
        environment = os.environ | {"VLLM_LOGGING_COLOR": "0", "VLLM_NO_USAGE_STATS": "1"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ready(self, until: float) -> bool:
        """Whether it answers /health by then."""
        while time.monotonic() < until and self.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer,
            ):
                if answer.status == 200:
                    return True
            time.sleep(0.5)
        return False

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def figures(found: dict) -> dict:
    """Percentiles and goodput of one level, from what ``vllm bench serve`` noted of each request."""
    good = [(ttft, sum(gaps) / max(1, len(gaps)), list(gaps))
            for ttft, gaps, error in zip(found["ttfts"], found["itls"], found["errors"], strict=True)
            if not error and ttft]  # fmt: skip
    seconds = found["duration"]

    def marks(values: list[float]) -> dict:
        values = sorted(values)
        at = lambda q: round(1e3 * values[min(len(values) - 1, int(q * len(values)))], 2)  # noqa: E731
        return {"p50_ms": at(0.5), "p90_ms": at(0.9), "p95_ms": at(0.95), "p99_ms": at(0.99)}

    kept = {name: sum(1e3 * ttft <= first and 1e3 * each <= then for ttft, each, _ in good)
            for name, (first, then) in OBJECTIVES.items()}  # fmt: skip
    return {
        "completed": found["completed"],
        "failed": found["failed"],
        "seconds": round(seconds, 3),
        "requests_per_s": round(found["request_throughput"], 3),
        "output_tokens_per_s": round(found["output_throughput"], 1),
        "ttft": marks([ttft for ttft, _, _ in good]),
        "tpot": marks([each for _, each, _ in good]),
        "kept": {name: round(count / max(1, len(good)), 4) for name, count in kept.items()},
        "goodput": {name: round(count / seconds, 3) for name, count in kept.items()},
        "e2e_median_s": round(statistics.median(ttft + sum(gaps) for ttft, _, gaps in good), 3),
    }


def load(job: dict) -> None:
    """In a process of its own: every level against one server, a line of JSON each."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    seeds = itertools.count()
    fixed = {
        "backend": "openai", "base-url": job["url"], "model": job["folder"], "served-model-name": "m",
        "dataset-name": "random", "random-input-len": job["input_tokens"],
        "random-output-len": job["output_tokens"], "temperature": 0, "ready-check-timeout-sec": 0,
        "percentile-metrics": "ttft,tpot,itl,e2el", "metric-percentiles": "95",
    }  # fmt: skip

    def run(**load) -> dict:
        pairs = [(f"--{key}", str(value)) for key, value in (fixed | load | {"seed": next(seeds)}).items()]
        line = [part for pair in pairs for part in pair]
        return serve.main(parser.parse_args([*line, "--disable-tqdm", "--ignore-eos", "--save-detailed"]))

    def say(found: dict, **what) -> float:
        with Path(job["results"]).open("a") as file:
            file.write(json.dumps(what | figures(found)) + "\n")
        return found["request_throughput"]

    run(**{"max-concurrency": 8, "num-prompts": 16})  # what is compiled when first needed
    best = 0.0
    for clients in job["clients"]:
        rate = say(run(**{"max-concurrency": clients, "num-prompts": max(4, 2 * clients)}), clients=clients)
        best = max(best, rate)
    for share in job["shares"]:
        rate = share * best
        count = max(8, round(rate * job["open_s"]))
        say(run(**{"request-rate": rate, "num-prompts": count}), share=share, rate=round(rate, 3))


def served(out: Path, logs: Path, tokenizer: Path, until: float, ways=WAYS_SERVED, model=MODEL, **job) -> None:
    """Start a server each way, beside each other; load one after the other; a line a level."""
    begun, common = time.monotonic(), grid.stamp()
    servers = [Server(way, folder_of(way, tokenizer, logs, model), logs) for way in ways]
    job = {"clients": CLIENTS, "shares": SHARES, "open_s": OPEN_S, **LENGTHS} | job
    try:
        for server in servers:
            what = {"model": grid.MODELS[model][0], "way": server.way, "scheme": grid.WAYS[server.way].scheme}
            if not server.ready(min(until, begun + READY_S)):
                cause = [line for line in server.log.read_text(errors="replace").splitlines() if "Error" in line]
                grid.write(out / "served.jsonl", common | what | {"error": (cause or ["not ready"])[0][-400:]})
                print(f"served: {server.way} did not start: {cause[:1]}", flush=True)
                server.end()
        print(f"served: ready after {time.monotonic() - begun:.0f} s", flush=True)
        for server in [server for server in servers if server.process.poll() is None]:
            if until - time.monotonic() < 45:
                print(f"served: {server.way} left out", flush=True)
                break
            what = {"model": grid.MODELS[model][0], "way": server.way, "scheme": grid.WAYS[server.way].scheme}
            row = common | what | {"args": server.args, "kv_cache_bytes": CACHE_BYTES, "weights": "random",
                                   "vocabulary": "of the embedded tokenizer", **LENGTHS}  # fmt: skip
            _loaded(server, row, job, out, until)
            server.end()
    finally:
        for server in servers:
            server.end()
    print(f"served: {time.monotonic() - begun:.0f} s", flush=True)


def _loaded(server: Server, row: dict, job: dict, out: Path, until: float) -> None:
    begun = time.monotonic()
    results = server.log.with_name(f"load-{server.way}.jsonl")
    results.unlink(missing_ok=True)
    job = job | {"url": f"http://127.0.0.1:{server.port}", "folder": str(server.folder), "results": str(results)}
    log = server.log.with_name(f"load-{server.way.replace('+', '-')}.log")
    with log.open("w") as file, grid.Clocks() as clocks:
        command = [sys.executable, "-m", "helpers.tools.served", "--load", json.dumps(job)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=file, stderr=file, timeout=max(1.0, until - time.monotonic()))
    for line in results.read_text().splitlines() if results.exists() else []:
        found = json.loads(line)
        grid.write(out / "served.jsonl", row | job_of(job) | found | clocks.found)
        load = f"{found['clients']} clients" if "clients" in found else f"{found['rate']:.1f} asked"
        print(
            f"  {server.way}: {load}: {found['requests_per_s']:.1f} requests/s, "
            f"{found['output_tokens_per_s']:,.0f} tok/s, ttft {found['ttft']['p50_ms']:.0f} ms, tpot "
            f"{found['tpot']['p50_ms']:.1f} ms, kept {found['kept']['prompt']:.0%}",
            flush=True,
        )
    print(f"  {server.way}: {time.monotonic() - begun:.0f} s", flush=True)


def job_of(job: dict) -> dict:
    return {"objectives_ms": OBJECTIVES, "open_s": job["open_s"]}


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.served", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the files")
    parser.add_argument("--logs", type=Path, help="folder of the servers' logs (OUT/logs)")
    parser.add_argument("--tokenizer", type=Path, help="a model folder whose tokenizer is used")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--ways", default=",".join(WAYS_SERVED))
    parser.add_argument("--load", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.load:
        load(json.loads(given.load))
        return 0
    if not (given.out and given.tokenizer):
        parser.error("--out names the folder for the files, --tokenizer a model's folder")
    until, logs = time.monotonic() + given.seconds, (given.logs or given.out / "logs").absolute()
    served(given.out.absolute(), logs, given.tokenizer, until, tuple(given.ways.split(",")), given.model)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
