"""What can go wrong with a server, and how one stopped."""

from dataclasses import dataclass

from helpers.engine.errors import EngineError


class ServerError(EngineError):
    """A server that cannot be used; the message says why and what to do."""


class ServerStartError(ServerError):
    """The server did not become ready; the message and ``report`` hold the cause from its log."""


class ServerDiedError(ServerError):
    """The server ended without being asked to; the message and ``report`` hold the cause from its log."""


@dataclass(frozen=True)
class Stop:
    """How a server ended: ``stopped`` (asked to, in time), ``was killed`` or ``died``."""

    how: str
    seconds: float
    exit_code: int

    def __str__(self) -> str:
        return f"The server {self.how} after ‹{self.seconds:.1f} s›."
