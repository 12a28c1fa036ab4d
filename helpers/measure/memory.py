"""The bytes an engine's weights and KV cache take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from helpers.base.files import ROOT
from helpers.engine.engine import open_engine, owner_of
from helpers.measure.speed import MeasureError
from helpers.model.model import Model


@dataclass(frozen=True)
class Memory:
    """What an open engine takes, in bytes.

    ``weights`` is measured (how, says ``weights_by``), None where it was not; ``kv_cache_tokens`` is
    the cache's size in tokens of all requests together; ``total`` what the engine added to the process
    (CPU) or the GPU.
    """

    weights: int | None
    weights_by: str
    kv_cache_tokens: int
    total: int


def measure_memory(llm) -> Memory:
    """Measure an open engine's memory.

    On a GPU the weights are vLLM's own figure, to the byte. On a CPU they are the anonymous memory that
    loading added to the process: summing the tensors would miss what oneDNN repacked. ``weigh`` gives the
    same figure from a fresh process.
    """
    engine = owner_of(llm)
    total = engine.memory.added()
    if engine.machine.kind == "cuda":
        figures = [figure for figure in engine.llm.collective_rpc("weights_bytes") if figure]
        return Memory(sum(figures) or None, "vLLM", engine.kv_cache_tokens, total)
    if engine.in_process:
        return Memory(engine.loading_bytes, "memory of this process", engine.kv_cache_tokens, total)
    weights = weigh(engine.model, engine.scheme)
    return Memory(weights, "memory of a fresh process", engine.kv_cache_tokens, total)


def weigh(model: Model, scheme: str) -> int:
    """Bytes that loading the weights adds to a fresh process's anonymous memory (CPU; about 15 s)."""
    command = [sys.executable, "-m", "helpers.measure.memory", "weigh", model.name, scheme]
    root = ROOT
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise MeasureError(f"Weighing {model.title} under {scheme} failed:\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])["loading_bytes"]


def _main(arguments: list[str]) -> None:
    """``python -m helpers.measure.memory weigh MODEL SCHEME``: load once, print the bytes as JSON."""
    import tempfile

    _, name, scheme = arguments
    with tempfile.TemporaryDirectory() as logs, (engine := open_engine(name, scheme, log_dir=logs)):
        print(json.dumps({"loading_bytes": engine.loading_bytes}))


if __name__ == "__main__":
    _main(sys.argv[1:])
