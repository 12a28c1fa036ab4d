"""Provoke on a GPU what cannot be provoked without one, and keep the real logs.

    python3 -m tests.gpu_faults OUT            all of them, about six minutes on one idle GPU
    python3 -m tests.gpu_faults OUT no_gpu another_process

Each fault runs in a process of its own, on the embedded model. OUT gets one text file a fault (what was
raised, the diagnosis, the end of vLLM's log) and faults.json with all of them. Not collected by pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from helpers.base import machine, processes, redact
from helpers.base.machine import MIB
from helpers.engine.engine import open_engine
from helpers.engine.logfile import LogFile
from helpers.faults import explain
from helpers.model import embedded

KEPT = 30_000  # characters of a log; some write every tensor's name
LITTLE = {"max_model_len": 512, "enforce_eager": True, "gpu_memory_utilization": 0.05}
MOST = {"max_model_len": 512, "enforce_eager": True, "gpu_memory_utilization": 0.9}
# Half a trillion weights, by shape alone: no GPU holds them.
HUGE = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "head_dim": 128,
        "num_attention_heads": 128, "num_key_value_heads": 8}  # fmt: skip


def provoked(logs: Path, **args) -> None:
    with open_engine("embedded", log_dir=logs, **args):
        pass


def raw(log: LogFile, **args):
    """The reader's own ``vllm.LLM``, without these helpers; its output goes to a file all the same."""

    os.environ["VLLM_LOGGING_COLOR"] = "0"
    with log.capturing():
        from vllm import LLM

        log.follow("vllm")
        return LLM(model=str(embedded.prepare()), dtype="bfloat16", enforce_eager=True, **args)


# -- faults that end in an error: each raises it ----------------------------------------------------------


def another_engine(logs: Path) -> None:
    """The log this project was made from: a first LLM that is still there, then a second.

    And then one that asks for little and needs more: the out-of-memory error that was read as "too old".
    """
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    llm = raw(LogFile(logs / "0-first.log"), max_model_len=512, gpu_memory_utilization=0.9)
    assert llm
    try:
        provoked(logs, **MOST)
    finally:
        try:
            provoked(logs / "little", load_format="dummy", hf_overrides=HUGE, **LITTLE)
        except Exception as error:
            print(f"asked for little, needed more: {error}\n{_log(logs / 'little')[-6000:]}", flush=True)


# Forks, so that what holds the memory is no child of the process that is diagnosed.
HOLD = """
import os, time
if os.fork():
    os._exit(0)
import torch
free, total = torch.cuda.mem_get_info()
held = torch.empty(int(0.6 * total), dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(300)
"""


def another_process(logs: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, start_new_session=True)
    try:
        holder.stdout.readline()
        provoked(logs, **MOST)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def model_too_large(logs: Path) -> None:
    provoked(logs, load_format="dummy", hf_overrides=HUGE, **LITTLE)


def utilization_too_high(logs: Path) -> None:
    provoked(logs, **LITTLE | {"gpu_memory_utilization": 1.0})


def no_room_for_kv_cache(logs: Path) -> None:
    provoked(logs, **LITTLE | {"gpu_memory_utilization": 0.001})


def kv_cache_too_small(logs: Path) -> None:
    provoked(logs, **LITTLE | {"max_model_len": 8192, "kv_cache_memory_bytes": 64 * 2**20})


def fp8_per_channel_on_marlin(logs: Path) -> None:
    provoked(logs, quantization="fp8_per_channel", linear_backend="marlin", **LITTLE)


def fork_after_openmp(logs: Path) -> None:
    import torch

    (torch.ones(2048, 2048) @ torch.ones(2048, 2048)).sum()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    log = LogFile(logs / "fork.log")
    try:
        raw(log, max_model_len=512, gpu_memory_utilization=0.05)
    except Exception as error:
        error.add_note("\n" + str(explain.explain(error, log.path.read_text(errors="replace"))))
        raise


