"""Settings from the environment and a .env file: every mistake named, no secret shown."""

import re

import pytest

from helpers.model import schemes
from helpers.serve import settings
from helpers.serve.settings import SCHEMES, Settings, SettingsError, SettingsWarning

KEY = "a-key-of-more-than-16-characters"


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """An environment without any of the variables, in a folder without a .env file."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_defaults_start_anywhere_and_an_empty_variable_is_no_value(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "")
    monkeypatch.setenv("SERVED_MODEL_NAME", "")
    found = settings.load()
    assert (found.model_name, found.quantization, found.scheme) == ("embedded", "none", "baseline")
    assert (len(found.api_key), found.served_model_name) == (43, None)
    assert set(SCHEMES.values()) <= set(schemes.SCHEMES)
    assert settings.load().api_key != found.api_key, "a key of its own for every server"


def test_an_argument_wins_over_a_variable_and_that_over_the_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("MAX_NUM_SEQS=1\nSERVER_PORT=1001\nQUANTIZATION=fp8\n")
    monkeypatch.setenv("MAX_NUM_SEQS", "2")
    monkeypatch.setenv("SERVER_PORT", "1002")
    found = settings.load(server_port=1003)
    assert (found.quantization, found.max_num_seqs, found.server_port) == ("fp8", 2, 1003)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("QUANTIZATION", "int3", "'none', 'fp8' or 'awq'"),
        ("GPU_MEMORY_UTILIZATION", "1.5", "less than or equal to 0.98"),
        ("MAX_MODEL_LEN", "many", "valid integer"),
        ("SERVER_PORT", "70000", "less than or equal to 65535"),
        ("SERVER_HOST", "tcp://10.0.0.1:80", "valid IPv4 or IPv6 address"),
        ("SHUTDOWN_TIMEOUT", "-1", "greater than or equal to 0"),
        ("DTYPE", "int8", "'auto', 'bfloat16', 'float16' or 'float32'"),
        ("DTYPE", "half", "(half is float16)."),
        ("QUANTIZATION", "gptq", "set none; its config.json says the rest"),
        ("QUANTIZATION", "awq", "set none; its config.json says the rest"),
        ("MODEL_NAME", " ", "at least 1 character"),
    ],
)
def test_a_wrong_value_names_variable_value_and_what_is_allowed(monkeypatch, name, value, allowed):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        settings.load()
    assert str(caught.value).startswith(f"{name}={value!r}: ")
    assert allowed in str(caught.value)


def test_every_wrong_value_is_named_at_once(monkeypatch):
    monkeypatch.setenv("QUANTIZATION", "int3")
    monkeypatch.setenv("SERVER_PORT", "x")
    with pytest.raises(SettingsError) as caught:
        settings.load(mox_num_seqs=3)
    names = [line.partition("=")[0] for line in str(caught.value).splitlines()]
    assert names[1:] == ["QUANTIZATION", "SERVER_PORT"]
    assert "Did you mean MAX_NUM_SEQS?" in names[0]


def test_a_misspelt_name_in_the_file_is_an_error_and_a_foreign_one_is_not(tmp_path):
    (tmp_path / ".env").write_text("EDITOR_OF_MINE=vi\nQUANTISATION=awq\n")
    with pytest.raises(SettingsError, match=r"^QUANTISATION \(\.env\).*mean QUANTIZATION\?$"):
        settings.load()


PUBLIC = """\
VLLM_MODEL=Llama-3.1-8B-Instruct
VLLM_MODEL_ORG=meta-llama
NUM_GPUS=2
VLLM_DTYPE="float16"
VLLM_GPU_MEMORY_UTILIZATION="0.90"
PORT=8001
"""


def test_what_others_call_our_settings_is_taken(tmp_path, monkeypatch):
    """Names of public compose files and templates; a common word only from the file."""
    (tmp_path / ".env").write_text(PUBLIC)
    monkeypatch.setenv("HOST", "not-an-address")
    monkeypatch.setenv("VLLM_TP_SIZE", "8")
    found = settings.load()
    assert found.model_name == "meta-llama/Llama-3.1-8B-Instruct"
    assert (found.dtype, found.gpu_memory_utilization, found.server_port) == ("float16", 0.9, 8001)
    assert (found.tensor_parallel_size, found.server_host) == (2, "127.0.0.1")
    assert settings.load(tensor_parallel_size=4).tensor_parallel_size == 4, "an argument wins"
    monkeypatch.setenv("DTYPE", "bfloat16")
    assert settings.load().dtype == "bfloat16", "our own name wins"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("VLLM_PORT=8000", "Say SERVER_PORT"),
        ("VLLM_KV_CACHE_DTYPE=auto", "--kv-cache-dtype"),
        ("MAX_NUM_BATCHED_TOKENS=8192", "--max-num-batched-tokens"),
        ("HF_HOME=/models/cache", "export it"),
    ],
)
def test_a_variable_that_changes_nothing_is_named(tmp_path, monkeypatch, line, word):
    monkeypatch.delenv("HF_HOME", raising=False)
    (tmp_path / ".env").write_text(f"{line}\n")
    with pytest.warns(SettingsWarning, match=re.escape(word)) as caught:
        settings.load()
    assert str(caught[0].message).startswith(line.partition("=")[0])


def test_what_is_none_of_ours_is_not_mentioned(tmp_path, monkeypatch, recwarn):
    (tmp_path / ".env").write_text("COMPOSE_PROJECT_NAME=llm\nEDITOR_OF_MINE=vi\n")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")  # vLLM reads it
    monkeypatch.setenv("HF_HOME", "/models/cache")  # the hub's library reads it
    settings.load()
    assert not [warning for warning in recwarn if issubclass(warning.category, SettingsWarning)]


def test_secrets_never_print(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = settings.load()
    shown = f"{found!r} {found} {found.model_dump()} {found.model_dump_json()}"
    assert KEY not in shown
    assert "hf_secret" not in shown
    assert found.api_key == KEY


def test_a_short_key_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hunter2")
    with pytest.raises(SettingsError) as caught:
        settings.load()
    assert str(caught.value).startswith("VLLM_API_KEY=(not shown): too short")
    chain = [caught.value, caught.value.__context__, caught.value.__cause__]
    assert "hunter2" not in repr(chain)
