"""Widgets: a picture everywhere, controls where a kernel and a reader are, a sentence for a bad value."""

from helpers.base import processes, widgets
from helpers.base.page import Note
from helpers.base.widgets import VIEW, Slider
from helpers.measure import result_figures
from tests.test_show import a_row


def picture(size):
    if size <= 0:
        raise ValueError("The size must be above zero.")
    return result_figures.quality([a_row("awq", 1, 20.0, size, size, kl_mean=0.1, top1=0.9)])


def test_headless_it_is_the_picture_of_the_first_values():
    explorer = widgets.explore(picture, size=Slider("size", 0, 500, 300))
    data, metadata = explorer._repr_mimebundle_()
    assert set(data) == {"text/plain", "text/html", "image/png"}
    assert data["text/plain"] == repr(picture(300))
    assert metadata["image/png"]["alt"] in data["text/html"].replace("&#x27;", "'")


def test_a_kernel_with_a_reader_gets_the_controls_too(monkeypatch):
    monkeypatch.setattr(processes, "watched", lambda: True)
    explorer = widgets.explore(picture, size=Slider("size", 0, 500, 300))
    data, _ = explorer._repr_mimebundle_()
    assert data[VIEW]["model_id"]
    assert "image/png" in data


def test_moving_a_slider_draws_anew_and_a_refused_value_is_a_sentence():
    explorer = widgets.explore(picture, size=Slider("size", 0, 500, 300))
    row, shown = explorer.live().children
    handle = row.children[1]
    before = shown.value
    handle.value = 100
    after = shown.value
    assert after != before
    assert "<img" in after
    handle.value = 0
    assert shown.value == "<p>The size must be above zero.</p>"
    handle.value = 300
    assert shown.value == before


def test_a_first_value_that_is_refused_is_a_sentence_and_no_traceback():
    explorer = widgets.explore(picture, size=Slider("size", -5, 5, -1))
    assert isinstance(explorer.first, Note)
    assert set(explorer._repr_mimebundle_()[0]) == {"text/plain", "text/html"}


def test_box_and_slider_move_together():
    box, slider = Slider("n", 1, 9, 4).widget().children
    slider.value = 7
    assert box.value == 7
    box.value = 2
    assert slider.value == 2
    box, slider = Slider("price", 0.0, 60.0, 26.4, 0.1).widget().children
    slider.value = 26.599999999999998
    assert box.value == slider.value == 26.6, "a box shows no rounding"
    assert [handle.value for handle in Slider("n", 1, 9, 40).widget().children] == [9, 9]  # beyond its end
