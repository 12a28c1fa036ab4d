"""What the notebooks show on each kind of machine, recorded and held against what they have stored.

    make kinds                                       record each kind that this machine can be
    python -m tests.kinds avx2 --notebooks 02_fp8    one of them, and what was edited; the rest of it stays

A recording (tests/kinds/KIND.json.xz) has each code cell's source in short and the text that it showed,
without what stands inside the marks. What differs there from the stored notebook would be red on that kind of
machine. A cell that was edited since makes its recording worth nothing: record again.

A narrower CPU than this is had by hiding instructions: from oneDNN and ``helpers`` by ONEDNN_MAX_CPU_ISA,
from vLLM by tests/masked. vLLM then loads its build for AVX2, as it does on such a machine.
"""

import argparse
import copy
import difflib
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbval.plugin import coalesce_streams, get_sanitize_patterns

from helpers.base.machine import Machine, detect
from tests import ci, marks
from tests.replay import code_cells

FOLDER = Path(__file__).parent / "kinds"
RULES = get_sanitize_patterns((FOLDER.parent / "nbval_sanitize.cfg").read_text(encoding="utf-8"))
# By kind, the narrowest first: the instruction set that makes it, and the limit that hides all wider ones.
KINDS = {"avx2": ("avx2", "AVX2"), "avx512": ("avx512f", "AVX512_CORE_BF16"), "amx": ("amx_bf16", "")}


def kind(machine: Machine) -> str:
    """The kind that a machine is: ``cuda``, or the widest of ``KINDS`` that its CPU has."""
    return "cuda" if machine.kind == "cuda" else [name for name in KINDS if KINDS[name][0] in machine.isa][-1]


def clean(text: str) -> str:
    """A text without what stands inside its marks."""
    for rule, instead in RULES:
        text = re.sub(rule, instead, text)
    return text


def compared(cell) -> dict[str, list[str]]:
    """What is compared of a cell's outputs, by its kind, as nbval does; nothing of one that is ignored."""
    found: dict[str, list[str]] = {}
    if "nbval-ignore-output" in cell.metadata.get("tags", ()):
        return found
    for output in coalesce_streams(copy.deepcopy(cell.outputs)):
        for key, text in marks.texts(output).items():
            found.setdefault(output.get("name", key), []).append(clean(text))
    return found


def source(cell) -> str:
    """A cell's source in short."""
    return hashlib.sha256(cell.source.encode()).hexdigest()[:16]


def problems(cells: list, recorded: list[dict]) -> list[str]:
    """What a notebook's code cells show otherwise than the recording of a kind, a sentence or a diff each."""
    if [source(cell) for cell in cells] != [one["source"] for one in recorded]:
        return ["edited since it was recorded: make kinds, once its outputs are stored"]
    found = []
    for number, (cell, one) in enumerate(zip(cells, recorded, strict=True)):
        stored, shown = compared(cell), one["shown"]
        for key in sorted({*stored, *shown}):
            sides = [
                [line.strip()[:400] for text in of.get(key, ()) for line in marks.lines(text, key)]
                for of in (stored, shown)
            ]
            if stored.get(key) != shown.get(key):
                lines = difflib.unified_diff(*sides, "stored", "recorded", n=0, lineterm="")
                found.append("\n".join([f"code cell {number}, {key}:", *lines]))
    return found


def load(name: str) -> dict:
    """A recording: by notebook ``device`` and ``isa``, as the run saw the machine, and its ``cells``."""
    path = FOLDER / f"{name}.json.xz"
    return json.loads(lzma.decompress(path.read_bytes())) if path.exists() else {}


def record(name: str, notebooks: list[str]) -> None:
    """Run notebooks with short parameters as a kind of machine, and keep what those showed that ended well.

    Raises:
        SystemExit: a notebook failed.
    """
    out, limit = ci.BUILD / "kinds" / name, KINDS.get(name, ("", ""))[1]
    (out / "results.jsonl").unlink(missing_ok=True)  # the records stay: 04 reads those of 01 to 03
    masked = {"ONEDNN_MAX_CPU_ISA": limit, "PYTHONPATH": str(FOLDER.parent / "masked")} if limit else {}
    same = {"cwd": ci.ROOT, "env": os.environ | ci.HEADLESS | masked}
    texts = "".join(
        (ci.ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8") for stem in notebooks
    )
    short = [word for pair in ci.SHORT.items() if f'"{pair[0]} = ' in texts for word in ("-p", *pair)]
    command = [sys.executable, "-m", "helpers.tools.run", *notebooks, "--out", str(out), *short]
    code = subprocess.run(command, **same).returncode
    seen = subprocess.run([sys.executable, "-c", SEEN], **same, check=True, capture_output=True).stdout
    if code not in (0, 1):
        raise SystemExit(code)
    told = load(name)
    for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if result["status"] == "ok":
            cells = code_cells(nbformat.read(out / f"{result['notebook']}.ipynb", as_version=4))
            shown = [{"source": source(cell), "shown": compared(cell)} for cell in cells]
            told[result["notebook"]] = json.loads(seen) | {"cells": shown}
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(told, sort_keys=True).encode()
    (FOLDER / f"{name}.json.xz").write_bytes(lzma.compress(text, preset=9))
    if code:
        raise SystemExit(f"{name}: not every notebook is recorded, see {out}")


SEEN = """
import json
from helpers.base.machine import detect
print(json.dumps({"device": detect().label, "isa": sorted(detect().isa)}))
"""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    here = kind(detect())
    can = [here] if here == "cuda" else [*KINDS][: [*KINDS].index(here) + 1]
    parser = argparse.ArgumentParser(prog="python -m tests.kinds", description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"this machine can be: {', '.join(can)}")
    parser.add_argument("--notebooks", nargs="+", choices=ci.COMPARED, default=ci.COMPARED, metavar="NAME")
    given = parser.parse_args(arguments)
    if wrong := {*given.kinds} - {*can}:
        parser.error(f"this machine cannot be {', '.join(wrong)}; it can be: {', '.join(can)}")
    for name in given.kinds or can:
        record(name, given.notebooks)


if __name__ == "__main__":
    main()
