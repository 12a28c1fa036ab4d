"""Faults provoked with the real engine: each is named, and leaves the memory back and no process."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from helpers.base import machine, redact
from helpers.base.files import MANIFEST
from helpers.base.machine import MIB
from helpers.engine import engine
from helpers.engine.errors import EngineClosedError, EngineDiedError, EngineError, EngineStartError
from helpers.engine.release import settled_memory
from helpers.faults import explain
from helpers.model import embedded
from tests.conftest import SWAP, ask, children, left_behind, named, shared_memory

MACHINE = machine.detect()
ANY = Exception  # which one is vLLM's affair; what is made of it is asserted
CAPITAL = "What is the capital of France? Answer with one word."


@dataclass(frozen=True)
class Fault:
    """How to provoke a failure of the start, and the diagnosis it must get."""

    name: str
    expected: str
    args: dict = field(default_factory=dict)
    change: Callable[[Path], None] | None = None  # what to do to a copy of the embedded model
    here: bool = True  # whether it is a fault on this machine
    slow: bool = False  # like another of these: left to `make test-all`


def config(folder: Path, **new) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


REMOTE = {
    "model_type": "strange",
    "architectures": ["StrangeForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_strange.StrangeConfig"},
}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}

ON_CPU, ON_GPU = MACHINE.kind == "cpu", MACHINE.kind == "cuda"
# Half a trillion weights, by shape alone: no GPU holds them.
HUGE = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "head_dim": 128,
        "num_attention_heads": 128, "num_key_value_heads": 8}  # fmt: skip
CHANNEL_MARLIN = {"quantization": "fp8_per_channel", "linear_backend": "marlin", "dtype": "bfloat16"}
TENSOR = {"quantization": "fp8_per_tensor", "dtype": "bfloat16"}
CACHE = "kv_cache_memory_bytes"

FAULTS = (
    Fault("a context that the KV cache cannot hold", "kv-cache-too-small",
          {"max_model_len": 8192, CACHE: 64 * MIB}),
    Fault("no memory for the cache's first block", "no-room-for-kv-cache", {CACHE: 1024}, here=ON_CPU),
    Fault("a KV cache larger than the machine", "cpu-memory-share", {CACHE: 2**45}, here=ON_CPU, slow=True),
    Fault("per-tensor FP8 on a CPU", "fp8-per-tensor-on-cpu", TENSOR, here=ON_CPU),
    Fault("FP8 KV cache without AVX-512", "no-kernel-for-format", {"kv_cache_dtype": "fp8"},
          here=ON_CPU and "avx512f" not in MACHINE.isa, slow=True),
    Fault("FP8 computed in FP32", "format-and-dtype", TENSOR | {"dtype": "float32"}, slow=True),
    Fault("awq of a model that is not quantized", "not-a-quantized-model", {"quantization": "awq"}),
    Fault("awq of an llm-compressor checkpoint", "quantization-mismatch", {"quantization": "awq"},
          partial(config, quantization_config=PACKED), slow=True),
    Fault("a quantization method that does not exist", "no-such-format", {"quantization": "awq4"}, slow=True),
    Fault("an architecture vLLM does not have", "unsupported-architecture",
          change=partial(config, architectures=["StrangeForCausalLM"])),
    Fault("a config that demands remote code", "remote-code", change=partial(config, **REMOTE), slow=True),
    Fault("config and weights of different models", "config-and-weights-differ",
          change=partial(config, intermediate_size=2048)),
    Fault("no tokenizer", "no-tokenizer", change=without_tokenizer, slow=True),
    Fault("an argument vLLM does not have", "unknown-argument", {"max_tokens": 5}),
    Fault("a dtype that does not exist", "argument-refused", {"dtype": "float8"}, slow=True),
    Fault("a model larger than the GPU", "model-too-large", {"load_format": "dummy", "hf_overrides": HUGE},
          here=ON_GPU),
    Fault("all of a GPU's memory", "utilization-too-high", {CACHE: None, "gpu_memory_utilization": 1.0},
          here=ON_GPU),
    Fault("no room for a KV cache", "no-room-for-kv-cache", {CACHE: None, "gpu_memory_utilization": 0.001},
          here=ON_GPU),
    Fault("FP8 a channel, by Marlin", "fp8-per-channel-on-marlin", CHANNEL_MARLIN, here=ON_GPU),
)  # fmt: skip


def changed_copy(change: Callable[[Path], None], folder: Path) -> Path:
    """The embedded model's files, linked rather than copied, with one change."""
    folder.mkdir()
    for path in embedded.prepare().iterdir():
        if path.name != MANIFEST:
            (shutil.copyfile if path.suffix != ".safetensors" else os.link)(path, folder / path.name)
    change(folder)
    return folder


