"""Tests of what page 92 measures beyond quantization: its ratios, its prompts, its adapter; no engine."""

import json

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from helpers.base import records
from helpers.measure import feature_tables, features
from helpers.model import lookup

BITS = {"baseline": "16 bits", "fp8": "8 bits", "awq": "4 bits"}


def row(with_it, rate, **more):
    line = {"device": "A", "scheme": "fp8", "feature": "LoRA", "users": 4, "adapter": with_it, "changed": 4}
    return line | {"tokens_per_s": rate, "low": 0.9 * rate, "high": 1.1 * rate} | more


def test_a_ratio_is_of_one_device_scheme_and_load_and_its_newest_rows():
    rows = [row(False, 100), row(True, 20), row(True, 50), row(True, 99, users=8), row(False, 1, device="B")]
    [pair] = feature_tables.pairs(rows)
    assert feature_tables.times(*pair) == pytest.approx((0.5, 45 / 110, 55 / 90))
    assert feature_tables.by_scheme(rows, BITS).rows == [["LoRA", 4, "-", "x 0.50 (0.41 to 0.61)", "-"]]


def test_what_is_on_record_has_every_feature_in_16_8_and_4_bits():
    rows, _ = records.recorded(records.REFERENCE, "features.jsonl", ("feature", "device", "runs"))
    table = feature_tables.by_scheme(rows, BITS).rows
    assert len(table) == 10
    assert not [line for line in table if "-" in line]
    assert "JSON schema, 32 users: 16 bits 0." in feature_tables.ratios(rows, "", BITS).alt


@pytest.mark.parametrize(("text", "good"), [
    ('{"city": "Rome", "inhabitants": 2, "continent": "Europe"}', True),
    ('{"city": "Rome", "inhabitants": 2, "continent": "Mars"}', False),
    ('{"city": "Rome", "inhabitants": 2, "continent": "Europe"} And', False),
])  # fmt: skip
def test_an_answer_is_valid_if_it_is_json_of_the_schema_and_nothing_else(text, good):
    assert features.valid(text) == good


def test_prompts_begin_differently_and_the_copied_ones_begin_again():
    tokenizer = AutoTokenizer.from_pretrained(lookup.resolve("embedded").folder)
    begins = {tuple(ids[:16]) for ids in features.passages(tokenizer, 32, 64, seed=1)}
    assert len(begins) == 32
    for prompt in features.copied(tokenizer, 4, seed=1):
        ids = prompt["prompt_token_ids"]
        assert ids[-64:] == ids[:64]
    assert {len(prompt["prompt_token_ids"]) for prompt in features.fresh(tokenizer, 4, seed=1)} == {258}


def test_the_adapter_fits_the_models_queries_and_values(tmp_path):
    model = lookup.resolve("embedded")
    folder = features.adapter(model, tmp_path / "lora")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == features.RANK
    with safe_open(folder / "adapter_model.safetensors", "pt") as found:
        assert len(found.keys()) == 4 * model.config["num_hidden_layers"]
        value = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
        assert found.get_slice(value.format("A")).get_shape() == [8, model.config["hidden_size"]]
        assert found.get_slice(value.format("B")).get_shape() == [192, 8]
