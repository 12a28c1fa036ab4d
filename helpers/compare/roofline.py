"""The roofline: what a decoding step moves and computes, and which of the two sets its speed.

A step reads all weights once, whatever the batch, and reads each request's keys and values; it computes
two operations a weight and request. The memory's bandwidth limits the first, the arithmetic units the
second. A step cannot be faster than the slower of the two.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from helpers.base.machine import Machine
from helpers.compare import cards
from helpers.compare.bandwidth import copy_bandwidth, matmul_rate
from helpers.compare.cards import Card, SizingError
from helpers.model import formats, schemes, sizes, ways
from helpers.model.layout import MATRICES, Layout
from helpers.model.model import Model
from helpers.model.schemes import BASELINE, SCHEMES, SchemeError


@dataclass(frozen=True)
class Step:
    """One decoding step of a model under a scheme.

    ``weights`` are the bytes read for one token: all but the embedding table, of which a token reads one row
    (a table that is the head as well is read whole), towers, and the experts that it does not choose.
    ``experts`` are the bytes of all routed experts. ``operations`` are done once a token; ``layout`` and
    ``value_bytes`` say what the caches hold.
    """

    weights: int
    operations: int
    layout: Layout
    value_bytes: int = 2
    experts: int = 0

    @property
    def token(self) -> int:
        """The KV cache's bytes for one token of context, windows ignored."""
        return self.layout.kv_token_bytes(self.value_bytes)

    def read(self, batch: float) -> float:
        """Bytes of weights that a step of so many tokens reads: of experts, those that any token chooses."""
        one, all_of_them = self.layout.touched(1), self.layout.touched(batch)
        return self.weights + self.experts * (all_of_them - one if self.experts else 0)

    def bytes(self, batch: float, context: int = 0) -> float:
        """Bytes that a step moves for ``batch`` requests with ``context`` tokens each in the cache."""
        cached = self.layout.request_bytes(context, self.value_bytes) if context else 0
        return self.read(batch) + batch * cached

    def seconds(self, batch: float, bandwidth: float, rate: float = math.inf, context: int = 0) -> float:
        """The least time of a step on hardware of this bandwidth (bytes/s) and rate (operations/s)."""
        return max(self.bytes(batch, context) / bandwidth, batch * self.operations / rate)

    def bound(self, batch: float, bandwidth: float, rate: float = math.inf, context: int = 0) -> float:
        """The most output tokens per second that hardware allows."""
        return batch / self.seconds(batch, bandwidth, rate, context)

    def crossover(self, bandwidth: float, rate: float, context: int = 0) -> float:
        """The batch at which arithmetic takes as long as reading; inf where reading stays ahead for ever.

        With ``context`` each request brings bytes of its own, and the batch at which they meet grows. With
        experts a larger batch reads more of them: the batch at which all are read is on the safe side.
        """
        each = self.operations / rate - (self.bytes(1, context) - self.bytes(1)) / bandwidth
        return self.read(math.inf) / bandwidth / each if each > 0 else math.inf


def step(model: Model, scheme: str, machine: Machine | None = None) -> Step:
    """Work out a step from a model's config: with its bytes as stored, or as a machine keeps them.

    Raises:
        LayoutError, SchemeError: the config, the scheme or the machine does not allow it.
    """
    counts, rule = sizes.layout(model.folder), schemes.scheme(scheme)
    way = rule.way(machine) if machine else None
    format = None if way and way.expanded else sizes.format_of(rule, counts, way)
    return step_of(
        counts,
        lambda one: format if one.part in MATRICES else None,
        rule.kv_bytes,
        way.plain_bytes if way else 2,
    )


def step_of(counts: Layout, format_of, value_bytes: int, plain: int = 2) -> Step:
    """A step of a model whose matrices are stored as ``format_of`` says, tensor by tensor."""
    idle = counts.count("tower") + (counts.embedding if counts.head else 0)  # looked up, not multiplied
    chosen = counts.touched(1)
    everything = formats.stored_bytes(counts, format_of, plain)
    routed = [one for one in counts.tensors if one.part == "experts"]
    experts = formats.stored_bytes(replace(counts, tensors=tuple(routed)), format_of, plain)
    towers = [one for one in counts.tensors if one.part == "tower"]
    looked_up = formats.stored_bytes(replace(counts, tensors=tuple(towers)), format_of, plain)
    looked_up += plain * counts.embedding if counts.head else 0
    return Step(
        weights=round(everything - looked_up - (1 - chosen) * experts),
        operations=round(2 * (counts.total - idle - (1 - chosen) * counts.count("experts"))),
        layout=counts,
        value_bytes=value_bytes,
        experts=experts,
    )


