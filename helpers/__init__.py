"""The helpers behind the notebooks, in eight rooms; each imports only those below it.

tools > compare > serve, measure > engine > model > faults > base

Importing this package imports neither torch nor vLLM: they come with the first engine.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


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
