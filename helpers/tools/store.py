"""Put a run's outputs into the notebooks themselves, without a trace of when and where they were made."""

import itertools
import json
import re
from pathlib import Path


def stored_text(path: Path, text: str, executed: Path) -> str:
    """Return the notebook at ``path`` (whose ``text`` was run) with the outputs of its ``executed`` copy.

    Raises:
        ValueError: it was edited meanwhile, or an output shows a path of this machine.
    """
    import nbformat

    if path.read_text(encoding="utf-8") != text:
        raise ValueError("the notebook was edited while it ran; run it again")
    stored = nbformat.reads(text, as_version=4)
    copy = nbformat.read(executed, as_version=4)
    for content in (stored, copy):
        content.cells = [c for c in content.cells if "injected-parameters" not in c.metadata.get("tags", ())]
    places = {path.parent.parent, executed.parent, Path.home()}
    places = {str(p) for place in places for p in (place, place.resolve())} - {"/"}
    leak = re.compile("|".join(rf"{re.escape(place)}(?![\w-])" for place in sorted(places)))
    counts = itertools.count(1)  # the injected cell had one, too: count again
    for cell, ran in zip(stored.cells, copy.cells, strict=True):
        for noise in ("papermill", "execution"):
            cell.metadata.pop(noise, None)
        if cell.cell_type == "code":
            cell.execution_count = next(counts) if ran.execution_count else None
            cell.outputs = ran.outputs
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count
            if found := leak.search(json.dumps(cell.outputs, ensure_ascii=False)):
                cause = f"cell {cell.execution_count} shows a path of this machine, {found[0]}"
                raise ValueError(f"{cause}; print it relative to the repository")
    for noise in ("papermill", "widgets"):
        stored.metadata.pop(noise, None)
    spec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    language = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    stored.metadata.update(kernelspec=spec, language_info=language)
    return nbformat.writes(stored).rstrip("\n") + "\n"
