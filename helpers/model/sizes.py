"""The bytes of a model's weights under each scheme, predicted from its configuration."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from helpers.base.machine import Machine
from helpers.model import schemes
from helpers.model.schemes import BF16_ISA, Scheme, SchemeError, Way


@dataclass(frozen=True)
class Layout:
    """A model's parameters by where they stand, in numbers of weights (not bytes).

    ``linear`` are the matrices of the transformer blocks, which schemes quantize; ``embedding`` the
    token table, ``head`` the output matrix (0 when it is the embedding again), ``other`` norms and
    biases. None of the last three is quantized. ``channels`` is the number of output channels of the
    quantized matrices together, ``widths`` their different input widths, which a group size must divide.
    """

    linear: int
    embedding: int
    head: int
    other: int
    channels: int = 0
    widths: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All weights that are stored; a tied head counts once."""
        return self.linear + self.embedding + self.head + self.other


def layout(folder: Path) -> Layout:
    """Count a model's weights from its ``config.json`` alone: nothing is loaded.

    transformers builds the architecture on the ``meta`` device, where tensors have shapes and no data.
    """
    return _layout((folder / "config.json").read_text())


@functools.lru_cache(maxsize=32)
def _layout(config_text: str) -> Layout:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(config_text)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = head is embedding or config.tie_word_embeddings
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight is not head
    ]
    linear = sum(matrix.numel() for matrix in matrices)
    total = sum(parameter.numel() for parameter in model.parameters())  # counts a shared one once
    counted_head = 0 if tied else head.numel()
    return Layout(
        linear=linear,
        embedding=embedding.numel(),
        head=counted_head,
        other=total - linear - embedding.numel() - counted_head,
        channels=sum(matrix.shape[0] for matrix in matrices),
        widths=tuple(sorted({matrix.shape[1] for matrix in matrices})),
    )


GROUP_SIZES = (128, 64, 32)


def group_size(widths: tuple[int, ...], wanted: int | None = None) -> int:
    """Return the largest usual group size that divides every input width, or ``wanted`` if that does.

    Raises:
        SchemeError: none does, or ``wanted`` is not a usual size.
    """
    if wanted is not None and wanted not in GROUP_SIZES:
        raise SchemeError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, not {wanted!r}.")
    sizes = (wanted,) if wanted else GROUP_SIZES
    for size in sizes:
        if all(width % size == 0 for width in widths):
            return size
    raise SchemeError(
        f"The layers are {', '.join(map(str, widths))} wide: no group size of "
        f"{', '.join(map(str, sizes))} divides all of these. Use fp8 or int8, which have one scale for each "
        "output channel."
    )


def predicted_weights_bytes(scheme_name: str, folder: Path) -> int:
    """Bytes the weights should take under a scheme, from the model's config alone.

    Scales and zero points are included; unquantized parts (embedding, head, norms) stay at 2 bytes a
    weight.
    """
    return _weights_bytes(schemes.scheme(scheme_name), layout(folder), 2)


def held_weights_bytes(scheme_name: str, folder: Path, machine: Machine) -> int:
    """Bytes the weights should take in this machine's memory, which is not always what the file has.

    A CPU without BF16 kernels widens them. One that has kernels for the type repacks every matrix and
    drops the original, except of the embedding and the head, which both stay as they were, too.

    On a GPU, rounding while loading can keep up to 20 MiB more for a layer, depending on the matrices' sizes:
    vLLM loads with torch's max_split_size_mb=20, so a larger block that a 16-bit matrix left is used whole.
    Measured on an H200: 0.0 % more for Mistral-7B in FP8, 2.1 % for Phi-2, 5.9 % for Qwen2.5-14B.
    Large blocks come in multiples of 2 MiB besides: 2.2 % more for Phi-2 in INT8.

    Raises:
        SchemeError: the machine does not run the scheme.
    """
    counts, way = layout(folder), schemes.scheme(scheme_name).way(machine)
    twice = counts.embedding + (counts.head or counts.embedding) if _repacks(machine, way) else 0
    return single_weights_bytes(scheme_name, folder, machine) + way.plain_bytes * twice


def single_weights_bytes(scheme_name: str, folder: Path, machine: Machine) -> int:
    """The same, each weight counted once: what may have to be read for a token.

    Raises:
        SchemeError: the machine does not run the scheme.
    """
    rule, counts = schemes.scheme(scheme_name), layout(folder)
    way = rule.way(machine)
    if way.expanded or rule.weight_bits == 16:
        return way.plain_bytes * counts.total
    return _weights_bytes(rule, counts, way.plain_bytes, way.group_bytes)


def held(row: dict) -> int:
    """The bytes a record's weights should take where it was measured; of the file, where it says no more."""
    return row.get("held_weights_bytes") or row["predicted_weights_bytes"]


def _repacks(machine: Machine, way: Way) -> bool:
    """Whether vLLM gives this CPU's plain matrices to oneDNN. Source: dispatch_cpu_unquantized_gemm."""
    return machine.kind == "cpu" and (way.args.get("dtype") == "float32" or bool(machine.isa & BF16_ISA))


def _weights_bytes(rule: Scheme, counts: Layout, plain: int, group_bytes: float | None = None) -> int:
    groups = counts.linear / group_size(counts.widths) if rule.group_bytes else 0
    quantized = counts.linear * rule.weight_bits / 8
    scales = rule.channel_bytes * counts.channels + (group_bytes or rule.group_bytes) * groups
    return round(quantized + scales) + plain * (counts.embedding + counts.head + counts.other)
