"""What the catalogue asks of a match that a pattern cannot say: each function by the name that `by` gives.

A function gets what the pattern found and what was seen, and returns facts for the entry's sentences, or
None where the entry is not the diagnosis. `by = "full:weights"` passes an argument. Sizes are in GiB.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.faults.report import cut

Found = dict[str, str]


@dataclass(frozen=True)
class Seen:
    """What is known of a failure when an entry is asked.

    ``text`` is what is searched, an exception's words or a log's error lines, and ``start`` where the match
    begins in it. ``log`` is the whole log, ``where`` the frames that an exception came through.
    ``holders`` of memory are None where nobody was asked, because a log may come from anywhere. ``reader`` is
    the line of the reader's own that the exception was raised in, empty where a library raised it.
    """

    text: str
    start: int = 0
    log: str = ""
    where: str = ""
    holders: Sequence | None = None
    reader: str = ""

    @property
    def line(self) -> str:
        """The line of the match, from its beginning."""
        end = self.text.find("\n", self.start)
        return self.text[self.text.rfind("\n", 0, self.start) + 1 : end if end >= 0 else None]

    def frames(self) -> str:
        """The traceback that ends in the match: an exception's, or the lines above it in a log."""
        above = self.text[max(0, self.start - 20_000) : self.start]
        return self.where + above[max(0, above.rfind("Traceback (most recent call last)")) :]

    def setting(self, name: str) -> str | None:
        """The value of an argument in the configuration that vLLM logs when it starts."""
        found = re.search(name + r"['\"]?[=:] ?['\"]?([\w./-]+)", self.log)
        return found[1] if found and found[1] != "None" else None


# -- a GPU's memory, by the numbers of the message ---------------------------------------------------------

_UNIT = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1}
_SIZE = r"([\d.]+) (bytes|[KMG]iB)"
_NUMBERS = {
    "asked": rf"Tried to allocate {_SIZE}",
    "total": rf"total capacity of {_SIZE}|{_SIZE} total capacity",
    "free": rf"of which {_SIZE} is free|{_SIZE} free",
    "own": rf"this process has {_SIZE} memory in use",
}
NOBODY = 0.3  # GiB that the numbers may differ by without anybody else: the driver's own, and rounding
_PHASES = {
    "capture": r"capture_model|capture_cudagraph|_capture",
    "profile": r"profile_run|determine_available_memory|determine_num_available_blocks",
    "cache": r"initialize_kv_cache|allocate_kv_cache|initialize_from_config|_allocate_gpu|CacheEngine",
    "weights": r"load_model|load_weights|initialize_model|create_weights|process_weights",
    "running": r"execute_model|_process_engine_step|run_busy_loop|\bgenerate\b",
}
_FORMATS = r"(?i)\b(awq|gptq|fp8|mxfp4|nvfp4|bitsandbytes|bnb|int4|int8|w4a16|w8a8|4bit)\b"


def _numbers(seen: Seen) -> dict[str, float]:
    """The sizes that PyTorch's message carries, in GiB."""
    said = seen.text[seen.start : seen.start + 2000]
    said = said[: said.find("CUDA out of memory", 20)] if "CUDA out of memory" in said[20:] else said
    found = {}
    for name, pattern in _NUMBERS.items():
        if match := re.search(pattern, said):
            number, unit = (part for part in match.groups() if part is not None)
            found[name] = float(number) * _UNIT[unit]
    for process in re.finditer(rf"Process \d+ has {_SIZE} memory in use", said):
        found["others"] = found.get("others", 0) + float(process[1]) * _UNIT[process[2]]
    if not 0 < found.get("own", 0) <= found.get("total", 0):
        found.pop("own", None)  # in some containers the driver cannot tell: 0 bytes, or more than there are
        found.pop("others", None)  # then one of the processes that it names is this one
    if "others" not in found and found.keys() >= {"total", "free", "own"}:
        found["others"] = max(0.0, found["total"] - found["free"] - found["own"])
    return found


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.0f} MiB"


