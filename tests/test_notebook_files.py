"""The committed notebooks as files: run once from top to bottom, stored without noise, small, marked."""

import base64
import html
import io
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from PIL import Image

from helpers.model.schemes import SCHEMES
from tests import marks

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARKED = yaml.safe_load((Path(__file__).parent / "marked_texts.yaml").read_text(encoding="utf-8"))
BUDGET = 500_000  # bytes a notebook: what a browser opens at once and a reviewer can still be shown
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
NUMBER = r"[-+]?\$?\d[\d.,]*"
UNITS = r"%|s|ms|MiB|GiB|GB/s|GFLOP/s|tok/s|nats|tokens|times|operations|requests/s|/s|clients|pieces"
# One or two numbers with what they count; what follows a comma explains, and the next rule asks for that.
MEASURED = re.compile(rf"(?:x )?{NUMBER}(?:%?(?: to {NUMBER})? ?(?:{UNITS}))?")

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def faults(notebook: dict) -> list[str]:
    """What of a stored notebook's form tells of when or where it ran, or that it did not."""
    metadata = dict(notebook["metadata"])
    found = []
    if metadata.pop("kernelspec", None) != KERNEL or metadata.pop("language_info", None) != LANGUAGE:
        found.append("its kernel is not python3, or says which Python it was")
    if noise := set(metadata) - {"tutorial"}:
        found.append(f"metadata: {sorted(noise)}")
    if set(metadata.get("tutorial", {})) - {"needs"}:
        found.append("metadata.tutorial has more than `needs`")
    cells = code(notebook)
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("its cells were not run once each, from top to bottom")
    if len({cell["id"] for cell in notebook["cells"]}) < len(notebook["cells"]):
        found.append("two cells have the same id")
    for cell in notebook["cells"]:
        folded = cell["metadata"].get("jupyter", {"source_hidden": True}) == {"source_hidden": True}
        if (noise := set(cell["metadata"]) - {"tags", "jupyter"}) or not folded:
            found.append(f"cell {cell['id']}: metadata {sorted(noise)}")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                found.append(f"cell {cell['id']}: ends in {output['ename']}")
            if kinds := set(output.get("data", ())) - {"text/plain", "text/html", "image/png"}:
                found.append(f"cell {cell['id']}: stores {sorted(kinds)}")
    return found


@every
def test_it_is_stored_as_the_runner_stores_it(path):
    text = path.read_text(encoding="utf-8")
    assert faults(json.loads(text)) == []
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")


@every
def test_it_is_small(path):
    size = path.stat().st_size
    assert size <= BUDGET, f"{path.name} takes {size:,} bytes of {BUDGET:,}: fewer or smaller pictures"


# Cells of which a whole line may be measured, and why. Their number of lines is compared all the same.
WHOLE_LINES = {
    "00-machine": "00: what this machine is, down to which facts there are to tell of it",
}


def blank(notebook: dict) -> list[str]:
    """The lines of compared cells of which nothing is compared."""
    return [
        f"{cell['id']}: {line}"
        for cell in code(notebook)
        if "nbval-ignore-output" not in cell["metadata"].get("tags", ()) and cell["id"] not in WHOLE_LINES
        for line in marks.hidden_lines(cell["outputs"])
    ]


@every
def test_of_every_line_something_is_compared(path):
    assert blank(nbformat.read(path, as_version=4)) == []


def test_a_line_of_which_nothing_is_compared_is_found():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    cell = next(cell for cell in code(notebook) if cell["outputs"])
    cell["outputs"] = [nbformat.v4.new_output("stream", text="‹three 0.1 s four›\n")]
    assert blank(notebook) == [f"{cell['id']}: ‹three 0.1 s four›"]


NOISE = {
    "kernel": lambda notebook: notebook["metadata"]["kernelspec"].update(name="venv"),
    "version": lambda notebook: notebook["metadata"]["language_info"].update(version="3.11.7"),
    "papermill": lambda notebook: notebook["metadata"].update(papermill={}),
    "widgets": lambda notebook: notebook["metadata"].update(widgets={}),
    "timing": lambda notebook: code(notebook)[0]["metadata"].update(execution={}),
    "unrun": lambda notebook: code(notebook)[0].update(execution_count=None),
    "order": lambda notebook: code(notebook)[0].update(execution_count=7),
    "id": lambda notebook: notebook["cells"][0].update(id=notebook["cells"][1]["id"]),
    "error": lambda notebook: code(notebook)[0]["outputs"].append({"output_type": "error", "ename": "E"}),
    "view": lambda notebook: code(notebook)[0]["outputs"].append(
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
    ),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_found(name):
    notebook = read(NOTEBOOKS[0])
    NOISE[name](notebook)
    assert faults(notebook)


# ---- what is not compared, and why


def marked(notebook: dict) -> set[str]:
    """All texts in marks, of the outputs that are compared, but for what the model wrote."""
    return {
        html.unescape(inside)
        for cell in code(notebook)
        if "nbval-ignore-output" not in cell["metadata"].get("tags", ())
        for output in cell["outputs"]
        for text in marks.texts(joined(output)).values()
        for inside in marks.hidden(GENERATED.sub("", text))
    }


def joined(output: dict) -> dict:
    """An output whose texts are no lists of lines."""
    flat = {key: "".join(part) if key == "text" else part for key, part in output.items()}
    return flat | {"data": {kind: "".join(part) for kind, part in output.get("data", {}).items()}}


GENERATED = re.compile(f"(?:{'|'.join(MARKED['generated']).replace('$', '')})(?:{marks.UNNAMED})")
TEXTS = [re.compile(pattern) for pattern in MARKED["texts"]]
WAYS = {
    text for one in SCHEMES.values() for way in one.ways for text in (one.title, one.lacks, way.name, way.why)
}


def unexplained(texts: set[str]) -> list[str]:
    """Those that are no number with a unit, no way to run a scheme and not listed."""
    rest = (text for text in texts - WAYS if not MEASURED.fullmatch(text))
    return sorted(text for text in rest if not any(pattern.fullmatch(text) for pattern in TEXTS))


@every
def test_marks_hide_numbers_and_what_is_listed(path):
    found = unexplained(marked(read(path)))
    assert not found, f"in marks and neither a number nor in tests/marked_texts.yaml: {found}"


def test_a_fact_in_marks_is_found():
    fact = "Two engines at once is how the second runs out of memory."
    assert unexplained({"14.0 tok/s", "x 0.10", "-", "256.6 MiB predicted", "True", fact}) == [
        "256.6 MiB predicted", "True", fact,
    ]  # fmt: skip


@every
def test_an_ignored_output_has_a_reason(path):
    tags = {cell["id"]: cell["metadata"].get("tags", ()) for cell in code(read(path))}
    ignored = {cell for cell, found in tags.items() if any(tag.startswith("nbval") for tag in found)}
    assert ignored == set(MARKED["ignored"].get(path.stem, {}))


@every
def test_each_picture_says_what_it_shows_and_is_not_blank(path):
    for cell in code(read(path)):
        for output in map(joined, cell["outputs"]):
            data = output.get("data", {})
            encoded = re.findall(marks.PICTURE, str(data.get("text/html", "")))
            for one in [*encoded, *([data["image/png"]] if "image/png" in data else [])]:
                picture = Image.open(io.BytesIO(base64.b64decode(one.replace("\n", ""))))
                assert picture.text["Description"] == str(data["text/plain"]).removeprefix("Figure: ")
                assert len(picture.convert("RGB").getcolors(2**20)) > 10, "it is blank"
