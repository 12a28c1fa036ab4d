"""Tables, marks and figures: what readers see, and what the notebook tests may ignore of it."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

from helpers.base import page as page_module
from helpers.base import records
from helpers.base.page import Note, Table, measured, mib
from helpers.base.records import REFERENCE
from helpers.compare import comparison_tables, recorded, recorded_tables
from helpers.measure import result_tables

RULES = Path(__file__).parent / "nbval_sanitize.cfg"


def sanitized(text: str) -> str:
    rules = ConfigParser()
    rules.read(RULES)
    for name in rules.sections():
        text = re.sub(rules[name]["regex"], rules[name]["replace"], text)
    return text


def test_a_mark_is_replaced_and_nothing_beside_it():
    table = Table(["a", "b"], [["weights", measured("1.5 MiB")], ["fixed", "2.0 MiB"]])
    other = Table(["a", "b"], [["weights", measured("9.9 <MiB>")], ["fixed", "2.0 MiB"]])
    wrong = Table(["a", "b"], [["weights", measured("1.5 MiB")], ["fixed", "2.1 MiB"]])
    for form in (repr, Table._repr_html_):
        assert form(table) != form(other)
        assert sanitized(form(table)) == sanitized(form(other))
        assert sanitized(form(table)) != sanitized(form(wrong))


def test_a_generated_answer_is_marked_across_its_lines():
    output = type("Output", (), {"outputs": [type("Text", (), {"text": "one\ntwo <three>"})]})
    answer = page_module.answer("Why?", output, templated=True)
    assert sanitized(repr(answer)).endswith("Answer: ‹measured›")
    assert "one" not in sanitized(answer._repr_html_())
    assert "Why?" in sanitized(answer._repr_html_())
    assert "<three>" not in answer._repr_html_()


def test_columns_of_sentences_are_left_aligned():
    page = Table(["a", "number", "why"], [["x", 1, "because"]], texts=["why"])._repr_html_()
    assert '<td style="text-align:right">1</td><td style="text-align:left">because</td>' in page


def test_text_from_outside_cannot_become_html():
    table = Table(["<b>"], [["<script>"], [measured("<i>")]], caption="<u>")
    assert not re.search(r"<(b|script|u)>", table._repr_html_())


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MiB"), (2**20, "1.0 MiB"), (20 * 2**30, "20.00 GiB")])
def test_bytes_in_words(size, text):
    assert mib(size) == text


def test_records_of_two_machines_are_not_set_side_by_side_unsaid():
    rows = [
        {
            "scheme": "baseline", "batch": 1, "weights_bytes": 1, "predicted_weights_bytes": 1,
            "output_tokens_per_s": 1.0, "ttft_s": 0.1, "perplexity": None, "kernel": "k",
            "model": "m", "device": device, "vllm": "0.32.0",
        }
        for device in ("here", "there")
    ]  # fmt: skip
    assert "not measured" in repr(result_tables.records(rows[:1]))
    with pytest.raises(ValueError, match="m on here; m on there"):
        result_tables.records(rows)


def a_row(scheme, batch, rate, weights, predicted, **more):
    origin = {"model": "m", "device": "d", "vllm": "v", "scheme": scheme, "batch": batch}
    sizes = {"weights_bytes": weights * 2**20, "predicted_weights_bytes": predicted * 2**20}
    return origin | sizes | {"output_tokens_per_s": rate} | more


def test_schemes_side_by_side_are_differences_and_ratios_to_the_baseline():
    rows = [a_row("baseline", 1, 20.0, 300, 200), a_row("baseline", 8, 80.0, 300, 200)]
    rows.append(a_row("awq", 1, 30.0, 199, 100, kl_mean=0.125, top1=0.9, recovery=0.95))
    table = result_tables.side_by_side(rows)
    cells = [str(cell) for cell in table.rows[1]]
    assert cells[:4] == ["awq", "‹101.0 MiB›", "‹x 1.50›", "‹not measured›"]
    assert cells[4:] == ["‹0.1250 nats›", "‹90.0%›", "‹95.0%›"]
    spread = [rows[0] | {"low": 19.0, "high": 21.0}, rows[2] | {"low": 28.5, "high": 31.5}]
    assert str(result_tables.side_by_side(spread).rows[1][2]) == "‹x 1.50 (1.36 to 1.66)›"
    many = [a_row("baseline", batch, 1.0, 1, 1) for batch in (1, 8, 32, 64)]
    assert result_tables.side_by_side(many).columns[2:4] == ["speed at batch 1", "speed at batch 64"]
    shape = result_tables.side_by_side(rows, ["baseline", "fp8_kv", "awq"])
    assert [row[0] for row in shape.rows] == ["baseline", "fp8_kv", "awq"]
    assert {str(cell) for cell in shape.rows[1][1:]} == {"‹not measured here›"}
    assert [len(row) for row in shape.rows] == [len(shape.columns)] * 3
    with pytest.raises(ValueError, match="different models"):
        result_tables.side_by_side([*rows, a_row("fp8", 1, 1.0, 1, 1, device="another")])


def test_prices_are_not_set_as_a_formula():
    assert Table(["a"], [["$1 and $2"]])._repr_html_().startswith('<table class="mathjax_ignore ')
    assert Note("from $1 to $2")._repr_html_().startswith('<p class="mathjax_ignore ')
    assert Table(["a"], [["1"]])._repr_html_().startswith("<table><thead>")


def test_predictions_are_ratios_to_the_first():
    table = comparison_tables.predictions({"16 bits": 200 * 2**20, "4 bits": 80 * 2**20})
    assert table.rows == [["16 bits", "200.0 MiB", "1.00 times"], ["4 bits", "80.0 MiB", "2.50 times"]]


def test_answers_are_shown_once_for_each_machine_that_compared_them():
    def one(scheme, device, **more):
        return a_row(scheme, 1, 1.0, 1, 1) | {"device": device, "way": "a way", "model": "m"} | more

    compared = {"kl_mean": 0.02, "top1": 0.9, "recovery": 0.98, "recovery_low": 0.95, "recovery_high": 1.0}
    there = [one("int8", "GPU", recorded="gpu", prompt_tokens=n, **compared) for n in (16, 1024)]
    here = [one("baseline", "GPU"), one("int8", "GPU", kl_mean=0.03, top1=0.8), one("fp8", "GPU")]
    table = result_tables.answers_table(here, there)
    rows = [[getattr(cell, "text", cell) for cell in line] for line in table.rows]
    assert [row for row in rows if row[0] == "int8"] == [
        ["int8", "m", "GPU", "a way", "0.0300 nats", "80.0%", "-"],
        ["int8", "m", "GPU, on record", "a way", "0.0200 nats", "90.0%", "98.0% (95% to 100%)"],
    ]
    assert [isinstance(line[4], measured) for line in table.rows if line[0] == "int8"] == [True, False]
    assert ["fp8_kv", "m", *["not measured here"] * 5] in rows, "a place of its own, where no kernel is"


def test_settings_timed_with_long_prompts_are_shown_in_the_schemes_order():
    loads = {"1": (1024, 0.0296, 263.4), "64": (1024, 1.0256, 8735.1)}
    long = {
        batch: {"prompt_tokens": tokens, "ttft_s": first, "tokens_per_s": rate}
        for batch, (tokens, first, rate) in loads.items()
    }
    rows = [{"scheme": "awq", "variant": "x", "long": long}, {"scheme": "fp8", "variant": "y"},
            {"scheme": "baseline", "variant": "z", "long": long}]  # fmt: skip
    table = recorded_tables.long_prompts(rows)
    assert table.columns[2:] == [
        "1 of 1,024: TTFT",
        "1 of 1,024: tok/s",
        "64 of 1,024: TTFT",
        "64 of 1,024: tok/s",
    ]
    cells = ["30 ms", "263", "1,026 ms", "8,735"]
    assert table.rows == [["baseline", "z", *cells], ["awq", "x", *cells]]
    assert len(recorded_tables.long_prompts(recorded.recorded()).rows) >= 7


def test_a_kernel_is_compared_with_the_first_load_by_load():
    loads = [("MacheteLinearKernel", 1, 270.0, 0.02), ("MacheteLinearKernel", 64, 12_000.0, 0.05),
             ("HummingLinearKernel", 64, 15_000.0, 0.1), ("HummingLinearKernel", 1, 297.0, 0.01)]  # fmt: skip
    rows = [
        {
            "kernel": kernel,
            "batch": batch,
            "prompt_tokens": 1024,
            "output_tokens_per_s": rate,
            "ttft_s": first,
        }
        for kernel, batch, rate, first in loads
    ]
    table = recorded_tables.kernels(rows)
    heads = [f"{name}, {what}" for name in ("Machete", "Humming") for what in ("tok/s", "TTFT")]
    assert table.columns == ["requests, tokens in", *heads]
    assert table.rows == [
        ["1 of 1,024", "270", "20 ms", "297 (x 1.10)", "10 ms (x 0.50)"],
        ["64 of 1,024", "12,000", "50 ms", "15,000 (x 1.25)", "100 ms (x 2.00)"],
    ]


def test_two_runs_of_one_workload_share_a_row_and_only_a_gpu_shows_its_seconds():
    same = {"model": "m", "prompt_tokens": 8, "output_tokens": 4}
    gpu, cpu = same | {"device": "NVIDIA X", "batch": 64}, same | {"device": "a CPU", "batch": 1}
    pairs = [
        gpu | {"bench": "latency", "ratio": 0.97, "theirs_s": 0.2},
        gpu | {"bench": "generate", "ratio": 1.0312, "theirs_s": 0.25},
        cpu | {"bench": "latency", "ratio": 1.0, "theirs_s": 3.0},
        gpu | {"bench": "latency", "ratio": 1.1, "theirs_s": 0.3},
    ]
    table = recorded_tables.crosschecked(pairs)
    assert table.columns[3:] == ["generate", "latency", "throughput", "vLLM's own seconds"]
    assert table.rows == [
        ["m on NVIDIA X", "64", "8 in, 4 out", "1.031", "0.970, 1.100", "-", "0.200 to 0.300"],
        ["m on a CPU", "1", "8 in, 4 out", "-", "1.000", "-", "-"],
    ]


def test_engines_in_turn_are_counted_by_process_and_a_leak_shows():
    """Two leases may give a process the same number: the first engine begins a new series."""

    def swap(number, after, process=7):
        row = {"recorded": "gpu", "device": "GPU", "process": process, "swap": number, "model": "M"}
        row |= {"scheme": "fp8", "release_s": 2.0, "device_before_mib": 600.0, "device_open_mib": 9000.0}
        return row | {"device_after_mib": after}

    rows = [swap(1, 600.0), swap(2, 600.0), swap(1, 600.0), swap(2, 600.0), swap(3, 640.0)]
    table = recorded_tables.swaps([*rows, swap(1, 600.0, process=8)], least=2)
    assert [row[0] for row in table.rows] == ["3 engines on GPU", "2 engines on GPU"]
    assert [row[4] for row in table.rows] == ["600.0 to 640.0 MiB", "600.0 MiB"]


def test_the_recorded_engines_left_nothing_on_the_gpu():
    rows, problems = records.recorded(REFERENCE, "swaps.jsonl", ("process", "swap"))
    assert not problems
    assert all(row["device_after_mib"] <= row["device_before_mib"] + 1 for row in rows)
    table = recorded_tables.swaps(rows)
    assert int(table.rows[0][0].split()[0]) >= 20
    assert all(row[2] == row[4] for row in table.rows)
