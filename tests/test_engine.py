"""The engine block with the real engine: what it gives, and what it gives back, however it ends."""

import json
import os
import shutil
import signal
import threading

import pytest

from helpers.base.machine import MIB, Machine, anonymous_memory, detect
from helpers.base.parameters import ParameterError
from helpers.engine import release
from helpers.engine.arguments import SOONER, check_gpus, default_args
from helpers.engine.children import Belongings
from helpers.engine.engine import open_engine
from helpers.engine.errors import EngineClosedError, EngineError, EngineStartError, MemoryHeldError
from helpers.engine.release import LEFT_FIRST, MemoryWatch
from helpers.measure.speed import measure_speed
from helpers.model import embedded, lookup, schemes, shapes
from helpers.model.model import ModelError
from tests.conftest import SWAP, ask, children, named

CAPITAL = "What is the capital of France? Answer with one word."


def test_it_answers_and_the_memory_comes_back(small, memory_back, capfd):
    engine = open_engine(**small)
    with engine:
        answer = ask(engine, CAPITAL)
        held = anonymous_memory()
        log, tokens = engine.log_text, engine.kv_cache_tokens
    assert "Paris" in answer
    assert held - sum(engine.release.after) > 500 * MIB, (
        "weights and KV cache take more than 500 MiB while open"
    )
    assert not engine.release.first
    assert engine.release.left < SWAP
    assert tokens == int(_number_before(log, "tokens, Maximum concurrency"))
    shown = capfd.readouterr()
    assert shown.out.count("\n") == 1, shown.out
    assert shown.out.startswith("vLLM is ready after ‹")
    assert shown.err == ""


def _number_before(log: str, words: str) -> str:
    line = next(line for line in log.splitlines() if words in line)
    return line.split(words)[0].split()[-1].replace(",", "")


def test_the_first_engine_is_marked_and_what_it_leaves_is_bounded(warm):
    assert warm.release.first
    assert warm.release.left < LEFT_FIRST
    assert (warm.import_s == 0) == warm.imported_before


def test_the_code_shown_builds_the_same_engine(small):
    code = open_engine(**small).code
    shown = {}
    exec(code.replace("from vllm import LLM", "").replace("LLM(", "dict("), shown)
    arguments = shown["llm"]
    assert arguments["dtype"] == schemes.scheme("baseline").way(detect()).args["dtype"]
    assert arguments["max_model_len"] == 512
    assert arguments["enable_prefix_caching"] is False
    assert "trust_remote_code" not in code


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_quantized_engine_leaves_nothing_and_names_its_kernel(small, warm, scheme):
    for _ in range(2):  # the first of its kind leaves the modules of its kernels
        engine = open_engine("embedded", scheme, **small)
        with engine:
            kernels = engine.kernels
    assert kernels
    assert all("Kernel" in name for name in kernels)
    assert engine.release.left < SWAP


def test_a_shape_is_timed_and_weighed_and_asked_nothing(small, memory_back, tmp_path):
    config = lookup.resolve("embedded").config | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = open_engine(f"shape:{tmp_path}", "int8", **small)
    with engine:
        (speed,) = measure_speed(engine, [2], seconds=0.1, runs=1)
        assert speed.output_tokens_per_s > 0
        with pytest.raises(ModelError, match="would mean nothing"):
            ask(engine, CAPITAL)
    assert "load_format='dummy'" in engine.code


@pytest.mark.parametrize(
    ("machine", "wanted", "message"),
    [
        (Machine("cpu", "a CPU", 2**34), 2, "this machine shows no GPU. Lower it to 1"),
        (Machine("cuda", "a GPU", 2**34, count=2), 4, "needs 4 GPUs; this machine shows 2"),
        (Machine("cuda", "a GPU", 2**34, count=8), 0, "a whole number from 1"),
    ],
)
def test_gpus_that_are_not_there_are_not_asked_for(machine, wanted, message):
    with pytest.raises((EngineError, ParameterError), match=message):
        check_gpus(machine, wanted)


def test_on_a_gpu_a_lesson_starts_with_few_graphs_which_hold_its_batch_sizes():
    gpu, shape = Machine("cuda", "a GPU", 2**34, sm=8.9), shapes.shape("phi-2")
    args = default_args(gpu, shape)
    assert {1, 8, 32} <= set(args["compilation_config"]["cudagraph_capture_sizes"])  # 01 to 03
    assert args["kernel_config"] == {"enable_jit_warmup": False}
    assert not set(SOONER) & set(default_args(Machine("cpu", "x", 1), shape))


def test_an_error_in_the_block_comes_out_and_leaves_nothing(small, memory_back):
    engine = open_engine(**small)
    with pytest.raises(ZeroDivisionError) as caught, engine:
        ask(engine, CAPITAL, 2)
        _ = 1 / 0
    named(caught.value, "own-code")


