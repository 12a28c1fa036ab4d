"""JupyterLab as a reader has it: a real server here, driven through Debian's Chromium by Playwright.

The server has settings, tokens and workspaces of its own, in a folder that is thrown away; nothing of the
user's is read. What it serves is a copy of ``notebooks/``, so that running one changes nothing.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.base import processes

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_S, OPEN_S = 60, 60  # most seconds a server may take to start, a notebook to open
SIZE = {"width": 1440, "height": 900}  # of the browser's window: a usual laptop's

# The theme follows the browser's colour scheme; every cell is in the page, also those out of sight; the
# server asks nobody for news.
SETTINGS = {
    "apputils-extension/themes": {
        "adaptive-theme": True,
        "preferred-light-theme": "JupyterLab Light",
        "preferred-dark-theme": "JupyterLab Dark",
    },
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
}


@dataclass
class Lab:
    """A running server: its address with the token, and the folder of what it serves."""

    url: str
    token: str
    folder: Path

    def address(self, name: str) -> str:
        """The address of a notebook as it is stored."""
        return f"{self.url}lab/tree/notebooks/{name}.ipynb?reset&token={self.token}"

    def notebook(self, name: str):
        """The notebook that is served."""
        import nbformat

        return nbformat.read(self.folder / f"notebooks/{name}.ipynb", 4)

    def fresh(self, name: str) -> str:
        """The address of a copy without outputs, beside it: what it imports and shows is found from there."""
        import nbformat

        notebook = self.notebook(name)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, self.folder / f"notebooks/fresh_{name}.ipynb")
        return self.address(f"fresh_{name}")

    def _sessions(self, method: str = "GET", which: str = ""):
        import httpx

        headers = {"Authorization": f"token {self.token}"}
        return httpx.request(method, f"{self.url}api/sessions{which}", headers=headers, timeout=30)

    def wait_for_kernel(self) -> None:
        """Wait until the notebook that was opened has a kernel and is connected to it."""
        end = time.monotonic() + OPEN_S
        while time.monotonic() < end:
            kernels = [session["kernel"] for session in self._sessions().json()]
            if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels):
                return
            time.sleep(0.2)
        raise RuntimeError(f"No kernel after {OPEN_S} s: {kernels}")

    def end_kernels(self) -> None:
        """End the kernels of the notebooks that were opened: each holds memory."""
        for session in self._sessions().json():
            self._sessions("DELETE", f"/{session['id']}")


@contextlib.contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """Serve a copy of the notebooks in ``folder`` until the block ends, however it ends."""
    served, home = folder / "served", folder / "jupyter"
    shutil.copytree(ROOT / "notebooks", served / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for name, values in SETTINGS.items():
        file = home / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "PYTEST_CURRENT"))}
    environment.pop("TUTORIAL_HEADLESS", None)  # conftest's: without it a kernel shows its widgets
    environment |= {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TUTORIAL_MODEL": "embedded",
    }
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", f"--ServerApp.root_dir={served}"]
    command = processes.owned_command([sys.executable, "-m", "jupyterlab", *options], grace_s=10)
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield Lab(*_started(server, home / "runtime", folder / "lab.log"), served)
        finally:
            server.terminate()
            server.wait(20)


def _started(server: subprocess.Popen, runtime: Path, log: Path) -> tuple[str, str]:
    """The server's address and its random token, once it answers."""
    import httpx

    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(StopIteration, json.JSONDecodeError, httpx.TransportError):
            facts = json.loads(next(runtime.glob("jpserver-*.json")).read_text())
            if httpx.get(f"{facts['url']}api", timeout=5).is_success:
                return facts["url"], facts["token"]
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


