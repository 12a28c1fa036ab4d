"""What tokens cost: price, throughput and utilization in, dollars out; and which scheme to deploy.

A price is always an input: the same GPU's differs by a factor of two between providers.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from helpers.base import parameters
from helpers.compare import cards, options, roofline
from helpers.compare.counting import Counted
from helpers.compare.options import Option
from helpers.compare.sizing import Load
from helpers.measure import result_tables
from helpers.model import ways

HOURS_A_DAY, DAYS_A_MONTH = 24, 30  # the log's months have 30 days


class CostError(ValueError):
    """A cost that has no answer; the message says which input is missing or impossible."""


def per_million(price_per_hour: float, tokens_per_s: float, utilization: float = 1.0) -> float:
    """Dollars for a million output tokens: price an hour / tokens an hour x 10^6.

    ``utilization`` is the share of the paid time in which the machine serves at ``tokens_per_s``.

    Raises:
        ParameterError: a price, throughput or utilization without which nothing has a cost.
    """
    for name, value in (("price_per_hour", price_per_hour), ("tokens_per_s", tokens_per_s)):
        parameters.number(name, value, 1e-6, 1e9)
    parameters.checked("utilization", utilization)
    return price_per_hour / (tokens_per_s * 3600 * utilization) * 1e6


def served(row: dict, output_tokens: int) -> float:
    """Output tokens/s of a record's batch with its prompts read: answers of ``output_tokens`` tokens each.

    A record's own rate is that of decoding. A server mixes the two, but has the same prompts to read.
    """
    seconds = row["ttft_s"] + (output_tokens - 1) * row["batch"] / row["output_tokens_per_s"]
    return row["batch"] * output_tokens / seconds


@dataclass(frozen=True)
class Offer:
    """One way to serve a load: ``count`` cards under a scheme, each with ``batch`` requests at once.

    ``tokens_per_s`` is what one card gives, estimated from above, ``used`` the share of all cards' throughput
    that the load takes; ``per_day`` is the rent of all, ``per_million`` what a million tokens of this load
    then cost at least. ``why_not`` is set instead where the scheme cannot serve it there.
    """

    card: str
    scheme: str
    price_per_day: float
    title: str = ""
    count: int = 0
    batch: int = 0
    tokens_per_s: float = 0.0
    used: float = 0.0
    why_not: str = ""

    @property
    def per_day(self) -> float:
        """The rent of all cards, dollars a day."""
        return self.count * self.price_per_day

    def carrying(self, tokens_per_s: float, utilization: float) -> Offer:
        """As many cards as so many tokens a second take, none planned with more than ``utilization``."""
        count = math.ceil(tokens_per_s / (self.tokens_per_s * utilization))
        return replace(self, count=count, used=tokens_per_s / (count * self.tokens_per_s))

    @property
    def per_million(self) -> float:
        """Dollars a million tokens at this load."""
        return per_million(self.per_day / HOURS_A_DAY, self.count * self.tokens_per_s, self.used)


def offers(
    model: Counted,
    prices_per_day: dict[str, float],
    names: Iterable[str],
    *,
    requests_per_s: float,
    tokens_per_request: float,
    context: int,
    most_tpot_s: float,
    utilization: float,
) -> list[Offer]:
    """Every priced card and scheme for a load, those that can serve it first, the cheapest first.

    The load needs ``requests_per_s`` x ``tokens_per_request`` tokens a second, of requests that hold
    ``context`` tokens each: what the answer does not take is prompt, and has to be read. A card serves as
    many at once as its memory holds beside the weights, while a token takes no more than ``most_tpot_s``, and
    at most ``options.MOST_AT_ONCE``. What it then gives is the estimate of ``options``, from above, so that
    the cost is a *least* cost. No more than ``utilization`` of that is planned with.

    Raises:
        ParameterError: a price of nothing.
        CostError: answers longer than the context.
    """
    if tokens_per_request > context:
        raise CostError(f"Answers of {tokens_per_request:g} tokens do not fit a context of {context:,}.")
    found, needed = [], requests_per_s * tokens_per_request
    for card_name, price in prices_per_day.items():
        parameters.number(f"The price of {card_name}", price, 0.01, 1e6)
        prompts = (context - tokens_per_request) / tokens_per_request
        load = Load(cards.card(card_name), context=context, users=1, prompts=prompts)
        for name in names:
            offer = _offer(options.option(model, name, load), price, most_tpot_s)
            found.append(offer if offer.why_not else offer.carrying(needed, utilization))
    return sorted(found, key=lambda offer: (bool(offer.why_not), offer.per_day))


def _offer(way: Option, price: float, most_tpot_s: float) -> Offer:
    """What one card gives at the largest batch that its memory and the longest TPOT allow."""
    offer = Offer(way.load.card.name, way.scheme, price, way.title)
    if way.refused:
        return replace(offer, why_not=way.refused)
    if not way.fits:
        return replace(offer, why_not=f"{-way.budget.spare / 2**30:.1f} GiB short for one request")

    def token_s(batch: int) -> float:
        """What each of so many requests waits for a token, while the others' prompts are read, too."""
        return batch * (1 / way.rate(batch, gpus=1) + way.reading_s)

    batch = bisect.bisect_right(range(1, min(way.users, options.MOST_AT_ONCE) + 1), most_tpot_s, key=token_s)
    if not batch:
        return replace(offer, why_not=f"a token takes at least {1e3 * token_s(1):.0f} ms")
    return replace(offer, batch=batch, tokens_per_s=batch / token_s(batch))


