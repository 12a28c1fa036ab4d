"""The notebooks' pictures, which their first cells and the README show, and none can be stale.

A notebook's picture is the stored figure of the cell tagged "picture", or its first figure. Where that
figure follows within a screen the first cell shows none, and none is made. Storing a notebook's outputs makes
its picture.
"""

import base64
import json
from pathlib import Path


def source(notebook: Path) -> bytes | None:
    """The PNG among its outputs that is a notebook's picture; None if its first cell shows none, or it has no
    figure yet."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    if "pictures/" not in "".join(cells[0]["source"]):
        return None
    cells.sort(key=lambda cell: "picture" not in cell["metadata"].get("tags", ()))  # that one first
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        if "image/png" in (data := output.get("data", {})):
            return base64.b64decode("".join(data["image/png"]))
    return None


def path_of(notebook: Path) -> Path:
    """Where a notebook's picture lies."""
    return notebook.parent / "pictures" / f"{notebook.stem}.png"


def make(notebook: Path) -> None:
    """Write a notebook's picture, if it shows one."""
    if found := source(notebook):
        path_of(notebook).parent.mkdir(exist_ok=True)
        path_of(notebook).write_bytes(found)
