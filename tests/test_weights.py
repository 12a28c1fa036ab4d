"""What is wrong with a model's weights is found in their headers, before anything is loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.model import embedded, lookup, weights
from helpers.model.weights import INDEX
from tests.test_models import refused

HEADER = b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}'
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + b"1234"


def folder_of(path: Path, config: dict, **files: list[str]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        save_file({tensor: np.zeros(1) for tensor in tensors}, path / f"{name}.safetensors")
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (WHOLE + b"5", "75 bytes long, its header says 74"),
        (WHOLE[:20], "20 bytes, its header alone would take 62"),
        (bytes(100), "100 bytes, its header is zeros"),
        (b"", "0 bytes, too short for a header"),
        ((5).to_bytes(8, "little") + b"12345", "its header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a note of Git LFS"),
        (b"PK\3\4" + bytes(96), "a pickle under another name"),
        (b"<html>Sign in to continue</html>", "a web page"),
    ],
    ids=["long", "cut in header", "zeros", "empty", "no JSON", "LFS", "pickle", "page"],
)
def test_a_file_that_is_not_whole_is_refused_and_named(tmp_path, content, said):
    folder = folder_of(tmp_path / "a model", {"model_type": "llama"})
    (folder / "model.safetensors").write_bytes(content)
    assert said in refused(folder, "is damaged", "damaged-weights").evidence


# -- the index ---------------------------------------------------------------------------------------------


def test_a_file_without_a_tensor_that_the_index_says_it_holds(tmp_path):
    folder = folder_of(tmp_path / "model", {"model_type": "llama"}, one=["a", "b"], two=["c"])
    index = {"weight_map": {"a": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    said = r"lacks d in two\.safetensors, which its index names"
    refused(folder, said, "missing-weights")
    del index["weight_map"]["d"]
    (folder / INDEX).write_text(json.dumps(index))
    lookup.resolve(str(folder))


def test_an_index_that_names_a_file_elsewhere(tmp_path):
    """vLLM reads the files beside the index only."""
    folder = folder_of(tmp_path / "model", {"model_type": "llama"}, one=["a"])
    folder_of(folder / "sub", {}, two=["b"])
    index = {"weight_map": {"a": "one.safetensors", "b": "sub/two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    said = r"lacks sub/two\.safetensors, .* beside it"
    refused(folder, said, "missing-weights")


def test_a_link_whose_file_is_gone(tmp_path):
    folder = folder_of(tmp_path / "model", {"model_type": "llama"})
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    said = f"a link to {tmp_path}/gone, No such file"
    refused(folder, said, "damaged-weights")


# -- matrices that a layer needs ----------------------------------------------------------------------------


def layers(count: int, kind: str = "weight", start: int = 0) -> list[str]:
    kinds = {module: "weight" if module.endswith("layernorm") else kind for module in weights.LAYER}
    return [f"model.layers.{n}.{m}.{kinds[m]}" for n in range(start, start + count) for m in kinds]


def whole(count: int, kind: str = "weight") -> list[str]:
    return ["model.embed_tokens.weight", *layers(count, kind), "model.norm.weight"]


LLAMA = {"model_type": "llama", "num_hidden_layers": 3}
TIED, UNTIED = LLAMA | {"tie_word_embeddings": True}, LLAMA | {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("config", "names", "gone", "missing"),
    [
        (LLAMA, whole(3), "1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
        (LLAMA, whole(3), ".o_proj", "model.layers.0.self_attn.o_proj.weight, model.layers.1"),
        (LLAMA, whole(3), "layers.2", "model.layers.2.input_layernorm.weight, model.layers.2.self_attn"),
        (LLAMA, whole(3), "model.norm", "model.norm.weight"),
        (UNTIED, [*whole(3), "lm_head.weight"], "lm_head", "lm_head.weight"),
        (LLAMA, whole(3, "qweight"), "2.mlp.gate_proj", "model.layers.2.mlp.gate_proj.weight"),
    ],
)  # fmt: skip
def test_a_matrix_that_no_file_has_is_named(tmp_path, config, names, gone, missing):
    half = len(names) // 2  # in two files, so that a layer's matrices lie apart
    kept = [[name for name in names[a:b] if gone not in name] for a, b in ((0, half), (half, None))]
    folder = folder_of(tmp_path / "model", config, one=kept[0], two=kept[1])
    said = f"{missing}.*would start without a word and answer nonsense"
    refused(folder, said, "missing-weights")


WHOLE_MODELS = {
    "embeddings that are tied": (TIED, whole(3)),
    "packed, and one layer left in 16 bits": (LLAMA, whole(2, "weight_packed") + layers(1, start=2)),
    "a class that we do not know": ({"model_type": "something-new", "num_hidden_layers": 3}, whole(2)),
    "fused already": (LLAMA, [f"model.layers.0.{name}.weight" for name in ("input_layernorm", "x.qkv_proj")]),
    "Mistral's own names": (LLAMA, [f"layers.0.attention.w{letter}.weight" for letter in "qkvo"]),
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
