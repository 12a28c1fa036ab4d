"""Every link leads somewhere: files, headings, notebooks; and each work outside is named in one place."""

import json
import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helpers.faults import catalogue
from tests.scratch import REPO, files

TRACKED = files()
PAGES = [name for name in TRACKED if name.endswith((".md", ".ipynb"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
URL = re.compile(r"https?://[^\s)\"'<>`\\]+")
# A server of one's own, one of a cluster, an example.
OWN = ("127.0.0.1", "localhost", "vllm", "prometheus.monitoring", "mirror.example")


def prose(name: str) -> str:
    """A page's Markdown: of a notebook its Markdown cells, without code."""
    text = (REPO / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(name: str) -> list[str]:
    return re.findall(r"^#+ (.+?) *$", prose(name), re.MULTILINE)


def anchors(name: str) -> set[str]:
    """The anchors that GitHub and JupyterLab give a page's headings."""
    plain = [re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings(name)]
    github = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
    return github | {heading.replace(" ", "-") for heading in plain}


def links() -> list[tuple[str, str]]:
    return [
        (page, one or other)
        for page in PAGES
        for one, other in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))
    ]


@pytest.mark.parametrize(("page", "target"), [link for link in links() if "://" not in link[1]])
def test_a_relative_link_leads_to_a_file_and_a_heading(page, target):
    path, _, anchor = target.partition("#")
    found = ((REPO / page).parent / path).resolve() if path else REPO / page
    name = found.relative_to(REPO).as_posix()
    assert name in TRACKED or any(other.startswith(f"{name}/") for other in TRACKED), f"{target} in {page}"
    if anchor:
        assert anchor in anchors(name), f"{target} in {page}"


def test_there_are_links_to_follow():
    assert len(links()) > 50


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_is_named_is_there(page):
    folders = {name.partition("/")[0] for name in TRACKED if "/" in name}
    for named in re.findall(r"`([\w.-]+/[\w./-]+)`", prose(page)):
        if named.partition("/")[0] in folders or named.startswith(("deploy/", "reference/")):
            candidates = (REPO / named, REPO / "notebooks" / named)
            made = named.startswith("notebooks/reference/my-gpu")  # the reader's own
            assert made or any(path.exists() for path in candidates), f"{named} in {page}"


def test_where_the_diagnosis_sends_a_reader_there_is_that_section():
    texts = [entry.read for entry in catalogue.entries()]
    known = {Path(page).stem: page for page in PAGES}
    sent = [text for text in texts if text.partition(":")[0] in known]
    assert len(sent) > 5
    for text in sent:
        page, _, heading = text.partition(": ")
        assert not heading or heading in headings(known[page]), text


# --- What lies outside


def outside() -> list[tuple[str, str]]:
    """Every address that is written down, with its place; outputs are made, not written."""
    found = []
    for name in TRACKED:
        if name.endswith((".md", ".py", ".yaml", ".yml", ".toml", ".ipynb")) and not name.startswith(
            "tests/"
        ):
            text = (REPO / name).read_text(encoding="utf-8")
            if name.endswith(".ipynb"):
                text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
            found += [(name, url.rstrip(".,;:")) for url in URL.findall(text)]
    hosts = [(name, url, urlsplit(url).hostname or "") for name, url in found if "{" not in url]
    # A host without a dot is a container's name in a compose file.
    return [(name, url) for name, url, host in hosts if host not in OWN and "." in host]


def test_an_address_outside_is_well_formed():
    for name, url in outside():
        parts = urlsplit(url)
        assert parts.scheme == "https", f"{url} in {name}"
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), f"{url} in {name}"
        assert not parts.query, f"{url} in {name}"
        if parts.hostname == "arxiv.org":
            assert re.fullmatch(r"/abs/\d{4}\.\d{5}", parts.path), f"{url} in {name}"


def test_an_address_outside_is_written_once():
    twice = {url: count for url, count in Counter(url for _, url in outside()).items() if count > 1}
    assert not twice
    assert {name for name, url in outside() if "arxiv.org" in url} == {"notebooks/REFERENCES.md"}


def test_every_work_is_listed_and_every_listed_work_is_cited():
    row = re.compile(
        r"^\| \[arXiv ([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\) \| .+ \| (\[\w+\]\([^|]+\)) \|$", re.M
    )
    rows = row.findall(prose("notebooks/REFERENCES.md"))
    listed = [number for number, *_ in rows]
    assert all(number == address for number, address, _ in rows)
    assert listed == sorted(set(listed)), "each once, in order"
    pages = [page for page in PAGES if page != "notebooks/REFERENCES.md"]
    cited = {page: set(re.findall(r"arXiv (\d{4}\.\d{5})", prose(page))) for page in pages}
    in_helpers = (
        re.findall(r"arXiv (\d{4}\.\d{5})", p.read_text()) for p in (REPO / "helpers").rglob("*.py")
    )
    assert set().union(*cited.values(), *in_helpers) == set(listed)
    for number, _, where in rows:
        named = {f"notebooks/{page}" for page, _ in LINK.findall(where)}
        assert named == {page for page, numbers in cited.items() if number in numbers}, number
