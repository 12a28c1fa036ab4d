"""Tables and figures of what was recorded on a GPU with other settings and kernels."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence

from helpers.base import page
from helpers.base.figure import Figure, label_bar, name_ends, panels
from helpers.base.page import Note, Table
from helpers.compare import recorded
from helpers.model.schemes import SCHEMES

KINDS = {  # of what takes a decoding step's time: colour and hatch
    "matrix products": ("#0072B2", ""),
    "attention and cache": ("#AD7A00", "//"),
    "other kernels": ("#808080", ".."),
    "GPU waits": ("#FFFFFF", "xx"),
}


def steps(broken: Mapping[str, Mapping[str, float]], least: Mapping[str, float], title: str) -> Figure | Note:
    """Draw where a decoding step's time goes, a bar a variant: microseconds by kind of kernel.

    Args:
        broken: by variant, as ``recorded.breakdown`` gives them; ``least``: for the same names the
            microseconds that reading the weights takes at the memory's bandwidth.
    """
    if not broken:
        return Note("No step is on record whose kernels are named: there is nothing to break down.")
    figure, [[axes]] = panels(size=(8, 1.6 + 0.37 * len(broken)))
    for place, (name, parts) in enumerate(broken.items()):
        left = 0.0
        for kind, (colour, hatch) in KINDS.items():
            label = None if place else kind
            edge = "black" if colour == "#FFFFFF" else "white"
            axes.barh(
                place,
                parts[kind],
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor=edge,
                label=label,
                height=0.7,
            )
            left += parts[kind]
        mark = None if place else "reading the weights, at least"
        axes.plot(least[name], place, "|", color="black", markersize=24, markeredgewidth=3, label=mark)
        label_bar(axes, left, place, f"{least[name] / left:.0%} of the bound")
    longest = max(sum(parts.values()) for parts in broken.values())
    axes.set(xlim=(0, 1.5 * longest), xlabel="microseconds a token, one request", title=title)
    axes.set_yticks(range(len(broken)), [textwrap.fill(name, 40) for name in broken])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=3)
    words = "; ".join(
        f"{name}: {', '.join(f'{kind} {us:,.0f}' for kind, us in parts.items())}, at least {least[name]:,.0f}"
        for name, parts in broken.items()
    )
    return Figure(figure, f"{title}. Microseconds of a step. {words}.", exact=True)


def _series(rows: list[dict]) -> list[list[dict]]:
    """The engines of each process, in turn."""
    series: dict[tuple, list[dict]] = {}
    runs: dict[tuple, int] = {}
    for row in rows:
        process = (row["recorded"], row["process"])
        if row["swap"] == 1:  # another lease of the machine may give a process the same number
            runs[process] = runs.get(process, 0) + 1
        series.setdefault((*process, runs.get(process)), []).append(row)
    return list(series.values())


def _span(found: list[dict], name: str) -> str:
    low, high = (f"{pick(row[name] for row in found):,.1f}" for pick in (min, max))
    return f"{low} MiB" if low == high else f"{low} to {high} MiB"


def swaps(rows: list[dict], least: int = 10) -> Table:
    """Engines started and released in turn by one process (a section of a reference run): the GPU's memory,
    before the first, with one open, and after each. A row a process that had ``least`` engines or more.
    """
    long = sorted((found for found in _series(rows) if len(found) >= least), key=len, reverse=True)
    table = []
    for found in long:
        models = ", ".join(dict.fromkeys(row["model"] for row in found))
        table.append(
            [
                f"{len(found)} engines on {found[0]['device']}",
                f"{models}; {', '.join(dict.fromkeys(row['scheme'] for row in found))}",
                f"{found[0]['device_before_mib']:,.1f} MiB",
                _span(found, "device_open_mib"),
                _span(found, "device_after_mib"),
                f"{statistics.median(row['release_s'] for row in found):.1f} s",
            ]
        )
    columns = ["one process", "of", "before the first", "with one open", "after each", "release, median"]
    return Table(columns, table, texts=["of"])


def emptied(rows: list[dict]) -> Figure | Note:
    """Draw the GPU's memory over the engines that one process had in turn, of the longest such process."""
    series = _series(rows)
    if not series:
        return Note("No process with several engines is on record.")
    found = max(series, key=len)
    turns = [row["swap"] for row in found]
    figure, [[axes]] = panels(size=(8, 3.2))
    looks = {
        "with it open": ("device_open_mib", "#D55E00", "o"),
        "after its block": ("device_after_mib", "#0072B2", "s"),
    }
    for _, (name, colour, marker) in looks.items():
        axes.plot(turns, [row[name] / 1024 for row in found], marker=marker, color=colour, linestyle=":")
    device = found[0]["device"]
    axes.set(
        xlabel="engine, one after the other in one process", ylabel=f"GiB in use, {device}", ylim=(0, None)
    )
    axes.set_xticks(turns)
    axes.grid(alpha=0.3)
    last = {label: (turns[-1], found[-1][name] / 1024, colour) for label, (name, colour, _) in looks.items()}
    name_ends(axes, last)
    held = [row["device_open_mib"] for row in found]
    alt = (
        f"{len(found)} engines in turn on {device}: {min(held):,.1f} to {max(held):,.1f} MiB in use with one "
        f"open, {_span(found, 'device_after_mib')} after each, {found[0]['device_before_mib']:,.1f} before."
    )
    return Figure(figure, alt, exact=True)


