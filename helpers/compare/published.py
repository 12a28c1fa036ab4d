"""Figures that others published, as data, each with its source: what a format keeps, and what it gained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """How much of the 16-bit model's accuracy a format keeps, in words; ``loss`` orders them, 0 is none."""

    says: str
    loss: int
    source: str


@dataclass(frozen=True)
class Gained:
    """Tokens/s as a multiple of 16 bits' that somebody measured: of a scheme on a card, at a batch size."""

    scheme: str
    card: str
    batch: int
    ratio: float
    source: str


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

GAINED = (
    Gained("awq", "RTX 4090", 1, 194 / 62, "Llama-2-7B at batch 1, arXiv 2306.00978"),
    Gained("awq", "L4", 1, 3.3, "Mistral-7B at batch 1 to 8, bench.bereketlemma.com"),
    Gained("awq", "A10", 16, 3.9, "one matrix, nearly ideal until batch 16 to 32, arXiv 2408.11743"),
)

# Checkpoints of the shapes that come with this, as the hub has them, by scheme.
CHECKPOINTS = {
    "Qwen/Qwen3-8B": {"awq": "Qwen/Qwen3-8B-AWQ"},
    "Qwen/Qwen3-32B": {"awq": "Qwen/Qwen3-32B-AWQ"},
}
