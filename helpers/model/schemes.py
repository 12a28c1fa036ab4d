"""The quantization schemes: what each stores, how this machine runs it, the bytes it should take.

A scheme is one entry of ``SCHEMES`` (what the lessons measure) or of ``DEPLOYED``, its look in figures
included; nothing that runs an engine branches on a scheme's name. Each entry lists its ways of running, best
first, and the first whose condition holds for the machine is taken. The conditions and their sources are read
from vLLM 0.32.
"""

from dataclasses import replace

from helpers.model.scheme import BF16_ISA, Scheme, SchemeError, Way, cpu, cuda, with_fp8_cache

_BF16, _FP16, _FP32 = ({"dtype": name} for name in ("bfloat16", "float16", "float32"))

# Source: vllm/platforms/cuda.py, supported_dtypes; of CPUs dispatch_cpu_unquantized_gemm in
# vllm/model_executor/layers/utils.py; what CUDA 13 needs vllm/docs/getting_started/installation.
BASELINE = Scheme(
    name="baseline",
    look=("#0072B2", "o", "-"),
    title="Baseline (16-bit)",
    weight_bits=16,
    ways=(
        Way("BF16 tensor cores", cuda(8.0), "The GPU multiplies BF16 natively.", _BF16),
        Way("FP16 tensor cores", cuda(7.5, 8.0), "Turing multiplies FP16 but not BF16.", _FP16),
        Way("BF16 with AMX tiles", cpu("amx_bf16"), "The CPU has BF16 matrix units.", _BF16),
        Way("BF16 with AVX-512", cpu(*BF16_ISA), "oneDNN has BF16 kernels for AVX-512.", _BF16),
        Way(
            "FP32, weights widened once",
            cpu(),
            "No AVX-512: there is no BF16 kernel, and emulating one is several times slower than FP32, so "
            "the 16-bit weights are widened to 32 as they are loaded.",
            _FP32,
        ),
    ),
    lacks="vLLM 0.32 is built with CUDA 13, which knows no GPU before Turing (SM 7.5).",
)

# Source, of INT8 too: vllm/model_executor/kernels/linear/scaled_mm, is_supported of each kernel.
_FP8_TENSOR = Way(
    "FP8 tensor cores, a scale a channel",
    cuda(8.9),
    "From SM 8.9 on the GPU multiplies FP8 by FP8. Each output channel has a scale, and activations "
    "are scaled token by token, as in the checkpoints that vendors publish (FP8_DYNAMIC).",
    _BF16 | {"quantization": "fp8_per_channel"},
    arithmetic_bits=8,
    timed="fp8",
)

_FP8_MARLIN = Way(
    "FP8 weights, 16-bit arithmetic",
    cuda(7.5, 8.9),
    "Below SM 8.9 no matrix unit knows FP8; Marlin widens the weights as it reads them.",
    {"dtype": "auto", "quantization": "fp8_per_tensor"},
    timed="fp8, Marlin",
)

# A scale a block: the kernel takes one a tensor, too, but vLLM's CPU build cannot round so as it loads.
_FP8_AMX = Way(
    "FP8 weights, BF16 arithmetic in AMX tiles",
    cpu("amx_bf16"),
    "The CPU has BF16 matrix units, and a kernel that widens FP8 for them, with one scale for each "
    "block of 128 x 128 weights.",
    _BF16 | {"quantization": "fp8_per_block"},
)

_FP8_EMULATED = Way(
    "FP8 emulated",
    cpu(),
    "No kernel of this CPU takes the format: PyTorch widens every weight for every step.",
    _BF16 | {"quantization": "fp8_per_channel"},
    onednn=False,
)

FP8 = Scheme(
    name="fp8",
    look=("#D55E00", "s", "--"),
    title="FP8 weights",
    weight_bits=8,
    channel_bytes=4,
    ways=(_FP8_TENSOR, _FP8_MARLIN, _FP8_AMX, _FP8_EMULATED),
    lacks="FP8 weights need SM 7.5 on a GPU.",
)

