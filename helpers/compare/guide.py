"""The answer as a card: GPU class x goal, each cell computed by ``advise``."""

from helpers.compare.advise import Advice, advise
from helpers.compare.options import Option

# One GPU a class, with a model of a size that people run on it.
CLASSES = {
    "T4": "qwen3-8b",
    "A10": "qwen3-8b",
    "L4": "qwen3-8b",
    "RTX 4090": "qwen3-8b",
    "L40S": "qwen3-32b",
    "A100 80GB": "qwen3-32b",
    "H100 SXM": "qwen3-32b",
    "RTX 5090": "qwen3-8b",
    "B200": "llama-3.1-70b",
}
GOALS = {
    "most users, up to 64 (room for)": {"users": 64, "goal": "fit"},
    "4 users (gain)": {"users": 4},
    "32 users (gain)": {"users": 32},
    "4 users, 32,768 tokens (gain)": {"users": 4, "context": 32_768},
}


def _cell(answer: Advice) -> str:
    one = answer.chosen
    if one is None:
        return "no"
    if answer.goal == "fit":
        return f"{short(one)} ({one.users})"
    if not one.fits:
        return f"{short(one)}, room for {one.users}"
    return f"{short(one)} ({one.together.ratio:.1f})" if one.scheme != "baseline" else short(one)


def short(one: Option) -> str:
    """A way's name for a cell."""
    weights, cached = one.scheme.removesuffix("fp8_kv").rstrip("_"), one.scheme.endswith("fp8_kv")
    name = "16 bits" if weights in ("", "baseline") else weights.upper()
    return f"{name} + FP8 cache" if cached else name


def markdown() -> str:
    """GPU class x goal: the format, and in brackets what the goal's title says: its gain, or its room."""
    columns = ["GPU", "model", *GOALS]
    rows = [columns, ["---"] * len(columns)]
    for gpu, model in CLASSES.items():
        answers = [advise(model, gpu, **goal) for goal in GOALS.values()]
        rows.append([gpu, answers[0].model.model.title, *map(_cell, answers)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
