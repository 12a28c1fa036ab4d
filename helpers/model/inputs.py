"""A lesson's parameters, all checked by one call, and what follows from them: the machine, model and folder.

lesson = check(model=model, batch_sizes=batch_sizes, seconds=seconds, out_dir=out_dir)
lesson.model, lesson.machine, lesson.out, lesson.engine_args, lesson.batch_sizes
"""

from pathlib import Path
from types import SimpleNamespace

from helpers.base import parameters
from helpers.base.machine import detect
from helpers.model import lookup
from helpers.model.model import default


def check(*, count_only: bool = False, **values) -> SimpleNamespace:
    """Return the checked values, with ``machine``, ``model``, ``out`` and ``engine_args`` beside them.

    ``model`` "auto" is the lessons' own for this machine. With ``count_only`` it is only to be counted, so
    nothing but its config is fetched, shapes have their bare names, and "auto" is Qwen3-8B. Lists such as
    ``"1,8,32"`` become lists. What is allowed stands in ``base.parameters``. ``quick_look`` starts an engine
    without compiling it and without CUDA graphs: in a quarter of the time on a GPU, at a fraction of the
    speed for few requests. Engines on a CPU are always started so.

    Raises:
        ParameterError: a value that cannot be used, before anything is loaded.
        ModelError: no such model.
    """
    values = {"tensor_parallel_size": 1, "quick_look": False} | values
    name = parameters.text("model", values.pop("model"))
    checked = {one: parameters.checked(one, value) for one, value in values.items()}
    found = SimpleNamespace(**checked, machine=detect())
    count = found.tensor_parallel_size
    found.engine_args = {"tensor_parallel_size": count} if count > 1 else {}
    if found.quick_look:
        found.engine_args["enforce_eager"] = True
    if "out_dir" in checked:
        found.out = Path(found.out_dir)
        found.out.mkdir(parents=True, exist_ok=True)
    if count_only:
        found.model = lookup.sized("qwen3-8b" if name == "auto" else name)
    else:
        found.model = lookup.resolve(default(found.machine) if name == "auto" else name)
    print(f"Model: {found.model.title}.")
    return found
