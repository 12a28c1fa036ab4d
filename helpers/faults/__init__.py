"""What a failure was and what to do: logs, the catalogue, the report."""

from helpers import face

__getattr__, __all__ = face(
    __name__,
    {
        "log": "first_traceback root_cause",
        "report": "Report",
    },
)
