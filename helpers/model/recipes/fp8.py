import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

source, target = sys.argv[1:]
oneshot(
    model=source,
    recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]),
    output_dir=target,
)