@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=f.name, marks=[pytest.mark.slow] * f.slow) for f in FAULTS]
)
def test_a_start_that_fails_is_named_and_leaves_nothing(fault, small, warm, tmp_path):
    if not fault.here:
        pytest.skip("no fault on this machine")
    model = str(changed_copy(fault.change, tmp_path / "model")) if fault.change else "embedded"
    before = settled_memory()
    with pytest.raises(ANY) as caught, engine.open_engine(model, **{**small, **fault.args}):
        pass
    report = explain.explain(caught.value)
    left, processes = settled_memory() - before, children()
    assert report.name == fault.expected, report
    assert "(not said)" not in report.what + " ".join(report.do)
    assert not processes
    assert left < SWAP
    if isinstance(caught.value, EngineStartError):  # else it was refused before vLLM was asked
        for words in (report.what, report.do[0], "Cause: ", "Full log: ‹"):
            assert words in str(caught.value)


# Forks, so that what holds the memory is no child of the process that is diagnosed.
HOLD = """
import os, time
if os.fork():
    os._exit(0)
import torch
held = torch.empty(int(0.6 * torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(not ON_GPU, reason="a GPU's memory")
def test_another_process_on_the_gpu_is_named(small, warm):
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, start_new_session=True)
    try:
        holder.stdout.readline()
        with pytest.raises(EngineStartError) as caught:
            engine.open_engine(**small | {CACHE: None, "gpu_memory_utilization": 0.9}).__enter__()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    named(caught.value, "another-process")


def test_where_no_log_can_be_written_the_engine_says_so_and_another_starts(small, memory_back, monkeypatch):
    monkeypatch.chdir("/proc")
    del small["log_dir"]  # runs/logs, from here
    with pytest.raises(EngineError, match=r"log cannot be written: .*log_dir=") as caught:
        engine.open_engine(**small).__enter__()
    named(caught.value, "ours")


@pytest.mark.slow
def test_a_disk_without_room_for_the_log_is_named_and_the_next_engine_starts(small, memory_back, small_disk):
    with contextlib.suppress(OSError), (small_disk.place / "all").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = settled_memory()
    with pytest.raises(EngineStartError) as caught:
        engine.open_engine(**small | {"log_dir": small_disk.place}).__enter__()
    assert settled_memory() - before < SWAP
    named(caught.value, "disk-full")
    with engine.open_engine(**small) as open_:
        assert "Paris" in ask(open_.engine, CAPITAL)


SECRET = "planted-5ecret-value"


def test_an_engine_quotes_no_secret(small, memory_back, monkeypatch):
    """Given by name, which vLLM's own error quotes: Python does not show that one beside ours."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    engine_ = engine.open_engine(hf_token=SECRET, **small | {"max_model_len": 10**6})
    with pytest.raises(EngineStartError) as caught, engine_:
        pass
    report = caught.value.report
    shown = ["".join(traceback.format_exception(caught.value)), str(report), report._repr_html_()]
    for text in [*shown, redact.redact(report.raw_log), engine_.code]:
        assert SECRET not in text
    assert report.name == "context-too-long"


# -- what a running engine is given ------------------------------------------------------------------------


LONG = "word " * 100_000

INPUTS = (
    ("a prompt of 100,000 words", [LONG], "prompt-too-long"),
    ("a good prompt, then one too long", ["Hello", LONG], "prompt-too-long"),
    ("an empty prompt", [""], "prompt-empty"),
    ("no prompts", None, "prompt-not-text"),
    ("a number as prompt", 5, "prompt-not-text"),
    ("a prompt that is no text", [{"no": "prompt"}], "prompt-not-text"),
)