def test_weights_cut_behind_its_back_are_named_and_leave_nothing(small, tmp_path, memory_back):
    folder = tmp_path / "cut"
    shutil.copytree(embedded.prepare(), folder)
    engine = open_engine(str(folder), **small)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10**8)
    with pytest.raises(EngineStartError, match=r"Cause: .*[Ss]afetensor") as caught, engine:
        pass
    named(caught.value, "damaged-weights")


def test_two_at_once_are_refused_the_first_goes_on_and_says_when_it_is_released(small, memory_back):
    engine = open_engine(**small)
    with engine:
        with pytest.raises(EngineError, match="still open") as caught, open_engine(**small):
            pass
        named(caught.value, "engine-open")
        assert "Paris" in ask(engine, CAPITAL)
        kept = engine.llm
    for use in (lambda: engine.llm, lambda: engine.llm.generate(["x"]), lambda: kept.generate(["x"])):
        with pytest.raises(EngineClosedError, match="with block has ended") as caught:
            use()
        named(caught.value, "engine-finished")


def test_it_can_be_entered_again_with_a_log_of_its_own_and_leaves_this_process_as_it_was(small, memory_back):
    import torch

    def of_this_process() -> tuple:
        threads = torch.get_num_threads(), torch.set_num_threads
        return dict(os.environ), os.sched_getaffinity(0), *threads

    engine, logs, kept, before = open_engine(**small), [], None, of_this_process()
    for _ in range(2):
        with engine as llm:
            if kept:  # what is kept of the first does not lead to the second
                with pytest.raises(EngineClosedError):
                    kept.generate(["x"])
            assert engine.release is None
        kept = llm
        logs.append(engine.log_text)
    assert of_this_process() == before
    for log in logs:  # vLLM says some things once a process; here once an engine
        assert "Initializing a V1 LLM engine" in log
        assert "KV cache size" in log
    assert engine.log_file.name == "baseline-2.log"


def test_an_interrupt_while_generating_finishes_the_engine(small, memory_back):
    engine = open_engine(**small)
    with engine:
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ask(engine, "Tell a long story.", 400)
        with pytest.raises(EngineClosedError, match="interrupted"):
            ask(engine, CAPITAL)
    engine = open_engine(**small)
    with engine:
        assert "Paris" in ask(engine, CAPITAL)


def test_an_interrupt_late_in_the_start_leaves_vllms_caches_as_they_were(small, memory_back, monkeypatch):
    from vllm.v1.engine import core

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # the weights are loaded by then, the engine not yet handed over
        patched.setattr(core, "freeze_gc_heap", interrupted)
        with pytest.raises(KeyboardInterrupt), open_engine(**small):
            pass
    engine = open_engine(**small)
    with engine:
        assert "Paris" in ask(engine, CAPITAL)


@pytest.mark.parametrize("where", ["in this process", pytest.param("in a child", marks=pytest.mark.slow)])
def test_an_interrupt_while_releasing_waits_for_the_release(small, memory_back, monkeypatch, where):
    real = release.forget_caches

    def interrupted():
        for _ in range(3):  # whoever presses it again and again gets the release all the same
            os.kill(os.getpid(), signal.SIGINT)
        real()

    engine = open_engine(**small, in_child=where == "in a child")
    with pytest.raises(KeyboardInterrupt) as caught, engine:
        monkeypatch.setattr(release, "forget_caches", interrupted)
    named(caught.value, "interrupted")
    assert not children()


def test_memory_that_does_not_come_back_is_an_error_that_says_who_holds_it(small, monkeypatch):
    monkeypatch.setattr(release, "DEADLINE_S", 0.2)
    with (
        pytest.raises(MemoryHeldError, match=f"this process .{os.getpid()}") as caught,
        open_engine(**small),
    ):
        hoard = bytearray(os.urandom(160 * MIB))
    assert len(hoard) == 160 * MIB
    named(caught.value, "memory-held")


@pytest.mark.parametrize(("seen", "after"), [([2], 2), ([63, 40, 2], 2), ([300, 200, 90, 90], 90)])
def test_the_memory_is_read_when_it_no_longer_falls(seen, after):
    """In MiB: what a thread gives back a moment after the engine is no part of what stayed behind."""
    readings = iter(seen)
    watch = MemoryWatch(Machine("cpu", "c", 0), Belongings())
    watch.before, watch.in_use = (0,), lambda: (round(next(readings) * MIB),)
    assert watch.wait_until_back((0,), 0.0).left == after * MIB
    assert next(readings, None) is None


def test_a_release_that_fails_still_puts_back_what_it_borrowed(small, monkeypatch):
    def fails():
        raise OSError("no such cache")

    before = dict(os.environ)
    with pytest.raises(OSError, match="no such cache"), open_engine(**small):
        monkeypatch.setattr(release, "forget_caches", fails)
    monkeypatch.undo()
    assert dict(os.environ) == before
    with open_engine(**small) as llm:
        assert llm.generate("One")
