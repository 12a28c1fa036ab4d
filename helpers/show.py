"""Tables and figures for readers. Nothing here measures, and nothing here knows how numbers were got.

What depends on the machine is wrapped in ``measured``, so that readers can tell it from what is computed
and the same everywhere; the notebook tests compare everything outside the marks.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

# One colour a scheme, everywhere; from Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "baseline": "#0072B2",
    "fp8": "#D55E00",
    "fp8_file": "#E69F00",
    "fp8_kv": "#56B4E9",
    "awq": "#009E73",
    "rounded": "#999999",
    "int8": "#CC79A7",
    "bound": "#555555",
}


class measured:
    """A text that depends on this machine or this run: ‹in angle quotes›, and in italics in tables."""

    def __init__(self, text: object):
        self.text = str(text)

    def __str__(self) -> str:
        return f"‹{self.text}›"

    def html(self) -> str:
        """The text as HTML, where italics are the mark."""
        return f'<i class="measured">{html.escape(self.text)}</i>'


def _html(value: object) -> str:
    return value.html() if isinstance(value, measured) else html.escape(str(value))


class Table:
    """A small table as HTML and as text. Numbers are right-aligned; the first column names the row."""

    def __init__(self, columns: Iterable[str], rows: Iterable[Iterable[object]], caption: str = ""):
        self.columns = list(columns)
        self.rows = [list(row) for row in rows]
        self.caption = caption

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        text = "\n".join(" | ".join(str(cell) for cell in line) for line in lines)
        return f"{self.caption}\n{text}" if self.caption else text

    def _repr_html_(self) -> str:
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.columns)
        body = "".join(
            "<tr>"
            + f'<th scope="row" style="text-align:left">{_html(row[0])}</th>'
            + "".join(f'<td style="text-align:right">{_html(cell)}</td>' for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts(pairs: Mapping[str, object], caption: str = "") -> Table:
    """A two-column table of names and values."""
    return Table(["", "value"], pairs.items(), caption)


def machine(found) -> Table:
    """What ``hardware.detect()`` found; all of it is this machine's."""
    return Table(["This machine", ""], [[measured(k), measured(v)] for k, v in found.facts().items()])


def mib(size: float) -> str:
    """Bytes as MiB, or as GiB from 10 GiB on."""
    return f"{size / 2**30:,.2f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"


def speeds(found) -> Table:
    """A table of ``measure.Speed``, one row a batch size."""
    return Table(
        ["batch", "output tokens", "slowest to fastest run", "TTFT", "TPOT"],
        [
            [
                speed.batch,
                measured(f"{speed.output_tokens_per_s:,.1f} tok/s"),
                measured(f"{speed.low:,.1f} to {speed.high:,.1f} tok/s"),
                measured(f"{speed.ttft_s * 1e3:,.0f} ms"),
                measured(f"{speed.tpot_s * 1e3:,.1f} ms"),
            ]
            for speed in found
        ],
    )


def records(rows: list[dict]) -> Table:
    """Records side by side, one row a scheme and batch size."""
    return Table(
        ["scheme", "batch", "weights", "predicted", "output tokens", "TTFT", "perplexity", "runs as"],
        [
            [
                row["scheme"],
                row["batch"],
                measured(mib(row["weights_bytes"]) if row["weights_bytes"] else "not measured"),
                mib(row["predicted_weights_bytes"]),
                measured(f"{row['output_tokens_per_s']:,.1f} tok/s"),
                measured(f"{row['ttft_s'] * 1e3:,.0f} ms"),
                measured(f"{row['perplexity']:.2f}" if row["perplexity"] else "not measured"),
                measured(row["kernel"]),
            ]
            for row in rows
        ],
        caption=_one_origin(rows),
    )


def _one_origin(rows: list[dict]) -> str:
    """Refuse to set records of different machines, models or versions side by side unsaid."""
    origins = {(row["model"], row["device"], row["vllm"]) for row in rows}
    if len(origins) > 1:
        named = "; ".join(" on ".join(origin[:2]) for origin in sorted(origins))
        raise ValueError(f"These records are of different models, machines or versions: {named}.")
    return ""


def answer(question: str, output, templated: bool) -> Answer:
    """A question and the model's answer, marked as generated text."""
    form = "the model's chat template" if templated else "a plain prompt: a base model continues text"
    return Answer(question, output.outputs[0].text.strip(), form)


