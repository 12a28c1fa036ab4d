"""Write the card of GPU classes and goals into README, between its marks."""

from helpers.base.files import ROOT
from helpers.compare import guide

BEGIN, END = "<!-- the card begins: make card -->", "<!-- the card ends -->"


def written(page: str) -> str:
    """A page with the card between its marks as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{guide.markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text()))
