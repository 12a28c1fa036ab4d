"""Models from the hub."""

from collections.abc import Sequence
from pathlib import Path

from helpers.model.model import Model, ModelError

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def from_hub(name: str, wanted: Sequence[str] = WANTED, kind: str = "hub") -> Model:
    """A model of the hub: of its files those that are ``wanted``, fetched unless they are there.

    ``hf cache verify`` compares checksums.

    Raises:
        ModelError: the hub cannot be reached, or has no such model.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except (OSError, httpx.TransportError, HFValidationError) as error:
        raise ModelError(_why_not(name, error)) from error
    return Model(name, repository.split("/")[1], folder, kind, revision=folder.name)


def _why_not(name: str, error: Exception) -> str:
    """Why a model could not be fetched, and what to do. An HTTP error of the hub's is an OSError, too."""
    import httpx
    from huggingface_hub import constants, errors

    answered = isinstance(error.__cause__, errors.HfHubHTTPError)
    if answered and isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__  # the client looked into its cache after that
    match error:
        case errors.HFValidationError():
            return f"{name!r} is not a local folder and is not a valid model identifier: {error}"
        case errors.GatedRepoError():
            return f"{name} is gated: accept its terms on its page, then set HF_TOKEN to a token of yours."
        case errors.RepositoryNotFoundError():
            return f"The hub has no model {name!r} that you may read. Check the name."
        case errors.RevisionNotFoundError():
            repository, _, revision = name.partition("@")
            return (
                f"The hub has no model '{repository}@{revision or 'main'}': {repository} is there, that "
                "revision of it is not. Check what follows the @: a branch, a tag or a commit."
            )
        case errors.HfHubHTTPError(response=response, server_message=said):
            said = said or response.reason_phrase
            todo = _ANSWERS.get(response.status_code, "Try again later, or use another model.")
            return f"The hub answered {response.status_code} for {name!r} ({said}). {todo}"
        case errors.LocalEntryNotFoundError() | httpx.TransportError() | ConnectionError():
            return (
                f"The hub cannot be reached and {name!r} is not in its local cache. Check the network, "
                "or take what needs none: model = 'embedded' (TUTORIAL_MODEL=embedded for every lesson), or "
                "a local folder."
            )
    return (
        f"{name} could not be fetched: {error}. What the hub's client fetches goes to "
        f"{constants.HF_HUB_CACHE}: a folder that can be written and has room. HF_HOME names another."
    )


# What to do where the hub answers with an error.
_ANSWERS = {
    401: "The token that was sent is not valid: renew or remove HF_TOKEN, or what `hf auth login` stored.",
    403: "Its owner disabled it, or your token may not read it: its page on the hub says which.",
    429: "That were too many requests: wait some minutes, or set HF_TOKEN, which allows more.",
}
