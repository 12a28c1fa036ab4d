"""The table of schemes: which way a machine takes, and the bytes predicted from a config alone."""

import pytest
from safetensors import safe_open

from helpers.base.machine import GIB, Machine
from helpers.engine.engine import resolve_checkpoint
from helpers.model import embedded, schemes
from helpers.model import shapes as shapes_module
from helpers.model.schemes import SchemeError
from helpers.model.sizes import (
    group_size,
    held_weights_bytes,
    layout,
    predicted_weights_bytes,
)
from tests.conftest import named


def gpu(sm: float) -> Machine:
    return Machine(kind="cuda", name=f"SM {sm}", memory_bytes=16 * GIB, sm=sm)


def cpu(*isa: str) -> Machine:
    return Machine(kind="cpu", name="a CPU", memory_bytes=16 * GIB, isa=frozenset(isa))


@pytest.mark.parametrize(
    ("scheme", "machine", "way", "argument"),
    [
        ("baseline", gpu(7.5), "FP16 tensor cores", "float16"),
        ("baseline", gpu(8.0), "BF16 tensor cores", "bfloat16"),
        ("baseline", gpu(12.0), "BF16 tensor cores", "bfloat16"),
        ("baseline", cpu("amx_bf16", "avx512f"), "BF16 with AMX tiles", "bfloat16"),
        ("baseline", cpu("avx512f", "avx2"), "BF16 with AVX-512", "bfloat16"),
        ("baseline", cpu("avx2"), "FP32, weights widened once", "float32"),
        ("fp8", gpu(8.9), "FP8 tensor cores, a scale a channel", "fp8_per_channel"),
        ("fp8", gpu(8.0), "FP8 weights, 16-bit arithmetic", "fp8_per_tensor"),
        ("fp8", cpu("amx_bf16"), "FP8 weights, BF16 arithmetic in AMX tiles", "fp8_per_block"),
        ("fp8_file", cpu("amx_bf16"), "FP8 emulated", "bfloat16"),
        ("fp8", cpu("avx512f"), "FP8 emulated", "fp8_per_channel"),
        ("awq", gpu(7.5), "W4A16 kernel on tensor cores (Marlin)", "auto"),
        ("awq", cpu("avx2", "avx512f"), "W4A16 kernel of the CPU (CPUWNA16)", "bfloat16"),
        ("awq", cpu("avx2"), "W4A16 emulated: rounded weights written out in FP32", "float32"),
        ("awq", cpu("avx512f", "amx_bf16"), "W4A8 kernel of the CPU (CPUWNA16)", "bfloat16"),
        ("int8", cpu("avx512f", "amx_bf16"), "INT8 in vLLM's own CPU kernel", "bfloat16"),
        ("int8", cpu("avx512f"), "INT8 in oneDNN", "bfloat16"),
        ("int8", gpu(8.0), "INT8 tensor cores", "auto"),
        ("int8", cpu("avx2"), "INT8 in oneDNN", "float32"),
    ],
)
def test_a_schemes_way_follows_the_hardware(scheme, machine, way, argument):
    """Its name, and what vLLM quantizes to; the number format where it does not quantize."""
    taken = schemes.scheme(scheme).way(machine)
    assert taken.name == way
    assert taken.args.get("quantization", taken.args["dtype"]) == argument


def test_a_cpu_with_amx_multiplies_four_bits_in_eight_and_keeps_more_for_each_group():
    """With AMX vLLM's kernel is W4A8: 9 bytes for a group's scale and zero point instead of 2.5."""
    folder = shapes_module.shape("mistral-7b").folder
    bits, held = {}, {}
    for isa in ("avx512f", "amx_bf16"):
        bits[isa] = schemes.scheme("awq").way(cpu(isa)).arithmetic_bits
        held[isa] = held_weights_bytes("awq", folder, cpu(isa))
    assert bits == {"avx512f": 16, "amx_bf16": 8}
    groups = layout(folder).linear / 128
    assert held["amx_bf16"] - held["avx512f"] == pytest.approx(6.5 * groups)