def no_gpu(logs: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    log = LogFile(logs / "hidden.log")
    raw(log, max_model_len=512)


def too_few_gpus(logs: Path) -> None:
    """vLLM's own words: the helpers refuse before it is asked."""
    raw(LogFile(logs / "three.log"), max_model_len=512, tensor_parallel_size=3)


# -- ownership: each prints what was left ------------------------------------------------------------------


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


def children() -> list[str]:
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(f"{child.name()} ({child.pid}) {' '.join(child.cmdline())[-60:]}")
    return found


def ownership_faults(logs: Path) -> None:
    """One engine after another in one process, each ended badly; a line on what each left."""
    _until(lambda: machine.gpu_memory_used() < 1024 * MIB, 30)  # what ran before is still ending
    shared, start = shared_memory(), machine.gpu_memory_used()

    def line(name: str, raised: BaseException | None) -> None:
        left = (machine.gpu_memory_used() - start) / MIB
        said = str(raised).splitlines()[0] if raised is not None and str(raised) else ""
        print(
            f"{name}: raised {type(raised).__name__} {said[:90]}; GPU memory left {left:+.0f} MiB; "
            f"processes left {children()}; "
            f"shared memory left {sorted(path.name for path in shared_memory() - shared)}",
            flush=True,
        )

    def engine(**more):
        return open_engine("embedded", log_dir=logs, in_process=False, **LITTLE | more)

    def after(seconds: float, number: int = signal.SIGINT, pid: int | None = None) -> None:
        threading.Timer(seconds, os.kill, (pid or os.getpid(), number)).start()

    def case(name: str, body) -> None:
        raised = None
        try:
            body()
        except BaseException as error:
            raised = error
        line(name, raised)

    def in_block():
        with engine() as first:
            try:
                with engine():
                    pass
            except Exception as error:
                print(f"open inside open: {type(error).__name__}: {error}", flush=True)
            first.ask("What is the capital of France? Answer with one word.", 10)
            _ = 1 / 0

    def load():
        after(6.0)
        with engine():
            print("it started before it was interrupted", flush=True)

    def generate():
        with engine(max_model_len=8192) as open_:
            after(2.0)
            open_.generate(["Tell a long story."] * 32, _long())

    def release():
        with engine() as open_:
            open_.engine.ask("Hello", 4)
            after(0.3)
            time.sleep(0.25)

    def killed():
        with engine(max_model_len=8192) as open_:
            pid = open_.llm_engine.engine_core.resources.engine_manager.processes[0].pid
            after(2.0, signal.SIGKILL, pid)
            open_.generate(["Tell a long story."] * 32, _long())

    def next_one():
        with engine() as open_:
            print(
                "the next engine says:",
                open_.engine.ask("What is the capital of France? Answer with one word.", 10).outputs[0].text,
                flush=True,
            )

    cases = {
        "exception in the block": in_block,
        "SIGINT while loading": load,
        "SIGINT while generating": generate,
        "SIGINT while releasing": release,
        "engine's process killed": killed,
        "the next engine": next_one,
    }
    for name, body in cases.items():
        case(name, body)


def _long():
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=8000, ignore_eos=True)


OWNER = """
import sys, time
from tests.gpu_faults import LITTLE
from helpers.engine.engine import open_engine
if __name__ == "__main__":
    engine = open_engine("embedded", log_dir=sys.argv[1], in_process=False, **LITTLE)
    with engine:
        print("open", flush=True); time.sleep(300)
"""


