"""What every test shares: no live progress bars, and one folder for logs a test."""

import os
import signal

import pytest

os.environ["TUTORIAL_HEADLESS"] = "1"
# A shell's background job starts with Ctrl+C ignored; the tests of interrupts need it as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A small cache and context: the tests ask little, and every engine reserves its cache anew.
SMALL = {"max_model_len": 512, "kv_cache_memory_bytes": 256 * 2**20}


@pytest.fixture
def small(tmp_path):
    """Arguments of ``open_engine`` for a quick engine whose log goes to the test's own folder."""
    return {**SMALL, "log_dir": tmp_path / "logs"}
