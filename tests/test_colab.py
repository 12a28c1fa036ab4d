"""Colab's shape: another folder, another Python environment with older packages, and no helpers to import."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from helpers.model import embedded
from helpers.tools import colab, environment, install
from tests.scratch import REPO, copy_repository, find_python
from tests.test_interrupt import Kernel

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
# What Colab brings, as far as it matters here: its own front end pinned, and older packages.
PREINSTALLED = (
    "ipykernel==6.17.1", "ipython==7.34.0", "ipywidgets==7.7.1", "jupyter-client==7.4.9", "tornado==6.5.1",
    "traitlets==5.7.1", "pandas==2.2.2", "numpy==2.0.2", "matplotlib==3.10.0", "psutil==5.9.5",
    "requests==2.32.4", "protobuf==5.29.5", "pip",
)  # fmt: skip
FOLDED = {"jupyter": {"source_hidden": True}}
PINNED = ("ipykernel==6.17.1", "ipython==7.34.0", "pandas==2.2.2", "requests==2.32.4", "tornado==6.5.1")


def setup_cell() -> str:
    """The set-up cell of a lesson."""
    cells = json.loads(NOTEBOOKS[0].read_text())["cells"]
    return "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])


def fetch(repository: str) -> list[str]:
    """The lines that OTHER_WAYS.md has for Colab's first cell, with an address filled in."""
    page = (REPO / "notebooks/OTHER_WAYS.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(!git clone .*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    assert block.count("ADDRESS") == 1
    return block.replace("ADDRESS", repository).splitlines()


def put_google_colab(packages: Path) -> None:
    """An importable ``google.colab`` whose metadata pins what the real one pins; it does nothing."""
    (packages / "google/colab").mkdir(parents=True)
    (packages / "google/colab/__init__.py").touch()
    info = packages / "google_colab-1.0.0.dist-info"
    info.mkdir()
    pins = "".join(f"Requires-Dist: {pin}\n" for pin in PINNED)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: google-colab\nVersion: 1.0.0\n{pins}")
    (info / "RECORD").write_text("google/colab/__init__.py,,\n")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return copy_repository(tmp_path_factory.mktemp("hosted") / "a repository")


@pytest.fixture
def bare(tmp_path) -> Path:
    """An environment without any package but google.colab; returns its Python."""
    venv.create(tmp_path / "usr", with_pip=False)
    put_google_colab(next((tmp_path / "usr/lib").glob("python3.*")) / "site-packages")
    return tmp_path / "usr/bin/python"


def run_cell(python: Path, folder: Path, code: str, **more: str) -> subprocess.CompletedProcess:
    """Run code in a folder, with no other way to this project than what the folder holds."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    folder.mkdir(exist_ok=True)
    return subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


# --- The cell


def test_every_notebook_has_the_same_folded_line_first():
    cells = [json.loads(path.read_text())["cells"] for path in NOTEBOOKS]
    first = [next(cell for cell in found if cell["cell_type"] == "code") for found in cells]
    assert {"".join(cell["source"]) for cell in first} == {setup_cell()}
    assert setup_cell().count("\n") == 0
    assert all(cell["outputs"] == [] and cell["metadata"] == FOLDED for cell in first)


def test_anywhere_else_it_does_nothing(bare, tmp_path):
    """In an environment without any package, in the notebooks' folder alone."""
    folder = tmp_path / "notebooks"
    left_out = shutil.ignore_patterns("*.ipynb", "reference", "__pycache__")
    shutil.copytree(REPO / "notebooks", folder, ignore=left_out)
    before = sorted(folder.iterdir())
    done = run_cell(bare, folder, f"{setup_cell()}\nimport sys; print('helpers' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_the_second_time_it_finds_everything_and_says_nothing(bare, tmp_path, repository):
    content, ready = tmp_path / "content", "from helpers.tools import environment; from pathlib import Path\n"
    ready += "import sys; environment.write_stamp(Path(sys.prefix), environment.detect_platform())"
    content.mkdir()
    subprocess.run(["git", "clone", "-q", repository, content / "tutorial"], check=True)
    assert run_cell(bare, content / "tutorial", ready).returncode == 0
    where = "\nimport os, sys; print(os.getcwd(), sys.path.count(os.path.dirname(os.getcwd())))\n"
    notebooks = content / "tutorial/notebooks"
    done = run_cell(bare, notebooks, (setup_cell() + where) * 2, COLAB_RELEASE_TAG="release")
    assert (done.stdout, done.stderr) == (f"{notebooks} 1\n" * 2, "")


def test_no_file_knows_an_address_of_this_repository(repository):
    address = r"(github|gitlab|bitbucket)[.][a-z]+/|colab[.]research"
    listed = ["git", "grep", "-nE", address, "--", "*.ipynb", "*.md"]
    done = subprocess.run(listed, cwd=repository, capture_output=True, text=True)
    assert done.stdout == ""


# --- What it keeps, replaces and asks for


def test_its_front_end_and_what_it_pins_stay(tmp_path):
    put_google_colab(tmp_path)
    for name in ("ipykernel-6.17.1", "pandas-2.2.2", "numpy-2.0.2", "jupyter_client-7.4.9", "torch-2.8.0"):
        (tmp_path / f"{name}.dist-info").mkdir()
    kept = environment.kept(tmp_path)
    assert kept == {"ipykernel", "pandas", "jupyter-client"}
    shorter = environment.lock_without(environment.lock_of("cpu"), kept, tmp_path).read_text().splitlines()
    names = [line.partition("==")[0] for line in shorter if line[:1].isalnum()]
    whole = [
        line.partition("==")[0]
        for line in environment.lock_of("cpu").read_text().splitlines()
        if line[:1].isalnum()
    ]
    assert [name for name in whole if name not in names] == sorted(kept)


def test_a_kernel_older_than_its_packages_is_told_to_restart_until_it_is(monkeypatch):
    current = iter([False, True, True])
    monkeypatch.setattr(environment, "is_current", lambda *_: next(current))
    monkeypatch.setattr(embedded, "ready", lambda: True)
    monkeypatch.setattr(install, "setup", lambda *_, **__: None)
    monkeypatch.setattr(colab, "_outdated", False)
    for _ in range(2):
        with pytest.raises(SystemExit, match="Restart the runtime now"):
            colab.prepare()
    colab._outdated = False  # as in the next kernel
    colab.prepare()


# --- All of it, in kernels of such an environment


def kernel_of(python: Path, content: Path) -> Kernel:
    """A notebook's kernel in an environment of Colab's shape."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return Kernel(python, cwd=str(content), env=env | {"PATH": f"{python.parent}:{env['PATH']}"})


def run(kernel: Kernel, code: str) -> tuple[str, str]:
    """What the code printed, and the error it ended with."""
    said, error = kernel.run(code, timeout_s=400)
    return said, error and f"{error}: {kernel.reason}"


def run_notebook(kernel: Kernel, path: Path, **parameters) -> None:
    """Run all cells after the set-up cell, with other parameters."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells[1:]:
        code = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            code = "\n".join([code, *(f"{name} = {value!r}" for name, value in parameters.items())])
        said, error = run(kernel, code)
        assert not error, f"{path.name}: {error}\n{code}\n{said}"


def installed(python: Path) -> dict[str, str]:
    uv = Path(sys.prefix) / "bin/uv"
    done = subprocess.run(
        [uv, "pip", "list", "-q", "--format", "json", "--python", python], capture_output=True
    )
    return {found["name"]: found["version"] for found in json.loads(done.stdout)}


def colabs_python() -> str:
    """Python 3.12, as in Colab, if that and torch's CPU build for it can be had; else this version."""
    uv, python = Path(sys.prefix) / "bin/uv", find_python("3.12")
    torch = re.search(r"^torch==\S+", environment.lock_of("cpu").read_text(), re.MULTILINE)[0]
    ask = [uv, "pip", "install", "-q", "--dry-run", "--no-deps", torch, "--python", python or ""]
    ask += ["--find-links", links] if (links := os.environ.get("PIP_FIND_LINKS")) else []
    for more in ([], ["--torch-backend", "cpu"]):
        if python and subprocess.run([*ask, *more], capture_output=True).returncode == 0:
            return python
    return sys._base_executable


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fresh_runtime_from_the_first_cell_to_measured_results(tmp_path, repository):
    usr, content = tmp_path / "usr", tmp_path / "content"
    content.mkdir()
    subprocess.run([colabs_python(), "-m", "venv", "--without-pip", usr], check=True)
    python = usr / "bin/python"
    sources = os.environ.get("PIP_FIND_LINKS")
    install_older = [Path(sys.prefix) / "bin/uv", "pip", "install", "-q", "--python", python, *PREINSTALLED]
    subprocess.run([*install_older, *(["--find-links", sources] if sources else [])], check=True)
    subprocess.run([*install_older[:6], "--no-deps", "torchvision"], check=True)  # beside torch, on Colab
    put_google_colab(next((usr / "lib").glob("python3.*")) / "site-packages")
    before, cell = installed(python), setup_cell()
    first = "\n".join(fetch(f"'file://{repository}'"))
    kernel = kernel_of(python, content)
    try:
        run(kernel, "import os; os.environ['COLAB_RELEASE_TAG'] = 'release'")
        assert "No module named 'colab'" in run(kernel, cell)[1]
        assert not run(kernel, first)[1]
        said, error = run(kernel, cell)
        after = installed(python)
        assert "Restart the runtime" in error, said
        assert before["numpy"] != after["numpy"]
        assert "torchvision" not in after
        kept = {pin.partition("==")[0] for pin in PINNED} | {"ipywidgets", "jupyter-client", "traitlets"}
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
        assert run(kernel, cell)[1] == error, "an older kernel is told again"

        kernel.restart()
        run(kernel, f"import os; os.environ['COLAB_RELEASE_TAG'] = 'release'\n{first}")
        assert run(kernel, cell) == ("", "")
        assert run(kernel, cell) == ("", ""), "the second time"
        notebooks = content / "tutorial/notebooks"
        run_notebook(kernel, notebooks / "00_start_here.ipynb")
        short = {"batch_sizes": "1", "seconds": 0.3, "quality_tokens": 512, "max_tokens": 8}
        run_notebook(kernel, notebooks / "01_baseline.ipynb", **short)
    finally:
        kernel.close()
        shutil.rmtree(usr)
