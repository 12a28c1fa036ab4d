"""One scheme, tried whole: started, asked, timed, weighed, compared with the baseline, released, recorded.

The steps are those that ``01_baseline`` shows one by one; every scheme goes through the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from helpers import hardware, measure, models, quality, records, schemes
from helpers.checkpoints import CheckpointError
from helpers.engine import Engine, EngineDiedError, EngineStartError, open_engine


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
    **llm_args,
) -> Trial:
    """Try a scheme against a baseline's reference; append its records to ``out/records.jsonl``.

    ``llm_args`` are further arguments of ``vllm.LLM``, here and below.

    Raises:
        SchemeError, CheckpointError, EngineError, QualityError: the scheme does not run here, and why.
    """
    with open_engine(model, scheme, log_dir=out / "logs", **llm_args) as engine:
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


def baseline(
    model: models.Model,
    *,
    batch_sizes: list[int],
    seconds: float,
    quality_tokens: int,
    out: Path,
    **llm_args,
) -> quality.Reference:
    """Measure the baseline, append its records, and keep the reference that every scheme is compared with."""
    with open_engine(model, "baseline", log_dir=out / "logs", **llm_args) as engine:
        speeds = measure.speed(engine, batch_sizes, seconds=seconds)
        memory = measure.memory(engine)
        reference = quality.keep_reference(engine, out / "reference", quality_tokens)
    predicted = schemes.predicted_weights_bytes("baseline", model.folder)
    perplexity = reference.perplexity
    rows = records.rows(engine, speeds, memory, predicted_weights_bytes=predicted, perplexity=perplexity)
    records.append(out / "records.jsonl", rows)
    return reference


def complete(
    model: models.Model,
    names: Iterable[str],
    *,
    question: str,
    batch_sizes: list[int],
    seconds: float,
    quality_tokens: int,
    out: Path,
    **llm_args,
) -> tuple[list[dict], list[str]]:
    """Return this machine's records of a model under each scheme, measuring those that are missing.

    The second list are sentences: lines that could not be read, records of something else, schemes that
    do not run here. With all records in place this takes no engine and no time.
    """
    machine, file = hardware.detect(), out / "records.jsonl"
    rows, notes = records.of(records.read(file)[0], model.title, machine)
    have = {row["scheme"] for row in rows}
    missing = [name for name in names if name not in have]
    same = {"batch_sizes": batch_sizes, "seconds": seconds, "out": out, **llm_args}
    if "baseline" in missing:
        baseline(model, quality_tokens=quality_tokens, **same)
        missing.remove("baseline")
    reference = None
    for name in missing:
        try:
            schemes.scheme(name).way(machine)
            reference = reference or quality.reference_of(
                model, out / "reference", quality_tokens, log_dir=out / "logs", **llm_args
            )
            run(model, name, reference, question=question, **same)
        except (schemes.SchemeError, CheckpointError, EngineStartError, EngineDiedError) as error:
            notes.append(f"{name} is not measured here: {error}")
    good, bad = records.read(file)
    return records.of(good, model.title, machine)[0], bad + notes
