"""Speculative decoding, prefix caching and structured output, each on and off, in 16 and fewer bits.

    python -m helpers.tools.reference --out notebooks/reference/my-machine features

On the embedded model, whose weights are real: what is guessed, shared or constrained here is text. One engine
a scheme has the plain runs, the shared prefix and the constrained answers; another one guesses.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from helpers.engine.engine import open_engine, owner_of
from helpers.engine.errors import EngineError
from helpers.model.model import EMBEDDED, ModelError
from helpers.model.schemes import SchemeError
from helpers.model.text import held_out_text
from helpers.tools.deployments import GPU
from helpers.tools.recording import stamp, write

SCHEMES = ("baseline", "int8", "awq")
USERS = (1, 32) if GPU else (1, 8)
REPEATS = 3
SPECULATIVE = {
    "method": "ngram",  # looks the last words up in the prompt and proposes what followed them there
    "num_speculative_tokens": 5,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
ANSWER = 96  # tokens
SYSTEM = 768  # tokens of the prompt that all users share
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 100000000},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
    },
    "required": ["city", "inhabitants", "continent"],
    "additionalProperties": False,
}
CITIES = ("Paris", "Tokyo", "Cairo", "Lima", "Sydney", "Berlin", "Delhi", "Toronto", "Nairobi", "Madrid",
          "Seoul", "Chicago", "Lagos", "Oslo", "Hanoi", "Rome")  # fmt: skip


def passages(tokenizer, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Stretches of English prose, as tokens; no two begin alike."""
    text, _ = held_out_text()
    rng = random.Random(seed)
    starts = [rng.randrange(len(text) - 12 * tokens) for _ in range(count)]
    return [
        tokenizer.encode(text[start : start + 10 * tokens], add_special_tokens=False)[:tokens]
        for start in starts
    ]


def copied(tokenizer, count: int, seed: int) -> list[dict]:
    """Prompts whose answer is in them: a passage, and its beginning again, as when editing."""
    found = passages(tokenizer, count, 192, seed)
    newline = tokenizer.encode("\n\n", add_special_tokens=False)
    return [{"prompt_token_ids": [*ids, *newline, *ids[:64]]} for ids in found]


def fresh(tokenizer, count: int, seed: int) -> list[dict]:
    """Prompts of the same length whose answer is nowhere in them; it is drawn, at temperature 1."""
    return [{"prompt_token_ids": ids} for ids in passages(tokenizer, count, 258, seed)]


TEXTS = {"copied": (copied, 0.0), "drawn": (fresh, 1.0)}


def timed(llm, prompts: list[dict], params) -> tuple[float, int]:
    """Generate, all at once; return seconds and tokens."""
    begun = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)


def counters(llm) -> dict[str, float]:
    """vLLM's own counts of guesses and of prefix cache hits, since it started."""
    names = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
             "prefix_cache_queries", "prefix_cache_hits")  # fmt: skip
    found = dict.fromkeys(names, 0.0)
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:")
        if name in found:
            found[name] += metric.value
    return found


def _since(llm, before: dict) -> dict:
    return {name: value - before[name] for name, value in counters(llm).items()}


def _spread(values: list[float]) -> dict:
    middle = statistics.median(values)
    return {"tokens_per_s": round(middle, 1), "low": round(min(values), 1), "high": round(max(values), 1)}


def guessing(llm, users: int) -> list[dict]:
    """Tokens/s on text whose answer stands in the prompt and on text that is drawn; what was accepted."""
    from vllm import SamplingParams

    tokenizer, rows = llm.get_tokenizer(), []
    for text, (prompts, temperature) in TEXTS.items():
        params = SamplingParams(temperature=temperature, max_tokens=ANSWER, ignore_eos=True, seed=1)
        timed(llm, prompts(tokenizer, users, 100), params)  # what is compiled when first needed
        before, rates = counters(llm), []
        for seed in range(REPEATS):
            seconds, tokens = timed(llm, prompts(tokenizer, users, seed), params)
            rates.append(tokens / seconds)
        seen = _since(llm, before)
        drafts, drafted = seen["spec_decode_num_drafts"], seen["spec_decode_num_draft_tokens"]
        accepted = seen["spec_decode_num_accepted_tokens"]
        rows.append({
            "feature": "speculation", "text": text, "users": users, **_spread(rates),
            "drafts": drafts, "drafted": drafted, "accepted": accepted,
            "acceptance": round(accepted / drafted, 4) if drafted else None,
        })  # fmt: skip
    return rows


