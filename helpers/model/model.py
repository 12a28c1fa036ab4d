"""A model: its name, folder, configuration and chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.base import files

EMBEDDED, SHAPE = "embedded", "shape"  # kinds of model
TITLE = "SmolLM2-135M-Instruct"  # the embedded one
# On a GPU: ungated, Apache-2.0, and of a class that llm-compressor can make an AWQ of.
GPU_DEFAULT = "Qwen/Qwen2.5-1.5B-Instruct"


class ModelError(ValueError):
    """A model that cannot be had or must not be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Model:
    """A model on this disk.

    ``name`` is what the reader asked for, ``title`` how tables call it, ``kind`` one of ``embedded``,
    ``local``, ``hub``, ``shape`` (no weights: random numbers stand in for them), or ``made`` (by
    ``helpers.model.checkpoints``); ``revision`` is the commit a hub name was resolved to.
    """

    name: str
    title: str
    folder: Path
    kind: str
    revision: str | None = None

    @property
    def config(self) -> dict:
        """The model's ``config.json``."""
        return json.loads((self.folder / "config.json").read_text())

    @property
    def file_bytes(self) -> int:
        """Bytes of its safetensors files on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def shape_only(self) -> bool:
        """Whether its weights are random numbers: bytes and speed are a real model's, words are not."""
        return self.kind == SHAPE

    def check_words(self) -> None:
        """Refuse to let random weights answer.

        Raises:
            ModelError: there are no weights; the message says what still can be measured.
        """
        if self.shape_only:
            raise ModelError(
                f"{self.title} is a shape without weights: random numbers stand in for them, so its text, "
                "perplexity and answers would mean nothing. Memory and speed can be measured. For words "
                "use 'embedded', a folder or a hub name."
            )

    @property
    def has_chat_template(self) -> bool:
        """Whether it was trained to chat: instruct models bring a template, base models do not."""
        if (self.folder / "chat_template.jinja").exists():
            return True
        tokenizer = self.folder / "tokenizer_config.json"
        return tokenizer.exists() and "chat_template" in json.loads(tokenizer.read_text())


def cache_folder() -> Path:
    """Where prepared models are kept between runs: $TUTORIAL_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("TUTORIAL_CACHE"):
        return Path(chosen).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "quantized-deployment"
    try:
        return Path.home() / ".cache" / "quantized-deployment"
    except RuntimeError:  # no HOME and no entry in the password file
        return files.ROOT / ".cache"


def prepare(folder: Path, title: str, size: int, make: Callable[[Path, Path], dict]) -> Path:
    """Return a folder of the cache, made once (``files.made``); ``size`` is what that takes, in bytes.

    Raises:
        ModelError: no room or no permission there; the message says how to have it elsewhere.
    """
    try:
        return files.made(folder, make)
    except OSError as error:
        raise ModelError(
            f"{title} cannot be made in {folder.parent}: {error}. It needs about {size:,} bytes there; set "
            "TUTORIAL_CACHE to a folder that can be written and has room."
        ) from error


def default(machine) -> str:
    """The model the lessons use when none is named: embedded on a CPU, a 1.5B model on a GPU.

    $TUTORIAL_MODEL overrides it: ``make test`` compares with outputs of the embedded model everywhere.
    """
    if chosen := os.environ.get("TUTORIAL_MODEL"):
        return chosen
    return GPU_DEFAULT if machine.kind == "cuda" else EMBEDDED
