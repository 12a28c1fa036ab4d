"""Our figures beside the call that ``vllm bench latency`` times, by turns in one engine."""

import random
import statistics
import time

import pytest

from helpers.engine.engine import open_engine
from helpers.measure.speed import measure_speed, random_prompts

BATCH, PROMPT, OUTPUT = 4, 32, 32
# Two cores that others use as well differ from one minute to the next; the medians of turns do not.
TURNS, MOST = 3, 1.2


@pytest.mark.slow
def test_a_batch_takes_as_long_as_its_speed_says(warm, tmp_path):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=OUTPUT, detokenize=False)
    ours, theirs = [], []
    with open_engine(log_dir=tmp_path, max_model_len=512) as engine:
        for _ in range(TURNS):
            (speed,) = measure_speed(engine, [BATCH], prompt_tokens=PROMPT, seconds=1.0, runs=1)
            ours.append(speed.ttft_s + (OUTPUT - 1) * speed.tpot_s)
            vocabulary = engine.model.config["vocab_size"]
            prompts = random_prompts(vocabulary, BATCH, PROMPT, random.Random())
            begun = time.perf_counter()
            engine.llm.generate(prompts, greedy, use_tqdm=False)
            theirs.append(time.perf_counter() - begun)
    ratio = statistics.median(ours) / statistics.median(theirs)
    assert 1 / MOST < ratio < MOST, f"ours {ours}, vLLM's {theirs}"
