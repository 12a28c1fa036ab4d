"""One prefill of a window of text, and the figures of its logits."""

import numpy as np

from helpers.engine.engine import Engine

LONGEST = 1024  # vLLM computes a prompt's logits in pieces of this many positions on a GPU
ALIGNED = 1e-2  # nats; the tap's log-probability of each token against vLLM's own


class QualityError(ValueError):
    """A comparison that would give a wrong number; the message says why and what to do."""


def prefill(engine: Engine, ids: list[int], predicted: int, **job) -> dict[str, list]:
    """Prefill ``ids`` once, alone; return ``figures`` of its first ``predicted`` predictions.

    Asking for prompt_logprobs makes vLLM compute the logits of the whole prompt; with 0 it looks up
    only the tokens that are there, whose log-probabilities prove that the tap saw the right rows.
    """
    llm, length = engine.llm, engine.args["max_model_len"]
    step = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    longest = min(length - 1, step)  # -1: vLLM generates one token more
    if not 4 <= predicted <= LONGEST or len(ids) > longest:
        raise QualityError(
            f"A prompt of {len(ids)} tokens does not go through this engine in one piece: from 5 to "
            f"{min(longest, LONGEST)} do (max_model_len is {length}, a step takes {step} tokens)."
        )
    from vllm import SamplingParams

    llm.collective_rpc("tap_arm", args=({"targets": ids[1 : predicted + 1], **job},))
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    output = engine.llm.generate([{"prompt_token_ids": ids}], params)[0]
    found = next(filter(None, llm.collective_rpc("tap_take")), None)
    own = [-seen[token].logprob for token, seen in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
    if found is None or not np.allclose(found["nll"], own[:predicted], rtol=0, atol=ALIGNED):
        if not np.isfinite(own).all():
            raise QualityError(f"Under {engine.scheme} the model's logits are not finite: it is broken here.")
        raise QualityError("The tap and vLLM disagree: this vLLM computes a prompt's logits in another way.")
    return found
