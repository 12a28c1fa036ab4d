"""The steps of `make test`: the first failure ends the run, and the table is there however it ended."""

import os

import pytest

from helpers.base.machine import detect
from tests import ci


def test_the_first_failure_ends_the_run_and_the_table_says_which(capfd):
    def work(run):
        run("good", "timeit", "-n", "1", "-r", "1", "pass")
        run("bad", "timeit", "--no-such-option")
        pytest.fail("it went on after a failure")

    assert ci.finish(work) == 1
    said = capfd.readouterr().out
    rows = [line.split() for line in said[said.rindex("step ") :].splitlines()]
    assert [(row[0], row[-1]) for row in rows[1:3]] == [("good", "ok"), ("bad", "failed")]
    assert rows[3][0] == "together"
    assert detect().name in said.splitlines()[-1]


def test_steps_beside_each_other_have_cores_of_their_own_and_all_of_them_end(capfd):
    cores = sorted(os.sched_getaffinity(0))
    here = ("timeit", "-n", "1", "-r", "1", "import os; print(sorted(os.sched_getaffinity(0)))")

    def work(run):
        run.beside(("bad", ("timeit", "--no-such-option"), {}), ("good", here, {}))
        pytest.fail("it went on after a failure")

    assert ci.finish(work) == 1
    said = capfd.readouterr().out
    assert any(f"\n{half}\n" in said for half in (cores[::2], cores[1::2]))
    rows = sorted(line.split() for line in said[said.rindex("step ") :].splitlines()[1:3])
    assert [(row[0], row[-1]) for row in rows] == [("bad", "failed"), ("good", "ok")]
    assert sorted(os.sched_getaffinity(0)) == cores


def test_ctrl_c_leaves_the_table(capfd):
    def work(run):
        raise KeyboardInterrupt

    assert ci.finish(work) == 130
    assert "together" in capfd.readouterr().out


def test_every_notebook_is_run_by_a_target():
    names = {path.stem for path in (ci.ROOT / "notebooks").glob("*.ipynb")}
    assert {*ci.COMPARED, *ci.SLOW} == names
