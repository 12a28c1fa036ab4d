"""The ledger: each verdict follows from its evidence, and changes with it."""

import importlib.util
from pathlib import Path

import pytest

from helpers.base import records
from helpers.base.machine import GIB
from helpers.compare import cards, claims, roofline, sizing
from helpers.compare.claims import CLAIMS, FALSE, HOLDS, OPEN, PARTLY, VERDICTS
from helpers.compare.counting import counted
from helpers.compare.options import option
from helpers.compare.sizing import Load
from helpers.model import shapes, sizes
from helpers.model.schemes import AWQ, SchemeError
from tests.test_show import a_row

PHI = shapes.shape("phi-2")
GOOD = "Production deployment, good accuracy"
WRITTEN_OUT = next(way.name for way in AWQ.ways if way.expanded)


def verdict(said, *rows):
    ledger = claims.findings(PHI, list(rows), [])
    [found] = [one for claim, one in ledger.items() if claim.said.startswith(said)]
    return found


def evidence(said):
    return verdict(said).evidence


def test_every_claim_has_evidence_and_a_verdict_also_without_records():
    found = claims.findings(PHI, [], [])
    assert len(found) == len(CLAIMS) >= 20
    assert {one.verdict for one in found.values()} <= {*VERDICTS}
    assert all(len(one.evidence) > 10 for one in found.values())
    assert {one.verdict for claim, one in found.items() if claim.check} == {OPEN}, (
        "nothing measured is no verdict"
    )


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([2.1, 2.4], HOLDS), ([2.1, 1.9], HOLDS), ([1.99, 1.95], PARTLY), ([2.1, 1.2], PARTLY),
        ([1.4, 1.9], PARTLY), ([1.4, 0.9], FALSE),
    ],
)  # fmt: skip
def test_another_measurement_is_another_verdict(rates, expected):
    rows = [a_row("baseline", batch, 1.0, 1, 1) for batch in (1, 8)]
    rows += [a_row("fp8", batch, rate, 1, 1) for batch, rate in zip((1, 8), rates, strict=True)]
    found = verdict("Expected speedup", *rows)
    assert found.verdict == expected
    assert "m on d " in found.evidence


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"fp8": 0.1}, FALSE), ({"fp8": 0.97}, PARTLY), ({"fp8": 1.03}, PARTLY), ({"fp8": 2.0}, HOLDS),
        ({"fp8": 0.1, "fp8_kv": 2.0}, FALSE), ({"fp8": 0.9, "awq": 1.2}, HOLDS),
    ],
)  # fmt: skip
def test_always_use_it_takes_more_than_noise_and_weights_of_fewer_bits(rates, expected):
    """An FP8 cache beside 16-bit weights is no such case, and within a few percent nobody wins."""
    rows = [a_row("baseline", 1, 1.0, 1, 1), *(a_row(name, 1, rate, 1, 1) for name, rate in rates.items())]
    for said in ("Quantization is production", "Baseline only"):
        assert verdict(said, *rows).verdict == expected


def test_what_the_runs_do_not_tell_apart_is_no_win_and_what_is_published_counts():
    rows = [a_row("baseline", 1, 1.0, 1, 1), a_row("awq", 1, 1.2, 1, 1, low=0.9, high=1.3)]
    assert verdict("Quantization is production", *rows).verdict == PARTLY
    found = verdict("Use W4A16 for maximum", *rows)
    assert found.verdict == PARTLY, "3.3 times are 70 % saved, 3.7 times 73 %"
    assert "published, Mistral-7B on L4 3.30" in found.evidence


def test_a_percent_more_or_less_turns_no_verdict_into_its_opposite():
    opposite, base = {HOLDS: FALSE, FALSE: HOLDS}, a_row("baseline", 1, 1.0, 1, 1)
    for rate in (0.5 + step / 100 for step in range(300)):
        for said in ("Expected speedup", "Use W4A16 for maximum", "Quantization is production"):
            one, other = (
                verdict(said, base, *(a_row(name, 1, times, 1, 1) for name in ("fp8", "awq")))
                for times in (rate, 1.01 * rate)
            )
            assert opposite.get(one.verdict) != other.verdict, (said, rate)


