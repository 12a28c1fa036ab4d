"""What a lesson's first line does in Colab: bring the runtime's packages up to the lock, once.

It runs in the notebook's own kernel, so it needs the standard library only, and it has to think of what
that kernel has imported already: a package that was replaced under its feet is the one reason for a restart.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import distributions
from pathlib import Path

from helpers.model import embedded
from helpers.tools import environment, install
from helpers.tools.steps import SetupError

RESTART = (
    "Restart the runtime now (Runtime, Restart session), then run the cell with git clone and this one again."
)

_outdated: list[str] = []  # imported in this kernel, and replaced since


def prepare() -> None:
    """Install what is missing and say what changed; where nothing is missing, nothing at all.

    Raises:
        SystemExit: the set-up failed, or this kernel has imported a package that was replaced.
    """
    here, platform = Path(sys.prefix), environment.detect_platform()
    if not (environment.is_current(here, platform) and embedded.ready()):
        before, imported = versions(), in_use()
        try:
            install.setup(str(here), platform, hosted=True)
        except SetupError as error:
            raise SystemExit(f"The set-up did not finish. {error}") from None
        importlib.invalidate_caches()
        after = versions()
        print(changes(before, after))
        _outdated[:] = sorted(name for name in imported if after.get(name) != before[name])
    if _outdated:
        raise SystemExit(f"This notebook had already imported {', '.join(_outdated)}. {RESTART}")


def versions() -> dict[str, str]:
    """Every installed package and its version."""
    return {_name(found): found.version for found in distributions()}


def in_use() -> set[str]:
    """The installed packages of which this kernel has imported a file."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    used = set()
    for found in distributions():
        place = str(found.locate_file(""))  # texts, not paths: there are a hundred thousand of them
        listed = (line.split(",")[0] for line in (found.read_text("RECORD") or "").splitlines())
        if any(f"{place}/{path}" in files for path in listed):
            used.add(_name(found))
    return used


def changes(before: dict[str, str], after: dict[str, str]) -> str:
    """Say which packages were replaced or removed, and how many were added."""
    replaced = [
        f"{name} {old} -> {after.get(name, 'removed')}"
        for name, old in sorted(before.items())
        if after.get(name) != old
    ]
    added = len(after.keys() - before.keys())
    return f"Added {added} packages. Replaced {len(replaced)}: {', '.join(replaced) or 'none'}."


def _name(found) -> str:
    return found.metadata["Name"].lower().replace("_", "-")
