"""Requests that a router can send well or badly: prompts that begin alike, and conversations.

A prefix cache keeps whole blocks (16 tokens on a GPU, 128 on a CPU), so what is shared here is longer. No
prompt of one call begins like one of another: what was kept for an earlier call cannot hit.
"""

import itertools
import random

from helpers.serve.clients import Request, exactly

WORDS = ("river", "stone", "cloud", "paper", "green", "seven", "light", "music", "garden", "window")
_calls = itertools.count()


def distinct(count: int) -> list[Request]:
    """Each prompt is its own: no cache can help."""
    call = next(_calls)
    return [exactly(2, _text(f"{call} {at}", 200)) for at in range(count)]


def shared(count: int) -> list[Request]:
    """Every prompt begins with the same 200 words, as with one system prompt, and ends in its own."""
    same = _text(str(next(_calls)), 200)
    return [exactly(2, f"{same} {at}") for at in range(count)]


def sessions(users: int, turns: int) -> list[Request]:
    """Conversations, a turn of each user before the next: a prompt is the one before and 100 words more.

    Each carries its user in the header that vllm-router reads, ``X-Session-ID``.
    """
    call = next(_calls)
    found = []
    for turn, user in itertools.product(range(turns), range(users)):
        said = [_text(f"{call} {user} {part}", 100) for part in range(turn + 2)]
        found.append(exactly(2, " ".join(said), {"X-Session-ID": f"{call}-{user}"}))
    return found


def _text(seed: str, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))
