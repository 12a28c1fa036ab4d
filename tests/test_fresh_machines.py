"""Machines that have nothing yet (`python -m tests.fresh_machines` prints them as a table)."""

import tempfile
from pathlib import Path

import pytest

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