def phase(seen: Seen) -> str:
    """What the engine did when memory ran out, by its traceback; empty where none shows it."""
    names = " ".join(re.findall(r", in (\w+)", seen.frames()))
    return next((name for name, pattern in _PHASES.items() if re.search(pattern, names)), "")


def full(found: Found, seen: Seen, when: str = "") -> Found | None:
    """Facts of a full GPU: who holds what, by the message's own numbers. None in another phase."""
    numbers = _numbers(seen)
    if when and phase(seen) != when:
        return None
    told = {name: _size(value) for name, value in numbers.items()}
    alone = ""
    if "others" in numbers and numbers["others"] < NOBODY:
        alone = " By the message's own numbers this process holds all that is in use, "
        alone += f"{told['own']} of {told['total']}."
    fewer = (
        'Fewer bytes of weights: a smaller model, a quantized checkpoint; here scheme="fp8", "awq" or "int8"'
    )
    if stored := _stored(seen):
        fewer = f"The weights are {stored} already: fewer bytes of them only by a smaller model"
    gpus = seen.setting("tensor_parallel_size") or "1"
    return told | {"alone": alone, "fewer": fewer, "more": str(2 * int(gpus)) if gpus.isdigit() else "2"}


def _stored(seen: Seen) -> str:
    """The format that the weights are in already, where the log or the traceback names it."""
    if said := seen.setting("quantization"):
        return said
    frames = re.search(
        r"layers/quantization/(?:utils/)?(?:auto_)?(awq|gptq|fp8|mxfp4|modelopt|compressed_tensors)",
        seen.frames(),
    )
    name = re.search(_FORMATS, seen.setting("model") or "")
    return (frames or name)[1] if frames or name else ""


def suffices(found: Found, seen: Seen) -> Found | None:
    """An allocation that was refused though a tenth more than it was free."""
    numbers = _numbers(seen)
    if not numbers.keys() >= {"asked", "free"} or numbers["free"] < 1.1 * numbers["asked"]:
        return None
    return {name: _size(value) for name, value in numbers.items()}


def others(found: Found, seen: Seen) -> Found | None:
    """Somebody else holds a part: by the message's own numbers, or because the driver names them."""
    numbers = _numbers(seen)
    if numbers.get("others", 0) >= NOBODY:
        held = f" {_size(numbers['others'])} of {_size(numbers['total'])}"
        return {"held": f"{held}, by the message's own numbers"}
    asked = any(holder.where.startswith("GPU") for holder in seen.holders or ())
    return {"held": " a part of it (below)"} if asked else None


# -- a share of memory that is not free --------------------------------------------------------------------


def fitting(found: Found, seen: Seen) -> Found:
    """What ``gpu_memory_utilization`` fits into the memory that is free: rounded down, a little left over."""
    free, total = float(found["free"]), float(found["total"])
    fits = math.floor((free / total - 0.02) * 100) / 100
    if fits < 0.05:
        return {"fits": "nothing worth starting with: free the memory first"}
    return {"fits": f"gpu_memory_utilization={fits:.2f}"}


def ours(found: Found, seen: Seen) -> Found | None:
    """An engine that this process started is among the holders."""
    return {} if any(holder.ours for holder in seen.holders or ()) else None


def orphaned(found: Found, seen: Seen) -> Found | None:
    """An engine whose owner has ended is among the holders."""
    pids = [str(holder.pid) for holder in seen.holders or () if holder.orphan]
    return {"end_orphans": f"kill {' '.join(pids)}"} if pids else None


def taken(found: Found, seen: Seen) -> Found | None:
    """A twentieth of the memory was taken before the engine asked for its share, or somebody is named."""
    if seen.holders or float(found["free"]) < 0.95 * float(found["total"]):
        return fitting(found, seen)
    return None


