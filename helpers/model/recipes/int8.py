import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.model.text import calibration_data

source, target, samples, tokens = sys.argv[1:]
stored = AutoConfig.from_pretrained(source).dtype
dtype = stored if torch.accelerator.is_available() else torch.float32  # a CPU may be slow in BF16
model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(source)
oneshot(
    model=model,
    recipe=[
        SmoothQuantModifier(smoothing_strength=0.8),  # moves outliers of activations into the weights
        QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ],
    dataset=calibration_data(tokenizer, int(samples), int(tokens)),
)
model.to(stored).save_pretrained(target)
tokenizer.save_pretrained(target)
