"""A large model's shape behind HTTP, deployed several ways under the same load and the same objective.

The shape's vocabulary is made that of the embedded model's tokenizer, so that vLLM's server can read prompts
and ``vllm bench serve`` can write them. Each server is loaded as ``serve.load`` does it: closed loops, then
open ones at shares of the best rate of those.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from helpers.base.machine import detect
from helpers.model import lookup, schemes, shapes
from helpers.model.model import EMBEDDED, Model, cache_folder
from helpers.serve import command, settings
from helpers.serve.load import Generator, Level, Objective
from helpers.serve.server import Server
from helpers.tools.deployments import WAYS, shape
from helpers.tools.grid import slug
from helpers.tools.recording import DONE, Job, run_round, sharing

# Servers that fit a GPU of 140 GiB together, in the order of what their figures are worth.
ROUNDS = (
    ("qwen3-8b", ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache")),
    ("mistral-7b", ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache")),
    ("qwen3-8b", ("awq, Machete", "awq, Humming", "int8", "bf16, FP8 cache")),
)
CLIENTS = [1, 16, 64, 192]
SHARES = [0.5, 0.7, 0.85, 1.0]
OPEN_S = 7.0
LENGTHS = {"input_tokens": 1024, "output_tokens": 128}
PROMPT = Objective(ttft_ms=500.0, tpot_ms=20.0)  # a chat that feels prompt
CACHE_BYTES = 20 * 2**30  # for every way: 8-bit keys and values fit twice
GRAPHS = [1, 2, 4, 8, *range(16, 257, 16)]
KEY = secrets.token_urlsafe(32)  # of all servers here: some are behind one router


def worded(model: str, way: str) -> Model:
    """A shape with the embedded model's tokenizer and vocabulary: a folder without weights."""
    words, config = lookup.resolve(EMBEDDED), shape(model, way).config
    folder = cache_folder() / f"worded-{model}-{slug(way)}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in words.folder.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    same = ("vocab_size", "bos_token_id", "eos_token_id")
    config |= {name: words.config[name] for name in same if name in words.config}
    (folder / "config.json").write_text(json.dumps(config))
    return Model(str(folder), shapes.TITLES[model], folder, "folder")


def server(model: Model, logs: Path, place: dict | None = None, **args) -> Server:
    """A server of random weights, not started; its queue takes all that is asked."""
    machine = detect()
    way = schemes.scheme("baseline").way(machine)
    queue = {"max_num_seqs": 512, "max_num_queued_reqs": 100_000, "shutdown_timeout": 0}
    found = settings.load(None, server_port=0, vllm_api_key=KEY, start_timeout=600, **queue)
    asked = command.arguments(found, machine, way, str(model.folder), model.title, model.config)
    same = {"load_format": "dummy", "max_model_len": 2048, "enable_prefix_caching": False}
    return Server(found, model, model, way, asked | same | args, logs, place)


def served(out: Path) -> None:
    """Each server of each round: a line a level."""
    for model, ways in ROUNDS:
        jobs = []
        for way in ways:
            row = {"model": shapes.TITLES[model], "weights": "random", "way": way}
            row |= {"scheme": WAYS[way].scheme, "open_s": OPEN_S, **LENGTHS}
            jobs.append(Job(f"served-{model}-{slug(way)}", row, f"{__name__}:work", (model, way)))
        run_round(jobs, out / "served.jsonl")


def work(model: str, way: str, logs: str) -> Iterator[dict]:
    """A server: what it was started with, then its levels, without a first in which kernels are compiled."""
    args = sharing(CACHE_BYTES, GRAPHS) | {"max_num_seqs": 256, **WAYS[way].args}
    asked = {"concurrencies": [8, *CLIENTS], "shares": SHARES, "objective": PROMPT, "seconds": OPEN_S}
    with server(worded(model, way), Path(logs), **args) as one:
        yield {"args": args}
        with Generator(logs) as generator:
            yield from map(line, generator.bench(one, **asked, **LENGTHS)[1:])
    yield DONE


def line(level: Level) -> dict:
    """What a line has of a level: times in ms, the share that kept the objective, and their rate."""
    closed = {"clients": level.concurrency}
    told = closed if level.share is None else {"share": level.share, "rate": round(level.rate, 3)}
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
