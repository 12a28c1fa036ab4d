"""Processes that end with their owner, however it ends: the runner's kernels, a server, all below them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from helpers.base.files import ROOT
from helpers.base.interrupts import interrupts_deferred

PATIENCE_S = 3.0  # from asking a process to end to killing it
GRACE_S = 30  # from Ctrl+C to killing the worker: more than twice what its cleaning up takes


def _prctl(option: int, value: int) -> None:
    """Linux's prctl(2)."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def end_with(owner: int, signum: int = signal.SIGKILL) -> None:
    """Let the system send this process ``signum`` when ``owner``, its parent, ends; for a child's first line.

    The child passes the number that its parent knew itself by: a parent that was killed before this line
    would never be missed. It exits then, as if the signal had come.
    """
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != owner:
        sys.exit(128 + signum)


@contextlib.contextmanager
def owned_processes() -> Iterator[Callable[[], None]]:
    """What is started in the block has ended after it; yields the function that ends what there is by then.

    A child subreaper inherits the orphans below it, also those in a session of their own, so all
    stay among its descendants. What ran before the block is not touched.
    """
    import psutil

    me = psutil.Process()
    before = set(me.children())

    def end_leftovers() -> None:
        # Killed twice, as a process may fork meanwhile. Python's tracker of shared memory removes what the
        # others left once they have ended, and then ends by itself.
        for how, spared in (("terminate", ""), ("kill", "multiprocessing.resource_tracker"), ("kill", "")):
            leftovers = set(me.children()) - before
            for process in list(leftovers):
                with contextlib.suppress(psutil.NoSuchProcess):
                    leftovers.update(process.children(recursive=True))
            for process in leftovers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if not spared or spared not in " ".join(process.cmdline()):
                        getattr(process, how)()
            psutil.wait_procs(leftovers, timeout=PATIENCE_S)

    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield end_leftovers
    finally:
        end_leftovers()
        _prctl(PR_SET_CHILD_SUBREAPER, 0)


def supervised(work: Callable[[], int], name: str = "helpers.tools.run", grace_s: int = GRACE_S) -> int:
    """Run `work` in a forked worker, so that if one of the two is killed, the other cleans up.

    A killed worker's descendants fall to the supervisor, which ends them. When the supervisor is
    killed, the system sends the worker SIGTERM. The worker has a process group of its own, so killing the
    other (`timeout -s KILL`) spares it. Only when both are killed at once do detached
    processes stay; the kernel then ends by itself in a second or two: ipykernel watches its parent.
    ``grace_s`` are the seconds from being asked to end to the worker being killed.
    """
    endings = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    endings = [s for s in endings if signal.getsignal(s) is not signal.SIG_IGN]  # as under nohup
    signal.pthread_sigmask(signal.SIG_BLOCK, endings)  # until both processes have their handlers
    with owned_processes():
        supervisor = os.getpid()
        worker = os.fork()
        if worker == 0:
            os._exit(_as_worker(work, supervisor, endings))

        def forward(signum: int, _frame: object) -> None:
            os.kill(worker, signum)
            signal.alarm(grace_s)

        for signum in endings:
            signal.signal(signum, forward)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(worker, signal.SIGKILL))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, endings)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        for signum in [*endings, signal.SIGALRM]:  # the worker's number may be another's by now
            signal.signal(signum, signal.SIG_IGN)
    if code < 0:
        print(f"{name}: its worker was killed by signal {-code}", file=sys.stderr)
    return abs(code) + 128 * (code < 0)


def _as_worker(work: Callable[[], int], supervisor: int, endings: list[signal.Signals]) -> int:
    endings, received = [*endings, signal.SIGTERM], []

    def interrupt(signum: int, _frame: object) -> None:
        received.append(signum)
        for ending in endings:
            signal.signal(ending, signal.SIG_IGN)  # a second Ctrl+C must not stop the cleaning up
        raise KeyboardInterrupt

    code = 1
    try:
        os.setpgid(0, 0)
        for signum in endings:
            signal.signal(signum, interrupt)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, endings)
        if os.getppid() == supervisor:  # else it was killed before it could be watched
            code = work()
    except (KeyboardInterrupt, BrokenPipeError):
        code = 128 + signal.SIGPIPE  # as `| head` ends other programs
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    with contextlib.suppress(OSError):  # the terminal or the pipe may be gone
        sys.stdout.flush()
    return 128 + received[0] if received else code


def run_logged(
    command: list[str], log: Path, env: Mapping[str, str], look: Callable[[], tuple[int, int, str]]
) -> int:
    """Run a command from the repository's root, all that it says in ``log``; return its exit code.

    ``look`` is that of ``progress``. The command is told to end when this is interrupted, and has ended then.
    """
    child = None
    with log.open("w") as out:
        try:
            with interrupts_deferred():  # one inside the constructor would leave a child that nobody knows
                child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=env)
            with progress(look):
                return child.wait()
        except BaseException:  # Ctrl+C above all
            if child is not None:
                child.terminate()
                child.wait()
            raise


@contextlib.contextmanager
def progress(look: Callable[[], tuple[int, int, str]]) -> Iterator[None]:
    """Where somebody watches, a bar of what ``look`` returns: steps done, of how many, their name."""
    if not watched():
        yield
        return
    from tqdm.auto import tqdm

    # In a terminal the bar needs a descriptor of its own: 2 may be pointed at a log meanwhile.
    terminal = os.fdopen(os.dup(2), "w") if "ipykernel" not in sys.modules else None
    bar = tqdm(total=1, leave=False, bar_format="{desc} {bar} {elapsed}", file=terminal)
    over = threading.Event()

    def follow() -> None:
        while not over.wait(0.2):
            bar.n, bar.total, label = look()
            bar.set_description(label)
        bar.close()
        if terminal is not None:
            terminal.close()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def owned_command(command: list[str], grace_s: int) -> list[str]:
    """Return a command line that runs ``command`` as a worker of ``supervised``, ending with this process.

    Run it from a thread that stays: Linux counts the end of the starting thread as the owner's death.
    ``grace_s`` is the time it has, once asked to end, before it is killed.
    """
    return [sys.executable, "-m", "helpers.base.processes", str(os.getpid()), str(grace_s), *command]


def _main(owner: str, grace_s: str, *command: str) -> int:
    end_with(int(owner), signal.SIGTERM)
    return supervised(lambda: os.execv(command[0], command), "helpers.base.processes", int(grace_s))


def watched() -> bool:
    """Whether a person is likely watching: a terminal, or a notebook that is not run headless."""
    headless = bool(os.environ.get("TUTORIAL_HEADLESS"))
    return not headless and ("ipykernel" in sys.modules or sys.stderr.isatty())


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
