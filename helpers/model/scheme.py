"""What a quantization scheme is: what it stores, and the ways it runs. ``schemes`` has the entries."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from helpers.base.machine import Machine


class SchemeError(ValueError):
    """A scheme that does not exist or does not run on this machine; the message says why."""


@dataclass(frozen=True)
class Way:
    """One way a scheme runs on some hardware.

    ``when`` says whether a machine takes it, ``why`` is a sentence on that. ``args`` are what it adds to
    ``vllm.LLM``'s. ``expanded``: no kernel there reads the format, so the rounded weights are written out in
    16 bits first; the answers are the scheme's, bytes and speed are not. ``group_bytes`` replaces the
    scheme's where the kernel repacks scales and zero points. ``arithmetic_bits`` is the width of the numbers
    that are multiplied: 8 where weights and activations both are, else that to which the weights are
    widened; ``integers``: they are INT8, on a GPU. ``onednn`` is false where torch must not leave the
    products to oneDNN. ``timed`` names the way in deployments.jsonl whose kernel it runs:
    ``compare.recorded`` takes a step's time from there.
    """

    name: str
    when: Callable[[Machine], bool]
    why: str
    args: dict = field(default_factory=lambda: {"dtype": "auto"})
    expanded: bool = False
    group_bytes: float | None = None
    arithmetic_bits: int = 16
    integers: bool = False
    onednn: bool = True
    timed: str = "bf16"

    @property
    def plain_bytes(self) -> int:
        """Bytes that a weight which is not quantized takes in memory."""
        return 4 if self.args.get("dtype") == "float32" else 2


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme.

    ``weight_bits`` is what one weight of a quantized linear layer takes, without its scales.
    ``channel_bytes`` is stored once an output channel (a scale), ``group_bytes`` once a group of
    weights (a scale, and half a byte of zero point), ``group`` of them where the format fixes that.
    ``recipe`` names the checkpoint that ``model.checkpoints`` makes for it. Without one vLLM quantizes while
    it loads, where a way says so; of other formats the model has to be a checkpoint already.
    ``kv_bytes`` is what one key or value takes in its KV cache. ``look`` are matplotlib's colour, marker and
    line. ``lacks`` says what a machine lacks that takes none of the ``ways``.
    """

    name: str
    title: str
    weight_bits: int
    ways: tuple[Way, ...]
    lacks: str
    channel_bytes: float = 0.0
    group_bytes: float = 0.0
    recipe: str | None = None
    kv_bytes: int = 2
    group: int = 0
    look: tuple = ("#444444", "*", "-")

    @property
    def needs_checkpoint(self) -> bool:
        """Whether it needs a checkpoint: vLLM does not make one while it loads."""
        return self.weight_bits < 16 and not any("quantization" in way.args for way in self.ways)

    def way(self, machine: Machine) -> Way:
        """Return how this machine runs the scheme.

        Raises:
            SchemeError: it does not; the message says what the machine lacks.
        """
        for way in self.ways:
            if way.when(machine):
                return way
        raise SchemeError(f"{self.title} does not run on {machine.label}: {self.lacks}")


def cuda(low: float = 0.0, high: float = 99.0) -> Callable[[Machine], bool]:
    """A way's ``when``: on GPUs from SM ``low`` on and below SM ``high``."""
    return lambda machine: machine.kind == "cuda" and low <= (machine.sm or 0) < high


def cpu(*flags: str) -> Callable[[Machine], bool]:
    """A way's ``when``: on CPUs, those that have any of these instruction sets if some are named."""
    return lambda machine: machine.kind == "cpu" and (not flags or bool(machine.isa & set(flags)))


BF16_ISA = frozenset({"amx_bf16", "avx512_bf16", "avx512f"})  # what oneDNN has BF16 kernels for


def _caches_fp8(machine: Machine) -> bool:
    """Whether vLLM has an attention kernel there that reads an FP8 KV cache.

    Source: vllm/v1/attention/backends, supported_kv_cache_dtypes; cpu_attn.py for CPUs.
    """
    return (machine.sm or 0) >= 8.0 if machine.kind == "cuda" else bool(machine.isa & BF16_ISA)


def _in_fp8(way: Way) -> Way:
    """The same way of running, with an FP8 KV cache."""
    return replace(
        way,
        name=f"{way.name}, FP8 KV cache",
        when=lambda machine: way.when(machine) and _caches_fp8(machine),
        why=f"{way.why} The cache stores FP8: Hopper and the data-centre Blackwells round the queries, too, "
        "and multiply FP8, other hardware widens it as it reads.",
        args=way.args | {"kv_cache_dtype": "fp8"},
        timed=f"{way.timed}, FP8 cache",
    )


def with_fp8_cache(base: Scheme, name: str, title: str, **changes) -> Scheme:
    """A scheme's weights with an FP8 KV cache: a scheme of its own, on hardware that runs both."""
    ways = tuple(_in_fp8(way) for way in base.ways if not way.expanded)
    lacks = f"{base.lacks} An FP8 KV cache needs SM 8.0 on a GPU, and AVX-512 or AMX on a CPU."
    return replace(base, name=name, title=title, ways=ways, lacks=lacks, kv_bytes=1, **changes)
