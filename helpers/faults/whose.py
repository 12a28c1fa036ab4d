"""Whose fault an exception is: the reader's own line, a library's that it called, or the engine's.

"Your own code" is said only where the frame that raised is the reader's and the error is of Python's own
kinds, or the reader's own `raise`. What a notebook's runner quotes is opened.
"""

import builtins
import dis
import re
import sys
import traceback
from pathlib import Path

from helpers.base.files import ROOT
from helpers.faults import log

# Where an error that is not the reader's own code comes from.
_MACHINERY = ("vllm", "torch", "transformers", "llmcompressor", "compressed_tensors", "huggingface_hub",
              "safetensors", "openai", "triton", "flashinfer", "ray")  # fmt: skip
_PACKAGES = ("site-packages", "dist-packages")  # the second on Debian, and so on Colab
# Errors whose message is a name or a key of the line that raised them, or nothing.
_SLIPS = (LookupError, NameError, AttributeError, SyntaxError, MemoryError, ZeroDivisionError)


def frames(error: BaseException | None) -> list[traceback.FrameSummary]:
    """The frames that an exception came through, the one that raised it last."""
    return list(traceback.extract_tb(error.__traceback__)) if error is not None else []


def package(path: str) -> str | None:
    """The package that a file is of, "Python" for the standard library, None for the reader's own."""
    parts = Path(path).parts
    for folder in _PACKAGES:
        if folder in parts:
            return parts[parts.index(folder) + 1].removesuffix(".py")
    if Path(path).is_relative_to(ROOT / "helpers"):
        return "helpers"
    library = (sys.prefix + "/lib", sys.base_prefix + "/lib", "<frozen", "<__array_function__")
    return "Python" if path.startswith(library) else None


def of_machinery(error: BaseException | None) -> bool:
    """Whether vLLM, or what it stands on, is among the frames."""
    return any(package(frame.filename) in (*_MACHINERY, "helpers") for frame in frames(error))


def readers_line(error: BaseException | None) -> str:
    """The line of the reader's own that raised the exception; empty where a library's did."""
    found = frames(error)
    if not found or package(found[-1].filename) is not None:
        return ""
    return found[-1].line or "(its text is not known)"


def _raised(error: BaseException) -> bool:
    """Whether a `raise` or an `assert` raised it: C code, such as torch's, raises in a call.

    By the instruction that the traceback ends in.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def own_code(error: BaseException | None) -> str | None:
    """A sentence on an error of the reader's own line, or of a library that this line called, or None."""
    found = frames(error)
    own = [frame for frame in found if package(frame.filename) is None]
    if not own or of_machinery(error):
        return None
    name = type(error).__name__
    place = f"line {own[-1].lineno} of your own code" + (f", `{own[-1].line}`" if own[-1].line else "")
    if own[-1] is not found[-1]:
        library = package(found[-1].filename)
        library = "Python's own library" if library == "Python" else library
        return f"{name} of {library}, called in {place}: no file of vLLM is among its frames."
    if type(error).__module__ not in ("builtins", "__main__") and not _raised(error):
        return None  # a library's, written in C
    return f"{name} in {place}: vLLM has no part in it."


def made_up(error: BaseException) -> bool:
    """Whether a line of the reader's own raised it, with words of the reader's own: `raise`, `assert`, a key.

    What hides the error that it came from (`raise ... from None`) may repeat its words.
    """
    if error.__context__ is not None and before(error) is None:
        return False
    readers = bool(readers_line(error)) and not of_machinery(error)
    return readers and (_raised(error) or isinstance(error, _SLIPS))


def before(error: BaseException) -> BaseException | None:
    """The error that led to this one. One that was only being handled and has its report did not."""
    if error.__cause__ or error.__suppress_context__:
        return error.__cause__
    return None if getattr(error.__context__, "report", None) is not None else error.__context__


def chain(error: BaseException | None) -> list[BaseException]:
    """An exception and those that led to it, its own first."""
    found: list[BaseException] = []
    while error is not None and error not in found and len(found) < 1000:
        found.append(error)
        error = before(error)
    return found


_CELL = re.compile(r"(?:Cell |Input )?In ?\[\d+\]|<ipython-input|(?:File )?/tmp/(?:ipykernel|ipython-input)")
_PLACE = re.compile(_CELL.pattern + r"|File |[\w./~-]+\.py in ")


def cell_of(text: str, by_raise: bool = False) -> str | None:
    """A sentence on a slip in a cell, from the traceback that IPython wrote, or None.

    Only where the frame that raised is the cell and the error is of Python's kinds; with ``by_raise`` only
    where the cell raised it with words of its own.
    """
    if not re.search(r"In ?\[\d|ipython|ipykernel", text):
        return None
    lines = [line.strip() for line in log.plain(text).splitlines() if line.strip()]
    last = next((number for number in range(len(lines) - 1, -1, -1) if log.named(lines[number])), None)
    if last is None:
        return None
    name = log.named(lines[last]).partition(":")[0]
    kind = getattr(builtins, name, None)
    places = [line for line in lines[:last] if _PLACE.match(line)]
    if not isinstance(kind, type) or not places or not _CELL.match(places[-1]):
        return None
    if re.search(r"[/\\](?:vllm|torch|transformers|helpers)[/\\]", "\n".join(places)):
        return None
    at = re.findall(r"-+> ?\d+ (.+)", "\n".join(lines[:last]))
    source = at[-1].strip() if at else ""
    if by_raise and not issubclass(kind, _SLIPS) and not re.match(r"raise\b|assert\b", source):
        return None
    line = f", `{source}`" if source else ""
    return f"{name} in a cell of the notebook{line}: vLLM has no part in it."
