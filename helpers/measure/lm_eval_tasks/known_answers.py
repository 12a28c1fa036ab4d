"""``measure.task`` as data for lm-eval: an item has eight lines of its kind as examples, and four choices."""

import random

from datasets import Dataset, DatasetDict

from helpers.measure.task import task

EXAMPLES, CHOICES = 8, 4


def dataset(**_) -> DatasetDict:
    """Every item but the examples: ``kind``, ``question``, ``choices`` with the right one first."""
    rows = []
    for kind, items in task().items():
        examples = "".join(f"{line}{right}\n" for line, right in items[:EXAMPLES])
        answers = sorted({right for _, right in items})
        for line, right in items[EXAMPLES:]:
            others = random.Random(line).sample([other for other in answers if other != right], CHOICES - 1)
            rows.append({"kind": kind, "question": f"{kind}\n{examples}{line}", "choices": [right, *others]})
    return DatasetDict(test=Dataset.from_list(rows))