def sharing(llm, users: int) -> list[dict]:
    """Seconds until a first token, and answers a second, where all prompts begin alike and where none do."""
    from vllm import SamplingParams

    tokenizer, rows = llm.get_tokenizer(), []
    for shared in (False, True):
        firsts, rates, before = [], [], counters(llm)
        for seed in range(REPEATS):
            heads = passages(tokenizer, 1 if shared else users, SYSTEM, 1000 if shared else 2000 + seed)
            tails = passages(tokenizer, users, 16, 3000 + seed + 10 * shared)
            prompts = [{"prompt_token_ids": heads[i % len(heads)] + tail} for i, tail in enumerate(tails)]
            if shared and not seed:
                timed(llm, prompts[:1], SamplingParams(max_tokens=1, temperature=0.0))
                before = counters(llm)
            one = SamplingParams(max_tokens=1, temperature=0.0)
            params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
            extra = passages(tokenizer, 1, 16, 4000 + seed)[0]
            alone = heads[0] if shared else passages(tokenizer, 1, SYSTEM, 5000 + seed)[0]
            firsts.append(timed(llm, [{"prompt_token_ids": alone + extra}], one)[0])
            seconds, _ = timed(llm, prompts, params)
            rates.append(users / seconds)
        seen = _since(llm, before)
        rows.append({
            "feature": "prefix caching", "shared": shared, "users": users, "prompt_tokens": SYSTEM + 16,
            "answer_tokens": 32, "ttft_s": round(statistics.median(firsts), 5),
            "answers_per_s": round(statistics.median(rates), 3), "low": round(min(rates), 3),
            "high": round(max(rates), 3),
            "hits": round(seen["prefix_cache_hits"] / max(1.0, seen["prefix_cache_queries"]), 4),
        })  # fmt: skip
    return rows


def valid(text: str) -> bool:
    """Whether a text is JSON of the schema and nothing else."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def constrained(llm, users: int) -> list[dict]:
    """Valid answers and tokens/s with a JSON schema that the sampler keeps to, and with a request for it."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    keys = "city (a name), inhabitants (a number) and continent"
    ask = f"Answer with one JSON object with the keys {keys}, and nothing else. The city: "
    chats = [[{"role": "user", "content": ask + city}] for city in (CITIES * 4)[: max(users, len(CITIES))]]
    rows = []
    for kept in (False, True):
        more = {"structured_outputs": StructuredOutputsParams(json=SCHEMA)} if kept else {}
        params = SamplingParams(temperature=0.0, max_tokens=80, **more)
        llm.chat(chats[:1], params, use_tqdm=False)  # the grammar is compiled once
        rates, good, texts = [], 0, 0
        for _ in range(REPEATS):
            begun, tokens = time.perf_counter(), 0
            for start in range(0, len(chats), users):
                outputs = llm.chat(chats[start : start + users], params, use_tqdm=False)
                tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
                good += sum(valid(output.outputs[0].text) for output in outputs)
                texts += len(outputs)
            rates.append(tokens / (time.perf_counter() - begun))
        rows.append({
            "feature": "structured output", "kept_to": kept, "users": users, **_spread(rates),
            "valid": round(good / texts, 4), "answers": texts,
        })  # fmt: skip
    return rows


def features(out: Path, schemes: Sequence[str] = SCHEMES, users: Sequence[int] = USERS) -> None:
    """Each feature under each scheme, lines as they come; what a scheme refuses has a line that says why."""
    same = {"log_dir": out / "logs", "enable_prefix_caching": True, "disable_log_stats": False}
    if GPU:
        same["compilation_config"] = {"cudagraph_capture_sizes": [1, 8, *range(16, 257, 16)]}
    for scheme, method in itertools.product(schemes, (None, SPECULATIVE)):
        common = stamp() | {"scheme": scheme, "weights": "real"}
        more = {"speculative_config": method} if method else {}
        asked = (guessing,) if method else (guessing, sharing, constrained)
        try:
            with open_engine(EMBEDDED, scheme, **same, **more) as llm:
                common |= {"model": owner_of(llm).model.title, "speculative": bool(method)}
                for feature, count in itertools.product(asked, users):
                    for row in feature(llm, count):
                        write(out / "features.jsonl", common | row)
        except (EngineError, SchemeError, ModelError) as error:
            write(out / "features.jsonl", common | {"speculative": bool(method), "error": str(error)[-400:]})
