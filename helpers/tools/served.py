"""A large model's shape behind HTTP, deployed several ways under the same load and the same objectives.

    python -m helpers.tools.reference --out notebooks/reference/my-gpu served

The shape's vocabulary is made that of the embedded model's tokenizer, so that vLLM's server can read prompts
and ``vllm bench serve`` can write them. The servers start beside each other and are loaded one after the
other: closed loops first (a fixed number of clients), then open ones (a Poisson process) at shares
of the best rate that the closed ones found. Goodput is counted from each request's own times.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from helpers.base.processes import end_with
from helpers.model import embedded
from helpers.serve import load as bench
from helpers.serve.command import START, flags, free_ports
from helpers.tools.deployments import GPU, MODELS, WAYS, shape
from helpers.tools.grid import Clocks, slug
from helpers.tools.sections import stamp, write

MODEL = "qwen3-8b"
SERVED = ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache")
CLIENTS = (1, 16, 64, 192)
SHARES = (0.5, 0.7, 0.85, 1.0)
OPEN_S = 7.0
LENGTHS = {"input_tokens": 1024, "output_tokens": 128}
# Time to a first token, and per token after it, in ms: a chat that feels prompt, and one that reads on.
OBJECTIVES = {"prompt": (500.0, 20.0), "patient": (2000.0, 50.0)}
CACHE_BYTES = 20 * 2**30  # the same for every way: 8-bit keys and values fit twice
READY_S = 200
LEAST_S = 45  # a server is not loaded for less
HOST = "127.0.0.1"


def folder_of(model: str, way: str, out: Path) -> Path:
    """A folder that a server can be given: the shape with the embedded tokenizer's vocabulary and files."""
    tokenizer, folder = embedded.prepare(), out / f"served-{model}-{slug(way)}"
    config = shape(model, way, folder)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    own = json.loads((tokenizer / "config.json").read_text())
    same = ("vocab_size", "bos_token_id", "eos_token_id")
    config |= {key: own[key] for key in same if key in own}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Served:
    """One ``vllm serve`` of a way, its port and its log; ended with its whole process group."""

    def __init__(self, model: str, way: str, logs: Path):
        self.way, self.folder, self.port = way, folder_of(model, way, logs), free_ports(HOST)[0]
        self.log = logs / f"served-{slug(way)}.log"
        self.args = {
            "max_model_len": 2048,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": CACHE_BYTES if GPU else 2**29,
            **WAYS[way].args,
        }
        if GPU:
            sizes = [1, 2, 4, 8, *range(16, 257, 16)]
            self.args |= {
                "gpu_memory_utilization": 0.02,  # checked against what is free; the cache's size is given
                "kernel_config": {"enable_jit_warmup": False},
                "compilation_config": {"cudagraph_capture_sizes": sizes},
            }
        start = {"model": self.folder, "served_model_name": "m", "host": HOST, "port": self.port}
        start |= {"load_format": "dummy", "disable_uvicorn_access_log": True} | self.args
        environment = os.environ | {"VLLM_LOGGING_COLOR": "0", "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, *flags(start)],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def ready(self, until: float) -> bool:
        """Whether it answers /health by then."""
        while time.monotonic() < until and self.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=2) as answer,
            ):
                if answer.status == 200:
                    return True
            time.sleep(0.5)
        return False

    @property
    def cause(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "Error" in line]
        return (lines or ["not ready in time"])[0][-400:]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def served(out: Path, seconds: float, ways=SERVED, model: str = MODEL, **load) -> None:
    """Start a server each way, beside each other; load one after the other; a line a level."""
    until, logs = time.monotonic() + seconds, out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    common = stamp() | {"model": MODELS[model][0], "weights": "random"}
    load = {"clients": CLIENTS, "shares": SHARES, "open_s": OPEN_S} | LENGTHS | load
    started: list[Served] = []
    try:
        started += [Served(model, way, logs) for way in ways]
        latest = min(until, time.monotonic() + READY_S)
        for server in started:
            row = common | {"way": server.way, "scheme": WAYS[server.way].scheme}
            if not server.ready(latest):
                write(out / "served.jsonl", [row | {"error": server.cause}])
                server.end()
        for server in [server for server in started if server.process.poll() is None]:
            if until - time.monotonic() < LEAST_S:
                print(f"served: {server.way} left out, too little time", flush=True)
                continue
            row = common | {"way": server.way, "scheme": WAYS[server.way].scheme, "args": server.args}
            row |= {key: load[key] for key in (*LENGTHS, "open_s")} | {"objectives_ms": OBJECTIVES}
            write(out / "served.jsonl", [row | found for found in _loaded(server, load, until)])
            server.end()
    finally:
        for server in started:
            server.end()


