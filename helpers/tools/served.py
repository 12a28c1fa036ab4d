"""A large model's shape behind HTTP, deployed several ways under the same load and the same objective.

    python -m helpers.tools.reference --out notebooks/reference/my-machine served

The shape's vocabulary is made that of the embedded model's tokenizer, so that vLLM's server can read prompts
and ``vllm bench serve`` can write them. The servers start beside each other and are loaded one after the
other, as ``serve.load`` does it: closed loops, then open ones at shares of the best rate of those.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from pathlib import Path

from helpers.base.machine import detect
from helpers.model import lookup, schemes
from helpers.model.model import EMBEDDED, Model
from helpers.serve import command, settings
from helpers.serve.errors import ServerError
from helpers.serve.load import Generator, Level, LoadError, Objective
from helpers.serve.server import Server
from helpers.tools.deployments import GPU, MODELS, WAYS, shape
from helpers.tools.grid import slug
from helpers.tools.recording import stamp, write

# Servers that fit a GPU of 140 GiB together, in the order of what their figures are worth.
ROUNDS = (
    ("qwen3-8b", ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache")),
    ("mistral-7b", ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache")),
    ("qwen3-8b", ("awq, Machete", "awq, Humming", "int8", "bf16, FP8 cache")),
)
CLIENTS = (1, 16, 64, 192)
SHARES = (0.5, 0.7, 0.85, 1.0)
OPEN_S = 7.0
LENGTHS = {"input_tokens": 1024, "output_tokens": 128}
PROMPT = Objective(ttft_ms=500.0, tpot_ms=20.0)  # a chat that feels prompt
CACHE_BYTES = 20 * 2**30  # the same for every way: 8-bit keys and values fit twice
READY_S = 200
LEAST_S = 45  # a server is not loaded for less
KEY = secrets.token_urlsafe(32)  # of all servers here: some are behind one router
PRIVATE = ("model", "served_model_name", "host", "port")  # arguments that say nothing to a reader


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


def server(
    model: Model, logs: Path, place: dict | None = None, kind: type[Server] = Server, start_s=600, **args
) -> Server:
    """A server of random weights, not started; its queue takes all that is asked."""
    machine = detect()
    way = schemes.scheme("baseline").way(machine)
    queue = {"max_num_seqs": 512, "max_num_queued_reqs": 100_000, "shutdown_timeout": 0}
    found = settings.load(None, server_port=0, vllm_api_key=KEY, start_timeout=start_s, **queue)
    asked = command.arguments(found, machine, way, str(model.folder), model.title)
    same = {"load_format": "dummy", "max_model_len": 2048, "enable_prefix_caching": False}
    return kind(found, model, model, way, asked | same | args, logs, place)


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


def served(out: Path, seconds: float, rounds=ROUNDS, clients=CLIENTS, shares=SHARES) -> None:
    """Start a round's servers beside each other; load one after the other; a line a level."""
    until, file = time.monotonic() + seconds, out / "served.jsonl"
    for model, ways in rounds:
        common = stamp() | {"model": MODELS[model][0], "weights": "random"}
        servers = {way: _server(model, way, out / "logs") for way in ways}
        with contextlib.ExitStack() as stack:
            for one in servers.values():
                stack.callback(one.kill)
            failed = start([*servers.values()])
            for way, one in servers.items():
                row = common | {"way": way, "scheme": WAYS[way].scheme}
                if one in failed:
                    write(file, row | {"error": failed[one]})
                elif until - time.monotonic() < LEAST_S:
                    print(f"served: {model}, {way} left out, too little time", flush=True)
                else:
                    args = {name: value for name, value in one.args.items() if name not in PRIVATE}
                    for found in _loaded(one, [*clients], [*shares], out / "logs/load"):
                        write(file, row | LENGTHS | {"args": args, "open_s": OPEN_S} | found)
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


def _loaded(one: Server, clients: list[int], shares: list[float], logs: Path) -> list[dict]:
    """The levels of a server; a first one, in which kernels are compiled, does not count."""
    asked = {"concurrencies": [8, *clients], "shares": shares, "objective": PROMPT, "seconds": OPEN_S}
    try:
        with Generator(logs) as generator:
            return [line(level) for level in generator.bench(one, **asked, **LENGTHS)[1:]]
    except LoadError as error:
        return [{"error": str(error)[-400:]}]


def line(level: Level) -> dict:
    """What a line has of a level: times in ms, the share that kept the objective, and their rate."""
    told = {"clients": level.concurrency} if level.share is None else {"share": level.share}
    told |= {} if level.rate is None else {"rate": round(level.rate, 3)}
    for name in ("ttft", "tpot"):
        middle, late = getattr(level, f"{name}_s"), getattr(level, f"{name}_p95_s")
        told[name] = {"p50_ms": round(1e3 * middle, 2), "p95_ms": round(1e3 * late, 2)}
    return told | {
        "completed": level.completed,
        "failed": level.failed,
        "seconds": round(level.seconds, 3),
        "requests_per_s": round(level.requests_per_s, 3),
        "output_tokens_per_s": round(level.output_tokens_per_s, 1),
        "e2e_median_s": round(level.e2e_s, 3),
        "objectives_ms": {"prompt": [PROMPT.ttft_ms, PROMPT.tpot_ms]},
        "kept": {"prompt": round(level.kept, 4)},
        "goodput": {"prompt": round(level.goodput, 3)},
    }
