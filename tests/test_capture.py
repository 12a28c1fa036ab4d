"""What goes to the log and what the reader sees, down to file descriptors and children."""

import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from helpers.base import processes
from helpers.engine.logfile import PHASES, LogFile, starting


def test_prints_descriptors_children_and_loggers_all_go_to_the_file(tmp_path, capfd):
    handler = logging.StreamHandler(sys.stdout)
    logger = logging.getLogger("chatty-library")
    logger.addHandler(handler)
    log = LogFile(tmp_path / "deep" / "engine.log")
    with log.capturing():
        print("a print")
        os.write(2, b"a descriptor\n")
        subprocess.run(["echo", "a child"], check=True)
    log.follow("chatty-library")
    logger.warning("a later line")
    log.close()
    logger.warning("after the end")
    print("the reader's own")
    said = capfd.readouterr()
    assert said.out == "the reader's own\n"
    assert said.err == ""
    text = log.path.read_text()
    for part in ("a print", "a descriptor", "a child", "a later line"):
        assert part in text
    assert "after the end" not in text
    logger.removeHandler(handler)


def test_output_comes_back_when_the_block_fails(tmp_path, capfd):
    log = LogFile(tmp_path / "engine.log")
    try:
        with log.capturing():
            raise ValueError
    except ValueError:
        print("seen")
    assert capfd.readouterr().out == "seen\n"


def test_the_bar_follows_the_log_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(processes, "watched", lambda: True)
    file = tmp_path / "engine.log"
    with starting(file):
        for marker, _ in PHASES[:3]:
            with file.open("a") as log:
                log.write(f"INFO {marker} ...\n")
            time.sleep(0.5)
    said = capfd.readouterr().err
    for _, label in PHASES[:3]:
        assert label in said
    assert PHASES[3][1] not in said
    assert said.rstrip(" \r") == "" or said.endswith("\r")


def test_nobody_watches_a_headless_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TUTORIAL_HEADLESS", "1")
    with starting(tmp_path / "engine.log"):
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


class InterruptedAtOnce(subprocess.Popen):
    """Gets Ctrl+C while it is made, once the child runs."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)


def test_an_interrupt_while_a_child_is_started_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", InterruptedAtOnce)
    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt):
        processes.run_logged(["sleep", "60"], tmp_path / "log", os.environ, lambda: (0, 1, ""))
    assert set(psutil.Process().children()) == before
