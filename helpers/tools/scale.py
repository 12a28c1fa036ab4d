"""What the lesson on several servers needs beside the environment: vllm-router and Ray, 99 MB in 4 packages.

They are no part of the platforms' locks: the other lessons need neither. ``make scale``, the lesson and its
tests install them when they are first needed, in seconds, and change nothing that is there.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata

from helpers.base.files import ROOT
from helpers.tools.steps import SetupError, tail

LOCK = ROOT / "requirements-scale.lock"


def missing() -> list[str]:
    """The packages of the lock that this environment lacks, or has in another version."""
    wanted = re.findall(r"^([a-z-]+)==(\S+)", LOCK.read_text(), re.M)
    return [name for name, version in wanted if _installed(name) != version]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ensure() -> None:
    """Install what is missing, without a word: a lesson's output is the same the first time.

    Raises:
        SetupError: with pip's last words.
    """
    if not (names := missing()):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", LOCK]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        advice = "Without a network, put their wheels into a folder and name it: PIP_FIND_LINKS=/that/folder."
        raise SetupError(f"Installing {', '.join(names)} failed:\n{tail(done.stderr)}\n{advice}")
    importlib.invalidate_caches()


if __name__ == "__main__":
    ensure()
