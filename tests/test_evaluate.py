"""``make evaluate``: lm-eval's tasks in several schemes, compared item by item."""

import json
import subprocess
import sys

import pytest

from helpers.base.files import ROOT
from helpers.measure.lm_eval_tasks import known_answers
from helpers.tools import evaluate, extras


def test_the_lessons_task_as_lm_evals_has_one_right_answer_of_four():
    rows = known_answers.dataset()["test"].to_list()
    assert rows == known_answers.dataset()["test"].to_list()
    assert len({row["kind"] for row in rows}) == 4
    for row in rows:
        *examples, asked = row["question"].splitlines()
        assert len(examples) == 1 + known_answers.EXAMPLES
        assert len(set(row["choices"])) == known_answers.CHOICES
        assert asked + row["choices"][0] not in examples


def samples(folder, metric, values):
    folder.mkdir(parents=True)
    rows = [{"doc_id": item, "metrics": [metric], metric: value} for item, value in enumerate(values)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "samples_gsm8k_2026-01-01T00-00-00.000000.jsonl").write_text(text)


def test_items_are_compared_in_pairs(tmp_path):
    samples(tmp_path / "baseline", "exact_match", [1.0, 1.0, 0.0, 1.0])
    samples(tmp_path / "fp8", "exact_match", [1.0, 0.0, 1.0, 1.0])
    found = {scheme: evaluate.scores(tmp_path / scheme) for scheme in ("baseline", "fp8")}
    kept = evaluate.kept(found["baseline"]["gsm8k"], found["fp8"]["gsm8k"])
    assert (kept.ratio, kept.lost, kept.gained, kept.items) == (1.0, 1, 1, 4)
    assert kept.low < 1 < kept.high
    _, _, before, after = evaluate.table(found).aligned().splitlines()
    assert before.split() == ["gsm8k", "baseline", "4", "75.0%"]
    assert after.split()[:5] == ["gsm8k", "fp8", "4", "75.0%", "1.00"]


def test_a_scheme_that_no_server_has_is_refused(capsys):
    assert evaluate.main(["--schemes", "baseline,q4"]) == 2
    names = "baseline, fp8, awq, fp8_kv, fp8_fp8_kv, awq_fp8_kv"
    assert capsys.readouterr().err == f"No scheme 'q4' here. There are: {names}.\n"


@pytest.mark.slow
def test_lm_eval_asks_a_real_server_and_keeps_every_item(tmp_path):
    extras.ensure("evaluate")
    words = ["--schemes", "baseline", "--limit", "20", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "helpers.tools.evaluate", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = evaluate.scores(tmp_path / "baseline")["known_answers"]
    assert len(scores) == 20
    assert sum(scores.values()) > 20 / known_answers.CHOICES  # better than by chance
    assert f"{sum(scores.values()) / 20:.1%}" in done.stdout
