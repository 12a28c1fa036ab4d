"""Parameters: right ones pass unchanged, wrong ones are named before anything is loaded."""

import json
import re
from pathlib import Path

import pytest

from helpers.base import parameters
from helpers.base.parameters import ParameterError
from helpers.engine import engine
from helpers.model import checkpoints, hub, inputs


@pytest.mark.parametrize("value", ["1,8,32", [1, 8, 32], (1, 8, 32), " 1, 8 ,32 "])
def test_batch_sizes_as_a_list_or_as_papermill_passes_it(value):
    assert parameters.whole_list("batch_sizes", value, 1, 1024) == [1, 8, 32]
    assert parameters.whole_list("batch_sizes", 8, 1, 1024) == [8]


WRONG = {
    (parameters.whole_list, 1, 1024): ("", "1,,8", [], [0], [1.5], [True], "0,8", [2000], None, True, "1;8"),
    (parameters.whole, 1, 100): (0, 101, "5", 5.0, True, None),
    (parameters.number, 0, 10): (-1, 10.1, "5", True, None, float("nan")),
}


@pytest.mark.parametrize(
    ("check", "bounds", "value"),
    [(check, bounds, value) for (check, *bounds), values in WRONG.items() for value in values],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(check, bounds, value):
    with pytest.raises(ParameterError, match=r"^one_of_mine must be .*, not "):
        check("one_of_mine", value, *bounds)


def test_what_can_be_is_returned_and_an_engine_is_what_two_parameters_ask_for():
    assert parameters.whole("max_tokens", 5, 1, 100) == parameters.number("seconds", 5, 0, 10) == 5
    assert parameters.text("question", "Why?") == "Why?"
    assert inputs.check(model="phi-2", count_only=True).engine_args == {}
    asked = inputs.check(model="phi-2", count_only=True, tensor_parallel_size=2, quick_look=True)
    assert asked.engine_args == {"tensor_parallel_size": 2, "enforce_eager": True}
    with pytest.raises(ParameterError, match="no parameter 'batches' of a lesson"):
        parameters.checked("batches", 1)


# -- every notebook checks every parameter of its own --------------------------------------------------------

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
NOT_NUMBERS = ("abc", None, [], True, -1, float("nan"), 1e30, 10**30, "-1")
NOT_BOOLS = ("yes", "True", None, 1, 0, [])
NOT_TEXTS = ("", "  ", None, [], 5, True, {"a": 1})
NOT_LISTS = ("", "0", "1,abc", None, 0, [], "1;8", "-1", "99999999999")


def code_of(path: Path) -> tuple[str, str, str]:
    """A notebook's imports, its parameters, and the cell that checks these."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    (place,) = [n for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", ())]
    sources = ["".join(cell["source"]) for cell in cells]
    return "\n".join(sources[:place]), sources[place], sources[place + 1]


def wrong_values() -> list:
    found = []
    for path in NOTEBOOKS:
        defaults: dict = {}
        exec(code_of(path)[1], {}, defaults)
        for name, default in defaults.items():
            wrong = NOT_NUMBERS if isinstance(default, int | float) else NOT_TEXTS
            wrong = NOT_BOOLS if isinstance(default, bool) else wrong
            wrong = NOT_LISTS if isinstance(default, str) and re.fullmatch(r"\d+(,\d+)+", default) else wrong
            found.append(pytest.param(path, name, wrong, id=f"{path.stem[:2]} {name}"))
    return found


@pytest.fixture
def nothing_starts(monkeypatch):
    """Whatever a check should have refused first fails here instead of working for minutes."""
    for room, call in ((engine, "open_engine"), (checkpoints, "make"), (hub, "from_hub")):
        monkeypatch.setattr(room, call, lambda *_, **__: pytest.fail("it was not refused"))


@pytest.mark.parametrize(("path", "name", "wrong"), wrong_values())
def test_a_notebook_refuses_a_wrong_value_and_names_the_parameter(
    path, name, wrong, nothing_starts, monkeypatch
):
    imports, parameters_, checks = code_of(path)
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(path.parent)  # where its kernel starts
    known: dict = {}
    exec(imports, known)
    for value in wrong:
        values = dict(known)
        exec(parameters_, values)
        values[name] = value
        with pytest.raises(ParameterError, match=name):
            exec(checks, values)
            pytest.fail(f"{name} = {value!r} was not refused")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_own_values_pass_its_checks(path, monkeypatch, capsys):
    imports, parameters_, checks = code_of(path)
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(path.parent)  # where its kernel starts
    monkeypatch.setenv("TUTORIAL_MODEL", "embedded")
    values: dict = {}
    for source in (imports, parameters_, checks):
        exec(source, values)
    assert "Model: " in capsys.readouterr().out
