"""Tables for readers. Nothing here measures, and nothing here knows how numbers were got.

What depends on the machine is wrapped in ``measured``, so that readers can tell it from what is computed
and the same everywhere; the notebook tests compare everything outside the marks.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Mapping, Sequence

from helpers import schemes

# One colour a scheme, everywhere: Okabe and Ito's palette, which colour-blind readers can tell apart,
# darkened where its contrast with white was below 3:1 (WCAG 2.2, 1.4.11).
COLOURS = {
    "baseline": "#0072B2",
    "fp8": "#D55E00",
    "fp8_file": "#AD7A00",
    "fp8_kv": "#2F93CF",
    "awq": "#009E73",
    "rounded": "#808080",
    "int8": "#BF6795",
    "bound": "#555555",
}


_NO_QUOTES = str.maketrans("‹›", "<>")


class measured:
    """A text that depends on this machine or this run: ‹in angle quotes›, and in italics in tables.

    A mark never spans lines and never contains another: what stands between two marks must not be lost
    to the eye, or to the comparison of the notebooks' outputs.
    """

    def __init__(self, text: object):
        self.text = str(text)

    def __str__(self) -> str:
        line = " / ".join(filter(None, map(str.strip, self.text.splitlines())))
        return f"‹{line.translate(_NO_QUOTES)}›"

    def html(self) -> str:
        """The text as HTML, where italics are the mark."""
        return f'<i class="measured">{html.escape(self.text)}</i>'


def _html(value: object) -> str:
    return value.html() if isinstance(value, measured) else html.escape(str(value))


def as_it_is(page: str) -> str:
    """The attribute that keeps notebooks from setting what is between two prices, $1 and $2, as a formula.

    MathJax leaves out elements of the one class, its second version and nbconvert's pages those of the other.
    """
    return ' class="mathjax_ignore tex2jax_ignore"' if "$" in page else ""


class Table:
    """A small table as HTML and as text. The first column names the row, the others are right-aligned as
    numbers are; ``texts`` names columns that hold sentences. The first and those are left-aligned.
    """

    def __init__(
        self,
        columns: Iterable[str],
        rows: Iterable[Iterable[object]],
        caption: str = "",
        texts: Iterable[str] = (),
    ):
        self.columns = list(columns)
        self.rows = [list(row) for row in rows]
        self.caption = caption
        self.texts = set(texts)

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        text = "\n".join(" | ".join(str(cell) for cell in line) for line in lines)
        return f"{self.caption}\n{text}" if self.caption else text

    def _cell(self, column: str, value: object) -> str:
        side = "left" if column in self.texts else "right"
        return f'<td style="text-align:{side}">{_html(value)}</td>'

    def _repr_html_(self) -> str:
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        left = ' style="text-align:left"'
        head = "".join(
            f'<th scope="col"{left if place == 0 or name in self.texts else ""}>{html.escape(name)}</th>'
            for place, name in enumerate(self.columns)
        )
        body = "".join(
            "<tr>"
            + f'<th scope="row" style="text-align:left">{_html(row[0])}</th>'
            + "".join(self._cell(*pair) for pair in zip(self.columns[1:], row[1:], strict=True))
            + "</tr>"
            for row in self.rows
        )
        page = f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<table{as_it_is(page)}>{page}"


class Note:
    """A sentence in the place of a figure or a table that has nothing to show."""

    def __init__(self, text: object):
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<p{as_it_is(self.text)}>{html.escape(self.text)}</p>"


def facts(pairs: Mapping[str, object], caption: str = "") -> Table:
    """A two-column table of names and values."""
    return Table(["", "value"], pairs.items(), caption)


def machine(found) -> Table:
    """What ``hardware.detect()`` found; all of it is this machine's."""
    return Table(["This machine", ""], [[measured(k), measured(v)] for k, v in found.facts().items()])


def mib(size: float) -> str:
    """Bytes as MiB, or as GiB from 10 GiB on."""
    return f"{size / 2**30:,.2f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"


