"""A process that listens on a port and ends with its owner: what a server and a router have in common.

It is a process of its own, below a small supervisor. It is ready when it has answered with a token. After
its ``with`` block, however that ended, it and everything it started is gone: a normal end drains it, an
error or Ctrl+C kills it, and if the owner dies the system ends it.
"""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

from helpers.base import interrupts, processes
from helpers.base.files import ROOT
from helpers.engine import engine, errors, logfile
from helpers.engine.children import Belongings
from helpers.faults.log import root_cause
from helpers.serve.command import TEARDOWN_S, tcp_socket
from helpers.serve.errors import ServerDiedError, ServerError, ServerStartError, Stop
from helpers.serve.settings import Settings

POLL_S = 0.1


class Owned:
    """One such process; a subclass says its command line, its environment and what its log is called."""

    what = "server"

    def __init__(self, settings: Settings, args: dict, log_dir: Path):
        self.settings = settings
        self.args = args  # of its command line; ``host`` and ``port`` among them
        self.log_dir = log_dir
        self.log_file: Path | None = None
        self.start_s: float | None = None  # from nothing to the first token
        self.end: Stop | None = None
        self._process: subprocess.Popen | None = None  # the supervisor
        self._shared = Belongings()  # its memory; its processes are its supervisor's to end

    # -- using it -------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Its address, without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.args["host"], self.args["host"])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.args['port']}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.settings.api_key}"}

    def client(self, timeout: float = 120.0):
        """Return an ``openai.OpenAI`` for it; it does not retry, so that you see every failure."""
        import openai

        # Its own: who closes it, closes nothing of this object's. No proxy, as in _http.
        same = {"api_key": self.settings.api_key, "http_client": openai.DefaultHttpxClient(trust_env=False)}
        return openai.OpenAI(base_url=f"{self.url}/v1", timeout=timeout, max_retries=0, **same)

    def get(self, path: str, timeout_s: float = 10.0):
        return self._http.get(self.url + path, timeout=timeout_s)

    @functools.cached_property
    def _http(self):
        # One: making it takes longer than a request. Not through a proxy of the environment's, which cannot
        # reach this machine's own address, and would be told the key.
        return httpx.Client(headers=self.headers, trust_env=False)

    @property
    def log_text(self) -> str:
        return errors.read_log(self.log_file)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Return if it lives.

        Raises:
            ServerDiedError: it ended by itself, or was killed by someone else.
            ServerError: it was stopped, or not started.
        """
        if self._process is None:
            raise ServerError(f"This {self.what} is not running: use it in a with block.")
        if self.running:
            return
        self._note_death()
        if self.end.how == "died":
            raise self._diagnosed(ServerDiedError, f"The {self.what} {ending(self._process.returncode)}.")
        raise ServerError(f"This {self.what} is stopped: it {self.end.how}. Open a new one.")

    # -- owning it ------------------------------------------------------------------------------

    def __enter__(self):
        return self.start()

    def start(self):
        """Start it without a block, which cannot span a notebook's cells; end it with ``stop``.

        Until then it ends with this process, and when a cell is interrupted.

        Raises:
            ServerStartError: the port is taken, the model does not load, or it takes too long.
        """
        start_together(self)
        return self

    def prepare(self) -> None:
        """Refuse what cannot be started, and take a new log file."""
        if self.running:
            raise ServerError(f"This {self.what} is running already.")
        self._note_death()
        if (held := engine.opened()) is not None:
            raise ServerError(
                f"An engine ({held.scheme}) is open in this process and holds its memory. "
                "Leave its with block first."
            )
        refuse_taken_port(self.args["host"], self.args["port"])
        self.end = self._process = None  # a process of before has ended: its number may be another's by now
        self.log_file = logfile.new_log_file(self.log_dir, self._log_name)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file.touch()  # taken: one that starts beside it gets another

    @property
    def _grace_s(self) -> int:
        return self.settings.shutdown_timeout + TEARDOWN_S

    def launch(self) -> None:
        """Start the process; from the thread that stays, see ``owned_command``."""
        # Ctrl+C inside the constructor would leave a child that nobody knows.
        with self.log_file.open("a") as log, interrupts.interrupts_deferred():
            self._begun = time.perf_counter()
            self._process = subprocess.Popen(
                processes.owned_command(self._command_line(), self._grace_s),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self._environment(),
                # Jupyter's Ctrl+C goes to the kernel's whole group. No session of its own: Linux shares cores
                # among sessions, and one that spins (sched_yield) would halve, or starve, another's start.
                process_group=0,
            )

    def wait_until_ready(self) -> None:
        """Wait for /health, then for one token: a server may be healthy and unable to answer."""
        stop = self._begun + self.settings.start_timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise self._diagnosed(ServerStartError, f"The {self.what} did not start.")
            if time.perf_counter() > stop:
                late = f"The {self.what} was not ready within START_TIMEOUT={self.settings.start_timeout} s."
                raise self._diagnosed(ServerStartError, late)
            time.sleep(POLL_S)
        try:
            client = self.client(timeout=max(1.0, stop - time.perf_counter()))
            client.completions.create(model=self.name, prompt="Hello", max_tokens=1)
        except Exception as error:
            raise self._diagnosed(ServerStartError, f"It is healthy but does not answer: {error}") from error
        self.start_s = time.perf_counter() - self._begun

    def _healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.get("/health", timeout_s=2.0).status_code == 200
        return False

    def __exit__(self, kind, error, tb) -> None:
        known = self.end  # a death that the block has dealt with is no news
        end = self.stop() if error is None else self.kill()
        if error is None and known is None and end.how == "died":
            self.check()

    def stop(self) -> Stop:
        """Send SIGTERM and wait: it drains for ``shutdown_timeout`` seconds, then it is killed."""
        return self._finish(signal.SIGTERM)

    def kill(self) -> Stop:
        """Send SIGKILL; what it started is ended, too."""
        return self._finish(signal.SIGKILL)

    def crash(self) -> None:
        """Kill it as the system does, behind this object's back; return when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(TEARDOWN_S)

    def _finish(self, signum: signal.Signals) -> Stop:
        self._note_death()
        if self._process is None or self.end is not None:  # its number may be another's by now
            return self.end
        asked = signum == signal.SIGTERM
        how, patience_s = ("stopped", self._grace_s) if asked else ("was killed", TEARDOWN_S)
        with interrupts.interrupts_deferred():
            begun = time.perf_counter()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                how = f"did not stop within {patience_s:.0f} s and was killed"
                for process in self.processes():
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            self._clean_up(how, time.perf_counter() - begun)
        return self.end

    @property
    def pid(self) -> int:
        """The process that answers HTTP: the supervisor's child, or the supervisor while there is none."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children():
                return child.pid
        return self._process.pid

    def processes(self) -> list:
        with contextlib.suppress(psutil.Error):
            supervisor = psutil.Process(self._process.pid)
            return [supervisor, *supervisor.children(recursive=True)]
        return []

    def _note_death(self) -> None:
        if self._process is not None and self.end is None and not self.running:  # nobody had asked
            self._clean_up("died", 0.0)

    def _clean_up(self, how: str, seconds: float) -> None:
        self._process.wait()
        self._shared.end()
        self.end = Stop(how, seconds, self._process.returncode)

    def _diagnosed(self, kind: type[ServerError], sentence: str) -> ServerError:
        code, failed = self._process.poll(), None
        if code is not None or root_cause(self.log_text):  # one that only takes its time has not failed yet
            code = -killed if (killed := _signal(code)) else code  # a signal's number, as Python has it
            failed = RuntimeError(f"the engine's process ended, exit code {code}")
        otherwise = "not said; the end of the log: " + self.log_text.strip()[-300:]
        return errors.diagnosed(kind, sentence, self.log_file, failed, otherwise)


def start_together(*servers: Owned) -> None:
    """Start several side by side, since one start leaves cores idle; one that fails takes the others with it.

    Raises:
        ServerStartError: as ``start``.
    """
    start_in_turn(servers)
    for server in servers:
        print(server._started())


def start_in_turn(*stages: Sequence[Owned]) -> None:
    """Start those of a stage side by side, and the next stage when they are ready; all of them, or none."""
    everyone = [server for stage in stages for server in stage]
    for server in everyone:
        server.prepare()
    try:
        with logfile.starting(everyone[0].log_file):
            for stage in stages:
                _start_stage(stage)
    except BaseException:
        for server in everyone:
            server.kill()
        raise
    for server in everyone:
        interrupts.on_interrupted_cell(server.kill)


def _start_stage(servers: Sequence[Owned]) -> None:
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server._shared.watched())
            server.launch()
        for server in servers:
            server.wait_until_ready()


def refuse_taken_port(host: str, port: int) -> None:
    """Say at once, and who has it, what vLLM would say after importing for half a minute."""
    with tcp_socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            why = error.strerror
    who = ""
    with contextlib.suppress(psutil.Error):
        for found in psutil.net_connections("tcp"):
            if found.laddr.port == port and found.status == psutil.CONN_LISTEN and found.pid:
                who = f" {psutil.Process(found.pid).name()} ({found.pid}) listens there."
    raise ServerStartError(
        f"The server cannot listen on {host}, port {port}: {why}.{who} "
        "Choose another SERVER_PORT; 0 takes a free one."
    )


def _signal(code: int | None) -> signal.Signals | None:
    """The signal that an exit code stands for, as shells have it: 128 more than its number."""
    return next((known for known in signal.Signals if code == 128 + known), None)


def ending(code: int) -> str:
    if killed := _signal(code):
        return f"was killed by {killed.name}"
    return f"ended by itself with exit code {code}"
