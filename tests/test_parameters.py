"""Parameters: right ones pass unchanged, wrong ones are named before anything is loaded."""

import pytest

from helpers import parameters
from helpers.parameters import ParameterError


@pytest.mark.parametrize("value", ["1,8,32", [1, 8, 32], (1, 8, 32), " 1, 8 ,32 "])
def test_batch_sizes_as_a_list_or_as_papermill_passes_it(value):
    assert parameters.whole_list("batch_sizes", value, 1, 1024) == [1, 8, 32]


@pytest.mark.parametrize("value", ["", "abc", "1,,8", [], [0], [1.5], [True], "0,8", [2000], None, 8, "1;8"])
def test_batch_sizes_that_cannot_be(value):
    with pytest.raises(ParameterError, match="batch_sizes"):
        parameters.whole_list("batch_sizes", value, 1, 1024)


@pytest.mark.parametrize("value", [0, 101, "5", 5.0, True, None])
def test_whole_numbers_that_cannot_be(value):
    assert parameters.whole("max_tokens", 5, 1, 100) == 5
    with pytest.raises(ParameterError, match="max_tokens must be a whole number from 1 to 100"):
        parameters.whole("max_tokens", value, 1, 100)


@pytest.mark.parametrize("value", [-1, 10.1, "5", True, None, float("nan")])
def test_numbers_that_cannot_be(value):
    assert parameters.number("seconds", 5, 0, 10) == 5.0
    with pytest.raises(ParameterError, match="seconds"):
        parameters.number("seconds", value, 0, 10)


@pytest.mark.parametrize("value", ["", "  ", None, 5])
def test_texts_that_cannot_be(value):
    assert parameters.text("question", "Why?") == "Why?"
    with pytest.raises(ParameterError, match="question"):
        parameters.text("question", value)


def test_the_engine_that_two_parameters_ask_for():
    assert parameters.engine(1, False) == {}
    assert parameters.engine(2, True) == {"tensor_parallel_size": 2, "enforce_eager": True}


@pytest.mark.parametrize(("count", "quick"), [(0, False), ("2", False), (True, False), (1, "yes"), (1, 1)])
def test_an_engine_that_cannot_be_asked_for(count, quick):
    with pytest.raises(ParameterError, match=r"tensor_parallel_size|quick_look"):
        parameters.engine(count, quick)
