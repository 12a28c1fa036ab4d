"""What a page is made of: marks for what was measured, tables, notes, sizes in words."""

import html
from collections.abc import Iterable, Mapping

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

    def __init__(self, columns: Iterable[str], rows: Iterable[Iterable[object]], texts: Iterable[str] = ()):
        self.columns = list(columns)
        self.rows = [list(row) for row in rows]
        self.texts = set(texts)

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        return "\n".join(" | ".join(str(cell) for cell in line) for line in lines)

    def aligned(self) -> str:
        """The table in columns of equal width, for a terminal."""
        rows = [self.columns, *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        left, right = ' style="text-align:left"', ' style="text-align:right"'
        head = body = ""
        for place, name in enumerate(self.columns):
            side = left if place == 0 or name in self.texts else ""
            head += f'<th scope="col"{side}>{html.escape(name)}</th>'
        for first, *others in self.rows:
            body += f'<tr><th scope="row"{left}>{_html(first)}</th>'
            for name, value in zip(self.columns[1:], others, strict=True):
                body += f"<td{left if name in self.texts else right}>{_html(value)}</td>"
            body += "</tr>"
        page = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<table{as_it_is(page)}>{page}"


class Note:
    """A sentence in the place of a figure or a table that has nothing to show."""

    def __init__(self, text: object):
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<p{as_it_is(self.text)}>{html.escape(self.text)}</p>"


def facts(pairs: Mapping[str, object]) -> Table:
    """A two-column table of names and values."""
    return Table(["", "value"], pairs.items())


def machine_facts(found) -> Table:
    """What ``machine.detect()`` found; all of it is this machine's."""
    return Table(["This machine", ""], [[measured(k), measured(v)] for k, v in found.facts().items()])


def mib(size: float) -> str:
    """Bytes as MiB, or as GiB from 10 GiB on."""
    return f"{size / 2**30:,.2f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"


class answer:
    """A question and the model's answer, marked as generated text, with the form in which it was asked."""

    def __init__(self, question: str, output, templated: bool):
        self.question, self.text = question, output.outputs[0].text.strip()
        self.form = (
            "the model's chat template" if templated else "a plain prompt: a base model continues text"
        )

    def __repr__(self) -> str:
        return f"Question (with {self.form}): {self.question}\nAnswer: {measured(self.text)}"

    def _repr_html_(self) -> str:
        text = measured(self.text).html().replace("\n", "<br>")
        return (
            f"<p{as_it_is(self.question)}><b>Question</b> (with {html.escape(self.form)}): "
            f"{html.escape(self.question)}</p><blockquote{as_it_is(text)}>{text}</blockquote>"
        )


def ms(seconds: float) -> str:
    """Seconds in whole milliseconds, for a cell."""
    return f"{1000 * seconds:,.0f} ms"
