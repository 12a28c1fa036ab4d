"""Rounding one matrix, against torch's own FP8 and against the worst a step can do."""

import numpy as np
import pytest
import torch

from helpers.compare import rounding
from helpers.model import embedded

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((64, 128)).astype(np.float32)


def test_the_grids_have_the_formats_values():
    e4m3 = rounding.grid("e4m3")
    assert len(e4m3) == 253  # 256 less two NaNs, and the two zeros are one
    assert e4m3.max() == -e4m3.min() == 1.0
    assert (rounding.grid("int4") * 7).tolist() == list(range(-7, 8))
    assert len(rounding.grid("int8")) == 255


def test_fp8_rounding_is_torchs_own():
    scale = np.abs(MATRIX).max() / 448
    expected = torch.from_numpy(MATRIX / scale).to(torch.float8_e4m3fn).float().numpy() * scale
    assert np.mean(~np.isclose(rounding.rounded(MATRIX, "e4m3", "tensor"), expected)) < 0.001  # ties


@pytest.mark.parametrize(("form", "steps"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("share", ["tensor", "channel", 32])
def test_no_weight_moves_further_than_half_a_step(form, steps, share):
    blocks = {"tensor": (1, -1), "channel": (64, -1), 32: (-1, 32)}[share]
    moved = np.abs(rounding.rounded(MATRIX, form, share) - MATRIX).reshape(blocks)
    half = np.abs(MATRIX.reshape(blocks)).max(axis=1, keepdims=True) / steps / 2
    assert (moved <= half * 1.0001).all()


def test_fewer_weights_to_a_scale_leave_less_error():
    outlier = MATRIX.copy()
    outlier[3, 5] = 40.0
    tensor, channel, group = (rounding.relative_error(outlier, "int4", s) for s in ("tensor", "channel", 32))
    assert tensor > channel > group
    assert rounding.relative_error(MATRIX, "int8", "channel") < rounding.relative_error(
        MATRIX, "e4m3", "channel"
    )


def test_zeros_stay_zeros():
    assert not rounding.rounded(np.zeros((4, 8), np.float32), "int4", 4).any()


def test_the_activations_are_those_of_the_layer_in_the_whole_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.prepare()
    name = rounding.example(folder)
    assert name == "model.layers.10.mlp.down_proj.weight"
    text = "The quick brown fox jumps over the lazy dog. " * 3
    found = rounding.activations(folder, name, text, tokens=12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder).encode(text, return_tensors="pt")[:, :12]
    layer, seen = model.get_submodule(name.removesuffix(".weight")), []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy()))
    with torch.inference_mode():
        model(ids)
    assert found.shape == (12, 1536)
    assert found == pytest.approx(seen[0], abs=1e-4)
