"""The catalogue of failures: catalogue.toml, checked when it is read, and the look-up in it."""

import functools
import re
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from helpers.faults import conditions
from helpers.faults.conditions import Seen

FILE = Path(__file__).with_name("catalogue.toml")
TIERS = ("", "general", "last")
TRIED = 20  # matches of one pattern that are asked about


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

    @functools.cached_property
    def patterns(self) -> list[re.Pattern]:
        return [re.compile(text, re.MULTILINE) for text in self.match]

    def facts(self, found: dict[str, str], seen: Seen) -> dict[str, str] | None:
        """What the entry's sentences are filled in with, or None where it is not the diagnosis."""
        if not self.by:
            return found
        name, *arguments = self.by.split(":")
        facts = getattr(conditions, name)(found, seen, *arguments)
        return None if facts is None else found | facts


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The catalogue, in its order: what is special before what is general."""
    content = tomllib.loads(FILE.read_text(encoding="utf-8"))
    places = content["places"]
    return tuple(
        Entry(**fault | {"read": places.get(fault["read"], fault["read"])}) for fault in content["fault"]
    )


class Hit(NamedTuple):
    """An entry that explains a failure, with its sentences filled in, and the number of its line."""

    entry: Entry
    what: str
    do: tuple[str, ...]
    evidence: str
    line: int


def lookup(lines: list[str], known: Seen) -> Hit | None:
    """Return what explains lines: of what matches the most special, earliest among them."""
    seen = replace(known, text="\n".join(lines))
    for tier in TIERS:
        asked = [entry for entry in entries() if entry.tier == tier]
        asked = [one for one in asked if not one.where or re.search(one.where, seen.where + seen.text)]
        hits = [hit for one in asked for pattern in one.patterns if (hit := _first(one, pattern, seen))]
        if hits:
            return min(hits, key=lambda hit: hit.line)
    return None


def _first(entry: Entry, pattern: re.Pattern, seen: Seen) -> Hit | None:
    for match in islice(pattern.finditer(seen.text), TRIED):
        found = {key: value for key, value in match.groupdict().items() if value is not None}
        here = replace(seen, start=match.start())
        if (facts := entry.facts(found, here)) is not None:
            facts = defaultdict(lambda: "(not said)", facts)
            steps = [step.format_map(facts).strip() for step in entry.do]
            line = seen.text.count("\n", 0, match.start())
            return Hit(entry, entry.what.format_map(facts), tuple(filter(None, steps)), here.line, line)
    return None
