"""A folder that is made once and kept: under its name only when complete, made anew when a file is cut short.

Safe against a second run at the same time (it waits), against being killed at any point and against a full
disk. Needs the standard library only, since the set-up asks here whether the embedded model is ready.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
MANIFEST = "manifest.json"


def made(folder: Path, make: Callable[[Path, Path], dict]) -> Path:
    """Return ``folder``; unless it is there and complete, let ``make`` make it first.

    Args:
        make: called with a folder to create and fill, and a scratch folder around it for what is only
            needed meanwhile; returns what the manifest is to say besides the files' sizes.

    Raises:
        OSError: no room, no permission; and whatever ``make`` raises. The name is then as it was before.
    """
    if complete(folder):
        _sweep(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    busy = f"Another run is preparing {folder.name}; waiting for it."
    with locked(folder.with_name(f"{folder.name}.lock"), busy):
        if complete(folder):  # another run made it while this one waited
            return folder
        _sweep(folder)
        # A scratch folder of this run's own: a child of a killed run may still be writing to the last one.
        with tempfile.TemporaryDirectory(
            prefix=f"{folder.name}.partial-", dir=folder.parent, ignore_cleanup_errors=True
        ) as scratch:
            new, old = Path(scratch) / "made", Path(scratch) / "damaged"
            facts = make(new, Path(scratch))
            sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir()) if path.is_file()}
            (new / MANIFEST).write_text(json.dumps(facts | {"sizes": sizes}, indent=1))
            if folder.exists():  # a damaged one, since it was not complete
                folder.rename(old)
            new.rename(folder)
    return folder


def _sweep(folder: Path) -> None:
    """Remove what killed runs left. Nobody makes the folder: it is complete, or we hold the lock."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def complete(folder: Path) -> bool:
    """Whether a folder of ``made`` is there, its files of the sizes that they were written with."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it when the process ends, however it ends.

    ``waiting`` is what is said before waiting for another process that holds it.
    """
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file at once or not at all, with the mode it had, if it was there."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(text.encode())  # its line ends as they are
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
