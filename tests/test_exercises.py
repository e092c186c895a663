"""Every exercise can be solved, and every expected value is true of the shipped runs."""

import check_exercises
import exercises
import solutions


def test_solutions_give_the_expected_values():
    assert set(check_exercises.check(solutions).values()) == {"done"}


def test_stubs_are_not_done_and_the_exercises_are_the_same():
    assert set(check_exercises.check(exercises).values()) == {"not yet"}
    assert check_exercises.check(exercises).keys() == check_exercises.expected().keys()
