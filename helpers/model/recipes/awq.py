import sys

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.model.text import calibration_data  # yours: a few hundred of your own prompts

source, target, *numbers = sys.argv[1:]
group, samples, tokens, strengths = map(int, numbers)
stored = AutoConfig.from_pretrained(source).dtype
dtype = stored if torch.accelerator.is_available() else torch.float32  # a CPU may be slow in BF16
model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(source)

scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
scheme.weights.group_size = group
oneshot(
    model=model,
    recipe=[
        AWQModifier(n_grid=strengths),  # finds each channel's scale
        QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),  # rounds
    ],
    dataset=calibration_data(tokenizer, samples, tokens),
)
model.to(stored).save_pretrained(target)
tokenizer.save_pretrained(target)
