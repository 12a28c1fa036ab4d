"""Measurements on the real engine: against vLLM's own calls, and refused where they cannot give a number."""

import gc
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.base.files import ROOT
from helpers.base.machine import detect
from helpers.base.parameters import ParameterError
from helpers.compare import sizing
from helpers.engine.engine import open_engine
from helpers.measure.memory import measure_memory
from helpers.measure.speed import decode_prompts, measure_speed, random_prompts
from helpers.model import lookup, sizes
from tests.conftest import SMALL, ask


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    engine = open_engine(log_dir=logs, **SMALL)
    with engine:
        yield engine


def test_speed_is_that_of_vllms_own_generate(engine):
    """One call of LLM.generate decodes as fast as the figure says, give or take a busy machine."""
    from vllm import SamplingParams

    found = measure_speed(engine, [1, 4], seconds=1.5)
    assert [speed.batch for speed in found] == [1, 4]
    for speed in found:
        assert 0 < speed.low <= speed.output_tokens_per_s <= speed.high
        assert speed.ttft_s > 0
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(200, 216))}
    own = []
    for _ in range(3):
        begun = time.perf_counter()
        engine.llm.generate([prompt], params, use_tqdm=False)
        own.append(24 / (time.perf_counter() - begun))
    assert 0.25 < found[0].high / max(own) < 4


def test_no_garbage_collection_stops_the_clock(engine, monkeypatch):
    core, collected = engine.llm.llm_engine, []
    step = core.step
    monkeypatch.setattr(core, "step", lambda: collected.append(gc.isenabled()) or step())
    measure_speed(engine, [1], seconds=0.1)
    assert collected
    assert not any(collected)
    assert gc.isenabled()
    gc.disable()
    try:
        measure_speed(engine, [1], seconds=0.1)
        assert not gc.isenabled()  # as it was found
    finally:
        gc.enable()


def test_nothing_is_left_queued_by_a_measurement(engine):
    measure_speed(engine, [2], seconds=0.1)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert "Paris" in ask(engine, "What is the capital of France? Answer with one word.")


def test_memory_is_what_the_process_took(engine):
    memory = measure_memory(engine)
    assert memory.kv_cache_tokens == engine.kv_cache_tokens > 0
    assert memory.total > 256 * 2**20
    held = sizes.held_weights_bytes("baseline", engine.model.folder, engine.machine)
    # The first engine of a process: loading takes in modules, too.
    assert memory.weights == pytest.approx(held, abs=150e6)


def test_vllm_finds_the_cache_that_the_formula_predicts(engine):
    row = {"scheme": "baseline", "dtype": engine.args["dtype"]}
    token = sizing.recorded_token_bytes(row, engine.model)
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    found = engine.kv_cache_tokens * token
    assert SMALL["kv_cache_memory_bytes"] - block * token < found <= SMALL["kv_cache_memory_bytes"]


def test_what_cannot_be_measured_is_refused(engine):
    with pytest.raises(ParameterError, match="leave no room"):
        measure_speed(engine, [1], prompt_tokens=511)
    with pytest.raises(ValueError, match="batch_sizes"):
        measure_speed(engine, [0])
    with pytest.raises(ParameterError, match="ended before the last began"):  # with their first token
        decode_prompts(engine.llm, random_prompts(1000, 2, 4, random.Random(0)), 0.1, 1)
    assert not engine.llm.llm_engine.has_unfinished_requests()


WEIGHING = f"""
import sys
from helpers.engine.engine import open_engine

with (engine := open_engine("embedded", sys.argv[1], log_dir=sys.argv[2], **{SMALL})):
    print(engine.loading_bytes)
"""


def weigh(scheme: str, logs: Path) -> int:
    """Bytes that loading the weights adds to a fresh process's memory."""
    command = [sys.executable, "-c", WEIGHING, scheme, str(logs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("scheme", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_weights_weigh_what_was_predicted_for_this_machine(scheme, tmp_path):
    """Within 3 %, and what they save against the baseline, too: that is what readers compare."""
    model, machine = lookup.resolve("embedded"), detect()
    held, weighed = {}, {}
    for name in ("baseline", scheme):
        held[name] = sizes.held_weights_bytes(name, model.folder, machine)
        weighed[name] = weigh(name, tmp_path)
        assert weighed[name] == pytest.approx(held[name], rel=0.03), name
    saved = weighed["baseline"] - weighed[scheme]
    assert saved == pytest.approx(held["baseline"] - held[scheme], rel=0.03)
