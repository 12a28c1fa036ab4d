"""What is missing among the records is measured, and nothing else."""

import json

import pytest

from helpers.base import records
from helpers.base.machine import detect
from helpers.measure import trial
from helpers.model import lookup
from helpers.model.model import TITLE
from helpers.model.schemes import EVERY, Scheme
from tests.test_records import row

ASKED = {"batch_sizes": [1], "seconds": 0.1, "quality_tokens": 512}


def here(scheme, **changed):
    machine = detect()
    of = {"model": TITLE, "device": machine.label, "isa": sorted(machine.isa), "prompt_tokens": 16}
    return row(scheme=scheme, **of, **changed)


def test_with_every_record_in_place_no_engine_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "open_engine", lambda *args, **more: pytest.fail("an engine was started"))
    names = ["baseline", "fp8"]
    records.append(tmp_path / "records.jsonl", [here(name) for name in names] + [row(model="another")])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(json.dumps(here("int8"))[:50])
    rows, notes = trial.complete(lookup.resolve(), names, out=tmp_path, **ASKED)
    assert [r["scheme"] for r in rows] == names
    assert "line 4: not complete JSON" in notes[0]
    assert "another on d" in notes[1]


def test_a_scheme_that_does_not_run_here_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "open_engine", lambda *args, **more: pytest.fail("an engine was started"))
    monkeypatch.setitem(EVERY, "none", Scheme("none", "None", 1, (), "It never does."))
    records.append(tmp_path / "records.jsonl", [here("baseline")])
    rows, notes = trial.complete(lookup.resolve(), ["baseline", "none"], out=tmp_path, **ASKED)
    assert len(rows) == 1
    assert notes[0].startswith("none is not measured here: None does not run on")


@pytest.mark.slow
def test_without_records_the_baseline_and_the_scheme_are_measured(tmp_path):
    rows, notes = trial.complete(lookup.resolve(), ["baseline", "fp8"], out=tmp_path, **ASKED)
    assert [r["scheme"] for r in rows] == ["baseline", "fp8"]
    assert notes == []
    assert rows[1]["kl_mean"] > 0
    assert rows[0]["output_tokens_per_s"] > 0
    again, _ = trial.complete(lookup.resolve(), ["baseline", "fp8"], out=tmp_path, **ASKED)
    assert again == rows