def least_rents(
    found: Iterable[Offer], rates: Iterable[float], tokens_per_request: float, utilization: float
) -> dict[str, list[float]]:
    """By scheme the least rent a day at each of so many requests a second."""
    able: dict[str, list[Offer]] = {}
    for offer in found:
        if not offer.why_not:
            able.setdefault(offer.scheme, []).append(offer)
    needed = [rate * tokens_per_request for rate in rates]
    return {
        name: [min(one.carrying(tokens, utilization).per_day for one in offers) for tokens in needed]
        for name, offers in able.items()
    }


# -- which scheme to deploy ---------------------------------------------------------------------


@dataclass(frozen=True)
class Recommended:
    """A scheme, the sentence that says why, and what spoke against each of the others."""

    scheme: str
    why: str
    against: dict[str, str]


def recommend(rows: list[dict], *, batch: int, least_recovery: float) -> Recommended:
    """Choose a scheme for a machine and a model from its records, by three rules.

    1. It runs as itself here (its weights are not written out), and is shown to keep ``least_recovery`` of
       the baseline's accuracy on the task: the whole interval reaches it.
    2. At the measured batch nearest to ``batch`` it is faster than 16 bits, beyond what the runs differ by.
    3. Of those the fastest; others as fast, as far as the runs tell, count as equal, and of these the
       smallest is taken.

    Raises:
        CostError: there is no baseline among the records, so nothing to compare with.
    """
    base = {row["batch"]: row for row in rows if row["scheme"] == "baseline"}
    if not base:
        raise CostError("There is no record of the baseline here: run 01_baseline with this model first.")
    at = min(base, key=lambda size: (abs(math.log(size / batch)), size))
    plain, others = base[at], [row for row in rows if row["batch"] == at and row["scheme"] != "baseline"]
    against = {row["scheme"]: _against(row, plain, least_recovery) for row in others}
    able = [row for row in others if not against[row["scheme"]]]
    if not able:
        why = f"Nothing that is shown to keep {least_recovery:.0%} of the accuracy is faster than 16 bits"
        return Recommended("baseline", f"{why} at batch size {at}.", against)
    best = max(able, key=lambda row: row["output_tokens_per_s"])
    level = [row for row in able if roofline.times(row, best).side == 0]
    chosen = min(level, key=_held_bytes)
    for row in (*able, plain):
        slower = f"gives {roofline.times(row, chosen).ratio:.2f} times its tokens at batch size {at}"
        against[row["scheme"]] = f"as fast, but larger: {slower}" if row in level else slower
    against.pop(chosen["scheme"])
    why = (
        f"It is {'the smallest of the fastest' if len(level) > 1 else 'the fastest'} at batch size {at} "
        f"({roofline.times(chosen, plain).ratio:.2f} times the baseline's tokens), its weights are "
        f"{_held_bytes(plain) / _held_bytes(chosen):.2f} times smaller, and it keeps "
        f"{result_tables.kept(chosen)} of the accuracy."
    )
    return Recommended(chosen["scheme"], why, against)


def _held_bytes(row: dict) -> int:
    """The bytes a record's weights should take where it was measured; of the file, where it says no more."""
    return row.get("held_weights_bytes") or row["predicted_weights_bytes"]


def _against(row: dict, base: dict, least: float) -> str:
    """Why a scheme is no choice; empty for one that is."""
    if ways.expanded(row):
        return "does not run as itself here: no kernel reads it"
    if row.get("recovery") is None:
        return "its answers were not measured"
    low, high = (row.get(of, row["recovery"]) for of in ("recovery_low", "recovery_high"))
    if round(low, 2) < least:  # as it is shown
        less = f"less than {least:.0%}" if high < least else f"too few answers to show {least:.0%}"
        return f"keeps {result_tables.kept(row)} of the accuracy, {less}"
    gain = roofline.times(row, base)
    if not gain.side:
        return f"as fast as 16 bits, as far as the runs tell ({gain.low:.2f} to {gain.high:.2f} times)"
    return (
        "" if gain.side > 0 else f"gives {gain.ratio:.2f} times 16 bits' tokens at batch size {row['batch']}"
    )
