"""What a model is made of, counted from its ``config.json`` alone: weights by what they are, and its caches.

transformers builds the architecture on the ``meta`` device, where tensors have shapes and no data, so that
what is counted is what would be loaded: experts, shared experts, towers for pictures, tied heads. Of the
layers it is asked what each keeps for a request: keys and values of every token (in a window or not), a
compressed cache (MLA), or a state that does not grow. What cannot be told apart is refused, never guessed.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from helpers.base.files import write_whole
from helpers.model.model import cache_folder

MATRICES = ("linear", "experts")  # the parts that schemes quantize


class LayoutError(ValueError):
    """A config that cannot be counted; the message names the class and says why."""


@dataclass(frozen=True)
class Tensor:
    """One tensor: its name in transformers, the part it belongs to, and its shape.

    ``part`` is ``linear`` (a matrix of the blocks), ``experts`` (a matrix an expert: ``copies`` of them in
    one tensor), ``embedding`` (the token table), ``head`` (the output matrix, of which there is none where it
    is the token table again), ``tower`` (whatever reads pictures or sound) or ``other``: norms, biases,
    routers, convolutions. ``outputs`` and ``width`` are a matrix's two sides, its output channels and its
    input width.
    """

    name: str
    part: str
    outputs: int
    width: int
    copies: int = 1

    @property
    def size(self) -> int:
        """Numbers it holds."""
        return self.outputs * self.width * self.copies


@dataclass(frozen=True)
class Cache:
    """What one layer keeps for a request: ``values`` numbers a token, of the last ``window`` tokens (None: of
    all); ``fixed`` bytes a token whatever the cache's type, ``state`` bytes that do not grow.
    """

    values: int = 0
    window: int | None = None
    state: int = 0
    fixed: int = 0


@dataclass(frozen=True)
class Layout:
    """A model's tensors and caches; counts are in numbers of weights, not in bytes.

    ``per_token`` of ``experts`` routed experts multiply one token. ``linear`` is what schemes quantize, the
    experts included; all else (embedding, head, norms, biases, routers, towers) they leave in 16 bits.
    ``longest`` is the context it was made for; among more GPUs than ``kv_heads`` the cache is copied, not
    divided (MLA has one).
    """

    tensors: tuple[Tensor, ...]
    caches: tuple[Cache, ...]
    layers: int = 0
    experts: int = 0
    per_token: int = 0
    heads: int = 1
    kv_heads: int = 1
    longest: int = 0

    def count(self, *parts: str) -> int:
        """Weights of these parts together."""
        return sum(one.size for one in self.tensors if one.part in parts)

    @functools.cached_property
    def linear(self) -> int:
        """Weights of all matrices that schemes quantize."""
        return self.count(*MATRICES)

    @functools.cached_property
    def total(self) -> int:
        """All weights that are stored; a tied head counts once."""
        return sum(one.size for one in self.tensors)

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """The different input widths of the quantized matrices, which a group size must divide."""
        return tuple(sorted({one.width for one in self.tensors if one.part in MATRICES}))

    def touched(self, batch: float) -> float:
        """The share of the routed experts that a step of ``batch`` tokens reads, if tokens choose evenly."""
        return 1 - (1 - self.per_token / self.experts) ** batch if self.experts else 1.0

    def kv_token_bytes(self, value_bytes: int = 2) -> int:
        """Bytes of one token's keys and values in all layers that keep any, windows ignored."""
        return sum(one.values * value_bytes + one.fixed for one in self.caches)

    def request_bytes(self, context: int, value_bytes: int = 2) -> int:
        """Bytes that a request of ``context`` tokens keeps: a window keeps no more than its width."""
        return sum(
            (one.values * value_bytes + one.fixed) * min(context, one.window or context) + one.state
            for one in self.caches
        )


@functools.lru_cache(maxsize=64)
def read(text: str) -> Layout:
    """Count the model that a ``config.json`` of this text describes.

    transformers takes five seconds to be imported and to build a model, so a layout is kept in the cache.

    Raises:
        LayoutError: a class that transformers does not have, or layers that cannot be told apart.
    """
    counted_by = version("transformers") + Path(__file__).read_text()
    key = hashlib.sha256((text + counted_by).encode()).hexdigest()[:32]
    kept = cache_folder() / "layouts" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text())
        tensors = tuple(Tensor(**one) for one in found.pop("tensors"))
        return Layout(tensors, tuple(Cache(**one) for one in found.pop("caches")), **found)
    found = _counted(text)
    with contextlib.suppress(OSError):  # no room, or no permission: then it is counted again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(asdict(found)))
    return found


