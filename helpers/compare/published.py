"""Figures that others published, as data, each with its source: what a format keeps, and what it gained."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import yaml

from helpers.base.records import REFERENCE


@dataclass(frozen=True)
class Kept:
    """How much of the 16-bit model's accuracy a format keeps, in words; ``loss`` orders them, 0 is none."""

    says: str
    loss: int
    source: str


@dataclass(frozen=True)
class Accuracy:
    """What somebody published of a quantized model's answers, and under which conditions.

    Of a task either ``scores``, in 16 bits and quantized, or ``recovery``, the second in percent of the
    first; where there are no figures what it ``says``.
    """

    model: str
    scheme: str
    source: str
    conditions: str
    billions: float | list[float]
    format: str = ""
    says: str = ""
    scores: dict[str, list[float]] = field(default_factory=dict)
    recovery: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, float]:
        """By task, what is left of the 16-bit model's score, in percent."""
        found = {task: 100 * after / before for task, (before, after) in self.scores.items()}
        return self.recovery | found


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


_BF16_OR_DEATH = "arXiv 2411.02355"

# By what is rounded: a scheme's weights (by the scheme that has them alone), and an FP8 cache.
ACCURACY = {
    "baseline": Kept("all", 0, ""),
    "fp8_kv": Kept("a little less", 0.5, "docs.vllm.ai, quantized KV cache"),
    "fp8": Kept("99 to 100 %", 0.5, _BF16_OR_DEATH),
    "int8": Kept("97 to 99 %", 2, _BF16_OR_DEATH),
    "awq": Kept("close to 8 bits", 3, _BF16_OR_DEATH),
    "nvfp4": Kept("about 99 %", 3, "NVIDIA's blog on NVFP4, of DeepSeek-R1"),
    "mxfp4": Kept("as released", 0, "arXiv 2508.10925"),
}

FILE = REFERENCE / "published.yaml"


@functools.cache
def accuracy() -> tuple[Accuracy, ...]:
    """What is published of quantized models' answers."""
    return tuple(Accuracy(**row) for row in yaml.safe_load(FILE.read_text(encoding="utf-8"))["accuracy"])


@functools.cache
def gained() -> tuple[Gained, ...]:
    """What is published of quantized models' speed."""
    return tuple(Gained(**row) for row in yaml.safe_load(FILE.read_text(encoding="utf-8"))["speed"])


# Checkpoints of the shapes that come with this, as the hub has them, by scheme.
CHECKPOINTS = {
    "Qwen/Qwen3-8B": {"awq": "Qwen/Qwen3-8B-AWQ"},
    "Qwen/Qwen3-32B": {"awq": "Qwen/Qwen3-32B-AWQ"},
}
