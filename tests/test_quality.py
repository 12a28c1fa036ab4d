"""Quality: the figures against other ways to compute them, the tap against vLLM, the task's items."""

import contextlib
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.engine import probe
from helpers.engine.engine import open_engine
from helpers.engine.probe import Probe
from helpers.measure import divergence, task
from helpers.measure.divergence import Reference
from helpers.measure.tap import QualityError
from helpers.measure.task import Answers
from helpers.model import embedded
from helpers.model import model as model_module
from helpers.model.text import held_out_text
from tests.conftest import SWAP

WORDS = 50  # the vocabulary of the made-up models here


@pytest.fixture(scope="module")
def logits():
    """Two models' logits of 130 positions: more than are compared at a time, and no multiple of them."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    baseline = 3 * torch.randn(130, WORDS, generator=generator)
    return baseline, baseline + torch.randn(130, WORDS, generator=generator)


def log_softmax(array) -> np.ndarray:
    wide = np.asarray(array, dtype=np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_figures_agree_with_numpy(logits, tmp_path):
    p, q = map(log_softmax, logits)
    file, targets = tmp_path / "kept.npy", [(7 * i) % WORDS for i in range(130)]
    np.save(file, np.zeros((140, WORDS), np.float16))
    kept = probe.figures(logits[0], targets, keep=str(file), row=10)
    assert kept["nll"] == pytest.approx(-p[range(130), targets], abs=1e-4)
    assert kept["top1"] == p.argmax(axis=-1).tolist()
    assert np.load(file)[10:] == pytest.approx(p, abs=0.01)
    assert not np.load(file)[:10].any()

    found = probe.figures(logits[1], targets, against=str(file), row=10, choices=[(3, [1, 2]), (129, [0])])
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1), rel=1e-2, abs=1e-3)
    assert found["choices"] == [pytest.approx(q[3, [1, 2]], abs=1e-4), pytest.approx(q[129, [0]], abs=1e-4)]


def test_the_tap_takes_the_prompt_not_the_sampled_row_and_lets_go(logits):
    class Model:
        def compute_logits(self, hidden):
            return hidden

    model, worker = Model(), Probe()
    worker.get_model = lambda: model
    worker.tap_arm({"targets": [1] * 128})
    assert model.compute_logits(logits[1][:1]) is not None
    model.compute_logits(logits[0])
    model.compute_logits(logits[1])
    assert worker.tap_take()["nll"] == pytest.approx(-log_softmax(logits[0])[:128, 1], abs=1e-4)
    assert worker.tap_take() is None
    assert not vars(model)


def answers(correct) -> Answers:
    return Answers(["made up"] * len(correct), [1.0 if right else -1.0 for right in correct])


def test_recovery_counts_flips_both_ways_and_is_seeded():
    before, after = answers([1, 1, 1, 0] * 50), answers([1, 1, 0, 1] * 50)
    found = task.recovery(before, after)
    assert (found.ratio, found.lost, found.gained, found.items) == (1.0, 50, 50, 200)
    assert 0.8 < found.low < 1 < found.high < 1.25
    assert found == task.recovery(before, after)
    assert Answers(["a", "a"], [0.0, 0.1]).correct.tolist() == [False, True], "a tie is not right"
    same = task.recovery(before, before)
    assert (same.low, same.ratio, same.high, same.lost) == (1.0, 1.0, 1.0, 0)
    for other in (answers([1] * 3), answers([0] * 200)):
        with pytest.raises(QualityError, match="same items answered twice"):
            task.recovery(other, before)


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_interval_holds_the_truth_about_95_times_in_100(spread):
    """Also where kinds differ in what they lose, as those that share a document do."""
    rng, kinds = np.random.default_rng(1), np.repeat(list("abcd"), 50)
    truth = (0.8 * 0.9 + 0.2 * 0.3) / 0.8  # right stays right 9 times in 10, wrong becomes right 3 in 10
    held = 0
    for _ in range(200):
        kept = np.repeat(0.9 + spread * rng.standard_normal(4), 50)
        before = rng.random(200) < 0.8
        after = np.where(before, rng.random(200) < kept, rng.random(200) < 0.3)
        first, second = (Answers([*kinds], [*(2.0 * right - 1)]) for right in (before, after))
        found = task.recovery(first, second, draws=400)
        held += found.low <= truth <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_the_task_has_200_items_each_once_and_right():
    kinds = task.task()
    assert kinds == task.task()
    lines = [(kind, line) for kind, items in kinds.items() for line, _ in items]
    assert len(lines) == len(set(lines)) >= 200
    for line, right in kinds["Sums"]:
        a, b = line.removesuffix(" = ").split(" + ")
        assert int(a) + int(b) == int(right) < 10
    assert all(line[0].upper() == right.strip() for line, right in kinds["Words and their first letter"])
    assert ("Japan:", " Tokyo") in kinds["Countries and their capitals"]
    opposites = kinds["Words and their opposites"]
    assert len({answer for _, answer in opposites}) == len(opposites)


def test_the_choices_first_tokens_differ_in_the_embedded_model():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(embedded.prepare() / "tokenizer.json"))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    total = 0
    for kind, items in task.task().items():
        ids, placed = task.place(encode, kind, items)
        different = len({answer for _, answer in items})
        for (position, choices), (line, right) in zip(placed, items, strict=True):
            assert len(set(choices)) == len(choices) == different, (line, right)
            assert ids[position + 1] == choices[0]
            assert right.startswith(tokenizer.decode(choices[:1])), (line, right)
            assert tokenizer.decode(ids[: position + 1]).endswith(line)
        total += len(ids)
    assert total < 1_400, "the task is to be a prefill of some 20 s where the baseline is slowest"


def test_a_tokenizer_the_task_cannot_be_scored_with_is_refused():
    letters = lambda text: [*map(ord, text)]  # noqa: E731
    with pytest.raises(QualityError, match="begins alike"):
        task.place(letters, "Capitals", [("France:", " Paris"), ("Spain:", " Madrid")])
    with pytest.raises(QualityError, match="joins"):
        task.place(lambda text: [len(text)], "Capitals", [("France:", " Paris"), ("Spain:", " Madrid")])


# -- the reference ------------------------------------------------------------------------------


def a_model(folder, **changed) -> model_module.Model:
    """A model of two tensors: all that a comparison looks at before it starts."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    config = {"model_type": "llama", "hidden_size": 64, "vocab_size": 1001, **changed}
    seed, dtype = config.pop("seed", 0), config.pop("dtype", torch.bfloat16)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = torch.randn(1001, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    save_file({"model.embed_tokens.weight": weights.to(dtype)}, folder / "model.safetensors")
    return model_module.Model(str(folder), folder.name, folder, "local")


def an_engine(model, encode=None):
    """What of an engine is looked at before anything is computed."""
    encode = encode or (lambda text, **_: [*range(100)])
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=4096))
    llm = SimpleNamespace(
        get_tokenizer=lambda: SimpleNamespace(encode=encode), llm_engine=SimpleNamespace(vllm_config=config)
    )
    return SimpleNamespace(checkpoint=model, llm=llm, args={"max_model_len": 512}, scheme="baseline")


