"""What a lesson's first line does in Colab: bring the runtime's packages up to the lock, once.

It runs in the notebook's own kernel, so it needs the standard library only.
"""

import sys
from pathlib import Path

from helpers.model import embedded
from helpers.tools import environment, install
from helpers.tools.steps import SetupError

# A kernel goes on with what it has imported, whatever is installed since.
RESTART = (
    "Restart the runtime now (Runtime, Restart session), then run the cell with git clone and this one again."
)

_outdated = False  # whether packages were replaced since this kernel began


def prepare() -> None:
    """Install what is missing and ask for a restart; where nothing is missing, nothing at all.

    Raises:
        SystemExit: the set-up failed, or this kernel is older than it.
    """
    global _outdated
    here, platform = Path(sys.prefix), environment.detect_platform()
    if not (environment.is_current(here, platform) and embedded.ready()):
        _outdated = True
        try:
            install.setup(str(here), platform, hosted=True)
        except SetupError as error:
            raise SystemExit(f"The set-up did not finish. {error}") from None
    if _outdated:
        raise SystemExit(f"The packages of the lessons are installed. {RESTART}")
