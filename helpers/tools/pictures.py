"""The notebooks' pictures, which their first cells and the README show: small, and none can be stale.

    python -m helpers.tools.pictures            write notebooks/pictures/<notebook>.png where it is stale

A notebook's picture is the stored figure of the cell tagged "picture", or its first figure. Where that
figure follows within a screen the first cell shows none, and none is made. Each file notes the checksum of
the output that it was made from. Storing a notebook's outputs makes its picture.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
from pathlib import Path

from helpers.base.files import ROOT

NOTEBOOKS = ROOT / "notebooks"
WIDTH = 1280  # pixels, twice what a lesson shows: sharp on a fine screen
NOTE = "made from"  # the name under which a PNG keeps its source's checksum


def source(notebook: Path) -> bytes:
    """The PNG among its outputs that a notebook's picture is made from.

    Raises:
        ValueError: its first cell shows none, or it has no figure yet; run and store it.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    if "pictures/" not in "".join(cells[0]["source"]):
        raise ValueError(f"{notebook.name} shows no picture in its first cell")
    cells.sort(key=lambda cell: "picture" not in cell["metadata"].get("tags", ()))  # that one first
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        if "image/png" in (data := output.get("data", {})):
            return base64.b64decode("".join(data["image/png"]))
    raise ValueError(f"{notebook.name} shows no figure; run it and store its outputs")


def path_of(notebook: Path) -> Path:
    """Where a notebook's picture lies."""
    return notebook.parent / "pictures" / f"{notebook.stem}.png"


def is_stale(notebook: Path) -> bool:
    """Whether the picture is missing or was made from another output than the one that is stored."""
    from PIL import Image

    try:
        with Image.open(path_of(notebook)) as image:
            return image.info.get(NOTE) != hashlib.sha256(source(notebook)).hexdigest()
    except FileNotFoundError:
        return True


def make(notebook: Path) -> Path:
    """Make a notebook's picture and return its path; one that is not stale stays as it is."""
    from PIL import Image, PngImagePlugin

    if not is_stale(notebook):
        return path_of(notebook)
    found = source(notebook)
    image = Image.open(io.BytesIO(found)).convert("RGB")
    image = image.resize((WIDTH, round(WIDTH * image.height / image.width)), Image.LANCZOS)
    note = PngImagePlugin.PngInfo()
    note.add_text(NOTE, hashlib.sha256(found).hexdigest())
    path_of(notebook).parent.mkdir(exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(path_of(notebook), optimize=True, pnginfo=note)
    return path_of(notebook)


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("[!.]*.ipynb")):
        with contextlib.suppress(ValueError):
            make(path)