FP8_FILE = Scheme(
    name="fp8_file",
    look=("#AD7A00", "D", "-."),
    title="FP8 checkpoint",
    weight_bits=8,
    channel_bytes=2,
    recipe="fp8",
    ways=tuple(
        replace(way, args={"dtype": way.args["dtype"]})
        for way in (
            _FP8_TENSOR,
            _FP8_MARLIN,
            replace(
                _FP8_EMULATED,
                when=cpu("amx_bf16"),
                why="Such a checkpoint has one scale a channel, and the kernel for AMX takes one a block or "
                "a matrix: PyTorch widens every weight for every step.",
            ),
            _FP8_EMULATED,
        )
    ),
    lacks=FP8.lacks,
)

# Source: vllm/model_executor/kernels/linear/mixed_precision, can_implement of each; use_w4a8 in cpu.py.
_W4_MARLIN = Way(
    "W4A16 kernel on tensor cores (Marlin)",
    cuda(7.5),
    "Marlin unpacks 4-bit weights to 16 bits as it multiplies.",
    timed="awq, Marlin",
)

AWQ = Scheme(
    name="awq",
    look=("#009E73", "^", "-"),
    title="AWQ weights",
    weight_bits=4,
    group_bytes=2.5,
    recipe="awq",
    ways=(
        Way(
            "W4A16 kernel on tensor cores",
            cuda(9.0, 10.0),
            "Machete unpacks 4-bit weights to 16 bits as it multiplies; it keeps zero points in 16 bits, "
            "too.",
            group_bytes=4.0,
            timed="awq, Machete",
        ),
        _W4_MARLIN,
        Way(
            "W4A8 kernel of the CPU (CPUWNA16)",
            cpu("amx_bf16"),
            "With AMX vLLM's CPU kernel rounds the activations to 8 bits as well, step by step, and "
            "multiplies integers; VLLM_CPU_INT4_W4A8=0 keeps them in 16 bits.",
            _BF16,
            # Repacked: a scale and a sum for the zero point in 32 bits each, the zero point in 8.
            group_bytes=9.0,
            arithmetic_bits=8,
        ),
        Way(
            "W4A16 kernel of the CPU (CPUWNA16)",
            cpu("avx512f"),
            "vLLM's CPU kernel unpacks 4-bit weights to 16 bits as it multiplies.",
            _BF16,
        ),
        Way(
            "W4A16 emulated: rounded weights written out in FP32",
            cpu(),
            "vLLM's kernel for 4-bit weights (cpu_gemm_wna16) is missing from its build for CPUs without "
            "AVX-512: the rounded weights run as the baseline's do, with their answers but without their "
            "saving.",
            _FP32,
            expanded=True,
        ),
    ),
    lacks="4-bit weights need SM 7.5 on a GPU.",
)

ROUNDED = replace(
    AWQ, name="rounded", title="W4A16 (plain rounding)", recipe="rtn", look=("#808080", "X", (0, (2, 1)))
)

INT8 = Scheme(
    name="int8",
    look=("#BF6795", "P", "--"),
    title="INT8 W8A8",
    weight_bits=8,
    channel_bytes=4,
    recipe="int8",
    ways=(
        Way(
            "INT8 tensor cores",
            cuda(7.5, 10.0),
            "The GPU multiplies INT8 natively.",
            arithmetic_bits=8,
            integers=True,
            timed="int8",
        ),
        Way(
            "INT8 in vLLM's own CPU kernel",
            cpu("amx_bf16"),
            "With AMX vLLM has a kernel of its own, for matrices of the usual sizes (check_cpu_sgl_kernel).",
            _BF16,
            arithmetic_bits=8,
        ),
        Way(
            "INT8 in oneDNN",
            cpu(*BF16_ISA),
            "The CPU multiplies INT8 integers in its vector units.",
            _BF16,
            arithmetic_bits=8,
        ),
        Way(
            "INT8 in oneDNN",
            cpu(),
            "Every x86 CPU multiplies INT8 integers, but with AVX2 alone in several instructions "
            "for each product, and the activations have to be rounded at every step.",
            _FP32,
            arithmetic_bits=8,
        ),
    ),
    # Source: csrc/libtorch_stable/quantization/w8a8/cutlass/c3x/scaled_mm_helper.hpp: Int8 not supported
    lacks="The kernel that vLLM picks for INT8 (CUTLASS) refuses Blackwell; use FP8 there.",
)

