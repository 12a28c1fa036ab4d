"""Settings from the environment and a .env file: every mistake named, no secret shown."""

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


def test_a_misspelt_name_in_the_file_is_an_error(tmp_path):
    (tmp_path / ".env").write_text("QUANTISATION=awq\n")
    with pytest.raises(SettingsError, match=r"^QUANTISATION \(\.env\).*mean QUANTIZATION\?$"):
        settings.load()


def test_a_variable_of_the_file_that_changes_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models/cache")  # exported, too: the hub's library reads it
    (tmp_path / ".env").write_text("NUM_GPUS=2\nKV_CACHE_DTYPE=fp8\nHF_HOME=/models/cache\nMAX_NUM_SEQS=3\n")
    with pytest.warns(SettingsWarning) as caught:
        settings.load()
    said = [str(warning.message).partition(": nothing here reads it")[0] for warning in caught]
    assert said == ["KV_CACHE_DTYPE (.env)", "NUM_GPUS (.env)"]


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
