"""No code but this project's own is run, no archive leaves its place, no secret is written down."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest

from helpers.base.files import ROOT

PICKLES = ("torch.load", "pickle.load", "pickle.loads")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def sources() -> dict[str, str]:
    """The project's own Python: the helpers, and the code cells of the notebooks."""
    found = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in (ROOT / "helpers").rglob("*.py")
    }
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found[path.name] = re.sub(r"^%%.*$", "", text, flags=re.M)  # what a cell writes is code, too
    return found


def runs_foreign_code(call: ast.Call) -> str:
    """What is wrong with a call: it loads a pickle, runs a model's own code, or unpacks a whole archive."""
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name.rpartition(".")[2] in ("extractall", "unpack_archive") or name in PICKLES:
        return name
    for argument, value in {"trust_remote_code": "True", "allow_pickle": "True", "shell": "True"}.items():
        if given.get(argument) == value:
            return f"{name}({argument}={value})"
    return ""


@pytest.mark.parametrize(
    "code", ["torch.load('x')", "zipfile.ZipFile('x').extractall()", "LLM(x, trust_remote_code=True)"]
)
def test_the_check_finds_what_it_looks_for(code):
    assert runs_foreign_code(ast.parse(code).body[0].value)


def test_nothing_loads_pickles_runs_a_models_code_or_unpacks_whole_archives():
    found = [
        f"{name}: {problem}"
        for name, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and (problem := runs_foreign_code(node))
    ]
    assert not found


def test_no_notebook_holds_a_token_or_a_path_of_a_machine():
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        for trace in ("hf_", "Bearer ", "/root/", "/home/", "/Users/"):
            assert trace not in text, f"{path.name} holds {trace!r}"


PLANTED = {
    "HF_TOKEN": "hf_" + "Zz9" * 11,
    "VLLM_API_KEY": "planted-key-5f1d",
    "MY_PASSWORD": "planted-pass-77",
}


@pytest.mark.slow
def test_a_planted_secret_is_in_nothing_that_a_run_leaves(tmp_path):
    """A whole run of a notebook that measures and of that of failures: copies, logs, records, a bundle."""
    quick = {"seconds": "0.1", "batch_sizes": "1", "quality_tokens": "512", "max_tokens": "5"}
    command = [sys.executable, "-m", "helpers.tools.run", "01_baseline", "08_when_it_fails"]
    command += ["--out", str(tmp_path / "out"), *(part for pair in quick.items() for part in ("-p", *pair))]
    environment = {**os.environ, **PLANTED, "PYTHONPATH": str(ROOT), "TUTORIAL_MODEL": "embedded"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    texts = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with zipfile.ZipFile(tmp_path / "out" / "diagnosis.zip") as bundle:
        texts |= {name: bundle.read(name) for name in bundle.namelist()}
    assert {"08_when_it_fails.ipynb", "facts.json", "baseline-1.log", "records.jsonl"} <= set(texts)
    for secret in PLANTED.values():
        holders = [name for name, text in texts.items() if secret.encode() in text]
        assert not holders
        assert secret not in done.stdout + done.stderr
