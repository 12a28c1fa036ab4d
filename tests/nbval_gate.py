"""A pytest plugin beside nbval: count what it really compared, and fail when that is too little.

nbval silently passes a code cell that was stored without having been run, so a notebook stripped of
its outputs is green with nothing checked. This counts the comparisons as they happen.

    pytest --nbval --nbval-current-env -p tests.nbval_gate notebooks
"""

from collections import Counter, defaultdict

from nbval.plugin import IPyNbCell

MOST_IGNORED = 0.15  # of the cells that have output

_tally: dict[str, Counter] = defaultdict(Counter)


def _kind(item) -> str:
    """``unrun``, ``ignored``, ``silent`` (stored without output) or ``compared``, from the stored cell."""
    cell, options = item.cell, item.options
    if cell.execution_count is None:
        return "unrun"
    if options["skip"] or not options["check"]:
        return "ignored"
    return "compared" if cell.outputs else "silent"


def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, IPyNbCell):
            _tally[item.parent.path.name][_kind(item)] += 1


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed and ".ipynb::Cell " in report.nodeid:
        _tally[report.nodeid.split("::")[0].rsplit("/", 1)[-1]]["passed"] += 1


def problems() -> list[str]:
    """What is wrong with the tally, a sentence each."""
    found = []
    for name, count in sorted(_tally.items()):
        shown = count["compared"] + count["ignored"]
        if count["unrun"]:
            found.append(f"{name}: {count['unrun']} code cells are stored without having been run.")
        if not count["compared"]:
            found.append(f"{name}: no output is compared at all.")
        elif count["ignored"] / shown > MOST_IGNORED:
            found.append(
                f"{name}: {count['ignored']} of {shown} outputs are ignored, over {MOST_IGNORED:.0%}."
            )
    return found


def pytest_sessionfinish(session):
    if problems() and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    if not _tally:
        return
    terminalreporter.section("what nbval compared")
    for name, count in sorted(_tally.items()):
        terminalreporter.line(
            f"{name}: {count['compared']} outputs compared, {count['silent']} cells without output, "
            f"{count['ignored']} ignored, {count['unrun']} unrun; {count['passed']} cells passed"
        )
    for problem in problems():
        terminalreporter.line(f"FAILED {problem}", red=True)
