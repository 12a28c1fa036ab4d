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
import gc
import math
import os
import re
import sys
import time
from pathlib import Path

from helpers.base import files, redact
from helpers.base.holders import who_holds
from helpers.base.machine import MIB, Machine, anonymous_memory, detect, gpu_memory_used
from helpers.engine import arguments, borrowed, children, interrupts, logfile, release
from helpers.engine.arguments import OURS, SOONER
from helpers.engine.borrowed import Settings
from helpers.engine.children import Belongings
from helpers.engine.errors import (
    EngineClosedError,
    EngineDiedError,
    EngineError,
    EngineStartError,
    MemoryHeldError,
)
from helpers.engine.logfile import CHATTY, Progress
from helpers.engine.release import FEW, LEFT_CPU, LEFT_FIRST, LEFT_GPU, Release, Released
from helpers.faults import explain, log
from helpers.model import checkpoints, resolve, schemes, weights
from helpers.model.model import EMBEDDED, Model
from helpers.model.schemes import Way

open_engine_now: Engine | None = None  # one engine a process: a second would fight it for the memory

_engines_built = 0


def open_engine(
    model: str | Model = EMBEDDED,
    scheme: str = "baseline",
    *,
    log_dir: str | Path = "runs/logs",
    in_process: bool | None = None,
    **llm_args,
) -> Engine:
    """Return an engine for ``with``; it starts when the block is entered.

    Args:
        model: ``embedded``, a folder, a hub name, or what ``resolve.resolve`` returned.
        scheme: a name of ``schemes.SCHEMES``; it decides dtype and quantization for this machine.
        log_dir: folder for vLLM's log; one file an engine.
        in_process: build the engine in this process (the default on a CPU) or in a child.
        llm_args: further arguments of ``vllm.LLM``; they win over the defaults of ``default_args``.

    Raises:
        SchemeError, ModelError: nothing was started.
    """
    machine = detect()
    resolved, checkpoint, way = resolve_checkpoint(model, scheme, machine)
    if in_process is None:
        in_process = machine.kind == "cpu"
    args = {
        "model": str(checkpoint.folder),
        **arguments.default_args(machine, resolved),
        **way.args,
        **llm_args,
    }
    arguments.check_gpus(machine, args.get("tensor_parallel_size", 1), resolved)
    return Engine(resolved, checkpoint, scheme, way, machine, args, Path(log_dir), in_process)


def resolve_checkpoint(model: str | Model, scheme: str, machine: Machine) -> tuple[Model, Model, Way]:
    """Return the model, what is loaded for it under a scheme (made first if need be), and how it runs.

    The one place where a scheme becomes files, for engines in this process and for servers alike.

    Raises:
        SchemeError, ModelError: the scheme does not run here, or there are no such files.
    """
    rule = schemes.scheme(scheme)
    way = rule.way(machine)
    resolved = model if isinstance(model, Model) else resolve.resolve(model)
    checkpoint = resolved
    if rule.recipe:
        checkpoint = checkpoints.make(resolved, rule.recipe)
        if way.expanded:
            checkpoint = checkpoints.expand(checkpoint)
    return resolved, checkpoint, way


