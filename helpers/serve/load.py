"""A running server under load: vLLM's own ``vllm bench serve``, several levels in one process.

    with Generator("runs/logs") as generator:
        levels = generator.bench(server, concurrencies=[1, 16], shares=[0.8, 2.5], objective=Objective(...))

Two kinds of load. *Closed loop*: a fixed number of clients, each sending its next request when the last is
answered, so a slow server is asked less. *Open loop*: requests come at random (a Poisson process), whether
the server keeps up or not, as users do. The generator runs in a process of its own, on the same machine.
"""

import itertools
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.base import machine, processes, records
from helpers.engine import logfile
from helpers.serve import command
from helpers.serve.child import Child
from helpers.serve.server import Server

SHORTEST_S = 1.0  # of a closed loop: in less, its start and its end are most of what is seen

KEEPS = 0.9  # the share of requests that must meet the objective for a rate to count as kept


class LoadError(RuntimeError):
    """The load generator failed, or requests did; the message has its words and its log."""


@dataclass(frozen=True)
class Objective:
    """What a request must keep to count: time to first token and time per output token, in ms."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Level:
    """One level of load and what it gave. Times in seconds; each median and 95th percentile of requests.

    ``concurrency`` is the number of clients of a closed loop, None in an open one; ``share`` is an open
    loop's rate as a share of the closed loops' best throughput, ``rate`` the same in requests/s.
    """

    concurrency: int | None
    share: float | None
    rate: float | None
    completed: int
    failed: int
    seconds: float
    requests_per_s: float
    goodput: float  # the same, counting only requests that met the objective
    output_tokens_per_s: float
    ttft_s: float
    ttft_p95_s: float
    tpot_s: float
    tpot_p95_s: float
    e2e_s: float

    @property
    def kept(self) -> float:
        """The share of all requests that met the objective: one that was refused did not."""
        sent = self.completed + self.failed
        return self.goodput / self.requests_per_s * self.completed / sent if self.requests_per_s else 0.0


class Generator(Child):
    """The load's process: it imports vLLM from the moment it is made, while you do something else.

    It ends with its ``with`` block, by ``close`` or with this process.
    """

    def __init__(self, log_dir: str | Path):
        super().__init__("helpers.serve.load:work", logfile.new_log_file(Path(log_dir), "bench"))

    def bench(
        self,
        server: Server,
        *,
        concurrencies: list[int],
        shares: list[float],
        objective: Objective,
        input_tokens: int = 32,
        output_tokens: int = 16,
        seconds: float = 8.0,
    ) -> list[Level]:
        """Load a server at each level and return what came out, closed loops first.

        Args:
            concurrencies: clients at once; each sends two requests, and a level at least four. A level that
                is over in less than ``SHORTEST_S`` is repeated with more.
            shares: rates of the open loops, as shares of the best request throughput of the closed ones.
            input_tokens, output_tokens: lengths of every request; prompts are random, and differ by level.
            seconds: how long requests keep coming in an open loop; the last then have to be answered.

        Raises:
            LoadError: the generator failed; a request that failed is counted in its level.
        """
        same = {
            "backend": "openai",
            "base_url": server.url,
            "model": str(server.checkpoint.folder),  # for its tokenizer
            "served_model_name": server.name,
            "dataset_name": "random",
            "random_input_len": input_tokens,
            "random_output_len": output_tokens,
            "temperature": 0,
            "goodput": [f"ttft:{objective.ttft_ms}", f"tpot:{objective.tpot_ms}"],
            "percentile_metrics": "ttft,tpot,e2el",
            "metric_percentiles": "95",
            "disable_tqdm": True,
        }
        # Its client would send this machine's own address, and the key, through a proxy of the environment's.
        environment = dict.fromkeys(("NO_PROXY", "no_proxy"), server.args["host"])
        environment["OPENAI_API_KEY"] = server.settings.api_key
        job = {"environment": environment, "same": same, "seconds": seconds}
        job |= {"concurrencies": concurrencies, "shares": shares}
        levels, wanted = [], len(concurrencies) + len(shares)
        if self.closed:  # after an error, or Ctrl+C
            super().__init__("helpers.serve.load:work", self.log)
        try:
            self.tell(**job)
            with processes.progress(lambda: (len(levels), wanted, "levels of load")):
                while len(levels) < wanted:
                    if (found := self.line()) is None:
                        said = f"Cause: {self.cause}\nFull log: ‹{os.path.relpath(self.log)}›"
                        raise LoadError(f"vllm bench serve failed.\n{said}")
                    levels.append(_level(found))
        except BaseException:  # Ctrl+C above all
            self.close()
            raise
        return levels


def _level(found: dict) -> Level:
    """A level from ``vllm bench serve``'s result; its times are in ms."""
    return Level(
        concurrency=found["max_concurrency"],
        share=found["share"],
        rate=found["request_rate"] if found["share"] else None,
        completed=found["completed"],
        failed=found["failed"],
        seconds=found["duration"],
        requests_per_s=found["request_throughput"],
        goodput=found["request_goodput"],
        output_tokens_per_s=found["output_throughput"],
        e2e_s=found["median_e2el_ms"] / 1e3,
        **{f"{name}_s": found[f"median_{name}_ms"] / 1e3 for name in ("ttft", "tpot")},
        **{f"{name}_p95_s": found[f"p95_{name}_ms"] / 1e3 for name in ("ttft", "tpot")},
    )


