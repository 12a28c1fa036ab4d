"""What starting an engine changes in this process: variables, threads, oneDNN. It is put back at the end."""

import contextlib
import os


class Settings:
    """This process as it was before an engine."""

    def __init__(self):
        self._environment = dict(os.environ)
        self._started: dict[str, str] | None = None  # the environment with the engine's own variables
        self._undo = contextlib.ExitStack()  # the last is undone first
        self._undo.callback(self._restore_environment)
        self._undo.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))  # vLLM pins threads to cores

    def save_threads(self) -> None:
        """Keep what torch computes with, which vLLM's import brings, before an engine changes it."""
        import torch

        self._undo.callback(torch.backends.mkldnn.set_flags, _enabled=torch.backends.mkldnn.enabled)
        self._undo.callback(torch.set_num_threads, torch.get_num_threads())
        # vLLM puts a function of its own there.
        self._undo.callback(setattr, torch, "set_num_threads", torch.set_num_threads)

    def engine_started(self) -> None:
        """Tell the engine's variables, which go with it, from those that the reader sets from now on."""
        self._started = dict(os.environ)

    def restore(self) -> None:
        """Undo what the engine changed."""
        self._undo.close()

    def _restore_environment(self) -> None:
        started = dict(os.environ) if self._started is None else self._started
        for name in self._environment.keys() | started.keys():
            before, then = self._environment.get(name), started.get(name)
            if before == then or os.environ.get(name) != then:
                continue  # the engine left it alone, or the reader has set it since
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def without_onednn() -> None:
    """Have torch compute without oneDNN in this process; ``Settings.restore`` undoes it.

    On a CPU with AMX torch gives an FP8 product to oneDNN, which has only its reference code for it: 256 rows
    took 3.2 s where torch's own way took 5 ms.
    """
    import torch

    torch.backends.mkldnn.set_flags(_enabled=False)