def owner_killed(logs: Path) -> None:
    """The notebook's kernel dies of SIGKILL: does its engine go with it, and the GPU's memory?"""
    import psutil

    script = logs / "owner.py"
    script.write_text(OWNER)
    start, shared = machine.gpu_memory_used(), shared_memory()
    owner = subprocess.Popen([sys.executable, str(script), str(logs)], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    while owner.stdout.readline().strip() not in ("open", ""):
        pass
    held = machine.gpu_memory_used()
    for child in psutil.Process(owner.pid).children(recursive=True):  # what each does about signals
        signals = [
            line for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if "Sig" in line
        ]
        print(child.pid, child.name(), signals, flush=True)
    owner.kill()
    owner.wait()
    begun = time.monotonic()
    while True:
        left = machine.gpu_memory_used() - start
        new = [path.name for path in shared_memory() - shared]
        if (left < 64 * MIB and not new) or time.monotonic() - begun > 20:
            break
        time.sleep(0.2)
    print(
        f"owner killed: held {(held - start) / MIB:.0f} MiB, left {left / MIB:+.0f} MiB "
        f"after {time.monotonic() - begun:.1f} s; shared memory left: {new}",
        flush=True,
    )


def runner_ended(logs: Path) -> None:
    """The runner of the notebooks is ended while a kernel holds an engine: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _ended(number, logs)


def _ended(number: signal.Signals, logs: Path) -> None:
    import psutil

    start, shared = machine.gpu_memory_used(), shared_memory()

    def held() -> float:
        return (machine.gpu_memory_used() - start) / MIB

    command = [sys.executable, "-m", "helpers.tools.run", "01_baseline", "-p", "quick_look", "true"]
    with (logs / f"{number.name}.log").open("w") as log:
        runner = subprocess.Popen(
            [*command, "--out", str(logs / number.name)], stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"TUTORIAL_MODEL": "embedded"},
        )  # fmt: skip
    _until(lambda: held() > 4096 or runner.poll() is not None, 90)
    most, everyone = held(), psutil.Process(runner.pid).children(recursive=True)
    begun = time.monotonic()
    runner.send_signal(number)
    _until(lambda: held() < 64, 30)
    seconds = time.monotonic() - begun
    _, alive = psutil.wait_procs(everyone, timeout=10)
    alive = [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    print(
        f"runner, {number.name}: held {most:.0f} MiB in {len(everyone)} processes; GPU memory left "
        f"{held():+.0f} MiB after {seconds:.1f} s; processes left {len(alive)}; "
        f"shared memory left {len(shared_memory() - shared)}",
        flush=True,
    )
    runner.wait(timeout=30)


def _until(reached, seconds: float) -> None:
    stop = time.monotonic() + seconds
    while not reached() and time.monotonic() < stop:
        time.sleep(0.2)


EXPECTED = {
    "another_engine": "another-engine",
    "another_process": "another-process",
    "model_too_large": "model-too-large",
    "utilization_too_high": "utilization-too-high",
    "no_room_for_kv_cache": "no-room-for-kv-cache",
    "kv_cache_too_small": "kv-cache-too-small",
    "fp8_per_channel_on_marlin": "fp8-per-channel-on-marlin",
    "fork_after_openmp": None,  # it hangs on a GPU, and is ended: nothing is raised that could be explained
    "no_gpu": "no-gpu-visible",
    "too_few_gpus": "too-few-gpus",
    "ownership_faults": None,
    "owner_killed": None,
    "runner_ended": None,
}
PATIENCE_S = 75  # for one fault; a forked child can hang for ever
# six engines; two runs of a notebook; three engines; often the first of all, on cold files
SLOW = {"ownership_faults": 200, "runner_ended": 200, "another_engine": 150, "owner_killed": 150}


def one(name: str, out: Path) -> None:
    """Provoke one fault in this process and write down what there is to see."""
    logs = out / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    raised, report = "nothing was raised", None
    try:
        globals()[name](logs)
    except BaseException as error:
        raised = "".join(traceback.format_exception(error))[-6000:]
        report = explain.explain(error, _log(logs))
    found = {
        "raised": raised,
        "report": str(report),
        "diagnosis": report and report.name,
        "log": _log(logs)[-KEPT:],
    }
    (out / f"{name}.json").write_text(json.dumps(found))
    os._exit(0)  # whatever this process started is ended by the one that started it


def _log(logs: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(logs.glob("*.log")))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_faults", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for what is found")
    parser.add_argument("names", nargs="*", metavar="FAULT", help=f"of {', '.join(EXPECTED)}; all by default")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(EXPECTED):
        parser.error(f"no fault {', '.join(sorted(unknown))}")
    if machine.detect().kind != "cuda":
        parser.error("these faults need a GPU, and this machine shows none")
    out, names = given.out.absolute(), given.names or list(EXPECTED)
    out.mkdir(parents=True, exist_ok=True)
    found, begun = {}, time.monotonic()
    for name in names:  # one after another: each must find the GPU empty
        found[name] = {
            key: redact.redact(value) if isinstance(value, str) else value
            for key, value in _provoke(name, out).items()
        }
        text = "\n\n".join(f"== {key}\n{value}" for key, value in found[name].items())
        (out / f"{name}.txt").write_text(text[-40_000:])
        got, wanted = found[name]["diagnosis"], EXPECTED[name]
        right = "as expected" if got == wanted else f"EXPECTED {wanted}"
        print(f"{time.monotonic() - begun:5.0f} s  {name}: {got} ({right})", flush=True)
        if wanted is None:
            print(found[name]["printed"], flush=True)
        (out / "faults.json").write_text(json.dumps(found, indent=1))


def _provoke(name: str, out: Path) -> dict:
    """Run one fault in a process group of its own, end whatever is left, and wait for the GPU's memory."""
    before, printed, path = machine.gpu_memory_used(), out / f"{name}.printed", out / f"{name}.json"
    command = [sys.executable, "-m", "tests.gpu_faults", "--one", name, str(out)]
    with printed.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"TUTORIAL_HEADLESS": "1"},
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SLOW.get(name, PATIENCE_S))
    result = {"raised": "no result: it hung and was ended", "diagnosis": None, "log": ""}
    if path.exists():
        result = json.loads(path.read_text())
        path.unlink()
    else:
        result["log"] = _log(out / "logs" / name)[-KEPT:]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while (left := machine.gpu_memory_used() - before) > 64 * MIB and time.monotonic() < deadline:
        _end_orphans()
        time.sleep(0.2)
    result |= {"printed": printed.read_text(errors="replace")[-8000:], "expected": EXPECTED[name]}
    printed.unlink()
    return result | {"left_mib": round(left / MIB)}


def _end_orphans() -> None:
    """End what a killed process left: engines are in groups of their own, and fall to this subreaper."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "--one" not in child.cmdline():
                for process in (*child.children(recursive=True), child):
                    process.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]))
    else:
        with processes.owned_processes():
            main(sys.argv[1:])
