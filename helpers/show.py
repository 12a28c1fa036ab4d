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
    left.set(ylabel="weights in memory, MiB", title="Memory")
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


def qualities(found: dict) -> Table:
    """A table of ``quality.Quality`` by scheme."""
    return Table(
        ["compared with the baseline", "perplexity ratio", "mean KL", "99th percentile KL", "same top token"],
        [
            [
                name,
                measured(f"{quality.perplexity_ratio:.3f}"),
                measured(f"{quality.kl_mean:.4f} nats"),
                measured(f"{quality.kl_p99:.3f} nats"),
                measured(f"{quality.top1:.1%}"),
            ]
            for name, quality in found.items()
        ],
    )
