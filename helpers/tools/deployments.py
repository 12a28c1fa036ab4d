"""What is measured of large models on a GPU: their shapes, the ways to deploy each, and the loads.

For models whose weights are not at hand: vLLM fills the matrices with random numbers, in the format that the
config.json of a quantized checkpoint names. Bytes and speed are the real model's, its words mean nothing.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from helpers.base.machine import MIB
from helpers.model import checkpoints, shapes, sizes
from helpers.model.model import Model
from helpers.tools.recording import sharing

LONGEST = 8192 + 256  # tokens of a prompt and its answer
GRAPHS = (1, 8, 32, 64, 256)  # batch sizes with a CUDA graph: those that are measured, for shorter starts

# What ModelOpt's checkpoints in NVFP4 say of themselves in their config.json, and those of GPTQ, which is how
# Qwen ships its mixtures of experts in 4 bits. llm-compressor's ``checkpoints.make`` knows.
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
NVFP4 = {
    "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"input_activations": _FP4, "weights": _FP4, "targets": ["Linear"]}},
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
}  # fmt: skip
_CACHE = {"kv_cache_dtype": "fp8"}
_MARLIN = {"linear_backend": "marlin"}


@dataclass(frozen=True)
class Way:
    """One way to deploy a model: its scheme, its weights' format and further arguments of ``vllm.LLM``.

    ``format`` is a recipe of ``checkpoints.make``, or what the config.json says of the quantization.
    """

    scheme: str
    format: str | dict | None = None
    args: dict = field(default_factory=dict)


# By kernel where there is a choice. vLLM's own choice on Hopper is Machete for 4 bits; everywhere else it is
# Marlin, which is why that is measured here, too.
WAYS: dict[str, Way] = {
    "bf16": Way("baseline"),
    "bf16, FP8 cache": Way("fp8_kv", args=_CACHE),
    "fp8": Way("fp8", "fp8"),
    "fp8, FP8 cache": Way("fp8_fp8_kv", "fp8", _CACHE),
    "fp8 per tensor": Way("fp8_tensor", args={"quantization": "fp8_per_tensor"}),
    "fp8, Marlin": Way("fp8", "fp8", _MARLIN),  # vLLM's own choice before SM 8.9
    "bf16, Triton attention": Way("baseline", args={"attention_backend": "TRITON_ATTN"}),
    "awq, Machete": Way("awq", "awq"),
    "awq, Marlin": Way("awq", "awq", _MARLIN),
    "awq, Humming": Way("awq", "awq", {"linear_backend": "humming"}),
    "awq, Marlin, FP8 cache": Way("awq_fp8_kv", "awq", _MARLIN | _CACHE),
    "int8": Way("int8", "int8"),
    "nvfp4": Way("nvfp4", NVFP4),
    "gptq": Way("awq", GPTQ),
    # vLLM's own choice for MXFP4 on Hopper are OpenAI's Triton kernels (fused_moe/oracle/mxfp4.py). What they
    # compile at a start took most of 84 s alone, and 170 s were not enough beside five other starts.
    "mxfp4, Marlin": Way(
        "mxfp4", args={"kernel_config": {"moe_backend": "marlin", "enable_jit_warmup": False}}
    ),
    "mxfp4": Way("mxfp4"),
}

# Loads: tokens of each prompt, and how many at once.
SHORT = ((16, 1), (16, 8), (16, 64), (16, 256))
LONG = (*SHORT, (1024, 1), (1024, 8), (1024, 64), (8192, 1), (8192, 8))
FEW = (*SHORT, (1024, 8), (1024, 64))
BIG = (*SHORT, (1024, 1), (1024, 8), (1024, 32), (8192, 1), (8192, 4))  # where 64 prompts take minutes
LARGEST = (*SHORT, (1024, 1), (1024, 8), (8192, 1))
TWO = (*SHORT, (1024, 8))


class Run(NamedTuple):
    """An engine of a round: what it has, what it is asked, and how many GPUs it is spread over."""

    model: str
    way: str
    loads: tuple[tuple[int, int], ...]
    gpus: int = 1


def _runs(model: str, ways: tuple[str, ...], loads: tuple, gpus: int = 1) -> tuple[Run, ...]:
    return tuple(Run(model, way, loads, gpus) for way in ways)


# Rounds: engines that fit GPUs of 140 GiB together, in the order of what their figures are worth.
ROUNDS: dict[str, tuple[Run, ...]] = {
    "8b": (
        *_runs("qwen3-8b", ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache"), LONG),
        *_runs("qwen3-8b", ("awq, Machete", "fp8 per tensor"), FEW),
    ),
    "32b": _runs("qwen3-32b", ("bf16", "fp8"), BIG),
    "32b-more": _runs("qwen3-32b", ("awq, Marlin", "fp8, FP8 cache"), BIG),
    "experts": (
        *_runs("qwen3-30b-a3b", ("bf16", "fp8"), LONG),
        *_runs("gpt-oss-20b", ("mxfp4, Marlin",), LONG),
    ),
    "70b": _runs("llama-3.1-70b", ("fp8", "awq, Marlin"), LARGEST),
    "8b-more": (
        *_runs("qwen3-8b", ("int8", "nvfp4", "awq, Humming"), FEW),
        *_runs("qwen3-8b", ("awq, Marlin, FP8 cache", "bf16, FP8 cache"), LONG),
        *_runs("qwen3-30b-a3b", ("gptq",), LONG),
    ),
    "8b-forced": _runs("qwen3-8b", ("fp8, Marlin", "bf16, Triton attention"), FEW),
    "7b": _runs("mistral-7b", ("fp8", "awq, Marlin", "fp8, FP8 cache", "bf16"), LONG),
    "phi-2": _runs("phi-2", ("bf16", "fp8", "awq, Marlin"), SHORT),
    "experts-more": _runs("gpt-oss-20b", ("mxfp4",), SHORT),
    "70b-on-two": _runs("llama-3.1-70b", ("bf16", "fp8"), TWO, 2),
    "four-bits-on-two": (
        *_runs("llama-3.1-70b", ("awq, Marlin",), TWO, 2),
        *_runs("mistral-7b", ("bf16", "fp8", "awq, Marlin"), TWO, 2),
        *_runs("qwen3-30b-a3b", ("bf16", "fp8"), TWO, 2),
    ),
    "70b-on-four": _runs("llama-3.1-70b", ("bf16", "fp8"), TWO, 4),
    "7b-on-four": _runs("mistral-7b", ("bf16", "fp8"), TWO, 4),
}


def shape(model: str, way: str) -> Model:
    """A model without weights in a way's format."""
    plain, how = shapes.shape(model), WAYS[way].format
    if isinstance(how, dict):
        return shapes.reshaped(plain, WAYS[way].scheme, {"quantization_config": how})
    return checkpoints.make(plain, how) if how else plain


def engine_args(run: Run) -> dict:
    """Arguments of ``open_engine``: vLLM's own choices but for what many engines on one GPU need."""
    model, way = shape(run.model, run.way), WAYS[run.way]
    token = sizes.layout(model.folder).kv_token_bytes(1 if "kv_cache_dtype" in way.args else 2)
    tokens = max(batch * (prompt + 80) for prompt, batch in run.loads)  # prompts, and some 80 of each answer
    cache = int(1.08 * tokens * token) + 64 * MIB
    return {
        "max_model_len": min(LONGEST, model.config["max_position_embeddings"]),
        "max_num_batched_tokens": 8192,  # these two are the server's own; LLM's are 16,384 and 1,024 here
        "max_num_seqs": 256,
        "tensor_parallel_size": run.gpus,
        **sharing(cache // run.gpus, GRAPHS),
        **way.args,
    }
