"""The helpers behind the notebooks, in eight rooms; each imports only those below it.

tools > compare > serve, measure > engine > model > faults > base

Importing this package imports neither torch nor vLLM: they come with the first engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module

# Threads of torch on a CPU spin while they wait for each other. Where something else ran on one of their
# cores, this made engines up to 25 times as slow. With a shorter spin they are half as fast there, and an
# eighth slower where nothing else runs. OpenMP reads it when torch is loaded; a value of yours stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def face(room: str, modules: dict[str, str]) -> tuple[Callable[[str], object], list[str]]:
    """A room's public names, each imported from its module when it is first asked for (PEP 562).

    Args:
        room: the package's own name.
        modules: for each of its modules the names that it gives, with spaces between them.

    Returns:
        What the package calls ``__getattr__`` and ``__all__``.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{homes[name]}"), name)

    return get, sorted(homes)
