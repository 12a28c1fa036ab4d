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
from helpers.compare.bandwidth import copy_bandwidth, matmul_rate
from helpers.model import formats, schemes, sizes, ways
from helpers.model.layout import MATRICES, Layout
from helpers.model.model import Model
from helpers.model.schemes import BASELINE


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

    def read(self, batch: float) -> float:
        """Bytes of weights that a step of so many tokens reads: of experts, those that any token chooses."""
        one, all_of_them = self.layout.touched(1), self.layout.touched(batch)
        return self.weights + self.experts * (all_of_them - one if self.experts else 0)

    def seconds(self, batch: float, bandwidth: float, rate: float = math.inf, context: int = 0) -> float:
        """The least time of a step on hardware of this bandwidth (bytes/s) and rate (operations/s), of
        requests that have ``context`` tokens each in the cache."""
        cached = self.layout.request_bytes(context, self.value_bytes) if context else 0
        return max((self.read(batch) + batch * cached) / bandwidth, batch * self.operations / rate)

    def bound(self, batch: float, bandwidth: float, rate: float = math.inf) -> float:
        """The most output tokens per second that hardware allows, of short contexts."""
        return batch / self.seconds(batch, bandwidth, rate)

    def crossover(self, bandwidth: float, rate: float) -> float:
        """The batch at which arithmetic takes as long as reading, of short contexts.

        With experts a larger batch reads more of them: the batch at which all are read is on the safe side.
        """
        return self.read(math.inf) / bandwidth * rate / self.operations


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


def arithmetic_bits(scheme: str, machine: Machine) -> int:
    """Bits of the numbers that a scheme multiplies on a machine: 8 only where both sides are 8-bit."""
    return schemes.scheme(scheme).way(machine).arithmetic_bits


@dataclass(frozen=True)
class Limits:
    """What a machine moves (bytes/s) and multiplies (operations/s in the baseline's arithmetic) at most."""

    bandwidth: float
    rate: float


def here(machine: Machine) -> Limits:
    """This machine's limits, measured now (about a second each)."""
    return Limits(copy_bandwidth(), matmul_rate(dtype=BASELINE.way(machine).args["dtype"]))


def ranges(rows: list[dict], scheme: str) -> dict[int, tuple[float, float, float]]:
    """By batch size a scheme's throughput as a multiple of the baseline's, of records of one origin, and the
    least and the most that the runs of both allow, as far as records have them.
    """
    timed = {(row["scheme"], row["batch"]): row for row in rows if not ways.expanded(row)}
    found = {}
    for batch in sorted(batch for name, batch in timed if name == scheme and ("baseline", batch) in timed):
        (rate, low, high), (base, base_low, base_high) = (
            [timed[name, batch].get(of) or timed[name, batch]["output_tokens_per_s"]
             for of in ("output_tokens_per_s", "low", "high")]
            for name in (scheme, "baseline")
        )  # fmt: skip
        found[batch] = rate / base, low / base_high, high / base_low
    return found


def ratios(rows: list[dict], scheme: str) -> dict[int, float]:
    """``ranges`` without the ranges."""
    return {batch: ratio for batch, (ratio, _, _) in ranges(rows, scheme).items()}


def crossing(ratios: dict[int, float], same: float) -> float | None:
    """The batch size at which a scheme's ratio to the baseline passes one, by more than ``same`` on a side.

    It lies on a straight line between two measurements, both axes logarithmic.
    """
    found = None
    for (low, before), (high, after) in itertools.pairwise(sorted(ratios.items())):
        if (before - 1) * (after - 1) < 0 and max(abs(before - 1), abs(after - 1)) > same:
            share = math.log(before) / (math.log(before) - math.log(after))
            found = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return found
