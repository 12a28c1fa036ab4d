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
def _file() -> dict:
    return yaml.safe_load((REFERENCE / "published.yaml").read_text(encoding="utf-8"))


@functools.cache
def kept() -> dict[str, Kept]:
    """By what is rounded: a scheme's weights (by the scheme that has them alone), and an FP8 cache."""
    return {name: Kept(**row) for name, row in _file()["accuracy"].items()}


def gained() -> list[dict]:
    """Tokens/s as a multiple of 16 bits' that somebody measured of a scheme on a card; the file says more."""
    return _file()["speed"]


def of(line: dict, card: str) -> bool:
    """Whether a line is of this card; an H100 of which no more is said may be any of them."""
    return card == line["card"] or card.startswith(line["card"] + " ")


def checkpoints() -> dict[str, dict[str, str]]:
    """By a model's name on the hub and a scheme: a checkpoint there."""
    return _file()["checkpoints"]
