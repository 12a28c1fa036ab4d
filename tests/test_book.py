"""The collection reads like a book: a map, pictures that are not stale, a glossary of the words used."""

import importlib.util
import io
import json
import re

import pytest
from dotenv import dotenv_values

from helpers.model.schemes import EVERY, SCHEMES
from helpers.serve import settings
from helpers.tools import pictures
from tests.scratch import REPO, files
from tests.test_links import prose

NOTEBOOKS = sorted((REPO / "notebooks").glob("[!.]*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MAP = re.compile(
    r"^\| \[(\w+)\]\(notebooks/(\w+)\.ipynb\) "
    r"\| (.+?) \| (.+?) \| (.+?) \|$",
    re.MULTILINE,
)


def first_cell(path) -> str:
    return "".join(json.loads(path.read_text())["cells"][0]["source"])


# --- The map


def test_the_map_has_every_notebook_in_order_with_its_question():
    rows = MAP.findall(prose("README.md"))
    assert [row[0] for row in rows] == NAMES
    for name, target, question, needs, time in rows:
        assert name == target
        assert first_cell(REPO / f"notebooks/{name}.ipynb").splitlines()[0] == f"# {question}"
        assert needs
        assert re.search(r"\d+ (s|min)", time)


def test_the_guide_names_the_next_lessons_with_their_questions():
    rows = re.findall(
        r"^\| \[(\w+)\]\(\w+\.ipynb\) \| (.+) \|$", prose("notebooks/00_start_here.ipynb"), re.MULTILINE
    )
    assert [name for name, _ in rows] == NAMES[1:4]
    for name, question in rows:
        assert first_cell(REPO / f"notebooks/{name}.ipynb").splitlines()[0] == f"# {question}"


def test_needs_on_the_map_are_those_that_the_runner_knows():
    needs = {row[0]: row[3] for row in MAP.findall(prose("README.md"))}
    for path in NOTEBOOKS:
        wanted = json.loads(path.read_text())["metadata"].get("tutorial", {}).get("needs", [])
        assert all(name[:2] in needs[path.stem] for name in wanted), f"{path.stem} needs {wanted}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_first_page_says_what_for_what_with_and_how_long(path):
    text = first_cell(path)
    assert text.partition("\n")[0].endswith("?")
    for part in ("**You need**", "**It takes**"):
        assert text.count(part) == 1
    before = re.findall(r"\*\*Before:\*\* \[(\w+)\]", text)
    assert path == NOTEBOOKS[0] or (before and before[0] < path.stem)
    assert all(name > path.stem for name in re.findall(r"\*\*Next:\*\* \[(\w+)\]", text))


def test_the_book_can_be_read_from_the_first_page_to_the_last():
    at, read = NOTEBOOKS[0], []
    while at.stem not in read:
        read.append(at.stem)
        following = re.findall(r"\*\*Next:\*\* \[(\w+)\]", first_cell(at))
        at = at.with_stem(following[0]) if following else at
    assert read == [name for name in NAMES if name in read]
    assert read[:7] == NAMES[:7]


def test_which_notebook_answers_what_is_short_and_leaves_no_lesson_out():
    text = prose("notebooks/ANSWERS.md").partition("\n## ")[0]
    rows = re.findall(r"^\| (.+\?) \| (\d\d): \[.+\]\((\w+)\.ipynb#[\w-]+\) \|$", text, re.M)
    assert len(rows) == text.count(".ipynb#") <= 45  # test_links follows them to their headings
    assert {name for *_, name in rows} == set(NAMES)
    assert all(name.startswith(number) for _, number, name in rows)


def test_the_way_to_a_server_names_settings_and_modules_that_there_are():
    text = (REPO / "notebooks/ANSWERS.md").read_text(encoding="utf-8")
    values = dotenv_values(stream=io.StringIO(re.search(r"```ini\n(.+?)```", text, re.S)[1]))
    assert values.pop("VLLM_API_KEY") == "..."
    found = settings.load(None, **{name.lower(): value for name, value in values.items()})
    assert found.max_num_seqs >= 20
    for module in re.findall(r"-m (helpers[.\w]+)", text):
        assert importlib.util.find_spec(module)


# --- The pictures

PICTURED = [path for path in NOTEBOOKS if f'src="pictures/{path.stem}.png"' in first_cell(path)]


@pytest.mark.parametrize("path", PICTURED, ids=lambda path: path.stem)
def test_a_picture_is_small_and_that_of_the_stored_output(path):
    picture = pictures.path_of(path).read_bytes()
    assert picture == pictures.source(path), f"run `make notebooks NOTEBOOKS={path.stem}`"
    assert len(picture) < 100_000


def test_no_picture_is_left_that_no_notebook_shows():
    found = {name for name in files() if name.startswith("notebooks/pictures/")}
    assert found == {f"notebooks/pictures/{path.stem}.png" for path in PICTURED}


# --- The glossary

ROW = re.compile(r"^\| ([^|]+?) \| ([^|]+?) \| (\[.+\)) \|$", re.MULTILINE)
# Names of products and things that every reader of this book knows, and units.
KNOWN = {
    *("CPU", "CPUs", "GPU", "GPUs", "API", "HTTP", "JSON", "YAML", "CUDA", "GiB", "MiB"),
    *("README", "SECURITY", "OpenAI", "NVIDIA", "AMD", "JupyterLab", "SageMaker", "AutoAWQ"),
    *("L4", "T4", "A10", "A100", "H100", "H200", "RTX", "GB", "PyTorch", "HuggingFace"),
    *("L4s", "T4s", "A100s", "H100s", "Qwen3"),
}


def glossary() -> list[tuple[list[str], str, list[str]]]:
    """Terms, meaning, notebooks of each row."""
    rows = [row for row in ROW.findall(prose("notebooks/GLOSSARY.md")) if row[0] != "term"]
    return [(t.split(", "), meaning, re.findall(r"\((\w+)\.ipynb\)", where)) for t, meaning, where in rows]


def has(text: str, term: str) -> bool:
    return bool(re.search(rf"(?<![\w-]){re.escape(term)}(?:s|es)?(?![\w])", text, re.IGNORECASE))


def test_every_term_is_explained_where_the_glossary_says():
    assert len(glossary()) > 25
    for terms, meaning, where in glossary():
        assert where
        assert meaning
        for term in terms:
            assert any(has(prose(f"notebooks/{name}.ipynb"), term) for name in where), f"{term} in {where}"


def test_the_names_in_code_are_listed_with_their_titles():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", prose("notebooks/GLOSSARY.md"), re.MULTILINE))
    assert rows.items() >= {name: one.title for name, one in SCHEMES.items()}.items()
    assert all(EVERY[name].title == title for name, title in rows.items())


def test_a_term_is_listed_once():
    terms = [term.lower() for row, *_ in glossary() for term in row]
    assert len(terms) == len(set(terms))


def test_every_abbreviation_in_the_prose_is_in_the_glossary():
    defined = {
        part for terms, *_ in glossary() for term in terms for part in (term, *term.split(), *term.split("-"))
    }
    unknown = {}
    for path in NOTEBOOKS:
        text = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", " ", prose(f"notebooks/{path.name}"))
        for word in set(re.findall(r"\b[A-Z][A-Za-z]*[A-Z0-9][A-Za-z0-9]*\b", text)) - defined - KNOWN:
            unknown.setdefault(word, []).append(path.stem)
    assert not unknown
