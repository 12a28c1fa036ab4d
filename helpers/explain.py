"""What a log says: ``python -m helpers.explain FILE``, or ``kubectl logs ... | python -m helpers.explain -``.

Any log, from anywhere, as it came: behind a container's name, a cluster's time, colours. Nothing of vLLM is
imported. ``--json`` prints name, what, evidence, do and read; the name is "unknown" where it is not known.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from helpers.faults.explain import explain
from helpers.faults.report import Report

WHERE = (
    "docker compose logs vllm, docker logs NAME",
    "kubectl logs --previous POD      # of the container that ended",
    "journalctl -u vllm; or the terminal that the server was started in",
)
EMPTY = Report("unknown", "There is nothing to read: the log is empty.", "the log is empty", WHERE)


def main(arguments: list[str] | None = None) -> int:
    """Explain one log; 2 where there is none, 0 otherwise."""
    about = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser("python -m helpers.explain", description=about)
    parser.add_argument("file", nargs="?", default="-", help="a log; - or none: standard input")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    if options.file == "-" and sys.stdin.isatty():
        parser.error("give a log's FILE, or pipe it in. Where it is:\n  " + "\n  ".join(WHERE))
    try:
        data = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
    except OSError as error:
        parser.error(f"{options.file} cannot be read: {error.strerror}")
    text = data.decode("utf-8", errors="replace")
    report = explain(log=text) if text.strip() else EMPTY
    facts = {name: getattr(report, name) for name in ("name", "what", "evidence", "do", "read")}
    print(json.dumps(facts, indent=1, ensure_ascii=False) if options.json else report)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    raise SystemExit(main())
