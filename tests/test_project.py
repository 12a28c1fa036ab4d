"""What surrounds the lessons: workflow, hooks, container, one version everywhere, others' licences."""

import json
import re
import shlex
import subprocess
import sys
import tomllib

import jsonschema
import pytest
import yaml

from helpers.model import embedded, shapes
from helpers.model.model import TITLE
from helpers.tools import install
from tests import ci
from tests.scratch import REPO, copy_repository, files

PYTHONS = [f"3.{minor}" for minor in range(install.OLDEST[1], install.NEWEST[1] + 1)]


def text(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


WORKFLOW = yaml.load(text(".github/workflows/ci.yml"), yaml.BaseLoader)  # `on` is a key, not True
STEPS = WORKFLOW["jobs"]["test"]["steps"]


# --- The workflow, the hooks, the container


def test_the_workflow_is_one_by_githubs_schema():
    schema = json.loads(text("tests/schemas/github-workflow.json"))
    workflow = yaml.safe_load(text(".github/workflows/ci.yml").replace("\non:", '\n"on":'))
    jsonschema.validate(workflow, schema)
    workflow["jobs"]["test"]["step"] = workflow["jobs"]["test"].pop("steps")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(workflow, schema)


def test_the_workflow_runs_what_ci_runs_on_every_python_and_keeps_what_it_made():
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert [step["run"].split()[0] for step in STEPS if "make test" in step.get("name", "")] == [".ci/run"]
    (kept,) = [step["with"]["path"].split() for step in STEPS if "upload" in step.get("uses", "")]
    assert {ci.EXECUTED.relative_to(REPO).as_posix(), "build/short", "build/ci.log"} <= set(kept)
    (cached,) = [step["with"] for step in STEPS if "/cache@" in step.get("uses", "")]
    assert {".venv", "~/.cache/quantized-deployment"} == set(cached["path"].split())


def test_the_table_of_times_is_found_in_what_ci_prints(capsys):
    assert ci.finish(lambda run: None) == 0
    shown = next(step["run"] for step in STEPS if "sed" in step.get("run", ""))
    pattern = re.search(r"sed -n '/(.+?)/,", shown)[1]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.fullmatch(pattern.strip("^$"), line)]


def test_the_hook_strips_a_notebook_to_what_the_runner_stores(tmp_path):
    stored = REPO / "notebooks/00_start_here.ipynb"
    notebook = json.loads(stored.read_text(encoding="utf-8"))
    notebook["metadata"] |= {"widgets": {"state": {}}, "papermill": {}}
    notebook["metadata"]["language_info"] |= {"version": "3.11.7", "nbconvert_exporter": "python"}
    for cell in notebook["cells"]:
        cell["metadata"] |= {"execution": {"iopub.status.busy": "x"}, "editable": True, "scrolled": True}
    noisy = tmp_path / stored.name
    noisy.write_text(json.dumps(notebook), encoding="utf-8")
    (hooks,) = [repo["hooks"] for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]]
    (entry,) = [hook["entry"] for hook in hooks if hook["id"] == "strip-notebooks"]
    subprocess.run([sys.executable, *shlex.split(entry)[1:], noisy], check=True)
    assert noisy.read_text(encoding="utf-8") == stored.read_text(encoding="utf-8")


def test_the_container_has_a_python_that_the_set_up_takes():
    container = json.loads(text(".devcontainer/devcontainer.json"))
    assert re.search(r"python:(3\.\d+)", container["image"])[1] in PYTHONS
    assert re.search(rf"^{container['postCreateCommand'].removeprefix('make ')}:", text("Makefile"), re.M)


# --- What is left


def test_clean_leaves_nothing_that_was_made_and_no_environment_of_somebody_else(tmp_path):
    folder, conda = copy_repository(tmp_path / "a clone"), tmp_path / "conda"
    (conda / "bin").mkdir(parents=True)
    made = [
        ".venv/quantized-deployment.own",
        ".venv.lock",
        "runs/latest/x",
        "build/executed/x",
        ".ruff_cache/x",
    ]
    made += ["helpers/__pycache__/x", "notebooks/.ipynb_checkpoints/x", "quantized_deployment.egg-info/x"]
    for name in made:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for options in ([], [f"VENV={conda}"]):
        done = subprocess.run(["make", "clean", *options], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "conda was not made here and stays." in done.stdout
    assert (conda / "bin").exists()
    status = ["git", "status", "--porcelain", "--ignored"]
    assert subprocess.run(status, cwd=folder, capture_output=True, text=True).stdout == ""


# --- One version, and whose work it is


def test_version_changes_and_citation_agree():
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == version
    assert re.search(r"^## (\S+)$", text("CHANGELOG.md"), re.M)[1] == version


# Data that this project made: what it measured, wrote or drew. All other data has a line in NOTICE.md.
OWN = re.compile(
    r"helpers/(faults/|measure/lm_eval_tasks/)|notebooks/(book|deploy|parameters|pictures)/|notebooks/server\.log"
    r"|notebooks/reference/(cpu-epyc|h200)/|tests/(kinds|logs)/|tests/(look\.js|marked_texts\.yaml|nbval_.*\.cfg)"
)


def unnamed(tracked: list[str], notice: str) -> list[str]:
    """Data files that are neither this project's own nor named."""
    data = [name for name in tracked if name.startswith(("helpers/", "tests/", "notebooks/"))]
    data = [name for name in data if not name.endswith((".py", ".md", ".ipynb")) and not OWN.match(name)]
    return [name for name in data if f"`{name}`" not in notice]


def test_what_is_by_others_is_named_with_its_licence():
    notice = text("NOTICE.md")
    assert unnamed(files(), notice) == []
    assert unnamed([*files(), "tests/schemas/another.json"], notice) == ["tests/schemas/another.json"]
    for named in re.findall(r"`([\w./-]+/[\w./-]+)`", notice):
        assert (REPO / named).exists(), named
    owners = {hub.partition("/")[0] for hub in shapes.HUB.values()}
    assert {f"`{owner}`" for owner in owners} <= set(re.findall(r"`[\w-]+`", notice))
    assert f"`{embedded.WHEEL.partition('==')[0]}`" in notice
    assert TITLE in notice
