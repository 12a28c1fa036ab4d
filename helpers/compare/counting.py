"""A model as it can be counted: its layout, and how it is quantized already."""

from dataclasses import dataclass, replace

from helpers.model import formats, schemes, sizes
from helpers.model.formats import Quantized
from helpers.model.layout import Layout
from helpers.model.model import Model
from helpers.model.schemes import Scheme

FP8_CACHE = "_fp8_kv"  # what the name of a way with an FP8 cache ends in
# What one deploys, the gentlest first. A checkpoint that is quantized already goes as it is.
OFFERED = (
    "baseline", "fp8_kv", "fp8", "fp8_fp8_kv", "int8", "int8_fp8_kv", "awq", "awq_fp8_kv",
    "nvfp4", "nvfp4_fp8_kv",
)  # fmt: skip
AS_IT_IS = "as_it_is"


@dataclass(frozen=True)
class Counted:
    """A model as it can be counted; ``stored`` are the bytes of a checkpoint that is quantized already."""

    model: Model
    layout: Layout
    quantized: Quantized | None
    stored: int | None

    @property
    def names(self) -> list[str]:
        """The ways there are to look at."""
        return [AS_IT_IS, AS_IT_IS + FP8_CACHE] if self.quantized else [*OFFERED]

    def rule(self, name: str) -> Scheme:
        """The scheme of a way: of a checkpoint as it is, the one whose kernels read it, named as the way."""
        if not name.startswith(AS_IT_IS):
            return schemes.scheme(name)
        stored = self.quantized
        rule = replace(schemes.scheme(stored.kind), name=name, title=f"as it is ({stored.title})")
        if name != AS_IT_IS:
            return schemes.with_fp8_cache(rule, name, f"{rule.title}, FP8 KV cache")
        return rule if stored.kv_bytes == 2 else schemes.with_fp8_cache(rule, name, rule.title)

    def title(self, name: str) -> str:
        """What readers call a way."""
        return self.rule(name).title


def counted(model: Model) -> Counted:
    """Count a model.

    Raises:
        LayoutError: it cannot be counted; the message says why.
    """
    counts, quantized = sizes.layout(model.folder), formats.quantized(model.config)
    stored = formats.stored_bytes(counts.tensors, quantized.of) if quantized else None
    return Counted(model, counts, quantized, stored)