@dataclass(frozen=True)
class Hardware:
    """A machine as the roofline sees it: bytes/s, and operations/s by the bits of what is multiplied.

    ``rates[16]`` is the baseline's arithmetic, which is 32-bit on a CPU without BF16 kernels. ``machine``
    is the machine as the schemes see it, where that is known.
    """

    name: str
    bandwidth: float
    rates: dict[int, float]
    source: str
    machine: Machine | None = None

    def ridge(self, bits: int = 16) -> float:
        """Operations that arithmetic does while memory moves one byte: where the two lines meet."""
        return self.rates[bits] / self.bandwidth


def of_card(card: Card) -> Hardware:
    """A GPU by its data sheet."""
    return Hardware(card.name, card.bandwidth, {16: card.rate16, 8: card.rate8}, card.source, card.machine)


def of_rows(rows: list[dict], model: Model) -> Hardware:
    """The machine that records of one origin are of: its bandwidth as measured there, and its data sheet.

    Without a data sheet its arithmetic, and without a measurement its bandwidth, are what its records
    reached: the hardware does at least that.
    """
    measured = next((row["copy_bandwidth"] for row in rows if row.get("copy_bandwidth")), None)
    try:
        sheet = of_card(cards.card(rows[0]["device"]))
    except SizingError:
        bandwidth, rate = reached(rows, model)
        return Hardware(rows[0]["device"], max(bandwidth, measured or 0), {16: rate}, "its records")
    if not measured:
        return sheet
    return replace(sheet, bandwidth=measured, source="bandwidth measured there, rates from the data sheet")


def reached(rows: list[dict], model: Model, machine: Machine | None = None) -> tuple[float, float]:
    """The most bytes/s of weights that any record read, and the most operations/s that any did.

    Only records of the baseline's arithmetic count: in 8 bits the same hardware does more.
    """
    bandwidth = rate = 0.0
    for row in rows:
        if row["scheme"] in SCHEMES and not ways.expanded(row) and recorded_bits(row) == 16:
            work, seconds = recorded_step(row, model, machine), row["batch"] / row["output_tokens_per_s"]
            bandwidth = max(bandwidth, work.weights / seconds)
            rate = max(rate, row["batch"] * work.operations / seconds)
    return bandwidth, rate


def recorded_step(row: dict, model: Model, machine: Machine | None) -> Step:
    """A record's step; as stored where the machine is unknown or would not run the scheme today."""
    try:
        return step(model, row["scheme"], machine)
    except SchemeError:
        return step(model, row["scheme"])


def here(machine: Machine, rows: list[dict], model: Model) -> Hardware:
    """This machine: its bandwidth and the baseline's arithmetic, measured now (about a second each).

    A machine that others use as well may be slower now than when ``rows`` were measured. What an engine
    reached is proof that the hardware can do it, so the better of the two counts.
    """
    bandwidth, rate = reached(rows, model, machine)
    dtype = BASELINE.way(machine).args["dtype"]
    bandwidth, rate = max(bandwidth, copy_bandwidth()), max(rate, matmul_rate(dtype=dtype))
    return Hardware(machine.label, bandwidth, {16: rate}, "measured here", machine)


# A step is called bound by what takes at least this share of its time.
MOST = 0.5


@dataclass(frozen=True)
class Regime:
    """What sets a measured step's time: ``memory`` and ``compute`` are the shares the roofline explains.

    ``name`` is the larger of the two where that is at least ``MOST``; else ``overhead``: launching
    kernels, scheduling, and kernels far from what the hardware can do take most of the step.
    """

    name: str
    memory: float
    compute: float


def regime(row: dict, model: Model, machine: Hardware) -> Regime:
    """Compare a record's step with the least time its bytes and its operations need.

    Where the rate of its arithmetic is not known, the baseline's stands in: the share is then at most that.
    """
    work, bits = recorded_step(row, model, machine.machine), recorded_bits(row)
    measured = row["batch"] / row["output_tokens_per_s"]
    context = row.get("prompt_tokens") or 0
    memory = work.bytes(row["batch"], context) / machine.bandwidth / measured
    rate = machine.rates.get(bits, machine.rates[16])
    compute = row["batch"] * work.operations / rate / measured
    larger, name = max((memory, "memory"), (compute, "compute"))
    return Regime(name if larger >= MOST else "overhead", memory, compute)