@pytest.fixture(scope="class")
def running(warm, tmp_path_factory):
    """One engine for all that it refuses; it must go on."""
    with engine.open_engine(
        log_dir=tmp_path_factory.mktemp("logs"), max_model_len=512, kv_cache_memory_bytes=256 * MIB
    ) as open_:
        yield open_.engine


class TestWhatARunningEngineIsGiven:
    @pytest.mark.parametrize(("name", "prompts", "expected"), INPUTS, ids=[row[0] for row in INPUTS])
    def test_a_prompt_that_is_refused_is_named_and_the_engine_goes_on(self, running, name, prompts, expected):
        with pytest.raises(ANY) as caught:
            running.llm.generate(prompts)
        report = explain.explain(caught.value, running.log_text)
        assert report.name == expected, report
        assert not running.llm.llm_engine.has_unfinished_requests(), (
            "a refused batch left requests in the queue"
        )
        assert "Paris" in ask(running, CAPITAL)


def test_leaving_the_block_while_requests_are_still_running(small, memory_back):
    from vllm import SamplingParams

    def tokens(core):
        core.add_request("endless", "Tell a story.", SamplingParams(max_tokens=400, ignore_eos=True))
        while core.has_unfinished_requests():
            yield core.step()

    with engine.open_engine(**small) as open_:
        generator = tokens(open_.llm_engine)
        for _ in range(3):
            next(generator)
    assert next(generator, "over") == "over"  # its request was dropped with the engine


@pytest.mark.slow
@pytest.mark.parametrize("in_child", [False, True], ids=["in this process", "in a child"])
def test_leaving_the_block_while_a_thread_is_still_generating(small, memory_back, in_child):
    from vllm import SamplingParams

    raised = []

    def generate(llm) -> None:
        try:
            llm.generate(["Tell a story."] * 4, SamplingParams(max_tokens=400, ignore_eos=True))
        except Exception as error:
            raised.append(error)

    with engine.open_engine(**small, in_child=in_child) as llm:
        thread = threading.Thread(target=generate, args=(llm,), daemon=True)
        thread.start()
        time.sleep(0.5)
    release = llm.engine.release
    assert sum(release.held) - sum(release.after) > 500 * MIB, "an engine of its own process is weighed, too"
    thread.join(30)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [EngineClosedError], raised
    named(raised[0], "engine-finished")
    raised.clear()  # its traceback holds the thread's frames


def test_a_base_model_in_a_path_with_spaces_from_where_nothing_can_be_written(
    small, memory_back, tmp_path, monkeypatch
):
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "tokenizer_config.json"
        path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"})
        )

    folder = changed_copy(change, tmp_path / "a möbel & a space")
    monkeypatch.chdir("/proc")
    with pytest.raises(ANY) as caught, engine.open_engine(str(folder), **small) as open_:
        assert open_.generate(["The capital of France is"])[0].outputs[0].text
        open_.chat([{"role": "user", "content": "Hello"}])
    name = explain.explain(caught.value).name
    assert name == "no-chat-template"


# -- the engine's own process ------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_killed_in_mid_generation_is_named_leaves_nothing_and_the_next_starts(small, warm):
    shared, before, held = shared_memory(), children(), settled_memory()
    with pytest.raises(EngineDiedError) as caught, engine.open_engine(**small, in_child=True) as open_:
        child = open_.llm_engine.engine_core.resources.engine_manager.processes[0]
        threading.Timer(1.0, os.kill, (child.pid, signal.SIGKILL)).start()
        ask(open_.engine, "Tell a long story.", 400)
    report, left, processes = caught.value.report, settled_memory() - held, children() - before
    assert report.name == "killed", report
    assert "exit code -9" in str(caught.value)
    assert not processes
    assert left < SWAP
    assert not left_behind(shared)
    with engine.open_engine(**small) as open_:
        assert "Paris" in ask(open_.engine, CAPITAL)


def test_an_engine_that_the_system_refuses_memory_is_named_and_leaves_nothing(small, warm):
    import resource

    limits, before = resource.getrlimit(resource.RLIMIT_AS), settled_memory()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2000 * MIB, limits[1]))
    try:
        with (
            pytest.raises(ANY) as caught,
            engine.open_engine(**{**small, "kv_cache_memory_bytes": 2500 * MIB}),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    named(caught.value, "out-of-memory")
    assert settled_memory() - before < SWAP
