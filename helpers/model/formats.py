"""How a checkpoint stores its weights: read from ``quantization_config``, and turned into bytes.

A ``Format`` says what one matrix takes. A scheme has one format for all matrices; a checkpoint that is
quantized already has what its config says, matrix by matrix (``ignore``, ``modules_to_not_convert``,
groups of layers). The names of methods are those of vLLM 0.32 (vllm/model_executor/layers/quantization).
"""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from helpers.model.layout import MATRICES, LayoutError, Tensor


@dataclass(frozen=True)
class Format:
    """What a matrix takes: ``bits`` a weight, and scales (and zero points), in bytes.

    ``channel`` is stored once an output channel, ``group_bytes`` once ``group`` weights of a channel. A scale
    of a whole matrix, or of 128 x 128 weights, is not counted: that is less than a weight in 4,000.
    """

    bits: float
    channel: float = 0
    group: int = 0
    group_bytes: float = 0

    def bytes(self, outputs: int, width: int) -> float:
        """Bytes of a matrix with so many output channels and inputs."""
        groups = math.ceil(width / self.group) if self.group else 0
        return outputs * (width * self.bits / 8 + self.channel + self.group_bytes * groups)


# What a scheme, or a checkpoint's config, says of each tensor: its format, None where it stays in 16 bits.
Rule = Callable[[Tensor], Format | None]


def stored_bytes(tensors: Iterable[Tensor], of: Rule, plain: int = 2) -> int:
    """Bytes of weights: each matrix in the format that ``of`` gives for it, the rest ``plain`` a weight."""
    total = 0.0
    for one in tensors:
        format = of(one)
        total += one.copies * format.bytes(one.outputs, one.width) if format else plain * one.size
    return round(total)


@dataclass(frozen=True)
class Quantized:
    """What a checkpoint's ``quantization_config`` says: its ``title`` for readers, the format of each matrix.

    ``kind`` is the scheme it is a file of, which decides the kernel: ``fp8_file``, ``awq``, ``int8``,
    ``nvfp4`` or ``mxfp4``. ``kv_bytes`` is 1 where it has its KV cache in 8 bits.
    """

    title: str
    kind: str
    of: Rule
    kv_bytes: int = 2


def quantized(config: dict) -> Quantized | None:
    """Read a config's ``quantization_config``; None where it has none.

    Raises:
        LayoutError: a method that is not counted here.
    """
    both = [one for one in (config, config.get("text_config")) if isinstance(one, dict)]
    found = [one.get(key) for one in both for key in ("quantization_config", "compression_config")]
    found = next(filter(None, found), None)
    if not found:
        return None
    method = isinstance(found, dict) and (found.get("quant_method") or ("quant_algo" in found and "modelopt"))
    if method == "bitsandbytes":
        raise LayoutError("vLLM 0.32 reads bitsandbytes with a plugin only (vllm-bnb-plugin).")
    reader = _READERS.get(str(method).lower())
    if reader is None:
        raise LayoutError(
            f"The checkpoint is quantized as {method or 'its config does not say'}, whose bytes are not "
            f"counted here. Counted are: {', '.join(sorted(_READERS))}."
        )
    try:
        return Quantized(*reader(found))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise LayoutError(f"The config's quantization_config ({method}) cannot be read: {error!r}.") from None


# -- the methods --------------------------------------------------------------------------------------------

_EVERYWHERE = (*MATRICES, "tower")
# What the methods call their lists of modules that stay in 16 bits.
_LEFT_OUT = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")


def _rule(format: Format, config: dict, parts=MATRICES, more=(), only=None) -> Rule:
    """One format for every matrix of ``parts`` that neither the config nor ``more`` leaves in 16 bits, and
    that ``only`` matches, if given."""
    left_out = [*more, *(str(name) for key in _LEFT_OUT for name in config.get(key) or ())]

    def of(one: Tensor) -> Format | None:
        if one.part not in parts or one.outputs == 1 or one.width == 1:
            return None
        names = _names(one)
        if _any_matches(left_out, names) or not (only is None or _any_matches(only, names)):
            return None
        return format

    return of


def _any_matches(patterns: Iterable[str], names: list[str]) -> bool:
    return any(_matches(pattern, name) for pattern in patterns for name in names)


def _names(one: Tensor) -> list[str]:
    """What a tensor may be called in a checkpoint: experts one by one, a language model under other roofs."""
    names = [one.name]
    if one.part == "experts":
        parent, _, last = one.name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("down_proj", "w2")}
        names += [parent, *(f"{parent}.0.{part}" for part in parts.get(last, (last,)))]
    under = "model.language_model."
    inner = [name.removeprefix(under) for name in names if name.startswith(under)]
    roofs = ("model", "language_model.model", "language_model")
    names += [f"{roof}.{name}" for name in inner for roof in roofs]
    if one.part == "tower":
        names += [name.removeprefix("model.") for name in names]
    return names


