"""CONTRIBUTING.md, followed to the letter: its blocks are run in a copy of the repository."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scratch import REPO, copy_repository, files

TEXT = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(section: str) -> list[tuple[str, str]]:
    """The kinds and texts of a section's blocks, in order."""
    text = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the repository with this environment, whose set-up is left alone: it belongs to this one."""
    folder = copy_repository(tmp_path / "a copy")
    (folder / ".venv/bin").mkdir(parents=True)
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return folder


def follow(folder: Path, kind: str, text: str) -> str:
    """Do what a block says: apply a diff, or run commands; return what they printed."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    env.pop("PYTEST_CURRENT_TEST", None)
    if kind == "diff":
        command = ["git", "apply", "-"]
    else:  # `make` does all but its set-up, which would make this environment the copy's
        command, text = ["bash", "-es"], f'make() {{ command make -o setup "$@"; }}\n{text}'
    done = subprocess.run(command, input=text, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_every_target_that_a_page_names_is_there():
    pages = [name for name in files() if name.endswith((".md", ".ipynb")) or name == ".ci/run"]
    texts = [(REPO / name).read_text(encoding="utf-8") for name in pages]
    named = {target for text in texts for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 10
    assert named <= {*targets}


def test_the_example_of_a_scheme_still_fits_the_code(copy):
    diffs = [block for block in blocks("Add a scheme") if block[0] == "diff"]
    for block in diffs:
        follow(copy, *block)
    assert len(diffs) == 1
    program = "from helpers.model import schemes; print(*schemes.SCHEMES); print(schemes.__file__)"
    said = follow(copy, "sh", f".venv/bin/python -c {shlex.quote(program)}")
    names, file = said.splitlines()
    assert names.split()[-1] == "fp8_block"
    assert file == str(copy / "helpers/model/schemes.py")
    follow(
        copy,
        "sh",
        ".venv/bin/python -m ruff check -q helpers; .venv/bin/python -m ruff format -q --check helpers",
    )


@pytest.mark.slow
def test_a_scheme_can_be_added_as_it_says(copy):
    said = [follow(copy, *block) for block in blocks("Add a scheme")][-1]
    assert re.search(r"[\d,]+ bytes predicted\n$", said)


def test_a_notebook_can_be_added_as_it_says(copy):
    for block in blocks("Add a notebook"):
        follow(copy, *block)
    added = json.loads((copy / "notebooks/09_my_question.ipynb").read_text())
    assert "Next:" not in "".join(added["cells"][0]["source"])
    changed = subprocess.run(["git", "status", "--short"], cwd=copy, capture_output=True, text=True).stdout
    assert set(changed.split()[1::2]) == {
        "README.md", "notebooks/ANSWERS.md", "notebooks/09_my_question.ipynb",
        "notebooks/pictures/09_my_question.png",
    }  # fmt: skip


def test_a_failure_is_one_block_and_one_text(copy):
    for kind, text in blocks("Add a failure"):
        assert "passed" in follow(copy, kind, text)
