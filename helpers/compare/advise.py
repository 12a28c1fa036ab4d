"""Which quantization for this model on this GPU: one recommendation, and what would overrule it."""

import html
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace

from helpers.base import parameters
from helpers.base.machine import GIB
from helpers.base.page import Table, as_it_is
from helpers.base.widgets import Choice, Explorer, Slider, explore
from helpers.compare import cards, counting, options, published
from helpers.compare.cards import CARDS, SizingError, card
from helpers.compare.counting import AS_IT_IS, FP8_CACHE, Counted
from helpers.compare.options import Gain, Option
from helpers.compare.sizing import UTILIZATION, Load
from helpers.model import lookup, shapes
from helpers.serve.settings import Settings

GOALS = ("fit", "latency", "throughput", "quality")
CHEAP = 3.0  # dollars a day for which no GPU of the cards is let: more likely an hour's price
PROMPTS = 8  # tokens read for each that is written: of conversations 1,020 and 129, arXiv 2311.18677, median


@dataclass(frozen=True)
class Advice:
    """The answer to one question; it shows itself as text, as HTML and as the command's JSON.

    ``chosen`` is the recommended way, None where nothing runs; ``price`` is in dollars a GPU and day.
    """

    model: Counted
    load: Load
    goal: str
    price: float | None
    options: list[Option]
    chosen: Option | None

    @property
    def title(self) -> str:
        """What was asked, in a line."""
        load = self.load
        users = f"{load.users} users" if load.users > 1 else "one user"
        asked = (
            f"{users}, {load.context:,} tokens each, {load.prompts:g} read for one written, for {self.goal}"
        )
        on = f"{self._gpus(load.gpus)} ({load.card.memory / GIB:.0f} GiB)"
        return f"{self.model.model.title} on {on}: {asked}"

    @property
    def sentence(self) -> str:
        """The recommendation."""
        one, load = self.chosen, self.load
        if one is None:
            return f"Nothing serves this model on {load.gpus} x {load.card.name}: {self._why_nothing()}"
        first = f"Deploy {one.title} on {self._gpus(one.gpus)}: "
        if one.fits:
            first += f"all {load.users} run at once" if load.users > 1 else "it fits"
            first += f" (there is room for {one.users})" if one.users > load.users else ""
        else:
            first += f"{one.users} of {load.users} run at once, the others wait their turn"
        first += "; the checkpoint is quantized already" if one.scheme.startswith(AS_IT_IS) else ""
        sentences = [first, self._speed(one)]
        if self.price:
            read = f", with the {load.prompts:g} million read for them" if load.prompts else ""
            sentences.append(f"A million tokens written cost ${one.dollars(self.price):.2f} at least{read}")
        copies = load.gpus // one.gpus
        if copies > 1:
            sentences.append(f"{copies} copies of it fill the {load.gpus}: add --data-parallel-size {copies}")
        return ". ".join(sentences) + "."

    def _gpus(self, count: int) -> str:
        return f"{count} {self.load.card.name}s" if count > 1 else f"one {self.load.card.name}"

    def _speed(self, one: Option) -> str:
        """Tokens/s of the recommended way, beside those of 16 bits."""
        said = f"About {self._rate(one):,.0f} tokens/s"
        said += f", {one.per_s / min(one.users, self.load.users):,.0f} a user" if self.many else ""
        plain = self._sixteen
        if plain is None or plain is one:
            return said
        if not plain.fits:
            return f"{said}; 16 bits need more than eight GPUs"
        if plain.gpus > one.gpus:
            return f"{said}; 16 bits give {self._rate(plain):,.0f} on {plain.gpus} GPUs"
        return f"{said}, {_times(self._gain(one))} times what 16 bits give"

    @property
    def many(self) -> bool:
        """Whether there are several users, of whom all together count, and not what one alone sees."""
        return self.load.users > 1

    def _rate(self, one: Option) -> float:
        return one.per_s if self.many else one.one_per_s

    def _gain(self, one: Option) -> Gain:
        return one.together if self.many else one.alone

    @property
    def _sixteen(self) -> Option | None:
        """16 bits on the fewest GPUs that hold the load, where any do."""
        plain = [one for one in self.options if one.scheme.startswith("baseline") and one.step]
        return plain[-1] if plain else None

    def _why_nothing(self) -> str:
        running = [one for one in self.options if one.step]
        if not running:
            return self.options[0].refused
        least = min(running, key=lambda one: (one.needs or 99, one.budget.weights))
        needs = f"{least.needs} of them hold it" if least.needs else "eight of them do not hold it"
        weights = f"{least.budget.weights / GIB:.1f} GiB of weights"
        return f"the smallest way, {least.title}, has {weights}; {needs}."

    @property
    def overruled_by(self) -> list[str]:
        """What would overrule the recommendation, a condition and what to take then."""
        one = self.chosen
        return list(self._unless(one, [o for o in self.shown if o is not one and o.users])) if one else []

    def _unless(self, one: Option, others: list[Option]) -> Iterator[str]:
        def times(other: Option, goal: str) -> float:
            return options.score(other, goal) / options.score(one, goal)

        load, everyone = self.load, f"all {self.load.users}" if self.many else "it"
        if self.price and self.price < CHEAP:
            yield f"${self.price:g} is the price of an hour: then it is PRICE={self.price:g}/h"
        as_good = [o for o in others if o.fits >= one.fits and o.gpus <= load.gpus]
        fast = max(as_good, key=lambda o: times(o, "throughput"), default=one)
        if (ratio := times(fast, "throughput")) > options.SAME:
            why = "speed counts more than accuracy" if fast.kept.loss > one.kept.loss else "speed counts more"
            yield f"{why}: {fast.title} gives {ratio:.2f} times the tokens (accuracy kept: {fast.kept.says})"
        written = options.recommended(self.options, "writing", load)
        if (ratio := times(written, "writing")) > options.SAME:
            yield f"prompts are short, or in the cache: {_where(written)} writes {ratio:.2f} times the tokens"
        plain = next((o for o in others if o.scheme == one.scheme.removesuffix(FP8_CACHE)), one)
        if plain is not one and not plain.fits:
            rate = f"{self._rate(plain):,.0f} tokens/s"
            yield f"the cache costs too many answers: without it {plain.users} run at once, {rate}"
        gentler = [o for o in others if o.fits and o.kept.loss < one.kept.loss]
        least = one.kept.loss - 1  # less than that apart is no other kind of rounding
        if best := min(gentler, key=lambda o: (o.kept.loss > least, o.gpus, o.kept.loss), default=None):
            yield f"the answers suffer in your own test: {_where(best)} holds {everyone} as well"
        alone = max([one, *others], key=lambda o: o.one_per_s * (o.gpus == one.gpus))
        if (ratio := alone.one_per_s / one.one_per_s) > options.MORE:
            yield f"few ask at a time: {alone.title} is {ratio:.1f} times as fast for one"
        wide = max(n for n in options.GPUS if n <= load.gpus and self.model.layout.heads % n == 0)
        dense = not self.model.layout.experts  # a mixture's experts run in kernels of their own
        if wide > one.gpus and load.card.nvlink and dense:
            ratio = one.rate(1, gpus=wide) / one.rate(1)
            yield f"speed for one counts: --tensor-parallel-size {wide} should give {ratio:.1f} times as much"
        if not one.fits and one.needs:
            yield f"nobody may wait: {one.needs} GPUs hold {everyone}"
        if one.budget.verdict == "close":
            left = f"{one.budget.spare / GIB:.1f} GiB are left"
            yield f"vLLM stops as it starts, for only {left}: allow less context"
        if one.to_make:
            make = "" if one.scheme.startswith("nvfp4") else "03_awq makes one, or "
            yield f"there is no such checkpoint yet: {make}look for one on the hub"

    @property
    def environment(self) -> str:
        """The choice as lines of notebooks/deploy's ``.env``; what no setting says goes into compose.yaml."""
        one, fields, notes = self.chosen, Settings.model_fields, []
        args = {"model_name": one.serves} | one.args | {"gpu_memory_utilization": UTILIZATION}
        args["max_num_seqs"] = min(one.users, max(fields["max_num_seqs"].default, self.load.users))
        if revision := args.pop("revision", ""):
            args["model_name"] += f"@{revision}"
        if "quantization" in args:
            notes.append(f"# runs here as {args['quantization']}")
            args["quantization"] = "fp8"
        if more := options.flags({name: value for name, value in args.items() if name not in fields}):
            notes.append(f"# and in compose.yaml   command: {json.dumps(more)}")
        lines = [f"{name.upper()}={value}" for name, value in args.items() if name in fields]
        return "\n".join(lines + notes)

    def as_json(self) -> dict:
        """What ``--json`` prints."""
        stored = self.model.stored
        return {
            "model": self.model.model.name,
            "as_it_is": {"weights_bytes": stored} if stored else None,
            "kv_bytes_per_token": self.model.layout.kv_token_bytes(),
            "ways": [one.as_json(self.price) for one in self.options],
            "recommended": self.chosen and self.chosen.scheme,
            "refused": None if self.chosen else self.sentence,
        }

    def table(self) -> Table:
        """Every way that runs, and its figures; tokens/s are of all users together."""
        plain, than = self._sixteen, ""
        if plain and not (plain.fits and plain.gpus <= self.load.gpus):
            than = f" on {plain.gpus} GPUs" if self.many and plain.fits else ", as if they fitted"
        asked = ["fits", "tokens/s of an answer"]
        if self.many:
            asked = [f"{self.load.users} users at once", "tokens/s"]
        heads = ["way", "weights", *asked, f"gain a GPU (16 bits{than} = 1)", "accuracy kept"]
        heads += ["$ a million written"] * (self.price is not None)
        return Table(heads, [self._row(one) for one in self.shown], texts=["accuracy kept", heads[2]])

    @property
    def shown(self) -> list[Option]:
        """The ways that readers are shown: those that run. INT8 is left out where FP8 has the same units, and
        four-bit floats where no unit multiplies them."""
        sm = self.load.card.sm
        hidden = ("int8",) * (sm >= 8.9) + ("nvfp4",) * (sm < 10)
        return [one for one in self.options if one.step and not one.scheme.startswith(hidden)]

    def _row(self, one: Option) -> list[str]:
        title = ("* " if one is self.chosen else "") + _where(one)
        speeds = [f"{self._rate(one):,.0f}", _times(self._gain(one))] if one.users else ["-", "-"]
        cells = [title, f"{one.budget.weights / GIB:.1f} GiB", self._fits(one), *speeds, one.kept.says]
        if self.price:
            cells.append(f"{one.dollars(self.price):.2f}" if one.users else "-")
        return cells

    def _fits(self, one: Option) -> str:
        if one.fits:
            return f"{'close' if one.budget.verdict == 'close' else 'yes'}, room for {one.users}"
        if one.users:
            return f"{one.users}, others wait"
        return f"no, {-one.budget.spare / GIB:.1f} GiB short"

    def sources(self) -> list[str]:
        """Where the figures are from."""
        shown, load = self.shown, self.load
        names = {one.scheme for one in shown}
        found = [
            f"* the most accurate, by what is published, unless a less accurate way writes {options.MORE} "
            f"times as much, a slightly less accurate one {options.A_LITTLE} times.",
            "Weights and KV cache: counted from the config, with vLLM's rules.",
        ]
        if gains := dict.fromkeys(gain.source for one in shown for gain in (one.alone, one.together)):
            link = "as of two H200s over NVLink" if load.card.nvlink else "over PCIe left out"
            alone = f", the GPUs' exchange {link}" if any(one.gpus > 1 for one in shown) else ""
            found.append(
                f"Tokens/s: {'; '.join(gains)}; prompts, {load.prompts:g} tokens for one written (prompts), "
                f"at {options.READING:.0%} of the operations/s{alone}. 06_production measures yours."
            )
        if self.model.layout.experts:
            found.append("A mixture of experts is estimated by dense models' kernels: 91 has measured ones.")
        if "nvfp4" in names:
            found.append("NVFP4 was not timed on a Blackwell: beyond the roofline it is counted as FP8.")
        for line in published.figures()["speed"]:
            if line["scheme"] in names and published.of(line, load.card.name):
                said = "{ratio:.1f} times, {model}, {source}; {conditions}.".format_map(line)
                found.append(f"Published of {line['scheme']} there: {said}")
        kept = dict.fromkeys(one.kept.source for one in shown if ";" not in one.kept.source)
        if cited := "; ".join(filter(None, kept)):
            found.append(f"Accuracy: published, {cited}.")
        if day := self.price:
            each = f"${day:.2f} a day (${day / 24:.2f} an hour, ${day * 30:,.0f} a month)"
            found.append(f"Dollars: at {each} for each GPU, busy all the time: at least.")
        return found

    def __repr__(self) -> str:
        lines = [self.title, "", *textwrap.wrap(self.sentence, 100)]
        if self.chosen:
            lines += ["", f"    {self.chosen.command}", ""]
        if self.overruled_by:
            lines.append("Unless")
            for why in self.overruled_by:
                lines += textwrap.wrap(why, 100, initial_indent="  - ", subsequent_indent="    ")
        sources = [line for source in self.sources() for line in textwrap.wrap(source, 100)]
        return "\n".join([*lines, "", self.table().aligned(), "", *sources])

    def _repr_html_(self) -> str:
        page = f"<p>{html.escape(self.title)}</p><p><b>{html.escape(self.sentence)}</b></p>"
        if self.chosen:
            page += f"<pre>{html.escape(self.chosen.command)}</pre>"
        if self.overruled_by:
            items = "".join(f"<li>{html.escape(why)}</li>" for why in self.overruled_by)
            page += f"<p>Unless</p><ul>{items}</ul>"
        small = html.escape(" ".join(self.sources()))
        page += self.table()._repr_html_()
        page += f"<details><summary>Where the figures are from</summary><small>{small}</small></details>"
        return f"<div{as_it_is(page)}>{page}</div>"