FP8_KV = with_fp8_cache(
    BASELINE,
    "fp8_kv",
    "16-bit weights, FP8 KV cache",
    look=("#2F93CF", "v", (0, (4, 1, 1, 1, 1, 1))),  # dots alone are the bounds
)

# The schemes that the lessons measure, one by one.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (BASELINE, FP8, FP8_FILE, AWQ, ROUNDED, INT8, FP8_KV)
}

# -- what one deploys besides: two of them at once, and formats that come as checkpoints --------------------

# Source: vllm/model_executor/kernels/linear/nvfp4 and fused_moe/oracle/mxfp4.py: is_supported of each kernel.
_FP4_MARLIN = replace(_W4_MARLIN, name="4-bit floats, 16-bit arithmetic (Marlin)")

NVFP4 = Scheme(
    name="nvfp4",
    title="NVFP4 checkpoint",
    weight_bits=4,
    group=16,
    group_bytes=1,
    look=("#5B4A9E", "h", "-."),
    ways=(
        Way(
            "NVFP4 tensor cores",
            cuda(10.0),
            "Blackwell multiplies FP4 by FP4.",
            arithmetic_bits=4,
            timed="fp8",
        ),
        replace(
            _FP4_MARLIN,
            name="4-bit floats, 16-bit arithmetic (Humming)",
            when=cuda(9.0, 10.0),
            why="Before Blackwell no matrix unit knows FP4: Humming widens the weights as it reads.",
            timed="awq, Humming",
        ),
        replace(
            _FP4_MARLIN,
            why="Before Blackwell no matrix unit knows FP4: Marlin widens the weights as it reads.",
        ),
    ),
    lacks="FP4 weights need SM 7.5 on a GPU.",
)
MXFP4 = replace(
    NVFP4,
    name="mxfp4",
    title="MXFP4 checkpoint",
    group=32,
    look=("#7A4A2B", "<", (0, (2, 1))),
    ways=(
        replace(
            _FP4_MARLIN,
            name="MXFP4 experts, 16-bit arithmetic",
            when=cuda(8.0),
            why="The experts' weights are widened as they are read: by Triton's kernels on Hopper, by Marlin "
            "elsewhere.",
        ),
    ),
    lacks="MXFP4 experts need SM 8.0 on a GPU.",
)

DEPLOYED: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        with_fp8_cache(FP8, "fp8_fp8_kv", "FP8 weights, FP8 KV cache", look=("#8A3200", "p", "--")),
        with_fp8_cache(AWQ, "awq_fp8_kv", "AWQ weights, FP8 KV cache", look=("#00563F", "d", "-")),
        with_fp8_cache(INT8, "int8_fp8_kv", "INT8 weights, FP8 KV cache", look=("#8C2D62", "H", "--")),
        NVFP4,
        with_fp8_cache(NVFP4, "nvfp4_fp8_kv", "NVFP4 checkpoint, FP8 KV cache", look=("#2E2263", "8", "-.")),
        MXFP4,
    )
}
EVERY = SCHEMES | DEPLOYED


def scheme(name: str) -> Scheme:
    """Return the scheme called ``name``, or say which there are."""
    try:
        return EVERY[name]
    except KeyError:
        raise SchemeError(f"There is no scheme {name!r}. There are: {', '.join(EVERY)}.") from None


def look(name: str) -> dict:
    """Matplotlib's arguments for a scheme's line: the same everywhere.

    The colours are Okabe and Ito's, which colour-blind readers can tell apart, darkened where their contrast
    with white was below 3:1 (WCAG 2.2, 1.4.11), and darker ones for combinations.
    """
    colour, marker, line = EVERY[name].look if name in EVERY else Scheme.look
    return {"color": colour, "marker": marker, "linestyle": line}
