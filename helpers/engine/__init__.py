"""One vLLM engine, opened, used and closed; its memory comes back."""

from helpers import face

__getattr__, __all__ = face(
    __name__,
    {
        "engine": "Engine open_engine",
        "errors": "EngineClosedError EngineDiedError EngineError EngineStartError MemoryHeldError",
        "release": "Release",
    },
)
