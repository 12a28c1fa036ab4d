"""The first cell of every lesson imports this. Outside Colab it does nothing; there it prepares the runtime.

Colab opens a notebook alone: fetch the repository and go into ``notebooks`` first (OTHER_WAYS.md, "Colab").
"""

import os
import sys

if any(name.startswith("COLAB_") for name in os.environ):  # as accelerate's is_google_colab looks for it
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if root not in sys.path:
        sys.path.insert(0, root)
    from helpers.tools import colab

    colab.prepare()
