"""Several servers behind one address: vllm-router and the servers, owned as ``open_server`` owns one.

    with open_router(settings.load(server_port=0), servers=2) as router:
        client = router.client()               # one address; the router chooses a server
        router.replace(router.servers[0])      # a new one in its place, without a gap

Each server has cores or GPUs of its own. The router is told of a server that leaves before that server
drains, and of one that comes once it has answered. Whoever reaches the router's port can do the same, and
needs no key for it (``/add_worker``): it listens on this machine only, and a proxy passes on ``/v1`` alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

from helpers.base import parameters
from helpers.base.machine import Machine, detect, visible_gpus
from helpers.serve.command import flags, free_ports, server_environment, typed
from helpers.serve.errors import ServerError, Stop
from helpers.serve.owned import Owned, start_in_turn
from helpers.serve.server import Server, open_server
from helpers.serve.settings import Settings, load

POLICIES = ("round_robin", "random", "power_of_two", "consistent_hash", "cache_aware")
# Where these differ from vllm-router's own defaults: it looks at a server every 60 s and after ten failures
# leaves it alone for 60 s. A lesson lasts four minutes; a deployment, too, wants its server back sooner.
SOONER = {
    "health_check_interval_secs": 5,
    "cb_timeout_duration_secs": 10,
    "worker_startup_check_interval": 1,
    "log_level": "warning",
}
MISSING = "vllm-router is not installed: run `make scale` once (two packages, about 100 MB)."


def open_router(
    settings: Settings | None = None,
    *,
    servers: int = 2,
    policy: str = "round_robin",
    log_dir: str | Path = "runs/logs",
    **vllm_args,
) -> Router:
    """Return a router and its servers for ``with``; they start, side by side, when the block is entered.

    Args:
        settings: of each server; ``server_port`` is the router's, each server takes a free one.
        servers: how many. The cores, or the GPUs, are dealt out among them.
        policy: how the router chooses a server, one of ``POLICIES``.
        log_dir: folder for the logs; one file a start.
        vllm_args: further arguments of ``vllm serve``, the same for each server.

    Raises:
        ServerError: vllm-router is missing, the policy is unknown, or more servers than cores or GPUs.
        SettingsError, SchemeError, ModelError: nothing was started.
    """
    settings = settings or load()
    check_policy(policy)
    if importlib.util.find_spec("vllm_router") is None:
        raise ServerError(MISSING)
    free = places(detect(), servers, vllm_args.get("tensor_parallel_size", 1))
    ports = free_ports(settings.server_host, servers + 2)
    args = {
        "host": settings.server_host,
        "port": settings.server_port or ports[0],
        "policy": policy,
        "prometheus_host": "127.0.0.1",
        "prometheus_port": ports[1],
        **SOONER,
    }
    router = Router(settings, args, Path(log_dir), vllm_args)
    router.servers = [router.server(place, port=port) for place, port in zip(free, ports[2:], strict=True)]
    return router


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise ServerError(f"policy={policy!r}: must be one of {', '.join(POLICIES)}.")


def places(machine: Machine, count: int, each: int = 1) -> list[dict[str, str]]:
    """Deal cores or GPUs out to servers: the variables that give each its share.

    Args:
        each: GPUs a server (``tensor_parallel_size``).

    Raises:
        ServerError: there are fewer cores or GPUs than that.
    """
    parameters.whole("servers", count, 1, 64)
    gpus = machine.kind == "cuda"
    units = visible_gpus() if gpus else sorted(os.sched_getaffinity(0))
    share = each if gpus else len(units) // count
    if share < 1 or share * count > len(units):
        there, needed = ("GPU(s)", count * each) if gpus else ("core(s)", count)
        raise ServerError(
            f"servers={count} needs {needed} {there}; this machine shows {len(units)}. Replicas add capacity "
            "only with hardware of their own: ask for fewer."
        )
    if gpus:
        dealt = [units[at * share : (at + 1) * share] for at in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, part))} for part in dealt]
    return [{"OMP_NUM_THREADS": str(share)}] * count  # not bound: a server that starts takes what is idle


class Router(Owned):
    """vllm-router and the servers behind it; made by ``open_router``, used inside its ``with`` block."""

    what = "router"

    def __init__(self, settings: Settings, args: dict, log_dir: Path, vllm_args: dict):
        super().__init__(settings, args, log_dir)
        self.vllm_args = vllm_args
        self.servers: list[Server] = []

    # -- using it -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.servers[0].name

    @property
    def checkpoint(self):
        """What its servers have loaded."""
        return self.servers[0].checkpoint

    @property
    def command(self) -> str:
        """The command that starts the same router without these helpers."""
        return typed("vllm-router", self._words())

    def _words(self) -> list[str]:
        return ["--worker-urls", *(server.url for server in self.servers), *flags(self.args)]

    def metrics(self) -> dict[str, float]:
        """What its servers' ``/metrics`` say, summed over those that run."""
        found = Counter()
        for server in self.servers:
            found.update(_metrics(server))  # which adds
        return dict(found)

    def each(self, metric: str) -> list[float]:
        """One metric of each server, in their order; 0 of one that does not run."""
        return [_metrics(server).get(metric, 0.0) for server in self.servers]

    # -- changing it ----------------------------------------------------------------------------

    def server(self, place: dict[str, str], port: int = 0, **vllm_args):
        """A further server, not started, in a place that ``places`` gave."""
        own = self.settings.model_copy(update={"server_port": port})
        return open_server(own, log_dir=self.log_dir, environment=place, **self.vllm_args | vllm_args)

    def use(self, policy: str) -> None:
        """Start the router anew with another policy; its servers go on."""
        check_policy(policy)
        super()._finish(signal.SIGTERM)
        self.args["policy"] = policy
        self.start()

    def replace(self, old: Server, *, drain: bool = True, **vllm_args):
        """Put a new server in another's place, while the others serve; return it.

        The old one leaves first: its cores or its GPU are the new one's. With ``drain`` the router is told,
        then the old server answers what it has; without, it is killed, as a crash or a hasty script does.

        Raises:
            ServerStartError: the new one did not start; the router goes on without it.
        """
        if drain:
            self._ask("remove_worker", old)  # gets no further requests; those that run there are answered
            old.stop()
        else:
            old.kill()
            self._ask("remove_worker", old)
        self.servers.remove(old)
        new = self.server(old.environment, **vllm_args).start()
        self._ask("add_worker", new)
        self.servers.append(new)
        return new

    def _ask(self, what: str, server: Server) -> None:
        reply = self._http.post(f"{self.url}/{what}", params={"url": server.url}, timeout=30)
        if reply.status_code != 200:
            raise ServerError(f"The router refused {what} for {server.url}: {reply.text.strip()}")

    # -- owning it ------------------------------------------------------------------------------

    def start(self) -> Router:
        """Start the servers that do not run, side by side, and then the router; end all with ``stop``."""
        begun = time.perf_counter()
        # All servers at first; after the router alone died, only those that died with it or since.
        start_in_turn([server for server in self.servers if not server.running], [self])
        self.start_s = time.perf_counter() - begun  # of all
        print(self._started())
        return self

    def _finish(self, signum: signal.Signals) -> Stop:
        """The router first: it takes nobody new and finishes what runs. Then its servers, whatever comes."""
        with contextlib.ExitStack() as stack:
            for server in self.servers:
                stack.callback(server._finish, signum)
            return super()._finish(signum)

    # -- what ``Owned`` asks ----------------------------------------------------------------------

    @property
    def _log_name(self) -> str:
        return f"router-{self.args['policy']}"

    def _command_line(self) -> list[str]:
        return [sys.executable, "-m", "vllm_router.launch_router", *self._words()]

    def _environment(self) -> dict[str, str]:
        return server_environment(self.settings)

    def _started(self) -> str:
        return (
            f"The router ({self.args['policy']}) and {len(self.servers)} servers answer after "
            f"‹{self.start_s:.1f} s› on ‹{self.url}›. Their logs: ‹{self.log_file.name}› and beside it"
        )


def _metrics(server: Server) -> dict[str, float]:
    with contextlib.suppress(httpx.HTTPError):
        if server.running:
            return server.metrics()
    return {}
