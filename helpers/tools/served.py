"""A large model's shape behind HTTP, deployed several ways under the same load and the same objectives.

    python -m helpers.tools.reference --out notebooks/reference/my-machine served

The shape's vocabulary is made that of the embedded model's tokenizer, so that vLLM's server can read prompts
and ``vllm bench serve`` can write them. The servers start beside each other and are loaded one after the
other: closed loops first (a fixed number of clients), then open ones (a Poisson process) at shares
of the best rate that the closed ones found. Goodput is counted from each request's own times.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import shutil
import statistics
import sys
import time
from pathlib import Path

from helpers.base.machine import detect
from helpers.model import lookup, schemes
from helpers.model.model import EMBEDDED, Model
from helpers.serve import command, settings
from helpers.serve import load as bench
from helpers.serve.errors import ServerError
from helpers.serve.server import Server
from helpers.tools.deployments import GPU, MODELS, WAYS, shape
from helpers.tools.grid import slug
from helpers.tools.recording import Child, Clocks, stamp, write

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
PRIVATE = ("model", "served_model_name", "host", "port")  # arguments that say nothing to a reader
KEY = secrets.token_urlsafe(32)  # of all servers here, since one process asks them all


# -- servers of a shape ---------------------------------------------------------------------------------


def worded(model: str, way: str, folder: Path) -> Model:
    """A shape with the embedded model's tokenizer and vocabulary: a folder without weights."""
    words, config = lookup.resolve(EMBEDDED), shape(model, way, folder)
    for path in words.folder.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    same = ("vocab_size", "bos_token_id", "eos_token_id")
    config |= {name: words.config[name] for name in same if name in words.config}
    (folder / "config.json").write_text(json.dumps(config))
    return Model(str(folder), MODELS[model][0], folder, "folder")


def server(model: Model, logs: Path, place: dict | None = None, start_s: int = 600, **args) -> Server:
    """A server of random weights, not started; its queue takes all that is asked."""
    machine = detect()
    way = schemes.scheme("baseline").way(machine)
    found = settings.load(
        None, server_port=0, vllm_api_key=KEY, max_num_seqs=512, max_num_queued_reqs=100_000,
        shutdown_timeout=0, start_timeout=start_s,
    )  # fmt: skip
    asked = command.arguments(found, machine, way, str(model.folder), model.title, model.config)
    same = {"load_format": "dummy", "max_model_len": 2048, "enable_prefix_caching": False}
    return Server(found, model, model, way, asked | same | args, logs, place)


def start(servers: list[Server]) -> dict[Server, str]:
    """Start servers beside each other and wait for each; why those that are not ready are not."""
    failed = {}
    for one in servers:
        one.prepare()
        one.launch()
    for one in servers:
        try:
            one.wait_until_ready()
        except ServerError as error:
            failed[one] = str(error)[-400:]
            one.kill()
    return failed


# -- the process that asks ------------------------------------------------------------------------------


def ask(say) -> None:
    """Each load that is told, with vLLM's benchmark imported once; what came out of it is said."""
    run = functools.partial(bench.benchmark(), ready_check_timeout_sec=0, ignore_eos=True, save_detailed=True)
    for line in sys.stdin:
        say(**figures(run(**json.loads(line))))


class Asker(Child):
    """A process that loads one server after another."""

    def __init__(self, log: Path):
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")  # else a proxy would be told the key
        super().__init__("helpers.tools.served:ask", log, OPENAI_API_KEY=KEY, **direct)

    def load(
        self, target, input_tokens: int, output_tokens: int, until: float = float("inf"), **load
    ) -> dict:
        """Ask a server, or a router, and return the level's figures.

        Raises:
            TimeoutError: they did not come; the message says why as far as its log does.
        """
        folder = str(target.checkpoint.folder)
        same = bench.arguments(target.url, folder, target.name, input_tokens, output_tokens)
        self.tell(**same, **load)
        if (found := self.line(until)) is None:
            raise TimeoutError(self.cause)
        return found


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


# -- the recording --------------------------------------------------------------------------------------


def served(
    out: Path, seconds: float, ways=SERVED, model: str = MODEL, clients=CLIENTS, shares=SHARES
) -> None:
    """Start a server each way, beside each other; load one after the other; a line a level."""
    until, logs, file = time.monotonic() + seconds, out / "logs", out / "served.jsonl"
    common = stamp() | {"model": MODELS[model][0], "weights": "random"}
    servers = {way: _server(model, way, logs) for way in ways}
    with contextlib.ExitStack() as stack:
        for one in servers.values():
            stack.callback(one.kill)
        failed = start([*servers.values()])
        asker = stack.enter_context(Asker(logs / "served.load.log"))
        for way, one in servers.items():
            row = common | {"way": way, "scheme": WAYS[way].scheme}
            if one in failed:
                write(file, row | {"error": failed[one]})
            elif until - time.monotonic() < LEAST_S:
                print(f"served: {way} left out, too little time", flush=True)
            else:
                args = {name: value for name, value in one.args.items() if name not in PRIVATE}
                row |= LENGTHS | {"args": args, "open_s": OPEN_S, "objectives_ms": OBJECTIVES}
                for level in _levels(asker, one, clients, shares, until):
                    write(file, row | level)
            one.kill()


def _server(model: str, way: str, logs: Path) -> Server:
    args = {"kv_cache_memory_bytes": CACHE_BYTES if GPU else 2**29, "max_num_seqs": 256, **WAYS[way].args}
    if GPU:
        args |= {
            "gpu_memory_utilization": 0.02,  # checked against what is free; the cache's size is given
            "kernel_config": {"enable_jit_warmup": False},
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, *range(16, 257, 16)]},
        }
    return server(worded(model, way, logs / f"served-{model}-{slug(way)}"), logs, start_s=READY_S, **args)


def _levels(asker: Asker, one: Server, clients, shares, until: float):
    """Closed loops, then open ones, each with the GPU's clock and power over it."""

    def level(what: dict, **load) -> dict:
        with Clocks() as clocks:
            return what | asker.load(one, **LENGTHS, until=until, **load) | clocks.found

    asker.load(one, **LENGTHS, until=until, max_concurrency=8, num_prompts=16)  # compiled when first needed
    best = 0.0
    for count in clients:
        found = level({"clients": count}, max_concurrency=count, num_prompts=max(4, 2 * count))
        best = max(best, found["requests_per_s"])
        yield found
    for share, rate in ((share, share * best) for share in shares):
        what = {"share": round(share, 3), "rate": round(rate, 3)}
        yield level(what, request_rate=rate, num_prompts=max(8, round(rate * OPEN_S)))
