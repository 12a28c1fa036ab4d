"""The quantization schemes: what each stores, how this machine runs it, the bytes it should take.

A scheme is one entry of ``SCHEMES``; nothing else in the project branches on a scheme's name. Each
entry lists its ways of running, best first, and the first whose condition holds for the machine is
taken. The conditions and their sources are read from vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from helpers.base.machine import Machine


class SchemeError(ValueError):
    """A scheme that does not exist or does not run on this machine; the message says why."""


@dataclass(frozen=True)
class Way:
    """One way a scheme runs on some hardware.

    ``name`` says how, ``why`` in one sentence, ``args`` what it adds to ``vllm.LLM``'s arguments,
    ``source`` where in vLLM (or in the hardware's manual) that is decided. Where no kernel reads the
    scheme's format, ``expanded`` has its rounded weights written out in 16 bits first: the answers are the
    scheme's, bytes and speed are not. ``group_bytes`` is what a kernel that repacks a group's scale and
    zero point keeps of them, if that is not what the file has. ``arithmetic_bits`` is the width of what is
    multiplied: 8 where weights and activations both are, 16 (or the baseline's 32) where weights are
    widened first. ``onednn`` is false where torch must not leave the products to oneDNN.
    """

    name: str
    when: Callable[[Machine], bool]
    why: str
    source: str
    args: dict = field(default_factory=dict)
    expanded: bool = False
    group_bytes: float | None = None
    arithmetic_bits: int = 16
    onednn: bool = True

    @property
    def plain_bytes(self) -> int:
        """Bytes that a weight which is not quantized takes in memory."""
        return 4 if self.args.get("dtype") == "float32" else 2


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme.

    ``weight_bits`` is what one weight of a quantized linear layer takes, without its scales.
    ``channel_bytes`` is stored once an output channel (a scale), ``group_bytes`` once a group of
    weights (a scale, and half a byte of zero point). ``recipe`` names the checkpoint that
    ``model.checkpoints`` makes for it; without one vLLM quantizes while it loads. ``kv_bytes`` is what
    one key or value takes in its KV cache. The last three are the guide's words: when to take it, what
    overrules that, and the notebook that measures it.
    """

    name: str
    title: str
    weight_bits: int
    ways: tuple[Way, ...]
    channel_bytes: float = 0.0
    group_bytes: float = 0.0
    recipe: str | None = None
    kv_bytes: int = 2
    best_for: str = ""
    unless: str = ""
    lesson: str = ""

    def way(self, machine: Machine) -> Way:
        """Return how this machine runs the scheme.

        Raises:
            SchemeError: it does not; the message says what the machine lacks.
        """
        for way in self.ways:
            if way.when(machine):
                return way
        raise SchemeError(f"{self.title} does not run on {machine.label}: {self.ways[-1].why}")


def _cuda(low: float = 0.0, high: float = 99.0) -> Callable[[Machine], bool]:
    return lambda machine: machine.kind == "cuda" and low <= (machine.sm or 0) < high


def _cpu(*flags: str) -> Callable[[Machine], bool]:
    return lambda machine: machine.kind == "cpu" and (not flags or bool(machine.isa & set(flags)))


BF16_ISA = frozenset({"amx_bf16", "avx512_bf16", "avx512f"})  # what oneDNN has BF16 kernels for

_BF16, _FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}

_PLATFORM = "vllm/platforms/cuda.py: supported_dtypes, by compute capability"

_ONEDNN = "vllm/model_executor/layers/utils.py: dispatch_cpu_unquantized_gemm"

BASELINE = Scheme(
    name="baseline",
    title="Baseline (16-bit)",
    weight_bits=16,
    best_for="the yardstick; a model that fits with room to spare",
    unless="the memory or the bandwidth is short",
    lesson="01_baseline",
    ways=(
        Way("BF16 tensor cores", _cuda(8.0), "The GPU multiplies BF16 natively.", _PLATFORM, _BF16),
        Way(
            "FP16 tensor cores",
            _cuda(7.0, 8.0),
            "Turing and Volta multiply FP16 but not BF16.",
            _PLATFORM,
            {"dtype": "float16"},
        ),
        Way("BF16 with AMX tiles", _cpu("amx_bf16"), "The CPU has BF16 matrix units.", _ONEDNN, _BF16),
        Way(
            "BF16 with AVX-512",
            _cpu("avx512_bf16", "avx512f"),
            "oneDNN has BF16 kernels for AVX-512.",
            _ONEDNN,
            _BF16,
        ),
        Way(
            "FP32, weights widened once",
            _cpu(),
            "No AVX-512: there is no BF16 kernel, and emulating one is several times slower than FP32, so "
            "the 16-bit weights are widened to 32 as they are loaded.",
            _ONEDNN,
            _FP32,
        ),
    ),
)

_FP8_GPU = "vllm/model_executor/kernels/linear/scaled_mm: is_supported of each FP8 kernel"

_FP8_CPU = "vllm/model_executor/kernels/linear/scaled_mm/cpu.py: FP8 kernels ask for AMX tiles"

_WNA16 = "vllm/model_executor/kernels/linear/mixed_precision: can_implement of each kernel"

_INT8 = "vllm/model_executor/kernels/linear/scaled_mm: is_supported of each INT8 kernel"

# A scale a block: the kernel takes one a tensor, too, but vLLM's CPU build cannot round so as it loads.
_FP8_AMX = Way(
    "FP8 weights, BF16 arithmetic in AMX tiles",
    _cpu("amx_bf16"),
    "The CPU has BF16 matrix units, and a kernel that widens FP8 for them, with one scale for each "
    "block of 128 x 128 weights.",
    _FP8_CPU,
    _BF16 | {"quantization": "fp8_per_block"},
)

_FP8_EMULATED = Way(
    "FP8 emulated",
    _cpu(),
    "No kernel of this CPU takes the format: PyTorch widens every weight for every step.",
    _FP8_CPU,
    _BF16 | {"quantization": "fp8_per_channel"},
    onednn=False,
)

FP8 = Scheme(
    name="fp8",
    title="FP8, quantized while loading",
    weight_bits=8,
    best_for="many users at once, on hardware that multiplies FP8",
    unless="the hardware only stores it: a GPU then gains at small batches alone, a CPU without AMX loses; "
    "the model is small (02_fp8 has that on record); or the batch is very large, where less of the gain is "
    "left (04_compare has why)",
    lesson="02_fp8",
    channel_bytes=4,
    ways=(
        Way(
            "FP8 tensor cores",
            _cuda(8.9),
            "From SM 8.9 on the GPU multiplies FP8 by FP8.",
            _FP8_GPU,
            _BF16 | {"quantization": "fp8_per_tensor"},
            arithmetic_bits=8,
        ),
        Way(
            "FP8 weights, 16-bit arithmetic",
            _cuda(7.5, 8.9),
            "Below SM 8.9 no matrix unit knows FP8; Marlin widens the weights as it reads them.",
            _FP8_GPU,
            {"dtype": "auto", "quantization": "fp8_per_tensor"},
        ),
        _FP8_AMX,
        _FP8_EMULATED,
    ),
)

FP8_FILE = Scheme(
    name="fp8_file",
    title="FP8 checkpoint",
    weight_bits=8,
    channel_bytes=2,
    recipe="fp8",
    ways=tuple(
        replace(way, args={"dtype": way.args["dtype"]})
        for way in (
            *FP8.ways[:2],
            replace(
                _FP8_EMULATED,
                when=_cpu("amx_bf16"),
                why="Such a checkpoint has one scale a channel, and the kernel for AMX takes one a block or "
                "a matrix: PyTorch widens every weight for every step.",
            ),
            _FP8_EMULATED,
        )
    ),
)

_W4 = (
    Way(
        "W4A16 kernel on tensor cores",
        _cuda(9.0, 10.0),
        "Machete unpacks 4-bit weights to 16 bits as it multiplies; it keeps zero points in 16 bits, too.",
        _WNA16,
        {"dtype": "auto"},
        group_bytes=4.0,
    ),
    Way(
        "W4A16 kernel on tensor cores",
        _cuda(7.5),
        "Marlin unpacks 4-bit weights to 16 bits as it multiplies.",
        _WNA16,
        {"dtype": "auto"},
    ),
    Way(
        "W4A8 kernel of the CPU (CPUWNA16)",
        _cpu("amx_bf16"),
        "With AMX vLLM's CPU kernel rounds the activations to 8 bits as well, step by step, and multiplies "
        "integers; VLLM_CPU_INT4_W4A8=0 keeps them in 16 bits.",
        "vllm/model_executor/kernels/linear/mixed_precision/cpu.py: use_w4a8",
        _BF16,
        # Repacked: a scale and a sum for the zero point in 32 bits each, the zero point in 8.
        group_bytes=9.0,
        arithmetic_bits=8,
    ),
    Way(
        "W4A16 kernel of the CPU (CPUWNA16)",
        _cpu("avx512f"),
        "vLLM's CPU kernel unpacks 4-bit weights to 16 bits as it multiplies.",
        _WNA16,
        _BF16,
    ),
    Way(
        "W4A16 emulated: rounded weights written out in FP32",
        _cpu(),
        "vLLM's kernel for 4-bit weights (cpu_gemm_wna16) is missing from its build for CPUs without "
        "AVX-512: the rounded weights run as the baseline's do, with their answers but without their saving.",
        _WNA16,
        _FP32,
        expanded=True,
    ),
    Way("", lambda machine: False, "4-bit weights need SM 7.5 on a GPU.", _WNA16),
)

AWQ = Scheme(
    name="awq",
    title="W4A16 (AWQ)",
    weight_bits=4,
    ways=_W4,
    group_bytes=2.5,
    recipe="awq",
    best_for="a model that fits no other way; few users at once",
    unless="the batch is large, the model small, the arithmetic scarce; or eight bits are faster even for "
    "one user (03_awq has that on record)",
    lesson="03_awq",
)

ROUNDED = Scheme("rounded", "W4A16 (plain rounding)", 4, _W4, group_bytes=2.5, recipe="rtn")

INT8 = Scheme(
    name="int8",
    title="INT8 W8A8",
    weight_bits=8,
    best_for="many users at once, where there is no FP8 arithmetic: T4, A100, CPUs with AVX-512",
    unless="your model's activations have outliers that smoothing does not tame",
    lesson="02_fp8",
    channel_bytes=4,
    recipe="int8",
    ways=(
        Way(
            "INT8 tensor cores",
            _cuda(7.5, 10.0),
            "The GPU multiplies INT8 natively.",
            _INT8,
            {"dtype": "auto"},
            arithmetic_bits=8,
        ),
        *(
            Way(
                name,
                when,
                why,
                _INT8,
                args,
                arithmetic_bits=8,
            )
            for name, when, args, why in (
                (
                    "INT8 in vLLM's own CPU kernel",
                    _cpu("amx_bf16"),
                    _BF16,
                    "With AMX vLLM has a kernel of its own, for matrices of the usual sizes "
                    "(check_cpu_sgl_kernel).",
                ),
                (
                    "INT8 in oneDNN",
                    _cpu(*BF16_ISA),
                    _BF16,
                    "The CPU multiplies INT8 integers in its vector units.",
                ),
                (
                    "INT8 in oneDNN",
                    _cpu(),
                    _FP32,
                    "Every x86 CPU multiplies INT8 integers, but with AVX2 alone in several instructions "
                    "for each product, and the activations have to be rounded at every step.",
                ),
            )
        ),
        Way(
            "",
            lambda machine: False,
            "The kernel that vLLM picks for INT8 (CUTLASS) refuses Blackwell; use FP8 there.",
            "csrc/libtorch_stable/quantization/w8a8/cutlass/c3x/scaled_mm_helper.hpp: Int8 not supported",
        ),
    ),
)

_KV_SOURCE = "vllm/v1/attention/backends: supported_kv_cache_dtypes; cpu_attn.py for CPUs"

_KV_WHY = {
    "cpu": "The cache stores FP8 and is widened when it is read.",
    "cuda": "The cache stores FP8; a GPU of Hopper's generation rounds the queries, too, and multiplies FP8, "
    "others widen the cache as they read it.",
}

FP8_KV = Scheme(
    name="fp8_kv",
    title="16-bit weights, FP8 KV cache",
    weight_bits=16,
    kv_bytes=1,
    best_for="long contexts and many users: twice the tokens in the same memory",
    unless="the answers suffer: what is rounded here are keys and values alone",
    lesson="02_fp8",
    ways=(
        *(
            Way(
                f"{way.name}, FP8 KV cache",
                way.when,
                _KV_WHY["cuda" if "tensor" in way.name else "cpu"],
                _KV_SOURCE,
                way.args | {"kv_cache_dtype": "fp8"},
            )
            for way in BASELINE.ways
            if way.name not in ("FP16 tensor cores", "FP32, weights widened once")
        ),
        Way(
            "",
            lambda machine: False,
            "An FP8 KV cache needs SM 8.0 on a GPU, and AVX-512 or AMX on a CPU.",
            _KV_SOURCE,
        ),
    ),
)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (BASELINE, FP8, FP8_FILE, AWQ, ROUNDED, INT8, FP8_KV)
}


def scheme(name: str) -> Scheme:
    """Return the scheme called ``name``, or say which there are."""
    try:
        return SCHEMES[name]
    except KeyError:
        raise SchemeError(f"There is no scheme {name!r}. There are: {', '.join(SCHEMES)}.") from None
