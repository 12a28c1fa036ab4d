"""What others published, as data: every line has its source, and an estimate stands beside it."""

import pytest

from helpers.compare import cards, options, published
from helpers.compare.counting import counted
from helpers.compare.sizing import Load
from helpers.model import lookup, schemes


def test_every_line_has_a_source_its_conditions_and_figures_that_can_be():
    assert set(published.kept()) >= {"baseline", "fp8", "int8", "awq", "nvfp4", "mxfp4", "fp8_kv"}
    for name, line in published.kept().items():
        assert name in schemes.EVERY
        assert line.says
        assert line.source or not line.loss
    for line in published.figures()["speed"]:
        assert line["source"]
        assert line["conditions"]
        assert line["scheme"] in schemes.EVERY


def test_a_line_is_of_a_card_and_of_its_variants():
    one = {"card": "H100"}
    assert [published.of(one, name) for name in ("H100", "H100 SXM", "H200")] == [True, True, False]
    assert not published.of({"card": "L4"}, "L40S")


def estimate(line, batch):
    load = Load(cards.card(line["card"]), 1, 512, batch)
    found = {one.scheme: one for one in options.options(counted(lookup.sized(line["shape"])), load)}
    return found[line["scheme"]]


def test_an_l4_does_what_was_estimated_for_it():
    """The seed's own GPU and model, by somebody else: the estimate is carried over from the H200."""
    (line,) = (line for line in published.figures()["speed"] if line["card"] == "L4")
    for batch in (line["batch"], line["to_batch"]):
        assert estimate(line, batch).together.ratio == pytest.approx(line["ratio"], rel=0.15)
    assert estimate(line, 8).per_s == pytest.approx(452.3, rel=0.15)  # the most it gave, from the same page


def test_what_is_published_of_other_cards_is_above_the_estimate_by_less_than_a_third():
    """Another engine on the 4090, GPTQ on the H100: the estimate is the more careful of the two."""
    for line in published.figures()["speed"]:
        if "shape" in line and line["card"] != "L4":
            assert 1 <= line["ratio"] / estimate(line, line["batch"]).alone.ratio < 1.34, line
