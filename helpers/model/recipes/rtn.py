import sys

from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

source, target, group = sys.argv[1:]
scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
scheme.weights.group_size = int(group)
oneshot(
    model=source,
    recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    output_dir=target,
)
