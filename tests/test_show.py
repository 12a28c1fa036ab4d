"""Tables, marks and figures: what readers see, and what the notebook tests may ignore of it."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

from helpers.base import page as page_module
from helpers.base.page import Note, Table, measured, mib
from helpers.measure import result_tables

RULES = Path(__file__).parent / "nbval_sanitize.cfg"


def sanitized(text: str) -> str:
    rules = ConfigParser()
    rules.read(RULES)
    for name in rules.sections():
        text = re.sub(rules[name]["regex"], rules[name]["replace"], text)
    return text


def test_a_mark_is_replaced_and_nothing_beside_it():
    table = Table(["a", "b"], [["weights", measured("1.5 MiB")], ["fixed", "2.0 MiB"]])
    other = Table(["a", "b"], [["weights", measured("9.9 <MiB>")], ["fixed", "2.0 MiB"]])
    wrong = Table(["a", "b"], [["weights", measured("1.5 MiB")], ["fixed", "2.1 MiB"]])
    for form in (repr, Table._repr_html_):
        assert form(table) != form(other)
        assert sanitized(form(table)) == sanitized(form(other))
        assert sanitized(form(table)) != sanitized(form(wrong))


def test_a_generated_answer_is_marked_across_its_lines():
    output = type("Output", (), {"outputs": [type("Text", (), {"text": "one\ntwo <three>"})]})
    answer = page_module.answer("Why?", output, templated=True)
    assert sanitized(repr(answer)).endswith("Answer: ‹measured›")
    assert "one" not in sanitized(answer._repr_html_())
    assert "Why?" in sanitized(answer._repr_html_())
    assert "<three>" not in answer._repr_html_()


def test_columns_of_sentences_are_left_aligned():
    page = Table(["a", "number", "why"], [["x", 1, "because"]], texts=["why"])._repr_html_()
    assert '<td style="text-align:right">1</td><td style="text-align:left">because</td>' in page


def test_text_from_outside_cannot_become_html():
    table = Table(["<b>"], [["<script>"], [measured("<i>")]])
    assert not re.search(r"<(b|script)>", table._repr_html_())


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MiB"), (2**20, "1.0 MiB"), (20 * 2**30, "20.00 GiB")])
def test_bytes_in_words(size, text):
    assert mib(size) == text


def a_row(scheme, batch, rate, weights, predicted, **more):
    origin = {"model": "m", "device": "d", "vllm": "v", "scheme": scheme, "batch": batch}
    sizes = {"weights_bytes": weights * 2**20, "predicted_weights_bytes": predicted * 2**20}
    return origin | sizes | {"output_tokens_per_s": rate} | more


def test_schemes_side_by_side_are_differences_and_ratios_to_the_baseline():
    rows = [a_row("baseline", 1, 20.0, 300, 200), a_row("baseline", 8, 80.0, 300, 200)]
    rows.append(a_row("awq", 1, 30.0, 199, 100, kl_mean=0.125, top1=0.9, recovery=0.95))
    table = result_tables.side_by_side(rows)
    cells = [str(cell) for cell in table.rows[1]]
    assert cells[:4] == ["AWQ weights", "‹101.0 MiB›", "‹x 1.50›", "‹not measured›"]
    assert cells[4:] == ["‹0.1250 nats›", "‹90.0%›", "‹95.0%›"]
    spread = [rows[0] | {"low": 19.0, "high": 21.0}, rows[2] | {"low": 28.5, "high": 31.5}]
    assert str(result_tables.side_by_side(spread).rows[1][2]) == "‹x 1.50 (1.36 to 1.66)›"
    many = [a_row("baseline", batch, 1.0, 1, 1) for batch in (1, 8, 32, 64)]
    assert result_tables.side_by_side(many).columns[2:4] == ["speed at batch 1", "speed at batch 64"]
    shape = result_tables.side_by_side(rows, ["baseline", "fp8_kv", "awq"])
    assert [row[0] for row in shape.rows] == [
        "Baseline (16-bit)",
        "16-bit weights, FP8 KV cache",
        "AWQ weights",
    ]
    assert result_tables.titled("control") == "control"
    assert {str(cell) for cell in shape.rows[1][1:]} == {"‹not measured here›"}
    assert [len(row) for row in shape.rows] == [len(shape.columns)] * 3
    with pytest.raises(ValueError, match="different models"):
        result_tables.side_by_side([*rows, a_row("fp8", 1, 1.0, 1, 1, device="another")])


def test_prices_are_not_set_as_a_formula():
    assert Table(["a"], [["$1 and $2"]])._repr_html_().startswith('<table class="mathjax_ignore ')
    assert Note("from $1 to $2")._repr_html_().startswith('<p class="mathjax_ignore ')
    assert Table(["a"], [["1"]])._repr_html_().startswith("<table><thead>")
