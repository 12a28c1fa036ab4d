"""One scheme, tried whole: started, timed, weighed, compared with the baseline, released, recorded.

The steps are those that ``01_baseline`` shows one by one; every scheme goes through the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from helpers.base import machine, records
from helpers.base.machine import detect
from helpers.engine.engine import Engine, open_engine
from helpers.engine.errors import EngineDiedError, EngineStartError
from helpers.measure import divergence, speed, task
from helpers.measure.divergence import Perplexity, Quality, Reference
from helpers.measure.memory import Memory, measure_memory
from helpers.measure.speed import Speed
from helpers.measure.task import Recovery
from helpers.model import schemes, sizes
from helpers.model.model import Model, ModelError
from helpers.model.schemes import SchemeError


def as_rows(
    engine: Engine,
    speeds: list[Speed],
    memory: Memory,
    *,
    predicted_weights_bytes: int | None = None,
    perplexity: Perplexity | None = None,
    quality: Quality | None = None,
    recovery: Recovery | None = None,
) -> list[dict]:
    """Return one record a batch size for an engine that was measured and released.

    ``quality`` and ``recovery`` say what a scheme did to the baseline's answers; a record of the baseline
    has none. Of its model's weights the bytes are predicted unless given.

    Raises:
        ValueError: the engine is still open, so its release is not known yet.
    """
    if engine.release is None:
        raise ValueError("Leave the engine's with block first: a record says what the release gave back.")
    read = quality.perplexity if quality else perplexity
    common = {
        "scheme": engine.scheme,
        "model": engine.model.title,
        "weights": "random" if engine.model.shape_only else "real",
        **records.stamp(engine.machine),
        "dtype": engine.args.get("dtype"),
        "weights_bytes": memory.weights,
        "predicted_weights_bytes": predicted_weights_bytes
        or sizes.predicted_weights_bytes(engine.scheme, engine.model.folder),
        "held_weights_bytes": sizes.held_weights_bytes(engine.scheme, engine.model.folder, engine.machine),
        "file_bytes": engine.checkpoint.file_bytes,
        "kv_cache_tokens": memory.kv_cache_tokens,
        "total_bytes": memory.total,
        "start_s": round(engine.start_s, 2),
        "release_s": round(engine.release.seconds, 2),
        "left_mib": round(engine.release.left / machine.MIB, 1),
        "perplexity": read and round(read.value, 4),
        "perplexity_text": read and read.text,
        "perplexity_tokens": read and read.tokens,
        "kernel": "; ".join(engine.kernels) or engine.way.name,
        "way": engine.way.name,
        "isa": sorted(engine.machine.isa),
    }
    if quality:
        names = ("perplexity_ratio", "kl_mean", "kl_p99", "top1")
        common |= {name: round(getattr(quality, name), 6) for name in names}
    if recovery:
        common |= {"recovery": recovery.ratio, "recovery_low": recovery.low, "recovery_high": recovery.high}
    digits = {"batch": 0, "prompt_tokens": 0, "output_tokens_per_s": 2, "low": 2, "high": 2, "ttft_s": 6}
    return [
        common | {name: round(getattr(speed, name), to) for name, to in digits.items()} for speed in speeds
    ]


@dataclass(frozen=True)
class Trial:
    """What one scheme gave."""

    memory: Memory
    divergence: Quality
    recovery: Recovery


def run(
    model: Model,
    scheme: str,
    reference: Reference,
    *,
    batch_sizes: list[int],
    seconds: float,
    out: Path,
    **llm_args,
) -> Trial:
    """Try a scheme against a baseline's reference; append its records to ``out/records.jsonl``.

    ``llm_args`` are further arguments of ``vllm.LLM``, here and below.

    Raises:
        SchemeError, ModelError, EngineError, QualityError: the scheme does not run here, and why.
    """
    engine = open_engine(model, scheme, log_dir=out / "logs", **llm_args)
    with engine:
        speeds = speed.measure_speed(engine, batch_sizes, seconds=seconds)
        memory = measure_memory(engine)
        compared = divergence.compare(engine, reference)
        recovered = task.recovery(reference.answers, task.answer(engine))
    rows = as_rows(engine, speeds, memory, quality=compared, recovery=recovered)
    records.append(out / "records.jsonl", rows)
    return Trial(memory, compared, recovered)


def complete(
    model: Model,
    names: Iterable[str],
    *,
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
    machine, file = detect(), out / "records.jsonl"
    rows, notes = records.of(records.read(file)[0], model.title, machine)
    have = {row["scheme"] for row in rows}
    missing = [name for name in names if name not in have]
    started = {"log_dir": out / "logs", **llm_args}
    asked = {"batch_sizes": batch_sizes, "seconds": seconds, "out": out, **llm_args}
    if "baseline" in missing:
        missing.remove("baseline")
        engine = open_engine(model, "baseline", **started)
        with engine:
            speeds = speed.measure_speed(engine, batch_sizes, seconds=seconds)
            memory = measure_memory(engine)
            reference = divergence.keep_reference(engine, out / "reference", quality_tokens)
        records.append(file, as_rows(engine, speeds, memory, perplexity=reference.perplexity))
    for name in missing:
        try:
            schemes.scheme(name).way(machine)
            # Made once, then as it is kept.
            reference = divergence.reference_of(model, out / "reference", quality_tokens, **started)
            run(model, name, reference, **asked)
        except (SchemeError, ModelError, EngineStartError, EngineDiedError) as error:
            notes.append(f"{name} is not measured here: {error}")
    good, bad = records.read(file)
    return records.of(good, model.title, machine)[0], bad + notes
