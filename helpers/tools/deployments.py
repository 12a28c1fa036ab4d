"""What is measured of large models on a GPU: their shapes, the ways to deploy each, and the loads.

For models whose weights are not at hand: vLLM fills the matrices with random numbers, in the format that the
config.json of a quantized checkpoint names. Bytes and speed are the real model's, its words mean nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from helpers.model import shapes

LONGEST = 8192 + 256  # tokens of a prompt and its answer
GRAPHS = (1, 8, 32, 64, 256)  # batch sizes with a CUDA graph: those that are measured, for shorter starts
PROBE = "helpers.engine.probe.Probe"
GPU = bool(shutil.which("nvidia-smi"))

_TINY = shapes.CONFIGS["qwen3-8b"] | {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
}  # fmt: skip
# By name: title and config.json; the last one is for trying the tool on any machine.
MODELS: dict[str, tuple[str, dict]] = {
    **{name: (title, shapes.CONFIGS[name]) for name, title in shapes.TITLES.items()},
    "tiny": ("Tiny", _TINY),
}

_BITS8 = {"num_bits": 8, "symmetric": True}
_CT = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "quantization_status": "compressed"}


def _group(weights: dict, inputs: dict | None, form: str) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {"quantization_config": _CT | {"format": form, "config_groups": {"group_0": group}}}


# What a checkpoint of each format says of itself in its config.json: llm-compressor's presets FP8_DYNAMIC,
# W4A16_ASYM and W8A8, ModelOpt's NVFP4, and GPTQ, which is how Qwen ships its mixtures of experts in 4 bits.
FP8 = _group(
    _BITS8 | {"type": "float", "strategy": "channel", "dynamic": False},
    _BITS8 | {"type": "float", "strategy": "token", "dynamic": True},
    "float-quantized",
)
INT8 = _group(
    _BITS8 | {"type": "int", "strategy": "channel", "dynamic": False},
    _BITS8 | {"type": "int", "strategy": "token", "dynamic": True},
    "int-quantized",
)
AWQ = _group(
    {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 128, "strategy": "group",
     "dynamic": False, "zp_dtype": "torch.int8"},
    None,
    "pack-quantized",
)  # fmt: skip
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
NVFP4 = {
    "quantization_config": {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"input_activations": _FP4, "weights": _FP4, "targets": ["Linear"]}},
    }
}  # fmt: skip
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False,
                                "sym": True, "lm_head": False}}  # fmt: skip
_CACHE = {"kv_cache_dtype": "fp8"}
_TRITON = {"attention_backend": "TRITON_ATTN"}


@dataclass(frozen=True)
class Way:
    """One way to deploy a model: its scheme, what its config.json adds, further arguments of ``vllm.LLM``."""

    scheme: str
    config: dict = field(default_factory=dict)
    args: dict = field(default_factory=dict)

    @property
    def forced(self) -> bool:
        """Whether the kernel is another than vLLM would choose."""
        return bool({"linear_backend", "moe_backend", "attention_backend"} & set(self.args))

    @property
    def cache_bytes(self) -> int:
        return 1 if "kv_cache_dtype" in self.args else 2


# By kernel where there is a choice. vLLM's own choice on Hopper is Machete for 4 bits; everywhere else it is
# Marlin, which is why that is measured here, too.
WAYS: dict[str, Way] = {
    "bf16": Way("baseline"),
    "bf16, FP8 cache": Way("fp8_kv", args=_CACHE),
    "fp8": Way("fp8", FP8),
    "fp8, FP8 cache": Way("fp8_fp8_kv", FP8, _CACHE),
    "fp8 per tensor": Way("fp8_tensor", args={"quantization": "fp8_per_tensor"}),
    "fp8, Marlin": Way("fp8", FP8, {"linear_backend": "marlin"}),  # vLLM's own choice before SM 8.9
    "bf16, Triton attention": Way("baseline", args=_TRITON),
    "fp8, Triton attention": Way("fp8", FP8, _TRITON),
    "awq, Machete": Way("awq", AWQ),
    "awq, Marlin": Way("awq", AWQ, {"linear_backend": "marlin"}),
    "awq, Humming": Way("awq", AWQ, {"linear_backend": "humming"}),
    "awq, Marlin, FP8 cache": Way("awq_fp8_kv", AWQ, {"linear_backend": "marlin"} | _CACHE),
    "int8": Way("int8", INT8),
    "nvfp4": Way("nvfp4", NVFP4),
    "gptq": Way("awq", GPTQ),
    # vLLM's own choice for MXFP4 on Hopper are OpenAI's Triton kernels (fused_moe/oracle/mxfp4.py). What they
    # compile at a start took most of 84 s alone, and 170 s were not enough beside five other starts.
    "mxfp4, Marlin": Way("mxfp4", args={"moe_backend": "marlin"}),
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
    """An engine of a round: what it has, what it is asked, and the GPUs that it is spread over."""

    model: str
    way: str
    loads: tuple[tuple[int, int], ...]
    gpus: str = "0"

    @property
    def count(self) -> int:
        return len(self.gpus.split(","))


def _runs(model: str, ways: tuple[str, ...], loads: tuple, gpus: str = "0") -> tuple[Run, ...]:
    return tuple(Run(model, way, loads, gpus) for way in ways)


# Rounds: engines that fit GPUs of 140 GiB together, in the order of what their figures are worth.
ROUNDS: dict[str, tuple[Run, ...]] = {
    "8b": (
        *_runs("qwen3-8b", ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache"), LONG),
        *_runs("qwen3-8b", ("awq, Machete", "fp8 per tensor"), FEW),
    ),
    "32b": _runs("qwen3-32b", ("bf16", "fp8"), BIG),
    "32b-more": _runs("qwen3-32b", ("awq, Marlin", "fp8, FP8 cache", "awq, Machete"), BIG),
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
    "8b-forced": _runs("qwen3-8b", ("fp8, Marlin", "bf16, Triton attention", "fp8, Triton attention"), FEW),
    "7b": _runs("mistral-7b", ("fp8", "awq, Marlin", "fp8, FP8 cache", "bf16"), LONG),
    "phi-2": _runs("phi-2", ("bf16", "fp8", "awq, Marlin"), SHORT),
    "experts-more": _runs("gpt-oss-20b", ("mxfp4",), SHORT),
    "70b-on-two": _runs("llama-3.1-70b", ("bf16", "fp8"), TWO, "0,1"),
    "four-bits-on-two": (
        *_runs("llama-3.1-70b", ("awq, Marlin",), TWO, "0,1"),
        *_runs("mistral-7b", ("bf16", "fp8", "awq, Marlin"), TWO, "0,1"),
        *_runs("qwen3-30b-a3b", ("bf16", "fp8"), TWO, "0,1"),
    ),
    "70b-on-four": _runs("llama-3.1-70b", ("bf16", "fp8"), TWO, "0,1,2,3"),
    "7b-on-four": _runs("mistral-7b", ("bf16", "fp8"), TWO, "0,1,2,3"),
    "tiny": _runs("tiny", ("bf16", "awq, Machete"), ((16, 1), (16, 8), (128, 2))),
}


def shape(model: str, way: str, folder: Path) -> dict:
    """Write the config.json of a model in a format; return it."""
    config = MODELS[model][1] | WAYS[way].config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def cache_bytes(config: dict, cells: tuple, width: int) -> int:
    """Bytes of KV cache for the largest of the loads: prompts, and some 80 tokens of each answer."""
    heads = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * heads * width
    return int(max(batch * (prompt + 80) for prompt, batch in cells) * token * 1.08) + (64 << 20)


def engine_args(model: str, way: str, cells: tuple, folder: Path, gpus: int = 1) -> dict:
    """Arguments of ``vllm.LLM``: vLLM's own choices but for what many engines on one GPU need."""
    config = shape(model, way, folder)
    longest = min(LONGEST, config["max_position_embeddings"])
    args = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_batched_tokens": 8192,  # these two are the server's own; LLM's are 16,384 and 1,024 here
        "max_num_seqs": 256,
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
        "worker_extension_cls": PROBE,
        "kv_cache_memory_bytes": cache_bytes(config, cells, WAYS[way].cache_bytes) // gpus,  # of each
        "compilation_config": {"cudagraph_capture_sizes": list(GRAPHS)},
        "kernel_config": {"enable_jit_warmup": False},
        **WAYS[way].args,
    }
    if "moe_backend" in args:
        args["kernel_config"] = args["kernel_config"] | {"moe_backend": args.pop("moe_backend")}
    if gpus > 1:
        args["tensor_parallel_size"] = gpus
    if not GPU:
        return args | {"enforce_eager": True, "compilation_config": {}}
    return args | {"gpu_memory_utilization": 0.02}  # checked against what is free; the cache's size is given
