"""What everything stands on: parameters, this machine, records, the page, figures, files, processes."""

from helpers import face

__getattr__, __all__ = face(
    __name__,
    {
        "machine": "Machine detect",
        "page": "Table measured",
        "parameters": "ParameterError",
        "records": "append latest",
        "widgets": "Choice Slider explore",
    },
)
