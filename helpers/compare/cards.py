"""GPUs by their data sheets, and what runs on each generation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from helpers.base.machine import GIB, Machine
from helpers.model import schemes
from helpers.model.schemes import SchemeError


class SizingError(ValueError):
    """A model whose config does not say what its KV cache takes; the message says what is missing."""


# -- the GPUs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    ``gigabytes`` is the name's, ``memory_bytes`` what a driver reports where that is on record;
    ``bandwidth`` in bytes/s, ``rate16`` and ``rate8`` dense operations/s in 16-bit and 8-bit formats
    (data sheets often print twice that, with *sparsity*). ``source`` says where each comes from.
    """

    name: str
    generation: str
    sm: float
    gigabytes: int
    bandwidth: float
    rate16: float
    rate8: float
    source: str
    memory_bytes: int | None = None

    @property
    def memory(self) -> int:
        """Bytes: as a driver reports them, else the name's GB at their least, 10^9 bytes each."""
        return self.memory_bytes or self.gigabytes * 10**9

    @property
    def machine(self) -> Machine:
        """The card as the schemes see it."""
        return Machine("cuda", f"NVIDIA {self.name}", self.memory, sm=self.sm)

    def rate(self, bits: int) -> float:
        """Operations/s on numbers of so many bits."""
        return self.rate8 if bits == 8 else self.rate16


_SHEET = "NVIDIA's data sheet"

CARDS = {
    card.name: card
    for card in (
        Card("T4", "Turing", 7.5, 16, 320e9, 65e12, 130e12, _SHEET),
        Card(
            "L4", "Ada", 8.9, 24, 300e9, 121e12, 242e12,
            f"{_SHEET}; memory from the log's message (22.03 GiB)", round(22.03 * GIB),
        ),
        Card("A100 40GB", "Ampere", 8.0, 40, 1555e9, 312e12, 624e12, _SHEET),
        Card("A100 80GB", "Ampere", 8.0, 80, 2039e9, 312e12, 624e12, _SHEET),
        Card("H100", "Hopper", 9.0, 80, 3350e9, 989e12, 1979e12, _SHEET),
        Card(
            "H200", "Hopper", 9.0, 141, 4800e9, 989e12, 1979e12,
            f"{_SHEET}; memory as the driver counts it (notebooks/reference/h200)", 150_754_820_096,
        ),
    )
}  # fmt: skip

SIZES = ("T4", "L4", "A100 40GB", "A100 80GB", "H200")  # one card a memory size: 16, 24, 40, 80, 141 GB


def label(name: str) -> str:
    """A card's name with its memory, for tables."""
    one = CARDS[name]
    return name if f"{one.gigabytes}GB" in name else f"{name} {one.gigabytes}GB"


def card(name: str) -> Card:
    """Return a card by its name, also as a driver spells it (``NVIDIA A100-SXM4-80GB``).

    Raises:
        SizingError: there is no data sheet of it here.
    """
    words = set(re.split(r"[ -]", name))
    for known in CARDS.values():
        if set(known.name.split()) <= words:
            return known
    raise SizingError(f"There is no data sheet of {name!r} here. There are: {', '.join(CARDS)}.")


# Every generation that vLLM runs on, by a machine of its kind: what a reader may own.
GENERATIONS: dict[str, Machine] = {
    "Turing (T4)": Machine("cuda", "T4", 0, sm=7.5),
    "Ampere (A100)": Machine("cuda", "A100", 0, sm=8.0),
    "Ampere (A10, RTX 30)": Machine("cuda", "A10", 0, sm=8.6),
    "Ada (L4, RTX 40)": Machine("cuda", "L4", 0, sm=8.9),
    "Hopper (H100, H200)": Machine("cuda", "H100", 0, sm=9.0),
    "Blackwell (B200)": Machine("cuda", "B200", 0, sm=10.0),
    "Blackwell (RTX 50)": Machine("cuda", "RTX 50", 0, sm=12.0),
    "x86 CPU with AMX": Machine("cpu", "", 0, isa=frozenset({"amx_bf16", "avx512_bf16", "avx512f", "avx2"})),
    "x86 CPU with AVX-512": Machine("cpu", "", 0, isa=frozenset({"avx512_bf16", "avx512f", "avx2"})),
    "x86 CPU with AVX2": Machine("cpu", "", 0, isa=frozenset({"avx2"})),
}


def generation(machine: Machine) -> str | None:
    """The name in ``GENERATIONS`` that a machine belongs to, None for one that is older than all."""
    if machine.kind == "cuda":
        fits = [name for name, one in GENERATIONS.items() if one.kind == "cuda" and one.sm <= machine.sm]
        return fits[-1] if fits else None
    matrix = {"amx_bf16": "x86 CPU with AMX", "avx512f": "x86 CPU with AVX-512"}
    return next((name for flag, name in matrix.items() if flag in machine.isa), "x86 CPU with AVX2")


def paths(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """By generation and scheme: the way it runs there, or ``-`` where it does not."""
    found: dict[str, dict[str, str]] = {}
    for title, one in GENERATIONS.items():
        found[title] = {}
        for name in names:
            try:
                found[title][name] = schemes.scheme(name).way(one).name
            except SchemeError:
                found[title][name] = "-"
    return found
