"""vLLM's OpenAI-compatible server, owned by a ``with`` block that stops it without losing a request.

    with open_server(settings.load(port=0)) as server:
        print(server.command)                  # the command a reader would type
        client = server.client()               # the openai package's, with address and key

How it starts, drains and ends is in ``owned``. Its log goes to ``server.log_file``.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import psutil

from helpers.base.machine import detect
from helpers.engine import arguments, engine
from helpers.model.model import EMBEDDED, Model
from helpers.serve import command
from helpers.serve.command import START, flags, server_environment
from helpers.serve.owned import Owned
from helpers.serve.settings import Settings, load


def open_server(
    settings: Settings | None = None,
    *,
    log_dir: str | Path = "runs/logs",
    environment: dict[str, str] | None = None,
    **vllm_args,
) -> Server:
    """Return a server for ``with``; it starts when the block is entered.

    Args:
        settings: what ``settings.load`` returned; by default what the environment says.
        log_dir: folder for its log; one file a start.
        environment: variables for its process beside this one's: its cores, or its GPU.
        vllm_args: further arguments of ``vllm serve``, with underscores; they win over all others.

    Raises:
        SettingsError, SchemeError, ModelError: nothing was started.
    """
    settings = settings or load()
    machine = detect()
    command.use_token(settings)
    model, checkpoint, way = engine.resolve_checkpoint(settings.model_name, settings.scheme, machine)
    model.check_words()
    folder, config = str(checkpoint.folder), checkpoint.config
    args = command.arguments(settings, machine, way, folder, model.title, config) | vllm_args
    arguments.check_gpus(machine, args.get("tensor_parallel_size", 1))
    return Server(settings, model, checkpoint, way, args, Path(log_dir), environment)


class Server(Owned):
    """One server and everything it holds; made by ``open_server``, used inside its ``with`` block."""

    def __init__(self, settings, model, checkpoint, way, args, log_dir, environment=None):
        super().__init__(settings, args, log_dir)
        self.model: Model = model
        self.checkpoint: Model = checkpoint
        self.way = way
        self.environment: dict[str, str] = environment or {}

    @property
    def name(self) -> str:
        return self.args["served_model_name"]

    @property
    def command(self) -> str:
        """The command that starts the same server without these helpers; the key is in a variable.

        On a CPU the KV cache's size is in another: without it vLLM would take its share of all memory. A
        folder in a cache of ours differs by machine: ``/path/to`` stands for where it is.
        """
        ours = self.checkpoint.kind in (EMBEDDED, "made")  # its folder is in a cache of ours
        args = {name: value for name, value in self.args.items() if name != "model"}
        named = f"/path/to/{self.checkpoint.title}" if ours else self.checkpoint.name
        variables = {"VLLM_API_KEY": "...", "VLLM_MAX_N_SEQUENCES": self.settings.vllm_max_n_sequences}
        if detect().kind == "cpu":
            variables["VLLM_CPU_KVCACHE_SPACE"] = self.settings.vllm_cpu_kvcache_space
        words = [*(f"{name}={value}" for name, value in variables.items()), "vllm serve", shlex.quote(named)]
        return command.typed(" ".join(words), flags(args))

    def metrics(self) -> dict[str, float]:
        """Return what ``/metrics`` says, summed over labels, by Prometheus's name of the sample."""
        from prometheus_client.parser import text_string_to_metric_families

        found = Counter()
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] += sample.value
        return dict(found)

    # -- what ``Owned`` asks ----------------------------------------------------------------------

    @property
    def _log_name(self) -> str:
        return f"server-{self.settings.scheme}"

    def _command_line(self) -> list[str]:
        return [sys.executable, "-c", START, *flags(self.args)]

    def _environment(self) -> dict[str, str]:
        machine = detect()
        found = server_environment(self.settings) | arguments.compiling(machine, self.args)
        if machine.kind == "cpu" and self.args.get("tensor_parallel_size", 1) == 1:
            # The model runs in the engine's process, as in open_engine: one less imports vLLM, and a start
            # takes two thirds of the time. vLLM then deals out no threads. As by its rule, a core is left to
            # the process that answers HTTP.
            cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
            found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            found.setdefault("OMP_NUM_THREADS", str(max(1, cores - 1)))
        return found | self.environment

    def _started(self) -> str:
        return (
            f"The server ({self.settings.scheme}) answers after ‹{self.start_s:.1f} s› on ‹{self.url}›. "
            f"Its log: ‹{self.log_file.name}›"
        )
