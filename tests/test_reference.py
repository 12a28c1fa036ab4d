"""Reference runs: what the script refuses, what becomes of a part that fails, and what is on record."""

import os
import time

import psutil
import pytest

from helpers.base import records
from helpers.base.machine import Machine
from helpers.base.records import REFERENCE
from helpers.compare import recorded, recorded_tables, roofline, sizing
from helpers.model import lookup, schemes, sizes
from helpers.model.model import EMBEDDED
from helpers.serve.child import Child
from helpers.tools import recording, reference

H200 = Machine("cuda", "NVIDIA H200", 141 * 10**9, sm=9.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "nonsense"], "no section nonsense; there are: records, deployments, served"),
        (["served"], "required: --out"),
        (["--out", "x", "deployments", "--rounds", "9b"], "invalid choice: '9b' (choose from"),
        (["--out", "x"], "1 GPU(s) or more, and this machine shows a CPU"),
        (["--out", "x", "endings"], "2 GPU(s) or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(reference, "detect", lambda: Machine("cpu", "a CPU", 2**34))
    with pytest.raises(SystemExit) as refused:
        reference.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def parts(say, what: str) -> None:
    """The work of a child below."""
    say(pid=os.getpid())
    if what == "fails":
        raise ValueError("no room")
    if what == "hangs":
        time.sleep(60)
    say(heard=input())


@pytest.mark.parametrize(
    ("what", "patience_s", "cause"),
    [("answers", 60, ""), ("fails", 60, "ValueError: no room"), ("hangs", 0.5, "it said nothing")],
)
def test_a_part_says_lines_and_one_that_fails_or_hangs_says_why_and_is_gone(
    tmp_path, what, patience_s, cause
):
    with Child("tests.test_reference:parts", tmp_path / "log", what) as child:
        pid = child.line()["pid"]
        child.tell(go=1)
        found = child.line(time.monotonic() + patience_s)
        assert found == (None if cause else {"heard": '{"go": 1}'})
        assert cause in child.cause
    assert not psutil.pid_exists(pid)


def test_a_section_that_fails_stops_no_other(capsys):
    made = []
    assert recording.run_parts({"bad": lambda: 1 / 0, "good": lambda: made.append(1)}) == 1
    assert made == [1]
    said = capsys.readouterr()
    assert "ZeroDivisionError" in said.err
    assert said.out == "bad 0 s\ngood 0 s\n"


def job(name: str, then: str, logs: str):
    """The work of a process below: what it is, a line, another of another file."""
    yield {"name": name}
    if then == "fails":
        raise ValueError("no room")
    yield {"is": 1}
    yield {"is": 2, "file": "others"}
    yield recording.DONE


def test_a_round_writes_each_line_with_its_machine_and_goes_on_without_what_fails(tmp_path, capsys):
    jobs = [
        recording.Job(name, {"way": name}, "tests.test_reference:job", (name, then))
        for name, then in (("a", "fails"), ("b", "answers"))
    ]
    recording.run_round(jobs, tmp_path / "x/lines.jsonl")
    needed = ("device", "vllm", "torch", "protocol", "way", "name")
    for file, found in (("lines", 1), ("others", 2)):
        (row,), problems = records.read(tmp_path / f"x/{file}.jsonl", needed)
        assert not problems
        assert (row["way"], row["name"], row["is"]) == ("b", "b", found)
    assert "a.log: ValueError: no room" in capsys.readouterr().out


def test_recorded_weights_are_those_predicted_for_that_gpu_within_one_percent():
    """vLLM's figure, to the byte, against the config alone."""
    rows, problems = records.read(REFERENCE / "h200/records.jsonl")
    assert not problems
    known = sizing.known_models(lookup.resolve(EMBEDDED))
    seen = {(row["model"], row["scheme"]): row["weights_bytes"] for row in rows}
    assert len(seen) >= 7
    for (model, scheme), measured in seen.items():
        held = sizes.held_weights_bytes(scheme, known[model].folder, H200)
        # What kernels pad and the allocator rounds up is some MiB: more than that of the smallest model only.
        assert measured == pytest.approx(held, rel=0.01, abs=10 * 2**20), (model, scheme)


def test_no_recorded_engine_is_faster_than_its_bound():
    rows, _ = records.read(REFERENCE / "h200/records.jsonl")
    known = sizing.known_models(lookup.resolve(EMBEDDED))
    for row in rows:
        model = known[row["model"]]
        bound = roofline.step(model, row["scheme"], H200).bound(row["batch"], row["copy_bandwidth"])
        assert row["output_tokens_per_s"] < bound, row


def test_a_recorded_step_is_broken_down_whole():
    rows = recorded.steps()
    assert {row["scheme"] for row in rows.values()} >= {"baseline", "fp8", "awq"}
    for way, row in rows.items():
        parts = recorded.breakdown(row)
        assert set(parts) == set(recorded_tables.KINDS)
        assert min(parts.values()) >= 0
        # The kernels were timed under the profiler, the step without it.
        assert sum(parts.values()) == pytest.approx(row["step_us"], rel=0.05), way
        assert parts["matrix products"] > 0.95 * recorded.reading_us(row), (
            way
        )  # none reads faster than memory
        assert parts["other kernels"] < 0.25 * sum(parts.values()), way  # most of it has a name


def test_every_way_that_estimates_rest_on_is_recorded():
    for scheme in schemes.EVERY.values():
        for way in scheme.ways:
            assert 0 < recorded.beyond(way.timed, 1) < recorded.beyond(way.timed, 64), way.name
    between = [recorded.beyond("bf16", batch) for batch in (64, 160, 256, 352)]
    assert between[1] == pytest.approx((between[0] + between[2]) / 2)
    assert between[3] == pytest.approx(2 * between[2] - between[1])


def test_the_figure_of_steps_says_what_is_in_its_bars():
    rows = recorded.steps()
    shown = recorded_tables.steps([rows["bf16"], rows["awq, Machete"]])
    waits = recorded.breakdown(rows["awq, Machete"])["GPU waits"]
    assert f"GPU waits {waits:,.0f}" in shown.alt
    assert [label.get_text() for label in shown.figure.axes[0].get_yticklabels()] == ["bf16", "awq, Machete"]
