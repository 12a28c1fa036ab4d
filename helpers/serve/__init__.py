"""An OpenAI-compatible server: its settings, its life, its load, its doors."""

from helpers import face

__getattr__, __all__ = face(
    __name__,
    {
        "settings": "Settings SettingsError",
        "server": "Server open_server",
        "errors": "ServerDiedError ServerError ServerStartError Stop",
        "clients": "Crowd crowd",
        "load": "Generator Level LoadError Objective bench",
        "doors": "generates_without_key open_doors refusals",
    },
)
