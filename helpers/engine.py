"""One vLLM engine, owned by a ``with`` block that gives all its memory back.

    with open_engine("embedded", scheme="baseline") as engine:
        print(engine.code)                     # the vLLM code a reader would write
        outputs = engine.generate(prompts, sampling_params)

On a CPU the engine lives in this process (starts in seconds, once vLLM is imported); on a GPU in a
spawned child. After the block, however it ended, the memory is back where it was, checked against the
operating system or the driver, or an error says who still holds it. vLLM's whole log, its children's
too, goes to ``engine.log_file``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import re
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from helpers import diagnose, hardware, models, once, parameters, schemes, secrets, weights
from helpers import ownership as own
from helpers.capture import LogFile, Progress
from helpers.hardware import MIB
from helpers.probe import PROBE

DEADLINE_S = 30.0  # how long released memory may take to come back before that is an error
FEW = 4 * MIB  # nobody waits for the last of these
LEFT_GPU = 64 * MIB  # what the driver's count may differ by after a release
# The same on a CPU. A swap alone leaves less than 20 MB (the tests insist); more may be the reader's own.
LEFT_CPU = 96 * MIB
# Arguments that serve these helpers alone: not shown to readers as code they would write.
OURS = {"use_tqdm_on_load": False, "worker_extension_cls": PROBE}
# Ten CUDA graphs instead of 51: a batch in between is filled up to the next size. And the kernels of each way
# of sampling are compiled when a request first asks for one, not ahead. On an H200 a first start of
# Mistral-7B's shape took 49 s instead of 93, a second 15 s instead of 27 (reference/h200/starts.jsonl).
SOONER = {
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]},
    "kernel_config": {"enable_jit_warmup": False},
}
CHATTY = ("vllm", "torch", "transformers")  # loggers whose lines belong in the file, not in the notebook
LEFT_FIRST = 256 * MIB  # the first engine of a process leaves modules behind that vLLM imports late


class EngineError(RuntimeError):
    """An engine that cannot be used; the message says why and what to do."""


class EngineStartError(EngineError):
    """vLLM could not build the engine; the message holds the root cause from its log.

    ``report`` is the diagnosis, made when it happened: a card in a notebook, the same as text elsewhere.
    """

    report: diagnose.Report | None = None


class EngineDiedError(EngineError):
    """The engine's process ended while it worked; the message and ``report`` say why, if that is known."""

    report: diagnose.Report | None = None


class EngineClosedError(EngineError):
    """The engine was released or interrupted; open a new one."""


class MemoryHeldError(EngineError):
    """After the release the memory did not come back; the message names who holds it."""


@dataclass(frozen=True)
class Release:
    """What a release gave back.

    ``before`` and ``after`` are bytes in use before the engine and after its release (this process's
    anonymous memory on a CPU, the driver's count on a GPU); ``held`` the bytes while it was open.
    ``first`` marks the first engine in this process, which leaves lazily imported modules behind.
    """

    before: int
    held: int
    after: int
    seconds: float
    first: bool

    @property
    def left_mib(self) -> float:
        """What stayed behind, in MiB; negative when more came back than was taken."""
        return (self.after - self.before) / MIB

    def __str__(self) -> str:
        note = ", modules that vLLM imports late" if self.first and self.left_mib > 1 else ""
        return (
            f"Released in ‹{self.seconds:.1f} s›. Memory before ‹{self.before / MIB:,.0f} MiB›, open "
            f"‹{self.held / MIB:,.0f} MiB›, after ‹{self.after / MIB:,.0f} MiB›. "
            f"Left behind: ‹{self.left_mib:+,.0f} MiB{note}›."
        )


_open: Engine | None = None  # one engine a process: a second would fight it for the memory
_engines_built = 0


