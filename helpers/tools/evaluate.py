"""lm-eval's tasks asked of a model in several schemes, the answers compared item by item: ``make evaluate``.

Each scheme is served as in production, and lm-eval asks the server; its command is printed, so that you can
ask a server of your own in the same way. With a hub, TASKS=gsm8k,ifeval is the usual start; without one
there is ``known_answers``, the lessons' own task. All that was asked and answered is kept below OUT.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from helpers.base.files import ROOT
from helpers.base.page import Table
from helpers.measure.task import Answers, Recovery, recovery
from helpers.model.model import EMBEDDED, ModelError
from helpers.serve import settings
from helpers.serve.errors import ServerError
from helpers.serve.server import Server, open_server
from helpers.tools import extras
from helpers.tools.steps import SetupError

TASKS = ROOT / "helpers" / "measure" / "lm_eval_tasks"
BY_SCHEME = {scheme: quantization for quantization, scheme in settings.SCHEMES.items()}
FP8_CACHE = {("fp8_kv" if name == "baseline" else f"{name}_fp8_kv"): name for name in BY_SCHEME}
CONCURRENT = 16


def command(server: Server, tasks: list[str], out: Path, *options: str) -> list[str]:
    """The lm-eval command that asks a server; the key is in OPENAI_API_KEY."""
    asked = {
        "model": server.name,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": server.checkpoint.folder,
        "num_concurrent": CONCURRENT,
        "max_length": server.args["max_model_len"],
    }
    words = ["lm_eval", "run", "--model", "local-completions", "--tasks", *tasks]
    words += ["--model_args", *(f"{name}={value}" for name, value in asked.items())]
    return [*words, "--include_path", str(TASKS), "--log_samples", "--output_path", str(out), *options]


def ask(model: str, scheme: str, tasks: list[str], out: Path, *options: str) -> dict[str, dict[int, float]]:
    """Serve the model in a scheme, have lm-eval ask it, and return each task's scores by item.

    Raises:
        SettingsError, SchemeError, ModelError, ServerError: it cannot be served.
        SetupError: lm-eval failed; what it said is above.
    """
    weights, cache = FP8_CACHE.get(scheme, scheme), {"kv_cache_dtype": "fp8"} if scheme in FP8_CACHE else {}
    served = settings.load(
        model_name=model, quantization=BY_SCHEME[weights], server_port=0, max_answer_tokens=1280
    )
    with open_server(served, log_dir=out, **cache) as server:
        words = command(server, tasks, out / scheme, *options)
        print(f"OPENAI_API_KEY=... {shlex.join(words)}\n", flush=True)
        key = {"OPENAI_API_KEY": served.api_key}
        code = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=os.environ | key).returncode
    if code:
        raise SetupError(f"lm-eval ended with {code} for {scheme}; what it said is above.")
    return scores(out / scheme)


def scores(folder: Path) -> dict[str, dict[int, float]]:
    """Read what ``--log_samples`` kept: by task, an item's first metric, from 0 (wrong) to 1 (right)."""
    found = defaultdict(dict)
    for file in sorted(folder.rglob("samples_*.jsonl")):
        task = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        for row in map(json.loads, file.read_text().splitlines()):
            found[task].setdefault(row["doc_id"], float(row[row["metrics"][0]]))
    return dict(found)


def table(by_scheme: dict[str, dict[str, dict[int, float]]]) -> Table:
    """Each task and scheme beside the first scheme, on the same items."""
    (first, *others), rows = by_scheme, []
    for task, before in by_scheme[first].items():
        mean = sum(before.values()) / len(before)
        rows.append([task, first, len(before), f"{mean:.1%}", "", "", ""])
        for scheme in others:
            found = kept(before, by_scheme[scheme][task])
            shown = f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
            rows.append([task, scheme, found.items, f"{found.scheme:.1%}", shown, found.lost, found.gained])
    return Table(["task", "scheme", "items", "right", f"kept of {first}, 95 %", "lost", "gained"], rows)


def kept(before: dict[int, float], after: dict[int, float]) -> Recovery:
    """How much of the first scheme's accuracy another keeps; an item counts as right from a score of 0.5."""
    items = sorted(before.keys() & after.keys())
    names = [str(item) for item in items]  # independent of each other, each a group of its own
    margins = [[scores[item] - 0.5 for item in items] for scores in (before, after)]
    return recovery(*(Answers(names, margin) for margin in margins))


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, and print the table; 2 where something is wrong, with the reason."""
    parser = argparse.ArgumentParser(prog="make evaluate", description=__doc__.partition(":")[0])
    add, known = parser.add_argument, ", ".join(BY_SCHEME | FP8_CACHE)
    add("--model", default=EMBEDDED, help="embedded, a folder or a hub name")
    add("--tasks", default="known_answers", help="names of lm-eval tasks, with commas")
    add("--schemes", default="baseline,fp8,awq", help=f"of {known}; others beside the first")
    add("--limit", type=int, help="items a task, from its beginning")
    add("--chat", action="store_true", help="ask through the model's chat template")
    add("--out", type=Path, help="folder for what was asked and answered")
    given = parser.parse_args(arguments)
    schemes, tasks = given.schemes.split(","), given.tasks.split(",")
    if wrong := [scheme for scheme in schemes if scheme not in BY_SCHEME | FP8_CACHE]:
        print(f"No scheme {wrong[0]!r} here. There are: {known}.", file=sys.stderr)
        return 2
    options = ["--limit", str(given.limit)] if given.limit else []
    options += ["--apply_chat_template"] if given.chat else []
    out = given.out or Path("runs") / f"evaluate-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        extras.ensure("evaluate")
        found = {scheme: ask(given.model, scheme, tasks, out.absolute(), *options) for scheme in schemes}
    except (ModelError, ServerError, SetupError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found).aligned(), f"Every item and answer: {out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
