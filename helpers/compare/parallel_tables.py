"""Two GPUs for one model, recorded: one engine on both, or a server on each."""

import itertools
from statistics import median

from helpers.base.figure import Figure, panels
from helpers.base.machine import GIB
from helpers.base.page import Table
from helpers.compare import cards, recorded, sizing
from helpers.compare.sizing import Load
from helpers.model import sizes

# Ways to use two GPUs: colours that colour-blind readers can tell, and where numbers stand in the figure (the
# ranks' line would lie on the router's).
LOOKS = {
    "one": ("#808080", "o", "one server, one GPU", (8, 2)),
    "router": ("#0072B2", "s", "two servers, a router", (-24, -12)),
    "data parallel": ("#009E73", "^", "one server, two ranks", None),
    "tensor parallel": ("#D55E00", "D", "one server on two GPUs", (8, 3)),
}
BITS = {"baseline": "16 bits", "fp8": "FP8"}
SMALL = "Mistral-7B"  # of which every way to serve is on record
# Of the recorded ways those that all models have, and how a reader is told.
WAYS = {"bf16": "16 bits", "fp8": "FP8", "awq, Marlin": "AWQ, Marlin"}


def outgrown(rows: list[dict], model: str = "Llama-3.1-70B") -> Table:
    """A model that one GPU does not hold in 16 bits, on one and two: tokens/s of engines that decode.

    ``rows`` are those of ``records.deployments`` and ``records.parallel``, after prompts of 16 tokens. Tokens
    of KV cache are counted, in 16 bits: what vLLM's share of the GPUs leaves beside weights and the rest.
    """
    found, counts = recorded.decoded(rows), sizes.layout(sizing.known_models()[model].folder)
    table = []
    for gpus, way in itertools.product((1, 2), WAYS):
        if speeds := found.get((model, way, gpus)):
            weights, load = speeds[1]["weights_bytes"], Load(cards.card(speeds[1]["device"]), gpus)
            cache = sizing.budget(counts, weights, 2, load, gpus).tokens
            one, many = (speeds[batch]["output_tokens_per_s"] for batch in (1, 64))
            shown = [f"{rate:,.0f}" for rate in (one, many, many / gpus)]
            table.append([WAYS[way], gpus, f"{weights / gpus / GIB:.1f} GiB", f"{cache:,}", *shown])
    return Table(["weights", "GPUs", "a GPU", "cache, tokens", "tok/s of 1", "of 64", "of 64, a GPU"], table)


def spread(rows: list[dict]) -> Table:
    """How many times the tokens/s of one GPU an engine on two gives, and what fewer bits give on each."""
    found, table = recorded.decoded(rows), []
    models = dict.fromkeys(row["model"] for row in rows if row.get("gpus", 1) > 1)
    for model, way in itertools.product(models, WAYS):
        one, two = (found.get((model, way, gpus)) for gpus in (1, 2))
        if one and two:
            gains = [_ratio(two, one, batch) for batch in (1, 64)]
            gains += [_ratio(of, found.get((model, "bf16", gpus)), 1) for gpus, of in ((1, one), (2, two))]
            table.append([model, WAYS[way], *gains])
    columns = ["model", "weights", "two GPUs to one, batch 1", "two GPUs to one, batch 64"]
    columns += ["gain on 16 bits, batch 1: one GPU", "two GPUs"]
    return Table(columns, table, texts=columns[1:2])


def _ratio(one: dict[int, dict], other: dict[int, dict] | None, batch: int) -> str:
    if not other:
        return "-"
    return f"{one[batch]['output_tokens_per_s'] / other[batch]['output_tokens_per_s']:.2f}"


# -- served ---------------------------------------------------------------------------------------


def ways(rows: list[dict]) -> Figure:
    """What two GPUs buy: tokens a second for a user against tokens a second for a GPU."""
    loads = _loads(rows, SMALL)
    figure, [[axes]] = panels(size=(7.2, 4.2))
    said = []
    for way, (colour, marker, name, beside) in LOOKS.items():
        if beside is None:
            continue
        points = {}
        for clients, level in loads[way].items():
            user = 1 / median(row["tpot_s"] for row in level)
            gpu = median(row["output_tokens_per_s"] for row in level) / level[0]["gpus"]
            points[clients] = user, gpu
            axes.annotate(f"{clients}", (user, gpu), beside, textcoords="offset points", color=colour)
        axes.plot(*zip(*points.values(), strict=True), color=colour, marker=marker, label=name)
        told = ", ".join(f"{user:.0f} and {gpu:,.0f} at {n} clients" for n, (user, gpu) in points.items())
        said.append(f"{name}: {told}")
    axes.set(xlabel="tokens/s for each user (right: faster)", xlim=(0, 340))
    axes.set(ylabel="tokens/s for each GPU (up: cheaper)", ylim=(-400, None))
    axes.legend(frameon=False, title="numbers: clients")
    device = loads["one"][1][0]["device"]
    return Figure(figure, f"Tokens a second for each user, and for each GPU, on {device}. {'; '.join(said)}.")


def _loads(rows: list[dict], model: str) -> dict[str, dict[int, list[dict]]]:
    """By way and clients the repeats of each recorded load of a model, on up to two GPUs."""
    loads: dict[str, dict[int, list[dict]]] = {}
    of_it = [row for row in rows if row.get("model") == model and row.get("gpus") in (1, 2)]
    for row in sorted(of_it, key=lambda row: row["clients"]):
        loads.setdefault(row["way"], {}).setdefault(row["clients"], []).append(row)
    return loads


def served(rows: list[dict], model: str = SMALL) -> Table:
    """The recorded loads as a table: milliseconds a token for one client, and requests/s at each level."""
    loads = _loads(rows, model)
    counts = sorted({clients for levels in loads.values() for clients in levels} - {1})
    table = []
    for way, (_, _, name, _) in LOOKS.items():
        if levels := loads.get(way):
            bits = "" if model == SMALL else f", {BITS[levels[1][0]['scheme']]}"
            alone = f"{1e3 * median(row['tpot_s'] for row in levels[1]):.1f} ms"
            table.append([name + bits, alone, *(_range(levels.get(count, [])) for count in counts)])
    columns = ["way", "TPOT of one client", *(f"requests/s, {count} clients" for count in counts)]
    return Table(columns, table)


def _range(level: list[dict]) -> str:
    rates = [row["requests_per_s"] for row in level]
    if not rates:
        return "-"
    spread = f" ({min(rates):.3g} to {max(rates):.3g})" if len(rates) > 1 else ""
    return f"{median(rates):.3g}{spread}"