def _full_config(text: str):
    """A config's object as transformers has it: every name filled in with its class's default.

    Raises:
        LayoutError: transformers has no such class.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    written = json.loads(text)
    written.pop("quantization_config", None)
    written.pop("compression_config", None)
    kind, named = written.pop("model_type", None), (written.get("architectures") or ["no class"])[0]
    if kind not in CONFIG_MAPPING:
        raise LayoutError(
            f"{named} (model_type {kind!r}) is a class that transformers does not have: it needs code of "
            "its own repository, which is not run here, so nothing can be counted."
        )
    try:
        return AutoConfig.for_model(kind, **written)
    except Exception as error:  # each class checks its own fields, with errors of any kind
        raise LayoutError(f"transformers does not accept this config of {named}: {_short(error)}") from None


# Names of classes that write text, one token after another.
_WRITES = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForImageTextToText|CausalLM$")


def _counted(text: str) -> Layout:
    config = _full_config(text)
    model = _built(config)
    written = config.get_text_config(decoder=True)
    inner = (one for one in model.modules() if one is not model)
    decoder = next((one for one in inner if type(getattr(one, "config", None)) is type(written)), model)
    tensors = _tensors(model, decoder, written)
    routed = any(one.part == "experts" for one in tensors)
    experts, per_token = _routed(written) if routed else (0, 0)
    if routed and not (experts and per_token):
        raise LayoutError(
            f"{type(model).__name__} has experts, and its config does not say how many a token takes."
        )
    heads = _first(written, "num_attention_heads", default=1)
    shared = _first(written, "num_key_value_heads", "num_kv_heads", default=heads)
    single = getattr(written, "kv_lora_rank", None) or (
        getattr(written, "multi_query", False) and not getattr(written, "new_decoder_architecture", False)
    )
    return Layout(
        tensors=tensors,
        caches=_caches(decoder, written),
        layers=written.num_hidden_layers,
        experts=experts,
        per_token=per_token,
        heads=heads,
        kv_heads=1 if single else shared,
        longest=_first(written, "max_position_embeddings", default=10_000_000),
    )


def _built(config):
    """The model on the meta device, of the class that the config names."""
    import torch
    import transformers

    named = (config.architectures or [None])[0]
    otherwise = getattr(config, "is_encoder_decoder", False) or "omni" in (config.model_type or "")
    if otherwise or (named and not _WRITES.search(named)):
        raise LayoutError(
            f"{named or type(config).__name__} does not write text token by token and nothing else: vLLM "
            "serves it otherwise, or a part of it, which is not counted here."
        )
    try:
        kind = getattr(transformers, named or "", None)
        with torch.device("meta"):
            if kind is not None:
                return kind._from_config(config)
            known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            writes = "CausalLM" if type(config) in known else "ImageTextToText"
            return getattr(transformers, f"AutoModelFor{writes}").from_config(config)
    except Exception as error:  # a class's own code, fed with any config: it fails in any way
        raise LayoutError(
            f"transformers cannot build {named or type(config).__name__} from this config: {_short(error)}"
        ) from None


def _short(error: Exception) -> str:
    """An error's first line, of a length that can be read."""
    line = next(iter(str(error).strip().splitlines()), "") or "no reason given"
    return f"{type(error).__name__}: {line[:200]}"


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_top_k", "moe_topk", "num_experts_per_token")


def _routed(config) -> tuple[int, int]:
    """How many routed experts there are in a layer, and how many a token takes."""
    return _first(config, *_EXPERTS), _first(config, *_CHOSEN)


def _first(config, *names: str, default: int = 0) -> int:
    """The first of these numbers that a config has, above 0: classes call the same thing differently."""
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if isinstance(value, int) and value), default)


def _tensors(model, decoder, config) -> tuple[Tensor, ...]:
    """Every tensor once, in the order of the model."""
    import torch
    from transformers.pytorch_utils import Conv1D

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    only_text = type(model.config) is type(config)
    inside = {id(weight) for weight in (model if only_text else decoder).parameters()}
    experts, hidden = _routed(config)[0], getattr(config, "hidden_size", 0)
    found = []
    for name, weight in model.named_parameters():  # a tied head is the table again, and comes once
        path, _, last = name.rpartition(".")
        module, sides, copies = model.get_submodule(path), (weight.numel(), 1), 1
        matrix = last == "weight" and isinstance(module, (torch.nn.Linear, Conv1D))
        if matrix:
            sides = tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)
        if weight is table.weight:
            part = "embedding"
        elif head is not None and weight is head.weight:
            part = "head"
        elif id(weight) not in inside and module is not head:
            part = "tower"
        elif matrix and not _routes(path, weight, experts):
            part = "linear"
        elif weight.ndim == 3 and "conv" not in path and (weight.shape[0] == experts or "experts" in path):
            part, sides, copies = "experts", _expert_sides(name, weight.shape, hidden), weight.shape[0]
        else:
            part = "other"
        found.append(Tensor(path if last == "weight" else name, part, *sides, copies))
    return tuple(found)


def _routes(path: str, weight, experts: int) -> bool:
    """Whether a matrix chooses experts, or weighs the shared one: vLLM keeps those in 16 bits."""
    return bool(re.search(r"gate$|router", path)) and weight.shape[0] in (experts, 1)


