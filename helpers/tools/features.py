"""Speculative decoding, prefix caching and structured output, each on and off, in 16 and fewer bits.

    python -m helpers.tools.reference --out notebooks/reference/my-machine features

On the embedded model, whose weights are real: what is guessed, shared or constrained here is text. One engine
a scheme has the plain runs, the shared prefix and the constrained answers; another one guesses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from helpers.engine.engine import open_engine, owner_of
from helpers.engine.errors import EngineError
from helpers.measure.features import SPECULATIVE, constrained, guessing, sharing
from helpers.model.model import EMBEDDED, ModelError
from helpers.model.schemes import SchemeError
from helpers.tools.deployments import GPU
from helpers.tools.recording import stamp, write

SCHEMES = ("baseline", "int8", "awq")
USERS = (1, 32) if GPU else (1, 8)


def features(out: Path, schemes: Sequence[str] = SCHEMES, users: Sequence[int] = USERS) -> None:
    """Each feature under each scheme, lines as they come; what a scheme refuses has a line that says why."""
    same = {"log_dir": out / "logs", "enable_prefix_caching": True, "disable_log_stats": False}
    if GPU:
        same["compilation_config"] = {"cudagraph_capture_sizes": [1, 8, *range(16, 257, 16)]}
    for scheme, method in itertools.product(schemes, (None, SPECULATIVE)):
        common = stamp() | {"scheme": scheme, "weights": "real"}
        # In a child: once n-gram has imported numba, vLLM's CPU backend starts no engine in that process.
        more = {"speculative_config": method, "in_process": False} if method else {}
        asked = (guessing,) if method else (guessing, sharing, constrained)
        try:
            with open_engine(EMBEDDED, scheme, **same, **more) as llm:
                common |= {"model": owner_of(llm).model.title, "speculative": bool(method)}
                for feature, count in itertools.product(asked, users):
                    for row in feature(llm, count):
                        write(out / "features.jsonl", common | row)
        except (EngineError, SchemeError, ModelError) as error:
            write(out / "features.jsonl", common | {"speculative": bool(method), "error": str(error)[-400:]})
