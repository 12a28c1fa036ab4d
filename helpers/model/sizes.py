"""The bytes of a model's weights under each scheme, predicted from its configuration."""

from pathlib import Path

from helpers.base.machine import Machine
from helpers.model import schemes
from helpers.model.formats import Format, Rule, stored_bytes
from helpers.model.layout import MATRICES, Layout, read
from helpers.model.schemes import BF16_ISA, Scheme, SchemeError, Way

GROUP_SIZES = (128, 64, 32)


def layout(folder: Path) -> Layout:
    """Count a model's weights and caches from its ``config.json`` alone: nothing is loaded.

    Raises:
        LayoutError: it cannot be counted; the message says why.
    """
    return read((folder / "config.json").read_text())


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


def format_of(scheme: Scheme, counts: Layout, way: Way | None = None) -> Rule:
    """How a scheme stores this model's matrices; with ``way`` as that keeps them in memory.

    Raises:
        SchemeError: no usual group size divides the model's widths.
    """
    if scheme.weight_bits == 16 or (way and way.expanded):
        return lambda _: None
    each = (way.group_bytes if way else None) or scheme.group_bytes
    group = (scheme.group or group_size(counts.widths)) if scheme.group_bytes else 0
    format = Format(scheme.weight_bits, channel=scheme.channel_bytes, group=group, group_bytes=each)
    return lambda one: format if one.part in MATRICES else None


def predicted_weights_bytes(scheme_name: str, folder: Path) -> int:
    """Bytes the weights should take under a scheme, from the model's config alone.

    Scales and zero points are included; unquantized parts (embedding, head, norms, routers, towers) stay at
    2 bytes a weight.

    Raises:
        LayoutError, SchemeError: the config, or the scheme for it, cannot be counted.
    """
    counts = layout(folder)
    return stored_bytes(counts.tensors, format_of(schemes.scheme(scheme_name), counts))


def held_weights_bytes(scheme_name: str, folder: Path, machine: Machine) -> int:
    """Bytes the weights should take in this machine's memory, which is not always what the file has.

    A CPU without BF16 kernels widens them. One that has kernels for the type repacks every matrix in the
    original's place, but of the embedding and of the head it keeps the original and a repacked copy. Where
    both are one table, that is repacked twice.

    Not counted: on a GPU, rounding while loading can keep up to 20 MiB more for a layer, by its matrices'
    sizes. vLLM loads with torch's max_split_size_mb=20, so a larger block that a 16-bit matrix left is used
    whole.
    On an H200 that was nothing for Mistral-7B, 2.1 % for Phi-2, and 5.9 % for Qwen2.5-14B.

    Raises:
        SchemeError: the machine does not run the scheme.
    """
    scheme, counts = schemes.scheme(scheme_name), layout(folder)
    way = scheme.way(machine)
    stored = stored_bytes(counts.tensors, format_of(scheme, counts, way), way.plain_bytes)
    table, head = counts.count("embedding"), counts.count("head")
    copies = table + (head or table) if _repacks(machine, way) else 0
    return stored + way.plain_bytes * copies


def _repacks(machine: Machine, way: Way) -> bool:
    """Whether vLLM gives this CPU's plain matrices to oneDNN.

    Source: dispatch_cpu_unquantized_gemm; vocab_parallel_embedding.py calls it with remove_weight=False.
    """
    return machine.kind == "cpu" and (way.args.get("dtype") == "float32" or bool(machine.isa & BF16_ISA))