@pytest.mark.parametrize(
    ("scheme", "machine", "said"),
    [
        ("baseline", gpu(6.1), r"does not run on SM 6\.1: .* no GPU before Turing"),
        ("int8", gpu(12.0), "refuses Blackwell"),
        ("fp8_kv", cpu("avx2"), "AVX-512 or AMX on a CPU"),
        ("int8_fp8_kv", gpu(12.0), "refuses Blackwell.* needs SM 8.0"),
    ],
)
def test_a_machine_that_does_not_run_a_scheme_is_told_why(scheme, machine, said):
    with pytest.raises(SchemeError, match=said) as caught:
        schemes.scheme(scheme).way(machine)
    named(caught.value, "no-kernel-for-format")


def test_bytes_under_a_scheme_count_scales_and_what_stays_in_16_bits():
    folder = embedded.prepare()
    counts = layout(folder)
    channels = sum(one.outputs for one in counts.tensors if one.part == "linear")
    rest = 2 * (counts.total - counts.linear)
    predict = predicted_weights_bytes
    assert counts.widths == (576, 1536)
    assert predict("fp8", folder) == counts.linear + 4 * channels + rest
    assert predict("awq", folder) == counts.linear // 2 + counts.linear // 64 * 5 // 2 + rest
    assert predict("awq", folder) == predict("rounded", folder) < predict("int8", folder)


def test_bytes_held_are_those_of_the_file_with_what_the_machine_adds():
    folder, avx512, avx2 = embedded.prepare(), cpu("avx2", "avx512f"), cpu("avx2")
    counts, held = layout(folder), held_weights_bytes
    for name in ("baseline", "awq", "int8", "fp8"):
        added = held(name, folder, avx512) - predicted_weights_bytes(name, folder)
        assert added == 2 * 2 * counts.count("embedding")
    assert held("fp8", folder, avx2) == predicted_weights_bytes("fp8", folder)
    assert held("baseline", folder, gpu(8.9)) == predicted_weights_bytes("baseline", folder)
    widened = 4 * (counts.total + 2 * counts.count("embedding"))
    assert held("baseline", folder, avx2) == held("awq", folder, avx2) == widened
    # Machete's zero points: two bytes a group where the file has half a one.
    assert held("awq", folder, gpu(9.0)) - held("awq", folder, gpu(8.0)) == 1.5 * counts.linear / 64


@pytest.mark.parametrize(("widths", "size"), [((4096, 14336), 128), ((576, 1536), 64), ((96,), 32)])
def test_the_largest_group_that_divides_every_width(widths, size):
    assert group_size(widths) == size
    with pytest.raises(SchemeError, match="no group size"):
        group_size((*widths, 100))


def test_every_way_says_why():
    assert all(way.why.endswith(".") for scheme in schemes.EVERY.values() for way in scheme.ways)


def test_a_format_that_is_not_made_here_needs_a_checkpoint():
    with pytest.raises(SchemeError, match="NVFP4 checkpoint: give a model that is one already"):
        resolve_checkpoint("embedded", "nvfp4", gpu(9.0))


def test_an_unknown_scheme_is_answered_with_those_there_are():
    with pytest.raises(SchemeError, match=r"no scheme 'int3'.*baseline"):
        schemes.scheme("int3")


def test_the_layout_is_that_of_the_file():
    folder = embedded.prepare()
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    sizes = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    counts = layout(folder)
    assert counts.total == sum(sizes.values())
    assert counts.linear == sum(size for name, size in sizes.items() if "_proj" in name)
    assert counts.count("embedding") == sizes["model.embed_tokens.weight"]
    assert counts.count("head") == 0
    assert predicted_weights_bytes("baseline", folder) == 2 * counts.total
