"""Thousands of prompts through one's own servers, every row once: Ray Data over HTTP, resumable.

    print(run_batch("prompts.jsonl", "answers.jsonl", router.url, router.settings.api_key))

The files are those of ``vllm run-batch`` and of OpenAI's batch API: a line of input has ``custom_id``,
``url`` and ``body``, a line of output ``custom_id``, ``response`` and ``error``.

Ray has an HTTP processor of its own (``ray.data.llm.HttpRequestProcessorConfig``, 2.60). It is not used:
each of its actors has one request in flight, a 500 with a JSON body becomes a row's answer, and one with a
plain text ends the whole run. A class that ``map_batches`` is given needs no more lines than its settings.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import pydantic

from helpers.base import parameters, processes, records
from helpers.base.files import ROOT, write_whole

ATTEMPTS = 6  # to answer a row, before it counts as failed
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
GRACE_S = 20  # for Ray to end, once asked to
MISSING = "Ray is not installed: run `make scale` once (two packages, about 100 MB)."


class BatchError(ValueError):
    """A batch that cannot be run; the message names the file, the line and what is allowed."""


@dataclass(frozen=True)
class Summary:
    """What became of a batch: its rows, those that were answered before this run, and this run's seconds."""

    rows: int
    answered: int
    before: int
    seconds: float

    @property
    def failed(self) -> int:
        """Rows without an answer; the next run asks them again."""
        return self.rows - self.answered

    def __str__(self) -> str:
        return (
            f"{self.rows} rows: {self.answered} answered ({self.before} before), {self.failed} failed, "
            f"‹{self.seconds:.1f} s›, ‹{(self.answered - self.before) / self.seconds:.2f} rows/s›"
        )


