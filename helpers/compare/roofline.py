"""The roofline: what a decoding step moves and computes, and which of the two sets its speed.

A step reads all weights once, whatever the batch, and reads each request's keys and values; it computes
two operations a weight and request. The memory's bandwidth limits the first, the arithmetic units the
second. A step cannot be faster than the slower of the two.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from helpers.base.machine import Machine
from helpers.compare.bandwidth import copy_bandwidth, matmul_rate
from helpers.model import formats, schemes, sizes, ways
from helpers.model.layout import Layout
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
    counts, entry = sizes.layout(model.folder), schemes.scheme(scheme)
    way = entry.way(machine) if machine else None
    format_of = sizes.format_of(entry, counts, way)
    return step_of(counts, format_of, entry.kv_bytes, way.plain_bytes if way else 2)


def step_of(counts: Layout, format_of, value_bytes: int, plain: int = 2) -> Step:
    """A step of a model whose matrices are stored as ``format_of`` says, tensor by tensor."""
    # A table that is no head is looked up, not multiplied; a tower only reads pictures.
    idle = ("tower", "embedding") if counts.count("head") else ("tower",)
    used = [one for one in counts.tensors if one.part not in idle]
    experts = formats.stored_bytes((one for one in used if one.part == "experts"), format_of, plain)
    left_out = 1 - counts.touched(1)
    return Step(
        weights=round(formats.stored_bytes(used, format_of, plain) - left_out * experts),
        operations=round(2 * (sum(one.size for one in used) - left_out * counts.count("experts"))),
        layout=counts,
        value_bytes=value_bytes,
        experts=experts,
    )


def arithmetic_bits(scheme: str, machine: Machine) -> int:
    """Bits of the numbers that a scheme multiplies on a machine: 8 only where both sides are 8-bit."""
    return schemes.scheme(scheme).way(machine).arithmetic_bits


# Of a data sheet's operations/s, in a step that arithmetic limits: what fits the records of 256 requests.
COMPUTES = 0.65


@dataclass(frozen=True)
class Limits:
    """What a machine moves (bytes/s) and multiplies (operations/s in the baseline's arithmetic) at most."""

    bandwidth: float
    rate: float


def here(machine: Machine, out: Path) -> Limits:
    """This machine's limits: as they were measured into ``out``, else measured now (about a second each), so
    that the lessons of one run speak of the same ones."""
    kept = out / "limits.json"
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8")))["machine"] == machine.name:
        return Limits(found["bandwidth"], found["rate"])
    limits = Limits(copy_bandwidth(), matmul_rate(dtype=BASELINE.way(machine).args["dtype"]))
    kept.write_text(json.dumps({"machine": machine.name} | asdict(limits)), encoding="utf-8")
    return limits


SAME = 0.05  # two rates that differ by no more than this are called equal, whatever their runs say


class Times(NamedTuple):
    """One record's throughput as a multiple of another's, and the least and the most that the runs of both
    allow, as far as records have them."""

    ratio: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """1 where it is faster, -1 where it is slower; 0 where the two differ by no more than ``SAME``, or by
        no more than the runs of each do."""
        if self.ratio > 1 + SAME and self.low > 1:
            return 1
        return -1 if self.ratio < 1 - SAME and self.high < 1 else 0


def times(row: dict, other: dict) -> Times:
    """Set one record's throughput beside another's."""
    (rate, low, high), (base, base_low, base_high) = (
        [one.get(of) or one["output_tokens_per_s"] for of in ("output_tokens_per_s", "low", "high")]
        for one in (row, other)
    )
    return Times(rate / base, low / base_high, high / base_low)


def ranges(rows: list[dict], scheme: str) -> dict[int, Times]:
    """By batch size a scheme's throughput as a multiple of the baseline's, of records of one origin."""
    timed = {(row["scheme"], row["batch"]): row for row in rows if not ways.expanded(row)}
    batches = sorted(batch for name, batch in timed if name == scheme and ("baseline", batch) in timed)
    return {batch: times(timed[scheme, batch], timed["baseline", batch]) for batch in batches}