def shorter(found: Found, seen: Seen) -> Found:
    """The context that fits, where the message computes it."""
    return {"shorter": f"max_model_len={found['fits']}" if "fits" in found else "a smaller max_model_len"}


# -- formats and layers ------------------------------------------------------------------------------------


def dtypes(found: Found, seen: Seen) -> Found:
    """The number formats that the message allows, as arguments."""
    allowed = re.findall(r"\b(?:torch\.)?(float16|bfloat16|float32|half)\b", found["dtypes"])
    return {"use": " or ".join(f'dtype="{name}"' for name in dict.fromkeys(allowed)) or "dtype=..."}


def reasons(found: Found, seen: Seen) -> Found:
    """What each kernel says on the lines below "Reasons:", and the width that one of them names."""
    below = seen.text[seen.start : seen.start + 6000]
    each = r"(\w+?)(?:LinearKernel|Kernel)?:? (?:(?:cannot implement|is not supported) due to)?:? ?(.+)"
    said = re.findall(each, below.partition("Reasons:")[2])
    wide = re.search(r"(?:size_per_partition|K|N|size) ?= ?(\d+) is not divisible by \w+ ?= ?(\d+)", below)
    return {
        "reasons": "; ".join(f"{name}: {why.split('. ')[0]}" for name, why in said[:4]),
        "cause": f" The width {wide[1]} is no multiple of {wide[2]}." if wide else "",
    }


def forked(found: Found, seen: Seen) -> Found | None:
    """Whether vLLM forks its processes here, which it does unless told otherwise."""
    return {} if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork") == "fork" else None


# -- whose words -------------------------------------------------------------------------------------------


def sampling_argument(found: Found, seen: Seen) -> Found | None:
    """An unknown argument of SamplingParams, and the name that vLLM has for it."""
    if "SamplingParams" not in seen.reader + seen.text:
        return None
    known = {"max_new_tokens": "max_tokens", "num_return_sequences": "n", "do_sample": "temperature",
             "max_length": "max_tokens", "num_beams": "llm.beam_search"}  # fmt: skip
    hint = known.get(found["name"], "")
    return {"hint": f"{hint} is vLLM's name for it" if hint else ""}


def here(found: Found, seen: Seen) -> Found | None:
    """An address that is no hub's and no public service's: a server of the reader's."""
    host = found.get("host", "")
    public = re.search(r"huggingface|hf-mirror|modelscope|pypi|pythonhosted|github", host + seen.line)
    return None if public else {"host": host}


def said(found: Found, seen: Seen) -> Found:
    """The message itself, for entries whose message says what to do."""
    text = re.sub(r"^(?:[\w.]+: )?(?:Value error, )?", "", seen.line.strip()).split(" [type=")[0]
    return {"said": cut(text, 300)}


def with_log(found: Found, seen: Seen) -> Found | None:
    """A log was given and read."""
    return {} if seen.log.strip() else None


def refused(found: Found, seen: Seen) -> Found:
    """The argument that pydantic names, and why."""
    text = found.get("said") or f"{found['field'].partition('.')[0]}: {found['why']}"
    return {"said": cut(text, 300)}


def interrupted(found: Found, seen: Seen) -> Found:
    """Who interrupted: the reader, where an exception says so; of a log nobody knows."""
    if seen.where:
        return {"who": "You interrupted it. Nothing failed, and the engine was released."}
    return {"who": "It was interrupted, by Ctrl+C or by what stops it. No other error is reported."}


def raised_in(found: Found, seen: Seen, place: str) -> Found | None:
    """Raised by a file of that place itself: other errors only pass through it."""
    files = re.findall(r'File "([^"]*)", line', seen.frames())
    return said(found, seen) if files and re.search(place, files[-1]) else None


def loading(found: Found, seen: Seen) -> Found | None:
    """A KeyError is of a checkpoint only where weights are loaded."""
    return {} if "KeyError" not in seen.line or "load_weights" in seen.frames() else None
