"""Where in a log the errors stand, drawn: the first is the cause, those after it pass it on."""

import re
import textwrap

from helpers.base.figure import Figure, panels
from helpers.faults import log as logs

CAUSE, ECHO = "#D55E00", "#595959"


def errors(log: str) -> Figure:
    """Draw a log from its first line to its last, with each line that names an exception at its place."""
    lines, found = log.splitlines(), {}
    for line in logs.error_lines(log):
        if "Error: " in line:  # the same words once more, from another process, are the same error
            number = next(n for n, one in enumerate(lines, 1) if line.strip() in one)
            found.setdefault(line[re.search(r"\w+Error: ", line).start() :].strip(), number)
    last = re.sub(r"^\S+ +\| *", "", lines[-1]).strip()  # without the container's name
    marks = [*found.items(), (f"the last line: {last}", len(lines))]
    figure, [[axes]] = panels(size=(8, 0.9 + 0.62 * len(marks)))
    axes.hlines(0, 1, len(lines), color=ECHO, linewidth=6)
    for place, (text, number) in enumerate(marks):
        height = place or -1  # the cause above the log, the others below: no stem runs through its text
        colour, weight = (ECHO, "normal") if place else (CAUSE, "bold")
        axes.plot([number], [height], "o", color=colour, markersize=5 if place else 9)
        axes.vlines(number, 0, height, color=colour, linewidth=1 if place else 2)
        side, end = (8, "left") if number < len(lines) / 2 else (-8, "right")
        shown = "\n".join(textwrap.wrap(f"{number}: {text}", 58, max_lines=1 if place else 3))
        axes.annotate(
            shown, (number, height), (side, 0), textcoords="offset points", ha=end, va="center",
            weight=weight, fontsize="small", bbox={"color": "white", "pad": 1}, zorder=3,
        )  # fmt: skip
    axes.set(xlim=(0, len(lines) + 1), ylim=(len(marks) - 0.3, -1.6), xlabel="line of the log", yticks=[])
    axes.spines[["left", "right", "top"]].set_visible(False)
    words = "; ".join(f"line {number}, {text}" for text, number in marks)
    return Figure(figure, f"A log of {len(lines)} lines, its errors at their places. {words}.")
