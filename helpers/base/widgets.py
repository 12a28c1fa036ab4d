"""A picture with controls beside it: live in JupyterLab, a plain picture everywhere else.

Both are in one output. A notebook front end that has widgets and a kernel shows the controls; a web page,
an untrusted notebook or a headless run shows the picture of the first values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helpers.base import processes
from helpers.base.page import Note

VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Slider:
    """A number to drag: from ``low`` to ``high`` in steps, starting at ``value``."""

    label: str
    low: float
    high: float
    value: float
    step: float = 1

    def widget(self):
        """The control itself: a labelled box for the number, and a slider that moves with it.

        A slider of ipywidgets has no name for those who hear the page and do not see it; a box has.
        """
        import ipywidgets

        kind = "Int" if all(isinstance(n, int) for n in (self.low, self.step, self.value)) else "Float"
        values = {"min": self.low, "max": self.high, "step": self.step}
        values["value"] = min(max(self.value, self.low), self.high)
        values["tooltip"] = f"{self.label}: {self.low:,} to {self.high:,}"
        box = getattr(ipywidgets, f"Bounded{kind}Text")(
            **values, description=self.label, style=_WIDE, layout={"width": "22em"}
        )
        slider = getattr(ipywidgets, f"{kind}Slider")(
            **values, readout=False, continuous_update=False, layout={"width": "16em"}
        )
        ipywidgets.dlink((box, "value"), (slider, "value"))
        # A slider counts its steps in the browser: 26.4 and a tenth twice is 26.599999999999998 there.
        ipywidgets.dlink((slider, "value"), (box, "value"), lambda value: round(value, 9))
        return ipywidgets.HBox([box, slider])


@dataclass(frozen=True)
class Choice:
    """One of several texts or numbers, starting at ``value``."""

    label: str
    options: Sequence
    value: object

    def widget(self):
        """The control itself."""
        import ipywidgets

        return ipywidgets.Dropdown(
            options=list(self.options), value=self.value, description=self.label, tooltip=self.label,
            style=_WIDE, layout={"width": "32em"},
        )  # fmt: skip


_WIDE = {"description_width": "14em"}


class Explorer:
    """Shows what ``draw`` returns, a figure or a note, with controls for its arguments.

    A ``ValueError`` that ``draw`` raises becomes a sentence in the picture's place.

    Raises:
        ValueError: a control without a label, which who does not see the page could not tell from others.
    """

    def __init__(self, draw: Callable, /, **controls: Slider | Choice):
        if nameless := [name for name, control in controls.items() if not control.label.strip()]:
            raise ValueError(f"A control needs a label: {', '.join(nameless)}.")
        self.draw, self.controls = draw, controls
        self.first = self._drawn({name: control.value for name, control in controls.items()})

    def _drawn(self, values: dict):
        """What ``draw`` returns, or a note with the message of what it refused."""
        try:
            return self.draw(**values)
        except ValueError as error:  # a value that cannot be: the helpers' errors say which and why
            return Note(error)

    def __repr__(self) -> str:
        return repr(self.first)

    def _repr_mimebundle_(self, include=None, exclude=None):
        data, metadata = {"text/plain": repr(self), "text/html": self.first._repr_html_()}, {}
        if hasattr(self.first, "_repr_png_"):
            data["image/png"], metadata["image/png"] = self.first._repr_png_()
        if processes.watched():
            data[VIEW] = self.live()._repr_mimebundle_()[VIEW]
        return data, metadata

    def live(self):
        """The controls above the picture, which is drawn anew when one of them changes."""
        import ipywidgets

        rows = {name: control.widget() for name, control in self.controls.items()}
        handles = {name: (getattr(row, "children", None) or [row])[0] for name, row in rows.items()}
        picture = ipywidgets.HTML(self.first._repr_html_())

        def redraw(_change) -> None:
            values = {name: handle.value for name, handle in handles.items()}
            picture.value = self._drawn(values)._repr_html_()

        for handle in handles.values():
            handle.observe(redraw, "value")
        return ipywidgets.VBox([*rows.values(), picture])


explore = Explorer
