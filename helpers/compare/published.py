"""Figures that others published, as data, each with its source: what a format keeps, and what it gained."""

import functools
from dataclasses import dataclass

import yaml

from helpers.base.records import REFERENCE


@dataclass(frozen=True)
class Kept:
    """How much of the 16-bit model's accuracy a format keeps, in words; ``loss`` orders them, 0 is none."""

    says: str
    loss: float
    source: str


@functools.cache
def figures() -> dict:
    """The file, which says more: ``speed`` has lines of tokens/s as a multiple of 16 bits', each measured by
    somebody of a scheme on a card; ``checkpoints``, by a model's name on the hub and a scheme, those there.
    """
    return yaml.safe_load((REFERENCE / "published.yaml").read_text(encoding="utf-8"))


@functools.cache
def kept() -> dict[str, Kept]:
    """By what is rounded: a scheme's weights (by the scheme that has them alone), and an FP8 cache."""
    return {name: Kept(**row) for name, row in figures()["accuracy"].items()}


def of(line: dict, card: str) -> bool:
    """Whether a line is of this card; an H100 of which no more is said may be any of them."""
    return card == line["card"] or card.startswith(line["card"] + " ")
