"""Machines that have nothing yet (`python -m tests.fresh_machines` prints them as a table)."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers.base import machine
from tests.fresh_machines import CASES, run_case


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fresh_machine_runs_the_first_notebooks_with_and_without_a_network(case):
    if lacking := case.lacks():
        pytest.skip(lacking)
    with tempfile.TemporaryDirectory(prefix="fresh-") as base:  # pytest's folders are closed to other users
        steps = run_case(case, Path(base))
    for step in steps:
        if step.result.startswith("not tried"):
            pytest.skip(step.result)
        assert step.code == 0, f"{step.what}: {step.output[-3000:]}"
    assert step.what.endswith("network cut")


WITHOUT_A_COMPILER = """
import sys
from helpers.engine.engine import open_engine
from helpers.measure.speed import measure_speed

engine = open_engine(log_dir=sys.argv[1], max_model_len=512)

with engine:
    print(measure_speed(engine, [1], seconds=0.1)[0].output_tokens_per_s > 0)
    from vllm import SamplingParams

    print(len(engine.llm.generate("One", SamplingParams(max_tokens=4, top_k=5, seed=1))))
"""


@pytest.mark.slow
@pytest.mark.skipif(machine.detect().kind != "cpu", reason="on a GPU an engine compiles")
def test_an_engine_on_a_cpu_needs_no_compiler(tmp_path):
    env = {
        **os.environ,
        "CXX": "/no/compiler",
        "CC": "/no/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    env.pop("TORCHDYNAMO_DISABLE", None)
    command = [sys.executable, "-c", WITHOUT_A_COMPILER, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["True", "1"], done.stderr[-3000:]
