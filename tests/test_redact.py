"""Secrets are known by their names, their forms and their values, and taken for nothing else.

In texts, in what vLLM says, in the lessons, and in a diagnosis with all that goes with it.
"""

import json
import re
import sys
import time
import zipfile
from pathlib import Path

import pytest

from helpers.base import redact
from helpers.faults import explain
from helpers.faults.report import LONGEST_EVIDENCE
from tests.test_diagnose import CHILD, ECHO, LOGS, SERVER_LOG

PLANTED = "planted-5ecret-value"
TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"OSError: token {TOKEN} is not valid",
        f"\x1b[38;5;124m{TOKEN}\x1b[39m",
        json.dumps({"output": f"the token:\n{TOKEN}"}),
        f"url?token%3D{TOKEN}",
        "non-default args: {'model': 'x', 'api_key': ['" + PLANTED + "'], 'port': 8000}",
        f"command: vllm serve --api-key {PLANTED} --port 8000",
        f"headers: {{'Authorization': 'Bearer {PLANTED}'}}",
        f"Authorization: Basic {PLANTED}",
        f"proxy http://user:{PLANTED}@proxy:3128 refused",
        f"the value {PLANTED} of a variable",
    ],
)
def test_secrets_are_removed(text, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", PLANTED)
    shown = redact.redact(text)
    assert PLANTED not in shown
    assert TOKEN not in shown
    assert "[removed]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "Command '['vllm', 'serve', 'm', '--api-key', '§']' returned",
        '"cmd": "vllm serve --api-key=\\"§\\" m"',
        "x-api-key: §",
        "(b'x-api-key', b'§')",
        "redis://:§@host:6379/0",
        "https://§-0123456789@github.com/x/y",
        "gho_§ ghs_§",
        "api_key=['§', 'other-§'], port=1",
        "AWS_SECRET_ACCESS_KEY=§ GH_TOKEN=§-1",
        "environ({'MY_TOKEN': '§-1', 'DB_PASSWORD': '§!'})",
        "login(token='§-1')",
        "Authorization: Bearer §",
        "(b'authorization', b'Bearer §')",
        "curl -H 'Bearer §-long-pass'",
        'api_key\x1b[38;5;241m=\x1b[39m\x1b[38;5;124m"\x1b[39m\x1b[38;5;124m§\x1b[39m',
    ],
)
def test_a_secret_of_another_process_is_known_by_its_place(text):
    shown = redact.redact(text.replace("§", "correcthorsebat"))
    assert "correcthorsebat" not in shown
    assert "[removed]" in shown
    assert redact.redact(shown) == shown


def test_half_a_secret_is_not_left_where_evidence_is_cut(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", PLANTED)
    start = "RuntimeError: "
    said = start + "y" * (LONGEST_EVIDENCE - len(start) - 20) + f" {PLANTED} and more words"
    for report in (explain.explain(log=said), explain.explain(RuntimeError(said.removeprefix(start)))):
        assert PLANTED[:9] not in report.evidence


def test_long_lines_are_searched_for_secrets_in_a_moment():
    started = time.monotonic()
    for text in (
        "a" * 200_000,
        "A" * 200_000,
        "TOKEN" * 40_000,
        "api_key " * 25_000,
        "api_key=" + " " * 200_000,
    ):
        assert redact.redact(text) == text
    assert time.monotonic() - started < 20  # a second; tried again at every letter it takes minutes


@pytest.mark.parametrize("path", [*LOGS, SERVER_LOG], ids=lambda path: path.stem)
def test_in_what_vllm_says_nothing_is_taken_for_a_secret(path):
    text = path.read_text(encoding="utf-8")
    assert redact.remove(text) == text
    assert not re.search("/(root|home|work)/", text), "a machine's own path"


def test_what_is_no_secret_stays():
    text = "max_tokens=100, tokenizer='x', 5 tokens/s, key 'a' not found, basic knowledge, Token 7 of 9"
    text += ", VLLM_API_KEY=... vllm serve, a bearer certificate, bearer authentication"
    text += ", authorization, of course"
    text += ", max_tokens=50, bos_token='<s>', eos_token_id=2, tokens=512, pad_token='<|endoftext|>'"
    text += (
        ", 'eos_token': '</s>', EOS_TOKEN = '<|im_end|>', PAD_TOKEN_ID=151643, token='Paris', hf_token=None"
    )
    text += ", MAX_NUM_BATCHED_TOKENS=8192, TOKENIZERS_PARALLELISM=false, decoded_token='Paris1234'"
    text += ", http://localhost:8000/v1, ssh://git@github.com, task-12345678, stop_token_ids=[151645]"
    assert redact.redact(text) == text


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")), ids=str)
def test_in_what_the_lessons_say_nothing_is_taken_for_a_secret(path):
    text = path.read_text(encoding="utf-8")
    assert redact._notebook(text) == text


def test_a_planted_secret_is_in_no_part_of_a_report_or_its_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", PLANTED)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    log = CHILD.replace("Something new", f"Something new {PLANTED} {TOKEN}")
    report = explain.explain(ECHO, log)
    everything = [str(report), report._repr_html_(), report.trace]
    with zipfile.ZipFile(report.bundle(tmp_path / "diagnosis.zip")) as archive:
        assert set(archive.namelist()) == {"report.txt", "facts.json", "log.txt"}
        everything += [archive.read(name).decode() for name in archive.namelist()]
        facts = json.loads(archive.read("facts.json"))
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["settings"]["HF_TOKEN"] == "[removed]"
    for text in everything:
        assert PLANTED not in text
        assert TOKEN not in text
