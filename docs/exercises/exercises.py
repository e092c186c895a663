"""Exercises, to be filled in. README.md beside this file has the questions and expected values.

    python docs/exercises/check.py      # which of them are done?

Arrays are numpy arrays with one entry a question; "correct" arrays hold True and False.
"""

import numpy as np  # noqa: F401


def fixed_broken(correct_before, correct_after):
    """1. (incorrect drafts fixed, correct drafts broken), two counts."""
    raise NotImplementedError


def row_asker(p_refine, threshold, correct_draft, correct_refined):
    """2. Accuracy of row `asker`: the refined answer is taken where p_refine >= threshold."""
    raise NotImplementedError


def row_art(p_refine, threshold, score_draft, score_refined, correct_draft, correct_refined):
    """3. As 2, but take the refined answer only if its score is higher than the draft's."""
    raise NotImplementedError


def gap_closed(correct_draft, correct_refined, correct_art):
    """4. ART's gain over the draft, divided by the gain of a perfect choice of the two answers."""
    raise NotImplementedError


def area(p_refine, incorrect_draft):
    """5. AUC: how often does an incorrect draft have a higher p_refine than a correct one?"""
    raise NotImplementedError


def calibration_error(p_refine, incorrect_draft):
    """6. Expected calibration error, in ten bins of equal width: |mean p - share incorrect|."""
    raise NotImplementedError


def sign_test(won, lost):
    """7. Exact two-sided p of McNemar's test, without a library."""
    raise NotImplementedError


def least_net_gain(differing):
    """8. The smallest won - lost with p <= 0.05, if two rows differ on so many questions, or None."""
    raise NotImplementedError


def refining_pays(correct_draft, correct_refined):
    """9. Is fixing rate / breaking rate above correct drafts / incorrect drafts? True or False."""
    raise NotImplementedError


def optimism(p_refine, correct_draft, correct_refined, orders):
    """10. How much better does a threshold look on the questions that it was chosen on?

    Each of the `orders` (arrays of indices) puts the questions into another order. Choose the
    threshold with the best accuracy of row `asker` on its first half. Try each value of p_refine
    there, and infinity; of equally good ones take the smallest. Subtract the accuracy on the second
    half. Return the mean over the orders.
    """
    raise NotImplementedError


def same_answers(answers_draft, answers_refined):
    """11. Share of refined answers that equal the draft's answer; None (unread) equals nothing."""
    raise NotImplementedError


def majority(answers):
    """12. The most frequent answer; of equally frequent ones the first. None does not count."""
    raise NotImplementedError


def hinge(scores, correct, margin=1.0):
    """13. The mean of max(0, margin - (correct - incorrect)) over all pairs; torch tensors."""
    raise NotImplementedError


def prior_back(p, share_incorrect):
    """14. The Asker learned from as many correct as incorrect drafts; now this share is incorrect."""
    raise NotImplementedError


def lora_weights(shapes, rank):
    """15. How many weights does LoRA train beside linear layers with these (outputs, inputs)?"""
    raise NotImplementedError


def numbered(record, subquestions):
    """16. A refinement prompt without the draft, its sub-questions numbered: "1. ...", "2. ..."."""
    raise NotImplementedError
