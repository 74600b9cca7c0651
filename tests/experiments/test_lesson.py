"""The notebook runs from its first cell to its last, and the course's pictures are drawn."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.files import read_json
from experiments.recurrence.course import gains, records_of
from experiments.recurrence.drawings import draw_course
from experiments.recurrence.study import HERE

NOTEBOOK = HERE / "lesson.ipynb"


def test_the_notebook_runs_and_theory_holds_in_it(tmp_path: Path):
    """In a process of its own: Jupyter's warnings are not the project's."""
    line = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    line += ["--output-dir", str(tmp_path), str(NOTEBOOK)]
    settings = {
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    done = subprocess.run(
        line, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / NOTEBOOK.name).read_text(encoding="utf-8"))["cells"]
    printed = "".join(
        "".join(output["text"])
        for cell in cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )
    pairs = re.findall(r"measured ([\d.e-]+), theory ([\d.e-]+)", printed)
    radius, without, with_recurrence = [tuple(map(float, pair)) for pair in pairs]
    for measured, theory in (radius, without):
        assert measured == pytest.approx(theory, rel=0.01)
    assert with_recurrence[0] > with_recurrence[1]
    right = re.search(r"right in (\d+)%", printed)
    assert right
    assert int(right[1]) > 50


def test_the_notebook_is_kept_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_the_pictures_of_the_course_are_drawn(tmp_path):
    records = records_of(HERE / "results")
    draw_course(tmp_path, records("cells_at_work"), gains(records))
    text = (HERE / "course.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\(lesson/(\w+\.svg)\)", text))
    assert named
    assert named == {path.name for path in tmp_path.iterdir()}
    for name in named:
        assert "<svg" in (tmp_path / name).read_text(encoding="utf-8")
        assert (HERE / "lesson" / name).exists()


def of(study, field, **fields):
    records = read_json(HERE / "results" / f"{study}.json")["records"]
    return [r[field] for r in records if all(r[key] == value for key, value in fields.items())]


def test_the_verdicts_of_the_textbook_are_those_of_the_results():
    """A study that is run anew with another outcome asks for another verdict in the course."""

    def solved(remedy, length=100):
        return sum(of("adding", "solved", remedy=remedy, length=length))

    assert min(of("cost", "time_of_lstm", cell="gru", width=256)) > 1.1
    assert sum(of("exploding", "lost", cell="lstm", clipping="none")) == 0
    assert all(of("exploding", "lost", cell="rnn_relu", clipping="none"))
    assert solved("rnn_tanh, orthogonal") == 0
    assert solved("rnn_relu, orthogonal") < solved("rnn_relu, identity (IRNN)") == 3
    assert solved("lstm, forget bias 4") < solved("lstm, forget bias 0")
    assert solved("lstm, forget bias 4", 200) > solved("lstm, forget bias 0", 200)
    assert solved("gru, orthogonal", 200) == 3 > solved("lstm, forget bias 1", 200)
    for model, count in (
        ("lstm, input gate 1", 0),
        ("lstm, forget gate 0", 0),
        ("gru, reset gate 1", 3),
    ):
        assert sum(of("gates", "solved", model=model)) == count
    both, forward = (
        of("tagging", "accuracy", model=f"lstm, {m}") for m in ("both, same size", "forward")
    )
    assert min(both) > 0.95 > 0.7 > max(forward)
    gru, relu = (
        of("reversal", "whole_captions", model=f"{c}, then {c}") for c in ("gru", "rnn_relu")
    )
    assert max(gru) < min(relu)
    back = {
        bias: of(
            "gradient_distance", "50_back", start=f"orthogonal, forget bias {bias}", of="state"
        )
        for bias in (0, 4)
    }
    assert max(back[0]) < 1e-6 < 0.05 < min(back[4])
