"""llm-compressor's recipes: programs in ``recipes/`` that the lessons show, run in a process of their own."""

import ast
import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers.base import processes
from helpers.base.files import MANIFEST


@dataclass(frozen=True)
class Recipe:
    """What a recipe's checkpoint is: its ``preset`` and ``packing``, as compressed-tensors calls them.

    ``arguments`` are what its program takes after the source and the target: those with a ``group`` have one
    scale for a group of weights. FP8 and INT8 store one for an output channel and leave the activations' to
    the engine, which takes them from each token as it comes.

    ``scaling``: it scales channels before the rounding, which takes text to see the outliers in, and a list
    of layers that allow it; llm-compressor has these lists in a folder of that name. Published W8A8
    checkpoints have SmoothQuant of strength 0.8, too, and mostly GPTQ after it, which is left out here: at 8
    bits a weight the activations are what costs quality.
    """

    preset: str
    packing: str
    arguments: tuple[str, ...] = ()
    scaling: str | None = None


RECIPES = {
    "awq": Recipe("W4A16_ASYM", "pack-quantized", ("group", "samples", "tokens", "strengths"), "awq"),
    "rtn": Recipe("W4A16_ASYM", "pack-quantized", ("group",)),
    "int8": Recipe("W8A8", "int-quantized", ("samples", "tokens"), "smoothquant"),
    "fp8": Recipe("FP8_DYNAMIC", "float-quantized"),
}

# Samples x tokens of calibration, and how many strengths of scaling AWQ tries for each layer. On a CPU
# a quarter of llm-compressor's 20 strengths: the embedded model's mean KL is 0.153 nats (10: 0.150).
EFFORT = {
    "cpu": {"samples": 8, "tokens": 256, "strengths": 5},
    "cuda": {"samples": 128, "tokens": 512, "strengths": 20},
}


def known_classes(recipe: str) -> set[str]:
    """Return the model classes a calibrated recipe is known to suit.

    Read from the source of llm-compressor's registries of mappings: importing them takes 8 seconds.
    """
    package = Path(importlib.util.find_spec("llmcompressor").origin).parent
    nodes = []
    for file in sorted((package / "modifiers/transform" / RECIPES[recipe].scaling).glob("*.py")):
        nodes += ast.parse(file.read_text(encoding="utf-8")).body
    registries = [node.value for node in nodes if isinstance(node, ast.AnnAssign)]
    return {key.value for found in registries if isinstance(found, ast.Dict) for key in found.keys}


def script(recipe: str) -> str:
    """The program that a lesson shows, which makes a checkpoint: ``python fp8.py SOURCE TARGET ...``."""
    return Path(__file__).with_name("recipes").joinpath(f"{recipe}.py").read_text(encoding="utf-8")


def child_main(owner: int, source: Path, target: Path, settings: dict) -> None:
    """Run the recipe's program on ``source``; the result is in ``target``. One line of output a step."""
    processes.end_with(owner)  # who would rename the result if the parent is gone?
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        # llm-compressor pins memory for an accelerator without asking for one, and torch then raises.
        IntermediatesCache.pin_memory = lambda *_: None
    print("step: quantizing", flush=True)
    recipe, have = settings["recipe"], (settings["calibration"] or {}) | {"group": settings["group_size"]}
    sys.argv = [recipe, str(source), str(target), *(str(have[name]) for name in RECIPES[recipe].arguments)]
    exec(compile(settings["script"], f"{recipe}.py", "exec"), {"__name__": "__main__"})
    for path in source.iterdir():  # the tokenizer as it was, to the byte: the same text, the same tokens
        wanted = path.suffix in (".json", ".jinja", ".model", ".txt") and "safetensors" not in path.name
        own = path.name.startswith(("config", "generation_config")) and (target / path.name).exists()
        if wanted and not own and path.name != MANIFEST:
            shutil.copyfile(path, target / path.name)


def quantization_config(recipe: str, group_size: int | None) -> dict:
    """Return what a checkpoint of this recipe says of itself in ``config.json``, without making one."""
    from compressed_tensors.quantization import QuantizationConfig

    preset, packing = RECIPES[recipe].preset, RECIPES[recipe].packing
    kept = {"ignore": ["lm_head"], "format": packing, "quantization_status": "compressed"}
    config = QuantizationConfig(config_groups={preset: ["Linear"]}, **kept)
    config.config_groups[preset].format = packing
    if group_size:
        config.config_groups[preset].weights.group_size = group_size
    return config.model_dump(mode="json")


if __name__ == "__main__":
    child_main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
