"""The README's first command on machines that have nothing yet, then again with the network cut.

    python -m tests.fresh_machines            every case that can be had here, as a table
    python -m tests.fresh_machines debian     the cases with this word in their name

Each case starts from a copy of the repository in a folder of its own, with an empty environment (no caches,
no configuration of a user). Needs root, for another user, for another Debian and for cutting the network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Step:
    """One command of a case, and how it went."""

    case: str
    what: str
    seconds: float
    code: int
    output: str

    @property
    def result(self) -> str:
        """ok, failed, or what kept this case from being tried here."""
        if self.code and NO_TORCH in self.output:
            return "not tried: no source reached from here has torch's CPU build for this Python"
        return "failed" if self.code else "ok"


def run_case(case: Case, base: Path) -> list[Step]:
    """Set up and run 00 and 01 on a fresh machine, then once more without a network; stop at a failure."""
    root = new_debian(case.debian, base / "debian") if case.debian else Path("/")
    folder = root / base.relative_to("/") / "a clone" if case.debian else base / "a clone"
    copy_repository(folder)
    (folder / "short.yaml").write_text(SHORT)
    steps = []
    with a_user(case.user, base):
        for what, cut in (("make run", False), ("make run, network cut", True)):
            begun = time.monotonic()
            done = subprocess.run(command(case, root, folder, cut), capture_output=True, text=True)
            seconds = time.monotonic() - begun
            steps.append(Step(case.name, what, seconds, done.returncode, done.stdout + done.stderr))
            if done.returncode:
                break
    return steps


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


def main(words: list[str]) -> int:
    """Run the cases and print them as a table; the exit code says whether all went well."""
    rows = []
    for case in CASES:
        if not all(word.lower() in case.name.lower() for word in words):
            continue
        if lacking := case.lacks():
            rows.append(f"| {case.name} | | skipped: {lacking} | |")
            continue
        with tempfile.TemporaryDirectory(prefix="fresh-") as base:
            for step in run_case(case, Path(base)):
                rows.append(f"| {step.case} | {step.what} | {step.result} | {step.seconds:.0f} |")
                print(rows[-1], flush=True)
                if step.result == "failed":
                    print(step.output[-3000:])
    print("\n| case | command | result | s |\n|---|---|---|---|", *rows, sep="\n")
    return int(any("| failed |" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
