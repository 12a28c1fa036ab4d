"""llm-compressor's recipes, run in a process of its own."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from pathlib import Path

from helpers.base import processes
from helpers.base.files import MANIFEST
from helpers.model.text import calibration_text

# What compressed-tensors calls each recipe's format. FP8 and INT8 store one scale for an output channel
# and leave the activations' scales to the engine, which takes them from each token as it comes.
RECIPES = {"awq": "W4A16_ASYM", "rtn": "W4A16_ASYM", "int8": "W8A8", "fp8": "FP8_DYNAMIC"}

FORMATS = {
    "awq": "pack-quantized",
    "rtn": "pack-quantized",
    "int8": "int-quantized",
    "fp8": "float-quantized",
}

GROUPED = ("awq", "rtn")  # one scale for a group of weights

# These two scale channels before the rounding, which takes text to see the outliers in, and a list of
# layers that allow it; the values are llm-compressor's folders with these lists. Published W8A8
# checkpoints have SmoothQuant of strength 0.8, too, and mostly GPTQ after it, which is left out here:
# at 8 bits a weight the activations are what costs quality.
SCALED = {"awq": "awq", "int8": "smoothquant"}

SMOOTHING = 0.8

# Samples x tokens of calibration, and how many strengths of scaling AWQ tries for each layer. On a CPU
# less than llm-compressor's 20 strengths on 16 x 256 tokens, which took six minutes on two cores.
EFFORT = {
    "cpu": {"samples": 8, "tokens": 256, "strengths": 10},
    "cuda": {"samples": 128, "tokens": 512, "strengths": 20},
}


def known_classes(recipe: str) -> set[str]:
    """Return the model classes a calibrated recipe is known to suit.

    Read from the source of llm-compressor's registries of mappings: importing them takes 8 seconds.
    """
    package = Path(importlib.util.find_spec("llmcompressor").origin).parent
    nodes = []
    for file in sorted((package / "modifiers/transform" / SCALED[recipe]).glob("*.py")):
        nodes += ast.parse(file.read_text(encoding="utf-8")).body
    registries = [node.value for node in nodes if isinstance(node, ast.AnnAssign)]
    return {key.value for found in registries if isinstance(found, ast.Dict) for key in found.keys}


def child_main(owner: int, source: Path, target: Path, settings: dict) -> None:
    """Quantize ``source`` into ``target``; one line of output a step."""
    processes.end_with(owner)  # who would rename the result if the parent is gone?
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():
        # llm-compressor pins memory for an accelerator without asking for one, and torch then raises.
        IntermediatesCache.pin_memory = lambda *_: None
    print("step: loading the model", flush=True)
    dtype = AutoConfig.from_pretrained(source, trust_remote_code=False).dtype
    stored = dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    computed = torch.float32 if settings["arithmetic"] == "float32" else stored
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=computed, use_safetensors=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    data = {}
    if settings["calibration"]:
        print("step: calibrating", flush=True)
        data["dataset"] = _calibration_data(tokenizer, **settings["calibration"])
    oneshot(model=model, tokenizer=tokenizer, recipe=_modifiers(settings), **data)
    print("step: saving", flush=True)
    if computed != stored:
        model.to(stored)  # before it is packed: the integers are rounded with the scales that are stored
    model.save_pretrained(target)
    for path in source.iterdir():  # the tokenizer as it was, to the byte: the same text, the same tokens
        wanted = path.suffix in (".json", ".jinja", ".model", ".txt") and "safetensors" not in path.name
        if wanted and path.name != MANIFEST and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _modifiers(settings: dict) -> list:
    """llm-compressor's recipe. AWQ and SmoothQuant only rescale; the rounding is then the same as without."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    scheme = _scheme(settings["recipe"], settings["group_size"])
    rounding = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    match settings["recipe"]:
        case "awq":
            return [AWQModifier(n_grid=settings["calibration"]["strengths"]), rounding]
        case "int8":
            return [SmoothQuantModifier(smoothing_strength=settings["calibration"]["smoothing"]), rounding]
    return [rounding]


def _scheme(recipe: str, group_size: int | None):
    """compressed-tensors' description of a recipe's format."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(RECIPES[recipe], ["Linear"])
    if group_size:
        scheme.weights.group_size = group_size
    return scheme


def quantization_config(recipe: str, group_size: int | None) -> dict:
    """Return what a checkpoint of this recipe says of itself in ``config.json``, without making one."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    form, scheme = FORMATS[recipe], _scheme(recipe, group_size)
    scheme.format = form
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format=form,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return config.model_dump(mode="json")


def _calibration_data(tokenizer, text: str, samples: int, tokens: int, **_):
    """Samples of ``tokens`` tokens, evenly spread over the calibration text: a DataLoader, one at a time."""
    import torch

    found, name = calibration_text()
    assert name == text, f"the calibration text is {name}, not {text}"
    ids = torch.tensor(tokenizer.encode(found, add_special_tokens=False))
    starts = torch.linspace(0, len(ids) - tokens, samples).long().tolist()
    windows = [{"input_ids": ids[start : start + tokens]} for start in starts]
    return torch.utils.data.DataLoader(windows, batch_size=1)
