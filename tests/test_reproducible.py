"""`make notebooks` twice in a row: what is stored differs only inside marks."""

import json

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.tools import plan, run, store
from helpers.tools.plan import NOTEBOOKS
from tests import marks
from tests.test_notebook_files import joined

CHEAP = ["00_start_here", "08_when_it_fails"]


def blanked(text: str) -> str:
    """A stored notebook without what stands in marks, and without the pixels of pictures."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            whole = joined(output)
            if "png;base64" in str(whole.get("data", {}).get("text/html")):  # its text says what it shows
                whole["data"] = {"text/plain": whole["data"]["text/plain"]}
            for mime, said in marks.texts(whole).items():
                kept = marks.MARK.sub(lambda match: match[0] if match["png"] else "‹›", said)
                marks.put(whole, mime, kept)
            output.clear()
            output.update(whole)
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)


def differences(one: str, other: str) -> list[str]:
    """The lines that differ between two stored notebooks, outside the marks."""
    pair = zip(blanked(one).splitlines(), blanked(other).splitlines(), strict=False)
    found = [f"{first.strip()[:200]} | {second.strip()[:200]}" for first, second in pair if first != second]
    lengths = {len(blanked(text).splitlines()) for text in (one, other)}
    return found or ([] if len(lengths) == 1 else [f"numbers of lines: {lengths}"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_differ_only_inside_marks(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_MODEL", "embedded")
    stored = []
    for turn in ("first", "second"):
        results = run.run_plan(plan.plan_run(CHEAP, out=tmp_path / turn))
        assert [result.status for result in results] == ["ok", "ok"], results
        paths = [NOTEBOOKS / f"{name}.ipynb" for name in CHEAP]
        stored.append(
            [store.stored_text(path, path.read_text(), tmp_path / turn / path.name) for path in paths]
        )
    for name, first, second in zip(CHEAP, *stored, strict=True):
        assert differences(first, second) == [], name


def small(said: str, **metadata) -> str:
    cell = new_code_cell("1", outputs=[new_output("stream", text=said)], id="a", execution_count=1)
    return json.dumps(new_notebook(cells=[cell], metadata=metadata))


def test_a_difference_outside_the_marks_is_found():
    assert differences(small("took ‹3 s›\n"), small("took ‹4.1 s›\n")) == []
    assert differences(small("took ‹3 s›\n"), small("took 3 s\n"))
    assert differences(small("one\n"), small("two\n"))
    assert differences(small("one\n"), small("one\n", papermill={"duration": 3}))
