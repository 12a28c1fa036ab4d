"""What is wrong with a model's weights is found in their headers, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.model import embedded, lookup, weights
from helpers.model.model import ModelError
from helpers.model.weights import INDEX

HEADER = b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}'
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + b"1234"


def safetensors(names: list[str]) -> bytes:
    """A whole file that holds one BF16 number under each name."""
    tensors = {
        name: {"dtype": "BF16", "shape": [1], "data_offsets": [2 * place, 2 * place + 2]}
        for place, name in enumerate(names)
    }
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(2 * len(names))


def folder_of(path: Path, config: dict, **files: list[str]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        (path / f"{name}.safetensors").write_bytes(safetensors(tensors))
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (WHOLE[:-1], "73 bytes long, its header says 74"),
        (WHOLE + b"5", "75 bytes long, its header says 74"),
        (WHOLE[:20], "20 bytes, its header alone would take 62"),
        (bytes(100), "100 bytes, its header is zeros"),
        (b"", "0 bytes, too short for a header"),
        (b"\xff" * 100, "its header alone would take 18,446,744,073,709,551,615"),
        ((5).to_bytes(8, "little") + b"12345", "its header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a note of Git LFS"),
        (b"PK\3\4" + bytes(96), "a pickle under another name"),
        (b"<html>Sign in to continue</html>", "a web page"),
    ],
    ids=["cut", "long", "cut in header", "zeros", "empty", "ones", "no JSON", "LFS", "pickle", "page"],
)
def test_a_file_that_is_not_whole_is_refused_and_named(tmp_path, content, said, table):
    folder = folder_of(tmp_path / "a model", {"model_type": "llama"})
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        lookup.resolve(str(folder))
    report = table.check("system", f"weights: {said}", "resolve", caught.value, "damaged-weights")
    assert said in report.evidence


@pytest.mark.parametrize("length", [0x3C, 0x7B, 0x0280, 0x0480])  # as "<", "{" and a pickle begin
def test_a_header_whose_length_looks_like_another_kind_of_file_is_a_header(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    assert weights.header(path) == {}


# -- the index ---------------------------------------------------------------------------------------------


def test_a_file_without_a_tensor_that_the_index_says_it_holds(tmp_path, table):
    folder = folder_of(tmp_path / "model", {"model_type": "llama"}, one=["a", "b"], two=["c"])
    index = {"weight_map": {"a": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks d in two\.safetensors, which its index names") as at:
        lookup.resolve(str(folder))
    table.check("system", "a tensor that is only in the index", "resolve", at.value, "missing-weights")
    del index["weight_map"]["d"]
    (folder / INDEX).write_text(json.dumps(index))
    lookup.resolve(str(folder))


def test_an_index_that_names_a_file_elsewhere(tmp_path, table):
    """vLLM reads the files beside the index only."""
    folder = folder_of(tmp_path / "model", {"model_type": "llama"}, one=["a"])
    folder_of(folder / "sub", {}, two=["b"])
    index = {"weight_map": {"a": "one.safetensors", "b": "sub/two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks sub/two\.safetensors, .* beside it") as caught:
        lookup.resolve(str(folder))
    table.check("system", "an index that names another folder", "resolve", caught.value, "missing-weights")


def test_a_link_whose_file_is_gone(tmp_path, table):
    folder = folder_of(tmp_path / "model", {"model_type": "llama"})
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=f"a link to {tmp_path}/gone, No such file") as caught:
        lookup.resolve(str(folder))
    table.check("system", "a link whose file is gone", "resolve", caught.value, "damaged-weights")


# -- matrices that a layer needs ----------------------------------------------------------------------------

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def layers(count: int, kind: str = "weight", start: int = 0) -> list[str]:
    modules = [f"self_attn.{part}" for part in ATTENTION] + [f"mlp.{part}" for part in MLP]
    norms = ["input_layernorm", "post_attention_layernorm"]
    return [
        f"model.layers.{n}.{name}"
        for n in range(start, start + count)
        for name in [f"{module}.{kind}" for module in modules] + [f"{norm}.weight" for norm in norms]
    ]


def whole(count: int, kind: str = "weight") -> list[str]:
    return ["model.embed_tokens.weight", *layers(count, kind), "model.norm.weight"]


LLAMA = {"model_type": "llama", "num_hidden_layers": 3}
OTHER = {"model_type": "something-new", "num_hidden_layers": 3}
TIED, UNTIED = LLAMA | {"tie_word_embeddings": True}, LLAMA | {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("config", "names", "gone", "missing"),
    [
        (LLAMA, whole(3), "1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
        (LLAMA, whole(3), ".up_proj", "model.layers.0.mlp.up_proj.weight, model.layers.1"),
        (LLAMA | {"num_hidden_layers": 12}, whole(12), "10.self_attn.k_proj", "10.self_attn.k_proj.weight"),
        (LLAMA, whole(3), "1.mlp.down_proj", "model.layers.1.mlp.down_proj.weight"),
        (LLAMA, whole(3), ".o_proj", "model.layers.0.self_attn.o_proj.weight"),
        (LLAMA, whole(3), "layers.2", "model.layers.2.input_layernorm.weight, model.layers.2.mlp"),
        (LLAMA, whole(3), "model.norm", "model.norm.weight"),
        (UNTIED, [*whole(3), "lm_head.weight"], "lm_head", "lm_head.weight"),
        (LLAMA, whole(3, "weight_packed"), ".v_proj", "model.layers.0.self_attn.v_proj.weight"),
        (LLAMA, whole(3, "qweight"), "2.mlp.gate_proj", "model.layers.2.mlp.gate_proj.qweight"),
        (LLAMA, whole(3) + layers(3, "weight_scale"), "1.mlp.up_proj.weight_sc", "1.mlp.up_proj.weight_sc"),
        (OTHER, whole(3), "1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
        (OTHER, whole(3), "1.self_attn.o_proj", "model.layers.1.self_attn.o_proj.weight"),
    ],
)  # fmt: skip
def test_a_matrix_that_no_file_has_is_named(tmp_path, config, names, gone, missing, table):
    half = len(names) // 2  # in two files, so that a layer's matrices lie apart
    kept = [[name for name in names[a:b] if gone not in name] for a, b in ((0, half), (half, None))]
    folder = folder_of(tmp_path / "model", config, one=kept[0], two=kept[1])
    with pytest.raises(ModelError) as caught:
        lookup.resolve(str(folder))
    assert missing in str(caught.value)
    assert "would start without a word and answer nonsense" in str(caught.value)
    table.check("system", f"no {gone} in any file", "resolve", caught.value, "missing-weights")


def without(names: list[str], pattern: str) -> list[str]:
    return [name for name in names if not re.search(pattern, name)]


SHARED = {"layer_types": ["sliding", "full", "sliding"]}
WHOLE_MODELS = {
    "all there": (LLAMA, whole(3)),
    "embeddings that are tied": (TIED, whole(3)),
    "packed, and one layer left in 16 bits": (LLAMA, whole(2, "weight_packed") + layers(1, start=2)),
    "scales of the KV cache": (LLAMA, [*whole(3), "model.layers.0.self_attn.k_proj.k_scale"]),
    "compressed queries": (OTHER, without(whole(3), "[kv]_proj")),
    "no gate": (OTHER, without(whole(3), "gate_proj")),
    "experts in all but the first layer": (
        OTHER,
        without(whole(3), r"[12]\.mlp")
        + [f"model.layers.{n}.mlp.experts.{e}.{part}.weight" for n in (1, 2) for e in (0, 1) for part in MLP],
    ),
    "one kind of layer takes its keys for values": (
        OTHER | SHARED,
        without(whole(3), r"1\.self_attn\.v_proj"),
    ),
    "the last layer uses the keys of another": (
        OTHER | {"num_kv_shared_layers": 1},
        without(whole(3), r"2\.self_attn\.[kv]"),
    ),
    "the same, its config under that of pictures": (
        {"model_type": "something-new", "text_config": OTHER | SHARED},
        without(whole(3), r"1\.self_attn\.v_proj"),
    ),
    "fused already": (
        LLAMA,
        [f"model.layers.0.{name}.weight" for name in ("attn.qkv_proj", "mlp.gate_up_proj")],
    ),
    "Mistral's own names": (LLAMA, [f"layers.0.attention.w{letter}.weight" for letter in "qkvo"]),
    "biases of some": (LLAMA, [*whole(3), "model.layers.0.self_attn.q_proj.bias"]),
}


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_what_a_model_leaves_out_on_purpose_is_not_missed(tmp_path, name):
    config, names = WHOLE_MODELS[name]
    lookup.resolve(str(folder_of(tmp_path / "model", config, model=names)))


def test_the_embedded_model_is_whole_and_looking_reads_headers_only():
    folder = embedded.prepare()
    config, before = json.loads((folder / "config.json").read_text()), bytes_read()
    assert weights.problems(folder, config) == []
    assert bytes_read() - before < (folder / "model.safetensors").stat().st_size / 1000


def bytes_read() -> int:
    """Bytes that this process has read so far, as the system counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])
