"""Where a run's seconds went: starts as the cells say them, the rest by what a cell calls."""

import nbformat
from nbformat import v4

from helpers.tools import profile


def cell(source: str, said: str, seconds: float):
    found = v4.new_code_cell(source, outputs=[v4.new_output("stream", text=said)])
    found.metadata["papermill"] = {"duration": seconds}
    return found


def test_a_runs_seconds_are_all_counted_once(tmp_path, capsys):
    start = "vLLM is ready after ‹4.5 s› (importing vLLM took ‹5.0 s› before). Its log: ‹baseline-1.log›\n"
    cells = [
        cell("with engine as llm:\n    found = trial.run(llm)", start, 12.0),
        cell("print(1)", "1\n", 0.5),
        v4.new_code_cell("never_run()"),
        cell("start_together(one, two)", "The server (awq) answers after ‹6.0 s›\n" * 2, 8.0),
    ]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "02_fp8.ipynb")
    assert profile.profile(tmp_path)["02_fp8"] == {
        "import of vLLM": 5.0,
        "start of an engine": 4.5,
        "start of a server": 8.0,
        "quality: prefills": 2.5,
        "everything else": 0.5,
    }
    assert profile.main([str(tmp_path)]) == 0
    heads, *_, last = capsys.readouterr().out.splitlines()
    assert heads.split() == ["seconds", "all", "02"]
    assert last.split() == ["together", "20", "20"]


def test_a_folder_without_copies_is_refused(tmp_path, capsys):
    assert profile.main([str(tmp_path)]) == 2
    assert "has no executed notebook" in capsys.readouterr().err
