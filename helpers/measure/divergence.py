"""What a scheme did to the model's answers: exact KL divergence and perplexity (``task`` has known answers).

    with open_engine() as llm:                                      # the baseline, once
        reference = keep_reference(llm, "runs/reference")
    with open_engine(scheme="fp8") as llm:
        print(compare(llm, reference), task.recovery(reference.answers, task.answer(llm)))

A served model returns the log-probabilities of its 20 likeliest tokens; the divergence of two models
lies in all of them. So a tap in vLLM's worker (``engine.probe``) looks at the logits where they are
computed, on the device, and hands back a few figures a position. One prefill of a window gives them all.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from helpers.base.machine import detect
from helpers.engine.engine import Engine, open_engine, owner_of
from helpers.measure import tap, task
from helpers.measure.tap import QualityError
from helpers.measure.task import Answers
from helpers.model import schemes
from helpers.model.model import EMBEDDED, Model
from helpers.model.text import held_out_text

# What the families call their embedding: Llama and most others, GPT-2, BLOOM and Falcon, GPT-NeoX.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def collect(
    engine: Engine, ids: list[int], window: int, *, beside: int = 0, **files: Path
) -> dict[str, np.ndarray]:
    """Take the figures of a text's tokens, in windows that do not see each other, one prefill each.

    Args:
        beside: so many tokens are appended to each window's prompt. No position of the window can see
            them, so the mathematics is the same; but the matrices have other shapes, so the rounding is not.
        files: log-probabilities, to ``keep`` these or to compare them ``against``.

    Returns:
        A figure a predicted token: ``nll`` and ``kl`` (empty without ``against``) in nats, ``top1`` a token.

    Raises:
        QualityError: a window does not fit the engine.
    """
    named, parts, each = {name: str(file.resolve()) for name, file in files.items()}, [], window - 1
    for number, start in enumerate(range(0, len(ids), window)):
        prompt = (ids[start:] + ids)[: window + beside]
        parts.append(tap.prefill(engine, prompt, each, row=number * each, **named))
    return {name: np.concatenate([part[name] for part in parts]) for name in ("nll", "top1", "kl")}


def text_ids(engine: Engine, tokens: int, window: int) -> list[int]:
    """Return the held-out text's first tokens, whole windows only.

    Raises:
        QualityError: the text has fewer, or the window is too short to predict in.
    """
    count = tokens // window * window if window > 4 else 0
    # A token is at least one character, and five on average: the whole text would take longer.
    ids = engine.llm.get_tokenizer().encode(held_out_text()[0][: 10 * count], add_special_tokens=False)
    if not 0 < count <= len(ids):
        raise QualityError(
            f"The text gives {len(ids)} tokens in windows of 5 or more, not {tokens} in windows of {window}."
        )
    return ids[:count]


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by a text: ``exp`` of the mean negative log-likelihood of a token.

    ``tokens`` were predicted; ``text`` names the text by its source and a hash, since another text
    gives another figure.
    """

    value: float
    tokens: int
    text: str


@dataclass(frozen=True)
class Reference:
    """The baseline's answers on disk, for this process or a later one.

    ``identity`` is the model's shape and a piece of its embedding, which no scheme here changes;
    ``ids`` the text's tokens in windows of ``window``; ``nll`` and ``top1`` one figure a predicted token;
    ``answers`` its task. Its log-probabilities are in ``file``: predicted tokens x vocabulary, float16.
    """

    model: str
    identity: dict
    text: str
    window: int
    ids: list[int]
    nll: list[float]
    top1: list[int]
    answers: Answers
    file: Path

    @property
    def perplexity(self) -> Perplexity:
        """The baseline's own perplexity, on the text that every scheme is compared on."""
        return Perplexity(math.exp(float(np.mean(self.nll))), len(self.nll), self.text)

    def check(self, engine: Engine) -> Reference:
        """Return it, if ``engine`` can be compared with it.

        Raises:
            QualityError: another base model, text or tokenizer; KL would be a number without meaning.
        """
        if self.text != held_out_text()[1]:
            raise QualityError(f"The reference is of {self.text}; here the text is {held_out_text()[1]}.")
        title = engine.checkpoint.title
        if not _same(self.identity, _identity(engine.checkpoint)):
            raise QualityError(f"The reference is of {self.model}; {title} was not made from that model.")
        if text_ids(engine, len(self.ids), self.window) != self.ids:
            raise QualityError(f"The tokenizer of {title} is not the reference's.")
        return self


