"""Dollars a token, the GPUs a load needs, and the rules of the recommendation."""

import pytest

from helpers.base.parameters import ParameterError
from helpers.compare import cards, cost, options
from helpers.compare.cost import CostError
from helpers.compare.counting import counted
from helpers.compare.sizing import Load
from helpers.model import shapes
from helpers.model.schemes import AWQ
from tests.test_show import a_row

LOAD = {"context": 2048, "most_tpot_s": 0.1, "utilization": 0.5}
MISTRAL = counted(shapes.shape("mistral-7b"))
WRITTEN_OUT = next(way.name for way in AWQ.ways if way.expanded)
PRICES = {"L4": 10.80, "A100 80GB": 26.40}


def test_a_million_tokens():
    assert cost.per_million(3.6, 1000) == pytest.approx(1.0)  # 3.6 million tokens an hour
    assert cost.per_million(3.6, 1000, 0.25) == pytest.approx(4.0)


@pytest.mark.parametrize("arguments", [(0, 1), (1, -5), (1, 1, 1.5), (float("nan"), 1), ("2", 1)])
def test_a_cost_without_a_price_is_refused_in_words(arguments):
    with pytest.raises(ParameterError, match="must be a number from"):
        cost.per_million(*arguments)


def test_offers_are_whole_gpus_that_hold_and_serve_the_load():
    found = cost.offers(
        MISTRAL, PRICES, ["baseline", "awq"], requests_per_s=2, tokens_per_request=200, **LOAD
    )
    assert [offer.per_day for offer in found] == sorted(offer.per_day for offer in found)
    for offer in found:
        assert offer.count * offer.tokens_per_s * LOAD["utilization"] >= 400
        assert (offer.count - 1) * offer.tokens_per_s * LOAD["utilization"] < 400
        assert offer.per_million == pytest.approx(offer.per_day / (400 * 86400) * 1e6)
    offer = next(o for o in found if (o.card, o.scheme) == ("L4", "awq"))
    load = Load(cards.card("L4"), context=2048, users=offer.batch, prompts=1848 / 200)
    way = next(one for one in options.options(MISTRAL, load) if one.scheme == "awq")
    assert offer.tokens_per_s == pytest.approx(way.per_s)  # what advise says of as many at once


def test_the_least_rent_climbs_in_steps_of_whole_gpus():
    found = cost.offers(MISTRAL, PRICES, ["awq"], requests_per_s=1, tokens_per_request=200, **LOAD)
    one = next(offer for offer in found if offer.card == "L4")
    limit = 0.5 * one.tokens_per_s / 200
    rents = cost.least_rents(found, [limit, 1.01 * limit, 2.02 * limit], 200, 0.5)["awq"]
    assert rents == [10.80, 21.60, 26.40]  # three L4s are dearer than one A100


def test_long_prompts_need_more_gpus_than_long_answers():
    """The same tokens a second: a quarter of the answers' length means four times the prompts."""
    load = {"prices_per_day": {"L4": 10.80}, "names": ["awq"]} | LOAD
    [short] = cost.offers(MISTRAL, requests_per_s=8, tokens_per_request=50, **load)
    [long] = cost.offers(MISTRAL, requests_per_s=2, tokens_per_request=200, **load)
    [all_answer] = cost.offers(MISTRAL, requests_per_s=2, tokens_per_request=2048, **load)
    assert short.tokens_per_s < long.tokens_per_s < all_answer.tokens_per_s
    assert short.count > long.count


def test_an_offer_takes_as_many_at_once_as_memory_and_the_longest_tpot_allow():
    def batch(**changed):
        load = LOAD | {"requests_per_s": 2, "tokens_per_request": 200} | changed
        [offer] = cost.offers(MISTRAL, {"L4": 10.80}, ["awq"], **load)
        return offer.batch or offer.why_not

    def token_s(users):
        load = Load(cards.card("L4"), context=2048, users=users, prompts=1848 / 200)
        return users / next(one for one in options.options(MISTRAL, load) if one.scheme == "awq").per_s

    room = options.option(MISTRAL, "awq", Load(cards.card("L4"), context=2048)).users
    assert batch(most_tpot_s=10) == room  # memory decides
    took = batch(most_tpot_s=0.05)  # time does
    assert took < room
    assert token_s(took) <= 0.05 < token_s(took + 1)
    assert batch(most_tpot_s=10, context=64, tokens_per_request=64) == options.MOST_AT_ONCE
    assert "a token takes at least" in batch(most_tpot_s=0.001)