def _expert_sides(name: str, shape, hidden: int) -> tuple[int, int]:
    """Output channels and input width of one expert's matrix: some classes store it the other way round."""
    _, first, second = shape
    down = re.search(r"down|w2|output_linear", name)
    into = hidden if not down else (second if first == hidden else first)
    return (first, second) if second == into else (second, first)


# -- what a layer keeps for a request -----------------------------------------------------------------------

# Queries, keys and values in one matrix.
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "att_proj")
_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent")  # layers that keep a state and no keys
_COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")  # along the context, too
_STATE_BYTES = 4  # states are kept in 32 bits where the model was trained so; the most that it can be


def _caches(decoder, config) -> tuple[Cache, ...]:
    """One entry a layer that keeps something.

    Raises:
        LayoutError: a layer that keeps something which is not known here.
    """
    import torch

    lists = [(path, one) for path, one in decoder.named_modules() if isinstance(one, torch.nn.ModuleList)]
    depth = min((path.count(".") for path, _ in lists), default=0)
    layers = max((one for path, one in lists if path.count(".") == depth), key=len, default=())
    if not len(layers):
        raise LayoutError(f"{type(decoder).__name__} has no list of layers, so its cache cannot be counted.")
    kinds = getattr(config, "layer_types", None) or []
    kinds = kinds if len(kinds) == len(layers) else [None] * len(layers)
    own = len(layers) - (getattr(config, "num_kv_shared_layers", None) or 0)  # the others read earlier keys
    each = zip(layers[:own], kinds[:own], strict=True)
    return tuple(cache for layer, kind in each for cache in _kept(layer, kind, config))


def _kept(layer, kind: str | None, config) -> list[Cache]:
    """What one layer keeps: an entry for each attention or state in it."""
    found = []
    for path, module in layer.named_modules():
        own = {name: one.weight for name, one in module.named_children() if hasattr(one, "weight")}
        fused = next((name for name in own if name in _FUSED), None)
        if "kv_a_proj_with_mqa" in own:  # MLA: one compressed vector a token, for keys and values
            found.append(Cache(own["kv_a_proj_with_mqa"].shape[0]))
        elif path.endswith("indexer") and "wk" in own:  # DeepSeek's: keys in FP8, a scale for each 128
            found.append(Cache(fixed=own["wk"].shape[0] + own["wk"].shape[0] // 128 * 4))
        elif state := _state(module):
            found.append(Cache(state=state))
        elif kind not in _RECURRENT and "k_proj" in own:
            keys = own["k_proj"].shape[0]
            values = own["v_proj"].shape[0] if "v_proj" in own else keys
            found.append(Cache(keys + values, _window(kind, module, config)))
        elif kind not in _RECURRENT and fused:
            heads = config.num_attention_heads
            size = getattr(config, "head_dim", None) or config.hidden_size // heads
            found.append(Cache(max(own[fused].shape) - heads * size, _window(kind, module, config)))
    known = found or kind in ("mlp", "moe")  # layers without any attention
    if not known or (kind in _RECURRENT and not any(one.state for one in found)) or kind in _COMPRESSED:
        raise LayoutError(
            f"{type(layer).__name__} keeps something for each request ({kind or 'a kind without a name'}) "
            "that is not known here, so its cache cannot be counted."
        )
    return found


def _window(kind: str | None, module, config) -> int | None:
    """The tokens that a layer's attention looks back on, None for all."""
    if kind is not None:
        chunked = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
        return chunked or (getattr(config, "sliding_window", None) if kind == "sliding_attention" else None)
    if getattr(config, "use_sliding_window", None) is False:
        return None
    return getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)


def _state(module) -> int:
    """Bytes of a recurrent layer's state: what its convolutions look back on, and the state itself."""
    named = [one for name, one in module.named_children() if name.endswith(("conv", "conv1d"))]
    weights = [one.weight for one in named if getattr(one, "weight", None) is not None]
    convolutions = [weight for weight in weights if weight.ndim == 3]
    looked_back = sum(weight.shape[0] * (weight.shape[2] - 1) * 2 for weight in convolutions)
    decay = getattr(module, "A_log", None)
    if convolutions and decay is not None and decay.ndim == 2:  # Mamba: a row of states a channel
        return looked_back + decay.numel() * _STATE_BYTES
    for sides in (_MAMBA2, _DELTA, _SQUARE) if convolutions else ():
        if all(isinstance(getattr(module, side, None), int) for side in sides):
            return looked_back + math.prod(getattr(module, side) for side in sides) * _STATE_BYTES
    return looked_back if decay is None else 0


# The sides of a state, as the classes call them: Mamba 2, gated DeltaNet, and those with a square a head.
_MAMBA2 = ("num_heads", "head_dim", "ssm_state_size")
_DELTA = ("num_v_heads", "head_k_dim", "head_v_dim")
_SQUARE = ("num_heads", "head_dim", "head_dim")
