"""Every exercise has a solution, and the checker tells what is wrong."""

import json
import subprocess
import sys

import check
import exercises
import numpy as np
import pytest
import solutions

import art
import evaluate


def test_stubs_are_not_done_and_the_exercises_are_the_same():
    verdicts = check.check(exercises)
    assert {*verdicts.values()} == {"not yet"} and len(verdicts) == 16
    assert verdicts.keys() == check.check(solutions).keys()
    assert {*check.check(solutions).values()} == {"done"}


def test_expected_values_in_the_docs_are_those_of_the_solutions():
    text, made = check.in_docs(check.expected())
    assert text == made, "run python docs/exercises/check.py --docs"


def test_solutions_agree_with_the_kit():
    rng = np.random.default_rng(0)
    p, (draft, refined) = rng.random(200).round(1), rng.random((2, 200)) < 0.6
    found = evaluate.compare(refined, draft)
    assert solutions.fixed_broken(draft, refined) == (found["won"], found["lost"])
    assert solutions.sign_test(found["won"], found["lost"]) == pytest.approx(found["p"])
    assert solutions.area(p, ~draft) == pytest.approx(art.auc(p, ~draft))
    assert solutions.prior_back(0.3, 0.8) == pytest.approx(art.with_prior(0.3, 4))


@pytest.mark.parametrize("function, verdict", [
    (lambda *args: None, "gives None, expected ("),
    (lambda *args: 1 / 0, "ZeroDivisionError: division by zero (test_exercises.py, line "),
])
def test_checker_tells_what_is_wrong(monkeypatch, function, verdict):
    monkeypatch.setattr(exercises, "fixed_broken", function)
    assert check.check(exercises)["fixed_broken"].startswith(verdict)


def test_a_run_is_marked_on_the_data_of_a_student(copy):
    made = subprocess.run([sys.executable, art.ROOT / "docs/teach/mark.py", copy.runs / "toy/default",
                           "--student", "3", "--limit", "4"], capture_output=True, text=True)
    assert json.loads(made.stdout)["rows"].keys() == json.loads(made.stdout)["handed_in"].keys()
