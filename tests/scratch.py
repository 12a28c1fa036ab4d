"""The repository as a stranger gets it: its files copied elsewhere and committed, nothing made here."""

import shutil
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def files() -> list[str]:
    """Every file of the repository, also one that is not committed yet, but nothing that git ignores."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True)
    return sorted(name for name in set(done.stdout.split("\0")) if name and (REPO / name).is_file())


def find_python(version: str) -> str | None:
    """A Python of this version that runs (pyenv puts names on PATH that do not), or None."""
    found = [
        shutil.which(f"/usr/bin/python{version}"),
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for python in filter(None, found):
        question = [python, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        if subprocess.run(question, capture_output=True, text=True).stdout.strip() == version:
            return python
    return None


def copy_repository(folder: Path) -> Path:
    """Copy the repository into ``folder``, as one commit on the branch main; return the folder."""
    for name in files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, folder / name)
    who = ["-c", "user.name=Stranger", "-c", "user.email=stranger@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*who, "commit", "-qm", "As it is"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder
