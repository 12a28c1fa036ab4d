"""A folder made once: killed at every point, two at once, cut short later, no room left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.base import files
from helpers.base.files import MANIFEST, ROOT

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 5000, "tokenizer.json": b"[]"}


def fill(folder: Path, scratch: Path) -> dict:
    (scratch / "download").write_bytes(b"only needed meanwhile")
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return {"source": "test"}


def never(folder: Path, scratch: Path) -> dict:
    pytest.fail("it was made again")


def right(folder: Path) -> bool:
    return all((folder / name).read_bytes() == content for name, content in FILES.items())


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "model"


def test_it_is_made_once_and_says_what_it_is(folder):
    assert files.made(folder, fill) == files.made(folder, never) == folder
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["source"] == "test"
    assert manifest["sizes"] == {name: len(content) for name, content in FILES.items()}
    assert {path.name for path in folder.parent.iterdir()} == {"model", "model.lock"}


def killed_at(number: int, folder: Path) -> bool:
    """Make the folder in a process that is killed at its n-th step; whether it was killed at all.

    A step is whatever Python reports to an audit hook: opening, renaming, removing, making a folder.
    """
    pid = os.fork()
    if pid == 0:
        left = number

        def step(event: str, _) -> None:
            nonlocal left
            if event.split(".")[0] in ("open", "os", "shutil", "fcntl", "tempfile"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(step)
        files.made(folder, fill)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_killed_at_any_point_it_is_whole_or_not_there_and_the_next_run_repairs(folder, before):
    points = 0
    for number in range(1, 500):
        if before == "damaged":
            files.made(folder, fill)
            (folder / "model.safetensors").write_bytes(b"x" * 4999)
        killed = killed_at(number, folder)
        if files.complete(folder):
            assert right(folder), f"half a model passed for a whole one after step {number}"
        files.made(folder, fill)
        assert right(folder)
        left = {path.name for path in folder.parent.iterdir()} - {"model", "model.lock"}
        assert not [name for name in left if "partial" in name], f"step {number} left {left}"
        if not killed:
            break
        points += 1
        if before == "nothing":
            subprocess.run(["rm", "-r", folder], check=True)
    assert points > 20, "it was hardly killed anywhere"


def test_a_full_disk_loses_nothing(folder):
    def full(new: Path, scratch: Path) -> dict:
        fill(new, scratch)
        (new / "more").symlink_to("/dev/full")  # where the kernel answers every write: no space left
        (new / "more").write_bytes(b"x")
        return {}

    files.made(folder, fill)
    (folder / "config.json").write_text("")
    with pytest.raises(OSError, match="No space left on device"):
        files.made(folder, full)
    assert (folder / "config.json").read_text() == ""  # what was there is untouched, and still known as bad
    assert not files.complete(folder)
    assert not list(folder.parent.glob("*.partial-*"))


SLOW_MAKER = """
import sys, time
from pathlib import Path
from helpers.base import files
def make(folder, scratch):
    print("making", flush=True); time.sleep(float(sys.argv[2])); folder.mkdir()
    (folder / "made_by").write_text(sys.argv[3]); return {}
files.made(Path(sys.argv[1]), make)
print("done", flush=True)
"""


def maker(folder: Path, seconds: float, name: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW_MAKER, str(folder), str(seconds), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_second_run_waits_and_takes_over_when_the_first_is_killed(folder):
    first = maker(folder, 30, "first")
    assert first.stdout.readline() == "making\n"
    second = maker(folder, 0, "second")
    assert second.stdout.readline() == "Another run is preparing model; waiting for it.\n"
    time.sleep(0.2)
    assert not folder.exists()
    first.kill()
    assert second.communicate(timeout=20)[0] == "making\ndone\n"
    assert (folder / "made_by").read_text() == "second"
    assert first.wait() == -signal.SIGKILL


@pytest.mark.parametrize("content", ["", "[]", '{"sizes": 1}', '{"sizes": {"a": 1}}', "null"])
def test_a_manifest_that_is_none_means_not_complete(folder, content):
    files.made(folder, fill)
    (folder / MANIFEST).write_text(content)
    assert not files.complete(folder)
    files.made(folder, fill)
    assert files.complete(folder)
