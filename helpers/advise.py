"""Which quantization for my model on my GPU: ``python -m helpers.advise MODEL --gpu L4 --users 20``."""

import argparse
import gc
import json
import logging
import os
import signal
import sys
import textwrap

from helpers.compare.advise import GOALS, PROMPTS, advise
from helpers.compare.cards import CARDS, FOUR


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(prog="python -m helpers.advise", description=__doc__.split(":")[0])
    found.add_argument("model", help="a folder with a config.json, a hub name, or a shape such as qwen3-8b")
    found.add_argument("--gpu", default="L4", help=f"one of {', '.join(CARDS)}; or {FOUR} (%(default)s)")
    found.add_argument("--gpus", type=int, default=1, help="how many there are (%(default)s)")
    found.add_argument("--context", type=int, default=4096, help="tokens each user holds (%(default)s)")
    found.add_argument("--users", type=int, default=16, help="requests at once (%(default)s)")
    found.add_argument(
        "--prompts", type=float, default=PROMPTS,
        help="tokens of prompt read for each token of an answer; 0 where all are cached (%(default)s)",
    )  # fmt: skip
    found.add_argument("--goal", default="throughput", help=f"{', '.join(GOALS)} (%(default)s)")
    found.add_argument("--price", type=price, help="dollars a GPU and day, such as 10.80, or an hour: 0.45/h")
    found.add_argument("--json", action="store_true", help="for programs")
    return found


def price(text: str) -> float:
    """Dollars a GPU and day, from a number of them or of dollars an hour: ``10.80``, ``0.45/h``."""
    number, hourly = text.removeprefix("$"), text.endswith("/h")
    try:
        return 24 * float(number.removesuffix("/h")) if hourly else float(number)
    except ValueError:
        allowed = "dollars a GPU and day, such as 10.80, or an hour, such as 0.45/h"
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}") from None


def main(arguments: list[str] | None = None) -> int:
    """Print the answer; 2 where there is none, with the reason."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    asked = vars(parser().parse_args(arguments))
    as_json = asked.pop("json")
    if sys.stderr.isatty():
        print(f"Counting {asked['model']} from its config ...", file=sys.stderr)
    try:
        answer = advise(asked.pop("model"), asked.pop("gpu"), **asked)
    except ValueError as error:  # the helpers' errors say what cannot be, and why
        refusal = json.dumps({"refused": str(error)}) if as_json else error
        print(refusal, file=sys.stdout if as_json else sys.stderr)
        return 2
    print(json.dumps(answer.as_json(), indent=1) if as_json else answer)
    if answer.chosen and not as_json:
        print("", "The same in notebooks/deploy/.env, beside your key:", "", sep="\n")
        print(textwrap.indent(answer.environment, "    "))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    logging.disable(logging.WARNING)  # what transformers says of configs is not the answer
    gc.disable()  # nothing of what torch and transformers make as they load is garbage: a fifth of the time
    sys.exit(main())
