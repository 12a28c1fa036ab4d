"""Create the environment from the lock and prepare the embedded model: what ``make setup`` runs.

It runs before anything is installed, with whatever ``python3`` the machine has, so it needs the standard
library only. A stamp in the environment says what it was made from: while that is still true there is
nothing to do, and saying so must be quick, because every ``make`` target asks.

    python3 -m helpers.tools.install --venv .venv --platform auto
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.base.files import ROOT
from helpers.model import embedded
from helpers.tools import environment, steps
from helpers.tools.environment import OWN, STAMP, UV_VERSION
from helpers.tools.steps import SetupError

OLDEST, NEWEST = (3, 11), (3, 13)

# The roots of what the lessons import.
FRONT_END = ("jupyterlab.labapp", "ipykernel.kernelapp", "ipywidgets", "papermill", "pytest", "nbval")

IMPORTED = (
    *("matplotlib.pyplot", "openai", "fastapi", "sympy", "gguf"),
    *("vllm.entrypoints.llm", "vllm.entrypoints.openai.api_server"),
    *("vllm.v1.engine.core", "vllm.v1.worker.gpu_worker", "vllm.model_executor.models.llama"),
    "llmcompressor.modifiers.awq",
)


def main(argv: list[str] | None = None) -> int:
    """Bring the environment up to date; return the exit status."""
    parser = argparse.ArgumentParser("python3 -m helpers.tools.install", description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=".venv", help="environment to make, or one there is (conda's too)")
    parser.add_argument("--platform", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(argv)
    # make's SIGTERM must end the children as Ctrl+C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        platform = environment.detect_platform() if options.platform == "auto" else options.platform
        setup(options.venv, platform)
    except (SetupError, OSError) as error:
        print(f"Set-up stopped. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up interrupted. Run it again: it goes on from what is done.", file=sys.stderr)
        return 130
    return 0


def setup(venv: str, platform: str, hosted: bool = False) -> None:
    """Make ``venv`` what the lock of ``platform`` says, and prepare the embedded model.

    In a ``hosted`` notebook's environment (``colab``) what shows the notebook stays as it is, and what would
    break vLLM is removed: its machine is thrown away afterwards.

    Raises:
        SetupError: an unsupported system or Python, a folder that is no environment, a failed step.
    """
    if not venv.strip():
        raise SetupError("--venv is empty. If it is $CONDA_PREFIX, activate the conda environment first.")
    folder = Path(venv).absolute()
    if environment.is_current(folder, platform) and embedded.ready():
        return
    if sys.platform != "linux":
        raise SetupError("vLLM is built for Linux. On Windows use WSL2, on a Mac a Linux container or Colab.")
    if not environment.python_of(folder).exists():  # said before anything is written, the lock file included
        check_python(sys.version_info, sys.executable)
    # Where it is set, Python would not write the bytecode that this set-up is to leave behind.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with environment.only_one(folder):
        if not environment.is_current(folder, platform):  # another run may have finished it meanwhile
            install(folder, platform, hosted)
        elif not embedded.ready():
            steps.run("embedded model", prepare_command(folder)).must()


def install(venv: Path, platform: str, hosted: bool = False) -> None:
    """All steps in order, a line for each; the stamp comes after them, so a killed run is repeated."""
    begun = time.perf_counter()
    lock = environment.lock_of(platform)
    print(f"Setting up {venv} for {platform} from {lock.name} (once, a minute or two).", flush=True)
    (environment.root_of(venv) / STAMP).unlink(missing_ok=True)
    make_venv(venv)
    python, packages = check_environment(venv)
    if clashing := environment.clashes(venv, platform, packages):
        if not hosted:
            raise SetupError(
                f"{venv} already has {', '.join(clashing)}, which cannot be beside vLLM's {platform} build. "
                "Use a fresh environment, or remove them first: "
                f"{environment.python_of(venv)} -m pip uninstall {' '.join(clashing)}"
            )
        uninstall = [environment.python_of(venv), "-m", "pip", "uninstall", "--quiet", "--yes", *clashing]
        steps.run(f"without {', '.join(clashing)}", uninstall).must()
    get_uv(venv)
    with tempfile.TemporaryDirectory() as scratch:
        if hosted:
            lock = environment.lock_without(lock, environment.kept(packages), Path(scratch))
        install_lock(venv, platform, lock, packages)
    install_project(venv)
    with steps.started("embedded model", prepare_command(venv)) as prepared:  # each keeps one core busy
        import_once(venv, hosted)
        environment.write_stamp(venv, platform)
        prepared().must()  # looked for at every set-up: if only it failed, only it is repeated
    seconds = time.perf_counter() - begun
    print(f"Ready in {seconds:.0f} s: {venv}, Python {python}, {platform}.", flush=True)


# --- The steps ------------------------------------------------------------------------------------


def check_python(version: tuple[int, ...], whose: str) -> None:
    """Refuse a Python for which the lock has no packages.

    Raises:
        SetupError: naming the versions that work and how to choose one.
    """
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise SetupError(
            f"{whose} is Python {version[0]}.{version[1]}; the packages need 3.11, 3.12 or 3.13. "
            "Name one with `make setup PYTHON=python3.12`, or use conda (environment.yml)."
        )


def make_venv(venv: Path) -> None:
    """Create the virtual environment if it is missing, or if a killed run left half of it.

    Raises:
        SetupError: an unsupported Python, or a folder with something else.
    """
    if environment.is_foreign(venv) or (
        environment.python_of(venv).exists() and environment.uv_of(venv).exists()
    ):
        return
    check_python(sys.version_info, sys.executable)
    if venv.exists():
        if not (venv / OWN).exists() and any(venv.iterdir()):
            raise SetupError(f"{venv} is no Python environment. Remove it, or name another: VENV=...")
        shutil.rmtree(venv)
    # Before Python's own files: what is found half-made is known to be ours, and made anew.
    venv.mkdir(parents=True)
    (venv / OWN).write_text("made by helpers/tools/install.py, which keeps it exactly as the lock says\n")
    made = steps.run("virtual environment", [sys.executable, "-m", "venv", venv])
    made.must("Debian and Ubuntu have it in a package of its own: `apt install python3-venv`.")


def check_environment(venv: Path) -> tuple[str, Path]:
    """Ask the environment's own Python for its version and its package folder; return both.

    Raises:
        SetupError: an unsupported version, or an interpreter that does not run.
    """
    question = "import sys, sysconfig as s; print(*sys.version_info[:2], s.get_path('purelib'), sep='\\n')"
    done = subprocess.run([environment.python_of(venv), "-I", "-c", question], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(
            f"{environment.python_of(venv)} does not run: {steps.tail(done.stderr)}\n"
            f"Remove {venv} and run it again."
        )
    major, minor, packages = done.stdout.splitlines()
    check_python((int(major), int(minor)), str(venv))
    return f"{major}.{minor}", Path(packages)


def get_uv(venv: Path) -> None:
    """Have the pinned uv in the environment: it installs these packages several times faster than pip."""
    if environment.uv_is_right(venv):
        return
    if subprocess.run([environment.python_of(venv), "-c", "import pip"], capture_output=True).returncode:
        # Environments made by uv or a minimal conda have no pip.
        steps.run("pip", [environment.python_of(venv), "-m", "ensurepip"]).must()
    pip = [environment.python_of(venv), "-m", "pip", "install", "--quiet", f"uv=={UV_VERSION}"]
    steps.run(f"uv {UV_VERSION}", pip).must()


def install_lock(venv: Path, platform: str, lock: Path, packages: Path) -> None:
    """Install the lock as it is, without resolving it again; torch's CPU build, if need be, from its project.

    In an environment of our own by ``sync``, which also removes what the lock no longer has (pip and uv
    stay). Somebody else's keeps what is in it.

    Raises:
        SetupError: with uv's last words.
    """
    uv, python = environment.uv_of(venv), environment.python_of(venv)
    asked = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    verb = ["install", "--no-deps", "-r"] if environment.is_foreign(venv) else ["sync"]
    command = [uv, "pip", *verb, lock, "--python", python]
    pip = environment.pip_configuration(asked.stdout)  # uv does not read it
    for place in pip.get("find-links", "").split():
        command += ["--find-links", place]
    if "index-url" in pip:
        command += ["--default-index", pip["index-url"]]
    if platform == "cuda":
        # After a set-up for the CPU: to uv that build of torch, 2.13.0+cpu, is the 2.13.0 of the lock.
        for build in sorted(packages.glob("torch*-*+cpu.dist-info")):
            command += ["--reinstall-package", build.name.partition("-")[0]]
    if certificates := pip.get("cert"):
        os.environ.setdefault("SSL_CERT_FILE", certificates)  # of a proxy, say: uv has another name for it
    done = steps.run(f"packages of {lock.name}", command)
    torch_is_missing = "No solution found" in done.output and re.search(r"\btorch==", done.output)
    if platform == "cpu" and done.returncode and torch_is_missing:
        # PyPI does not have the CPU build; the option makes uv look at the PyTorch project's own wheels.
        print("torch's CPU build is in no configured source; looking at the PyTorch project's.", flush=True)
        done = steps.run("packages, torch from its project", [*command, "--torch-backend", "cpu"])
        if done.returncode:
            raise SetupError(
                "torch's CPU build is neither in pip's configured sources nor at the PyTorch project's:\n"
                f"{steps.tail(done.output)}\nIf that cannot be reached from here, put the wheel for this "
                "Python in a folder and name it: `PIP_FIND_LINKS=/that/folder make setup`."
            )
    done.must("Check the network and the disk, then run it again: what is downloaded is kept.")


def install_project(venv: Path) -> None:
    """Make ``helpers`` importable from this checkout; setuptools is in the lock, so nothing is fetched."""
    editable = ["pip", "install", "--no-deps", "--no-build-isolation", "--editable", ROOT]
    uv, python = environment.uv_of(venv), environment.python_of(venv)
    steps.run("this project", [uv, *editable, "--python", python]).must()


def import_once(venv: Path, hosted: bool = False) -> None:
    """Import once what the lessons import, which leaves compiled bytecode.

    Without bytecode each import of vLLM takes twice as long wherever Python may not write it. Only a
    third of the installed source is ever imported, so compiling all of it (uv's --compile-bytecode,
    compileall) takes longer. It also shows here and now whether vLLM can be imported on this machine.
    """
    importing = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    names = IMPORTED if hosted else (*FRONT_END, *IMPORTED)
    steps.run("first imports, bytecode", [environment.python_of(venv), "-c", importing, *names]).must()


def prepare_command(venv: Path) -> list[str | Path]:
    """What makes the embedded model's files."""
    return [environment.python_of(venv), "-m", "helpers.model.embedded"]


if __name__ == "__main__":
    sys.exit(main())
