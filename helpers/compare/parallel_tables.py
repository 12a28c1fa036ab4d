"""Two GPUs for one model, recorded: one engine on both, or a server on each."""

from __future__ import annotations

from statistics import median

from helpers.base.figure import Figure, panels
from helpers.base.machine import GIB
from helpers.base.page import Table
from helpers.compare import cards, sizing
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
    found, counts = _decoded(rows, model), sizes.layout(sizing.known_models()[model].folder)
    table = []
    for gpus, way in sorted(found, key=lambda key: (key[0], [*WAYS].index(key[1]))):
        speeds = found[gpus, way]
        weights, load = speeds[1]["weights_bytes"], Load(cards.card(speeds[1]["device"]), gpus)
        cache = sizing.budget(counts, weights, 2, load, gpus).tokens
        rates = [speeds[batch]["output_tokens_per_s"] for batch in (1, 64)]
        shown = [f"{rate:,.0f}" for rate in (*rates, rates[-1] / gpus)]
        table.append([WAYS[way], gpus, f"{weights / gpus / GIB:.1f} GiB", f"{cache:,}", *shown])
    return Table(["weights", "GPUs", "a GPU", "cache, tokens", "tok/s of 1", "of 64", "of 64, a GPU"], table)


def spread(rows: list[dict], batches: tuple[int, ...] = (1, 64)) -> Table:
    """How many times the tokens/s of one GPU an engine on two gives, and what fewer bits give on each."""
    table = []
    for model in dict.fromkeys(row["model"] for row in rows if row.get("gpus", 1) > 1):
        found = _decoded(rows, model)
        for way in WAYS:
            one, two = found.get((1, way)), found.get((2, way))
            if one and two:
                table.append([model, WAYS[way], *(_ratio(two, one, batch) for batch in batches)])
                bits = [(found.get((gpus, way)), found.get((gpus, "bf16"))) for gpus in (1, 2)]
                table[-1] += [_ratio(*pair, 1) if all(pair) else "-" for pair in bits]
    columns = ["model", "weights", *(f"two GPUs to one, batch {batch}" for batch in batches)]
    columns += ["gain on 16 bits, batch 1: one GPU", "two GPUs"]
    return Table(columns, table, texts=columns[1:2])


def _decoded(rows: list[dict], model: str) -> dict[tuple[int, str], dict[int, dict]]:
    """By GPUs and way the records of a model after short prompts, by batch."""
    found: dict[tuple[int, str], dict[int, dict]] = {}
    for row in rows:
        decoded = row["prompt_tokens"] == 16 and "output_tokens_per_s" in row
        if decoded and row["model"] == model and row["way"] in WAYS:
            found.setdefault((row.get("gpus", 1), row["way"]), {})[row["batch"]] = row
    return found


def _ratio(one: dict[int, dict], other: dict[int, dict], batch: int) -> str:
    return f"{one[batch]['output_tokens_per_s'] / other[batch]['output_tokens_per_s']:.2f}"


# -- served ---------------------------------------------------------------------------------------


def ways(rows: list[dict], gpus: int = 2) -> Figure:
    """What two GPUs buy: tokens a second for a user against tokens a second for a GPU."""
    loads = _loads(rows, SMALL, gpus)
    figure, [[axes]] = panels(size=(7.2, 4.2))
    said = []
    for way, (colour, marker, name, beside) in LOOKS.items():
        if beside is None:
            continue
        points = []
        for clients, level in _levels(loads, way).items():
            each = median(row["output_tokens_per_s"] for row in level) / level[0]["gpus"]
            points.append((1 / median(row["tpot_s"] for row in level), each, clients))
        of_user, of_gpu, _ = zip(*points, strict=True)
        axes.plot(of_user, of_gpu, color=colour, marker=marker, label=name)
        for user, gpu, clients in points:
            axes.annotate(f"{clients}", (user, gpu), beside, textcoords="offset points", color=colour)
        said.append(f"{name}: " + ", ".join(f"{u:.0f} and {g:,.0f} at {c} clients" for u, g, c in points))
    axes.set(
        xlabel="tokens/s for each user (right: faster)",
        ylabel="tokens/s for each GPU (up: cheaper)",
        xlim=(0, 340),
        ylim=(-400, None),
    )
    axes.legend(frameon=False, title="numbers: clients")
    alt = f"Tokens a second for each user, and for each GPU, on {loads[0]['device']}. " + "; ".join(said)
    return Figure(figure, alt + ".")


def _loads(rows: list[dict], model: str, gpus: int) -> list[dict]:
    return [row for row in rows if row.get("model") == model and row.get("gpus") in (1, gpus)]


def _levels(loads: list[dict], way: str) -> dict[int, list[dict]]:
    """The repeats of each level of a way, by its clients."""
    counts = sorted({row["clients"] for row in loads if row["way"] == way})
    return {n: [row for row in loads if (row["way"], row["clients"]) == (way, n)] for n in counts}


def served(rows: list[dict], model: str = SMALL, gpus: int = 2) -> Table:
    """The recorded loads as a table: milliseconds a token for one client, and requests/s at each level."""
    loads = _loads(rows, model, gpus)
    counts = sorted({row["clients"] for row in loads} - {1})
    table = []
    for way, (_, _, name, _) in LOOKS.items():
        if levels := _levels(loads, way):
            bits = "" if model == SMALL else f", {BITS[levels[1][0]['scheme']]}"
            alone = f"{1e3 * median(row['tpot_s'] for row in levels[1]):.1f} ms"
            rates = [_range(levels[count]) if count in levels else "-" for count in counts]
            table.append([name + bits, alone, *rates])
    columns = ["way", "TPOT of one client", *(f"requests/s, {count} clients" for count in counts)]
    return Table(columns, table)


def _range(level: list[dict]) -> str:
    rates = [row["requests_per_s"] for row in level]
    spread = f" ({min(rates):.3g} to {max(rates):.3g})" if len(rates) > 1 else ""
    return f"{median(rates):.3g}{spread}"
