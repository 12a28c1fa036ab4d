"""The text that calibrates and the text that tests: two halves of Python's own documentation."""

from __future__ import annotations

import hashlib
import sys


def held_out_text() -> tuple[str, str]:
    """Real English prose that every Python brings: the second half of its help topics, and its name.

    The first half is left for calibrating AWQ, so that no scheme is tested on what it was tuned on.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    text = "\n\n".join(texts[len(texts) // 2 :])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text, f"pydoc topics, Python {sys.version_info.major}.{sys.version_info.minor}, {digest}"


def calibration_text() -> tuple[str, str]:
    """Return real English prose that every Python brings, and its name with a hash.

    The first half of Python's help topics, less every paragraph (a quarter of them) that the second half
    repeats: that one is ``text.held_out_text``, and no scheme is tested on what it was tuned on.
    """
    from pydoc_data.topics import topics

    held_out = {" ".join(paragraph.split()) for paragraph in held_out_text()[0].split("\n\n")}
    texts = [topics[name] for name in sorted(topics)]
    paragraphs = "\n\n".join(texts[: len(texts) // 2]).split("\n\n")
    text = "\n\n".join(part for part in paragraphs if " ".join(part.split()) not in held_out)
    python, digest = ".".join(map(str, sys.version_info[:2])), hashlib.sha256(text.encode()).hexdigest()
    return text, f"pydoc topics, first half, Python {python}, {digest[:8]}"


def calibration_data(tokenizer, samples: int, tokens: int):
    """Samples of ``tokens`` tokens, evenly spread over the calibration text: a DataLoader, one at a time."""
    import torch

    ids = torch.tensor(tokenizer.encode(calibration_text()[0], add_special_tokens=False))
    starts = torch.linspace(0, len(ids) - tokens, samples).long().tolist()
    windows = [{"input_ids": ids[start : start + tokens]} for start in starts]
    return torch.utils.data.DataLoader(windows, batch_size=1)
