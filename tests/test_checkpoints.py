"""Quantized checkpoints: what is refused, kept and recognised; and one tiny model really quantized."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers.base import files, machine, processes
from helpers.base.files import ROOT
from helpers.compare import rounding
from helpers.model import checkpoints, lookup, quantize
from helpers.model.checkpoints import CheckpointError
from helpers.model.embedded import prepare
from helpers.model.model import Model
from helpers.model.quantize import EFFORT
from helpers.model.text import calibration_text, held_out_text
from tests.conftest import NO_WEIGHTS, named

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
LLAMA |= {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA |= {"num_hidden_layers": 2, "vocab_size": 128}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Every test has a cache of its own."""
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _model(folder: Path, **config) -> Model:
    """A model folder whose weights nobody may open."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    (folder / "model.safetensors").write_bytes(b"not weights")
    return Model(str(folder), folder.name, folder, "local")


@pytest.fixture
def tiny(tmp_path) -> Model:
    return _model(tmp_path / "tiny")


@pytest.fixture
def made(monkeypatch) -> list[dict]:
    """A stand-in for the child process: writes two files, and notes the settings it was given."""
    settings = []

    def run_child(command: list[str], *_) -> int:
        settings.append(json.loads(command[-1]))
        time.sleep(0.05)
        target = Path(command[-2])
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(NO_WEIGHTS)
        return 0

    monkeypatch.setattr(processes, "run_logged", run_child)
    return settings


@pytest.fixture
def no_child(monkeypatch):
    """Nothing is started: what is refused is refused before anything is loaded."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process started"))


# --- What a folder says about itself --------------------------------------------------------------


def _compressed(kind: str, bits: int, activations: int | None) -> dict:
    inputs = activations and {"type": kind, "num_bits": activations, "dynamic": True}
    weights = {"type": kind, "num_bits": bits, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": _compressed("int", 4, None)}, "awq"),
        ({"compression_config": _compressed("float", 8, 8)}, "fp8"),
        ({"quantization_config": _compressed("float", 4, 4)}, "nvfp4"),
        ({"quantization_config": {"quant_method": "quark"}}, "in a format that is not known here"),
    ],
)
def test_recognise(tmp_path, config, expected):
    assert checkpoints.recognise(_model(tmp_path / "model", **config).folder) == expected


@pytest.mark.parametrize("config", [{"quant_method": "awq"}, _compressed("int", 4, None)])
def test_a_ready_made_awq_is_used_as_it_is(tmp_path, no_child, config):
    ready = _model(tmp_path / "ready", quantization_config=config)
    assert checkpoints.make(ready, "awq") is ready


@pytest.mark.parametrize(("recipe", "found"), [("rtn", "awq"), ("int8", "awq"), ("awq", "fp8")])
def test_a_quantized_model_is_not_quantized_again(tmp_path, no_child, recipe, found):
    config = _compressed("int", 4, None) if found == "awq" else _compressed("float", 8, 8)
    ready = _model(tmp_path / "ready", quantization_config=config)
    with pytest.raises(CheckpointError, match=rf"quantized already \({found}\).*Give the 16-bit model") as at:
        checkpoints.make(ready, recipe)
    named(at.value, "quantized-already")


# --- What is refused before anything is loaded ----------------------------------------------------


def test_an_unknown_recipe_names_the_known(tiny, no_child):
    with pytest.raises(CheckpointError, match=r"no recipe 'gguf'\. There are: awq, rtn, int8, fp8"):
        checkpoints.make(tiny, "gguf")


@pytest.mark.parametrize("recipe", ["awq", "int8"])
def test_phi_2_cannot_be_scaled(tmp_path, no_child, recipe):
    phi = _model(tmp_path / "phi-2", architectures=["PhiForCausalLM"], model_type="phi")
    with pytest.raises(CheckpointError, match=rf"PhiForCausalLM {recipe} may.*rtn.*fp8.*GPTQ") as at:
        checkpoints.make(phi, recipe)
    named(at.value, "unsupported-architecture")
    assert {"LlamaForCausalLM", "Qwen3_5ForCausalLM", "Phi3ForCausalLM"} <= quantize.known_classes(recipe)


