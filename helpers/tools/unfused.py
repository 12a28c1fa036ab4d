"""An experiment, not a setting: an engine whose activation and rounding to FP8 Inductor fuses, not vLLM.

With static scales vLLM calls a hand-written kernel for SiLU, product and rounding, and no argument turns
that off. To time what it costs, this module takes the kernel out of vLLM's table when its worker imports it
(``worker_extension_cls``); the layer then does the three steps plainly and Inductor makes one kernel of them.
It reaches into vLLM 0.32's own parts and is for ``helpers.tuning`` alone.
"""

from __future__ import annotations

from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

from helpers.engine.probe import Probe

for producer in [key for key in fused_act_quant._FUSED_ACT_QUANT if key[1] == kFp8StaticTensorSym]:
    del fused_act_quant._FUSED_ACT_QUANT[producer]


class Unfused(Probe):
    """The probe of every engine here; importing its module did the rest."""