def open_engine(
    model: str | models.Model = models.EMBEDDED,
    scheme: str = "baseline",
    *,
    log_dir: str | Path = "runs/logs",
    in_process: bool | None = None,
    **llm_args,
) -> Engine:
    """Return an engine for ``with``; it starts when the block is entered.

    Args:
        model: ``embedded``, a folder, a hub name, or what ``models.resolve`` returned.
        scheme: a name of ``schemes.SCHEMES``; it decides dtype and quantization for this machine.
        log_dir: folder for vLLM's log; one file an engine.
        in_process: build the engine in this process (the default on a CPU) or in a child.
        llm_args: further arguments of ``vllm.LLM``; they win over the defaults of ``default_args``.

    Raises:
        SchemeError, ModelError: nothing was started.
    """
    machine = hardware.detect()
    resolved, checkpoint, way = resolve_checkpoint(model, scheme, machine)
    if in_process is None:
        in_process = machine.kind == "cpu"
    args = {"model": str(checkpoint.folder), **default_args(machine, resolved), **way.args, **llm_args}
    check_gpus(machine, args.get("tensor_parallel_size", 1), resolved)
    return Engine(resolved, checkpoint, scheme, way, machine, args, Path(log_dir), in_process)


def resolve_checkpoint(
    model: str | models.Model, scheme: str, machine: hardware.Machine
) -> tuple[models.Model, models.Model, schemes.Way]:
    """Return the model, what is loaded for it under a scheme (made first if need be), and how it runs.

    The one place where a scheme becomes files, for engines in this process and for servers alike.

    Raises:
        SchemeError, ModelError: the scheme does not run here, or there are no such files.
    """
    rule = schemes.scheme(scheme)
    way = rule.way(machine)
    resolved = model if isinstance(model, models.Model) else models.resolve(model)
    checkpoint = resolved
    if rule.recipe:
        from helpers import checkpoints  # it measures with engines in turn

        checkpoint = checkpoints.make(resolved, rule.recipe)
        if way.expanded:
            checkpoint = checkpoints.expand(checkpoint)
    return resolved, checkpoint, way


def default_args(machine: hardware.Machine, model: models.Model) -> dict:
    """Arguments of ``vllm.LLM`` that differ from vLLM's own defaults, and why.

    - ``max_model_len``: the lessons need 2,048 tokens; a long context costs KV cache.
    - ``enable_prefix_caching=False``: a repeated prompt would not be computed, so not be measured.
    - ``use_tqdm_on_load=False``: this module shows the progress of the whole start instead.
    - ``worker_extension_cls``: lets ``measure`` and ``quality`` look inside; it changes no result.
    - on a CPU ``enforce_eager`` (compiling takes longer than the lesson) and 1 GiB of KV cache;
    - on a GPU nine tenths of the memory, which leaves room for the notebook's own plots and tools, and
      what makes a lesson's engines start sooner (``SOONER``; a server starts once, and keeps vLLM's choice);
    - a shape-only model has neither weights nor a tokenizer to load.
    """
    longest = model.config.get("max_position_embeddings", 2048)
    args = {"max_model_len": min(2048, longest), "enable_prefix_caching": False, **OURS}
    if model.shape_only:
        args |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if machine.kind == "cpu":
        return args | {"enforce_eager": True, "kv_cache_memory_bytes": hardware.GIB}
    return args | {"gpu_memory_utilization": 0.9} | SOONER


def check_gpus(machine: hardware.Machine, wanted: int, model: models.Model) -> None:
    """Refuse a ``tensor_parallel_size`` that this machine or this model cannot have.

    Raises:
        EngineError: more GPUs than there are, or a number that the attention heads cannot be dealt to.
    """
    parameters.whole("tensor_parallel_size", wanted, 1, 64)
    if wanted == 1:
        return
    if machine.kind != "cuda" or wanted > machine.count:
        there = f"{machine.count} GPU(s)" if machine.kind == "cuda" else "no GPU"
        raise EngineError(
            f"tensor_parallel_size={wanted} needs {wanted} GPUs; this machine shows {there}. Lower it to "
            f"{machine.count if machine.kind == 'cuda' else 1}, or look at CUDA_VISIBLE_DEVICES."
        )
    heads = model.config.get("num_attention_heads", wanted)
    if heads % wanted:
        raise EngineError(
            f"tensor_parallel_size={wanted} does not divide the {heads} attention heads of {model.title}: "
            "each GPU gets the same number of heads."
        )


