"""What configs say of a model's weights and cache, held against published totals and hand-worked formats."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.model import formats, layout, shapes, sizes
from helpers.model.layout import LayoutError

# The totals are those of the models' pages on the hub; the cache is 2 x layers x KV heads x head size, or
# MLA's layers x (rank + rotary part), of the layers that keep keys.
PUBLISHED = json.loads((Path(__file__).parent / "configs.json").read_text())
LLAMA = PUBLISHED["llama-3.1-8b"]["config"]


def read(config: dict) -> layout.Layout:
    return layout.read(json.dumps(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_cache_are_those_that_are_published(name):
    known = PUBLISHED[name]
    counts = read(known["config"])
    # A bias that chooses experts is no parameter in transformers: 256 numbers a layer of DeepSeek-V3.
    assert counts.total == pytest.approx(known["total"], rel=1e-7)
    if "kv" in known:
        layers, heads, size = known["kv"]
        assert counts.kv_token_bytes() == 2 * layers * heads * size * 2
    else:
        layers, width = known["mla"]
        assert counts.kv_token_bytes() == layers * width * 2
    assert [counts.experts, counts.per_token] == known.get("experts", [0, 0])


# Those of the other shapes, from the same pages.
TOTALS = {
    "llama-3.1-70b": 70_553_706_496, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-14b": 14_770_033_664,
    "qwen3-32b": 32_762_123_264, "gemma-3-27b": 27_432_406_640,
}  # fmt: skip


def test_a_shape_that_comes_with_this_is_the_published_model():
    for name in shapes.CONFIGS:
        known = TOTALS.get(name) or PUBLISHED[name]["total"]
        assert sizes.layout(shapes.shape(name).folder).total == known, name
    gemma = sizes.layout(shapes.shape("gemma-3-27b").folder)
    assert gemma.count("tower") == 423_060_336
    assert set(gemma.widths) == {4096, 5376, 21504}, "a tower's widths do not stand in a group size's way"


def test_windows_and_states_do_not_grow_with_the_context():
    gemma = sizes.layout(shapes.shape("gemma-3-27b").folder)
    assert gemma.kv_token_bytes() == 507_904
    assert gemma.request_bytes(131_072) / 131_072 == 85_248
    jamba = read(PUBLISHED["jamba-v0.1"]["config"])
    state = 28 * (
        8192 * 3 * 2 + 8192 * 16 * 4
    )  # layers x (what the convolution looks back on + 16 a channel)
    assert jamba.request_bytes(1000) == 1000 * 16_384 + state
    assert jamba.request_bytes(1000, 1) == 1000 * 8_192 + state


def test_a_step_reads_the_experts_that_its_tokens_choose():
    counts = read(PUBLISHED["qwen3-30b-a3b"]["config"])
    active = counts.total - counts.count("embedding") - counts.count("experts") * (1 - counts.touched(1))
    assert active == pytest.approx(3.0e9, rel=0.02), "3.3 of 30.5 billion with the embedding, says its page"
    assert counts.touched(1) == 8 / 128
    assert counts.touched(64) == pytest.approx(1 - (1 - 1 / 16) ** 64)


def stored(quantization: dict, config: dict = LLAMA) -> int:
    config = config | {"quantization_config": quantization}
    return formats.stored_bytes(read(config).tensors, formats.quantized(config).of)


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS}


@pytest.mark.parametrize(
    ("quantization", "a_weight", "a_channel"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128, 0),
        ({"quant_method": "fbgemm_fp8"}, 1, 4),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128, 0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1, 0),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": GROUP}, "ignore": ["lm_head"]}, 1, 2),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, 0.5 + 1 / 16, 0),
    ],
)
def test_a_checkpoint_that_is_quantized_has_its_own_bytes(quantization, a_weight, a_channel):
    counts = read(LLAMA)
    plain = 2 * (counts.total - counts.linear)
    channels = sum(one.outputs for one in counts.tensors if one.part == "linear")
    expected = counts.linear * a_weight + channels * a_channel + plain
    assert stored(quantization) == pytest.approx(expected, rel=1e-6)


def test_the_published_size_of_qwen3_32b_awq():
    config = shapes.CONFIGS["qwen3-32b"]
    assert stored({"quant_method": "awq", "bits": 4, "group_size": 128}, config) == 19_325_298_688


@pytest.mark.parametrize(
    ("ignored", "kept"),
    [
        (["re:.*self_attn.*"], ("q_proj", "k_proj", "v_proj", "o_proj")),
        (["model.layers.*.self_attn"], ("q_proj", "k_proj", "v_proj", "o_proj")),
        (["down_proj"], ("down_proj",)),
        (["gate"], ()),  # a router's name, and not part of gate_proj's
        ([f"model.layers.{n}.mlp.up_proj" for n in range(32)], ("up_proj",)),
    ],
)
def test_what_is_ignored_stays_in_16_bits(ignored, kept):
    counts = read(LLAMA)
    left = sum(one.size for one in counts.tensors if one.name.endswith(kept)) if kept else 0
    whole = stored({"quant_method": "fp8", "weight_block_size": [128, 128]})
    part = stored({"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ignored})
    assert part - whole == pytest.approx(left)


def test_experts_are_ignored_by_the_names_that_a_checkpoint_gives_them():
    config = PUBLISHED["qwen3-30b-a3b"]["config"]
    counts = read(config)
    ignored = ["re:.*mlp.experts.*.down_proj"]
    whole, part = (stored({"quant_method": "fp8", "ignored_layers": i}, config) for i in ([], ignored))
    left = sum(one.size for one in counts.tensors if one.name.endswith("experts.down_proj"))
    assert part - whole == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA | {"model_type": "internlm2"}, "is a class that transformers does not have"),
        ({"architectures": ["LlamaForCausalLM"]}, r"LlamaForCausalLM \(model_type None\) is a class"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "does not write text token by token"),
        (LLAMA | {"hidden_size": "wide"}, "does not accept this config of LlamaForCausalLM"),
        ({"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"]}, "its cache cannot be counted"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(config, said):
    with pytest.raises(LayoutError, match=said):
        read(config)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "quark"}, "quantized as quark, whose bytes are not counted"),
        ({"quant_method": "bitsandbytes"}, "vllm-bnb-plugin"),
        ([1], "its config does not say"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": 7}, "cannot be read"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION is not counted"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "name no weights"),
    ],
)
def test_a_format_that_is_not_known_is_refused_by_name(quantization, said):
    with pytest.raises(LayoutError, match=said):
        formats.quantized({"quantization_config": quantization})


def test_conv1d_matrices_are_matrices():
    counts = read(PUBLISHED["gpt2"]["config"])
    assert counts.widths == (768, 3072)
    assert counts.linear == 12 * 12 * 768**2


def test_a_layout_is_kept_and_counted_again_where_its_file_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path))
    layout.read.cache_clear()
    counted = read(LLAMA)
    code = (
        "import sys\nfrom helpers.model import layout\nprint(layout.read(sys.argv[1]).total)\n"
        "assert 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, json.dumps(LLAMA)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(said) == counted.total
    (kept,) = tmp_path.glob("layouts/*.json")
    kept.write_text(kept.read_text()[:100])
    layout.read.cache_clear()
    assert read(LLAMA) == counted
    layout.read.cache_clear()
