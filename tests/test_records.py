"""Records: whole lines in, whole lines out, and a broken one never costs the others."""

import json
import multiprocessing

import pytest

from helpers.base import records
from helpers.base.machine import Machine
from helpers.base.records import FIELDS


def row(**changed) -> dict:
    of = {"scheme": "baseline", "model": "m", "device": "d", "vllm": "0.32.0", "batch": 1}
    measured = {"output_tokens_per_s": 1.0, "measured_at": "2026-01-01T00:00:00+00:00"}
    return dict.fromkeys(FIELDS, None) | of | measured | changed


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    assert records.read(path) == ([], [])
    records.append(path, [row(batch=1), row(batch=8)])
    records.append(path, [row(batch=32, kernel="übrig")])
    found, bad = records.read(path)
    assert [r["batch"] for r in found] == [1, 8, 32]
    assert found[2]["kernel"] == "übrig"
    assert bad == []


def test_a_record_without_a_field_is_not_written(tmp_path):
    incomplete = row()
    del incomplete["kernel"]
    with pytest.raises(ValueError, match="lacks kernel"):
        records.append(tmp_path / "r.jsonl", [row(), incomplete])
    assert not (tmp_path / "r.jsonl").exists()


def test_broken_lines_are_named_and_the_rest_is_used(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        json.dumps(row()) + '\n{"scheme": "fp8"\n[1]\n{"scheme": "awq"}\n\n' + json.dumps(row())[:30]
    )
    records.append(path, [row(batch=8)])
    found, bad = records.read(path)
    assert [r["batch"] for r in found] == [1, 8]
    assert [b.split(":")[0] for b in bad] == [f"r.jsonl, line {n}" for n in (2, 3, 4, 6)]
    assert "scheme" in bad[1] or "lacks" in bad[1]


def test_two_writers_never_mix_their_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    found, bad = records.read(path)
    assert bad == []
    assert len(found) == 4 * 25


def _write_many(path, number):
    for _ in range(25):
        records.append(path, [row(batch=number, kernel="x" * 9000)])


def test_the_newest_of_a_kind_is_kept():
    old, new, other = row(output_tokens_per_s=1.0), row(output_tokens_per_s=2.0), row(device="e")
    assert records.latest([old, other, new]) == [new, other]


HERE = Machine("cpu", "d", 0, cores=2, isa=frozenset({"avx2"}))


def mine(**changed) -> dict:
    return row(device=HERE.label, isa=["avx2"], prompt_tokens=16, **changed)


def test_records_of_something_else_are_left_out_and_named():
    other = [
        mine(model="n"), mine(vllm="0.1"), row(device="d", prompt_tokens=16),
        mine() | {"isa": ["avx512f"]}, mine() | {"prompt_tokens": 1024},
    ]  # fmt: skip
    found, notes = records.of([*other, mine(batch=8), mine(batch=1), mine(batch=8, ttft_s=0.5)], "m", HERE)
    assert [(r["batch"], r["ttft_s"]) for r in found] == [(8, 0.5), (1, None)]
    assert len(notes) == 5
    assert sum(int(note.split()[2]) for note in notes) == len(other)
    assert any("vLLM 0.1" in note for note in notes)
    assert records.of([], "m", HERE) == ([], [])


def test_recorded_files_are_read_and_their_bad_lines_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "records.jsonl").write_text(json.dumps(row(device="A")) + "\n" + json.dumps(row())[:40])
    (tmp_path / "b" / "records.jsonl").write_text(json.dumps(row(device="B")))
    good, bad = records.elsewhere(tmp_path)
    assert [(r["device"], r["recorded"]) for r in good] == [("A", "a"), ("B", "b")]
    assert bad == ["a/records.jsonl, line 2: not complete JSON, left out."]
    assert records.envelopes(tmp_path) == ([], [])


def test_every_committed_record_can_be_read():
    for found, bad in (records.elsewhere(), records.envelopes()):
        assert bad == []
        assert all(r["recorded"] for r in found)
    # One recording each, whole: ratios of two would compare the hours, too.
    recordings: dict[tuple, set] = {}
    for r in records.elsewhere()[0]:
        recordings.setdefault((r["model"], r["device"], r["scheme"]), set()).add(r["measured_at"])
    assert all(len(times) == 1 for times in recordings.values()), recordings
    cited = [r for r in records.elsewhere()[0] if r.get("cited")]
    assert [r["device"] for r in cited] == ["NVIDIA L4"]


def test_origins_are_kept_apart_and_named_apart():
    apart = ({}, {"prompt_tokens": 16}, {"prompt_tokens": 1024}, {"vllm": "0.1"}, {"recorded": "x"})
    found = records.by_origin([*(row(**changed) for changed in apart), row(batch=8)])
    assert list(map(len, found.values())) == [2, 1, 1, 1, 1]
    assert len(set(found)) == 5
    assert "m on d, 1024 tokens in" in found