class Engine:
    """A vLLM engine and everything it holds; made by ``open_engine``, used inside its ``with`` block."""

    def __init__(self, model, checkpoint, scheme, way, machine, args, log_dir, in_process):
        self.model: models.Model = model
        self.checkpoint: models.Model = (
            checkpoint  # what is loaded: the model, or a quantized one made from it
        )
        self.scheme: str = scheme
        self.way: schemes.Way = way
        self.machine: hardware.Machine = machine
        self.args: dict = args
        self.in_process: bool = in_process
        self.log_dir: Path = log_dir
        self.log_file: Path | None = None  # a new one each time the engine starts
        self.start_s: float | None = None  # seconds from vLLM imported to ready
        self.import_s: float = 0.0  # seconds to import vLLM; 0 when this process had it already
        self.first = False  # the first engine of this process
        self.loading_bytes: int | None = None  # anonymous memory the weights took: CPU, first engine only
        self.release: Release | None = None
        self._llm = None
        self._runner = lambda: None  # a weak reference to the in-process model runner
        self._own = own.Belongings()
        self._end_watch = lambda: None  # of the engine's process, if it has one
        self._finished: str | None = "not started: use it in a with block"

    # -- using it -------------------------------------------------------------------------------

    @property
    def llm(self):
        """The ``vllm.LLM`` itself.

        Raises:
            EngineClosedError: before the block, after it, or after an interrupt.
        """
        if self._finished:
            raise self._closed()
        return self._llm

    def _closed(self) -> EngineClosedError:
        return EngineClosedError(
            f"This engine ({self.scheme}) is {self._finished}. Open a new one with open_engine(...)."
        )

    @property
    def code(self) -> str:
        """The vLLM code that builds the same engine without these helpers."""
        ours = self.checkpoint.kind in (models.EMBEDDED, "made")  # its folder is in a cache of ours
        named = self.checkpoint.title if ours else self.checkpoint.name
        shown = {**self.args, "model": named}
        lessons = OURS | SOONER  # what a reader would not write
        shown = {key: value for key, value in shown.items() if (key, value) not in lessons.items()}
        lines = [f"    {key}={value!r}," for key, value in shown.items()]
        return secrets.remove("\n".join(["from vllm import LLM", "", "llm = LLM(", *lines, ")"]))

    @property
    def log(self) -> str:
        """vLLM's log of this engine so far."""
        if self.log_file is None or not self.log_file.exists():
            return ""
        return self.log_file.read_text(errors="replace")

    @property
    def kernels(self) -> list[str]:
        """The kernels vLLM says it chose for the quantized layers; empty where it says nothing."""
        found = re.findall(r"(?:Selected|Using) (\w*Kernel\w*) for ", self.log)
        return list(dict.fromkeys(found))

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens the KV cache holds, of all requests together."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def generate(self, prompts, sampling_params=None, **kwargs):
        """Call ``LLM.generate``; an interrupt aborts what is queued and finishes the engine."""
        self.model.check_words()
        if prompts is None or isinstance(prompts, int | float | bytes):
            raise TypeError(f"prompts must be a text, or a list of texts, not {prompts!r}.")
        kwargs.setdefault("use_tqdm", False)
        with self._finished_if_interrupted():
            return self.llm.generate(prompts, sampling_params, **kwargs)

    def chat(self, messages, sampling_params=None, **kwargs):
        """Call ``LLM.chat``: the model's chat template around ``messages``."""
        self.model.check_words()
        kwargs.setdefault("use_tqdm", False)
        with self._finished_if_interrupted():
            return self.llm.chat(messages, sampling_params, **kwargs)

    def ask(self, question: str, max_tokens: int = 100):
        """Answer one question greedily; return vLLM's ``RequestOutput``.

        An instruct model gets its chat template; a base model gets the bare text to continue.

        Raises:
            ShapeOnlyError: the model has no weights.
        """
        self.model.check_words()
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        if self.model.has_chat_template:
            return self.chat([{"role": "user", "content": question}], params)[0]
        return self.generate([question], params)[0]

    @contextlib.contextmanager
    def _finished_if_interrupted(self):
        try:
            yield
        except KeyboardInterrupt:
            self.abort()
            self._finished = "finished: it was interrupted while it worked"
            raise
        except Exception as error:
            if self._llm is None:  # another thread left the block meanwhile: whatever broke, broke of that
                own.clear_frames(error)  # kept by somebody, it would keep the model
                raise self._closed() from None
            if type(error).__name__ != "EngineDeadError":  # vLLM's; imported, it would import vLLM here
                raise
            self._finished = "finished: its process ended while it worked"
            codes = ", ".join(map(str, self._exit_codes())) or "unknown"
            sentence = f"the engine's process ended while it worked, exit code {codes}"
            error.add_note(sentence)
            raise self._diagnosed(EngineDiedError, sentence.capitalize(), error) from _quotable(error)
        if self._llm is None:  # dropped requests end as if they were done: half an answer is none
            raise self._closed()

    def _exit_codes(self) -> list[int]:
        """How the engine's processes ended; -9 stands for a SIGKILL."""
        with contextlib.suppress(Exception):  # in this process there is none
            processes = self._llm.llm_engine.engine_core.resources.engine_manager.processes
            for process in processes:
                process.join(2)
            return [process.exitcode for process in processes if process.exitcode is not None]
        return []

    def abort(self) -> None:
        """Drop every request that is queued or running."""
        engine = self._llm.llm_engine
        with contextlib.suppress(Exception):  # a dead child has nothing left to abort
            engine.abort_request(list(engine.output_processor.request_states), internal=True)

    # -- owning it ------------------------------------------------------------------------------

    def __enter__(self) -> Engine:
        global _open
        if _open is not None:
            raise EngineError(
                f"An engine ({_open.scheme}) is still open in this process and holds its memory. "
                "Leave its with block first: two engines at once is how the second runs out of memory."
            )
        with own.interrupts_deferred():  # what a release needs is there before anything can be interrupted
            self.log_file = _new_log_file(self.log_dir, self.scheme)
            self._log = _opened(self.log_file)
            self._settings = own.Settings.save()
            self._before = self._memory()
        try:
            _open = self
            self._start()
        except BaseException as error:
            self._finished = "finished: it did not start"
            self._let_go_despite(error)
            if isinstance(error, Exception):
                raise self._start_error(error) from _quotable(error)
            raise
        finally:
            if self._finished:
                _open = None
        return self

    def _start(self) -> None:
        global _engines_built
        os.environ.update(environment(self.in_process) | hardware.compiling(self.machine, self.args))
        with Progress(self.log_file), self._log.capturing():
            try:
                self.import_s = 0.0 if "vllm" in sys.modules else _import_vllm()
            finally:  # what the import leaves is no engine's, also where Ctrl+C waited for its end
                self._before = self._memory()
            self.first = _engines_built == 0
            _engines_built += 1
            self._log.follow(*CHATTY)  # their handlers were bound when they were imported
            begun = time.perf_counter()
            insisting = contextlib.nullcontext() if self.in_process else own.interrupts_that_insist()
            with _watched_loading(self), self._own.watched(), own.children_bound_to_this(), insisting:
                from vllm import LLM

                if self.in_process and not self.way.onednn:
                    own.without_onednn()
                self._llm = LLM(**self.args)
                if not self.in_process:
                    self._end_watch = own.wake_on_death(self._llm.llm_engine.engine_core)
        self._log.follow(*CHATTY)  # and bound anew if building the engine configured logging again
        self.start_s = time.perf_counter() - begun
        self._finished = None
        self._settings.engine_started()
        imported = f" (importing vLLM took ‹{self.import_s:.1f} s› before)" if self.import_s else ""
        print(f"vLLM is ready after ‹{self.start_s:.1f} s›{imported}. Its log: ‹{self.log_file.name}›")

    def _start_error(self, error: Exception) -> EngineStartError:
        return self._diagnosed(EngineStartError, "vLLM could not start the engine", error)

    def _diagnosed(self, kind: type[EngineError], sentence: str, error: Exception) -> EngineError:
        """An error that says what happened, why, who holds the memory, and what to do."""
        for problem in weights.damage(self.checkpoint.folder):
            error.add_note(problem)
        once.doubt(self.checkpoint.folder)  # if it is in a cache of ours and damaged, the next run mends it
        report = diagnose.explain(error, self.log)
        cause = diagnose.redact(diagnose.root_cause(self.log) or diagnose.short(error))
        trace = f"{report.trace}\n" if report.trace and not self.in_process else ""  # else it is shown above
        found = kind(
            f"{sentence} ({self.scheme}, {self.model.title}).\nCause: {cause}\n{report.advice}\n{trace}"
            f"Full log: ‹{os.path.relpath(self.log_file)}›"
        )
        found.report = report
        return found

    def __exit__(self, kind, error, tb) -> None:
        global _open
        self._finished = "finished: its with block has ended"
        try:
            if error is None:
                self._let_go(None)
            else:
                self._let_go_despite(error)
        finally:
            _open = None

    def _let_go_despite(self, error: BaseException) -> None:
        """Release while another error is on its way out: that one matters more than what this finds."""
        try:
            self._let_go(error)
        except MemoryHeldError as held:
            error.add_note(str(held))

    def _let_go(self, error: BaseException | None) -> None:
        """Release everything, finishing even when Ctrl+C comes meanwhile; then check the memory."""
        with own.interrupts_deferred():
            begun, held = time.perf_counter(), self._memory()
            with self._log.capturing():
                if error is not None:
                    own.clear_frames(error)
                self._shut_down()
            self._log.close()
            self._settings.restore()
            after = self._wait_for_memory()
            seconds = time.perf_counter() - begun
            self.release = Release(self._before, held, after, seconds, self.first)
        if after - self._before > self._allowed():
            raise MemoryHeldError(self._held_message(after))

    def _shut_down(self) -> None:
        self._end_watch()
        llm, self._llm, torn_down = self._llm, None, False
        if llm is not None:
            core = llm.llm_engine
            with contextlib.suppress(Exception):
                core.abort_request(list(core.output_processor.request_states), internal=True)
            with contextlib.suppress(Exception):  # a child that died has shut down already
                core.engine_core.shutdown()
                torn_down = True
            own.wake(core.engine_core)  # another thread may still wait for what will not come
            vars(llm).update(
                dict.fromkeys(vars(llm), _Released(self))
            )  # a kept `llm` holds nothing, and says so
        if self.in_process:
            own.empty_runner(self._runner())
            if not torn_down:
                own.leave_distributed()
        self._own.end()
        own.forget_caches()

    # -- its memory -----------------------------------------------------------------------------

    def _memory(self) -> int:
        if self.machine.kind == "cuda":
            return hardware.gpu_memory_used()
        import psutil

        total = hardware.anonymous_memory()
        for child in psutil.Process().children(recursive=True) if not self.in_process else []:
            with contextlib.suppress(OSError, psutil.Error):
                total += hardware.anonymous_memory(child.pid)
        return total

    def _allowed(self) -> int:
        if self.machine.kind == "cuda":
            return LEFT_GPU
        return LEFT_FIRST if self.first else LEFT_CPU

    def _wait_for_memory(self) -> int:
        """Wait until the memory is back or the deadline is over; return the bytes in use then.

        Back means within what may stay, and no longer falling: threads that end give theirs a moment later.
        """
        stop, last, most = time.monotonic() + DEADLINE_S, math.inf, self._before + self._allowed()
        while True:
            gc.collect()  # only here: whoever shut the engine down has let go of it by now
            own.trim_heap()
            now = self._memory()
            if last <= most and last - now <= MIB:
                return now
            if now - self._before < FEW or time.monotonic() >= stop:
                return now
            last = now
            time.sleep(0.1)

    def _held_message(self, after: int) -> str:
        left = (after - self._before) / MIB
        if self.machine.kind == "cuda":
            holders = [str(holder) for holder in own.holders(self.machine)]
        else:
            holders = [
                f"this process ({os.getpid()}): a variable that still refers to the model or its outputs"
            ]
        return (
            f"{left:,.0f} MiB did not come back within {DEADLINE_S:.0f} s of releasing the engine "
            f"({self.scheme}). Held by: {'; '.join(holders) or 'no process the driver can name'}. "
            "Delete what refers to it, or restart the kernel."
        )


