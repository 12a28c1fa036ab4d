"""The ledger: each verdict follows from its evidence, and changes with it."""

import pytest

from helpers.base import records
from helpers.base.machine import Machine
from helpers.compare import claims
from helpers.compare.claims import CLAIMS, FALSE, HOLDS, OPEN, PARTLY, VERDICTS, Evidence
from helpers.model import shapes
from helpers.model.schemes import AWQ, Scheme, Way
from tests.test_show import a_row

PHI = shapes.shape("phi-2")
CPU = Machine("cpu", "c", 0, isa=frozenset({"avx512f"}))

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
    for said in (
        "Start with FP8",
        "W4A16 for maximum",
        "Expected speedup",
        "Baseline only",
        "FP8: good accuracy",
    ):
        assert verdict(said, seen()).verdict == OPEN


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([2.1, 2.4], HOLDS), ([2.1, 1.2], PARTLY), ([1.4, 0.9], FALSE)],
)
def test_another_measurement_is_another_verdict(rates, expected):
    rows = [a_row("baseline", batch, 1.0, 1, 1) for batch in (1, 8)]
    rows += [a_row("fp8", batch, rate, 1, 1) for batch, rate in zip((1, 8), rates, strict=True)]
    found = verdict("Expected speedup", seen(*rows))
    assert found.verdict == expected
    assert found.measured
    assert "on d" in found.evidence


def test_what_ran_in_16_bits_is_no_evidence_of_speed():
    rows = [a_row("baseline", 1, 1.0, 1, 1), a_row("awq", 1, 9.0, 1, 1)]
    rows[1]["way"] = WRITTEN_OUT
    assert verdict("W4A16 for maximum", seen(*rows)).verdict == OPEN
    assert verdict("W4A16 requires a pre-quantized", seen(*rows)).verdict == PARTLY


def test_always_use_it_is_false_where_16_bits_win_everywhere():
    rows = [a_row("baseline", 1, 1.0, 1, 1), a_row("fp8", 1, 0.1, 1, 1)]
    assert verdict("Quantization is production", seen(*rows)).verdict == FALSE
    assert (
        verdict("Quantization is production", seen(rows[0], rows[1] | {"output_tokens_per_s": 2.0})).verdict
        == "holds"
    )


def test_the_logs_measurements_hold_and_a_changed_one_does_not():
    for said in ("Loading model weights", "Throughput: 42.0", "# GPU blocks"):
        assert verdict(said, seen()).verdict == HOLDS
    [row] = [row for row in records.elsewhere()[0] if row.get("cited")]
    wrong = row | {"output_tokens_per_s": 90.0, "kv_cache_tokens": 90_000, "weights_bytes": 9 * 2**30}
    for said in ("Loading model weights", "Throughput: 42.0", "# GPU blocks"):
        assert verdict(said, seen(others=[wrong])).verdict == FALSE


def test_hardware_claims_follow_the_schemes(monkeypatch):
    assert verdict("FP8 needs", seen()).verdict == PARTLY
    assert verdict("Out of memory", seen()).verdict == FALSE
    emulated = Way("FP8 emulated", lambda machine: True, "", "")
    monkeypatch.setattr(claims, "FP8", Scheme("fp8", "FP8", 8, (emulated,)))
    assert verdict("FP8 needs", seen()).verdict == FALSE
    assert verdict("Out of memory", seen()).verdict == HOLDS


def test_recovery_decides_about_accuracy():
    good, bad = a_row("fp8", 1, 1, 1, 1, recovery=0.99), a_row("fp8", 1, 1, 1, 1, recovery=0.5)
    assert verdict("FP8: good accuracy", seen(good)).verdict == HOLDS
    assert verdict("FP8: good accuracy", seen(bad)).verdict == PARTLY


def test_the_table_marks_what_this_machine_measured():
    found = claims.findings(seen())
    table = claims.table(found)
    for (claim, finding), row in zip(found.items(), table.rows, strict=True):
        assert str(row[0]) == claim.said
        assert str(row[3]).startswith("‹") == finding.measured


def test_the_deprecation_is_looked_up_in_the_vllm_that_is_installed():
    found = verdict("QUANTIZATION", seen())
    assert found.verdict == PARTLY
    assert "fp8_per_tensor" in found.evidence
