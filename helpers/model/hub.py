"""Models from the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

from helpers.model.model import SHAPE, Model, ModelError
from helpers.model.weights import INDEX

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def from_hub(name: str) -> Model:
    """A model of the hub, fetched unless it is there; ``hf cache verify`` compares checksums."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    with _explained(repository, revision):
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=WANTED))
    return Model(name, repository.split("/")[1], folder, "hub", revision=folder.name)


def config_from_hub(name: str) -> Model:
    """A model of the hub by its config alone; of its weights nothing is fetched but their index.

    Raises:
        ModelError: the hub cannot be reached, has no such model, or that has no ``config.json``.
    """
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = name.partition("@")
    with _explained(repository, revision):
        config = Path(hf_hub_download(repository, "config.json", revision=revision or None))
    with contextlib.suppress(OSError, httpx.TransportError, EntryNotFoundError):
        hf_hub_download(repository, INDEX, revision=revision or None)
    return Model(name, repository.split("/")[1], config.parent, SHAPE, revision=config.parent.name)


@contextlib.contextmanager
def _explained(repository: str, revision: str):
    """What the hub's client raises inside, as a ``ModelError`` that says why and what to do."""
    import httpx
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, httpx.TransportError, HFValidationError) as error:
        raise ModelError(_why_not(repository, revision, error)) from error


def _why_not(repository: str, revision: str, error: Exception) -> str:
    """Why a model could not be fetched, and what to do. An HTTP error of the hub's is an OSError, too."""
    import httpx
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        error = error.__cause__  # the hub did answer, and the client looked into its cache after that
    match error:
        case errors.HFValidationError():
            return f"{repository!r} is not a local folder and is not a valid model identifier: {error}"
        case errors.GatedRepoError():
            return (
                f"{repository} is gated: accept its terms on its page, then set HF_TOKEN to a token of yours."
            )
        case errors.RepositoryNotFoundError():
            return f"The hub has no model {repository!r} that you may read. Check the name."
        case errors.RevisionNotFoundError():
            return (
                f"The hub has no model '{repository}@{revision or 'main'}': {repository} is there, that "
                "revision of it is not. Check what follows the @: a branch, a tag or a commit."
            )
        case errors.RemoteEntryNotFoundError():
            return (
                f"{repository} has no config.json on the hub: a GGUF or an adapter, of which nothing can be "
                "counted. Name the model that it was made from."
            )
        case errors.HfHubHTTPError(response=response, server_message=said):
            todo = _ANSWERS.get(response.status_code, "Try again later, or use another model.")
            said = said or response.reason_phrase
            return f"The hub answered {response.status_code} for {repository!r} ({said}). {todo}"
        case errors.LocalEntryNotFoundError() | httpx.TransportError() | ConnectionError():
            return (
                f"The hub cannot be reached and {repository!r} is not in its local cache. Check the network, "
                "or take what needs none: model = 'embedded' (TUTORIAL_MODEL=embedded for every lesson), or "
                "a local folder."
            )
    return (
        f"{repository} could not be fetched: {error}. What the hub's client fetches goes to "
        f"{constants.HF_HUB_CACHE}: a folder that can be written and has room. HF_HOME names another."
    )


# What to do where the hub answers with an error.
_ANSWERS = {
    401: "The token that was sent is not valid: renew or remove HF_TOKEN, or what `hf auth login` stored.",
    403: "Its owner disabled it, or your token may not read it: its page on the hub says which.",
    429: "That were too many requests: wait some minutes, or set HF_TOKEN, which allows more.",
}
