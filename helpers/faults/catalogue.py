"""The catalogue of failures: catalogue.toml, checked when it is read, and the look-up in it."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from helpers.faults import conditions
from helpers.faults.conditions import Seen

FILE = Path(__file__).with_name("catalogue.toml")
TIERS = {"": 0, "general": 1, "last": 2}


@dataclass(frozen=True)
class Entry:
    """One kind of failure; catalogue.toml explains the fields."""

    name: str
    what: str
    match: Sequence[str]
    do: Sequence[str]
    read: str
    seen: str
    memory: bool = False
    where: str = ""
    by: str = ""
    tier: str = ""
    patterns: tuple[re.Pattern, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self):
        object.__setattr__(self, "patterns", tuple(re.compile(text, re.MULTILINE) for text in self.match))
        if self.by:
            getattr(conditions, self.by.partition(":")[0])
        TIERS[self.tier]

    def facts(self, found: dict[str, str], seen: Seen) -> dict[str, str] | None:
        """What the entry's sentences are filled in with, or None where it is not the diagnosis."""
        if not self.by:
            return found
        name, *arguments = self.by.split(":")
        facts = getattr(conditions, name)(found, seen, *arguments)
        return None if facts is None else found | facts


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return the catalogue, what is special before what is general.

    Raises:
        ValueError: an entry has a field that there is not, lacks one, or a pattern or a name that is none.
    """
    content = tomllib.loads(FILE.read_text(encoding="utf-8"))
    found = []
    for table in content["fault"]:
        try:
            found.append(Entry(**table | {"read": content["places"].get(table["read"], table["read"])}))
        except (TypeError, KeyError, AttributeError, re.error) as error:
            raise ValueError(f"{FILE.name}, {table.get('name', table)}: {error}") from None
    return tuple(found)


class Facts(dict):
    """Facts for ``str.format_map``: what a message did not say reads as such."""

    def __missing__(self, key: str) -> str:
        return "(not said)"


@dataclass(frozen=True)
class Hit:
    """An entry that explains a failure, with its sentences filled in."""

    entry: Entry
    what: str
    do: tuple[str, ...]
    evidence: str


def lookup(seen: Seen) -> Hit | None:
    """Return what explains ``seen.text``: of what matches the most special, earliest in the text."""
    best: tuple | None = None
    for order, entry in enumerate(entries()):
        tier = TIERS[entry.tier]
        if best and tier > best[0][0]:
            continue
        if entry.where and not re.search(entry.where, seen.where + seen.text):
            continue
        for pattern in entry.patterns:
            if hit := _first(entry, pattern, seen):
                match, facts = hit
                rank = (tier, seen.text.count("\n", 0, match.start()), order)
                if best is None or rank < best[0]:
                    best = (rank, entry, facts, replace(seen, start=match.start()).line)
    if best is None:
        return None
    _, entry, found, line = best
    facts = Facts(found)
    steps = (step.format_map(facts).strip() for step in entry.do)
    return Hit(entry, entry.what.format_map(facts), tuple(step for step in steps if step), line)


def _first(entry: Entry, pattern: re.Pattern, seen: Seen) -> tuple[re.Match, dict] | None:
    for number, match in enumerate(pattern.finditer(seen.text)):
        found = {key: value for key, value in match.groupdict().items() if value is not None}
        facts = entry.facts(found, replace(seen, start=match.start()))
        if facts is not None:
            return match, facts
        if number == 20:
            return None
    return None
