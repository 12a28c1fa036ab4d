"""The roofline against hand-worked cases."""

import dataclasses

import pytest

from helpers.base.machine import Machine, detect
from helpers.compare import bandwidth, cards, comparison_tables, roofline
from helpers.compare.roofline import Step
from helpers.model import shapes, sizes
from helpers.model.layout import Cache, Layout

PHI = shapes.shape("phi-2")


def test_a_step_reads_all_but_an_embedding_that_is_not_the_head():
    counts = sizes.layout(PHI.folder)
    step = roofline.step(PHI, "baseline")
    assert step.weights == 2 * (counts.total - counts.count("embedding"))
    assert step.operations == 2 * (counts.total - counts.count("embedding"))
    tied = shapes.shape("qwen2.5-1.5b")
    assert roofline.step(tied, "baseline").weights == 2 * sizes.layout(tied.folder).total


def test_bytes_bind_below_the_crossover_and_arithmetic_above():
    step = Step(weights=1000, operations=20, layout=Layout((), ()))
    assert step.bound(1, bandwidth=100, rate=1000) == pytest.approx(1 / 10)
    assert step.crossover(100, 1000) == 500
    assert step.seconds(500, 100, 1000) == pytest.approx(10)
    assert step.seconds(1000, 100, 1000) == pytest.approx(20)
    cached = Step(weights=1000, operations=20, layout=Layout((), (Cache(values=1),)), value_bytes=1)
    assert cached.seconds(1, 100, context=50) == pytest.approx((1000 + 50) / 100)


@pytest.mark.parametrize("name", ["L4", "H100 SXM", "H200"])
def test_w4a16_crosses_at_a_quarter_and_w8a8_where_16_bits_do(name):
    card, model = cards.card(name), shapes.shape("mistral-7b")

    def crossing(scheme):
        bits = roofline.arithmetic_bits(scheme, card.machine)
        return roofline.step(model, scheme).crossover(card.bandwidth, card.rate(bits))

    assert crossing("awq") / crossing("baseline") == pytest.approx(0.27, abs=0.02)
    assert crossing("fp8") / crossing("baseline") == pytest.approx(1.02, abs=0.02)


def test_a_cpu_that_widens_the_weights_reads_four_bytes_each():
    narrow = Machine("cpu", "c", 0, isa=frozenset({"avx2"}))
    assert roofline.step(PHI, "baseline", narrow).weights == 2 * roofline.step(PHI, "baseline").weights
    assert roofline.step(PHI, "awq", narrow) == roofline.step(PHI, "baseline", narrow)  # written out
    wide = Machine("cpu", "c", 0, isa=frozenset({"avx512f"}))
    assert roofline.step(PHI, "awq", wide) == roofline.step(PHI, "awq")


def test_the_lessons_of_one_run_speak_of_the_same_limits(tmp_path, monkeypatch):
    rates = iter([1.0, 2.0, 3.0, 4.0])
    for measure in ("copy_bandwidth", "matmul_rate"):
        monkeypatch.setattr(roofline, measure, lambda **_: next(rates))
    here, other = detect(), dataclasses.replace(detect(), name="another")
    assert roofline.here(here, tmp_path) == roofline.here(here, tmp_path) == roofline.Limits(1.0, 2.0)
    assert roofline.here(other, tmp_path) == roofline.Limits(3.0, 4.0)


def test_this_machine_multiplies_something():
    if detect().kind == "cpu":
        assert bandwidth.matmul_rate(dtype="float32") > 1e6


def test_the_batches_at_which_a_scheme_is_faster_and_slower():
    rates = {
        "baseline": {1: 100.0, 10: 1000.0, 100: 5000.0},
        "awq": {1: 200.0, 10: 1020.0, 100: 2500.0},
        "fp8": {1: 50.0, 10: 400.0},
        "int8": {1: 101.0, 10: 990.0},
    }
    rows = [
        {"scheme": scheme, "batch": batch, "output_tokens_per_s": rate, "way": ""}
        for scheme, found in rates.items()
        for batch, rate in found.items()
    ]
    rows += [  # its slowest runs were slower than the baseline
        {"scheme": "fp8_file", "batch": 10, "output_tokens_per_s": 1500.0, "low": 900.0, "way": ""}
    ]
    table = comparison_tables.sides(rows, ["awq", "fp8", "int8", "fp8_file", "fp8_kv"])
    # From twice to half the baseline's over two decades; what lies between is noise.
    assert [[str(cell).strip("‹›") for cell in row[1:]] for row in table.rows] == [
        ["1", "10", "100"],
        ["none", "none", "1, 10"],
        ["none", "1, 10", "none"],
        ["none", "10", "none"],
        ["no kernel timed here"] * 3,
    ]