class Row(pydantic.BaseModel):
    """A line of input; what else it has is not looked at."""

    custom_id: str
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a batch, checked.

    Raises:
        BatchError: a line is no JSON object of that form, or has an id of another line.
    """
    rows, seen = [], {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        where = f"{Path(path).name}, line {number}"
        try:
            row = Row.model_validate_json(line)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            raise BatchError(f"{where}: {' '.join(map(str, wrong['loc']))}: {wrong['msg']}.") from None
        if row.body.get("stream"):
            raise BatchError(f"{where}: body: a stream cannot be written down.")
        if first := seen.get(row.custom_id):
            raise BatchError(f"{where}: custom_id: {row.custom_id!r} is that of line {first}, too.")
        seen[row.custom_id] = number
        rows.append(row)
    return rows


def answers(path: str | Path) -> dict[str, dict]:
    """The answered rows of an output file, by id; not those that failed, nor a line that a kill cut short."""
    found, _ = records.read(path, ("custom_id", "error"))
    return {row["custom_id"]: row for row in found if not row["error"]}


def run_batch(
    source: str | Path,
    out: str | Path,
    url: str,
    key: str,
    *,
    clients: int = 16,
    address: str | None = None,
) -> Summary:
    """Ask every row of ``source`` that ``out`` has no answer to; append a line a row as it is answered.

    Args:
        url, key: a server or a router.
        clients: requests in flight at once, of each Ray actor: one here, one a node of a cluster.
        address: of a Ray cluster; by default Ray runs on this machine and ends with this call.

    Raises:
        BatchError: the file is wrong, or Ray is missing; nothing was asked.
    """
    parameters.whole("clients", clients, 1, 4096)
    if importlib.util.find_spec("ray") is None:
        raise BatchError(MISSING)
    rows, have = read_rows(source), answers(out)
    have = {row.custom_id: have[row.custom_id] for row in rows if row.custom_id in have}
    write_whole(Path(out), "".join(json.dumps(row) + "\n" for row in have.values()))
    begun = time.perf_counter()
    if len(have) < len(rows):
        out = Path(out).absolute()  # the child runs elsewhere
        job = (str(Path(source).absolute()), str(out), url, clients, address)
        # Imported, not run by its name: Ray pickles what it is given by the module that it is of.
        code = f"from helpers.serve import batches; batches.ask_all(*{job!r})"
        # Ray runs below a supervisor: two of its processes would outlive an owner that is killed.
        command = processes.owned_command([sys.executable, "-c", code], GRACE_S)
        environment = os.environ | QUIET | {"VLLM_API_KEY": key, "PYTHONPATH": str(ROOT)}
        log, done = Path(f"{out}.log"), lambda: (out.read_text().count("\n"), len(rows), "rows")
        if code := processes.run_logged(command, log, environment, done):
            said = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
            raise BatchError(f"Ray ended with exit code {code}: {said}\nFull log: ‹{log.name}›")
    return Summary(len(rows), len(answers(out)), len(have), time.perf_counter() - begun)


def ask_all(source: str, out: str, url: str, clients: int, address: str | None) -> None:
    """What the child does: every row that has no answer, through Ray; a line a row as blocks are done."""
    import ray

    have = answers(out)
    items = [{"line": row.model_dump_json()} for row in read_rows(source) if row.custom_id not in have]
    ray.init(address=address, **({} if address else {"include_dashboard": False}))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node has Ray, and not this file
    ray.data.DataContext.get_current().enable_progress_bars = False
    size = 4 * clients  # of what an actor is given: its end, where few are in flight, is then rare
    data = ray.data.from_items(items, override_num_blocks=-(-len(items) // size))
    asked = data.map_batches(
        Asker,
        fn_constructor_args=(url, os.environ["VLLM_API_KEY"], clients),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=len(ray.nodes())),
        num_cpus=0.5,
    )
    with Path(out).open("a") as file:
        for row in asked.iter_rows():
            file.write(row["line"] + "\n")
            file.flush()


class Asker:
    """A Ray actor with many clients: it asks the rows it is given, and returns each with what came back.

    OpenAI's client asks again, and waits as it is told to, where a server drains, is full or is gone.
    """

    def __init__(self, url: str, key: str, clients: int):
        import openai

        self.pool = ThreadPoolExecutor(clients)
        # No proxy of the environment's: it would be told the key.
        http = httpx.Client(trust_env=False, limits=httpx.Limits(max_connections=clients))
        self.client = openai.OpenAI(
            base_url=url, api_key=key, max_retries=ATTEMPTS - 1, timeout=600, http_client=http
        )

    def __call__(self, batch: dict) -> dict:
        return {"line": list(self.pool.map(self.ask, batch["line"]))}

    def ask(self, line: str) -> str:
        """One row, asked until it is answered or its attempts are used up."""
        import openai

        row, response, problem = json.loads(line), None, None
        try:
            for _ in range(ATTEMPTS):
                body = self.client.post(row["url"], body=row["body"], cast_to=httpx.Response).json()
                if all(choice.get("finish_reason") != "abort" for choice in body["choices"]):
                    response, problem = {"status_code": 200, "body": body}, None
                    break
                problem = "the server gave the answer up (abort)"
        except openai.APIStatusError as error:
            problem = f"{error.status_code}: {error.response.text[:300]}"
        except openai.APIConnectionError as error:
            problem = type(error).__name__
        return json.dumps({"custom_id": row["custom_id"], "response": response, "error": problem})


def main() -> None:
    parser = argparse.ArgumentParser(prog="batches", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="JSON lines with custom_id, url and body")
    parser.add_argument("out", help="JSON lines; rows that it answers are not asked again")
    parser.add_argument("--url", required=True, help="of a server or a router, such as http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=16, help="requests in flight at once (%(default)s)")
    parser.add_argument("--address", help="of a Ray cluster, such as auto; by default this machine alone")
    given = vars(parser.parse_args())
    try:
        summary = run_batch(key=os.environ.get("VLLM_API_KEY", ""), **given)
    except (BatchError, parameters.ParameterError, OSError) as error:
        raise SystemExit(f"batches: {error}") from None
    print(summary)
    raise SystemExit(1 if summary.failed else 0)


if __name__ == "__main__":
    main()
