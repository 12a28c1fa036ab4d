"""The arguments and the environment of an engine, and why they differ from vLLM's own."""

import ctypes.util
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from helpers.base import parameters, redact
from helpers.base.machine import GIB, VLLM_ENVIRONMENT, Machine
from helpers.engine.errors import EngineError
from helpers.engine.probe import PROBE
from helpers.model.model import Model

# Arguments that serve these helpers alone: not shown to readers as code they would write.
OURS = {"use_tqdm_on_load": False, "worker_extension_cls": PROBE}

# Ten CUDA graphs instead of 51: a batch in between is filled up to the next size. And the kernels of each way
# of sampling are compiled when a request first asks for one, not ahead. On an H200 a first start of
# Mistral-7B took 49 s instead of 93, a second 15 s instead of 27: notebooks/reference/h200/starts.jsonl.
SOONER = {
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]},
    "kernel_config": {"enable_jit_warmup": False},
}


def default_args(machine: Machine, model: Model) -> dict:
    """Arguments of ``vllm.LLM`` that differ from vLLM's own defaults, and why.

    - ``max_model_len``: the lessons need 2,048 tokens; a long context costs KV cache.
    - ``enable_prefix_caching=False``: a repeated prompt would not be computed, so not be measured.
    - ``use_tqdm_on_load=False``: ``logfile.starting`` shows the progress of the whole start instead.
    - ``worker_extension_cls``: lets ``measure`` look inside; it changes no result.
    - on a CPU ``enforce_eager`` (compiling takes longer than the lesson) and 1 GiB of KV cache;
    - on a GPU nine tenths of the memory, which leaves room for the notebook's own plots and tools, and
      what makes a lesson's engines start sooner (``SOONER``; a server starts once, and keeps vLLM's choice);
    - a shape-only model has neither weights nor a tokenizer to load.
    """
    longest = model.config.get("max_position_embeddings", 2048)
    args = {"max_model_len": min(2048, longest), "enable_prefix_caching": False, **OURS}
    if model.shape_only:
        args |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if machine.kind == "cpu":
        return args | {"enforce_eager": True, "kv_cache_memory_bytes": GIB}
    return args | {"gpu_memory_utilization": 0.9} | SOONER


def check_gpus(machine: Machine, wanted: int) -> None:
    """Refuse a ``tensor_parallel_size`` of more GPUs than this machine has.

    Raises:
        EngineError: there are fewer; what a model's heads cannot be dealt to vLLM refuses itself.
    """
    parameters.checked("tensor_parallel_size", wanted)
    have = machine.count if machine.kind == "cuda" else 0
    if wanted > max(1, have):
        raise EngineError(
            f"tensor_parallel_size={wanted} needs {wanted} GPUs; this machine shows "
            f"{f'{have} GPU(s)' if have else 'no GPU'}. Lower it to {max(1, have)}, or look at "
            "CUDA_VISIBLE_DEVICES."
        )


def as_code(checkpoint: Model, args: Mapping[str, object]) -> str:
    """vLLM code that builds the same engine without these helpers, and runs when it is pasted."""
    shown = {key: repr(value) for key, value in args.items() if key not in OURS}
    head, folder, home = ["from vllm import LLM", ""], checkpoint.folder, Path.home()
    if checkpoint.kind == "hub":
        name, _, revision = checkpoint.name.partition("@")
        shown |= {"model": repr(name)} | ({"revision": repr(revision)} if revision else {})
    elif folder.is_relative_to(home):
        shown["model"] = f'str(Path.home() / "{folder.relative_to(home)}")'
        head = ["from pathlib import Path", "", *head]
    lines = [f"    {key}={value}," for key, value in shown.items()]
    return redact.remove("\n".join([*head, "llm = LLM(", *lines, ")"]))


def environment(in_process: bool, machine: Machine, args: Mapping[str, object]) -> dict[str, str]:
    """Settings vLLM reads from the environment when it is imported or starts a child."""
    return {
        **VLLM_ENVIRONMENT,
        **compiling(machine, args),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        # A forked child dies in OpenMP if this process ever computed with torch; a spawned one does not.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }


def compiling(machine: Machine, args: Mapping[str, object]) -> dict[str, str]:
    """Where a GPU's kernels find a compiler; on a CPU that runs eagerly, that nothing is compiled.

    vLLM has a few small functions compiled all the same (the rank of a token, in vllm/v1/sample/ops). That
    takes g++, which a fresh machine may not have, and fails in a folder whose path has a space.
    """
    if machine.kind == "cuda":
        return _nvrtc_path()
    return {"TORCHDYNAMO_DISABLE": "1" if args.get("enforce_eager") else "0"}


def _nvrtc_path() -> dict[str, str]:
    """Where NVRTC from pip finds its other library, beside itself, where it does not look.

    vLLM takes Humming for 4-bit matrices that no other kernel fits, and that has NVRTC compile its kernels in
    a process of its own.
    """
    spec = importlib.util.find_spec("nvidia")
    if ctypes.util.find_library("nvrtc-builtins") or spec is None:  # the system's toolkit has both
        return {}
    roots = map(Path, spec.submodule_search_locations)
    found = sorted({str(path.parent) for root in roots for path in root.glob("cu*/lib/libnvrtc*")})
    have = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    return {"LD_LIBRARY_PATH": ":".join(dict.fromkeys([*have, *found]))} if found else {}
