"""The framework of studies: cells that run once, their lines, and questions with a yes or a no."""

import json
import math

import numpy as np
import pytest

from experiments import study
from experiments.theory.experiment import half_interval
from growjax.errors import DataError


class Square(study.Cell):
    """A cell that squares a number."""

    def __init__(self, number, result, ran=None):
        self.key, self.found = ("squares", "", "square", number), result
        self.ran = [] if ran is None else ran

    def run(self, shared):
        self.ran.append(self.key[3])
        return {"square": self.found}


def test_finished_cells_are_not_run_again(tmp_path):
    numbers = []
    path = tmp_path / "squares.jsonl"
    for some in ((1, 2), (3, 2)):
        study.run([Square(i, i * i, numbers) for i in some], None, path)
    assert numbers == [1, 2, 3]
    assert [line["square"] for line in study.read(path)] == [1, 4, 9]


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    path = tmp_path / "squares.jsonl"
    study.run([Square(i, i * i) for i in (1, 2)], None, path)
    path.write_text(path.read_text()[:-4])
    for _ in range(2):  # and what is appended stands on a line of its own
        study.run([Square(i, -i) for i in (1, 2, 3)], None, path)
        assert [line["square"] for line in study.read(path)] == [1, -2, -3]


def test_intervals_are_those_of_student():
    row = study.answer("w", "q", [1.0, 2.0, 3.0])
    half = pytest.approx(4.302653 / 3**0.5, abs=1e-4)
    low, high = np.array(row.interval, float)
    assert row.estimate == 2.0 and high - 2 == half and 2 - low == half
    assert half_interval(np.array([[1.0, 1.0], [2.0, np.nan], [3.0, 1.0]]))[0] == half


def test_a_verdict_needs_the_whole_interval():
    def verdict_of(low, high):
        return study.answer("w", "q", [1.0, 2.0, 3.0], low, high).verdict  # 2 plus or minus 2.484

    assert verdict_of(-1, 5) == "yes"
    assert verdict_of(0, 5) == verdict_of(-1, 4) == "undecided"
    assert verdict_of(4.5, 9) == verdict_of(-9, -0.5) == "no"


def test_networks_that_diverge_are_said_and_leave_valid_json(tmp_path):
    path = tmp_path / "c.jsonl"
    study.run([Square(0, {"x": [1.0, math.inf]})], None, path)
    (line,) = study.read(path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == line
    assert line["square"] == {"x": [1.0, None]}
    answer = study.answer("w", "does it?", [1.0, math.nan], verdict=True)
    assert answer.estimate is None and answer.interval is None and answer.verdict == "diverged"
    assert study.answer("w", "does it?", [1.0, 1.5], verdict=True).verdict == "yes"


def test_lines_with_other_settings_are_refused_and_nothing_runs(tmp_path):
    class Tied(Square):
        def settings(self, shared):
            return {"model": shared}

    path = tmp_path / "tied.jsonl"
    study.run([Tied(1, 1)], "a", path)
    assert study.read(path)[0]["settings"] == {"model": "a"}
    before = path.read_text()
    with pytest.raises(DataError, match="squares  square 1: model is a there, b here"):
        study.run([Tied(1, 1), Tied(2, 4)], "b", path)
    assert path.read_text() == before


def test_cells_that_are_run_again_add_no_line(tmp_path):
    numbers = []
    path = tmp_path / "squares.jsonl"
    cells = [Square(i, i * i, numbers) for i in (1, 2)]
    study.run(cells, None, path)
    before = path.read_text()
    study.run(cells, None, path, again=lambda cell: cell.key[3] == 2)
    assert numbers == [1, 2, 2] and path.read_text() == before


def test_answers_are_counted_and_those_by_no_written_out():
    rows = [study.answer("w", f"{n}?", [1.0, 1.0], verdict=n > 0) for n in range(3)]
    assert study.answers_in_words(rows) == ["w, 3 questions: 2 yes, 1 no. 0? No."]
    rows += [study.answer("v", f"{n}?", [1.0, 1.0], verdict=False) for n in range(4)]
    assert study.answers_in_words(rows)[1] == "v, 4 questions: 4 no."
