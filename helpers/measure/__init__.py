"""Speed, memory and answers of an engine."""

from helpers import face

__getattr__, __all__ = face(
    __name__,
    {
        "speed": "Speed measure_speed",
        "memory": "Memory measure_memory",
        "divergence": "Quality compare control keep_reference",
        "task": "Answers Recovery recovery",
        "trial": "Trial",
    },
)