def variants(rows: list[dict], batches: Sequence[int]) -> Table:
    """``recorded.recorded``: each setting's tokens/s, least to most, and the median as a multiple of the
    baseline's under vLLM's own settings. A star marks what was timed only while something else ran there.
    """

    rows = sorted(rows, key=_scheme)
    times = [recorded.against_baseline(rows, batch) for batch in batches]
    table = []
    for row, *factors in zip(rows, *times, strict=True):
        cells = []
        for batch, factor in zip(batches, factors, strict=True):
            rates = list(dict.fromkeys(f"{rate:,.0f}" for rate in row["runs"].get(str(batch), ())))
            spread = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}" if rates else "-"
            cells.append(f"{spread} (x {factor:.2f})" if rates else "-")
        kernels = "; ".join(map(_short, row["kernels"])) or "cuBLAS, or none named"
        setting = row["variant"] + " *" * ("beside" in row)
        runs = max(map(len, row["runs"].values()))
        table.append([row["scheme"], setting, kernels, runs, *cells])
    heads = [f"tok/s at batch {batch}" for batch in batches]
    return Table(["scheme", "setting", "kernel", "runs", *heads], table, texts=["setting", "kernel"])


def long_prompts(rows: list[dict]) -> Table:
    """``recorded.recorded``: TTFT and tokens/s after long prompts, of the settings timed with them."""
    rows = sorted((row for row in rows if "long" in row), key=_scheme)
    loads = {batch: of["prompt_tokens"] for row in rows for batch, of in row["long"].items()}
    heads = [
        f"{batch} of {tokens:,}: {what}" for batch, tokens in loads.items() for what in ("TTFT", "tok/s")
    ]
    table = []
    for row in rows:
        cells = []
        for batch in loads:
            seen = row["long"][batch]
            cells += [page.ms(seen["ttft_s"]), f"{seen['tokens_per_s']:,.0f}"]
        table.append([row["scheme"], row["variant"], *cells])
    return Table(["scheme", "setting", *heads], table, texts=["setting"])


def _scheme(row: dict) -> int:
    return [*SCHEMES].index(row["scheme"])


def kernels(rows: list[dict]) -> Table:
    """Records of one scheme under several kernels, a row a load: tokens/s and TTFT.

    The others' stand with what they are of the first's, which is vLLM's own choice.
    """
    found = {name: {} for name in dict.fromkeys(row["kernel"] for row in rows)}
    for row in rows:
        found[row["kernel"]][row["batch"], row["prompt_tokens"]] = row
    first, *others = found.values()
    table = []
    for load, base in first.items():
        cells = [f"{load[0]} of {load[1]:,}", f"{base['output_tokens_per_s']:,.0f}", page.ms(base["ttft_s"])]
        for other in others:
            for field, shown in (("output_tokens_per_s", "{:,.0f}".format), ("ttft_s", page.ms)):
                value = other[load][field]
                cells.append(f"{shown(value)} (x {value / base[field]:.2f})")
        table.append(cells)
    heads = [f"{_short(name)}, {what}" for name in found for what in ("tok/s", "TTFT")]
    return Table(["requests, tokens in", *heads], table)


def _short(kernel: str) -> str:
    """vLLM's name of a kernel's class without what they all end in."""
    return kernel.removesuffix("LinearKernel").removesuffix("ScaledMM")


def crosschecked(pairs: list[dict]) -> Table:
    """Workloads timed by two clocks, a row each: our seconds as a multiple of vLLM's, by each clock.

    vLLM's own seconds stand beside them for a GPU, from the least of its clocks to the most.
    """
    workloads: dict[tuple, list[dict]] = {}
    for pair in pairs:
        lengths = f"{pair['prompt_tokens']} in, {pair['output_tokens']} out"
        name = f"{pair['model']} on {pair['device']}"
        workloads.setdefault((name, str(pair["batch"]), lengths), []).append(pair)
    benches = ["generate", "latency", "throughput"]
    rows = []
    for names, found in workloads.items():
        ratios = [[f"{pair['ratio']:.3f}" for pair in found if pair["bench"] == bench] for bench in benches]
        seconds = [f"{pick(pair['theirs_s'] for pair in found):.3f}" for pick in (min, max)]
        own = " to ".join(dict.fromkeys(seconds)) if found[0]["device"].startswith("NVIDIA") else "-"
        rows.append([*names, *(", ".join(ratio) or "-" for ratio in ratios), own])
    return Table(["record", "batch", "tokens", *benches, "vLLM's own seconds"], rows)
