"""The ledger: each verdict follows from its evidence, and changes with it."""

import pytest

from helpers.base import records
from helpers.base.machine import Machine
from helpers.compare import claims
from helpers.compare.claims import CLAIMS, FALSE, HOLDS, NONE, OPEN, PARTLY, VERDICTS, Evidence
from helpers.model import shapes
from helpers.model.schemes import AWQ, Scheme, Way
from tests.test_show import a_row

PHI = shapes.shape("phi-2")
CPU = Machine("cpu", "c", 0, isa=frozenset({"avx512f"}))

GOOD = "Production deployment, good accuracy"
WRITTEN_OUT = next(way.name for way in AWQ.ways if way.expanded)


def seen(*rows, others=None):
    others = records.elsewhere()[0] if others is None else others
    return Evidence(CPU, PHI, list(rows), [row for row in others if row.get("cited")])


def verdict(said, evidence):
    [claim] = [claim for claim in CLAIMS if claim.said.startswith(said)]
    return claim.check(evidence)


def test_every_claim_has_evidence_and_a_verdict_also_without_records():
    for evidence in (seen(), seen(others=[])):
        found = claims.findings(evidence)
        assert len(found) == len(CLAIMS) >= 20
        assert {one.verdict for one in found.values()} <= {*VERDICTS}
        assert all(len(one.evidence) > 10 for one in found.values())


def test_nothing_measured_is_not_a_verdict():
    for said in ("Start with FP8", "Use W4A16 for maximum", "Expected speedup", "Baseline only", GOOD):
        assert verdict(said, seen()).verdict == OPEN


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
    found = verdict("Expected speedup", seen(*rows))
    assert found.verdict == expected
    assert found.measured
    assert "m on d " in found.evidence


def test_what_ran_in_16_bits_is_no_evidence_of_speed():
    rows = [a_row("baseline", 1, 1.0, 1, 1), a_row("awq", 1, 9.0, 1, 1)]
    rows[1]["way"] = WRITTEN_OUT
    assert verdict("Use W4A16 for maximum", seen(*rows)).verdict == OPEN
    assert verdict("W4A16 requires pre-quantized", seen(*rows)).verdict == PARTLY


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
        assert verdict(said, seen(*rows)).verdict == expected


def test_a_percent_more_or_less_turns_no_verdict_into_its_opposite():
    opposite = {HOLDS: FALSE, FALSE: HOLDS}
    for rate in (0.5 + step / 100 for step in range(300)):
        for said in ("Expected speedup", "Use W4A16 for maximum", "Quantization is production"):
            one, other = (
                verdict(
                    said,
                    seen(a_row("baseline", 1, 1.0, 1, 1), *(a_row(n, 1, r, 1, 1) for n in ("fp8", "awq"))),
                )
                for r in (rate, 1.01 * rate)
            )
            assert opposite.get(one.verdict) != other.verdict, (said, rate)


def test_arithmetic_on_the_logs_own_figures_has_no_verdict():
    for said in ("Cost: $26.40/day", "$324/month"):
        assert verdict(said, seen()).verdict == NONE
    assert "$26.40 x 30 = $792" in verdict("Cost: $26.40/day", seen()).evidence


def test_the_memory_of_the_failure_is_told_apart():
    """0.9 of 22.03 GiB were the first engine's; what PyTorch had beyond was the second model."""
    assert (
        "was given 19.83, so 1.6 GiB at least were the second model" in verdict("Your GPU", seen()).evidence
    )


def test_the_logs_measurements_hold_and_a_changed_one_does_not():
    for said in ("Loading model weights", "Throughput: 42.0", "# GPU blocks"):
        assert verdict(said, seen()).verdict == HOLDS
    [row] = [row for row in records.elsewhere()[0] if row.get("cited")]
    wrong = row | {"output_tokens_per_s": 90.0, "kv_cache_tokens": 90_000, "weights_bytes": 9 * 2**30}
    for said in ("Loading model weights", "Throughput: 42.0", "# GPU blocks"):
        assert verdict(said, seen(others=[wrong])).verdict == FALSE


def test_hardware_claims_follow_the_schemes(monkeypatch):
    assert verdict("L4, A100, H100", seen()).verdict == PARTLY
    assert verdict("Your GPU", seen()).verdict == FALSE
    emulated = Way("FP8 emulated", lambda machine: True, "", "")
    monkeypatch.setattr(claims, "FP8", Scheme("fp8", "FP8", 8, (emulated,)))
    assert verdict("L4, A100, H100", seen()).verdict == FALSE
    assert verdict("Your GPU", seen()).verdict == HOLDS


def test_recovery_decides_about_accuracy():
    good, bad = a_row("fp8", 1, 1, 1, 1, recovery=0.99), a_row("fp8", 1, 1, 1, 1, recovery=0.5)
    assert verdict(GOOD, seen(good)).verdict == HOLDS
    assert verdict(GOOD, seen(bad)).verdict == PARTLY
    assert "2,780M weights" in verdict(GOOD, seen(bad)).evidence
    unsure = bad | {"recovery": 0.94, "recovery_high": 0.98}  # its interval does not say that much is lost
    assert verdict(GOOD, seen(unsure)).verdict == HOLDS


def test_the_table_marks_what_this_machine_measured():
    found = claims.findings(seen())
    table = claims.table(found)
    for (claim, finding), row in zip(found.items(), table.rows, strict=True):
        assert str(row[0]) == claim.said
        assert str(row[2]).startswith("‹") == str(row[3]).startswith("‹") == finding.measured
    parts = [
        claims.table(found, *names).rows
        for names in (("Selection", "Reco"), ("Example",), ("Cost", "Summary"))
    ]
    assert sum(map(len, parts)) == len(table.rows)
    assert max(map(len, parts)) <= 12


def test_the_deprecation_is_looked_up_in_the_vllm_that_is_installed():
    found = verdict("os.getenv", seen())
    assert found.verdict == PARTLY
    assert "fp8_per_tensor" in found.evidence
