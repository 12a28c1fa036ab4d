"""The roofline against hand-worked cases, and the rules that name a regime."""

import math

import pytest

from helpers.base.machine import Machine, detect
from helpers.compare import bandwidth, cards, roofline
from helpers.compare.roofline import Hardware, Step
from helpers.model import shapes, sizes
from helpers.model.layout import Cache, Layout
from helpers.model.schemes import AWQ
from tests.test_show import a_row

PHI = shapes.shape("phi-2")


def test_a_step_reads_all_but_an_embedding_that_is_not_the_head():
    counts = sizes.layout(PHI.folder)
    step = roofline.step(PHI, "baseline")
    assert step.weights == 2 * (counts.total - counts.embedding)
    assert step.operations == 2 * (counts.total - counts.embedding)
    tied = shapes.shape("qwen2.5-1.5b")
    assert roofline.step(tied, "baseline").weights == 2 * sizes.layout(tied.folder).total


def test_the_logs_tokens_are_three_quarters_of_an_l4s_bandwidth():
    bound = roofline.step(PHI, "baseline").bound(1, cards.card("L4").bandwidth)
    assert 42.0 / bound == pytest.approx(0.74, abs=0.01)


def test_bytes_bind_below_the_crossover_and_arithmetic_above():
    step = Step(weights=1000, operations=20, layout=Layout((), ()))
    assert step.bound(1, bandwidth=100, rate=1000) == pytest.approx(1 / 10)
    assert step.crossover(100, 1000) == 500
    assert step.seconds(500, 100, 1000) == pytest.approx(10)
    assert step.seconds(1000, 100, 1000) == pytest.approx(20)


def test_a_context_moves_the_crossover_up_and_may_remove_it():
    step = Step(weights=1000, operations=20, layout=Layout((), (Cache(values=1),)), value_bytes=1)
    assert step.crossover(100, 1000, context=1) == pytest.approx(1000 / 100 / (0.02 - 0.01))
    assert step.crossover(100, 1000, context=2) == math.inf


@pytest.mark.parametrize("name", ["L4", "H100 SXM", "H200"])
def test_w4a16_crosses_at_a_quarter_and_w8a8_where_16_bits_do(name):
    card, model = cards.card(name), shapes.shape("mistral-7b")

    def crossing(scheme):
        bits = roofline.arithmetic_bits(scheme, card.machine)
        return roofline.step(model, scheme).crossover(card.bandwidth, card.rate(bits))

    assert crossing("awq") / crossing("baseline") == pytest.approx(0.27, abs=0.02)
    assert crossing("fp8") / crossing("baseline") == pytest.approx(1.02, abs=0.02)


def test_fp8_on_an_a100_is_multiplied_in_16_bits():
    assert roofline.arithmetic_bits("fp8", cards.card("A100 80GB").machine) == 16
    assert roofline.arithmetic_bits("fp8", cards.card("L4").machine) == 8
    assert roofline.arithmetic_bits("int8", cards.card("A100 80GB").machine) == 8


@pytest.mark.parametrize(
    ("share", "batch", "name"), [(0.9, 1, "memory"), (0.1, 1, "overhead"), (0.9, 4000, "compute")]
)
def test_a_step_is_bound_by_what_explains_half_of_it(share, batch, name):
    machine, work = roofline.of_card(cards.card("L4")), roofline.step(PHI, "baseline")
    rate = share * work.bound(batch, machine.bandwidth, machine.rates[16])
    found = roofline.regime({"scheme": "baseline", "batch": batch, "output_tokens_per_s": rate}, PHI, machine)
    assert found.name == name
    assert max(found.memory, found.compute) == pytest.approx(share)


def test_a_cpu_that_widens_the_weights_reads_four_bytes_each():
    narrow = Machine("cpu", "c", 0, isa=frozenset({"avx2"}))
    assert roofline.step(PHI, "baseline", narrow).weights == 2 * roofline.step(PHI, "baseline").weights
    assert roofline.step(PHI, "awq", narrow) == roofline.step(PHI, "baseline", narrow)  # written out
    wide = Machine("cpu", "c", 0, isa=frozenset({"avx512f"}))
    assert roofline.step(PHI, "awq", wide) == roofline.step(PHI, "awq")