class Answer:
    """A question, the answer, and the form in which it was asked."""

    def __init__(self, question: str, text: str, form: str):
        self.question, self.text, self.form = question, text, form

    def __repr__(self) -> str:
        return f"Question (with {self.form}): {self.question}\nAnswer: {measured(self.text)}"

    def _repr_html_(self) -> str:
        text = measured(self.text).html().replace("\n", "<br>")
        return (
            f"<p><b>Question</b> (with {html.escape(self.form)}): {html.escape(self.question)}</p>"
            f"<blockquote>{text}</blockquote>"
        )


def roofline(speeds_, bound_tokens_per_s: float, scheme: str = "baseline"):
    """Draw measured throughput against batch size with the bandwidth bound of batch 1; return the figure.

    The bound grows with the batch, because one read of the weights serves every request in it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    batches = [speed.batch for speed in speeds_]
    rates = [speed.output_tokens_per_s for speed in speeds_]
    spread = [
        [rate - speed.low for rate, speed in zip(rates, speeds_, strict=True)],
        [speed.high - rate for rate, speed in zip(rates, speeds_, strict=True)],
    ]
    axes.errorbar(
        batches, rates, spread, color=COLOURS[scheme], marker="o", capsize=4, label=f"{scheme}, measured"
    )
    bound = [bound_tokens_per_s * batch for batch in batches]
    axes.plot(
        batches,
        bound,
        color=COLOURS["bound"],
        linestyle="--",
        label="bandwidth bound: weights read once a step",
    )
    axes.set(
        xscale="log", yscale="log", xlabel="batch size (requests at once)", ylabel="output tokens per second"
    )
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="major")
    axes.legend()
    plt.close(figure)  # shown where it is returned, and not once more at the end of the cell
    return figure


def grids(matrix, name: str):
    """Draw one matrix's histogram with the values FP8 and INT4 can hold beneath it; return the figure."""
    import matplotlib.pyplot as plt

    from helpers import rounding

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    largest = abs(matrix).max()
    counts, _, _ = axes.hist(matrix.ravel() / largest, bins=201, color=COLOURS["baseline"], alpha=0.6)
    rows = (("e4m3", "FP8 (E4M3)", "fp8"), ("int4", "INT4", "awq"))
    for place, (form, label, scheme) in enumerate(rows, 1):
        values = rounding.grid(form)
        height = [-0.09 * place * counts.max()] * len(values)
        axes.plot(
            values, height, "|", color=COLOURS[scheme], markersize=11, label=f"{label}: {len(values)} values"
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel=f"weight of {name}, largest = 1", ylabel="how many weights", xlim=(-1.02, 1.02))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= counts.max()])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper right")
    plt.close(figure)
    return figure


