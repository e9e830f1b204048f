"""The instructor's worked solutions are right, and there is one for every exercise."""

import importlib.util
from pathlib import Path

import pytest

from semidetr_lite.teach.exercises import EXERCISES, check

FILE = Path(__file__).parents[1] / "notebooks/instructor/solutions.py"
SPEC = importlib.util.spec_from_file_location("instructor_solutions", FILE)
solutions = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(solutions)


def test_every_exercise_has_a_solution():
    assert set(solutions.SOLUTIONS) == set(EXERCISES)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_is_right_in_every_case(name, capsys):
    check(name, solutions.SOLUTIONS[name])
    assert "right in every case" in capsys.readouterr().out


def test_equal_scores_keep_their_order():
    hits = solutions.torch.tensor([False, True])
    assert solutions.average_precision_of_ties(hits, 1) == pytest.approx(0.5)