def test_what_an_engine_reached_counts_where_the_machine_is_busy_now(monkeypatch):
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(roofline, "matmul_rate", lambda dtype: 1.0)
    machine = Machine("cpu", "c", 0, isa=frozenset({"avx512f"}))
    rows = [a_row("baseline", 1, 2.0, 1, 1), a_row("baseline", 32, 40.0, 1, 1)]
    step = roofline.step(PHI, "baseline")
    found = roofline.here(machine, rows, PHI)
    assert found.bandwidth == 2.0 * step.weights
    assert found.rates[16] == pytest.approx(40.0 * step.operations)
    shares = [roofline.regime(row, PHI, found) for row in rows]
    assert max(share.memory for share in shares) <= 1.0001
    assert max(share.compute for share in shares) <= 1.0001


def test_the_gain_that_is_allowed_is_that_of_the_way_a_record_ran():
    machine = Hardware("m", 100, {16: 1000}, "test")
    names = ("W4A16 kernel of the CPU (CPUWNA16)", next(w.name for w in AWQ.ways if w.expanded))
    rows = [a_row("awq", 1, 1.0, 1, 1, way=name) for name in names]
    base = a_row("baseline", 1, 1.0, 1, 1)
    assert set(roofline.allowed([base, rows[0]], PHI, machine)) == {"awq"}
    assert roofline.allowed([base, rows[1]], PHI, machine) == {}  # written out
    assert roofline.allowed(rows[:1], PHI, machine) == {}  # no baseline
    row = a_row("fp8", 1, 1.0, 1, 1, way="FP8 tensor cores")
    assert roofline.recorded_bits(row) == 8
    assert roofline.allowed([base, row], PHI, machine) == {}  # no rate for 8 bits is known


def test_four_bits_may_gain_the_ratio_of_the_bytes_and_nothing_beyond_the_baselines_crossover():
    machine = roofline.of_card(cards.card("A100 80GB"))
    base, four = roofline.step(PHI, "baseline"), roofline.step(PHI, "awq")
    own = four.crossover(machine.bandwidth, machine.rates[16])
    last = base.crossover(machine.bandwidth, machine.rates[16])
    rows = [a_row(name, batch, 1.0, 1, 1, prompt_tokens=0) for name in ("baseline", "awq")
            for batch in (1, 4 * round(last))]  # fmt: skip
    gains = roofline.allowed(rows, PHI, machine)["awq"]
    assert next(iter(gains.values())) == pytest.approx(base.weights / four.weights)
    for batch, gain in gains.items():
        full = gain == pytest.approx(base.weights / four.weights)
        assert full if batch <= own else not full
        assert (gain == pytest.approx(1)) == (batch >= last)


def test_this_machine_multiplies_something():
    if detect().kind == "cpu":
        assert bandwidth.matmul_rate(0.05) > 1e6


def test_recorded_hardware_is_measured_bandwidth_and_a_data_sheets_rates():
    rows = [a_row("baseline", 1, 1.0, 1, 1, device="NVIDIA H200", copy_bandwidth=4.1e12)]
    found = roofline.of_rows(rows, PHI)
    assert found.bandwidth == 4.1e12
    assert found.rates == {16: 989e12, 8: 1979e12}


def test_a_machine_without_a_data_sheet_is_what_its_records_reached():
    rows = [a_row("baseline", 1, 2.0, 1, 1, device="another GPU")]
    found, step = roofline.of_rows(rows, PHI), roofline.step(PHI, "baseline")
    assert found.bandwidth == 2.0 * step.weights
    assert found.rates == {16: 2.0 * step.operations}
    assert roofline.of_rows([rows[0] | {"copy_bandwidth": 1e15}], PHI).bandwidth == 1e15


def test_the_side_of_the_crossover_a_scheme_is_on():
    def rows(scheme, rates):
        return [
            {"scheme": scheme, "batch": b, "output_tokens_per_s": rate, "way": ""}
            for b, rate in rates.items()
        ]

    base = rows("baseline", {1: 100.0, 10: 1000.0, 100: 5000.0})
    side = roofline.side(base + rows("awq", {1: 200.0, 10: 1020.0, 100: 2500.0}), "awq")
    assert (side.faster, side.equal, side.slower) == ([1], [10], [100])
    # From 1.02 to 0.5 of the baseline's: the line meets 1 after log(1.02)/log(1.02/0.5) of a decade.
    assert side.crosses == pytest.approx(10 * 10 ** (math.log(1.02) / math.log(1.02 / 0.5)))
    always = roofline.side(base + rows("fp8", {1: 50.0, 10: 400.0}), "fp8")
    assert (always.faster, always.slower, always.crosses) == ([], [1, 10], None)
    noise = roofline.side(base + rows("int8", {1: 101.0, 10: 990.0}), "int8")
    assert (noise.equal, noise.crosses) == ([1, 10], None)
    assert roofline.side(base, "awq") is None