# -- the browser ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def chromium() -> Iterator:
    """Playwright's handle of the installed Chromium, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that root in a container does not have.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


# What a picture, a table or a control looks like where it could not be shown.
RAW = (
    r"<Figure size| at 0x[0-9a-f]{6}|\b[A-Z]\w+\(children=|\b\w+(Slider|Text|Dropdown)\("
    r"|Error displaying widget|Loading widget"
)
LOOK = (Path(__file__).parent / "look.js").read_text(encoding="utf-8")


class View:
    """One notebook in a window of its own: run it, move its controls, look at it."""

    def __init__(self, page, cells: int):
        self.page, self.cells = page, cells
        self.said: list[str] = []  # errors of the browser's console, and exceptions that nobody caught
        page.on("console", lambda message: message.type == "error" and self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(f"uncaught: {error}"))
        page.set_default_timeout(OPEN_S * 1000)

    def ask(self, function: str, *arguments):
        """Call a function of ``look.js`` in the page."""
        return self.page.evaluate(f"given => ({LOOK}).{function}(...given)", list(arguments))

    def _wait(self, function: str, timeout_s: float = OPEN_S) -> None:
        asked = f"cells => ({LOOK}).{function}(cells)"
        self.page.wait_for_function(asked, arg=self.cells, timeout=timeout_s * 1000)

    def open(self, address: str) -> None:
        """Open a notebook and wait until its kernel waits and all of it is drawn."""
        self.page.goto(address)
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        self.page.wait_for_selector('.jp-NotebookPanel [data-status="idle"]')
        self._wait("drawn")

    def choose(self, menu: str, entry: str) -> None:
        """Click an entry of the menu bar."""
        self.page.locator(f'.lm-MenuBar-itemLabel:text-is("{menu}")').click()
        self.page.locator(f'.lm-Menu-itemLabel:text-is("{entry}")').click()

    def run_all(self, timeout_s: float) -> None:
        """Run all cells of a notebook without outputs; wait until each has its number, or one failed."""
        self.choose("Run", "Run All Cells")
        self._wait("ran", timeout_s)
        self.page.wait_for_selector('.jp-NotebookPanel [data-status="idle"]')
        self._wait("drawn")

    def theme(self, name: str) -> None:
        """Change to the light or the dark theme, as the system's setting does."""
        self.page.emulate_media(color_scheme=name)
        light = "true" if name == "light" else "false"
        self.page.wait_for_selector(f'body[data-jp-theme-light="{light}"]', state="attached")
        self.page.wait_for_timeout(300)  # colours fade over

    def problems(self) -> list[str]:
        """What a reader of the outputs could not read, as sentences."""
        return self.ask("problems", RAW)

    def controls(self) -> list:
        """Everything in the outputs that can be moved."""
        return self.page.locator(f".jp-OutputArea-output .jupyter-widgets :is({CONTROLS})").all()

    def below(self, control) -> str:
        """What stands below a control: its picture and the picture's text, or a sentence."""
        box = control.locator('xpath=ancestor::*[contains(@class, "widget-vbox")]')
        return box.locator(".widget-html").inner_html()

    def move(self, control) -> int:
        """Move a control with the keyboard, or through all entries of a menu; return how many moves it was.

        Raises:
            AssertionError: after a move there was nothing new below it, or neither picture nor sentence.
        """
        control.scroll_into_view_if_needed()
        if control.evaluate("e => e.tagName") == "SELECT":
            first, count = control.evaluate("e => [e.selectedIndex, e.options.length]")
            others = [*range(first + 1, count), *range(first + 1)]
            for index in others:
                self._changes(control, lambda index=index: control.select_option(index=index))
            return len(others)
        number = "e => Number(e.value ?? e.getAttribute('aria-valuenow'))"
        before = control.evaluate(number)

        def press() -> None:
            for key in ("ArrowUp", "ArrowDown"):  # down where it is at its end
                if control.evaluate(number) == before:
                    control.press(key)

        self._changes(control, press)
        return 1

    def _changes(self, control, move) -> None:
        before, end = self.below(control), time.monotonic() + CHANGE_S
        move()
        while (after := self.below(control)) == before:
            assert time.monotonic() < end, (
                f"nothing changed below {control.evaluate('e => e.outerHTML')[:200]}"
            )
            self.page.wait_for_timeout(50)
        assert re.search(r'<img [^>]*alt="[^"]{20}|<p>[^<]{20}', after), f"below the control: {after[:200]}"

    def plant(self, page: str) -> None:
        """Put a piece of a page under the first output, in place of the last one that was put there."""
        self.page.evaluate(
            "page => { document.getElementById('planted')?.remove();"
            " document.querySelector('.jp-OutputArea-output').insertAdjacentHTML("
            " 'beforeend', `<div id='planted'>${page}</div>`) }",
            page,
        )
        self._wait("drawn")

    def ground(self) -> float:
        """How light the page behind the outputs is: 0 for black, 1 for white."""
        return self.ask("lightness")


CONTROLS = "select, [role=slider], input, textarea, button"
CHANGE_S = 20  # most seconds from a move to another picture


@contextlib.contextmanager
def view(browser, lab: Lab, name: str, fresh: bool = False) -> Iterator[View]:
    """A notebook, as stored or ``fresh``, opened in a window of its own, closed after the block."""
    context = browser.new_context(viewport=SIZE, color_scheme="light")
    try:
        seen = View(context.new_page(), len(lab.notebook(name).cells))
        seen.open(lab.fresh(name) if fresh else lab.address(name))
        lab.wait_for_kernel()  # the page says "idle" before there is one, and would ask for it
        yield seen
    finally:
        context.close()
        lab.end_kernels()
