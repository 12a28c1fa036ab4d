"""Secrets out of texts and files: tokens, keys and passwords, by their names, their forms, their values.

A secret belongs into the environment. What is known from there is removed wherever it turns up again; what
has the form of a token is removed even if nobody told us.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

REMOVED = "[removed]"
# Names of variables that hold a secret; `tokenizer`, `tokens` and `max_tokens` do not.
NAME = re.compile(r"(?i)token(?!iz|s\b|s_)|secret|passw|api_?key|credential|private_key|auth\b")
_NAMED = r"""(?:--(?:api-key|token|password)[ =]+|['"]?(?:api_key|hf_token|password|secret)['"]?\s*[:=]\s*)"""
_FORMS = (
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[bap]-|AKIA)[A-Za-z0-9_-]{8,}"), REMOVED),
    (re.compile(r"(?i)(\bbearer)\s+(?=\S*\d)[A-Za-z0-9._~+/=-]{6,}"), rf"\1 {REMOVED}"),
    (re.compile(r"""(?i)(authorization['"]?\s*[:=]\s*['"]?\w+)\s+(?!\[)[^\s'"]{6,}"""), rf"\1 {REMOVED}"),
    (re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@"), rf"\1{REMOVED}@"),
    (re.compile(rf"""(?i)({_NAMED})(\[?['"]?)(?!\[?removed|\.\.\.)[^\s'",\]]+"""), rf"\1\2{REMOVED}"),
)


def known() -> list[str]:
    """Return the values of this environment's variables that are named like a secret, the longest first."""
    values = {value for name, value in os.environ.items() if NAME.search(name) and len(value) >= 6}
    return sorted((v for v in values if not v.isdigit() and v.lower() not in ("false", "true")), key=len)[
        ::-1
    ]


def remove(text: str) -> str:
    """Return ``text`` without secrets; ``[removed]`` stands where one was."""
    for value in known():
        text = text.replace(value, REMOVED)
    for pattern, replacement in _FORMS:
        text = pattern.sub(replacement, text)
    return text


def clean(paths: Iterable[Path]) -> list[Path]:
    """Remove secrets from notebooks' outputs, logs and records; return the files that held one.

    A file is replaced at once or not at all. Of a notebook only outputs change: its code is the reader's.
    """
    held = []
    for path in paths:
        if path.is_symlink() or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        shown = _notebook(text) if path.suffix == ".ipynb" else remove(text)
        if shown != text:
            new = path.with_name(f".{path.name}.{os.getpid()}")
            new.write_text(shown, encoding="utf-8")
            new.replace(path)
            held.append(path)
    return held


def _notebook(text: str) -> str:
    """A notebook's text with secrets removed from its outputs; the same text where there are none."""
    try:
        content = json.loads(text)
        before = json.dumps(content)
        for cell in content["cells"]:
            if "outputs" in cell:
                cell["outputs"] = _each(cell["outputs"], remove)
        papermill = content["metadata"].get("papermill")
        if papermill:
            content["metadata"]["papermill"] = _each(papermill, remove)
    except (ValueError, KeyError, TypeError, AttributeError):
        return remove(text)  # half a notebook, from a run that was killed while it wrote
    return text if json.dumps(content) == before else json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _each(content, change: Callable[[str], str]):
    """The same lists and dicts with each text changed."""
    if isinstance(content, str):
        return change(content)
    if isinstance(content, list):
        return [_each(part, change) for part in content]
    if isinstance(content, dict):
        return {name: _each(part, change) for name, part in content.items()}
    return content
