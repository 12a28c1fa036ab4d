"""The package's structure: eight rooms, each importing only those below it, small enough to be read."""

import ast
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

from helpers.base.files import ROOT

HELPERS = ROOT / "helpers"
# From the ground up. measure and serve stand side by side: neither may import the other.
FLOORS = (("base",), ("faults",), ("model",), ("engine",), ("measure", "serve"), ("compare",), ("tools",))
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONGEST = 400
# What a reader reads from top to bottom to know how a model is chosen, opened, measured and let go.
CORE = re.findall(
    r"`(\w+/\w+)`",
    re.search(r"core, in reading order(.*?)\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1],
)
CORE_LINES = 2500  # 2,030 of them without what happens to processes and interrupts
# Without blank lines, comments and docstrings, and with room for some schemes and failures.
CODE_LINES = {"helpers": 9600, "tests": 9600}


def modules() -> list[Path]:
    found = sorted(HELPERS.rglob("*.py"))
    assert len(found) > 50, "rooms moved: this test would look at nothing"
    return found


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """The project's modules that a file imports, and whether that happens inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            for alias in node.names:
                deeper = HELPERS.joinpath(*node.module.split(".")[1:], f"{alias.name}.py").exists()
                name = f"{node.module}.{alias.name}" if deeper else node.module
                found.append((name, id(node) in inner))
        elif isinstance(node, ast.Import):
            found += [(a.name, id(node) in inner) for a in node.names if a.name.split(".")[0] == "helpers"]
    return found


def room(name: str) -> str | None:
    """The room of a module's dotted name; None for the package and for the commands beside the rooms."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else None


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_folder_is_a_room():
    folders = {path.name for path in HELPERS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOOR)


def test_a_room_imports_only_rooms_below_it():
    up = [
        f"{dotted(path)} imports {name}"
        for path in modules()
        for name, _ in imports(path)
        if (mine := room(dotted(path))) and (theirs := room(name)) != mine
        and name != "helpers" and (theirs is None or FLOOR[theirs] >= FLOOR[mine])
    ]  # fmt: skip
    assert not up


def test_no_import_hides_in_a_function():
    hidden = [f"{dotted(path)}: {name}" for path in modules() for name, inner in imports(path) if inner]
    assert not hidden


def test_no_modules_import_each_other_in_a_circle():
    graph = {dotted(path): {name for name, _ in imports(path)} - {dotted(path)} for path in modules()}
    while leaves := [name for name, wanted in graph.items() if not wanted & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in a circle, or above one: {sorted(graph)}"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_no_module_is_longer_than_a_reader_can_hold(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_readers_core_is_read_in_half_an_hour():
    lines = sum(len((HELPERS / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in CORE)
    assert lines <= CORE_LINES


NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
)  # fmt: skip


def code_lines(path: Path) -> int:
    documented = [
        node.body[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    text = {line for node in documented for line in range(node.lineno, node.end_lineno + 1)}
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in NO_CODE]
    return len({line for one in tokens for line in range(one.start[0], one.end[0] + 1)} - text)


@pytest.mark.parametrize("folder", CODE_LINES)
def test_the_whole_stays_small(folder):
    assert sum(map(code_lines, (ROOT / folder).rglob("*.py"))) <= CODE_LINES[folder]


def test_no_module_imports_torch_or_vllm_before_it_is_used():
    names = [dotted(path) for path in modules() if path.parent.name != "recipes"]  # those are programs
    code = f"import sys\nimport {', '.join(names)}\n"
    code += (
        "heavy = {'torch', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