def _loaded(server: Served, load: dict, until: float) -> list[dict]:
    """Load a server from a process of its own; its levels, and the GPU's clock and power over them."""
    results, log = (server.log.with_suffix(end) for end in (".jsonl", ".load.log"))
    results.unlink(missing_ok=True)
    job = load | {"url": f"http://{HOST}:{server.port}", "folder": str(server.folder)}
    job |= {"results": str(results), "owner": os.getpid()}
    with log.open("w") as file, Clocks() as clocks:
        command = [sys.executable, "-m", "helpers.tools.served", json.dumps(job)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=file, stderr=file, timeout=max(1.0, until - time.monotonic()))
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) | clocks.found for line in lines]


# -- the process that asks ------------------------------------------------------------------------------


def ask(job: dict) -> None:
    """Every level against one server, with vLLM's benchmark imported once; a line of JSON each."""
    end_with(job["owner"])
    same = bench.arguments(job["url"], job["folder"], "m", job["input_tokens"], job["output_tokens"])
    same |= {"ready_check_timeout_sec": 0, "ignore_eos": True, "save_detailed": True}
    run = functools.partial(bench.benchmark(), **same)

    def keep(found: dict, **what) -> float:
        with Path(job["results"]).open("a") as file:
            file.write(json.dumps(what | figures(found)) + "\n")
        return found["request_throughput"]

    run(max_concurrency=8, num_prompts=16)  # what is compiled when first needed
    best = max(
        keep(run(max_concurrency=clients, num_prompts=max(4, 2 * clients)), clients=clients)
        for clients in job["clients"]
    )
    for rate in (share * best for share in job["shares"]):
        count = max(8, round(rate * job["open_s"]))
        keep(run(request_rate=rate, num_prompts=count), share=round(rate / best, 3), rate=round(rate, 3))


def figures(found: dict) -> dict:
    """Percentiles and goodput of one level, from what ``vllm bench serve`` noted of each request."""
    good = [
        (ttft, sum(gaps) / max(1, len(gaps)), sum(gaps))
        for ttft, gaps, error in zip(found["ttfts"], found["itls"], found["errors"], strict=True)
        if ttft and not error
    ]
    kept = {
        name: sum(1e3 * ttft <= first and 1e3 * each <= then for ttft, each, _ in good)
        for name, (first, then) in OBJECTIVES.items()
    }
    return {
        "completed": found["completed"],
        "failed": found["failed"],
        "seconds": round(found["duration"], 3),
        "requests_per_s": round(found["request_throughput"], 3),
        "output_tokens_per_s": round(found["output_throughput"], 1),
        "ttft": percentiles([ttft for ttft, _, _ in good]),
        "tpot": percentiles([each for _, each, _ in good]),
        "e2e_median_s": round(statistics.median(ttft + rest for ttft, _, rest in good), 3) if good else None,
        "kept": {name: round(count / max(1, len(good)), 4) for name, count in kept.items()},
        "goodput": {name: round(count / found["duration"], 3) for name, count in kept.items()},
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 90th, 95th and 99th percentile, in ms; empty of nothing."""
    ordered = sorted(seconds)
    marks = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99} if ordered else {}
    last = len(ordered) - 1
    return {name: round(1e3 * ordered[min(last, int(q * len(ordered)))], 2) for name, q in marks.items()}


if __name__ == "__main__":
    ask(json.loads(sys.argv[1]))
