"""What others call our settings, so that a variable that somebody really set is never silently ignored.

Names are those of public compose files, templates and older images. One that means a setting of ours is
taken; one that means something else, or that only vLLM's command line knows, is named in a warning.
"""

import os
from collections.abc import Mapping

TAKEN = {
    "model_name": "VLLM_MODEL_NAME VLLM_MODEL MODEL_PATH MODEL_ID HF_MODEL_ID",
    "tensor_parallel_size": "NUM_GPUS TP_SIZE VLLM_TP_SIZE VLLM_TENSOR_PARALLEL_SIZE VLLM_NUM_GPUS",
    "gpu_memory_utilization": "VLLM_GPU_MEMORY_UTILIZATION GPU_MEM_UTIL VLLM_GPU_MEM_UTIL GPU_UTIL",
    "max_model_len": "VLLM_MAX_MODEL_LEN MAX_MODEL_LENGTH",
    "max_num_seqs": "VLLM_MAX_NUM_SEQS",
    "served_model_name": "VLLM_SERVED_MODEL_NAME",
    "quantization": "VLLM_QUANTIZATION",
    "dtype": "VLLM_DTYPE",
    "server_host": "VLLM_HOST",
    "hf_token": "HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN HUGGINGFACE_TOKEN",
}
# Common words, which may mean anything in an environment: taken from the file only.
FILE_ONLY = {"model_name": "MODEL", "server_port": "PORT", "server_host": "HOST", "vllm_api_key": "API_KEY"}
# Flags of vLLM that people write as variables. vLLM does not read them so.
FLAGS = """
    KV_CACHE_DTYPE MAX_NUM_BATCHED_TOKENS ENFORCE_EAGER ENABLE_PREFIX_CACHING ENABLE_CHUNKED_PREFILL
    TRUST_REMOTE_CODE PIPELINE_PARALLEL_SIZE DATA_PARALLEL_SIZE SWAP_SPACE CPU_OFFLOAD_GB BLOCK_SIZE SEED
    LOAD_FORMAT DOWNLOAD_DIR TOKENIZER REVISION ENABLE_LORA MAX_LORAS MAX_LORA_RANK LORA_MODULES CHAT_TEMPLATE
    ENABLE_AUTO_TOOL_CHOICE TOOL_CALL_PARSER REASONING_PARSER LIMIT_MM_PER_PROMPT SPECULATIVE_CONFIG
    ATTENTION_BACKEND GENERATION_CONFIG ENABLE_EXPERT_PARALLEL DISABLE_LOG_REQUESTS ROPE_SCALING
"""
OF_THE_PROCESS = ("VLLM_", "HF_", "CUDA_", "NVIDIA_", "NCCL_", "PYTORCH_", "TORCH_", "OMP_", "HTTP")
# A stored format is the checkpoint's: its config.json says it, and vLLM reads that.
STORED = ("awq", "gptq", "marlin", "compressed", "bitsandbytes", "gguf", "modelopt", "mxfp4", "nvfp4")
NAMES = {name for names in (*TAKEN.values(), *FILE_ONLY.values()) for name in names.split()}


def read(inside: Mapping[str, str | None], fields: set[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Return settings under other names, warnings, and errors that need one word more than the usual.

    Args:
        inside: what a .env file says; a variable of the environment wins over it.
        fields: the settings there are; their own names win over all others.
    """
    given = {name: value for name, value in (inside | dict(os.environ)).items() if value}
    taken: dict[str, str] = {}
    for table, source in ((FILE_ONLY, inside), (TAKEN, given)):
        for field, names in table.items():
            found = [source[name] for name in names.split() if source.get(name)]
            if found and field in fields and not given.get(field.upper()):
                taken[field] = found[0]
    organisation = given.get("VLLM_MODEL_ORG")
    if organisation and "model_name" in taken and "/" not in taken["model_name"]:
        taken["model_name"] = f"{organisation}/{taken['model_name']}"
    ours = {field.upper() for field in fields} | {"VLLM_MODEL_ORG"} | NAMES
    warnings = [_warning(name, name in inside) for name in sorted(given.keys() - ours)]
    stored = given.get("QUANTIZATION") or taken.get("quantization") or ""
    errors = []
    if stored.lower().startswith(STORED):
        errors.append(
            f"QUANTIZATION={stored!r}: a stored format is the checkpoint's own. Name the {stored.upper()} "
            "checkpoint in MODEL_NAME and set none; its config.json says the rest."
        )
    return taken, [warning for warning in warnings if warning], errors


def _warning(name: str, inside: bool) -> str:
    """What is wrong with a variable that is none of ours; nothing where nobody meant us."""
    where = f"{name} (.env)" if inside else name
    if name == "VLLM_PORT":
        return f"{where} is the port that vLLM's own processes meet at, not the server's. Say SERVER_PORT."
    flag = name.removeprefix("VLLM_")
    if flag in FLAGS.split() and (inside or name != flag):
        return f"{where} is no variable that anything reads: the flag is --{flag.lower().replace('_', '-')}."
    if inside and name not in os.environ and name.startswith(OF_THE_PROCESS):
        return f"{where} is read from the environment, not from this file: export it."
    return ""
