"""The queue before servers that are full: how it grows until one more is there, predicted and watched."""

import time

from helpers.serve.clients import Repeated


def overshoot(arrivals: float, capacity: float, start_s: float) -> float:
    """Requests that wait when a further server answers, ``start_s`` after it was started.

    Args:
        arrivals, capacity: requests a second that come, and that the servers there now answer.
    """
    return max(0.0, arrivals - capacity) * start_s


class Queue(Repeated):
    """Requests that wait in servers, by their own count, as long as the block lasts."""

    def __init__(self, router, every_s: float = 0.5):
        self.seconds: list[float] = []  # since the block began
        self.waiting: list[float] = []
        self._router, self._begun = router, time.monotonic()
        super().__init__(every_s, self._look)

    def now(self) -> float:
        """Seconds since the block began."""
        return time.monotonic() - self._begun

    def _look(self) -> None:
        found = self._router.metrics()
        self.seconds.append(self.now())
        self.waiting.append(found.get("vllm:num_requests_waiting", 0.0))

    def wait_until_longer(self, than: float, timeout_s: float = 20.0) -> float:
        """Wait until more than so many requests wait, or ``timeout_s``: a machine may have become faster.

        Returns:
            The second at which it stopped waiting.
        """
        stop = self.now() + timeout_s
        while self.now() < stop and not (self.waiting and self.waiting[-1] > than):
            time.sleep(0.05)
        return self.now()
