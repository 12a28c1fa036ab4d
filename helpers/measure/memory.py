"""The bytes an engine's weights and KV cache take."""

from dataclasses import dataclass

from helpers.engine.engine import owner_of


@dataclass(frozen=True)
class Memory:
    """What an open engine takes, in bytes.

    ``weights`` is measured (how, says ``weights_by``), None where it was not; ``kv_cache_tokens`` is
    the cache's size in tokens of all requests together; ``total`` what the engine added to the process, its
    own with it (CPU), or the GPU.
    """

    weights: int | None
    weights_by: str
    kv_cache_tokens: int
    total: int


def measure_memory(llm) -> Memory:
    """Measure an open engine's memory.

    On a GPU the weights are vLLM's own figure, to the byte. On a CPU they are the anonymous memory that
    loading added to this process (None where the engine is a child): summing the tensors would miss what
    oneDNN repacked.
    """
    engine = owner_of(llm)
    total = engine.memory.added()
    if engine.machine.kind == "cuda":
        figures = [figure for figure in engine.llm.collective_rpc("weights_bytes") if figure]
        return Memory(sum(figures) or None, "vLLM", engine.kv_cache_tokens, total)
    return Memory(engine.loading_bytes, "memory of this process", engine.kv_cache_tokens, total)
