"""The script of the reference runs, as far as it goes without a GPU: what it refuses, starts and writes."""

import json
import os
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.base import machine, records
from helpers.base.machine import Machine
from helpers.base.records import REFERENCE
from helpers.compare import recorded, recorded_tables, roofline, sizing
from helpers.measure import speed
from helpers.model import lookup, shapes, sizes
from helpers.model.model import EMBEDDED
from helpers.model.schemes import SCHEMES
from helpers.tools import reference, sections, variants
from helpers.tools.plan import RESULTS
from helpers.tools.sections import CONTEXT, ENVELOPE, GRAPHS
from helpers.tools.variants import MODEL, VARIANTS

# MiB a layer that torch's blocks are larger than the 8-bit matrices in them: two of 25 MiB in 26, as blocks
# come in multiples of 2 MiB; and 135, 67.5, 35 and 25 MiB in 136, 70, 50 and 26, which 16-bit ones had left.
LARGER = {("Phi-2", "fp8"): 2, ("Phi-2", "int8"): 2, ("Qwen2.5-14B", "fp8"): 19.5}
H200 = Machine("cuda", "NVIDIA H200", 141 * 10**9, sm=9.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "nonsense"], "no section nonsense; there are: records, deployments, served"),
        (["swaps"], "--out names the folder"),
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


def test_every_engine_of_a_section_is_warmed_with_the_arguments_it_is_measured_with():
    wanted = reference.to_warm(["records", "settings"], ["shape:phi-2"])
    assert ("shape:phi-2", "awq", GRAPHS) in wanted
    measured = [args for _, _, args in variants.choose_variants()]
    warmed = [args for name, _, args in wanted if name == MODEL]
    assert warmed == [args for args in measured if "compile_sizes" not in args["compilation_config"]]
    assert len(warmed) == len(measured) - 4  # what is tuned by timing it is compiled alone, and last
    assert all(args["compilation_config"]["cudagraph_capture_sizes"] == variants.GRAPHS for args in measured)
    assert set(VARIANTS) <= set(SCHEMES)
    assert [args["linear_backend"] for _, _, args in reference.to_warm(["kernels"], [])[1:]] == [
        "marlin",
        "humming",
    ]
    tried = [(scheme, args) for _, scheme, args in reference.to_warm(["envelope"], [])]
    assert tried == [(scheme, CONTEXT | more) for scheme, more in ENVELOPE]


def test_a_whole_name_is_that_variant_alone_and_a_part_is_all_that_have_it():
    names = [f"{scheme}: {title}" for scheme, title, _ in variants.choose_variants(["awq: Marlin"])]
    assert names == ["awq: Marlin"]
    titles = [title for _, title, _ in variants.choose_variants(["awq: Marlin,"])]
    assert len(titles) > 1
    assert all(title.startswith("Marlin, ") for title in titles)
    assert variants.choose_variants(["no such"]) == []


def test_compile_caches_are_fresh_inside_the_block_only(monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with variants._fresh_caches():
        assert os.environ["VLLM_CACHE_ROOT"] != "/mine"
        assert "TRITON_CACHE_DIR" in os.environ
    assert os.environ["VLLM_CACHE_ROOT"] == "/mine"
    assert "TRITON_CACHE_DIR" not in os.environ


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
        [2, "60 to 70 (x 1.00)", "900 (x 1.00)"], [1, "80 (x 1.23)", "-"]
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


def test_kernels_whose_names_are_cut_alike_are_added_up(monkeypatch):
    kernels = [("cutlass::gemm", 64, 3000.0), ("cutlass::gemm", 32, 1000.0), ("others", 0, 10.0)]
    llm = SimpleNamespace(collective_rpc=lambda name: [{"steps": 2, "kernels": kernels}])
    monkeypatch.setattr(speed, "decode", lambda *_, decoding: (decoding(), (100.0, []))[1])
    seen = variants.busy(SimpleNamespace(llm=llm), batch=1)
    assert seen["longest"] == {"cutlass::gemm": [2000.0, 48.0], "others": [5.0, 0.0]}
    assert (seen["gpu_us"], seen["step_us"]) == (2005.0, 10000.0)


def test_how_a_lesson_went_is_read_from_its_copy(tmp_path):
    cell = new_code_cell("open_engine()")
    cell.outputs = [
        new_output("stream", name="stdout", text="vLLM is ready after ‹3.5 s›. Its log: ‹a.log›\n")
    ]
    cell.outputs += [
        new_output("stream", name="stdout", text="x\nThe server (awq) answers after ‹12.0 s› on ‹…›.\n")
    ]
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "05_x.ipynb")
    result = {
        "notebook": "05_x",
        "status": "ok",
        "seconds": 20.0,
        "error": "",
        "digest": "",
        "records": [0, 0],
    }
    (tmp_path / RESULTS).write_text(json.dumps(result) + "\n")
    assert reference.of_lessons(tmp_path) == [
        {"lesson": "05_x", "status": "ok", "seconds": 20.0, "starting_s": [3.5, 12.0]}
    ]


def test_the_lessons_run_and_each_has_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_make_checkpoints", lambda: 1.5)  # minutes; 00 needs none
    reference.lessons(tmp_path, ["00_start_here"])
    [line] = [json.loads(text) for text in (tmp_path / "lessons.jsonl").read_text().splitlines()]
    assert (line["lesson"], line["status"], line["starting_s"]) == ("00_start_here", "ok", [])
    assert line["seconds"] > 0
    assert line["checkpoints_s"] == 1.5
    assert line["device"] == machine.detect().label
    with pytest.raises(RuntimeError, match=r"did not run to its end \(exit code 2\)"):
        reference.lessons(tmp_path, ["99_no_such_lesson"])


def test_a_line_names_its_machine_and_versions(tmp_path, capsys):
    sections.write(tmp_path / "x/lines.jsonl", [sections.stamp() | {"swap": 1}])
    sections.write(tmp_path / "x/lines.jsonl", [sections.stamp() | {"swap": 2}])
    rows = [json.loads(line) for line in (tmp_path / "x/lines.jsonl").read_text().splitlines()]
    assert [row["swap"] for row in rows] == [1, 2]
    assert all(row["device"] and row["vllm"] and row["torch"] and row["protocol"] == 2 for row in rows)
