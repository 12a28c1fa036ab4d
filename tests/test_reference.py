"""Reference runs: what the script refuses, what becomes of a part that fails, and what is on record."""

import os
import time

import psutil
import pytest

from helpers.base import machine, records
from helpers.base.machine import Machine
from helpers.base.records import REFERENCE
from helpers.compare import recorded, recorded_tables, roofline, sizing
from helpers.model import lookup, shapes, sizes
from helpers.model.model import EMBEDDED
from helpers.model.schemes import SCHEMES
from helpers.serve.child import Child
from helpers.tools import recording, reference

# MiB a layer that torch's blocks are larger than the 8-bit matrices in them: two of 25 MiB in 26, as blocks
# come in multiples of 2 MiB; and 135, 67.5, 35 and 25 MiB in 136, 70, 50 and 26, which 16-bit ones had left.
LARGER = {("Phi-2", "fp8"): 2, ("Phi-2", "int8"): 2, ("Qwen2.5-14B", "fp8"): 19.5}
H200 = Machine("cuda", "NVIDIA H200", 141 * 10**9, sm=9.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "nonsense"], "no section nonsense; there are: records, deployments, served"),
        (["served"], "--out names the folder"),
        (["--out", "x", "deployments", "--rounds", "9b"], "no round 9b; there are: 8b, 32b"),
        (["--out", "x"], "for a GPU, and this machine shows none"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(machine, "detect", lambda: Machine("cpu", "a CPU", 2**34))
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


def test_a_line_names_its_machine_and_versions(tmp_path, capsys):
    for swap in (1, 2):
        recording.write(tmp_path / "x/lines.jsonl", recording.stamp() | {"swap": swap})
    rows, problems = records.read(tmp_path / "x/lines.jsonl", ("device", "vllm", "torch", "protocol"))
    assert not problems
    assert [row["swap"] for row in rows] == [1, 2]


def test_recorded_weights_are_those_predicted_for_that_gpu_within_one_percent():
    """vLLM's figure, to the byte, against the config alone.

    While it loads vLLM forbids torch to split blocks above 20 MiB (max_split_size_mb=20 in gpu_worker.py). A
    matrix rounded while loading then lies whole in what a 16-bit one left behind, which may be up to 20 MiB
    larger: it depends on the sizes, and matters in two of these models.
    """
    rows, problems = records.read(REFERENCE / "h200/records.jsonl")
    assert not problems
    known = sizing.known_models(lookup.resolve(EMBEDDED))
    seen = {(row["model"], row["scheme"]): row["weights_bytes"] for row in rows}
    assert len(seen) >= 7
    for (model, scheme), measured in seen.items():
        held = sizes.held_weights_bytes(scheme, known[model].folder, H200)
        held += LARGER.get((model, scheme), 0) * 2**20 * known[model].config["num_hidden_layers"]
        # What kernels pad and the allocator rounds up is some MiB: more than that of the smallest model only.
        assert measured == pytest.approx(held, rel=0.01, abs=10 * 2**20), (model, scheme)


def test_no_recorded_engine_is_faster_than_its_bound():
    rows, _ = records.read(REFERENCE / "h200/records.jsonl")
    known = sizing.known_models(lookup.resolve(EMBEDDED))
    for row in rows:
        model = known[row["model"]]
        bound = roofline.step(model, row["scheme"], H200).bound(row["batch"], row["copy_bandwidth"])
        assert row["output_tokens_per_s"] < bound, row


def test_a_recorded_step_is_broken_down_whole_or_not_at_all():
    rows = recorded.recorded()
    assert {row["scheme"] for row in rows} >= {"baseline", "fp8", "awq"}
    told = [row for row in rows if recorded.breakdown(row)]
    assert len(told) >= 7
    for row in told:
        parts, step = recorded.breakdown(row), 1e6 / row["tokens_per_s"]["1"]
        assert set(parts) == {"matrix products", "attention and cache", "other kernels", "GPU waits"}
        assert min(parts.values()) >= 0
        # The kernels were timed under the profiler, the step without it.
        assert sum(parts.values()) == pytest.approx(max(step, row["busy"]["1"]["gpu_us"]), rel=0.02)
        read = recorded.least(row, shapes.shape("mistral-7b"))
        assert parts["matrix products"] > 0.95 * read, row[
            "variant"
        ]  # nothing reads faster than memory moves
    hidden = told[0] | {"busy": {"1": told[0]["busy"]["1"] | {"longest": {"nvjet": [10.0, 1.0]}}}}
    assert recorded.breakdown(hidden) is None


def test_of_several_runs_of_a_variant_the_median_of_each_batch_counts(tmp_path):
    kernels = {"1": {"gpu_us": 5.0, "longest": {"nvjet": [5.0, 1.0]}}}
    same = {"device": "NVIDIA H200", "model": "Mistral-7B", "scheme": "fp8", "variant": "torch's kernel"}
    same["protocol"] = 0
    fast = {"tokens_per_s": {"1": 200.0, "64": 900.0}, "of_the_bound": 0.5, "busy": kernels}
    runs = [
        same | fast,
        same | {"error": "no kernel"},
        same | {"tokens_per_s": {"1": 190.0, "64": 990.0}, "of_the_bound": 0.4, "busy": {
            "1": {"gpu_us": 4.0, "longest": {"nvjet": [1.0, 1.0]}}}},
    ]  # fmt: skip
    records.append(tmp_path / "mine/settings.jsonl", runs, ("scheme",))
    (row,) = recorded.recorded(tmp_path)
    assert (row["tokens_per_s"], row["of_the_bound"]) == ({"1": 195.0, "64": 945.0}, 0.5)
    assert row["runs"] == {"1": [190.0, 200.0], "64": [900.0, 990.0]}
    assert row["busy"] == kernels  # the other's are shorter, and do not say where the time goes
    rows = recorded.recorded()
    assert len({(row["device"], row["scheme"], row["variant"]) for row in rows}) == len(rows)


def test_a_profile_of_decoding_alone_is_taken_before_one_with_the_prompts(tmp_path):
    same = {"device": "NVIDIA H200", "model": "Mistral-7B", "scheme": "fp8", "variant": "torch's kernel"}
    same |= {"tokens_per_s": {"1": 900.0}, "of_the_bound": 0.5}
    both = [{"1": {"gpu_us": us, "longest": {"nvjet": [us, 1.0]}}} for us in (5.0, 6.0)]
    runs = [same | {"protocol": number, "busy": busy} for number, busy in enumerate(both)]
    records.append(tmp_path / "mine/settings.jsonl", runs, ("scheme",))
    (row,) = recorded.recorded(tmp_path)
    assert row["busy"] == both[1]  # the prompts of the other's took little: its least is not less


def test_at_the_largest_batch_only_what_was_timed_nine_times_has_a_rate(tmp_path):
    kernels = {"1": {"gpu_us": 5.0, "longest": {"nvjet": [5.0, 1.0]}}}
    same = {
        "device": "NVIDIA H200",
        "model": "Mistral-7B",
        "scheme": "fp8",
        "of_the_bound": 0.5,
        "busy": kernels,
    }
    old, new = {"protocol": 1}, {"protocol": 2}
    runs = [
        same | old | {"variant": "both", "tokens_per_s": {"64": 70.0, "256": 990.0}, "beside": "another"},
        same | new | {"variant": "both", "tokens_per_s": {"64": 60.0, "256": 900.0}},
        same | old | {"variant": "old", "tokens_per_s": {"64": 80.0, "256": 950.0}, "beside": "another"},
    ]
    records.append(tmp_path / "mine/settings.jsonl", runs, ("scheme",))
    both, older = recorded.recorded(tmp_path)
    assert (both["tokens_per_s"], older["tokens_per_s"]) == ({"64": 65.0, "256": 900.0}, {"64": 80.0})
    assert ("beside" in both, "beside" in older) == (False, True)  # one of its runs was alone
    assert (recorded.fastest([both, older], "fp8", 64), recorded.fastest([both, older], "fp8", 256)) == (
        "old",
        "both",
    )
    base = {"scheme": "baseline", "kernels": []}
    both |= base | {"variant": recorded.DEFAULTS}
    table = recorded_tables.variants([both, older | base], [64, 256])
    assert [row[3:] for row in table.rows] == [
        ["2, 1", "60 to 70 (x 1.00)", "900 (x 1.00)"], ["1, 0", "80 (x 1.23)", "-"]
    ]  # fmt: skip
    assert [row[1] for row in table.rows] == [recorded.DEFAULTS, "old *"]


def test_notable_are_vllms_own_choice_and_the_fastest_at_each_batch():
    rows = recorded.recorded()
    assert recorded.fastest(rows, "awq", 1).startswith("Marlin")
    assert not recorded.fastest(rows, "awq", 64).startswith("Marlin")
    found = recorded.notable(rows, [1, 256])
    names = [(row["scheme"], row["variant"]) for row in found]
    assert len(names) == len(set(names)) < len(rows)
    for scheme in {row["scheme"] for row in rows}:
        assert (scheme, "vLLM's defaults") in names
        assert {recorded.fastest(rows, scheme, batch) for batch in (1, 256)} <= {
            v for s, v in names if s == scheme
        }
    assert [scheme for scheme, _ in names] == sorted((s for s, _ in names), key=[*SCHEMES].index)
