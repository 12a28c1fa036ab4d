"""Speed of an open engine, the same way for every scheme.

What warms up does not count, and nothing comes from a cached prefix: prompts are unique, the engine runs with
its prefix cache off. Each figure is the median of several runs, with its spread.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from helpers.base import parameters, records
from helpers.engine.engine import owner_of
from helpers.engine.owned_llm import uncollected

_numbers = itertools.count()  # for requests' names


@dataclass(frozen=True)
class Speed:
    """Decoding at one batch size.

    ``output_tokens_per_s`` is the median over several runs of the tokens all requests of the batch
    receive per second once each has its first one; ``low`` and ``high`` are the slowest and the
    fastest run. ``ttft_s`` is the median time to first token, ``tpot_s`` the time per output token
    of one request. ``prompt_tokens`` is the length of each prompt, ``all_first_tokens_s`` the median time
    until every request has its first token.
    """

    batch: int
    output_tokens_per_s: float
    low: float
    high: float
    ttft_s: float
    prompt_tokens: int
    all_first_tokens_s: float

    @property
    def tpot_s(self) -> float:
        """Seconds between two tokens of one request."""
        return self.batch / self.output_tokens_per_s


def measure_speed(
    llm,
    batch_sizes: list[int],
    *,
    prompt_tokens: int = records.PROMPT_TOKENS,
    seconds: float = 3.0,
    runs: int = 3,
) -> list[Speed]:
    """Measure decoding at each batch size.

    A time budget, not a token count: ``seconds`` of decoding a batch size, split over ``runs`` runs
    of fresh random prompts of ``prompt_tokens`` tokens, so that a slow path stays short. A run takes
    at least one step. A short run with tiny prompts comes first and does not count.
    """
    engine, rng, results = owner_of(llm), random.Random(0), []
    longest = engine.args["max_model_len"] - prompt_tokens
    if longest < 2:
        raise parameters.ParameterError(
            f"Prompts of {prompt_tokens} tokens leave no room in max_model_len for answers."
        )

    def decode(batch: int, tokens: int, seconds: float) -> tuple[float, list[float]]:
        prompts = random_prompts(engine.model.config["vocab_size"], batch, tokens, rng)
        with engine.guarded():
            return decode_prompts(engine.llm, prompts, seconds, longest)

    for batch in parameters.checked("batch_sizes", batch_sizes):
        decode(batch, 2, 0.0)
        rates, firsts, all_first = [], [], []
        for _ in range(runs):
            rate, ttft = decode(batch, prompt_tokens, seconds / runs)
            rates.append(rate)
            firsts += ttft
            all_first.append(max(ttft))
        rate, first, last = map(statistics.median, (rates, firsts, all_first))
        results.append(Speed(batch, rate, min(rates), max(rates), first, prompt_tokens, last))
    return results


def random_prompts(vocabulary: int, batch: int, tokens: int, rng: random.Random) -> list[dict]:
    """Prompts of random tokens, as vLLM takes them: no two begin alike, so none is found in a cache."""
    return [{"prompt_token_ids": rng.choices(range(100, vocabulary), k=tokens)} for _ in range(batch)]


@uncollected()
def decode_prompts(
    llm,
    prompts: list[dict],
    seconds: float,
    max_tokens: int,
    *,
    decoding: Callable[[], object] = lambda: None,
) -> tuple[float, list[float]]:
    """Run prompts as one batch through a bare ``vllm.LLM``; return tokens/s and each request's TTFT in s.

    The rate is that of ``seconds`` from the last first token on, or until the answers end. ``decoding`` is
    called once, between the last first token and the clock's start.

    Raises:
        ParameterError: some answers had ended by then, so the rate would be of fewer requests.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = llm.llm_engine
    delta = RequestOutputKind.DELTA
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=delta)
    names = [f"speed-{next(_numbers)}" for _ in prompts]
    ttft: dict[str, float] = {}
    begun = time.perf_counter()
    for name, prompt in zip(names, prompts, strict=True):
        core.add_request(name, prompt, params)
    while len(ttft) < len(prompts) and core.has_unfinished_requests():
        outputs, now = core.step(), time.perf_counter()
        for output in outputs:
            ttft.setdefault(output.request_id, now - begun)
    if core.get_num_unfinished_requests() < len(prompts):
        core.abort_request(names)
        raise parameters.ParameterError(
            f"A batch of {len(prompts)} does not run at once here: some answers ended before the last began."
        )
    decoding()
    tokens, started = 0, time.perf_counter()
    while core.has_unfinished_requests() and (not tokens or now - started < seconds):
        outputs, now = core.step(), time.perf_counter()
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    core.abort_request(names)
    return tokens / (now - started), list(ttft.values())
