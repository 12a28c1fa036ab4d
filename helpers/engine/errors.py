"""What can go wrong with an engine."""

from __future__ import annotations

from helpers.faults.report import Report


class EngineError(RuntimeError):
    """An engine that cannot be used; the message says why and what to do."""


class EngineStartError(EngineError):
    """vLLM could not build the engine; the message holds the root cause from its log.

    ``report`` is the diagnosis, made when it happened: a card in a notebook, the same as text elsewhere.
    """

    report: Report | None = None


class EngineDiedError(EngineError):
    """The engine's process ended while it worked; the message and ``report`` say why, if that is known."""

    report: Report | None = None


class EngineClosedError(EngineError):
    """The engine was released or interrupted; open a new one."""


class MemoryHeldError(EngineError):
    """After the release the memory did not come back; the message names who holds it."""
