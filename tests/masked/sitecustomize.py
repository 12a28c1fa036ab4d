"""On the path of what ``tests.kinds`` starts: what ONEDNN_MAX_CPU_ISA hides is hidden from vLLM as well.

vLLM asks torch which instructions the CPU has, and by that loads its build for AVX2 or AVX-512, and kernels.
"""

import importlib.abc
import importlib.util
import os
import sys

HIDDEN = {"AVX2": ("avx512", "amx"), "AVX512_CORE_BF16": ("amx",)}.get(
    os.environ.get("ONEDNN_MAX_CPU_ISA"), ()
)


class Mask(importlib.abc.MetaPathFinder):
    """Has ``torch.cpu``, when it has been imported, leave the hidden capabilities out."""

    def find_spec(self, name, path, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def masked(module):
            run(module)
            whole = module.get_capabilities
            module.get_capabilities = lambda: {
                key: value and not key.startswith(HIDDEN) for key, value in whole().items()
            }

        spec.loader.exec_module = masked
        return spec


if HIDDEN:
    sys.meta_path.insert(0, Mask())