def alike(sizes: Iterable[float]) -> list[str]:
    """Bytes in one unit, so that a column can be compared: GiB if the largest has 10 of them, else MiB."""
    sizes = list(sizes)
    if max(sizes, default=0) >= 10 * 2**30:
        return [f"{size / 2**30:,.2f} GiB" for size in sizes]
    return [f"{size / 2**20:,.1f} MiB" for size in sizes]


def speeds(found) -> Table:
    """A table of ``measure.Speed``, one row a batch size."""
    return Table(
        ["batch", "output tokens", "slowest to fastest run", "TTFT", "TPOT"],
        [
            [
                speed.batch,
                measured(f"{speed.output_tokens_per_s:,.1f} tok/s"),
                measured(f"{speed.low:,.1f} to {speed.high:,.1f} tok/s"),
                measured(ms(speed.ttft_s)),
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
                measured(ms(row["ttft_s"])),
                measured(f"{row['perplexity']:.2f}" if row["perplexity"] else "not measured"),
                measured(row["kernel"]),
            ]
            for row in rows
        ],
        caption=one_origin(rows),
    )


def one_origin(rows: list[dict]) -> str:
    """Refuse to set records of different machines, models or versions side by side unsaid."""
    more = ("weights", "prompt_tokens", "recorded")
    origins = {(row["model"], row["device"], row["vllm"], *(row.get(n) or "" for n in more)) for row in rows}
    if len(origins) > 1:
        named = "; ".join(sorted(" on ".join(origin[:2]) for origin in origins))
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
            f"<p{as_it_is(self.question)}><b>Question</b> (with {html.escape(self.form)}): "
            f"{html.escape(self.question)}</p><blockquote{as_it_is(text)}>{text}</blockquote>"
        )


def ways(found: Mapping[str, object]) -> Table:
    """How this machine runs each scheme, and why: ``schemes.Way`` by the scheme's title."""
    rows = [[title, measured(way.name), measured(way.why)] for title, way in found.items()]
    return Table(["scheme", "runs here as", "because"], rows, texts=["runs here as", "because"])


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
    one_origin(rows)
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
    cells = [mib(schemes.held(zero) - schemes.held(one))]
    known = zero["weights_bytes"] and one["weights_bytes"]
    cells.append(mib(zero["weights_bytes"] - one["weights_bytes"]) if known else "not measured")
    if schemes.expanded(one):  # no kernel reads its format here
        cells[-1] = "none: written out here"
    cells += [
        "-" if schemes.expanded(one) else _ratio(found.get(batch), base.get(batch)) for batch in batches
    ]
    return [measured(cell) for cell in [*cells, *_quality(one)]]


def answers(rows: list[dict], elsewhere: list[dict]) -> Table:
    """What each scheme did to a model's answers, a row a scheme, model and machine.

    Args:
        rows: records of this machine; ``elsewhere``: recorded ones, of which a machine's first of a scheme
            and model counts (its prompts' length does not matter here).
    """
    table, seen = [], set()
    for name in schemes.SCHEMES:
        for row in (*rows, *elsewhere):
            place = name, row["model"], row["device"], row.get("recorded")
            if row["scheme"] != name or row.get("kl_mean") is None or place in seen:
                continue
            seen.add(place)
            cells = [row["device"], row["way"], *_quality(row)]
            cells[0] += ", on record" if row.get("recorded") else ""
            table.append([name, row["model"], *(cells if row.get("recorded") else map(measured, cells))])
    columns = ["scheme", "model", "machine", "runs there as", "mean KL", "same top token", "recovery"]
    return Table(columns, table, texts=columns[1:4])


def _quality(row: dict) -> list[str]:
    """Mean KL, same top token and recovery of a record."""
    cells = [
        form.format(row[key]) if row.get(key) is not None else "-"
        for key, form in (("kl_mean", "{:.4f} nats"), ("top1", "{:.1%}"))
    ]
    return [*cells, kept(row) if row.get("recovery") is not None else "-"]


