"""The root cause, found in logs as vLLM 0.32 writes them."""

import pytest

from helpers.diagnose import root_cause, short

CHILD = """\
(EngineCore pid=99) INFO 11-23 18:00:00 [core.py:133] Initializing a V1 LLM engine (v0.32.0)
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402] EngineCore failed to start.
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402] Traceback (most recent call last):
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402]   File "gpu_worker.py", line 1, in init_device
(EngineCore pid=99) ERROR 11-23 18:00:01 [core.py:1402] ValueError: Free memory (11.81/139.8 GiB) is less
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_cause_in_the_childs_words_and_not_the_echo():
    assert root_cause(CHILD) == "ValueError: Free memory (11.81/139.8 GiB) is less"


@pytest.mark.parametrize("log", ["", "INFO all is well", "the word Error: in a sentence"])
def test_a_log_without_an_error_has_no_cause(log):
    assert root_cause(log) is None


def test_an_exceptions_module_is_left_out():
    assert (
        root_cause("torch.OutOfMemoryError: CUDA out of memory.") == "OutOfMemoryError: CUDA out of memory."
    )


def test_pydantics_frame_around_a_message_is_left_out():
    error = ValueError("1 validation error for X\\n  Value error, too long [type=value_error, input_value=1]")
    assert short(error) == "ValueError: too long"
