"""A task with known answers, and how many of them a scheme keeps."""

import random
from dataclasses import dataclass

import numpy as np

from helpers.engine.engine import owner_of
from helpers.measure import tap
from helpers.measure.tap import QualityError

# -- a task with known answers ------------------------------------------------------------------

CAPITALS = """
France Paris, Spain Madrid, Italy Rome, Germany Berlin, Japan Tokyo, China Beijing, Kenya Nairobi, Russia
Moscow, Egypt Cairo, Greece Athens, Portugal Lisbon, Ireland Dublin, Austria Vienna, Poland Warsaw, Hungary
Budapest, Sweden Stockholm, Norway Oslo, Denmark Copenhagen, Finland Helsinki, Turkey Ankara, Iran Tehran,
Iraq Baghdad, Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Ghana Accra, Nigeria Abuja, Thailand
Bangkok, Vietnam Hanoi, Nepal Kathmandu, Jordan Amman, Lebanon Beirut, Syria Damascus, Oman Muscat, Belgium
Brussels, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Ukraine Kyiv, Latvia Riga,
Estonia Tallinn, Lithuania Vilnius, Iceland Reykjavik, Venezuela Caracas, Colombia Bogota, Ecuador Quito,
Australia Canberra, Indonesia Jakarta, Philippines Manila, Senegal Dakar, Uganda Kampala, Libya Tripoli,
Algeria Algiers, Morocco Rabat, Pakistan Islamabad, Afghanistan Kabul, Sudan Khartoum, Zambia Lusaka"""

OPPOSITES = """
hot cold, big small, up down, day night, open closed, old young, rich poor, fast slow, hard soft, high low,
long short, happy sad, light dark, wet dry, full empty, early late, strong weak, thick thin, dirty clean,
love hate, war peace, buy sell, give take, push pull, win lose, begin end, true false, loud quiet, deep
shallow, wide narrow, near far, right wrong, inside outside, above below, before after, always never, more
less, first last, north south, east west, black white, good bad, safe dangerous, cheap expensive, easy
difficult, birth death, accept refuse, arrive depart, remember forget, question answer"""


def task() -> dict[str, list[tuple[str, str]]]:
    """Return every item of the task by kind: a line up to its answer, and the answer. Always the same.

    Four kinds, from facts an easy model knows to letters it hardly sees: whole lists and whole ranges,
    none left out for being right or wrong. The order is shuffled, with a fixed seed.
    """
    capitals, opposites = ([pair.split() for pair in table.split(",")] for table in (CAPITALS, OPPOSITES))
    kinds = {
        "Countries and their capitals": [(f"{country}:", f" {city}") for country, city in capitals],
        "Words and their opposites": [(f"{word}:", f" {other}") for word, other in opposites],
        "Words and their first letter": [(f"{word}:", f" {word[0].upper()}") for word, _ in opposites],
        "Sums": [(f"{a} + {b} = ", str(a + b)) for a in range(10) for b in range(10 - a)],
    }
    for items in kinds.values():
        random.Random(0).shuffle(items)
    return kinds


@dataclass(frozen=True)
class Answers:
    """A model's answers, item by item: ``margin`` is log p(answer) less that of the likeliest other
    choice, in nats; above zero the item is right. ``kinds`` names each item's kind.
    """

    kinds: list[str]
    margin: list[float]

    @property
    def correct(self) -> np.ndarray:
        """Whether each item is right; a tie is not."""
        return np.array(self.margin) > 0

    @property
    def accuracy(self) -> float:
        """The share of items that are right."""
        return float(self.correct.mean())


