"""Where an output may differ from machine to machine: said here once more, apart from nbval's rules.

The gates need a second opinion. If they asked the sanitizer's rules what is hidden, a rule that hides too
much would hide it from the gates as well.
"""

import re

IN_TEXT = r"‹(?P<text>[^‹›\n]*)›"
IN_TABLES = r'<i class="measured">(?P<html>[^<>\n]*(?:<br>[^<>\n]*)*)</i>'
PICTURE = r'src="data:image/png;base64,(?P<png>[A-Za-z0-9+/=]*)"'
UNNAMED = re.sub(r"\?P<\w+>", "?:", f"{IN_TEXT}|{IN_TABLES}")
MARK = re.compile(f"{IN_TEXT}|{IN_TABLES}|{PICTURE}")
TAG = re.compile(r"<[^<>]*>")
# An HTML output is one line for the file; for a reader each row, paragraph and list item is one. A
# quotation belongs to the paragraph that introduces it.
HTML_LINE = re.compile(r"(?=<(?:tr|p|li|caption|img|pre|ol|ul|table)\b)")


def lines(text: str, mime: str) -> list[str]:
    """The lines that a reader sees, which joined give the text again."""
    return HTML_LINE.split(text) if mime == "text/html" else text.splitlines(keepends=True)


def plain(line: str, mime: str) -> str:
    """What of a line stands outside the marks, without HTML's tags."""
    line = MARK.sub("", line)
    if mime == "text/html":
        alt = " ".join(re.findall(r'alt="([^"]*)"', line))
        line = f"{TAG.sub(' ', line)} {alt}"
    return line


def hidden(text: str) -> list[str]:
    """The texts inside the marks; pictures are none."""
    found = (match["text"] if match["text"] is not None else match["html"] for match in MARK.finditer(text))
    return [text for text in found if text is not None]


def texts(output) -> dict[str, str]:
    """What nbval compares of one output, by MIME type; a stream's and an error's by their own names."""
    if output["output_type"] == "stream":
        return {"text": output["text"]}
    if output["output_type"] == "error":
        return {key: output[key] for key in ("ename", "evalue")}
    return {mime: text for mime, text in output["data"].items() if mime.startswith("text/")}


def put(output, mime: str, text: str) -> None:
    """Set one of an output's ``texts``."""
    place = output["data"] if mime in output.get("data", ()) else output
    place[mime] = text


def hidden_lines(outputs: list) -> list[str]:
    """The lines of which nothing is compared, because all their words stand inside marks."""
    return [
        line.strip()
        for output in outputs
        for mime, text in texts(output).items()
        for line in lines(text, mime)
        if hidden(line) and not re.search(r"\w", plain(line, mime))
    ]
