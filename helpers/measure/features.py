"""Speculation, prefix caching, structured output and LoRA, each without and with, in tokens a second."""

import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from helpers.engine.engine import owner_of
from helpers.model.model import Model
from helpers.model.text import held_out_text

REPEATS = 3
SPECULATIVE = {
    "method": "ngram",  # looks the last words up in the prompt and proposes what followed them there
    "num_speculative_tokens": 5,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
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


def timed(llm, prompts: list[dict], params, **more) -> tuple[float, list[list[int]]]:
    """Generate, all at once; return seconds and each answer's tokens."""
    begun = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False, **more)
    return time.perf_counter() - begun, [list(output.outputs[0].token_ids) for output in outputs]


def counters(llm) -> Counter:
    """vLLM's own counts since it started, of guesses and of prefix cache hits among others."""
    found = Counter()
    for metric in llm.get_metrics():
        found[metric.name.removeprefix("vllm:")] += getattr(metric, "value", 0)
    return found


def _row(
    feature: str, users: int, answer: float, rates: list[float], unit="tokens_per_s", digits=1, **more
) -> dict:
    """A line of what was measured: the median of the runs' rates, the slowest, the fastest, and ``more``."""
    spread = {unit: statistics.median(rates), "low": min(rates), "high": max(rates)}
    spread = {name: round(rate, digits) for name, rate in spread.items()}
    return {"feature": feature, "users": users, "answer_tokens": answer, "runs": len(rates), **spread, **more}


def guessing(llm, users: int, answer: int = 96, repeats: int = REPEATS) -> list[dict]:
    """Tokens/s on text whose answer stands in the prompt and on text that is drawn; what was accepted."""
    from vllm import SamplingParams

    tokenizer, rows = llm.get_tokenizer(), []
    speculative = bool(owner_of(llm).args.get("speculative_config"))
    for text, (prompts, temperature) in TEXTS.items():
        params = SamplingParams(temperature=temperature, max_tokens=answer, ignore_eos=True, seed=1)
        timed(llm, prompts(tokenizer, users, 100), params)  # what is compiled when first needed
        before, rates = counters(llm), []
        for seed in range(repeats):
            seconds, _ = timed(llm, prompts(tokenizer, users, seed), params)
            rates.append(users * answer / seconds)
        seen = counters(llm) - before
        drafted, accepted = (seen[f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
        told = {"speculative": speculative, "text": text, "drafted": drafted, "accepted": accepted}
        told["acceptance"] = round(accepted / drafted, 4) if drafted else None
        rows.append(_row("speculation", users, answer, rates, **told))
    return rows


def sharing(llm, users: int, answer: int = 32, repeats: int = REPEATS) -> list[dict]:
    """Seconds until a first token, and answers a second, where all prompts begin alike and where none do."""
    from vllm import SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0.0)
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    tokenizer, rows = llm.get_tokenizer(), []
    for shared in (False, True):
        if shared:
            heads = passages(tokenizer, 1, SYSTEM, 1000)
            timed(llm, [{"prompt_token_ids": heads[0]}], one)
        firsts, rates, before = [], [], counters(llm)
        for seed in range(repeats):
            if not shared:  # one more than there are users, for the first token; never seen before
                heads = passages(tokenizer, users + 1, SYSTEM, 10_000 * users + seed)
            tails = passages(tokenizer, users + 1, 16, 3000 + seed + 10 * shared)
            prompts = [{"prompt_token_ids": heads[i % len(heads)] + tail} for i, tail in enumerate(tails)]
            firsts.append(timed(llm, prompts[:1], one)[0])
            rates.append(users / timed(llm, prompts[1:], params)[0])
        seen = counters(llm) - before
        first = {"ttft_s": statistics.median(firsts), "ttft_low_s": min(firsts), "ttft_high_s": max(firsts)}
        told = {name: round(seconds, 5) for name, seconds in first.items()}
        told["hits"] = round(seen["prefix_cache_hits"] / max(1.0, seen["prefix_cache_queries"]), 4)
        told |= {"shared": shared, "prompt_tokens": SYSTEM + 16}
        rows.append(_row("prefix caching", users, answer, rates, "answers_per_s", 3, **told))
    return rows


def valid(text: str) -> bool:
    """Whether a text is JSON of the schema and nothing else."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def asked(llm, chats: list, params: list, users: int) -> tuple[float, list]:
    """Chat, as many at once as there are users; return seconds and answers."""
    begun, answers = time.perf_counter(), []
    for start in range(0, len(chats), users):
        part = slice(start, start + users)
        answers += [output.outputs[0] for output in llm.chat(chats[part], params[part], use_tqdm=False)]
    return time.perf_counter() - begun, answers


def constrained(llm, users: int, answers: int = 16, repeats: int = REPEATS) -> list[dict]:
    """Valid answers and tokens/s where the sampler keeps to a JSON schema, and where it is only asked for.

    The free answers are timed at the lengths of the others: a short one has more of its time in the prompt.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    keys = "city (a name), inhabitants (a number) and continent"
    ask = f"Answer with one JSON object with the keys {keys}, and nothing else. The city: "
    cities = [CITIES[place % len(CITIES)] for place in range(max(users, answers))]
    chats = [[{"role": "user", "content": ask + city}] for city in cities]
    free = [SamplingParams(temperature=0.0, max_tokens=80)] * len(chats)
    schema = StructuredOutputsParams(json=SCHEMA)
    kept = [SamplingParams(temperature=0.0, max_tokens=80, structured_outputs=schema)] * len(chats)
    said = {keeps: asked(llm, chats, params, users)[1] for keeps, params in ((False, free), (True, kept))}
    lengths = [len(answer.token_ids) for answer in said[True]]
    cut = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in lengths]
    rows = []
    for keeps, params in ((False, cut), (True, kept)):
        rates = [sum(lengths) / asked(llm, chats, params, users)[0] for _ in range(repeats)]
        right = sum(valid(answer.text) for answer in said[keeps]) / len(chats)
        told = {"kept_to": keeps, "valid": round(right, 4), "answers": len(chats)}
        length = round(sum(lengths) / len(chats), 1)
        rows.append(_row("structured output", users, length, rates, **told))
    return rows


RANK = 8  # of the adapter


def adapter(model: Model, folder: Path) -> Path:
    """Write a LoRA of random numbers for a model's queries and values: its cost is real."""
    import torch
    from safetensors.torch import save_file

    config, random_ = model.config, torch.Generator().manual_seed(0)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    outputs = {"q_proj": heads * size, "v_proj": config["num_key_value_heads"] * size}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in outputs.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = 0.1 * torch.randn(RANK, hidden, generator=random_)
            tensors[f"{place}.lora_B.weight"] = 0.1 * torch.randn(width, RANK, generator=random_)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*outputs], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


def adapted(llm, folder: Path, users: int, answer: int = 96, repeats: int = REPEATS) -> list[dict]:
    """Tokens/s of one engine's requests without and with an adapter, and how many answers it changed."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    prompts = fresh(llm.get_tokenizer(), users, 7000)
    rows, said = [], {}
    for on in (False, True):
        lora = LoRARequest("adapter", 1, str(folder)) if on else None
        rates = []
        for _ in range(1 + repeats):  # the first loads the adapter and does not count
            seconds, said[on] = timed(llm, prompts, params, lora_request=lora)
            rates.append(users * answer / seconds)
        changed = sum(one != other for one, other in zip(said[False], said[on], strict=True))
        rows.append(_row("LoRA", users, answer, rates[1:], adapter=on, changed=changed))
    return rows
