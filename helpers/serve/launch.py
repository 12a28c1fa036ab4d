"""vLLM's server from the environment's variables, with nothing but this: for containers and bare hosts.

    python -m helpers.serve.launch [--show] [arguments of vllm serve, which win]

Settings, checks and arguments are those of ``open_server``. What a lesson has and this has not: it makes no
checkpoint and knows no embedded model. It owns what it starts: when the process that answers HTTP is killed,
the engine below it ends, too, and when this one is asked to end, the server drains.
"""

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

from helpers.base import machine, processes
from helpers.model import schemes
from helpers.model.schemes import SchemeError
from helpers.serve import command
from helpers.serve.settings import EMBEDDED, Settings, SettingsError, load


def checked() -> Settings:
    """The environment's settings, if one can serve others with them.

    Raises:
        SettingsError: one line a problem.
    """
    found, problems = load(None), []
    given = found.model_fields_set
    if "model_name" not in given or found.model_name == EMBEDDED:
        problems.append("MODEL_NAME: give a hub name, with @ and a commit to pin it, or a folder.")
    if "vllm_api_key" not in given:
        problems.append(
            "VLLM_API_KEY is empty: a generated key would be known to nobody (openssl rand -base64 32)."
        )
    if found.shutdown_timeout < found.longest_s:
        problems.append(
            f"SHUTDOWN_TIMEOUT={found.shutdown_timeout}: an answer may take {found.longest_s} s, and clients "
            "of what takes longer than the drain hang. Lower MAX_ANSWER_TOKENS or SECONDS_PER_TOKEN instead."
        )
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def named(model_name: str) -> tuple[str, str | None]:
    """The folder or hub name, and the revision after an ``@``, which a folder's name may have in it."""
    if Path(model_name).is_dir() or model_name.startswith(("/", ".")):
        return model_name, None
    name, _, revision = model_name.partition("@")
    return name, revision or None


def config_of(model: str, revision: str | None) -> dict:
    """The model's ``config.json``, from its folder or the hub; empty if the hub does not give it."""
    if revision is None and Path(model).is_dir():
        return json.loads((Path(model) / "config.json").read_text())
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(model, "config.json", revision=revision)
        return json.loads(Path(file).read_text())
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
        return {}  # vLLM asks again, and says why not


def find_nvml() -> None:
    """Where no NVML bindings are installed let ``detect`` have vLLM's own: no GPU found would mean a CPU."""
    vllm = importlib.util.find_spec("vllm")
    if importlib.util.find_spec("pynvml") or vllm is None:
        return
    file = Path(vllm.submodule_search_locations[0]) / "third_party/pynvml.py"
    spec = importlib.util.spec_from_file_location("pynvml", file)
    sys.modules["pynvml"] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)


def command_line(settings: Settings) -> list[str]:
    """The program and its arguments.

    Raises:
        SchemeError: this machine does not run the quantization, or has no kernel for the checkpoint's.
    """
    find_nvml()
    here, (model, revision) = machine.detect(), named(settings.model_name)
    command.use_token(settings)
    config = config_of(model, revision)
    way = schemes.scheme(settings.scheme).way(here)
    title = model.rstrip("/").rpartition("/")[2] if Path(model).is_dir() else model
    args = command.arguments(settings, here, way, model, title, config)
    if revision:
        args["revision"] = revision  # of weights, tokenizer and template alike
    return [sys.executable, "-c", command.START, *command.flags(args)]


def main(arguments: list[str]) -> int:
    """Start the server and stay until it has ended; return its exit code, or 2 for wrong settings."""
    try:
        settings = checked()
        line = command_line(settings)
    except (SettingsError, SchemeError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    if arguments[:1] == ["--show"]:
        print(shlex.join([*line, *arguments[1:]]))
        return 0
    environment = command.server_environment(settings)
    if "--enforce-eager" in line:
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing to compile, and no compiler asked for
    start = lambda: os.execve(line[0], [*line, *arguments], environment)  # noqa: E731
    return processes.supervised(start, "launch", settings.shutdown_timeout + command.TEARDOWN_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
