"""A folder that is made once and kept: under its name only when complete, made anew when it is damaged.

Safe against a second run at the same time (it waits), against being killed at any point, against a full
disk, and against files that change later: their checksums are kept beside their sizes. Needs the standard
library only, since the set-up asks here whether the embedded model is ready.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
MANIFEST = "manifest.json"


def made(folder: Path, make: Callable[[Path, Path], dict]) -> Path:
    """Return ``folder``; unless it is there, complete and undamaged, let ``make`` make it first.

    Args:
        make: called with a folder to create and fill, and a scratch folder around it for what is only
            needed meanwhile; returns what the manifest is to say besides the files' sizes and checksums.

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
            files = sorted(path for path in new.iterdir() if path.is_file())
            sizes = {path.name: path.stat().st_size for path in files}
            hashes = {path.name: _sha256(path) for path in files}
            manifest = facts | {"sizes": sizes, "hashes": hashes}
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1))
            if folder.exists():  # a damaged one, since it was not complete
                folder.rename(old)
            new.rename(folder)
            _note(folder, _states(folder, sizes))
    return folder


def _sweep(folder: Path) -> None:
    """Remove what killed runs left. Nobody makes the folder: it is complete, or we hold the lock."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def complete(folder: Path) -> bool:
    """Whether a folder of ``made`` is there, its files as they were written. Cheap: see ``_unchanged``."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes, hashes = manifest["sizes"], manifest["hashes"]
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return False
        return _unchanged(folder, hashes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def doubt(folder: Path) -> None:
    """Have the checksums computed again the next time: what is in the folder did not work."""
    with contextlib.suppress(OSError):
        _beside(folder).unlink(missing_ok=True)


def _unchanged(folder: Path, hashes: Mapping[str, str]) -> bool:
    """Whether the folder's files have these SHA-256.

    They are read only if a size, inode or time of change differs from what was noted the last time. Every
    program that writes to a file sets that time, and so does whoever copies it elsewhere.
    """
    state = _states(folder, hashes)
    if _noted(_beside(folder)) == state:
        return True
    if any(_sha256(folder / name) != digest for name, digest in hashes.items()):
        return False
    _note(folder, state)
    return True


@contextlib.contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it when the process ends, however it ends.

    ``waiting`` is what is said before waiting for another process that holds it.

    Raises:
        BlockingIOError: another holds it, and there was nothing to say: then nobody waits.
    """
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                raise
            print(waiting, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.seen")


def _states(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size, inode and time of change of each file."""
    stats = {name: (folder / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_ino, stat.st_ctime_ns] for name, stat in stats.items()}


def _noted(note: Path) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(note.read_text())
    return None


def _note(folder: Path, state: dict) -> None:
    """Remember that the checksums were right; a cache that cannot be written has no memory."""
    with contextlib.suppress(OSError):
        write_whole(_beside(folder), json.dumps(state))


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
