"""One scheme, tried whole: started, asked, timed, weighed, compared with the baseline, released, recorded.

The steps are those that ``01_baseline`` shows one by one; every scheme goes through the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers import measure, models, quality, records, schemes
from helpers.engine import Engine, open_engine


@dataclass(frozen=True)
class Trial:
    """What one scheme gave. ``engine`` is released: its figures and log are there, the model is gone."""

    engine: Engine
    reply: object  # vLLM's RequestOutput to the question
    memory: measure.Memory
    quality: quality.Quality
    recovery: quality.Recovery
    rows: list[dict]


def run(
    model: models.Model,
    scheme: str,
    reference: quality.Reference,
    *,
    question: str,
    max_tokens: int = 40,
    batch_sizes: list[int],
    seconds: float,
    out: Path,
) -> Trial:
    """Try a scheme against a baseline's reference; append its records to ``out/records.jsonl``.

    Raises:
        SchemeError, CheckpointError, EngineError, QualityError: the scheme does not run here, and why.
    """
    with open_engine(model, scheme, log_dir=out / "logs") as engine:
        reply = engine.ask(question, max_tokens)
        speeds = measure.speed(engine, batch_sizes, seconds=seconds)
        memory = measure.memory(engine)
        compared = quality.compare(engine, reference, top_k=(20,))
        recovered = quality.recovery(reference.answers, quality.answer(engine))
    predicted = schemes.predicted_weights_bytes(scheme, model.folder)
    rows = records.rows(
        engine, speeds, memory, predicted_weights_bytes=predicted, quality=compared, recovery=recovered
    )
    records.append(out / "records.jsonl", rows)
    return Trial(engine, reply, memory, compared, recovered, rows)