def kept(row: dict) -> str:
    """A record's recovery in words, with the interval that its items leave, where that is on record."""
    low, high = row.get("recovery_low"), row.get("recovery_high")
    return f"{row['recovery']:.1%}" + (f" ({low:.0%} to {high:.0%})" if low is not None else "")


def _ratio(row: dict | None, base: dict | None) -> str:
    if not row or not base:
        return "not measured"
    return f"x {row['output_tokens_per_s'] / base['output_tokens_per_s']:.2f}"


def elsewhere(origins: Mapping[str, list[dict]], names: Iterable[str], most: int = 64) -> Table:
    """What schemes gained on recorded machines: a row a record and scheme, beside the baseline there.

    Args:
        origins: ``records.by_origin`` of what was recorded; one without a baseline, or with none of the
            schemes ``names``, has no row, and what is only cited has none either.
        most: the largest batch that is shown. For 256 requests two recordings of runs this short
            differed by more than the schemes do; ``tuning.settings`` times that batch longer.
    """
    table = []
    for title, rows in origins.items():
        found = {
            (row["scheme"], row["batch"]): row
            for row in rows
            if row["batch"] <= most and not row.get("cited")
        }
        shared = {
            name: sorted(batch for one, batch in found if one == name and ("baseline", batch) in found)
            for name in ("baseline", *names)
        }
        if not any(shared[name] for name in names):
            continue
        shared = {name: batches for name, batches in shared.items() if batches}
        sizes = alike(found[name, batches[0]]["weights_bytes"] for name, batches in shared.items())
        for (name, batches), size in zip(shared.items(), sizes, strict=True):
            one, ends = found[name, batches[0]], (batches[0], batches[-1])
            gains = [f"{_ratio(found[name, b], found['baseline', b])} (batch {b})" for b in ends]
            table.append([title, name, size, f"{one['kv_cache_tokens']:,}", *gains])
    columns = ["record", "scheme", "weights", "KV cache, tokens"]
    return Table([*columns, "speed at the smallest batch", f"at the largest up to {most}"], table)


def errors(found: Mapping[str, Mapping[str, float]]) -> Table:
    """Relative rounding errors: rows by format, columns by who shares a scale."""
    columns = list(next(iter(found.values())))
    rows = [[form, *(f"{cells[column]:.1%}" for column in columns)] for form, cells in found.items()]
    return Table(["rounding error", *columns], rows)


def paths(found: Mapping[str, Mapping[str, str]], here: str | None) -> Table:
    """How each hardware generation runs each scheme (``sizing.paths``), the row of this machine marked."""
    names = list(next(iter(found.values())))
    rows = [
        [title, measured("this machine" if title == here else ""), *(ways[name] for name in names)]
        for title, ways in found.items()
    ]
    titles = [schemes.scheme(name).title for name in names]
    return Table(["hardware", "", *titles], rows, texts=["", *titles])


def sizes(found: Mapping[str, Mapping[str, object]]) -> Table:
    """Whether a load fits, a row a card and a column a scheme: ``sizing.budgets`` by the card's name."""
    names = list(next(iter(found.values())))

    def cell(budget) -> str:
        if isinstance(budget, str):
            return "does not run"
        return f"{budget.verdict}: {budget.total / 2**30:.1f} of {budget.usable / 2**30:.1f} GiB"

    rows = [[card, *(cell(budgets[name]) for name in names)] for card, budgets in found.items()]
    return Table(["GPU", *names], rows, texts=names)


def reconciled(found: Iterable) -> Table:
    """``sizing.reconcile``: what vLLM reported beside the config's bytes.

    What is of this machine is marked as measured; recorded rows are the same everywhere.
    """
    rows = []
    for one in found:
        row = one.row
        recorded = row.get("recorded")
        name = f"{row['model']} on {row['device'] if recorded else 'this machine'}"
        if row.get("memory_bytes") and row.get("device_bytes"):
            name += f", given {mib(row['memory_bytes'])}"
        besides = row.get("kv_cache_dtype") == "fp8" and row["scheme"] != "fp8_kv"
        cells = [
            row["scheme"] + (" and FP8 KV cache" if besides else ""),
            f"{one.token:,}",
            f"{row['kv_cache_tokens']:,}",
            f"{one.cache / 2**30:.2f} GiB",
            "-" if one.rest is None else f"{one.rest / 2**30:.2f} GiB",
        ]
        rows.append([name, *(cells if recorded else map(measured, cells))])
    columns = ["record", "scheme", "bytes a token", "vLLM's KV cache, tokens", "so its KV cache", "left over"]
    return Table(columns, rows)