def _matches(pattern: str, name: str) -> bool:
    """Whether an entry of a list of modules means this one: a name, a part of it, an expression."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, pattern.rstrip("*.") + ".*")
    return f".{pattern}." in f".{name}."


def _integers(config: dict):
    """AWQ, GPTQ and AutoRound: integers in groups (-1: a channel is one), each with a scale and a zero."""
    method, bits, group = config["quant_method"].lower(), config.get("bits") or 4, config.get("group_size")
    each = 2 + bits / 8
    format = Format(bits, channel=each) if group == -1 else Format(bits, group=group, group_bytes=each)
    kept = [f"re:{pattern[2:]}" for pattern in config.get("dynamic") or () if pattern.startswith("-:")]
    extra = config.get("extra_config") or {}
    kept += [name for name, of in extra.items() if (of.get("bits") or bits) >= 16]
    parts = (*MATRICES, "head") if config.get("lm_head") else MATRICES
    title = {"awq": "AWQ", "gptq": "GPTQ", "auto-round": "AutoRound"}[method]
    return f"{title}, {bits} bits", "awq", _rule(format, config, parts, kept)


def _fp8(config: dict):
    shared = "block" if config.get("weight_block_size") else "matrix"
    return f"FP8, a scale a {shared}", "fp8_file", _rule(Format(8), config, _EVERYWHERE)


def _fbgemm(config: dict):
    return "FP8 (FBGEMM), a scale a channel", "fp8_file", _rule(Format(8, channel=4), config)


def _mxfp4(config: dict):
    return "MXFP4 experts", "mxfp4", _rule(Format(4, group=32, group_bytes=1), config, ("experts",))


_NVFP4 = Format(4, group=16, group_bytes=1)
_MODELOPT = {
    "FP8": (Format(8), "FP8 (ModelOpt), a scale a matrix", "fp8_file"),
    "FP8_PER_CHANNEL_PER_TOKEN": (Format(8, channel=4), "FP8 (ModelOpt), a scale a channel", "fp8_file"),
    "FP8_PB_WO": (Format(8), "FP8 (ModelOpt), a scale a block", "fp8_file"),
    "NVFP4": (_NVFP4, "NVFP4 (ModelOpt)", "nvfp4"),
    "NVFP4_AWQ": (_NVFP4, "NVFP4 (ModelOpt)", "nvfp4"),
    "MXFP8": (Format(8, group=32, group_bytes=1), "MXFP8 (ModelOpt)", "fp8_file"),
}


def _modelopt(config: dict):
    config = config.get("quantization") or config
    algorithm = str(config.get("quant_algo") or "").upper()
    if algorithm not in _MODELOPT:
        raise LayoutError(
            f"ModelOpt's {algorithm or 'unnamed algorithm'} is not counted here: {', '.join(_MODELOPT)} are."
        )
    format, title, kind = _MODELOPT[algorithm]
    cached = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
    return title, kind, _rule(format, config, _EVERYWHERE), 1 if cached else 2


def _compressed_tensors(config: dict):
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise LayoutError("The checkpoint is sparse as well as quantized, whose bytes are not counted here.")
    found, last = [], ("", "")
    for group in (config.get("config_groups") or {}).values():
        weights = group.get("weights")
        if weights:
            targets = None if "Linear" in group["targets"] else group["targets"]
            packed = str(group.get("format") or config.get("format"))
            format, *last = _of_weights(weights, packed, bool(group.get("input_activations")))
            found.append(_rule(format, config, _EVERYWHERE, only=targets))
    if not found:
        raise LayoutError("The checkpoint's config_groups name no weights, so its bytes cannot be counted.")

    def of(one: Tensor) -> Format | None:
        return next(filter(None, (rule(one) for rule in found)), None)

    return last[0], last[1], of, 1 if config.get("kv_cache_scheme") else 2


def _of_weights(weights: dict, packed: str, rounds_inputs: bool) -> tuple[Format, str, str]:
    """A group's format, title and kind. Scales are stored in 16 bits, those of NVFP4 and MXFP4 in 8."""
    bits, strategy = int(weights["num_bits"]), weights.get("strategy") or "tensor"
    group, floats = weights.get("group_size") or 0, weights.get("type") == "float"
    zero = 0 if weights.get("symmetric", True) else bits / 8
    if "fp4" in packed or (floats and bits == 4):
        name = "mxfp4" if "mxfp4" in packed or group == 32 else "nvfp4"
        return Format(4, group=group, group_bytes=1), name.upper(), name
    name = "FP8" if floats else f"INT{bits}"
    kind = "fp8_file" if floats else "int8" if bits == 8 and rounds_inputs else "awq"
    format, shared = {
        "group": (Format(bits, group=group, group_bytes=2 + zero), f"groups of {group}"),
        "block": (Format(bits), "a scale a block"),
        "channel": (Format(bits, channel=2 + zero), "a scale a channel"),
        "tensor": (Format(bits), "a scale a matrix"),
    }[strategy]
    return format, f"{name}, {shared}", kind


_READERS = {
    "awq": _integers,
    "gptq": _integers,
    "auto-round": _integers,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "compressed-tensors": _compressed_tensors,
}
