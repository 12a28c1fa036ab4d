"""The text that calibrates and the text that tests: two halves of Python's own documentation."""

import hashlib
import sys


def held_out_text() -> tuple[str, str]:
    """Real English prose that every Python brings: the second half of its help topics, and its name.

    The first half is left for calibrating AWQ, so that no scheme is tested on what it was tuned on.
    """
    _, second = _halves()
    return second, _name(second, "pydoc topics")


def calibration_text() -> tuple[str, str]:
    """The first half, less every paragraph (a quarter of them) that the second half repeats; and its name."""
    first, second = (half.split("\n\n") for half in _halves())
    held_out = {" ".join(paragraph.split()) for paragraph in second}
    text = "\n\n".join(part for part in first if " ".join(part.split()) not in held_out)
    return text, _name(text, "pydoc topics, first half")


def _halves() -> tuple[str, str]:
    """Python's help topics, in two."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    middle = len(texts) // 2
    return "\n\n".join(texts[:middle]), "\n\n".join(texts[middle:])


def _name(text: str, source: str) -> str:
    """A text's source, with a hash: another Python has other topics."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{source}, Python {sys.version_info.major}.{sys.version_info.minor}, {digest}"


def calibration_data(tokenizer, samples: int, tokens: int):
    """Samples of ``tokens`` tokens, evenly spread over the calibration text: a DataLoader, one at a time."""
    import torch

    ids = torch.tensor(tokenizer.encode(calibration_text()[0], add_special_tokens=False))
    starts = torch.linspace(0, len(ids) - tokens, samples).long().tolist()
    windows = [{"input_ids": ids[start : start + tokens]} for start in starts]
    return torch.utils.data.DataLoader(windows, batch_size=1)
