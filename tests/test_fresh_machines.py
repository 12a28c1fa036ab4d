"""The README's first command on machines that have nothing yet, then again with the network cut.

Each case starts from a copy of the repository in a folder of its own, with an empty environment (no caches,
no configuration of a user). Needs root, for another user, for another Debian and for cutting the network.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.base import machine
from tests.scratch import copy_repository, find_python

USER = "stranger"
SHORT = "batch_sizes: '1'\nseconds: 0.3\nquality_tokens: 512\nmax_tokens: 8\n"
# A new network has a loopback device that is down; kernels and engines talk through it.
LOOPBACK_UP = (
    "import fcntl, socket, struct; "
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14s', b'lo', 0x41, b''))"
)
MOUNTS = 'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && mount --rbind /sys "$0/sys"'
# The set-up's message where the PyTorch project's wheels cannot be reached: no fault of the machine tried.
NO_TORCH = "torch's CPU build is neither in pip's configured sources"
# What this machine's own packages come from, if that is not the public index.
SOURCES = ("/etc/pip.conf", "/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt")


@dataclass(frozen=True)
class Case:
    """A kind of machine: its Python, its user, whether there is a HOME, and a Debian release of its own."""

    name: str
    python: str = ""  # a version, found here
    user: str = "root"
    home: bool = True
    debian: str = ""

    def lacks(self) -> str:
        """Why this case cannot be had here, or nothing."""
        if os.geteuid():
            return "needs root"
        if self.debian and not shutil.which("debootstrap"):
            return "needs debootstrap"
        return "" if self.debian or find_python(self.python) else f"no Python {self.python} here"


CASES = (
    Case("Python 3.11, no HOME, a path with a space", "3.11", home=False),
    Case("Python 3.11, another user without root", "3.11", user=USER),
    Case("Python 3.12", "3.12"),
    Case("Python 3.13, a new Debian 13 without HOME", debian="trixie", home=False),
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fresh_machine_runs_the_first_notebooks_with_and_without_a_network(case):
    if lacking := case.lacks():
        pytest.skip(lacking)
    with tempfile.TemporaryDirectory(prefix="fresh-") as folder:  # pytest's are closed to other users
        base = Path(folder)
        root = new_debian(case.debian, base / "debian") if case.debian else Path("/")
        clone = root / base.relative_to("/") / "a clone" if case.debian else base / "a clone"
        copy_repository(clone)
        (clone / "short.yaml").write_text(SHORT)
        with a_user(case.user, base):
            for cut in (False, True):
                done = subprocess.run(command(case, root, clone, cut), capture_output=True, text=True)
                if done.returncode and NO_TORCH in done.stdout + done.stderr:
                    pytest.skip("no source reached from here has torch's CPU build for this Python")
                assert done.returncode == 0, f"network cut: {cut}\n{(done.stdout + done.stderr)[-3000:]}"


@contextlib.contextmanager
def a_user(name: str, base: Path) -> Iterator[None]:
    """Have a user who owns ``base``; one who was made for this is removed afterwards."""
    if name == "root":
        yield
        return
    made = subprocess.run(["useradd", "--create-home", name], capture_output=True).returncode == 0
    subprocess.run(["chown", "-R", name, base], check=True)
    base.chmod(0o755)
    try:
        yield
    finally:
        if made:
            subprocess.run(["userdel", "--remove", name], capture_output=True)


def command(case: Case, root: Path, folder: Path, cut: bool) -> list[str | Path]:
    """`make run` as the case's user sees it: in an environment with next to nothing in it."""
    inside = Path("/") / folder.relative_to(root)
    python = "python3" if case.debian else find_python(case.python)
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PIP_NO_CACHE_DIR": "1"}
    env |= {
        k: v for k, v in os.environ.items() if k in ("PIP_FIND_LINKS", "PIP_CERT") or k.endswith("_proxy")
    }
    if case.home:
        env["HOME"] = f"/home/{case.user}" if case.user != "root" else str(inside.parent / "home")
    make = ["make", "-C", inside, "run", f"PYTHON={python}", "PARAMETERS=short.yaml"]
    make = ["env", "-i", *(f"{k}={v}" for k, v in env.items()), *make, "NOTEBOOKS=00_start_here 01_baseline"]
    if case.user != "root":
        make = ["runuser", "-u", case.user, "--", *make]
    if case.debian:
        # In mounts of its own: whatever happens, none of them is left on this machine.
        make = ["unshare", "--mount", "sh", "-c", f'{MOUNTS} && exec chroot "$@"', root, root, *make]
    if cut:
        up = ["sh", "-c", f'{sys.executable} -c "$0" && exec "$@"', LOOPBACK_UP]
        make = ["unshare", "--net", *up, *make]
    return make


def new_debian(release: str, root: Path) -> Path:
    """A Debian with the four packages of the README and nothing else; returns its root folder."""
    if not (root / "usr/bin/make").exists():
        packages = "--include=python3,python3-venv,make,git,ca-certificates"
        install = ["debootstrap", "--variant=minbase", packages, release, root]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    for name in filter(os.path.exists, SOURCES):
        shutil.copy(name, root / name.lstrip("/"))
    for place in filter(os.path.isdir, os.environ.get("PIP_FIND_LINKS", "").split()):
        shutil.copytree(place, root / place.lstrip("/"), dirs_exist_ok=True)
    return root


WITHOUT_A_COMPILER = """
import sys
from helpers.engine.engine import open_engine
from helpers.measure.speed import measure_speed

engine = open_engine(log_dir=sys.argv[1], max_model_len=512)

with engine:
    print(measure_speed(engine, [1], seconds=0.1)[0].output_tokens_per_s > 0)
    from vllm import SamplingParams

    print(len(engine.llm.generate("One", SamplingParams(max_tokens=4, top_k=5, seed=1))))
"""


@pytest.mark.slow
@pytest.mark.skipif(machine.detect().kind != "cpu", reason="on a GPU an engine compiles")
def test_an_engine_on_a_cpu_needs_no_compiler(tmp_path):
    env = os.environ | {"CXX": "/no/compiler", "CC": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env.pop("TORCHDYNAMO_DISABLE", None)
    command = [sys.executable, "-c", WITHOUT_A_COMPILER, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["True", "1"], done.stderr[-3000:]
