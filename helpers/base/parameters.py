"""Check a notebook's parameters before anything is loaded.

papermill does not check types (``-p max_tokens abc`` runs), and a wrong value that is only noticed
after a minute of loading is a minute lost.
"""


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
    """Return ``[1, 8, 32]`` from that list or from ``"1,8,32"``, and ``[8]`` from 8, as a -p passes them."""
    try:
        numbers = [int(part) for part in str(value).strip("[]()").split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(low <= n <= high for n in numbers):
        raise ParameterError(
            f"{name} must be whole numbers from {low} to {high}, such as '1,8,32', not {value!r}."
        )
    return numbers


def yes_or_no(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise ParameterError(f"{name} must be True or False, not {value!r}.")
    return value


# What a lesson's parameters may be: by what checks them and by name the bounds of a number, or of each number
# of a list; texts, and what is True or False, have none.
LIMITS = {
    whole: {
        "max_tokens": (1, 1024), "prompt_tokens": (1, 1024),
        "quality_tokens": (512, 65536), "context": (1, 10_000_000),
        "users": (1, 100_000), "gpus": (1, 8), "requests": (1, 100_000), "input_tokens": (4, 512),
        "output_tokens": (2, 512), "tokens_per_request": (1, 10_000_000), "long_context": (1024, 2**20),
        "small_cache_mib": (1, 1024), "waiting": (1, 1000), "most": (10, 10_000), "rows": (1, 100_000),
        "tensor_parallel_size": (1, 64),
    },
    number: {
        "seconds": (0.1, 600), "price_per_day": (0.01, 1e6), "l4_price_per_day": (0.01, 1e6),
        "a100_price_per_day": (0.01, 1e6), "utilization": (0.001, 1), "requests_per_second": (0.001, 1e6),
        "longest_tpot_ms": (0.1, 1e6), "least_recovery": (0, 1), "open_seconds": (1, 600),
        "ttft_ms": (1, 600_000), "tpot_ms": (1, 600_000), "interrupt_after": (0.1, 60),
    },
    whole_list: {"batch_sizes": (1, 1024), "levels": (1, 1024), "shares": (1, 400)},
    yes_or_no: {"short": (), "quick_look": ()},
    text: {"model": (), "question": (), "out_dir": (), "gpu": (), "goal": ()},
}  # fmt: skip


def checked(name: str, value: object) -> int | float | str | list[int]:
    """Return a lesson's parameter if it is what its name may be.

    Raises:
        ParameterError: it is not, or no lesson has such a parameter.
    """
    for check, bounds in LIMITS.items():
        if name in bounds:
            return check(name, value, *bounds[name])
    raise ParameterError(f"There is no parameter {name!r} of a lesson: see helpers/base/parameters.py.")
