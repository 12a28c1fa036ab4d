"""A server's settings from the environment and a ``.env`` file, checked before anything starts.

    settings = load()                 # MODEL_NAME, QUANTIZATION, ... or their defaults
    settings = load(port=0)           # the same, with a value of yours

The first three names are those of the log that this tutorial was created from. A variable wins over the
file, an argument over both. Names that other templates use are taken, or named in a warning (``aliases``).
QUANTIZATION as a variable never says awq: that is the checkpoint's own. As an argument it has one made.
"""

import difflib
import math
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from dotenv import dotenv_values
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from helpers.serve import aliases

# What QUANTIZATION may say, and the scheme of ``schemes`` that it means.
SCHEMES = {"none": "baseline", "fp8": "fp8", "awq": "awq"}

LEAST_KEY = 16  # characters of an API key; a generated one has 43

EMBEDDED = "embedded"  # the model that comes with the lessons; this module runs without them, too

_Name = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]


class SettingsError(ValueError):
    """Settings that cannot be used; one line a problem, with the variable, its value and what is allowed."""


class SettingsWarning(UserWarning):
    """A variable that somebody set and nothing reads."""


def _longest_s(max_num_seqs=1, max_num_queued_reqs=0, max_answer_tokens=1, seconds_per_token=1.0, **_) -> int:
    """``Settings.longest_s``; a field that is missing here is wrong, and said to be so elsewhere."""
    batches = math.ceil((max_num_queued_reqs or 2 * max_num_seqs) / max_num_seqs)
    return math.ceil(batches * max_answer_tokens * seconds_per_token)


class Settings(BaseSettings):
    """Everything a deployer may set. The variable's name is the field's, in capitals.

    Except for four, whose names others fixed: ``vllm_api_key`` (vLLM reads it itself, so it never stands in
    a command line), ``hf_token``, ``vllm_cpu_kvcache_space`` (GiB, CPU only) and ``vllm_max_n_sequences``.
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    model_name: _Name = Field(EMBEDDED, description="embedded, a folder or a hub name")
    quantization: Literal["none", "fp8", "awq"] = Field("none", description="none, fp8 or awq")
    gpu_memory_utilization: float = Field(0.9, ge=0.1, le=0.98, description="share of the GPU's memory")
    max_model_len: int = Field(2048, ge=16, le=1_048_576, description="tokens of prompt and answer together")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="requests that run at once; others wait")
    served_model_name: _Name | None = Field(None, description="what clients call it; else its own name")
    server_host: Annotated[pydantic.IPvAnyAddress, pydantic.AfterValidator(str)] = Field(
        "127.0.0.1", description="address to listen on"
    )
    server_port: int = Field(8000, ge=0, le=65535, description="port; 0 takes a free one")
    tensor_parallel_size: int = Field(1, ge=1, le=64, description="GPUs that one server is spread over")
    max_answer_tokens: int = Field(500, ge=1, le=1_048_576, description="every answer ends there")
    seconds_per_token: float = Field(0.3, gt=0, le=60, description="the slowest TPOT that you promise")
    max_num_queued_reqs: int | None = Field(
        None, ge=1, le=1_000_000, description="taken at once, waiting ones too; MAX_NUM_SEQS x 2 if empty"
    )
    max_num_queued_tokens: int | None = Field(
        None, ge=1, description="prompt tokens that wait; TTFT x prompt tokens/s, no limit if empty"
    )
    vllm_max_n_sequences: int = Field(4, ge=1, le=16384, description="the largest n: answers to one request")
    tool_call_parser: _Name | None = Field(None, description="how it writes tool calls, such as hermes")
    shutdown_timeout: int = Field(
        default_factory=lambda found: _longest_s(**found),
        ge=0,
        le=86400,
        description="seconds to drain after SIGTERM; 0 aborts; the longest answer's if empty",
    )
    start_timeout: int = Field(600, ge=1, le=7200, description="seconds until it must be ready")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="half is float16")
    vllm_cpu_kvcache_space: int = Field(1, ge=1, le=1024, description="GiB of KV cache on a CPU")
    vllm_api_key: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_urlsafe(32)),
        description=f"the clients' key, {LEAST_KEY} characters or more; generated if empty",
    )
    hf_token: SecretStr | None = Field(None, description="for gated models on the hub")

    @pydantic.field_validator("vllm_api_key")
    @classmethod
    def _sendable(cls, key: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[!-~]*", key.get_secret_value()):
            raise ValueError("has a blank, a line's end or a letter that no HTTP header carries")
        if len(key.get_secret_value()) < LEAST_KEY:
            raise ValueError("too short to withstand guessing")
        return key

    @property
    def in_flight(self) -> int:
        """Requests that the server takes at once, running or waiting; one more is refused with 503."""
        return self.max_num_queued_reqs or 2 * self.max_num_seqs

    @property
    def longest_s(self) -> int:
        """Seconds from taking a request to the end of its answer, at most.

        It may wait until the batches before it are through. The drain, the grace periods and the proxy's
        timeout in notebooks/deploy follow from this.
        """
        return _longest_s(**self.model_dump())

    @property
    def scheme(self) -> str:
        return SCHEMES[self.quantization]

    @property
    def api_key(self) -> str:
        """The clients' key itself; everything else shows stars."""
        return self.vllm_api_key.get_secret_value()


def load(env_file: str | Path | None = ".env", **values) -> Settings:
    """Return checked settings from the arguments, the environment and ``env_file``, in this order.

    Args:
        env_file: a file of ``NAME=value`` lines; one that does not exist says nothing. So does the folder
            SECRETS_DIR, which may hold a file for each secret, named as the variable.
        values: fields of ``Settings``, by name.

    Raises:
        SettingsError: it names each wrong variable, its value (not a secret's) and what is allowed.
    """
    inside = {} if env_file is None else dotenv_values(env_file)
    problems = [_unknown(name, Path(env_file).name) for name in _misspelt(inside)]
    problems += [_unknown(name, "an argument") for name in values if name not in Settings.model_fields]
    taken, others, stored = aliases.read(inside, set(Settings.model_fields) - set(values))
    if stored and "quantization" not in values:
        problems += stored
        values = values | {"quantization": "none"}
    try:
        found = Settings(_env_file=env_file, _secrets_dir=os.environ.get("SECRETS_DIR"), **taken | values)
    except pydantic.ValidationError as error:
        # What a default could not follow from has an error of its own.
        wrong = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        problems += [_sentence(problem) for problem in wrong]
    for other in others:
        warnings.warn(other, SettingsWarning, stacklevel=2)
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def _sentence(problem: dict) -> str:
    """One pydantic error as ``NAME='value': what is allowed``."""
    name = problem["loc"][0]
    field = Settings.model_fields[name]
    shown = "(not shown)" if "SecretStr" in str(field.annotation) else repr(problem["input"])
    said = problem["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:]
    return f"{name.upper()}={shown}: {said} ({field.description})."


def _misspelt(inside: Mapping[str, str | None]) -> list[str]:
    """Names in a .env file that look like a setting's and are not: ignored, they would change nothing."""
    known = {name.upper() for name in Settings.model_fields}
    given = [name for name in inside if name.upper() not in known | set(os.environ) | aliases.NAMES]
    return [name for name in given if difflib.get_close_matches(name.upper(), known, cutoff=0.8)]


def _unknown(name: str, where: str) -> str:
    known = [field.upper() for field in Settings.model_fields]
    near = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.6)
    meant = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(known)}."
    return f"{name} ({where}) is not a setting.{meant}"
