"""What one command or lesson needs beside the environment, in a lock of its own.

- ``scale``: vllm-router and Ray, for the lesson on several servers; 99 MB.
- ``evaluate``: lm-eval, for ``make evaluate``; 101 MB.
- ``book``: Sphinx and its theme, for ``make book``; 66 MB.

They are no part of the platforms' locks: no other lesson needs them. What does installs them when they are
first needed, in seconds, and changes nothing that is there.
"""

import importlib
import subprocess
import sys

from helpers.tools.environment import lock_of
from helpers.tools.steps import SetupError, tail


def ensure(group: str) -> None:
    """Install what is missing, without a word: a lesson's output is the same the first time.

    Raises:
        SetupError: with pip's last words.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r"]
    done = subprocess.run([*command, lock_of(group)], capture_output=True, text=True)
    if done.returncode:
        advice = "Without a network, put their wheels into a folder and name it: PIP_FIND_LINKS=/that/folder."
        raise SetupError(f"Installing {lock_of(group).name} failed:\n{tail(done.stderr)}\n{advice}")
    importlib.invalidate_caches()


if __name__ == "__main__":
    ensure(sys.argv[1])