def test_groups_that_cannot_be(tiny, no_child):
    with pytest.raises(CheckpointError, match="64, 192 wide: no group size of 128 divides") as at:
        checkpoints.make(tiny, "awq", group_size=128)
    named(at.value, "group-size")
    with pytest.raises(CheckpointError, match="one of 128, 64, 32, not 48"):
        checkpoints.make(tiny, "awq", group_size=48)
    with pytest.raises(CheckpointError, match="scale for each output channel: leave group_size out"):
        checkpoints.make(tiny, "fp8", group_size=64)


# --- Calibration ----------------------------------------------------------------------------------


def test_calibration_and_evaluation_text_are_disjoint():
    (calibration, name), (evaluation, other) = calibration_text(), held_out_text()
    assert name != other
    assert len(calibration) > 100_000
    paragraphs = [{" ".join(p.split()) for p in text.split("\n\n")} for text in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]


# --- The cache ------------------------------------------------------------------------------------


def test_made_once(tiny, made, cache):
    first, second = checkpoints.make(tiny, "awq"), checkpoints.make(tiny, "awq")
    assert first == second
    assert len(made) == 1
    assert (first.kind, first.title, first.folder.parent) == ("made", "tiny-awq-g64", cache)
    assert lookup.resolve(first.name).folder == first.folder
    manifest = json.loads((first.folder / "manifest.json").read_text())
    assert manifest["settings"] == made[0]
    assert manifest["seconds"] > 0


def test_another_model_recipe_group_or_effort_is_another_checkpoint(tiny, tmp_path, made, monkeypatch):
    folders = {
        checkpoints.make(tiny, "awq").folder,
        checkpoints.make(tiny, "rtn").folder,
        checkpoints.make(tiny, "awq", group_size=32).folder,
    }
    weights = tiny.folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    folders.add(checkpoints.make(tiny, "awq").folder)
    _model(tiny.folder, rope_theta=1.0)
    folders.add(checkpoints.make(tiny, "awq").folder)
    monkeypatch.setitem(EFFORT, machine.detect().kind, {"samples": 1, "tokens": 2, "strengths": 3})
    folders.add(checkpoints.make(tiny, "awq").folder)
    assert len(folders) == len(made) == 6


def test_a_hub_model_is_known_by_its_revision(tiny, made):
    hub = [Model("a/tiny", "tiny", tiny.folder, "hub", revision) for revision in ("1", "2", "1")]
    assert len({checkpoints.make(model, "fp8").folder for model in hub}) == len(made) == 2
    assert made[0]["source"] == {"name": "a/tiny", "revision": "1"}


# --- A child that fails ---------------------------------------------------------------------------


def _stand_in(monkeypatch, tmp_path, script: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_failure_names_its_cause_and_the_log(tiny, tmp_path, cache, monkeypatch):
    said = "KeyError: 'first'\\nDuring handling of it:\\ntorch.OutOfMemoryError: CUDA out of memory"
    _stand_in(monkeypatch, tmp_path, f'mkdir "$5"; printf "{said}\\n" >&2; exit 1')
    cause = r"Cause: OutOfMemoryError: CUDA out of memory\n.*: .*\.log$"
    with pytest.raises(CheckpointError, match=cause) as at:
        checkpoints.make(tiny, "awq")
    assert "KeyError" in Path(str(at.value).rsplit(": ", 1)[1]).read_text()
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".log"]  # no half a checkpoint


def test_a_killed_child_is_said_to_be_killed(tiny, tmp_path, monkeypatch):
    _stand_in(monkeypatch, tmp_path, "kill -9 $$")
    with pytest.raises(CheckpointError, match=r"killed by signal 9.*memory") as at:
        checkpoints.make(tiny, "fp8")
    named(at.value, "killed")


