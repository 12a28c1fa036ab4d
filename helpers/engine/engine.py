"""One vLLM engine, owned by a ``with`` block that gives all its memory back.

    engine = open_engine("embedded", scheme="baseline")
    with engine as llm:                                      # a vllm.LLM
        outputs = llm.generate(prompts, SamplingParams(max_tokens=50))
    print(engine.release)

On a CPU the engine lives in this process (starts in seconds, once vLLM is imported); on a GPU in a
spawned child. After the block, however it ended, the memory is back where it was, checked against the
operating system or the driver, or an error says who still holds it. vLLM's whole log, its children's
too, goes to ``engine.log_file``.

What Ctrl+C does in each phase:

    importing vLLM     waits for the import's end (``owned_llm.import_vllm``)
    building           here: Python's own; with a child: raised each second until vLLM lets it through
                       (``interrupts_that_insist``); what was built is released
    generating         drops all requests and finishes the engine; the block ends unless it catches
                       it (``guarded``)
    releasing          waits until all is released, then comes once (``_let_go``)
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from helpers.base import interrupts
from helpers.base.machine import Machine, detect
from helpers.engine import arguments, borrowed, children, errors, logfile, owned_llm, release
from helpers.engine.borrowed import Settings
from helpers.engine.children import Belongings
from helpers.engine.logfile import CHATTY, LogFile
from helpers.engine.release import MemoryWatch, Release, Released
from helpers.faults import log
from helpers.model import checkpoints, lookup, schemes, weights
from helpers.model.model import EMBEDDED, Model
from helpers.model.schemes import Way

_open: Engine | None = None  # one engine a process: a second would fight it for the memory
_first = True  # no engine was started in this process yet

ANEW = "Open a new one with open_engine(...)"


def opened() -> Engine | None:
    """The engine that is open in this process, if one is."""
    return _open


def owner_of(llm) -> Engine:
    """The engine of the ``llm`` that a ``with open_engine(...) as llm`` block gave, or the engine itself.

    Raises:
        TypeError: a ``vllm.LLM`` that was built without ``open_engine``.
    """
    owner = llm if isinstance(llm, Engine) else getattr(llm, "engine", None)
    if not isinstance(owner, Engine):
        raise TypeError(f"This needs the llm of `with open_engine(...) as llm:`, not {type(llm).__name__}.")
    return owner


def open_engine(
    model: str | Model = EMBEDDED,
    scheme: str = "baseline",
    *,
    checkpoint: Model | None = None,
    log_dir: str | Path = "runs/logs",
    in_child: bool = False,
    **llm_args,
) -> Engine:
    """Return an engine for ``with``, whose block gets a ``vllm.LLM``; it starts when the block is entered.

    Args:
        model: ``embedded``, a folder, a hub name, or what ``lookup.resolve`` returned.
        scheme: a name of ``schemes.EVERY``; it decides dtype and quantization for this machine.
        checkpoint: what ``checkpoints.make`` made of the model for this scheme with a program of yours.
        log_dir: folder for vLLM's log; one file an engine.
        in_child: build the engine in a child of this process on a CPU, too; on a GPU it always is in one, as
            a GPU's memory is back when a process ends.
        llm_args: further arguments of ``vllm.LLM``; they win over the defaults of ``default_args``.

    Raises:
        SchemeError, ModelError, EngineError, ParameterError: nothing was started.
    """
    machine = detect()
    resolved, checkpoint, way = resolve_checkpoint(model, scheme, machine, checkpoint)
    args = {"model": str(checkpoint.folder)} | arguments.default_args(machine, resolved) | way.args | llm_args
    arguments.check_gpus(machine, args.get("tensor_parallel_size", 1))
    in_process = machine.kind == "cpu" and not in_child
    return Engine(resolved, checkpoint, scheme, way, machine, args, Path(log_dir), in_process)


def resolve_checkpoint(
    model: str | Model, scheme: str, machine: Machine, checkpoint: Model | None = None
) -> tuple[Model, Model, Way]:
    """Return the model, what is loaded for it under a scheme (made first if need be), and how it runs.

    The one place where a scheme becomes files, for engines in this process and for servers alike.

    Raises:
        SchemeError, ModelError: the scheme does not run here, or there are no such files.
    """
    entry = schemes.scheme(scheme)
    way = entry.way(machine)
    resolved = model if isinstance(model, Model) else lookup.resolve(model)
    loaded = checkpoint or (checkpoints.make(resolved, entry.recipe) if entry.recipe else resolved)
    if entry.needs_checkpoint and "quantization_config" not in loaded.config:
        raise schemes.SchemeError(f"{entry.title}: give a model that is one already; none is made here.")
    if way.expanded:
        loaded = checkpoints.expand(loaded)
    return resolved, loaded, way


@dataclass(eq=False, repr=False)  # its arguments may hold a secret
class Engine:
    """A vLLM engine and everything it holds; made by ``open_engine``, open inside its ``with`` block."""

    model: Model
    checkpoint: Model  # what is loaded: the model, or a quantized one made from it
    scheme: str
    way: Way
    machine: Machine
    args: dict  # of vllm.LLM, all of them
    log_dir: Path
    in_process: bool
    log_file: Path | None = None  # a new one each time the engine starts
    start_s: float | None = None  # seconds from vLLM imported to ready
    import_s: float = 0.0  # seconds to import vLLM; 0 when this process had it already
    loading_bytes: int | None = None  # anonymous memory the weights took: CPU, in this process
    release: Release | None = None
    runner: weakref.ref | None = None  # vLLM's, in this process: it has the weights and the cache

    def __post_init__(self):
        self._children = Belongings()
        self.memory = MemoryWatch(self.machine, self._children)
        self._llm = None
        self._end_watch = lambda: None  # of the engine's process, if it has one
        self._closed_because: str | None = "not started. Use it in a with block"  # None while open

    # -- using it -------------------------------------------------------------------------------

    @property
    def llm(self):
        """The ``vllm.LLM``.

        Raises:
            EngineClosedError: before the block, after it, or after an interrupt.
        """
        if self._closed_because:
            raise self._closed()
        return self._llm

    def _closed(self) -> errors.EngineClosedError:
        return errors.EngineClosedError(f"This engine ({self.scheme}) is {self._closed_because}.")

    @property
    def code(self) -> str:
        """vLLM code that builds the same engine without these helpers, and runs when it is pasted."""
        return arguments.as_code(self.checkpoint, self.args)

    @property
    def log_text(self) -> str:
        """vLLM's log of this engine so far."""
        return errors.read_log(self.log_file)

    @property
    def kernels(self) -> list[str]:
        """The kernels vLLM says it chose for the quantized layers, each once; empty where it says nothing."""
        return list(dict.fromkeys(re.findall(r"(?:Selected|Using) (\w*Kernel\w*) for ", self.log_text)))

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens the KV cache holds, of all requests together."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    @contextlib.contextmanager
    def guarded(self):
        """Work with the engine inside: after an interrupt or its process's death it is finished, and says so.

        vLLM keeps interrupted requests queued, and the next ``generate`` would never return.

        Raises:
            EngineClosedError: it is finished, or was released meanwhile by another thread.
            EngineDiedError: its process ended, with the cause.
        """
        if self._closed_because:
            raise self._closed()
        try:
            yield
        except KeyboardInterrupt:
            self._closed_because = f"finished: it was interrupted while it worked. {ANEW}"
            self.abort()
            raise
        except Exception as error:
            if self._llm is None:  # another thread left the block meanwhile: whatever broke, broke of that
                release.clear_frames(error)  # kept by somebody, it would keep the model
                raise self._closed() from None
            if type(error).__name__ != "EngineDeadError":  # vLLM's; imported, it would import vLLM here
                raise
            self._closed_because = f"finished: its process ended while it worked. {ANEW}"
            codes = ", ".join(map(str, self._exit_codes())) or "unknown"
            sentence = f"the engine's process ended while it worked, exit code {codes}"
            error.add_note(sentence)
            raise self._diagnosed(errors.EngineDiedError, sentence.capitalize(), error) from None
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
        with contextlib.suppress(Exception):  # a dead child has nothing left to abort
            core = self._llm.llm_engine
            core.abort_request(list(core.output_processor.request_states), internal=True)

    # -- opening it -----------------------------------------------------------------------------

    def __enter__(self):
        """Start it; the block gets the ``vllm.LLM``, whose ``engine`` is this."""
        global _open
        if _open is not None:
            raise errors.EngineError(
                f"An engine ({_open.scheme}) is still open in this process and holds its memory. "
                "Leave its with block first: two engines at once is how the second runs out of memory."
            )
        # What a release needs is there before anything can be interrupted.
        with interrupts.interrupts_deferred():
            self.log_file = logfile.new_log_file(self.log_dir, self.scheme)
            self._log = LogFile(self.log_file)
            self._settings = Settings()
            self.release = self.loading_bytes = self.runner = None  # of the block before this
            self.memory.start()
        try:
            _open = self
            self._start()
        except BaseException as error:
            self._closed_because = f"finished: it did not start. {ANEW}"
            self._let_go_despite(error)
            if isinstance(error, Exception):
                raise self._diagnosed(
                    errors.EngineStartError, "vLLM could not start the engine", error
                ) from None
            raise
        finally:
            if self._closed_because:
                _open = None
        return self._llm

    def _start(self) -> None:
        global _first
        os.environ |= arguments.environment(self.in_process, self.machine, self.args)
        with logfile.starting(self.log_file), self._log.capturing():
            self.import_s = 0.0
            if "vllm" not in sys.modules:
                try:
                    self.import_s = owned_llm.import_vllm()
                finally:  # what the import leaves is no engine's, also where Ctrl+C waited for its end
                    self.memory.start()
            self.memory.first, _first = _first, False
            self._settings.save_threads()
            self._log.follow(*CHATTY)  # their handlers were bound when they were imported
            begun = time.perf_counter()
            with contextlib.ExitStack() as stack:
                stack.enter_context(release.watched_loading(self))
                stack.enter_context(self._children.watched())
                stack.enter_context(children.children_bound_to_this())
                if not self.in_process:  # the last to be entered ends first: the others clean up undisturbed
                    stack.enter_context(interrupts.interrupts_that_insist())
                elif not self.way.onednn:
                    borrowed.without_onednn()
                self._llm = owned_llm.owned_class()(**self.args)
                self._llm.engine = self
                if not self.in_process:
                    self._end_watch = children.wake_on_death(self._llm.llm_engine.engine_core)
        self._log.follow(*CHATTY)  # and bound anew if building the engine configured logging again
        self.start_s = time.perf_counter() - begun
        self._closed_because = None
        self._settings.engine_started()
        imported = f" (importing vLLM took ‹{self.import_s:.1f} s› before)" if self.import_s else ""
        print(f"vLLM is ready after ‹{self.start_s:.1f} s›{imported}. Its log: ‹{self.log_file.name}›")

    def _diagnosed(self, kind: type[errors.EngineError], sentence: str, error: Exception) -> Exception:
        """An error that says what happened, why, who holds the memory, and what to do.

        Python is not to show vLLM's own beside it, which may quote a secret: of what is not known the report
        has the traceback.
        """
        for problem in weights.damage(self.checkpoint.folder):
            error.add_note(problem)
        sentence = f"{sentence} ({self.scheme}, {self.model.title})."
        return errors.diagnosed(kind, sentence, self.log_file, error, log.short(error))

    # -- closing it -----------------------------------------------------------------------------

    def __exit__(self, kind, error, tb) -> None:
        global _open
        self._closed_because = f"finished: its with block has ended. {ANEW}"
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
        except Exception as found:
            error.add_note(str(found))

    def _let_go(self, error: BaseException | None) -> None:
        """Release everything and check the memory, finishing even when Ctrl+C comes meanwhile."""
        with interrupts.interrupts_deferred():
            begun, held = time.perf_counter(), self.memory.before
            with contextlib.ExitStack() as always:  # also where something fails; the last is done first
                always.callback(self._settings.restore)
                always.callback(self._log.close)
                always.enter_context(self._log.capturing())
                with contextlib.suppress(Exception):  # a GPU that is lost is no reason to keep the rest
                    held = self.memory.in_use()
                release.clear_frames(error)
                gc.unfreeze()  # what was frozen as it started is looked through again
                self._shut_down()
            self.release = self.memory.wait_until_back(held, begun)
            if self.memory.too_much(self.release):
                raise errors.MemoryHeldError(self.memory.held_message(self.release, self.scheme))

    def _shut_down(self) -> None:
        """End vLLM and what refers to it. A child's memory goes with its process, which vLLM asks to end and
        ``_children`` ends if it does not; in this process every module is emptied, whoever still holds it.
        """
        self._end_watch()
        self.abort()
        kept, self._llm, torn_down = self._llm, None, False
        if kept is not None:
            core = kept.llm_engine
            with contextlib.suppress(Exception):  # a child that died has shut down already
                core.engine_core.shutdown()
                torn_down = True
            children.wake(core.engine_core)  # another thread may still wait for what will not come
            for name in vars(kept):  # an `llm` that somebody keeps holds nothing, and says so
                setattr(kept, name, Released(str(self._closed())))
            kept.engine = self
        if self.in_process:
            release.empty_runner(self.runner and self.runner())
            if not torn_down:  # else vLLM's own shutdown did
                release.leave_distributed()
        self._children.end()
        release.forget_caches()