def keep_reference(llm, folder: str | Path, tokens: int = 4096, window: int = 512) -> Reference:
    """Measure the baseline on text and task, and keep it in ``folder`` (2 bytes x tokens x vocabulary).

    float16 keeps a log-probability to three or four digits; renormalised, a baseline compared with its
    own reference has a KL of about 1e-6 nats. bfloat16 would keep two, float32 take twice the room.
    """
    engine = owner_of(llm)
    engine.model.check_words()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reference.json").unlink(missing_ok=True)  # written last: without it there is no reference
    ids, file = text_ids(engine, tokens, window), folder / "logprobs.npy"
    shape = (len(ids) // window * (window - 1), engine.model.config["vocab_size"])
    np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape).flush()
    seen = {name: found.tolist() for name, found in collect(engine, ids, window, keep=file).items()}
    reference = Reference(
        model=engine.checkpoint.title,
        identity=_identity(engine.checkpoint),
        text=held_out_text()[1],
        window=window,
        ids=ids,
        nll=seen["nll"],
        top1=seen["top1"],
        answers=task.answer(engine),
        file=file,
    )
    (folder / "reference.json").write_text(json.dumps(asdict(reference) | {"file": file.name}))
    return reference


def reference_of(model: Model, folder: str | Path, tokens: int = 4096, **engine_args) -> Reference:
    """Return the model's reference from ``folder``, or start a baseline engine and make it.

    What is there and incomplete, or of another model or text, is made anew.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((Path(folder) / "reference.json").read_text())
        found |= {"file": Path(folder) / found["file"], "answers": Answers(**found["answers"])}
        np.load(found["file"], mmap_mode="r")  # whole, or this raises
        kept = Reference(**found)
        enough = len(kept.ids) >= tokens // kept.window * kept.window
        if enough and kept.text == held_out_text()[1] and _same(kept.identity, _identity(model)):
            return kept
    with open_engine(model, **engine_args) as llm:
        return keep_reference(llm, folder, tokens)


def _identity(model: Model) -> dict:
    """What a model shares with its quantized copies and with no other model."""
    from safetensors import safe_open

    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    identity = {name: model.config.get(name) for name in names}
    for file in sorted(model.folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if name.endswith(EMBEDDINGS):
                    sample = tensors.get_slice(name)[1000:1001, :32].float().flatten().tolist()
                    return identity | {"embedding": sample}
    return identity | {"embedding": []}


def _same(one: dict, other: dict) -> bool:
    """Whether two identities agree; a checkpoint may store float16 where the other has bfloat16."""
    one, other = dict(one), dict(other)
    pieces = one.pop("embedding"), other.pop("embedding")
    alike = len(pieces[0]) == len(pieces[1]) and np.allclose(*pieces, rtol=1e-2, atol=1e-5)
    return alike and one == other


@dataclass(frozen=True)
class Quality:
    """A scheme's answers beside the baseline's, over the same predictions.

    ``kl_mean`` and ``kl_p99`` are KL(baseline || scheme) in nats over the whole vocabulary; ``top1`` the
    share of positions where both find the same token likeliest.
    """

    perplexity: Perplexity
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float
    top1: float


def compare(llm, reference: Reference, *, beside: int = 0, windows: int | None = None) -> Quality:
    """Compare an engine with the baseline's reference, position by position.

    ``windows`` takes only the first so many; for ``beside`` see ``collect``.

    Raises:
        QualityError: the reference is another model's or text's, or its windows do not fit the engine.
    """
    engine = owner_of(llm)
    engine.model.check_words()
    ids, window = reference.check(engine).ids, reference.window
    ids = ids[: windows * window] if windows else ids
    seen = collect(engine, ids, window, beside=beside, against=reference.file)
    count = len(seen["nll"])
    loss, base = seen["nll"].mean(), np.mean(reference.nll[:count])
    return Quality(
        perplexity=Perplexity(math.exp(loss), count, reference.text),
        perplexity_ratio=math.exp(loss - base),
        kl_mean=float(seen["kl"].mean()),
        kl_p99=float(np.percentile(seen["kl"], 99)),
        top1=float(np.mean(seen["top1"] == reference.top1[:count])),
    )


def control(reference: Reference, model: str | Model = EMBEDDED, **llm_args) -> tuple[Quality, task.Recovery]:
    """Compare the baseline with itself where rounding alone differs: the size of "no difference".

    A second equal engine would give zero by construction. On a CPU this one computes in FP32, or in BF16
    where the baseline is FP32 already (emulated there, so a quarter of the text has to do); on a GPU each
    window shares its batch with as many other tokens, so that other kernels' tiles are used.
    """
    machine = detect()
    beside, windows, args = reference.window, None, {}
    if machine.kind == "cpu":
        widened = schemes.scheme("baseline").way(machine).args["dtype"] == "float32"
        beside, args = 0, {"dtype": "bfloat16" if widened else "float32"}
        windows = max(1, len(reference.ids) // reference.window // 4) if widened else None
    with open_engine(model, **args | llm_args) as llm:
        quality = compare(llm, reference, beside=beside, windows=windows)
        return quality, task.recovery(reference.answers, task.answer(llm))
