"""GPUs by their data sheets, and what runs on each generation."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from helpers.base.machine import GIB, Machine
from helpers.model import schemes
from helpers.model.schemes import SchemeError


class SizingError(ValueError):
    """A GPU, a load or a price that cannot be; the message says what is allowed."""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    ``memory`` is in bytes, as PyTorch reports them where that is known, ``bandwidth`` in bytes/s. ``rate16``,
    ``rate8`` and ``rate4`` are dense operations/s in formats of so many bits that are added up in 32 bits,
    ``rate_int8`` those of integers (data sheets often print twice that, with *sparsity*; a GeForce adds FP8
    up at half the rate of INT8). ``nvlink``: several of them speak over it, and not over PCIe.
    """

    name: str
    sm: float
    memory: int
    bandwidth: float
    rate16: float
    rate8: float
    rate_int8: float
    rate4: float
    nvlink: bool = False

    @property
    def machine(self) -> Machine:
        """The card as the schemes see it."""
        return Machine("cuda", f"NVIDIA {self.name}", self.memory, sm=self.sm)

    def rate(self, bits: int, integers: bool = False) -> float:
        """Operations/s on numbers of so many bits."""
        return {8: self.rate_int8 if integers else self.rate8, 4: self.rate4}.get(bits, self.rate16)


def _card(name, sm, gigabytes, gb_s, tera16, tera8, memory=None, int8=None, tera4=None, nvlink=False) -> Card:
    """A card; ``memory`` in GiB is what PyTorch calls its total capacity; else the name's GB count.

    INT8 is as fast as FP8, and 4 bits are twice as fast, where nothing else is given.
    """
    size = round(memory * GIB if memory else gigabytes * 10**9)
    rates = (tera16, tera8, int8 or tera8, tera4 or 2 * tera8)
    return Card(name, sm, size, gb_s * 1e9, *(tera * 1e12 for tera in rates), nvlink)


# From NVIDIA's data sheets (of a V100 and an A100 the SXM modules, of a B200 the HGX board, of an RTX PRO
# 6000 the server edition); of the RTX cards 30, 40 and 50 from its whitepapers on GA102, AD102 and RTX
# Blackwell. Memory is from messages of PyTorch in public issues: T4 datawhalechina/self-llm#162, A10
# OpenBMB/MiniCPM-V#640, A100 TianheWu/CoSeR#10 and levihsu/OOTDiffusion#235, 3090 vllm-project/vllm#2140,
# 4090 ali-vilab/VGen#104, 5090 TrajectoryCrafter/TrajectoryCrafter#20, H100 vllm-project/vllm#27508, NVL
# ali-vilab/VACE#56. The L4's is from the log, the H200's as its driver counts it.
CARDS = {
    card.name: card
    for card in (
        _card("T4", 7.5, 16, 320, 65, 130, memory=14.58),
        _card("V100", 7.0, 32, 900, 125, 125, nvlink=True),
        _card("A10", 8.6, 24, 600, 125, 250, memory=22.18),
        _card("A100 40GB", 8.0, 40, 1555, 312, 624, memory=39.50, nvlink=True),
        _card("A100 80GB", 8.0, 80, 2039, 312, 624, memory=79.25, nvlink=True),
        _card("RTX 3090", 8.6, 24, 936, 71, 284, memory=23.69),
        _card("RTX 4090", 8.9, 24, 1008, 165, 330, memory=23.64, int8=660),
        _card("RTX 5090", 12.0, 32, 1792, 209, 419, memory=31.36, int8=838, tera4=1676),
        _card("L4", 8.9, 24, 300, 121, 242, memory=22.03),
        _card("L40S", 8.9, 48, 864, 362, 733),
        _card("H100 SXM", 9.0, 80, 3350, 989, 1979, memory=79.11, nvlink=True),
        _card("H100 PCIe", 9.0, 80, 2000, 756, 1513, memory=79.11),
        _card("H100 NVL", 9.0, 94, 3900, 835, 1671, memory=93.00, nvlink=True),
        _card("H200", 9.0, 141, 4800, 989, 1979, memory=150_754_820_096 / GIB, nvlink=True),
        _card("B200", 10.0, 180, 7700, 2250, 4500, nvlink=True),
        _card("RTX PRO 6000", 12.0, 96, 1597, 504, 1008),
    )
}
FOUR = "memory:bandwidth:rate:capability, such as 48:864:362:8.9 (GB, GB/s, dense 16-bit TFLOP/s, SM)"


def card(name: str) -> Card:
    """Return a card by its name, as a driver spells it (``NVIDIA A100-SXM4-80GB``), in part (``4090``), or by
    four numbers. An H100 of which no more is said is the SXM module.

    Raises:
        SizingError: there is no data sheet of it here, or the name fits several; the message says which.
    """
    if ":" in name:
        return _own(name)
    # The driver calls the SXM module "H100 80GB HBM3".
    spelled = re.sub(r"\b(RTX)(?=\d)", r"\1 ", name.upper().replace("HBM3", "SXM"))
    words = {word for word in re.split(r"[ _-]+", spelled) if word} - {"NVIDIA", "TESLA", "GEFORCE"}
    known = {one.name: set(one.name.upper().split()) for one in CARDS.values()}
    fits = [] if words & _OTHERS else [title for title, its in known.items() if its <= words or words <= its]
    if words == {"H100"}:
        fits = ["H100 SXM"]
    if len(fits) == 1:
        return CARDS[fits[0]]
    if fits and words:
        raise SizingError(f"There are several {name}: {', '.join(fits)}. Name one of them.")
    raise SizingError(f"No data sheet of {name!r} is here. There are: {', '.join(CARDS)}; or give {FOUR}.")


_OTHERS = {"TI", "SUPER", "LAPTOP", "MAX", "Q", "MIG"}  # behind a number that another card has, too


def _own(numbers: str) -> Card:
    """A card that nobody has a data sheet of, by its numbers."""
    try:
        gigabytes, bandwidth, rate, sm = (float(number) for number in numbers.split(":"))
        if not (min(gigabytes, bandwidth, rate, sm) > 0 and sm < 20):
            raise ValueError
    except ValueError:
        raise SizingError(f"{numbers!r} is not {FOUR}.") from None
    return _card(f"GPU of {gigabytes:g} GB", sm, gigabytes, bandwidth, rate, 2 * rate)


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

    def way(name: str, machine: Machine) -> str:
        try:
            return schemes.scheme(name).way(machine).name
        except SchemeError:
            return "-"

    return {title: {name: way(name, one) for name in names} for title, one in GENERATIONS.items()}