def closed(levels: list[Level]) -> list[Level]:
    return [level for level in levels if level.share is None]


def opened(levels: list[Level]) -> list[Level]:
    return [level for level in levels if level.share is not None]


def sustained(levels: list[Level]) -> float:
    """Requests per second that a server answers for as long as it is asked to.

    That is what it answered where it was asked for more, in an open loop above whatever was answered at any
    level. The best closed loop can be above that: with no more clients than places nobody waits. Where no
    level asked for too much, the most that was answered.
    """
    most = max(level.requests_per_s for level in levels)
    too_many = [level.requests_per_s for level in opened(levels) if level.rate > most]
    return min([most, *too_many])


def highest_kept(levels: list[Level]) -> Level | None:
    """The highest open-loop rate at which ``KEEPS`` of the requests met the objective, None if none did.

    A rate above ``sustained`` does not count: the queue grows for as long as it lasts, and only the test
    was too short to show it.
    """
    most = sustained(levels)
    kept = [one for one in opened(levels) if one.kept >= KEEPS and one.rate <= most and not one.failed]
    return max(kept, key=lambda level: level.rate, default=None)


FIELDS = ("scheme", "model", "device", "vllm", "way", "start_s", "measured_at", *Level.__annotations__)


def rows(server: Server, levels: list[Level], device: str) -> list[dict]:
    """One record a level, for ``records.append(..., fields=load.FIELDS)``."""
    common = {
        "scheme": server.settings.scheme,
        "model": server.model.title,
        **records.stamp(machine.detect()),
        "device": device,
        "way": server.way.name,
        "dtype": server.args.get("dtype"),
        "start_s": round(server.start_s, 2),
    }
    return [common | asdict(level) for level in levels]


# -- the child process ------------------------------------------------------------------------------


def work(say: Callable[..., None]) -> None:
    """Import vLLM's benchmark, then run each job that comes, and say a level as it is done."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # a connection a request that is in flight

    def run(**given) -> dict:
        return serve.main(parser.parse_args(command.flags(job["same"] | given | {"seed": next(seeds)})))

    for line in sys.stdin:
        job, seeds = json.loads(line), itertools.count()  # no prompt twice: the server keeps what it read
        os.environ.update(job["environment"])
        best = 0.0
        for count in job["concurrencies"]:
            found = _long_enough(run, count, max(4, 2 * count))
            say(**found, share=None)
            best = max(best, found["request_throughput"])
        for share in job["shares"]:
            rate = share * best
            asked = max(4, round(rate * job["seconds"]))
            say(**run(request_rate=rate, num_prompts=asked), share=share)


def _long_enough(run, concurrency: int, count: int) -> dict:
    """A closed loop's result; what was over sooner than ``SHORTEST_S`` is run again for twice that."""
    while True:
        found = run(max_concurrency=concurrency, num_prompts=count)
        more = round(2 * SHORTEST_S * found["request_throughput"])
        if found["duration"] >= SHORTEST_S or more <= count:
            return found
        count = more