def sides(found: Mapping[str, object]) -> Table:
    """``roofline.side`` of each scheme; None where no kernel of its own was timed beside the baseline."""

    def batches(sizes) -> str:
        return ", ".join(map(str, sizes)) or "none"

    rows = []
    for name, side in found.items():
        cells = ["no kernel timed here"] * 4
        if side:
            crosses = f"at batch {side.crosses:.0f}" if side.crosses else "nowhere measured"
            cells = [batches(side.faster), batches(side.equal), batches(side.slower), crosses]
        rows.append([name, *map(measured, cells)])
    return Table(["scheme", "faster at batch", "as fast at", "slower at", "crosses the baseline"], rows)


def swaps(rows: list[dict], least: int = 10) -> Table:
    """Engines started and released in turn by one process (``helpers.reference``): the GPU's memory, before
    the first, with one open, and after each. A row a process that had ``least`` engines or more.
    """
    series: dict[tuple, list[dict]] = {}
    runs: dict[tuple, int] = {}
    for row in rows:
        process = (row["recorded"], row["process"])
        if row["swap"] == 1:  # another lease of the machine may give a process the same number
            runs[process] = runs.get(process, 0) + 1
        series.setdefault((*process, runs.get(process)), []).append(row)
    long = sorted((found for found in series.values() if len(found) >= least), key=len, reverse=True)

    def span(found: list[dict], name: str) -> str:
        low, high = (f"{pick(row[name] for row in found):,.1f}" for pick in (min, max))
        return f"{low} MiB" if low == high else f"{low} to {high} MiB"

    table = []
    for found in long:
        models = ", ".join(dict.fromkeys(row["model"] for row in found))
        table.append(
            [
                f"{len(found)} engines on {found[0]['device']}",
                f"{models}; {', '.join(dict.fromkeys(row['scheme'] for row in found))}",
                f"{found[0]['device_before_mib']:,.1f} MiB",
                span(found, "device_open_mib"),
                span(found, "device_after_mib"),
                f"{statistics.median(row['release_s'] for row in found):.1f} s",
            ]
        )
    columns = ["one process", "of", "before the first", "with one open", "after each", "release, median"]
    return Table(columns, table, texts=["of"])


def variants(rows: list[dict], batches: Sequence[int]) -> Table:
    """``tuning.recorded``: each setting's tokens/s, and what that is of the fastest baseline's.

    A star marks what was timed only while something else ran on that machine.
    """
    from helpers import tuning

    rows = sorted(rows, key=_scheme)
    times = [tuning.against_best(rows, batch) for batch in batches]
    table = []
    for row, *factors in zip(rows, *times, strict=True):
        speeds = [row["tokens_per_s"].get(str(batch)) for batch in batches]
        cells = [
            f"{rate:,.0f} (x {factor:.2f})" if rate else "-"
            for rate, factor in zip(speeds, factors, strict=True)
        ]
        kernels = "; ".join(map(_short, row["kernels"])) or "cuBLAS, or none named"
        setting = row["variant"] + " *" * ("beside" in row)
        table.append([row["scheme"], setting, kernels, *cells, f"{row['of_the_bound']:.0%}"])
    heads = [f"tok/s at batch {batch}" for batch in batches]
    return Table(
        ["scheme", "setting", "kernel", *heads, "of the bound at 1"], table, texts=["setting", "kernel"]
    )


def long_prompts(rows: list[dict]) -> Table:
    """``tuning.recorded``: TTFT and tokens/s after long prompts, of the settings timed with them."""
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
            cells += [ms(seen["ttft_s"]), f"{seen['tokens_per_s']:,.0f}"]
        table.append([row["scheme"], row["variant"], *cells])
    return Table(["scheme", "setting", *heads], table, texts=["setting"])


