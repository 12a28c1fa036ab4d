"""The sanitizer's rules: each hides what it is for, and none may hide more. Rules that do are planted."""

import re
from pathlib import Path

import pytest
from nbval.plugin import get_sanitize_patterns

from helpers.base import page

CFG = Path(__file__).parent / "nbval_sanitize.cfg"
RULES = dict(get_sanitize_patterns(CFG.read_text(encoding="utf-8")))
NAMES = re.findall(r"^\[(.+)\]$", CFG.read_text(encoding="utf-8"), re.M)

# For each rule: what it hides, and what has to be left of it.
MEANT = {
    "measured in text": [
        ("Ready after ‹3.8 s›.", "Ready after ‹measured›."),
        ("‹1 s› and then ‹2 s›", "‹measured› and then ‹measured›"),
        ("Kernel: ‹›", "Kernel: ‹measured›"),
        ("Answer: " + str(page.measured("a\nb › c")), "Answer: ‹measured›"),
    ],
    "measured in tables": [
        (f"<td>{page.measured('1 < 2').html()}</td>", "<td><i>measured</i></td>"),
        ('<i class="measured">a<br>b</i> <i class="measured">c</i>', "<i>measured</i> <i>measured</i>"),
    ],
    "pictures": [
        ('<img alt="A bar" src="data:image/png;base64,iVBO+/8=">', '<img alt="A bar" src="picture">'),
        ('src="data:image/png;base64,a" b="c"', 'src="picture" b="c"'),
    ],
}

# Outputs without a mark, or with a mark that does not end: no rule may touch them.
UNMARKED = [
    "Model: SmolLM2-135M-Instruct. Batch sizes: [1, 8, 32].",
    "134,515,008 weights at 2 bytes each: 256.6 MiB predicted.",
    "4.31 bits a weight, 3.71 times smaller; 90.5%; 42.0 tok/s; $0.45; 12 ms",
    "Cause: ValidationError: Cannot find the config file for awq",
    "baseline | 1 | 256.6 MiB",
    "True",
    "0",
    "",
    "a ‹ that opens and does not close\nand the next line",
    "› the wrong way round ‹",
    "‹ one line\nand another ›",
    '<tr><th scope="row">fp8</th><td style="text-align:right">155.9 MiB</td></tr>',
    "<i>in italics</i> <i class='measured'>other quotes</i>",
    '<i class="measured">a cell</td><td>and the next</i>',
    '<i class="measured">a line\nand the next</i>',
    '<img alt="a bar of 3 MiB" src="https://example.org/a.png">',
    '<img src="data:image/svg+xml;base64,PHN2Zz4=">',
    '<img src="data:image/png;base64,iVBO</td><td>42" alt="',
]
# With several marks: what stands between them must be left, whatever it is.
BETWEEN = [
    "‹1›{}‹2›",
    '<i class="measured">1</i>{}<i class="measured">2</i>',
    '<i class="measured">1</i></td>{}<td><i class="measured">2<br>3</i>',
    'src="data:image/png;base64,aa"{} src="data:image/png;base64,bb"',
]


def faults(regex: str, replace: str = "x") -> list[str]:
    """Why a rule hides more than one marked place at a time; nothing if it does not."""
    rule = re.compile(regex)
    found = [f"it changes {text!r}" for text in UNMARKED if rule.sub(replace, text) != text]
    for frame in BETWEEN:
        for middle in (" and 3 MiB ", "\n", "</td><td>7</td><td>", " × "):
            if middle not in rule.sub(replace, frame.format(middle)):
                found.append(f"it reaches over {middle!r}")
    if rule.search(""):
        found.append("it matches nothing")
    if not replace.strip():
        found.append("nothing shows where it hid something")
    return found


def test_nbval_reads_every_rule_of_the_file():
    assert list(MEANT) == NAMES
    assert len(RULES) == len(NAMES), "a rule that nbval cannot read is left out in silence"


@pytest.mark.parametrize("name", MEANT)
def test_each_rule_hides_what_it_is_for(name):
    regex, replace = list(RULES.items())[NAMES.index(name)]
    for text, left in MEANT[name]:
        assert re.sub(regex, replace, text) == left


@pytest.mark.parametrize("number", range(len(RULES)))
def test_no_rule_hides_more(number):
    assert faults(*list(RULES.items())[number]) == []


def test_the_rules_together_leave_what_is_between_the_marks():
    text = 'A ‹1 s› B <i class="measured">2</i> C src="data:image/png;base64,aa" D'
    for regex, replace in RULES.items():
        text = re.sub(regex, replace, text)
    assert text == 'A ‹measured› B <i>measured</i> C src="picture" D'


PLANTED = [
    r".*", r"\S+", r"\d+", r"[\d.,]+ (?:MiB|s|ms|tok/s)", r"(?s)‹.*›", r"‹[^›]*›", r".*‹[^›\n]*›",
    r"<i.*?</i>", r'<i class="measured">[^x]*</i>', r"<td[^>]*>[^<]*</td>", r'src="[^"]*"', r"True|False",
]  # fmt: skip


@pytest.mark.parametrize("regex", PLANTED)
def test_a_rule_that_hides_too_much_is_found(regex):
    assert faults(regex)


def test_a_rule_that_leaves_no_trace_is_found():
    assert faults(r"‹[^‹›\n]*›", " ")