def answer(llm) -> Answers:
    """Have the model answer ``task()``; nothing is generated, so nothing has to be parsed.

    Each kind is one document, a line an item: "France: Paris", "Spain: Madrid". What the model gives the
    next line's answer is read where that answer begins, so each item has the right answers before it
    as its examples, the same for every scheme whatever it answered, and costs a line instead of a
    prompt: the whole task is a prefill of 1,200 tokens. Choices are all answers of the kind; their
    first tokens are compared, at one position. Plain text, also for models with a chat template:
    inside one the embedded model scored the same. Items of a kind share their context and the first
    ones have few examples: good for comparing schemes, not for comparing with other benchmarks.
    """
    engine = owner_of(llm)
    engine.model.check_words()
    tokenizer = engine.llm.get_tokenizer()
    kinds: list[str] = []
    margin: list[float] = []
    for kind, items in task().items():
        ids, choices = place(tokenizer.encode, kind, items)
        for right, *others in tap.prefill(engine, ids, len(ids) - 1, choices=choices)["choices"]:
            kinds.append(kind)
            margin.append(right - max(others))
    return Answers(kinds, margin)


def place(encode, kind: str, items: list[tuple[str, str]]) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Return a kind's document as token ids and, an item, the position before its answer and the choices.

    Choices are first tokens, the right one first. Where a tokenizer begins another answer with the right
    one's first token, that choice is left out: the tokenizer alone decides that, never the model.

    Raises:
        QualityError: the tokenizer joins an answer with what stands before it.
    """
    text, placed = f"{kind}\n", []
    answers = sorted({answer for _, answer in items})
    for line, right in items:
        text += line
        position, stem = len(encode(text)) - 1, encode(line)
        firsts = {}
        for choice in answers:
            ids = encode(line + choice)  # not the whole text: that would take seconds
            if ids[: len(stem)] != stem:
                raise QualityError(f"This tokenizer joins {line!r} and {choice!r}: no score can be given.")
            firsts[choice] = ids[len(stem)]
        others = sorted({*firsts.values()} - {firsts[right]})
        if not others:
            raise QualityError(f"For this tokenizer every answer of {kind!r} begins alike.")
        placed.append((position, [firsts[right], *others]))
        text += f"{right}\n"
    ids = encode(text)
    if any(ids[position + 1] != choices[0] for position, choices in placed):
        raise QualityError("This tokenizer cuts an answer in another way inside the text.")
    return ids, placed


@dataclass(frozen=True)
class Recovery:
    """How much of the baseline's accuracy a scheme keeps: ``ratio``, with a 95 % interval.

    ``lost`` items were right and are wrong now, ``gained`` the other way: equal accuracies can hide both.
    """

    baseline: float
    scheme: float
    ratio: float
    low: float
    high: float
    lost: int
    gained: int
    items: int


def recovery(baseline: Answers, scheme: Answers, *, draws: int = 10_000) -> Recovery:
    """Compare two accuracies on the same items, with a bootstrap interval by groups of items.

    Items of a kind share a document, and with it what rounding does to its context. So a draw takes kinds,
    and of each its items: an interval of items alone held the truth in 76 to 87 of 100 simulations in which
    kinds differ, this one in 93 to 95. An item's two answers stay together: what is easy or hard for both
    cancels.

    Raises:
        QualityError: other items, or a baseline that got none right.
    """
    if baseline.kinds != scheme.kinds or not baseline.correct.any():
        raise QualityError("Recovery needs the same items answered twice, some right by the baseline.")
    before, after = baseline.correct, scheme.correct
    names, kinds = np.unique(baseline.kinds, return_inverse=True)
    outcomes = np.zeros((len(names), 4))  # by kind: wrong twice, gained, lost, right twice
    np.add.at(outcomes, (kinds, 2 * before + after), 1)
    items = outcomes.sum(axis=1).astype(int)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(names), (draws, len(names)))
    counts = rng.multinomial(items[drawn], (outcomes / items[:, None])[drawn]).sum(axis=1)
    ratios = (counts[:, 1] + counts[:, 3]) / (counts[:, 2] + counts[:, 3]).clip(min=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Recovery(
        baseline=baseline.accuracy,
        scheme=scheme.accuracy,
        ratio=scheme.accuracy / baseline.accuracy,
        low=float(low),
        high=float(high),
        lost=int((before & ~after).sum()),
        gained=int((after & ~before).sum()),
        items=len(before),
    )
