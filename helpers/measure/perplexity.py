"""Perplexity of held-out text."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from helpers.engine.engine import owner_of
from helpers.measure.speed import MeasureError
from helpers.model.text import held_out_text


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by a text: ``exp`` of the mean negative log-likelihood of a token.

    ``tokens`` were predicted; ``text`` names the text by its source and a hash, since another text
    gives another figure.
    """

    value: float
    tokens: int
    text: str


def measure_perplexity(llm, tokens: int = 1024, window: int = 256) -> Perplexity:
    """Measure perplexity on held-out text, in windows that do not see each other.

    A small sample: good for comparing schemes on the same text, not for comparing with papers.
    """
    engine = owner_of(llm)
    engine.model.check_words()
    from vllm import SamplingParams

    if tokens < window or window < 2:
        raise MeasureError(f"perplexity needs at least one window: tokens={tokens}, window={window}.")
    text, name = held_out_text()
    # A token is at least one character, and five on average: tokenizing the whole text would only warn.
    ids = engine.llm.get_tokenizer().encode(text[: 10 * tokens], add_special_tokens=False)
    starts = range(0, tokens, window)
    prompts = [{"prompt_token_ids": ids[start : start + window]} for start in starts]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    losses = []
    for output in engine.llm.generate(prompts, params):
        for token, logprobs in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if logprobs is not None:  # the first token of a window is given, not predicted
                losses.append(-logprobs[token].logprob)
    return Perplexity(math.exp(statistics.fmean(losses)), len(losses), name)