@pytest.fixture
def reference(tmp_path):
    model = a_model(tmp_path / "base")
    return Reference(
        model.title,
        divergence._identity(model),
        held_out_text()[1],
        10,
        [*range(100)],
        [1.0] * 90,
        [0] * 90,
        answers([1]),
        tmp_path / "logprobs.npy",
    )


def test_a_quantized_copy_is_the_same_model_and_others_are_not(reference, tmp_path):
    import torch

    copy = a_model(tmp_path / "copy", dtype=torch.float16, quantization_config={"quant_method": "awq"})
    assert reference.check(an_engine(copy)) is reference
    for number, changed in enumerate(({"seed": 1}, {"hidden_size": 32}, {"model_type": "phi"})):
        other = a_model(tmp_path / f"other{number}", **changed)
        with pytest.raises(QualityError, match=f"reference is of base; other{number} was not made from that"):
            reference.check(an_engine(other))


def test_another_text_or_tokenizer_is_refused(reference, tmp_path, monkeypatch):
    engine = an_engine(a_model(tmp_path / "copy"), encode=lambda text, **_: [*range(1, 101)])
    with pytest.raises(QualityError, match="tokenizer of copy is not the reference's"):
        reference.check(engine)
    monkeypatch.setattr(divergence, "held_out_text", lambda: ("x", "another text"))
    with pytest.raises(QualityError, match="here the text is another text"):
        reference.check(engine)