class _Released:
    """Stands where a released engine was, for whoever kept a reference to the ``LLM``."""

    def __init__(self, engine: Engine):
        object.__setattr__(self, "_engine", engine)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._engine.llm  # raises EngineClosedError with the reason


def _new_log_file(log_dir: Path, scheme: str) -> Path:
    """A path that no engine has used yet: <dir>/<scheme>-1.log, -2.log, ..."""
    number = 1
    while (path := log_dir / f"{scheme}-{number}.log").exists():
        number += 1
    return path.absolute()


def _opened(path: Path) -> LogFile:
    try:
        return LogFile(path)
    except OSError as error:
        raise EngineError(
            f"The engine's log cannot be written: {error}. Name another folder: open_engine(log_dir=...)."
        ) from None


def _quotable(error: Exception) -> Exception | None:
    """An error that may be shown as the cause of another: none that quotes a secret, as vLLM's own may."""
    link: BaseException | None = error
    while link is not None:
        if secrets.remove(str(link)) != str(link):
            return None
        link = link.__cause__ or link.__context__
    return error


def environment(in_process: bool) -> dict[str, str]:
    """Settings vLLM reads from the environment when it is imported or starts a child."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        # A forked child dies in OpenMP if this process ever computed with torch; a spawned one does not.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
    }


def _import_vllm() -> float:
    """Import vLLM (9 s with compiled bytecode, 20 s without); return the seconds it took.

    Two fifths of it are torch, its compiler included, a fifth transformers, a tenth vLLM's own modules and
    the rest a hundred small ones: there is no part to leave out.

    Ctrl+C waits for the import: torch cannot be imported again in a process where it was cut short.
    """
    begun = time.perf_counter()
    own.one_heap()
    with own.interrupts_deferred():
        import vllm
        import vllm.entrypoints.llm
        import vllm.v1.engine.core
        import vllm.v1.worker.worker_base  # noqa: F401  imported here, they do not count as start
    return time.perf_counter() - begun


@contextlib.contextmanager
def _watched_loading(engine: Engine):
    """Note the in-process model runner, and what loading adds to this process's anonymous memory.

    The runner, so that its tensors can be dropped even if building the engine fails later. The memory,
    because summing the parameters would be wrong: oneDNN repacks the weights and empties the originals.
    """
    if not (engine.in_process and engine.machine.kind == "cpu"):
        yield
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        engine._runner = weakref.ref(self)
        before = _settled_memory()
        result = original(self, *args, **kwargs)
        engine.loading_bytes = _settled_memory() - before
        return result

    CPUModelRunner.load_model = load_model
    try:
        yield
    finally:
        CPUModelRunner.load_model = original


def _settled_memory() -> int:
    """This process's anonymous memory in bytes, garbage and freed heap pages given back first."""
    gc.collect()
    own.trim_heap()
    return hardware.anonymous_memory()
