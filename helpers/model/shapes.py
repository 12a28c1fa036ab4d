"""Architectures of well-known models, as their configs on the hub have them (``shapes.json``): no weights.

    lookup.resolve("shape:mistral-7b")      # one of these
    lookup.resolve("shape:some/folder")     # any folder with a config.json

For sizing a model that cannot be downloaded. vLLM fills the matrices with random numbers
(``load_format="dummy"``): every byte and every multiplication is there, so memory and speed are the real
model's; what it writes means nothing, and is refused.
"""

import hashlib
import json
import os
from pathlib import Path

from helpers.model import model
from helpers.model.model import SHAPE, Model

# A shape's title, the hub's name of a model of that shape, which a server is started with, and its config.
_KNOWN = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TITLES: dict[str, str] = {name: known["title"] for name, known in _KNOWN.items()}
HUB: dict[str, str] = {name: known["hub"] for name, known in _KNOWN.items()}
CONFIGS: dict[str, dict] = {name: known["config"] for name, known in _KNOWN.items()}


def at_home(name: str) -> Path:
    """A path with ``~`` replaced; left as it is where no such user is, for which ``expanduser`` raises."""
    return Path(os.path.expanduser(name))  # noqa: PTH111


def shape(name: str) -> Model:
    """Return a model without weights: one of ``shapes.CONFIGS``."""
    return _shape_folder(f"{SHAPE}:{name}", TITLES[name], CONFIGS[name])


def reshaped(model: Model, suffix: str, quantization: dict) -> Model:
    """Return a shape-only model whose config says that its weights are quantized."""
    return _shape_folder(model.name, f"{model.title}-{suffix}", model.config | quantization)


def _shape_folder(name: str, title: str, config: dict) -> Model:
    """Put a config into a folder of its own, named by its content, so that it is made once."""
    text = json.dumps(config, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]

    def make(folder: Path, _scratch: Path) -> dict:
        folder.mkdir()
        (folder / "config.json").write_text(text)
        return {}

    folder = model.cache_folder() / "shapes" / f"{title}-{digest}"
    return Model(name, title, model.prepare(folder, title, len(text), make), SHAPE)


def known_as(name: str) -> str | None:
    """The shape that a name means: its own, or the hub's of the same model; in capitals or not."""
    wanted = name.lower()
    return next(
        (key for key, hub in HUB.items() if wanted in (key, hub.lower(), hub.lower().split("/")[1])), None
    )
