"""What a model's safetensors files hold, read from their headers alone: whole, complete, or what is wrong.

A header takes milliseconds to read where loading takes minutes, and a wrong file is a worse message then,
or none: vLLM 0.32 does not miss a linear layer's weights (``track_weights_loading`` in
vllm/model_executor/model_loader/default_loader.py leaves them out), so a checkpoint without an ``up_proj``
starts, and answers nonsense.

Source: the safetensors format, 8 bytes with the length of the header, the header as JSON, the tensors.
"""

import json
from pathlib import Path

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses more, too


class Damaged(ValueError):
    """A file that is no whole safetensors file; the message says what it is instead."""


def header(path: Path) -> dict[str, dict]:
    """Return a safetensors file's tensors by name: their type, shape and place.

    Raises:
        Damaged: the file is cut off, overwritten, or of another kind.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begins = file.read(8)
            length = int.from_bytes(begins, "little")
            text = file.read(length) if length <= min(size, LONGEST_HEADER) else b""
    except OSError as error:
        link = f" a link to {path.readlink()}," if path.is_symlink() else ""
        raise Damaged(f"{path.name} is damaged:{link} {error.strerror}.") from None
    try:
        tensors = {name: tensor for name, tensor in json.loads(text).items() if name != "__metadata__"}
        wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise Damaged(f"{path.name} is damaged: {size:,} bytes, {_instead(begins, size)}.") from None
    if size != wanted:
        raise Damaged(f"{path.name} is damaged: {size:,} bytes long, its header says {wanted:,}.")
    return tensors


# What a file whose header cannot be read is instead, by how it begins.
_SIGNS = {
    (b"version ",): "a note of Git LFS that stands for the file: `git lfs pull` fetches it",
    (b"PK\3\4", b"\x80\2", b"\x80\4"): "a pickle under another name, which can run code when loaded",
    (b"<", b"{"): "a web page or a server's message instead of the file",
    (bytes(8),): "its header is zeros: the disk was full, or the download broke off",
}


def _instead(begins: bytes, size: int) -> str:
    """What a file whose header cannot be read is instead, by its first eight bytes."""
    if known := next((what for signs, what in _SIGNS.items() if begins.startswith(signs)), None):
        return known
    if size < 8:
        return "too short for a header"
    if 8 + (length := int.from_bytes(begins, "little")) > size:
        return f"its header alone would take {length:,}"
    return "its header cannot be read"


def damage(folder: Path) -> list[str]:
    """Return a sentence on each safetensors file of a folder that is not whole."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[dict[str, set[str]], list[str]]:
    """The names of the tensors in each file that is whole, and a sentence on each that is not."""
    names, broken = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            names[path.name] = set(header(path))
        except Damaged as problem:
            broken.append(str(problem))
    return names, broken


def problems(folder: Path, config: dict) -> list[str]:
    """Return what is wrong with a folder's weights, a sentence each; nothing when they can be loaded.

    Files that the index names and that are not there say more than one that is cut off, so they come first;
    then whole files, the tensors that the index says they hold, and the matrices that a layer needs.
    """
    indexed: dict[str, str] = {}  # the file of each tensor, of a model in several files
    try:
        if (folder / INDEX).exists():
            named = json.loads((folder / INDEX).read_text())["weight_map"]
            indexed = {name: str(file) for name, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder} lacks a readable {INDEX}, which its index names."]
    names, broken = _read(folder)
    have = {path.name for path in folder.glob("*.safetensors")}
    if gone := sorted({*indexed.values()} - have):
        return [f"{folder} lacks {_some(gone)}, which its index names: files are read that lie beside it."]
    if broken:
        return broken
    if lacking := sorted(f"{name} in {file}" for name, file in indexed.items() if name not in names[file]):
        return [f"{folder} lacks {_some(lacking)}, which its index names."]
    return _incomplete(names, config)


# -- matrices that a layer needs ----------------------------------------------------------------------------

# Every layer of these has all of these matrices. Elsewhere one may be left out on purpose: some models share
# keys between layers, some compress them, some have no gate.
PLAIN = ("llama", "mistral", "qwen2", "qwen3")
LAYER = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm",
)  # fmt: skip


def _incomplete(names: dict[str, set[str]], config: dict) -> list[str]:
    """A sentence on what a model of a plain architecture needs and no file has, the first few by name."""
    modules = {name.rpartition(".")[0] for name in set().union(*names.values())}
    fused = any(module.endswith(("qkv_proj", "gate_up_proj")) for module in modules)
    if config.get("model_type") not in PLAIN or "model.layers.0.input_layernorm" not in modules or fused:
        return []  # another naming, such as Mistral's own, or one we do not know
    layers = range(config.get("num_hidden_layers", 0))
    wanted = ["model.embed_tokens", *(f"model.layers.{n}.{module}" for n in layers for module in LAYER)]
    wanted += ["model.norm", *(["lm_head"] if config.get("tie_word_embeddings") is False else [])]
    lacking = [f"{module}.weight" for module in wanted if module not in modules]
    if not lacking:
        return []
    return [
        f"The weights lack {_some(lacking)}: no file has them. vLLM would start without a word and answer "
        "nonsense."
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
