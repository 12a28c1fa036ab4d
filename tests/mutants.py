"""Corrupt what a notebook has stored, one place at a time, and see whether nbval notices.

A mutant changes one stored output outside the marks. nbval must then fail the cell that was corrupted and
no other. Every line of every compared output gets mutants of its own: a rule of the sanitizer that
swallows a line, or an output that nobody compares, shows as a survivor.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat.v4 import new_output

from tests import marks

# Cells of which a whole line may be measured, and why. Their number of lines is compared all the same.
WHOLE_LINES = {
    "05dc7b5e": "00: what this machine is, down to which facts there are to tell of it",
}


@dataclass(frozen=True)
class Mutant:
    """A cell's outputs with one place changed; ``operator`` and ``where`` say what and in which line."""

    operator: str
    where: str
    outputs: list


def mutants(outputs: list) -> Iterator[Mutant]:
    """All mutants of one cell's stored outputs."""
    for number, output in enumerate(outputs):
        for mime, text in marks.texts(output).items():
            for operator, where, changed in _changed(text, mime):
                mutated = copy.deepcopy(outputs)
                marks.put(mutated[number], mime, changed)
                yield Mutant(operator, f"output {number}, {mime}, {where}", mutated)
        yield Mutant(
            "lost output", f"output {number}", copy.deepcopy(outputs[:number] + outputs[number + 1 :])
        )
    more = new_output("stream", name="stdout", text="planted\n")
    yield Mutant("added output", f"output {len(outputs)}", [*copy.deepcopy(outputs), more])


def hidden_lines(outputs: list) -> list[str]:
    """The lines of which nothing is compared, because all their words stand inside marks."""
    return [
        line.strip()
        for output in outputs
        for mime, text in marks.texts(output).items()
        for line in marks.lines(text, mime)
        if marks.hidden(line) and not re.search(r"\w", marks.plain(line, mime))
    ]


def _changed(text: str, mime: str) -> Iterator[tuple[str, str, str]]:
    """(operator, where, the changed text), each differing outside the marks."""
    lines = marks.lines(text, mime)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        for operator, new in _of_line(line, mime):
            yield operator, f"line {number}", "".join([*lines[:number], new, *lines[number + 1 :]])
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if following and marks.MARK.sub("", line).strip() != marks.MARK.sub("", following).strip():
            # A last line may lack its line break: then it would only be joined, which is a change, too.
            swapped = [*lines[:number], following, line, *lines[number + 2 :]]
            yield "swapped lines", f"line {number}", "".join(swapped)


def _of_line(line: str, mime: str) -> Iterator[tuple[str, str]]:
    yield "lost line", ""
    yield "repeated line", line + line
    free = _outside(line, mime)
    for operator, kind in (("digit", r"\d"), ("word", r"[^\W\d_]")):
        places = [place for place in free if re.match(kind, line[place])]
        for place in {*places[:1], *places[-1:]}:
            other = str((int(line[place]) + 1) % 10) if operator == "digit" else "q"
            other = "x" if other == line[place] else other
            yield operator, line[:place] + other + line[place + 1 :]
    for match in marks.MARK.finditer(line):
        inside = match["text"] or match["html"]
        if inside:  # a number that lost its mark is compared, and differs on the next machine
            yield "lost mark", line[: match.start()] + inside + line[match.end() :]
            break


def _outside(line: str, mime: str) -> list[int]:
    """Positions of a line outside marks and tags."""
    taken = [match.span() for match in marks.MARK.finditer(line)]
    if mime == "text/html":
        taken += [match.span() for match in marks.TAG.finditer(line)]
    return [place for place in range(len(line)) if not any(a <= place < b for a, b in taken)]