def advise(
    name: str,
    gpu: str = "L4",
    *,
    gpus: int = 1,
    context: int = 4096,
    users: int = 16,
    prompts: float = PROMPTS,
    goal: str = "throughput",
    price: float | None = None,
) -> Advice:
    """Which way to deploy a model.

    Args:
        name: a folder with a ``config.json``, a hub name (only its config is fetched), or a shape's name.
        gpu: a card's name, or four numbers (``cards.FOUR``); ``gpus`` how many of them there are.
        context: tokens that each of the ``users`` requests holds at once, or the model's longest.
        prompts: tokens of prompts that are read for each token of an answer, those in the cache not counted.
        goal: what counts: to ``fit`` all users with the least rounding, or as many as possible; ``latency``
            of one user; ``throughput`` of all of them; ``quality``, the least rounding, whoever waits.
        price: dollars a GPU and day; without it nothing has a price.

    Raises:
        ModelError, LayoutError, ParameterError, SizingError: the model or a number cannot be, and why.
    """
    if goal not in GOALS:
        raise SizingError(f"goal must be one of {', '.join(GOALS)}, not {goal!r}.")
    if price is not None:
        parameters.number("price, in dollars a day,", price, 0.01, 1e6)
    asked = Load(card(gpu), gpus, context, users, prompts)  # before anything is fetched
    model = counting.counted(lookup.sized(name))
    load = replace(asked, context=min(context, model.layout.longest))
    found = options.options(model, load)
    return Advice(model, load, goal, price, found, options.recommended(found, goal, load))


def _where(one: Option) -> str:
    return one.title + (f" on {one.gpus} GPUs" if one.gpus > 1 else "")


def _times(gain: Gain) -> str:
    return f"{gain.ratio:.2f}" if gain.ratio < 1 else f"{gain.ratio:.1f}"


def explorer(
    model: str, gpu: str, context: int, users: int, goal: str, gpus: int = 1, price: float | None = None
) -> Explorer:
    """The question with controls: any model (a folder, a hub name, a shape) on any card."""
    chosen = shapes.known_as(model) or model
    name = next((title for title in CARDS if title == cards.card(gpu).name), gpu)

    def draw(of, on, tokens, requests, aim):
        return advise(of, on, gpus=gpus, context=tokens, users=requests, goal=aim, price=price)

    return explore(
        draw,
        of=Choice("model", list(dict.fromkeys([chosen, *shapes.CONFIGS])), chosen),
        on=Choice("GPU", list(dict.fromkeys([name, *CARDS])), name),
        tokens=Choice("context, tokens", sorted({context, *(2**n for n in range(10, 18))}), context),
        requests=Slider("users at once", 1, max(256, users), users, 1),
        aim=Choice("what counts", GOALS, goal),
    )