class Engine:
    """A vLLM engine and everything it holds; made by ``open_engine``, used inside its ``with`` block."""

    def __init__(self, model, checkpoint, scheme, way, machine, args, log_dir, in_process):
        self.model: Model = model
        self.checkpoint: Model = checkpoint  # what is loaded: the model, or a quantized one made from it
        self.scheme: str = scheme
        self.way: Way = way
        self.machine: Machine = machine
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
        self._own = Belongings()
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
        ours = self.checkpoint.kind in (EMBEDDED, "made")  # its folder is in a cache of ours
        named = self.checkpoint.title if ours else self.checkpoint.name
        shown = {**self.args, "model": named}
        lessons = OURS | SOONER  # what a reader would not write
        shown = {key: value for key, value in shown.items() if (key, value) not in lessons.items()}
        lines = [f"    {key}={value!r}," for key, value in shown.items()]
        return redact.remove("\n".join(["from vllm import LLM", "", "llm = LLM(", *lines, ")"]))

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
                release.clear_frames(error)  # kept by somebody, it would keep the model
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
        if open_engine_now is not None:
            raise EngineError(
                f"An engine ({open_engine_now.scheme}) is still open in this process and holds its memory. "
                "Leave its with block first: two engines at once is how the second runs out of memory."
            )
        with (
            interrupts.interrupts_deferred()
        ):  # what a release needs is there before anything can be interrupted
            self.log_file = logfile.new_log_file(self.log_dir, self.scheme)
            self._log = logfile.open_log(self.log_file)
            self._settings = Settings.save()
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
        os.environ.update(
            arguments.environment(self.in_process) | arguments.compiling(self.machine, self.args)
        )
        with Progress(self.log_file), self._log.capturing():
            try:
                self.import_s = 0.0 if "vllm" in sys.modules else _import_vllm()
            finally:  # what the import leaves is no engine's, also where Ctrl+C waited for its end
                self._before = self._memory()
            self.first = _engines_built == 0
            _engines_built += 1
            self._log.follow(*CHATTY)  # their handlers were bound when they were imported
            begun = time.perf_counter()
            insisting = contextlib.nullcontext() if self.in_process else interrupts.interrupts_that_insist()
            with (
                release.watched_loading(self),
                self._own.watched(),
                children.children_bound_to_this(),
                insisting,
            ):
                from vllm import LLM

                if self.in_process and not self.way.onednn:
                    borrowed.without_onednn()
                self._llm = LLM(**self.args)
                if not self.in_process:
                    self._end_watch = children.wake_on_death(self._llm.llm_engine.engine_core)
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
        files.doubt(self.checkpoint.folder)  # if it is in a cache of ours and damaged, the next run mends it
        report = explain.explain(error, self.log)
        cause = redact.redact(log.root_cause(self.log) or log.short(error))
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
        with interrupts.interrupts_deferred():
            begun, held = time.perf_counter(), self._memory()
            with self._log.capturing():
                if error is not None:
                    release.clear_frames(error)
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
            children.wake(core.engine_core)  # another thread may still wait for what will not come
            vars(llm).update(
                dict.fromkeys(vars(llm), Released(self))
            )  # a kept `llm` holds nothing, and says so
        if self.in_process:
            release.empty_runner(self._runner())
            if not torn_down:
                release.leave_distributed()
        self._own.end()
        release.forget_caches()

    # -- its memory -----------------------------------------------------------------------------

    def _memory(self) -> int:
        if self.machine.kind == "cuda":
            return gpu_memory_used()
        import psutil

        total = anonymous_memory()
        for child in psutil.Process().children(recursive=True) if not self.in_process else []:
            with contextlib.suppress(OSError, psutil.Error):
                total += anonymous_memory(child.pid)
        return total

    def _allowed(self) -> int:
        if self.machine.kind == "cuda":
            return LEFT_GPU
        return LEFT_FIRST if self.first else LEFT_CPU

    def _wait_for_memory(self) -> int:
        """Wait until the memory is back or the deadline is over; return the bytes in use then.

        Back means within what may stay, and no longer falling: threads that end give theirs a moment later.
        """
        stop, last, most = time.monotonic() + release.DEADLINE_S, math.inf, self._before + self._allowed()
        while True:
            gc.collect()  # only here: whoever shut the engine down has let go of it by now
            release.trim_heap()
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
            holders = [str(holder) for holder in who_holds(self.machine)]
        else:
            holders = [
                f"this process ({os.getpid()}): a variable that still refers to the model or its outputs"
            ]
        return (
            f"{left:,.0f} MiB did not come back within {release.DEADLINE_S:.0f} s of releasing the engine "
            f"({self.scheme}). Held by: {'; '.join(holders) or 'no process the driver can name'}. "
            "Delete what refers to it, or restart the kernel."
        )


def _quotable(error: Exception) -> Exception | None:
    """An error that may be shown as the cause of another: none that quotes a secret, as vLLM's own may."""
    link: BaseException | None = error
    while link is not None:
        if redact.remove(str(link)) != str(link):
            return None
        link = link.__cause__ or link.__context__
    return error


def _import_vllm() -> float:
    """Import vLLM (9 s with compiled bytecode, 20 s without); return the seconds it took.

    Two fifths of it are torch, its compiler included, a fifth transformers, a tenth vLLM's own modules and
    the rest a hundred small ones: there is no part to leave out.

    Ctrl+C waits for the import: torch cannot be imported again in a process where it was cut short.
    """
    begun = time.perf_counter()
    release.one_heap()
    with interrupts.interrupts_deferred():
        import vllm
        import vllm.entrypoints.llm
        import vllm.v1.engine.core
        import vllm.v1.worker.worker_base  # noqa: F401  imported here, they do not count as start
    return time.perf_counter() - begun
