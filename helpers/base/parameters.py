"""Check a notebook's parameters before anything is loaded.

papermill does not check types (``-p max_tokens abc`` runs), and a wrong value that is only noticed
after a minute of loading is a minute lost.
"""

from __future__ import annotations


class ParameterError(ValueError):
    """A parameter that cannot be used; the message names it, its value and what is allowed."""


def whole(name: str, value: object, low: int, high: int) -> int:
    """Return ``value`` if it is a whole number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ParameterError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
    return value


def number(name: str, value: object, low: float, high: float) -> float:
    """Return ``value`` if it is a number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ParameterError(f"{name} must be a number from {low} to {high}, not {value!r}.")
    return float(value)


def text(name: str, value: object) -> str:
    """Return ``value`` if it is a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ParameterError(f"{name} must be a text that is not empty, not {value!r}.")
    return value


def whole_list(name: str, value: object, low: int, high: int) -> list[int]:
    """Return ``[1, 8, 32]`` from that list or from ``"1,8,32"``, as papermill's -p passes it."""
    try:
        parts = value.split(",") if isinstance(value, str) else list(value)
        numbers = [part if isinstance(part, int) else int(str(part)) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or any(isinstance(n, bool) or not low <= n <= high for n in numbers):
        raise ParameterError(
            f"{name} must be whole numbers from {low} to {high}, such as '1,8,32', not {value!r}."
        )
    return numbers


def engine(tensor_parallel_size: object, quick_look: object) -> dict:
    """Return ``vllm.LLM`` arguments of a notebook's two parameters; none where both are as they come.

    ``quick_look`` starts an engine without compiling it and without CUDA graphs: in a quarter of the time on
    a GPU, at a fraction of the speed for few requests. Engines on a CPU are always started so.
    """
    count = whole("tensor_parallel_size", tensor_parallel_size, 1, 64)
    if not isinstance(quick_look, bool):
        raise ParameterError(f"quick_look must be True or False, not {quick_look!r}.")
    return ({"tensor_parallel_size": count} if count > 1 else {}) | (
        {"enforce_eager": True} if quick_look else {}
    )