def test_recovery_decides_about_accuracy():
    good, bad = (a_row("fp8", 1, 1, 1, 1, model=PHI.title, recovery=kept) for kept in (0.99, 0.5))
    assert verdict(GOOD, good).verdict == HOLDS
    assert verdict(GOOD, bad).verdict == PARTLY
    assert "2,780M weights" in verdict(GOOD, bad).evidence
    for high, expected in ((1.01, HOLDS), (0.98, PARTLY)):  # whether its interval says that something is lost
        assert verdict(GOOD, good, bad | {"recovery": 0.94, "recovery_high": high}).verdict == expected
    assert verdict(GOOD, bad | {"model": "another"}).verdict == OPEN


def test_the_table_marks_what_this_machine_measured():
    found = claims.findings(PHI, [], [])
    table = claims.table(found)
    for claim, row in zip(found, table.rows, strict=True):
        assert str(row[0]) == claim.said
        assert str(row[2]).startswith("‹") == str(row[3]).startswith("‹") == bool(claim.check)
    parts = [
        claims.table(found, *names).rows
        for names in (("Selection", "Reco"), ("Example",), ("Cost", "Summary"))
    ]
    assert sum(map(len, parts)) == len(table.rows)
    assert max(map(len, parts)) <= 12


# -- what stands in the data, worked out anew ---------------------------------------------------------------


def test_sizes_are_those_of_the_configs():
    def smaller(scheme, folder):
        plain, found = (sizes.predicted_weights_bytes(name, folder) for name in ("baseline", scheme))
        return plain / found

    for said, scheme in (("2.0x", "fp8"), ("3.7x", "awq")):
        every = [smaller(scheme, shapes.shape(name).folder) for name in shapes.CONFIGS]
        assert f"whole models {min(every):.2f} to {max(every):.2f}" in evidence(said)
    factor = smaller("fp8", PHI.folder)
    assert f"{factor:.2f} times smaller, a reduction of {1 - 1 / factor:.0%}" in evidence("Memory savings")


def test_the_logs_three_measurements_hold():
    [row] = [row for row in records.elsewhere()[0] if row.get("cited")]
    size = sizes.predicted_weights_bytes("baseline", PHI.folder)
    assert row["weights_bytes"] == pytest.approx(size, rel=0.005)
    assert f"{size / GIB:.2f} GiB ({size / 1e9:.2f} GB)" in evidence("Loading model weights")
    moved = roofline.step(PHI, "baseline").weights * row["output_tokens_per_s"]
    assert f"{moved / 1e9:.0f} GB/s of weights read, {moved / 300e9:.0%}" in evidence("Throughput: 42.0")
    [found] = sizing.reconcile([row], {row["model"]: PHI})
    said = evidence("# GPU blocks")
    assert f"x {found.token:,} bytes are {found.cache / GIB:.2f} GiB" in said
    assert f"leaves {found.rest / GIB:.2f} GiB" in said


def test_what_fits_an_l4_is_what_is_counted():
    mistral, load = counted(shapes.shape("mistral-7b")), Load(cards.card("L4"), context=2048, users=8)
    plain, four = (option(mistral, name, load).budget for name in ("baseline", "awq"))
    assert plain.verdict == four.verdict == "fits"
    weights = f"{plain.weights / 1e9:.1f} GB of weights; with 8 requests of 2,048 tokens "
    assert f"{weights}{plain.total / GIB:.1f} of" in evidence("Requires A100")
    assert f"{four.weights / 1e9:.1f} GB of weights, not 7; fits" in evidence("Fits on")
    assert f"room for {four.tokens:,} tokens" in evidence("Fits on")
    requests = f"{plain.tokens // 2048} requests at once, in four bits for {four.tokens // 2048}"
    assert requests in evidence("Savings")


def test_hardware_is_what_the_schemes_say():
    bits = {name: roofline.arithmetic_bits("fp8", cards.card(name).machine)
            for name in ("L4", "H100", "A100 80GB", "T4")}  # fmt: skip
    assert bits == {"L4": 8, "H100": 8, "A100 80GB": 16, "T4": 16}
    with pytest.raises(SchemeError, match=r"need SM 7\.5"):
        AWQ.way(cards.card("V100").machine)
    allocated, share = 21.44, 0.9 * cards.card("L4").memory / GIB
    said = evidence("Your GPU")
    assert f"given {share:.2f}, so {allocated - share:.1f} GiB" in said


def test_the_deprecation_stands_in_the_vllm_that_is_installed():
    package = Path(importlib.util.find_spec("vllm").origin).parent
    source = (package / "model_executor/model_loader/weight_utils.py").read_text()
    assert "use --quantization fp8_per_tensor instead" in source
    assert "fp8_per_tensor" in evidence("os.getenv")
