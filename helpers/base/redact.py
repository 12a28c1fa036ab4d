"""Secrets out of texts and files: tokens, keys and passwords, by their names, their forms, their values.

A secret belongs into the environment. What is known from there is removed wherever it turns up again; what
has the form of a token is removed even if nobody told us.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from helpers.base import files

REMOVED = "[removed]"

# Names of variables that hold a secret; `tokenizer`, `tokens` and `max_tokens` do not.
NAME = re.compile(r"(?i)token(?!iz|s\b|s_)|secret|passw|api_?key|credential|private_key|auth\b")

# Where a word begins: also after an escaped newline, a colour's code (IPython's), a URL's escape.
_START = r"(?:\b|(?<=\\[nrt])|(?<=[\d\[]m)|(?<=%[0-9A-Fa-f]{2}))"

_COLOUR = r"\x1b\[[\d;]*m"

_QUOTE = r"""\\?['"]"""

_IS = rf"(?:{_QUOTE})?(?:\s|{_COLOUR})*[:=](?:\s|{_COLOUR})*"

_NAMED = (
    rf"(?:--(?:api-key|hf-token|token|password)(?:[ =]+|{_QUOTE},\s*(?={_QUOTE}(?!--)))"
    rf"|x-api-key{_QUOTE},\s*b?(?={_QUOTE})"
    rf"|(?:api[_-]key|(?:hf|gh|github|gitlab|access|auth|session|refresh)_token|passw(?:or)?d"
    rf"|secret(?:_access)?(?:_key)?|private_key){_IS})"
)

_NOTHING = r"(?!\[?removed|\.\.\.|(?:None|null|True|False)\b)"

_VALUE = rf"""(?!\[)(?:(?!{_QUOTE})[^\s'",\]\x1b])+"""

# What is taken for a secret where a token may be a text's: no `<s>`, no word, no number.
_RANDOM = r"(?=[\w.~+/-]*\d|[\w.~+/-]{20})(?=[\d.]*[A-Za-z_~+/-])[\w.~+/=-]{8,}"

_BEARER = r"(?=[\w.~+/=-]*\d|\w+-\w+-\w|[\w.~+/=-]{20})[\w.~+/=-]{6,}"

_HEADER = rf"authorization(?:(?:{_QUOTE})?\s*[:=]\s*(?:b?{_QUOTE})?|{_QUOTE},\s*b?{_QUOTE})\w+"

_FORMS = (
    (
        re.compile(rf"{_START}(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[bap]-|AKIA)[A-Za-z0-9_-]{{8,}}"),
        REMOVED,
    ),
    (re.compile(rf"(?i)({_START}bearer)\s+{_BEARER}"), rf"\1 {REMOVED}"),
    (re.compile(rf"""(?i)({_HEADER})\s+(?!\[)[^\s'"\\]{{6,}}"""), rf"\1 {REMOVED}"),
    (re.compile(r"\b(\w+://)(?:[^/\s:@]*:[^/\s@]+|[A-Za-z0-9_-]{20,})@"), rf"\1{REMOVED}@"),
    (re.compile(rf"(?i)({_NAMED})\[(?:{_QUOTE}[^'\"\\]*{_QUOTE},?\s*)+\]"), rf"\1['{REMOVED}']"),
    (re.compile(rf"(?i)({_NAMED})(\[?(?:{_QUOTE}(?:{_COLOUR})*)?){_NOTHING}{_VALUE}"), rf"\1\2{REMOVED}"),
    # Another process's environment. The names are asked in a lookahead, which is not tried twice.
    (
        re.compile(
            rf"({_START}(?=[A-Z0-9_]*(?:TOKEN(?!IZ|S)|SECRET|PASSW|API_?KEY|CREDENTIAL|PRIVATE_KEY))"
            rf"[A-Z][A-Z0-9_]*{_IS}(?:{_QUOTE}(?:{_COLOUR})*)?){_NOTHING}{_RANDOM}"
        ),
        rf"\1{REMOVED}",
    ),
    (re.compile(rf"((?<![\w.-])token(?:=|{_IS}{_QUOTE})(?:{_QUOTE})?){_RANDOM}"), rf"\1{REMOVED}"),
)


def known() -> list[str]:
    """Return the values of this environment's variables that are named like a secret, the longest first."""
    values = {value for name, value in os.environ.items() if NAME.search(name) and len(value) >= 6}
    values = {value for value in values if not value.isdigit() and value.lower() not in ("false", "true")}
    return sorted(values, key=len, reverse=True)


def remove(text: str) -> str:
    """Return ``text`` without secrets; ``[removed]`` stands where one was."""
    for value in known():
        text = text.replace(value, REMOVED)
    for pattern, replacement in _FORMS:
        text = pattern.sub(replacement, text)
    return text


def clean(paths: Iterable[Path]) -> None:
    """Remove secrets from notebooks' outputs, logs and records.

    A file is replaced at once or not at all. Of a notebook only outputs change: its code is the reader's.
    """
    for path in paths:
        if path.is_symlink() or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        shown = _notebook(text) if path.suffix == ".ipynb" else remove(text)
        if shown != text:
            files.write_whole(path, shown)


def _notebook(text: str) -> str:
    """A notebook's text with secrets removed from its outputs; the same text where there are none."""
    try:
        content = json.loads(text)
        before = json.dumps(content)
        for cell in content["cells"]:
            if "outputs" in cell:
                cell["outputs"] = _each_removed(cell["outputs"])
        if "papermill" in content["metadata"]:
            content["metadata"]["papermill"] = _each_removed(content["metadata"]["papermill"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return remove(text)  # half a notebook, from a run that was killed while it wrote
    return text if json.dumps(content) == before else json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _each_removed(content):
    """The same lists and dicts with secrets removed from each text."""
    if isinstance(content, str):
        return remove(content)
    if isinstance(content, list):
        return [_each_removed(part) for part in content]
    if isinstance(content, dict):
        return {name: _each_removed(part) for name, part in content.items()}
    return content


def redact(text: str) -> str:
    """Remove secrets, and the home's path."""
    text = remove(text)
    home = str(Path.home()) if os.environ.get("HOME") else ""
    return text.replace(home, "~") if len(home) > 1 else text
