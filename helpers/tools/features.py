"""Speculation, prefix caching, structured output and LoRA, each on and off, in 16, 8 and 4 bits.

    python -m helpers.tools.reference --out notebooks/reference/my-machine features

On the embedded model, whose weights are real: what is guessed, shared or constrained here is text. Three
engines a scheme: one for the plain runs, the shared prefix and the constrained answers, one that guesses, one
that carries an adapter. On a GPU all start beside each other, and one after the other is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.engine.engine import open_engine
from helpers.measure import features as measured
from helpers.model import checkpoints, lookup, schemes
from helpers.model.model import EMBEDDED
from helpers.tools.deployments import GPU
from helpers.tools.grid import Job, chosen, run_round

SCHEMES = ("baseline", "fp8", "awq")
USERS = (1, 32) if GPU else (1, 8)
REPEATS = 9 if GPU else 3
CACHE_BYTES = 6 * 2**30 if GPU else 2**29
ENGINES = {
    "plain": {"enable_prefix_caching": True},
    "guesses": {"speculative_config": measured.SPECULATIVE},
    "adapter": {"enable_lora": True, "max_lora_rank": measured.RANK},
}


def features(out: Path, seconds: float) -> None:
    """Every engine's features; a line each, as they come."""
    for scheme in SCHEMES:  # once, before engines of the same scheme would make it beside each other
        if recipe := schemes.scheme(scheme).recipe:
            checkpoints.make(lookup.resolve(EMBEDDED), recipe)
    jobs = [
        Job({"scheme": scheme, "weights": "real"}, f"{scheme}-{kind}", f"{__name__}:work",
            (scheme, kind, str(out / "logs" / f"{scheme}-{kind}")))
        for scheme in SCHEMES
        for kind in ENGINES
    ]  # fmt: skip
    until = time.monotonic() + seconds
    for group in [jobs] if GPU else [[job] for job in jobs]:
        run_round("features", group, out, until)


def work(say, scheme: str, kind: str, folder: str) -> None:
    """Start an engine, say so, wait for the word, and say a line for each feature it has."""
    same = {"log_dir": Path(folder), "disable_log_stats": False, "kv_cache_memory_bytes": CACHE_BYTES}
    if GPU:  # its memory is checked against what is free; the cache's size is given
        graphs = {"cudagraph_capture_sizes": [1, 8, *range(16, 257, 16)]}
        same |= {"gpu_memory_utilization": 0.02, "compilation_config": graphs}
    engine = open_engine(EMBEDDED, scheme, **same, **ENGINES[kind])
    with engine as llm:
        say(model=engine.model.title, kernels=chosen(engine.log_file.read_text(errors="replace")))
        sys.stdin.readline()
        for users in USERS:
            for row in _features(llm, kind, users, engine.model, Path(folder)):
                say(**row)
        say(done=True)
        sys.stdin.read()  # whoever asked ends this process, and with it the engine


def _features(llm, kind: str, users: int, model, folder: Path) -> Iterator[dict]:
    if kind == "adapter":
        yield from measured.adapted(llm, measured.adapter(model, folder / "lora"), users, repeats=REPEATS)
        return
    yield from measured.guessing(llm, users, repeats=REPEATS)
    if kind == "plain":
        yield from measured.sharing(llm, users, repeats=REPEATS)
        yield from measured.constrained(llm, users, repeats=REPEATS)