def _scheme(row: dict) -> int:
    return [*schemes.SCHEMES].index(row["scheme"])


def kernels(rows: list[dict]) -> Table:
    """Records of one scheme under several kernels, a row a load: tokens/s and TTFT.

    The others' stand with what they are of the first's, which is vLLM's own choice (``reference.kernels``).
    """
    found = {name: {} for name in dict.fromkeys(row["kernel"] for row in rows)}
    for row in rows:
        found[row["kernel"]][row["batch"], row["prompt_tokens"]] = row
    first, *others = found.values()
    table = []
    for load, base in first.items():
        cells = [f"{load[0]} of {load[1]:,}", f"{base['output_tokens_per_s']:,.0f}", ms(base["ttft_s"])]
        for other in others:
            for field, shown in (("output_tokens_per_s", "{:,.0f}".format), ("ttft_s", ms)):
                value = other[load][field]
                cells.append(f"{shown(value)} (x {value / base[field]:.2f})")
        table.append(cells)
    heads = [f"{_short(name)}, {what}" for name in found for what in ("tok/s", "TTFT")]
    return Table(["requests, tokens in", *heads], table)


def _short(kernel: str) -> str:
    """vLLM's name of a kernel's class without what they all end in."""
    return kernel.removesuffix("LinearKernel").removesuffix("ScaledMM")


def ms(seconds: float) -> str:
    """Seconds in whole milliseconds, for a cell."""
    return f"{1000 * seconds:,.0f} ms"


def crosschecked(pairs: list[dict]) -> Table:
    """``crosscheck.Pair`` on record, a row a workload: our seconds as a multiple of vLLM's, by each clock.

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


def offers(found: Iterable) -> Table:
    """``cost.Offer``: what serves a load, the cheapest first, and why the others do not."""
    columns = ["scheme", "GPUs", "requests at once in one", "tokens/s of one, at most", "used", "a day"]
    columns.append("a million tokens, at least")
    rows = []
    for offer in found:
        cells = [f"none: {offer.why_not}", *["-"] * 5]
        if not offer.why_not:
            cells = [f"{offer.count} x {offer.card}", offer.batch]
            cells += [f"{offer.tokens_per_s:,.0f}", f"{offer.used:.0%}"]
            cells += [f"${offer.per_day:,.2f}", f"${offer.per_million:,.2f}"]
        rows.append([offer.scheme, *cells])
    return Table(columns, rows)


def advice(found) -> Table:
    """``cost.Advice``: the scheme to deploy and what spoke against each of the others.

    A row a scheme, in one order, so that the table has the same shape on every machine.
    """
    rows = []
    for name in schemes.SCHEMES:
        why = found.why if name == found.scheme else found.against.get(name, "not measured here")
        rows.append([name, measured("deploy" if name == found.scheme else "-"), measured(why)])
    return Table(["scheme", "", "because"], rows, texts=["", "because"])


def smaller(described: Mapping[str, object], names: Iterable[str]) -> Table:
    """How many times smaller each model's weights get under each scheme, from its config: by title."""
    names, size = list(names), schemes.predicted_weights_bytes
    plain = [size("baseline", model.folder) for model in described.values()]
    rows = [
        [title, shown, *(f"{base / size(name, model.folder):.2f} times" for name in names[1:])]
        for (title, model), base, shown in zip(described.items(), plain, alike(plain), strict=True)
    ]
    return Table(["model", "16-bit weights", *(schemes.scheme(name).title for name in names[1:])], rows)


def best_for(names: Iterable[str]) -> Table:
    """What each scheme is good for, and what would overrule that: ``Scheme.best_for`` and ``unless``."""
    found = [schemes.scheme(name) for name in names]
    columns = ["scheme", "best for", "unless", "measured in"]
    return Table(columns, [[s.title, s.best_for, s.unless, s.lesson] for s in found], texts=columns)
