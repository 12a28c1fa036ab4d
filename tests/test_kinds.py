"""What was recorded on each kind of machine is what the notebooks have stored, or they would be red there."""

import copy

import nbformat
import pytest

from helpers.base import records
from helpers.base.machine import Machine
from helpers.compare import claims, comparison_tables, cost
from helpers.compare.cards import GENERATIONS
from helpers.measure import result_tables
from helpers.model.lookup import resolve
from helpers.model.schemes import SCHEMES
from helpers.model.ways import ways
from tests import ci, kinds, marks

RECORDED = {
    path.name.partition(".")[0]: kinds.load(path.name.partition(".")[0])
    for path in sorted(kinds.FOLDER.glob("*.json.xz"))
}
every = pytest.mark.parametrize(
    ("name", "stem"), [(name, stem) for name, told in RECORDED.items() for stem in told]
)
STORED = {
    stem: [
        cell
        for cell in nbformat.read(ci.ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
        if cell.cell_type == "code"
    ]
    for stem in ci.COMPARED
}


def test_every_kind_of_cpu_is_recorded_in_every_lesson():
    missing = {name: {*ci.COMPARED} - {*RECORDED.get(name, {})} for name in kinds.KINDS}
    assert not any(missing.values()), missing


@every
def test_a_kind_shows_what_is_stored(name, stem):
    found = kinds.problems(STORED[stem], RECORDED[name][stem]["cells"])
    assert not found, f"{stem} would be red on {name}:\n" + "\n".join(found)


@every
def test_it_ran_as_that_kind(name, stem):
    told = RECORDED[name][stem]
    machine = Machine("cpu", told["device"], 0, isa=frozenset(told["isa"]))
    assert kinds.kind(machine) == name if told["isa"] else name == "cuda"


@pytest.mark.parametrize("stem", STORED)
def test_a_line_less_or_another_source_is_found(stem):
    for cell in STORED[stem]:
        recorded = [{"source": kinds.source(cell), "shown": kinds.compared(cell)}]
        assert kinds.problems([cell], recorded) == []
        for place, output in enumerate(cell.outputs if kinds.compared(cell) else []):
            for mime, text in marks.texts(output).items():
                shown = marks.lines(text, mime)
                for row, line in enumerate(shown):
                    changed = copy.deepcopy(cell)
                    marks.put(changed.outputs[place], mime, "".join(shown[:row] + shown[row + 1 :]))
                    assert not line.strip() or kinds.problems([changed], recorded), line
        edited = copy.deepcopy(cell)
        edited.source += " "
        assert "edited since" in kinds.problems([edited], recorded)[0]


def tables(rows: list[dict]) -> list:
    """The lessons' tables of a machine's records, as 02 and 04 make them."""
    others, _ = records.elsewhere()
    long = [row for row in others if row.get("cited") or row["prompt_tokens"] == 1024]
    return [
        result_tables.side_by_side(rows, list(SCHEMES)),
        comparison_tables.sides(rows, [name for name in SCHEMES if name != "baseline"]),
        claims.table(claims.findings(resolve("embedded"), rows, long)),
        comparison_tables.advice(cost.recommend(rows, batch=8, least_recovery=0.95)),
    ]


def h200() -> list[dict]:
    """The H200's own records of the lessons' model and load, in the place of this machine's."""
    return [
        {key: value for key, value in row.items() if key != "recorded"}
        for row in records.elsewhere()[0]
        if (row["model"], row["device"], row.get("prompt_tokens"))
        == ("SmolLM2-135M-Instruct", "NVIDIA H200", 16)
        and row["batch"] in (1, 8, 32)
    ]


def shape(table) -> str:
    return kinds.clean(repr(table))


@pytest.mark.parametrize("lacking", [name for name in SCHEMES if name != "baseline"])
def test_the_tables_have_the_same_rows_whatever_a_machine_lacks(lacking):
    rows = h200()
    fewer = [row for row in rows if row["scheme"] != lacking]
    assert fewer
    for whole, other in zip(tables(rows), tables(fewer), strict=True):
        assert shape(other) == shape(whole)


def test_the_ways_have_the_same_rows_on_each_generation():
    names = ["baseline", "fp8", "fp8_file", "int8", "fp8_kv"]
    shapes = {shape(comparison_tables.ways(ways(machine, names))) for machine in GENERATIONS.values()}
    assert len(shapes) == 1
