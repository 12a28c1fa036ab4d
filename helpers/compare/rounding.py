"""What rounding does to one weight matrix: the formats' grids, and the error each way of scaling leaves.

Only for looking at; the checkpoints are made by llm-compressor and run by vLLM's kernels.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np


def _stored(folder: Path) -> dict[str, Callable]:
    """By name what reads each tensor of a safetensors folder."""
    from safetensors import safe_open

    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: functools.partial(file.get_tensor, name) for file in files for name in file.keys()}  # noqa: SIM118


def tensor(folder: Path, name: str) -> np.ndarray:
    """Return one stored tensor of a safetensors folder as float32; a weight matrix is (outputs, inputs)."""
    return _stored(folder)[name]().float().numpy()


def grid(form: str) -> np.ndarray:
    """Return all values a format has, from its smallest to its largest, scaled so that the largest is 1.

    ``e4m3`` is FP8 with 4 exponent and 3 mantissa bits (largest 448); ``int8`` and ``int4`` are evenly
    spaced.
    """
    if form == "e4m3":
        import torch

        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        every = np.unique(every[np.isfinite(every)])
        return every / every.max()
    steps = {"int8": 127, "int4": 7}[form]
    return np.arange(-steps, steps + 1) / steps


def rounded(matrix: np.ndarray, form: str, share: str | int) -> np.ndarray:
    """Round a matrix to a format's grid; ``share`` says which weights share one scale.

    ``tensor``: all of them; ``channel``: those of one output (a row); a number: that many neighbours
    in a row.
    """
    values, shape = grid(form), matrix.shape
    rows = {"tensor": (1, -1), "channel": (shape[0], -1)}.get(share, (-1, share))
    blocks = matrix.reshape(rows)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    scale[scale == 0] = 1.0
    middle = (values[1:] + values[:-1]) / 2
    return (values[np.searchsorted(middle, blocks / scale)] * scale).reshape(shape)


def relative_error(matrix: np.ndarray, form: str, share: str | int) -> float:
    """Return the size of what rounding changed over the size of the matrix (Frobenius norms)."""
    return float(np.linalg.norm(rounded(matrix, form, share) - matrix) / np.linalg.norm(matrix))


def example(folder: Path) -> str:
    """Return the name of one matrix to look at: the last of the MLP in the block a third of the way up."""
    names = [name for name in _stored(folder) if ".mlp." in name and name.endswith("weight")]
    blocks = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    block = f".{blocks[len(blocks) // 3]}."
    inside = [name for name in names if block in name]
    return next((name for name in inside if "down_proj" in name or "fc2" in name), inside[-1])


def activations(folder: Path, matrix: str, text: str, tokens: int = 256) -> np.ndarray:
    """Return what goes into one matrix while the model reads ``text``: shape (tokens, inputs), float32.

    Runs the model with transformers, on the CPU, up to and including the matrix's block.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    block = next(int(part) for part in matrix.split(".") if part.isdigit())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text[: 10 * tokens], add_special_tokens=False, return_tensors="pt")[:, :tokens]
    logging.set_verbosity_error()  # it would list the blocks above, which are left out
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=block + 1)
    seen = []
    layer = model.get_submodule(matrix.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy().copy()))
    with torch.inference_mode():
        model(ids)
    return seen[0]


def anatomy(folder: Path, layer: str) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Return what a checkpoint stores of one layer: shape, type and bytes by the tensor's last name.

    Raises:
        KeyError: it stores nothing under that name.
    """
    found = {}
    for name, read in _stored(folder).items():
        if name.startswith(f"{layer}."):
            one = read()
            kind = str(one.dtype).removeprefix("torch.")
            found[name.removeprefix(f"{layer}.")] = (tuple(one.shape), kind, one.nbytes)
    if not found:
        raise KeyError(f"{folder.name} stores nothing of {layer}.")
    return found


def awq_scales(original: Path, quantized: Path, norm: str) -> np.ndarray:
    """Return what AWQ multiplied the weights of each input channel by: it divided the norm before by that.

    Args:
        norm: the normalisation's weight, such as ``model.layers.9.post_attention_layernorm.weight``;
            it is stored in 16 bits on both sides, so the ratio is the scale.
    """
    return tensor(original, norm) / tensor(quantized, norm)