def arithmetic_bits(scheme: str, machine: Machine) -> int:
    """Bits of the numbers that a scheme multiplies on a machine: 8 only where both sides are 8-bit."""
    return schemes.scheme(scheme).way(machine).arithmetic_bits


def recorded_bits(row: dict) -> int:
    """The same of a record, by the way of running that it names."""
    way = ways.recorded(row)
    return way.arithmetic_bits if way else 16


def allowed(rows: list[dict], model: Model, machine: Hardware) -> dict[str, dict[float, float]]:
    """By scheme of one origin's records: the gain over the baseline that the roofline allows, by batch.

    It is the ratio of the two bounds, with the records' prompts in the KV cache. Up to the scheme's own
    crossover that is the ratio of the bytes; where it computes in as many bits as the baseline, it has
    shrunk to nothing at the baseline's crossover. A scheme is left out where its weights ran written out, or
    where the rate of its arithmetic is not known.
    """
    plain = next((row for row in rows if row["scheme"] == "baseline"), None)
    if plain is None:
        return {}
    base, sizes = recorded_step(plain, model, machine.machine), [row["batch"] for row in rows]
    low, high, context = min(sizes), max(sizes), plain.get("prompt_tokens") or 0
    batches = [low * (high / low) ** (place / 24) for place in range(25)]
    found = {}
    for row in rows:
        rate, name = machine.rates.get(recorded_bits(row)), row["scheme"]
        known = name in SCHEMES and name not in ("baseline", *found)  # once, not at every batch
        if rate and known and not ways.expanded(row):
            work = recorded_step(row, model, machine.machine)
            found[name] = {
                batch: work.bound(batch, machine.bandwidth, rate, context)
                / base.bound(batch, machine.bandwidth, machine.rates[16], context)
                for batch in batches
            }
    return found


def ratios(rows: list[dict], scheme: str) -> dict[int, float]:
    """By batch size: a scheme's throughput as a multiple of the baseline's, of records of one origin."""
    rates = {
        (row["scheme"], row["batch"]): row["output_tokens_per_s"] for row in rows if not ways.expanded(row)
    }
    batches = sorted(batch for name, batch in rates if name == scheme and ("baseline", batch) in rates)
    return {batch: rates[scheme, batch] / rates["baseline", batch] for batch in batches}


def ranges(rows: list[dict], scheme: str) -> dict[int, tuple[float, float, float]]:
    """``ratios`` with the least and the most that the runs of both allow, as far as records have them."""
    timed = {(row["scheme"], row["batch"]): row for row in rows if not ways.expanded(row)}
    found = {}
    for batch, ratio in ratios(rows, scheme).items():
        one, base = timed[scheme, batch], timed["baseline", batch]
        (low, high), (base_low, base_high) = (
            [row.get(end) or row["output_tokens_per_s"] for end in ("low", "high")] for row in (one, base)
        )
        found[batch] = ratio, low / base_high, high / base_low
    return found


SAME = 0.03  # two rates that differ by no more than this are called equal


@dataclass(frozen=True)
class Side:
    """On which side of its crossover a scheme was measured: the batch sizes at which it was faster than the
    baseline, as fast (within ``SAME``), and slower; ``crosses`` where between two of them it changes.
    """

    faster: list[int]
    equal: list[int]
    slower: list[int]
    crosses: float | None


def side(rows: list[dict], scheme: str) -> Side | None:
    """Find a scheme's side from records of one origin; None where it or the baseline was not measured.

    The crossing lies on a straight line between two measurements, both axes logarithmic.
    """
    found = ratios(rows, scheme)
    if not found:
        return None
    pairs = sorted(found.items())
    crosses = None
    for (low, before), (high, after) in itertools.pairwise(pairs):
        if (before - 1) * (after - 1) < 0 and max(abs(before - 1), abs(after - 1)) > SAME:
            share = math.log(before) / (math.log(before) - math.log(after))
            crosses = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return Side(
        [batch for batch, ratio in pairs if ratio > 1 + SAME],
        [batch for batch, ratio in pairs if abs(ratio - 1) <= SAME],
        [batch for batch, ratio in pairs if ratio < 1 - SAME],
        crosses,
    )
