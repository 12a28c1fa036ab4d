"""How schemes run on a machine, in words."""

from collections.abc import Iterable

from helpers.base.machine import Machine
from helpers.model import schemes
from helpers.model.schemes import SCHEMES, SchemeError, Way


def expanded(row: dict) -> bool:
    """Whether a record's weights ran written out: its answers are the scheme's, bytes and speed are not."""
    known = SCHEMES[row["scheme"]].ways if row["scheme"] in SCHEMES else ()
    return any(way.expanded for way in known if way.name == row.get("way"))


def ways(machine: Machine, names: Iterable[str]) -> dict[str, Way]:
    """Return how the machine runs each scheme, by title; one it does not run is named so, with the reason."""
    found = {}
    for scheme in map(schemes.scheme, names):
        try:
            found[scheme.title] = scheme.way(machine)
        except SchemeError:
            found[scheme.title] = Way("does not run here", lambda machine: False, scheme.lacks)
    return found