def test_an_interrupt_ends_the_child(tiny, tmp_path, monkeypatch):
    _stand_in(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        time.sleep(0.5)  # by then it is waited for, also on a busy machine
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(processes, "watched", lambda: True)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        checkpoints.make(tiny, "fp8")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# --- A real one, small ----------------------------------------------------------------------------


def _weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def embedded() -> Path:
    """The embedded model, asked for before a test gets a cache of its own."""
    return prepare()


def _tiny_llama(folder: Path, embedded: Path) -> Model:
    """Two layers of random weights with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(embedded)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": len(tokenizer)})).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(str(folder), "tiny", folder, "local")


@pytest.mark.slow  # 03_awq makes a real one in every run, and compares what became of it
def test_a_real_awq_is_scaled_rounded_and_packed(embedded, tmp_path):
    source = _tiny_llama(tmp_path / "tiny", embedded)
    awq, plain = checkpoints.make(source, "awq"), checkpoints.make(source, "rtn")
    assert [checkpoints.recognise(made.folder) for made in (awq, plain)] == ["awq", "awq"]
    layer, norm = "model.layers.0.mlp.up_proj", "model.layers.0.post_attention_layernorm.weight"
    assert rounding.anatomy(awq.folder, layer)["weight_packed"] == ((192, 8), "int32", 192 * 64 // 2)
    shape = checkpoints.make(lookup.sized(str(source.folder)), "awq")
    assert checkpoints.recognise(shape.folder) == "awq"
    said, real = (model.config["quantization_config"] for model in (shape, awq))
    kept = ("ignore", "format", "quant_method", "quantization_status")
    assert {name: said[name] for name in kept} == {name: real[name] for name in kept}
    numbers = ("num_bits", "type", "symmetric", "group_size", "strategy")
    weights = [group["weights"] for config in (said, real) for group in config["config_groups"].values()]
    assert [weights[0][name] for name in numbers] == [weights[1][name] for name in numbers]
    assert rounding.awq_scales(source.folder, awq.folder, norm).std() > 0, "AWQ scaled nothing"
    assert (rounding.awq_scales(source.folder, plain.folder, norm) == 1).all()
    before, after = _weights(source.folder), _weights(plain.folder)
    assert (after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]).all()
    step = (before[f"{layer}.weight"].float().amax(1) - before[f"{layer}.weight"].float().amin(1)) / 15
    assert after[f"{layer}.weight_scale"].float()[:, 0].numpy() == pytest.approx(step.numpy(), rel=0.05)
    wide = checkpoints.expand(plain)
    assert checkpoints.recognise(wide.folder) is None
    assert "quantization_config" not in wide.config
    written = _weights(wide.folder)
    assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in before.items()}
    wrong = (written[f"{layer}.weight"].float() - before[f"{layer}.weight"].float()).abs()
    # Half a step, and what BF16 rounds off the scale (15 steps of it) and off the weight that is written.
    assert (wrong.amax(1) <= 0.6 * step).all(), "more than half a step away: not what was rounded"


# --- Real ones that cannot be finished --------------------------------------------------------------


MAKING = """import sys
from helpers.model import checkpoints, lookup
checkpoints.make(lookup.resolve(sys.argv[1]), "awq")"""


@pytest.mark.slow
def test_killed_while_it_is_made_it_leaves_no_process_and_the_next_run_makes_it(embedded, tmp_path, cache):
    import psutil

    source = _tiny_llama(tmp_path / "tiny", embedded)
    for seconds in (0.5, 6, 12):  # importing, calibrating, saving
        maker = subprocess.Popen([sys.executable, "-c", MAKING, str(source.folder)], cwd=ROOT)
        time.sleep(seconds)
        mine = [psutil.Process(maker.pid)]
        with contextlib.suppress(psutil.Error):
            mine += mine[0].children(recursive=True)
        maker.kill()
        maker.wait()
        # An orphan falls to this process where an engine before made it the one to inherit them: it has ended
        # then, and only its exit code waits to be asked for.
        left = psutil.wait_procs(mine, timeout=10)[1]
        assert all(one.status() == psutil.STATUS_ZOMBIE for one in left)
        for folder in cache.glob("*-awq-*/"):
            assert ".partial" in folder.name or files.complete(folder)
    made_at_last = checkpoints.make(source, "awq")
    assert checkpoints.recognise(made_at_last.folder) == "awq"
    assert not list(cache.glob("*.partial*"))
