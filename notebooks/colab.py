"""The first cell of every lesson imports this. Outside Colab it does nothing; there it prepares the runtime.

Colab opens a notebook alone: fetch the repository and go into ``notebooks`` first (OTHER_WAYS.md, "Colab").
"""

import os
import sys
from pathlib import Path

if any(name.startswith("COLAB_") for name in os.environ):  # as accelerate's is_google_colab looks for it
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    from helpers.tools import colab

    colab.prepare()
