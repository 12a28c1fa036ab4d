"""The lessons' form: short prose around code, the subject, small tables, an exercise, folded set-up."""

import json
import re
import statistics

import pytest

from helpers.compare.advise import advise
from helpers.compare.cards import CARDS
from helpers.compare.counting import counted
from helpers.compare.options import options
from helpers.compare.sizing import Load
from helpers.model import quantize
from helpers.model.shapes import shape
from tests.scratch import REPO

LESSONS = sorted((REPO / "notebooks").glob("0*.ipynb"))
APPENDIX = sorted((REPO / "notebooks").glob("9*.ipynb"))
WORDS_A_LINE, MIDDLE_CELL, MIDDLE_OF_APPENDIX, WORDS = 9, 45, 60, 1800
COLUMNS, ROWS = 7, 12
FOLDED = {"source_hidden": True}

every = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def words(markdown: str) -> int:
    """Words a reader reads: no formulas, no addresses, no HTML, no rules of tables."""
    for pattern in (r"\$\$.*?\$\$", r"<[^>]*>", r"\]\([^)]*\)", r"[|#*>]+", r"(?<!\w)-+(?!\w)"):
        markdown = re.sub(pattern, " ", markdown, flags=re.S)
    return len(markdown.split())


def prose(path) -> list[int]:
    return [words(source(cell)) for cell in cells(path, "markdown")]


def lines(path) -> int:
    return sum(bool(line.strip()) for cell in cells(path, "code") for line in source(cell).splitlines())


def test_there_are_few_words_a_line_of_code():
    assert sum(sum(prose(path)) for path in LESSONS) <= WORDS_A_LINE * sum(map(lines, LESSONS))


@every
def test_a_lesson_is_short_and_so_are_its_cells(path):
    assert sum(prose(path)) <= (900 if path == LESSONS[0] else WORDS)
    assert statistics.median(prose(path)) <= MIDDLE_CELL


@pytest.mark.parametrize("path", APPENDIX, ids=lambda path: path.stem)
def test_the_appendix_has_short_cells_too(path):
    assert statistics.median(prose(path)) <= MIDDLE_OF_APPENDIX


@every
def test_the_first_cell_asks_answers_and_shows(path):
    first, *_ = cells(path, "markdown")
    question, answer, *_ = source(first).split("\n\n")
    assert question.startswith("# ")
    assert question.endswith("?")
    assert "**" in answer
    assert words(source(first)) <= 150
    shown = [output.get("data", {}) for cell in cells(path, "code")[:5] for output in cell["outputs"]]
    assert f'src="pictures/{path.stem}.png"' in source(first) or any("image/png" in one for one in shown)
    assert "**You need**" in source(first)
    assert "**It takes**" in source(first)


@every
def test_set_up_and_checks_are_folded(path):
    code = cells(path, "code")
    (place,) = [n for n, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", ())]
    for cell in (code[0], code[place + 1]):
        assert cell["metadata"]["jupyter"] == FOLDED
    assert len(re.findall(r"\bcheck\(", source(code[place + 1]))) == 1


@every
def test_it_has_an_exercise_whose_solution_is_folded_and_runs(path):
    found = json.loads(path.read_text())["cells"]
    (place,) = [n for n, cell in enumerate(found) if "solution" in cell["metadata"].get("tags", ())]
    assert found[place]["metadata"]["jupyter"] == FOLDED
    assert found[place]["outputs"], "it was not run, or shows nothing"
    assert "## Exercise" in source(found[place - 1])


@every
def test_tables_fit_the_page(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            table = "".join(output.get("data", {}).get("text/html", ""))
            for one in re.findall(r"<table.*?</table>", table, re.S):
                assert one.count('scope="col"') <= COLUMNS, source(cell)
                assert one.count("<tr>") - 1 <= ROWS, source(cell)


@pytest.mark.parametrize("gpu", ["L4", "A10", "H100 SXM", "H200"])
def test_the_rules_that_open_00_and_04_are_those_of_advise(gpu):
    def way(users: int, **more) -> str:
        return advise("qwen3-8b", gpu, context=4096, users=users, **more).chosen.scheme

    modest = gpu in ("L4", "A10")
    assert [way(1), way(4, prompts=0).partition("_")[0]] == (["awq", "awq"] if modest else ["fp8", "fp8"])
    eight = ("fp8_fp8_kv", "int8_fp8_kv") if modest else ("fp8", "fp8_fp8_kv")
    assert way(20) in eight, "on a modest one weights and cache"
    assert way(64) in eight, "although on a modest one some of them wait"
    assert advise("llama-3.1-70b", "L40S").chosen.scheme.startswith("awq"), (
        "where eight bits do not fit, four"
    )


def test_00_opens_with_how_many_run_at_once():
    load = Load(CARDS["L4"], context=4096, users=20)
    found = {one.scheme: one for one in options(counted(shape("qwen3-8b")), load)}
    said = source(cells(LESSONS[0], "markdown")[0])
    for name in ("baseline", "fp8"):
        assert re.search(rf"\b{found[name].users}\b", said)
    assert found["fp8_fp8_kv"].fits


MEASURED = re.compile(r"\d ?(tok/s|[GM]iB|GB|MB|ms|%|times|GB/s|tokens a second)\b|\d %")
SOURCE = re.compile(r"\]\(|arXiv|\"[^\"]+\"|‹|\$\$|\?")  # a link, a paper, a quotation, a question


def unsourced(markdown: str) -> list[str]:
    """Paragraphs with a measured number that neither quote nor link: those come from cells."""
    text = re.sub(r"`[^`]*`|<[^>]*>|\*\*It takes\*\*.*", "", markdown)
    return [one for one in text.split("\n\n") if MEASURED.search(one) and not SOURCE.search(one)]


@pytest.mark.parametrize("path", LESSONS + APPENDIX, ids=lambda path: path.stem)
def test_a_measured_number_in_prose_names_its_source(path):
    assert not [one for cell in cells(path, "markdown") for one in unsourced(source(cell))]


def test_a_measured_number_without_a_source_would_be_found():
    assert unsourced("It ran at 42.0 tok/s.\n\nFP8 keeps 99 % ([arXiv 2411.02355](REFERENCES.md)).") == [
        "It ran at 42.0 tok/s."
    ]


@pytest.mark.parametrize(("lesson", "recipe"), [("02_fp8", "fp8"), ("03_awq", "awq")])
def test_the_recipe_in_the_cell_is_the_one_that_all_lessons_use(lesson, recipe):
    shown = [source(cell) for cell in cells(REPO / f"notebooks/{lesson}.ipynb", "code")]
    (written,) = [text for text in shown if text.startswith("%%capture\n%%writefile")]
    _, first, program = written.split("\n", 2)
    assert first == f'%%writefile "{{out}}/{recipe}.py"'
    assert program + "\n" == quantize.script(recipe)
