"""What starting an engine changes in this process: variables, threads, oneDNN. It is put back at the end."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class Settings:
    """This process as it was before an engine."""

    environment: dict[str, str]
    affinity: set[int]
    started: dict[str, str] | None = None  # the environment with the engine's own variables
    set_num_threads: object = None
    threads: int = 0
    onednn: bool = True

    @classmethod
    def save(cls) -> Settings:
        return cls(dict(os.environ), os.sched_getaffinity(0))

    def save_threads(self) -> None:
        """Keep what torch computes with, which vLLM's import brings, before an engine changes it."""
        import torch

        self.set_num_threads, self.threads = torch.set_num_threads, torch.get_num_threads()
        self.onednn = torch.backends.mkldnn.enabled

    def engine_started(self) -> None:
        """Tell the engine's variables, which go with it, from those that the reader sets from now on."""
        self.started = dict(os.environ)

    def restore(self) -> None:
        """Undo it: vLLM pins threads to cores, replaces torch.set_num_threads, sets variables; oneDNN too."""
        self._restore_environment()
        os.sched_setaffinity(0, self.affinity)
        if self.set_num_threads is not None:
            import torch

            torch.set_num_threads = self.set_num_threads
            torch.set_num_threads(self.threads)
            torch.backends.mkldnn.set_flags(_enabled=self.onednn)

    def _restore_environment(self) -> None:
        now = dict(os.environ)
        started = now if self.started is None else self.started
        for name in self.environment.keys() | started.keys():
            before, then = self.environment.get(name), started.get(name)
            if before == then or now.get(name) != then:
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
