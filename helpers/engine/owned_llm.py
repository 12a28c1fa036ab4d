"""``vllm.LLM`` as a ``with open_engine(...)`` block gives it; what is not named here is vLLM's own."""

import contextlib
import functools
import gc
import time

from helpers.base import interrupts
from helpers.engine import release


@functools.cache
def owned_class() -> type:
    """The class of the ``llm`` in a block: ``vllm.LLM``, guarded, without progress bars unless asked."""
    from vllm import LLM

    class OwnedLLM(LLM):
        def generate(self, prompts, sampling_params=None, *, use_tqdm=False, **more):
            if prompts is None or isinstance(prompts, int | float | bytes):
                raise TypeError(f"prompts must be a text, or a list of texts, not {prompts!r}.")
            with self.engine.guarded():
                if not _only_ids(prompts):
                    self.engine.model.check_words()
                return super().generate(prompts, sampling_params, use_tqdm=use_tqdm, **more)

        def chat(self, messages, sampling_params=None, use_tqdm=False, **more):
            with self.engine.guarded():
                self.engine.model.check_words()
                return super().chat(messages, sampling_params, use_tqdm, **more)

    return OwnedLLM


def _only_ids(prompts) -> bool:
    """Whether prompts are token ids, which a model without weights can be given, too."""
    several = prompts if isinstance(prompts, list) else [prompts]
    return all(isinstance(one, dict) and "prompt_token_ids" in one for one in several)


@contextlib.contextmanager
def uncollected():
    """No garbage collection by Python inside, as in ``timeit``.

    With vLLM imported there are 600,000 objects to go through, which stops this process for half a second:
    more than a run on a fast GPU takes, and a seventh of the import. vLLM's server and its engine's process
    are kept from it as well.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def import_vllm() -> float:
    """Import vLLM (8 s with compiled bytecode, 20 s without); return the seconds it took.

    Two fifths of it are torch, its compiler included, a fifth transformers, a tenth vLLM's own modules and
    the rest a hundred small ones: there is no part to leave out.

    Ctrl+C waits for the import: torch cannot be imported again in a process where it was cut short.
    """
    begun = time.perf_counter()
    release.one_heap()
    with interrupts.interrupts_deferred(), uncollected():
        import vllm
        import vllm.entrypoints.llm
        import vllm.v1.engine.core
        import vllm.v1.worker.worker_base  # noqa: F401  imported here, they do not count as start
    return time.perf_counter() - begun
