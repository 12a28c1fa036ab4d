"""Figures that others published, as data, each with its source: what a format keeps, and what it gained."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Gained:
    """Tokens/s as a multiple of 16 bits' that somebody measured: of a scheme on a card, at a batch size.

    ``shape`` is the shape of the model that comes with this, where it has one; up to ``to_batch`` if given.
    """

    model: str
    scheme: str
    card: str
    batch: int
    ratio: float
    source: str
    conditions: str
    shape: str | None = None
    to_batch: int | None = None

    def of(self, card: str) -> bool:
        """Whether it is of this card; an H100 of which no more is said may be any of them."""
        return card == self.card or card.startswith(self.card + " ")


@functools.cache
def _file() -> dict:
    return yaml.safe_load((REFERENCE / "published.yaml").read_text(encoding="utf-8"))


@functools.cache
def kept() -> dict[str, Kept]:
    """By what is rounded: a scheme's weights (by the scheme that has them alone), and an FP8 cache."""
    return {name: Kept(**row) for name, row in _file()["accuracy"].items()}


@functools.cache
def gained() -> tuple[Gained, ...]:
    """What is published of quantized models' speed."""
    return tuple(Gained(**row) for row in _file()["speed"])


def checkpoints() -> dict[str, dict[str, str]]:
    """By a model's name on the hub and a scheme: a checkpoint there."""
    return _file()["checkpoints"]
