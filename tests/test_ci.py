"""The steps of `make test`: the first failure ends the run, and the table is there however it ended."""

import json

import nbformat
import pytest
from nbformat.v4 import new_notebook

from helpers.base.machine import detect
from tests import ci

COUNT = ("timeit", "-n", "1", "-r", "1", "sum(range(10**7))")


def test_the_first_failure_ends_the_run_and_the_table_says_which(tmp_path, capfd):
    nbformat.write(new_notebook(metadata={"papermill": {"duration": 12.5}}), tmp_path / "00_a.ipynb")

    def work(run):
        run("good", *COUNT)
        run.parts(tmp_path, ["00_a", "01_never_run"])
        run("bad", "timeit", "--no-such-option")
        pytest.fail("it went on after a failure")

    assert ci.finish(work, tmp_path / "build") == 1
    said = capfd.readouterr().out
    rows = [line.split() for line in said[said.rindex("step ") :].splitlines()]
    assert [row[0] for row in rows] == ["step", "good", "00_a", "01_never_run", "bad", "together", "on"]
    assert (rows[1][-1], rows[4][-1]) == ("ok", "failed")
    assert rows[2][1:] == ["12"]
    assert said.splitlines()[-1] == f"on {ci.where()}"
    assert detect().name in ci.where()
    kept = json.loads((tmp_path / "build" / "times.json").read_text())
    assert kept["machine"] == ci.where()
    kept = kept["steps"]
    assert [step["status"] for step in kept] == ["ok", "", "", "failed"]
    assert 0 < kept[0]["cpu_seconds"] < 60
    page = (tmp_path / "build" / "times.md").read_text()
    assert "|  00_a" in page
    assert f"\n\nOn {ci.where()}.\n" in page


def test_ctrl_c_leaves_the_table(tmp_path, capfd):
    def work(run):
        raise KeyboardInterrupt

    assert ci.finish(work, tmp_path) == 130
    assert "together" in capfd.readouterr().out


def test_every_notebook_is_run_by_a_target():
    names = {path.stem for path in (ci.ROOT / "notebooks").glob("*.ipynb")}
    assert {*ci.COMPARED, *ci.SLOW} == names
