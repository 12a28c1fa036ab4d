"""What is measured of large models on a GPU: their shapes, the ways to deploy each, and the loads.

For models whose weights are not at hand: vLLM fills the matrices with random numbers, in the format that the
config.json of a quantized checkpoint names. Bytes and speed are the real model's, its words mean nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

LONGEST = 8192 + 256  # tokens of a prompt and its answer
GRAPHS = (1, 8, 32, 64, 256)  # batch sizes with a CUDA graph: those that are measured, for shorter starts
PROBE = "helpers.engine.probe.Probe"
GPU = bool(shutil.which("nvidia-smi"))

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict]] = {
    "qwen3-8b": ("Qwen3-8B", _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}),
    "qwen3-32b": ("Qwen3-32B", _QWEN3 | {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}),
    "qwen3-30b-a3b": ("Qwen3-30B-A3B", _QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "llama-3.1-70b": ("Llama-3.1-70B", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
        "rope_parameters": _LLAMA3_ROPE, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64}),
    "mistral-7b": ("Mistral-7B", {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "dtype": "bfloat16",
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2}),
    "phi-2": ("Phi-2", {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "dtype": "float16", "vocab_size": 51200,
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new", "partial_rotary_factor": 0.4, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        "bos_token_id": 50256, "eos_token_id": 50256}),
    "gpt-oss-20b": ("gpt-oss-20b", {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "dtype": "bfloat16",
        "attention_bias": True, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-5, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False},
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
        "eos_token_id": 200002, "pad_token_id": 199999}),
    "tiny": ("Tiny", _QWEN3 | {  # for trying the tool on any machine
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024}),
}  # fmt: skip

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


@dataclass(frozen=True)
class Way:
    """One way to deploy a model: its scheme, what its config.json adds, further arguments of ``vllm.LLM``."""

    scheme: str
    config: dict = field(default_factory=dict)
    args: dict = field(default_factory=dict)

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
    "awq, Machete": Way("awq", AWQ),
    "awq, Marlin": Way("awq", AWQ, {"linear_backend": "marlin"}),
    "awq, Humming": Way("awq", AWQ, {"linear_backend": "humming"}),
    "awq, Marlin, FP8 cache": Way("awq_fp8_kv", AWQ, {"linear_backend": "marlin"} | _CACHE),
    "int8": Way("int8", INT8),
    "nvfp4": Way("nvfp4", NVFP4),
    "gptq": Way("awq", GPTQ),
    # vLLM's own choice for MXFP4 on Hopper are OpenAI's Triton kernels (fused_moe/oracle/mxfp4.py). With
    # those and random weights an H200 had not started after 170 s; with Marlin it starts like any other.
    "mxfp4, Marlin": Way("mxfp4", args={"moe_backend": "marlin"}),
    "mxfp4": Way("mxfp4"),
}

# Loads: tokens of each prompt, and how many at once.
SHORT = ((16, 1), (16, 8), (16, 64), (16, 256))
LONG = (*SHORT, (1024, 1), (1024, 8), (1024, 64), (8192, 1), (8192, 8))
FEW = (*SHORT, (1024, 8), (1024, 64))
BIG = (*SHORT, (1024, 1), (1024, 8), (1024, 32), (8192, 1), (8192, 4))  # where 64 prompts take minutes
LARGEST = (*SHORT, (1024, 1), (1024, 8), (8192, 1))
# Rounds: engines that fit a GPU of 140 GiB together, in the order of what their figures are worth.
ROUNDS: dict[str, tuple[tuple[str, str, tuple], ...]] = {
    "8b": (
        *(("qwen3-8b", way, LONG) for way in ("bf16", "fp8", "awq, Marlin", "fp8, FP8 cache")),
        *(("qwen3-8b", way, FEW) for way in ("awq, Machete", "fp8 per tensor")),
    ),
    "32b": tuple(("qwen3-32b", way, BIG) for way in ("bf16", "fp8")),
    "32b-more": tuple(("qwen3-32b", way, BIG) for way in ("awq, Marlin", "fp8, FP8 cache", "awq, Machete")),
    "experts": (
        *(("qwen3-30b-a3b", way, LONG) for way in ("bf16", "fp8")),
        ("gpt-oss-20b", "mxfp4, Marlin", LONG),
    ),
    "70b": tuple(("llama-3.1-70b", way, LARGEST) for way in ("fp8", "awq, Marlin")),
    "8b-more": (
        *(("qwen3-8b", way, FEW) for way in ("int8", "nvfp4", "awq, Humming")),
        *(("qwen3-8b", way, LONG) for way in ("awq, Marlin, FP8 cache", "bf16, FP8 cache")),
    ),
    "7b": tuple(("mistral-7b", way, LONG) for way in ("fp8", "awq, Marlin", "fp8, FP8 cache", "bf16")),
    "phi-2": tuple(("phi-2", way, SHORT) for way in ("bf16", "fp8", "awq, Marlin")),
    "experts-more": (("qwen3-30b-a3b", "gptq", LONG), ("gpt-oss-20b", "mxfp4", SHORT)),
    "tiny": tuple(("tiny", way, ((16, 1), (16, 8), (128, 2))) for way in ("bf16", "awq, Machete")),
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


def engine_args(model: str, way: str, cells: tuple, folder: Path) -> dict:
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
        "kv_cache_memory_bytes": cache_bytes(config, cells, WAYS[way].cache_bytes),
        "compilation_config": {"cudagraph_capture_sizes": list(GRAPHS)},
        "kernel_config": {"enable_jit_warmup": False},
        **WAYS[way].args,
    }
    if "moe_backend" in args:
        args["kernel_config"] = args["kernel_config"] | {"moe_backend": args.pop("moe_backend")}
    if not GPU:
        return args | {"enforce_eager": True, "compilation_config": {}}
    return args | {"gpu_memory_utilization": 0.02}  # checked against what is free; the cache's size is given
