"""A name and a scheme to a folder that loads, and the bytes it takes."""

from helpers import face

__getattr__, __all__ = face(
    __name__,
    {
        "lookup": "resolve sized",
        "model": "Model ModelError default",
        "shapes": "shape",
        "scheme": "Scheme SchemeError Way",
        "schemes": "SCHEMES",
        "sizes": "group_size held_weights_bytes predicted_weights_bytes",
        "layout": "Layout LayoutError",
        "checkpoints": "CheckpointError expand make recognise",
        "text": "calibration_text held_out_text",
    },
)