def test_a_reference_is_taken_where_it_is_whole_and_else_made_anew(reference, tmp_path, monkeypatch):
    model = model_module.Model("base", "base", tmp_path / "base", "local")
    monkeypatch.setattr(divergence, "open_engine", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(divergence, "keep_reference", lambda *_: "anew")
    kept, file = tmp_path / "reference.json", reference.file
    assert divergence.reference_of(model, tmp_path, 100) == "anew"
    np.save(file, np.zeros((90, 1001), np.float16))
    kept.write_text(json.dumps(asdict(reference) | {"file": file.name}))
    assert divergence.reference_of(model, tmp_path, 100) == reference
    assert divergence.reference_of(model, tmp_path, 200) == "anew", "of half the text"
    assert divergence.reference_of(a_model(tmp_path / "other", seed=1), tmp_path, 100) == "anew"
    file.write_bytes(file.read_bytes()[:-100])
    assert divergence.reference_of(model, tmp_path, 100) == "anew"
    np.save(file, np.zeros((90, 1001), np.float16))
    kept.write_text('{"model": "half')
    assert divergence.reference_of(model, tmp_path, 100) == "anew"


def test_windows_that_do_not_fit_say_so(tmp_path):
    model = a_model(tmp_path / "base")
    long = an_engine(model, encode=lambda text, **_: [*range(4096)])
    with pytest.raises(
        QualityError, match=r"512 tokens does not go .* from 5 to 511 do .max_model_len is 512"
    ):
        divergence.collect(long, [*range(1024)], 512)
    with pytest.raises(QualityError, match=r"gives 100 tokens .* not 300 in windows of 200"):
        divergence.text_ids(an_engine(model), tokens=300, window=200)


# -- the real engine ----------------------------------------------------------------------------


def test_the_tap_agrees_with_vllm_and_a_second_engine_with_the_first(small, tmp_path, monkeypatch):
    few = {"Sums": task.task()["Sums"][:8]}  # the whole task takes some 20 s
    monkeypatch.setattr(task, "task", lambda: few)
    engine = open_engine(**small)
    with engine:  # the first of a process leaves modules behind
        from vllm import SamplingParams  # not before the engine: what vLLM does then, it would do unwatched

        kept = divergence.keep_reference(engine, tmp_path, tokens=128, window=64)
        prompts = [{"prompt_token_ids": kept.ids[start : start + 64]} for start in (0, 64)]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        own = [
            -logprobs[token].logprob
            for output in engine.llm.generate(prompts, params)
            for token, logprobs in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        assert kept.nll == pytest.approx(own, abs=1e-2)
    engine = open_engine(**small)
    with engine:
        found = divergence.compare(engine, divergence.reference_of(engine.model, tmp_path, 128))
        again = task.answer(engine)
    assert abs(found.kl_mean) < 1e-4
    assert found.top1 == 1
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-6)
    assert (found.perplexity.tokens, found.perplexity.text) == (126, held_out_text()[1])
    assert task.recovery(kept.answers, again).ratio == 1
    assert engine.release.left < SWAP
