"""Every message that vLLM raises while it starts or loads, fed to the diagnosis: which get a name.

The messages are read out of the installed source, with an 8 for each value. The numbers below may only rise:
a message that had a name keeps one.
"""

import ast
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.base.machine import versions
from helpers.faults import explain

READ = "0.32.0"  # the version that the catalogue was read against
# Place in the source, and how many of its messages have a name at least. The others are its own invariants,
# which say that vLLM is wrong and not what to do; of one request's fields, answered to its client; or of one
# model, format or kernel each, where the evidence says more than an entry could.
PLACES = {
    "config/": 311,
    "engine/": 25,
    "envs.py": 4,
    "platforms/": 13,
    "sampling_params.py": 80,
    "lora/": 6,
    "renderers/": 11,
    "entrypoints/": 8,
    "distributed/utils.py": 2,
    "v1/engine/": 10,
    "v1/executor/": 8,
    "v1/core/": 3,
    "v1/worker/gpu_worker.py": 1,
    "v1/worker/cpu_worker.py": 3,
    "v1/worker/utils.py": 2,
    "v1/attention/": 5,
    "model_executor/model_loader/": 11,
    "model_executor/models/registry.py": 6,
    "model_executor/layers/quantization/": 88,
    "model_executor/layers/fused_moe/": 16,
    "model_executor/kernels/": 8,
}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below a node but expressions, which are most of it and hold no statement."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            yield from statements(child)


def messages(tree: ast.Module) -> list[tuple[str, int, str]]:
    """An exception's name, its line and its message, for each ``raise`` and ``assert`` that has one."""
    found = []
    for node in statements(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            parts = [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]
            name = ast.unparse(node.exc.func).rpartition(".")[2]
        elif isinstance(node, ast.Assert) and node.msg is not None:
            name, parts = "AssertionError", [node.msg]
        else:
            continue
        if text := next(filter(None, map(_text, parts)), None):
            found.append((name, node.lineno, text))
    return found


def _text(node: ast.expr) -> str | None:
    """A message as it would read, with an 8 for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^{}]*\}|%[sdr]", "8", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "8" for part in node.values)
    if isinstance(node, ast.BinOp):
        left, right = _text(node.left), _text(node.right)
        return left if isinstance(node.op, ast.Mod) or right is None else (left or "") + right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _text(node.func.value)
    return None


def named(place: str, root: Path) -> Counter:
    """How often each diagnosis is given to the messages of one place."""
    found: Counter = Counter()
    files = sorted((root / place).rglob("*.py")) if place.endswith("/") else [root / place]
    for file in files:
        for name, line, text in messages(ast.parse(file.read_text(encoding="utf-8"))):
            frame = f'  File "site-packages/vllm/{file.relative_to(root)}", line {line}, in f\n'
            found[explain.explain(log=f"{frame}{name}: {text}").name] += 1
    return found


@pytest.mark.skipif(READ not in versions().values(), reason="the numbers are of another version")
@pytest.mark.parametrize("place", PLACES)
def test_as_many_of_vllms_messages_have_a_name_as_before(place):
    root = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    found = named(place, root)
    with_a_name = sum(found.values()) - found["unknown"]
    print(f"{place:40} {sum(found.values()):5} messages, {with_a_name:4} with a name: {dict(found)}")
    assert with_a_name >= PLACES[place], found
