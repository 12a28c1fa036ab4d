"""Bytes of a KV cache, what fits, and the check against what vLLM reported on GPUs."""

import dataclasses

import pytest

from helpers.base import records
from helpers.base.machine import Machine
from helpers.compare import cards, sizing
from helpers.compare.cards import CARDS, GENERATIONS, SizingError
from helpers.compare.counting import counted
from helpers.compare.options import option
from helpers.compare.sizing import MARGIN, Load
from helpers.model import shapes


def test_the_cache_that_vllm_reported_on_a_gpu_is_the_one_that_is_predicted():
    rows = records.elsewhere()[0] + records.envelopes()[0]
    found = sizing.reconcile(rows, sizing.known_models())
    assert len(found) >= 11
    for one in found:
        near = 0.07 if one.row.get("cited") else 0.013  # the log is of an older vLLM
        assert one.predicted == pytest.approx(one.row["kv_cache_tokens"], rel=near), one.row["model"]


def budget(scheme, memory, context=1, users=1, name="mistral-7b"):
    card = dataclasses.replace(CARDS["L4"], memory=memory)
    return option(counted(shapes.shape(name)), scheme, Load(card, context=context, users=users)).budget


def test_a_budget_fits_to_the_token():
    memory = CARDS["L4"].memory
    room = budget("awq", memory, name="llama-3.1-8b").tokens
    assert budget("awq", memory, room, name="llama-3.1-8b").spare >= 0
    assert budget("awq", memory, room + 1, name="llama-3.1-8b").spare < 0
    assert budget("fp8_kv", memory, 1000).kv_cache * 2 == budget("baseline", memory, 1000).kv_cache
    # A window holds no more than its width.
    assert budget("awq", memory, 32_768).request == 4096 * budget("awq", memory).token


def test_a_fit_with_less_room_than_the_rest_has_varied_is_close():
    need = budget("awq", 0, 2048).total
    for spare, said in ((MARGIN, "fits"), (MARGIN - 1, "close"), (0, "close"), (-1, "no")):
        found = dataclasses.replace(budget("awq", 0, 2048), usable=need + spare)
        assert (found.spare, found.verdict) == (spare, said)


def test_two_gpus_share_weights_and_cache_and_each_has_its_rest():
    phi, load = counted(shapes.shape("phi-2")).layout, Load(CARDS["L4"], users=8)
    one, two = (sizing.budget(phi, 1000, 2, load, gpus) for gpus in (1, 2))
    assert (two.total - one.total, two.usable) == (one.rest, 2 * one.usable)
    copied = sizing.budget(phi, 1000, 2, load, 2, copies=2.0)
    assert copied.kv_cache == 2 * one.kv_cache


def test_four_numbers_make_a_card():
    own = cards.card("48:864:362:8.9")
    assert (own.memory, own.bandwidth, own.sm) == (48e9, 864e9, 8.9)
    assert (own.rate(16), own.rate(8)) == (362e12, 724e12)
    for wrong in ("48:864:362", "48:864:x:8.9", "48:0:362:8.9", "48:864:362:89"):
        with pytest.raises(SizingError, match="memory:bandwidth:rate:capability"):
            cards.card(wrong)
    with pytest.raises(SizingError, match="There are several A100: A100 40GB, A100 80GB"):
        cards.card("A100")


@pytest.mark.parametrize(
    ("driver", "name"),
    [("Tesla T4", "T4"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA L4", "L4"), ("4090", "RTX 4090"),
     ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("H100", "H100 SXM"),
     ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"), ("rtx4090", "RTX 4090")],
)  # fmt: skip
def test_cards_are_found_as_drivers_call_them(driver, name):
    assert cards.card(driver).name == name


@pytest.mark.parametrize(
    "driver", ["NVIDIA L40", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD EPYC (2 cores)", ""]
)
def test_other_cards_are_not_taken_for_them(driver):
    with pytest.raises(SizingError, match="No data sheet"):
        cards.card(driver)


def test_every_generation_has_its_row_and_every_machine_its_generation():
    found = cards.paths(["baseline", "fp8", "int8", "awq"])
    assert found["Ampere (A100)"]["fp8"] == "FP8 weights, 16-bit arithmetic"
    assert found["Ada (L4, RTX 40)"]["fp8"] == "FP8 tensor cores, a scale a channel"
    assert found["Blackwell (B200)"]["int8"] == "-"
    for title, machine in GENERATIONS.items():
        assert cards.generation(machine) == title
    assert cards.generation(Machine("cuda", "H20", 0, sm=9.0)) == "Hopper (H100, H200)"
    assert cards.generation(Machine("cuda", "V100", 0, sm=7.0)) is None


def test_what_is_left_over_is_of_what_vllm_was_given():
    row = {"model": "Phi-2", "device": "d", "scheme": "baseline", "kv_cache_tokens": 10, "weights_bytes": 100}
    known, row = {"Phi-2": shapes.shape("phi-2")}, row | {"device_bytes": 10**10}
    whole, part, narrow = (
        sizing.reconcile([row | more], known)[0]
        for more in ({}, {"memory_bytes": 10**9, "utilization": 0.5}, {"kv_cache_dtype": "fp8"})
    )
    assert whole.rest == 0.9 * 10**10 - 100 - 10 * 327_680
    assert part.rest == 0.5 * 10**9 - 100 - 10 * 327_680
    assert narrow.token == 327_680 / 2
    assert sizing.reconcile([row | {"model": "unknown"}], known) == []
    assert len(sizing.reconcile([row, row, row | {"scheme": "fp8"}], known)) == 2