def test_served_tokens_have_their_prompts_read():
    row = a_row("baseline", 4, 100.0, 1, 1, ttft_s=0.5)  # 25 tokens a second each
    assert cost.served(row, 26) == pytest.approx(4 * 26 / (0.5 + 25 / 25))
    assert cost.served(row | {"ttft_s": 0.0}, 10_000) == pytest.approx(100.0, rel=1e-3)


def test_an_offer_that_does_not_fit_says_by_how_much():
    model = counted(shapes.shape("qwen2.5-14b"))
    found = cost.offers(model, PRICES, ["baseline"], requests_per_s=1, tokens_per_request=100, **LOAD)
    assert [offer.card for offer in found] == ["A100 80GB", "L4"]
    assert found[1].why_not.endswith("GiB short for one request")


def test_an_impossible_load_is_refused_in_words():
    given = {"requests_per_s": 1, "names": ["awq"]} | LOAD
    with pytest.raises(ParameterError, match="The price of L4 must be a number from"):
        cost.offers(MISTRAL, {"L4": 0.0}, tokens_per_request=1, **given)
    with pytest.raises(CostError, match="do not fit a context of 2,048"):
        cost.offers(MISTRAL, PRICES, tokens_per_request=2049, **given)


def rows_of(**rates):
    made = [a_row(name, 8, rate, size, size, recovery=kept) for name, (rate, size, kept) in rates.items()]
    return [a_row("baseline", 8, 100.0, 200, 200, recovery=None), *made]


def advise(rows, least_recovery=0.95, batch=8):
    return cost.recommend(rows, batch=batch, least_recovery=least_recovery)


def test_the_fastest_that_keeps_the_accuracy_is_recommended():
    rows = rows_of(fp8=(150.0, 110, 0.99), awq=(180.0, 70, 0.90))
    found = advise(rows)
    assert found.scheme == "fp8"
    assert "1.50 times" in found.why
    assert "90.0%" in found.against["awq"]
    assert advise(rows, least_recovery=0.85).scheme == "awq"


def test_the_whole_interval_has_to_reach_the_least():
    rows = rows_of(fp8=(150.0, 110, 0.98))
    rows[1] |= {"recovery_low": 0.91, "recovery_high": 1.02}
    assert advise(rows).scheme == "baseline"
    assert advise(rows).against["fp8"].endswith("too few answers to show 95%")
    rows[1]["recovery_high"] = 0.949
    assert advise(rows).against["fp8"].endswith("less than 95%")
    rows[1]["recovery_low"] = 0.95
    assert advise(rows).scheme == "fp8"


def test_equally_fast_means_the_smaller_and_as_fast_as_16_bits_is_no_gain():
    found = advise(rows_of(fp8=(150.0, 110, 0.99), awq=(146.0, 70, 0.99)))
    assert found.scheme == "awq"
    assert "larger" in found.against["fp8"]
    rows = rows_of(fp8=(150.0, 110, 0.99), awq=(120.0, 70, 0.99))
    rows[2] |= {"low": 101.0, "high": 155.0}  # its runs allow as much as FP8's
    assert advise(rows).scheme == "awq"
    rows[2]["low"] = 95.0  # and here no more than 16 bits'
    assert advise(rows).scheme == "fp8"
    assert "as far as the runs tell (0.95 to 1.55 times)" in advise(rows).against["awq"]


def test_nothing_slower_written_out_or_not_asked_is_recommended():
    rows = rows_of(awq=(500.0, 70, 0.99), fp8=(500.0, 110, None), int8=(20.0, 110, 0.99))
    rows[1]["way"] = WRITTEN_OUT
    found = advise(rows)
    assert found.scheme == "baseline"
    for name, said in {"awq": "no kernel", "fp8": "not measured", "int8": "0.20 times"}.items():
        assert said in found.against[name]


def test_the_nearest_measured_batch_decides_and_no_baseline_is_said():
    rows = [*rows_of(fp8=(150.0, 110, 0.99)), a_row("baseline", 64, 1000.0, 200, 200)]
    assert advise(rows, batch=10).scheme == "fp8"
    assert advise(rows, batch=64).scheme == "baseline"
    for none in ([], rows[1:2]):
        with pytest.raises(CostError, match="01_baseline"):
            advise(none)