def compared(rows: list[dict]):
    """Draw weights and throughput of several schemes' records side by side; return the figure."""
    import matplotlib.pyplot as plt

    _one_origin(rows)
    names = list(dict.fromkeys(row["scheme"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    weights = [
        next(row["weights_bytes"] or 0 for row in rows if row["scheme"] == name) / 2**20 for name in names
    ]
    bars = left.bar(names, weights, color=[COLOURS.get(name, "#999999") for name in names])
    left.bar_label(bars, fmt="{:,.0f}")
    predicted = {row["scheme"]: row["predicted_weights_bytes"] / 2**20 for row in rows}
    marks = [predicted[name] for name in names]
    left.plot(names, marks, "_", color="black", markersize=24, markeredgewidth=2, label="predicted")
    left.legend(loc="lower right")
    left.set(ylabel="weights in memory, MiB", title="Memory")
    left.tick_params(axis="x", labelrotation=30)
    markers = "osD^vPX"
    for marker, name in zip(markers, names, strict=False):
        points = {row["batch"]: row["output_tokens_per_s"] for row in rows if row["scheme"] == name}
        xs = [batch for batch in batches if batch in points]
        ys = [points[batch] for batch in xs]
        right.plot(xs, ys, marker=marker, color=COLOURS.get(name, "#999999"), label=name)
    right.set(xscale="log", yscale="log", xlabel="batch size (requests at once)", title="Speed")
    right.set_ylabel("output tokens per second")
    right.set_xticks(batches, [str(batch) for batch in batches])
    right.minorticks_off()
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.grid(alpha=0.3, which="major")
    right.legend()
    plt.close(figure)
    return figure


def ways(found: Mapping[str, object]) -> Table:
    """How this machine runs each scheme, and why: ``schemes.Way`` by the scheme's title."""
    rows = [[title, measured(way.name), measured(way.why)] for title, way in found.items()]
    return Table(["scheme", "runs here as", "because"], rows)


def predictions(sizes: Mapping[str, int]) -> Table:
    """Predicted bytes of weights by the scheme's title, the first one being the yardstick."""
    base = next(iter(sizes.values()))
    rows = [[title, mib(size), f"{base / size:.2f} times"] for title, size in sizes.items()]
    return Table(["scheme", "weights, predicted", "smaller"], rows)


def qualities(found: dict) -> Table:
    """A table of ``quality.Quality`` by scheme; None for one that does not run here."""
    columns = ["against the baseline", "perplexity ratio", "mean KL", "99th percentile KL", "same top token"]
    rows = []
    for name, quality in found.items():
        texts = ["does not run here"] * 4
        if quality:
            texts = [f"{quality.perplexity_ratio:.3f}", f"{quality.kl_mean:.4f} nats"]
            texts += [f"{quality.kl_p99:.3f} nats", f"{quality.top1:.1%}"]
        rows.append([name, *map(measured, texts)])
    return Table(columns, rows)


def recoveries(found: dict) -> Table:
    """A table of ``quality.Recovery`` by scheme."""
    columns = ["scheme", "items", "right before", "right now", "lost", "gained", "recovery", "95 % interval"]
    return Table(
        columns,
        [
            [
                name,
                seen.items,
                measured(f"{seen.baseline:.1%}"),
                measured(f"{seen.scheme:.1%}"),
                measured(seen.lost),
                measured(seen.gained),
                measured(f"{seen.ratio:.1%}"),
                measured(f"{seen.low:.1%} to {seen.high:.1%}"),
            ]
            for name, seen in found.items()
        ],
    )


def side_by_side(rows: list[dict], names: Iterable[str] = ()) -> Table:
    """Records of one machine and model, a row a scheme: bytes, speed and answers against the baseline.

    The measured saving is the difference of two loads: what a loader adds to each cancels. ``names`` are
    the schemes that get a row, also where they were not measured; by default those of the records.
    """
    _one_origin(rows)
    batches = sorted({row["batch"] for row in rows})
    by_scheme: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_scheme.setdefault(row["scheme"], {})[row["batch"]] = row
    columns = ["scheme", "weights saved, predicted", "measured"]
    columns += [f"speed at batch {batch}" for batch in batches] + ["mean KL", "same top token", "recovery"]
    table = [
        [name, *_against(by_scheme.get(name, {}), by_scheme.get("baseline", {}), batches)]
        for name in names or by_scheme
    ]
    return Table(columns, table)


def _against(found: dict[int, dict], base: dict[int, dict], batches: list[int]) -> list[measured]:
    """One scheme's cells of ``side_by_side``; all of them depend on what was measured here."""
    if not found or not base:
        return [measured("not measured here")] * (5 + len(batches))
    one, zero = next(iter(found.values())), next(iter(base.values()))
    cells = [mib(zero["predicted_weights_bytes"] - one["predicted_weights_bytes"])]
    known = zero["weights_bytes"] and one["weights_bytes"]
    cells.append(mib(zero["weights_bytes"] - one["weights_bytes"]) if known else "not measured")
    cells += [_ratio(found.get(batch), base.get(batch)) for batch in batches]
    for key, form in (("kl_mean", "{:.4f} nats"), ("top1", "{:.1%}"), ("recovery", "{:.1%}")):
        cells.append(form.format(one[key]) if one.get(key) is not None else "-")
    return [measured(cell) for cell in cells]


def _ratio(row: dict | None, base: dict | None) -> str:
    if not row or not base:
        return "not measured"
    return f"x {row['output_tokens_per_s'] / base['output_tokens_per_s']:.2f}"


def outliers(before, scales, name: str):
    """Draw each input channel's mean activation, and AWQ's scale for it; return the figure.

    Args:
        before: mean absolute activation of each channel; ``scales``: what AWQ multiplied its weights by.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    order = np.argsort(before)[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.plot(before[order] / np.median(before), color=COLOURS["baseline"])
    left.set(
        yscale="log",
        xlabel="channels, largest first",
        ylabel="mean activation, median channel = 1",
        title=name,
    )
    right.plot(before / np.median(before), scales, ".", color=COLOURS["awq"], alpha=0.6)
    right.set(xscale="log", yscale="log", xlabel="mean activation, median channel = 1", ylabel="AWQ's scale")
    right.set_title("Larger activation, finer weights")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    plt.close(figure)
    return figure


def errors(found: Mapping[str, Mapping[str, float]]) -> Table:
    """Relative rounding errors: rows by format, columns by who shares a scale."""
    columns = list(next(iter(found.values())))
    rows = [[form, *(f"{cells[column]:.1%}" for column in columns)] for form, cells in found.items()]
    return Table(["rounding error", *columns], rows)
