"""Speculation, prefix caching, structured output and LoRA, each on and off, in 16, 8 and 4 bits.

On the embedded model, whose weights are real: what is guessed, shared or constrained here is text. Three
engines a scheme: one for the plain runs, the shared prefix and the constrained answers, one that guesses, one
that carries an adapter.
"""

from collections.abc import Iterator
from pathlib import Path

from helpers.engine.engine import open_engine
from helpers.measure import features as measured
from helpers.model.model import EMBEDDED
from helpers.tools.recording import DONE, Job, run_round, sharing

SCHEMES = ("baseline", "fp8", "awq")
USERS = (1, 32)
REPEATS = 9
ENGINES = {
    "plain": {"enable_prefix_caching": True},
    "guesses": {"speculative_config": measured.SPECULATIVE},
    "adapter": {"enable_lora": True, "max_lora_rank": measured.RANK},
}
SAME = sharing(6 * 2**30, [1, 8, *range(16, 257, 16)]) | {"disable_log_stats": False}


def features(out: Path) -> None:
    """Every engine's features; a line each, as they come."""
    jobs = []  # of a scheme's engines the first makes its checkpoint, and the others wait for it
    for scheme in SCHEMES:
        for kind in ENGINES:
            row = {"scheme": scheme, "weights": "real"}
            jobs.append(Job(f"{scheme}-{kind}", row, f"{__name__}:work", (scheme, kind)))
    run_round(jobs, out / "features.jsonl")


def work(scheme: str, kind: str, logs: str) -> Iterator[dict]:
    """An engine: what it is, then a line for each feature that it has."""
    with open_engine(EMBEDDED, scheme, log_dir=logs, **SAME, **ENGINES[kind]) as llm:
        model = llm.engine.model
        yield {"model": model.title, "kernels": llm.engine.kernels}
        for users in USERS:
            if kind == "adapter":
                lora = measured.adapter(model, Path(logs) / "lora")
                yield from measured.adapted(llm, lora, users, repeats=REPEATS)
                continue
            yield from measured.guessing(llm, users, repeats=REPEATS)
            if kind == "plain":
                yield from measured.sharing(llm, users, repeats=REPEATS)
                yield from measured.constrained(llm, users, repeats=REPEATS)
        yield DONE
