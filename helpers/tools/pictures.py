"""The README's pictures: one a notebook, small, made from its stored outputs so that none can be stale.

    python -m helpers.tools.pictures            write notebooks/pictures/<notebook>.png
    python -m helpers.tools.pictures --check    say which are stale; the exit code too

A notebook's picture, which its first cell shows, is the figure of the cell tagged "picture", or its first
figure; without one, the first of its longer texts, drawn. Each file
notes the checksum of the output that it was made from. Storing a notebook's outputs makes its picture.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import sys
import textwrap
from pathlib import Path

from helpers.base.files import ROOT

NOTEBOOKS = ROOT / "notebooks"

FOLDER = "pictures"

WIDTH = 1280  # pixels, twice what a lesson shows: sharp on a fine screen

LINES, COLUMNS = 12, 62  # of a text

NOTE = "made from"  # the name under which a PNG keeps its source's checksum


def source(notebook: Path) -> bytes:
    """The output that a notebook's picture is made from: a PNG, or a text.

    Raises:
        ValueError: it has no such output; run and store it first.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    cells.sort(key=lambda cell: "picture" not in cell["metadata"].get("tags", ()))  # that one first
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    for shown in data:
        if "image/png" in shown:
            return base64.b64decode("".join(shown["image/png"]))
    texts = ["".join(shown.get("text/plain", "")) for shown in data]
    for text in texts:
        if text.count("\n") >= LINES // 2:
            return text.encode()
    raise ValueError(f"{notebook.name} has no output to make a picture of; run it and store its outputs")


def path_of(notebook: Path) -> Path:
    """Where a notebook's picture lies."""
    return notebook.parent / FOLDER / f"{notebook.stem}.png"


def is_stale(notebook: Path) -> bool:
    """Whether the picture is missing or was made from another output than the one that is stored."""
    from PIL import Image

    try:
        with Image.open(path_of(notebook)) as image:
            return image.info.get(NOTE) != _checksum(source(notebook))
    except FileNotFoundError:
        return True


def make(notebook: Path) -> Path:
    """Make a notebook's picture and return its path; one that is not stale stays as it is."""
    from PIL import Image, PngImagePlugin

    if not is_stale(notebook):
        return path_of(notebook)
    found = source(notebook)
    image = Image.open(io.BytesIO(found)) if found.startswith(b"\x89PNG") else _drawn(found.decode())
    image = image.convert("RGB").resize((WIDTH, round(WIDTH * image.height / image.width)), Image.LANCZOS)
    note = PngImagePlugin.PngInfo()
    note.add_text(NOTE, _checksum(found))
    path_of(notebook).parent.mkdir(exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(path_of(notebook), optimize=True, pnginfo=note)
    return path_of(notebook)


def _checksum(found: bytes) -> str:
    return hashlib.sha256(found).hexdigest()


def _drawn(text: str):
    """The beginning of a text as a picture, in the font that matplotlib brings."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, COLUMNS) or [""]]
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 20)
    image = Image.new("RGB", (12 * COLUMNS + 40, 26 * LINES + 40), "white")
    ImageDraw.Draw(image).text((20, 20), "\n".join(lines[:LINES]), font=font, fill="#222222", spacing=4)
    return image


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.tools.pictures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing, name the stale ones")
    check = parser.parse_args(arguments).check
    stale = [notebook for notebook in sorted(NOTEBOOKS.glob("[!.]*.ipynb")) if is_stale(notebook)]
    for notebook in stale:
        print(f"stale: {path_of(notebook).name}" if check else f"made: {make(notebook).name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
