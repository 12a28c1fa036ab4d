"""vLLM's OpenAI-compatible server, owned by a ``with`` block that stops it without losing a request.

    with open_server(settings.load(port=0)) as server:
        print(server.command)                  # the command a reader would type
        client = server.client()               # the openai package's, with address and key

The server is a process of its own, below a small supervisor. It is ready when it has answered with a
token. After the block, however it ended, it and everything it started is gone: a normal end drains it, an
error or Ctrl+C kills it, and if this process dies the system ends it. Its log goes to ``server.log_file``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.base import machine, processes, redact
from helpers.base.files import ROOT
from helpers.base.machine import detect
from helpers.engine import arguments, engine, interrupts, logfile
from helpers.engine.children import Belongings
from helpers.engine.logfile import Progress
from helpers.faults import explain
from helpers.faults.log import root_cause
from helpers.model.model import EMBEDDED, Model
from helpers.serve import command
from helpers.serve.command import START, flags, server_environment
from helpers.serve.errors import ServerDiedError, ServerError, ServerStartError, Stop
from helpers.serve.ports import refuse_taken_port
from helpers.serve.settings import Settings, load

TEARDOWN_S = 20  # from the last request's end to the process's end, at most

POLL_S = 0.1


def open_server(
    settings: Settings | None = None, *, log_dir: str | Path = "runs/logs", **vllm_args
) -> Server:
    """Return a server for ``with``; it starts when the block is entered.

    Args:
        settings: what ``settings.load`` returned; by default what the environment says.
        log_dir: folder for its log; one file a start.
        vllm_args: further arguments of ``vllm serve``, with underscores; they win over all others.

    Raises:
        SettingsError, SchemeError, ModelError: nothing was started.
    """
    settings = settings or load()
    machine = detect()
    with command.token(settings):
        model, checkpoint, way = engine.resolve_checkpoint(settings.model_name, settings.scheme, machine)
    model.check_words()
    folder, config = str(checkpoint.folder), checkpoint.config
    args = command.arguments(settings, machine, way, folder, model.title, config) | vllm_args
    arguments.check_gpus(machine, args.get("tensor_parallel_size", 1), model)
    return Server(settings, model, checkpoint, way, args, Path(log_dir))


class Server:
    """One server and everything it holds; made by ``open_server``, used inside its ``with`` block."""

    def __init__(self, settings, model, checkpoint, way, args, log_dir):
        self.settings: Settings = settings
        self.model: Model = model
        self.checkpoint: Model = checkpoint
        self.way = way
        self.args: dict = args
        self.log_dir: Path = log_dir
        self.log_file: Path | None = None
        self.start_s: float | None = None  # from nothing to the first token
        self.end: Stop | None = None
        self._process: subprocess.Popen | None = None  # the supervisor
        self._own = Belongings()

    # -- using it -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.args["served_model_name"]

    @property
    def url(self) -> str:
        """Its address, without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.args["host"], self.args["host"])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.args['port']}"

    @property
    def headers(self) -> dict[str, str]:
        """The header that carries the key."""
        return {"Authorization": f"Bearer {self.settings.api_key}"}

    @property
    def command(self) -> str:
        """The command that starts the same server without these helpers; the key is in a variable.

        On a CPU the KV cache's size is in another: without it vLLM would take its share of all memory. A
        folder in a cache of ours differs by machine: ``/path/to`` stands for where it is.
        """
        ours = self.checkpoint.kind in (EMBEDDED, "made")  # its folder is in a cache of ours
        args = {name: value for name, value in self.args.items() if name != "model"}
        words, lines = flags(args), []
        for word in words:
            if word.startswith("--"):
                lines.append(word)
            else:
                lines[-1] += f" {shlex.quote(word)}"
        named = f"/path/to/{self.checkpoint.title}" if ours else self.checkpoint.name
        cache = f"VLLM_CPU_KVCACHE_SPACE={self.settings.vllm_cpu_kvcache_space} " * (
            machine.detect().kind == "cpu"
        )
        start = f"VLLM_API_KEY=... {cache}vllm serve {shlex.quote(named)}"
        return " \\\n    ".join([start, *lines])

    def client(self, **options):
        """Return an ``openai.OpenAI`` for this server; it does not retry, so that you see every failure."""
        import openai

        direct = openai.DefaultHttpxClient(trust_env=False)  # as in _http
        options = {"max_retries": 0, "timeout": 120.0, "http_client": direct} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.settings.api_key, **options)

    def get(self, path: str, timeout_s: float = 10.0):
        """GET a path with the key; return httpx's response."""
        return self._http.get(self.url + path, timeout=timeout_s)

    @functools.cached_property
    def _http(self):
        import httpx

        # One: making it takes longer than a request. Not through a proxy of the environment's, which cannot
        # reach this machine's own address, and would be told the key.
        return httpx.Client(headers=self.headers, trust_env=False)

    def metrics(self) -> dict[str, float]:
        """Return what ``/metrics`` says, summed over labels, by Prometheus's name of the sample."""
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    @property
    def log(self) -> str:
        """The server's log so far."""
        if self.log_file is None or not self.log_file.exists():
            return ""
        return self.log_file.read_text(errors="replace")

    def check(self) -> None:
        """Return if the server lives.

        Raises:
            ServerDiedError: it ended by itself, or was killed by someone else.
            ServerError: it was stopped, or not started.
        """
        if self._process is None:
            raise ServerError("This server is not running: use it in a with block.")
        if (code := self._process.poll()) is None:
            return
        if self.end is None:
            self._clean_up("died", 0.0)
        if self.end.how == "died":
            raise self._diagnosed(ServerDiedError, f"The server {_ending(code)}.")
        raise ServerError(f"This server is stopped: it {self.end.how}. Open a new one.")

    # -- owning it ------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        return self.start()

    def start(self) -> Server:
        """Start it without a block, which cannot span a notebook's cells; end it with ``stop``.

        Until then it ends with this process, and when a cell is interrupted.

        Raises:
            ServerStartError: the port is taken, the model does not load, or it takes too long.
        """
        if self._process is not None and self.end is None:
            raise ServerError("This server is running already.")
        if engine.opened() is not None:
            raise ServerError(
                f"An engine ({engine.opened().scheme}) is open in this process and holds its memory. "
                "Leave its with block first."
            )
        refuse_taken_port(self.args["host"], self.args["port"])
        self.end = self._process = None  # a process of before has ended: its number may be another's by now
        scheme = self.settings.scheme
        self.log_file = logfile.new_log_file(self.log_dir, f"server-{scheme}")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Progress(self.log_file), self._own.watched():
                self._start()
                self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        interrupts.on_interrupted_cell(self.kill)
        print(
            f"The server ({scheme}) answers after ‹{self.start_s:.1f} s› on ‹{self.url}›. "
            f"Its log: ‹{self.log_file.name}›"
        )
        return self

    def _start(self) -> None:
        command = [sys.executable, "-c", START, *flags(self.args)]
        grace_s = self.settings.shutdown_timeout + TEARDOWN_S
        with self.log_file.open("a") as log:
            self._begun = time.perf_counter()
            self._process = subprocess.Popen(
                processes.owned_command(command, grace_s),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=server_environment(self.settings) | arguments.compiling(machine.detect(), self.args),
                start_new_session=True,  # Jupyter's Ctrl+C goes to the kernel's whole group
            )

    def _wait_until_ready(self) -> None:
        """Wait for /health, then for one token: a server may be healthy and unable to answer."""
        stop = self._begun + self.settings.start_timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise self._diagnosed(ServerStartError, "The server did not start.")
            if time.perf_counter() > stop:
                limit = self.settings.start_timeout
                raise self._diagnosed(
                    ServerStartError, f"The server was not ready within START_TIMEOUT={limit} s."
                )
            time.sleep(POLL_S)
        try:
            left = max(1.0, stop - time.perf_counter())
            client = self.client(timeout=left)
            client.completions.create(model=self.name, prompt="Hello", max_tokens=1)
        except Exception as error:
            raise self._diagnosed(ServerStartError, f"It is healthy but does not answer: {error}") from error
        self.start_s = time.perf_counter() - self._begun

    def _healthy(self) -> bool:
        import httpx

        with contextlib.suppress(httpx.HTTPError):
            return self.get("/health", timeout_s=2.0).status_code == 200
        return False

    def __exit__(self, kind, error, tb) -> None:
        if self._process is None or self.end is not None:  # nothing runs any more
            return
        if error is not None:
            self.kill()
            return
        self.check()
        self.stop()

    def stop(self) -> Stop:
        """Send SIGTERM and wait: it drains for ``shutdown_timeout`` seconds, then it is killed."""
        return self._finish(signal.SIGTERM, self.settings.shutdown_timeout + TEARDOWN_S, "stopped")

    def kill(self) -> Stop:
        """Send the server SIGKILL; what it started is ended, too."""
        return self._finish(signal.SIGKILL, TEARDOWN_S, "was killed")

    def crash(self) -> None:
        """Kill the server as the system does, behind this object's back; return when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(TEARDOWN_S)

    def _finish(self, signum: signal.Signals, patience_s: float, how: str) -> Stop:
        if self._process is None:  # Ctrl+C came while it was being made
            with interrupts.interrupts_deferred():
                self._own.end()
        if self._process is None or self.end is not None:
            return self.end
        with interrupts.interrupts_deferred():
            begun = time.perf_counter()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                how = f"did not stop within {patience_s:.0f} s and was killed"
                self._process.kill()
            self._clean_up(how, time.perf_counter() - begun)
        return self.end

    @property
    def pid(self) -> int:
        """The process that answers HTTP: the supervisor's child, or the supervisor while there is none."""
        import psutil

        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children():
                return child.pid
        return self._process.pid

    def processes(self) -> list:
        """The server's processes that are alive, as psutil sees them."""
        import psutil

        with contextlib.suppress(psutil.Error):
            supervisor = psutil.Process(self._process.pid)
            return [supervisor, *supervisor.children(recursive=True)]
        return []

    def _clean_up(self, how: str, seconds: float) -> None:
        self._own.end()
        self._process.wait()
        self.end = Stop(how, seconds, self._process.returncode)

    def _diagnosed(self, kind: type[ServerError], sentence: str) -> ServerError:
        """An error that says what happened, why in the log's own words, what to do, and where the log is."""
        code, found = self._process.poll(), root_cause(self.log)
        cause = found or "not said; the end of the log: " + self.log.strip()[-300:]
        lines = [sentence, f"Cause: {redact.redact(cause)}"]
        report = None
        if found or code is not None:  # one that only takes its time has not failed yet
            code = -killed if (killed := _signal(code)) else code  # a signal's number, as Python has it
            report = explain.explain(RuntimeError(f"the engine's process ended, exit code {code}"), self.log)
            lines.append(report.advice)
        error = kind("\n".join([*lines, f"Full log: ‹{os.path.relpath(self.log_file)}›"]))
        error.report = report
        return error


def _signal(code: int | None) -> signal.Signals | None:
    """The signal that an exit code stands for, as shells have it: 128 more than its number."""
    return next((known for known in signal.Signals if code == 128 + known), None)


def _ending(code: int) -> str:
    """An exit code in words."""
    if killed := _signal(code):
        return f"was killed by {killed.name}"
    return f"ended by itself with exit code {code}"
