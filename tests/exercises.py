"""Exercises, to be filled in. docs/exercises.md has the questions, hints and expected values.

    python tests/check_exercises.py     # which of them are done?

Arrays are numpy arrays with one entry a question; "correct" arrays hold True and False.
"""


def fixed_broken(correct_before, correct_after):
    """1. (incorrect drafts fixed, correct drafts broken), two counts."""
    raise NotImplementedError


def row_asker(p_refine, threshold, correct_draft, correct_refined):
    """2. Accuracy of row `asker`: refine where p_refine is at least the threshold, the refined answer is taken."""
    raise NotImplementedError


def row_art(p_refine, threshold, score_draft, score_refined, correct_draft, correct_refined):
    """3. Accuracy of row `art`: as above, but take the answer with the higher score; the draft if they are equal."""
    raise NotImplementedError


def gap_closed(correct_draft, correct_refined, correct_art):
    """4. Which share of the way from the draft to a perfect choice between draft and refined answer does ART go?"""
    raise NotImplementedError


def area(p_refine, incorrect_draft):
    """5. AUC: the probability that an incorrect draft has a higher p_refine than a correct one, ties half."""
    raise NotImplementedError


def calibration_error(p_refine, incorrect_draft):
    """6. Expected calibration error, ten bins of equal width: the mean of |mean p - share incorrect|."""
    raise NotImplementedError


def sign_test(won, lost):
    """7. Exact two-sided p of McNemar's test, without a library."""
    raise NotImplementedError


def least_net_gain(differing):
    """8. If two rows differ on so many questions: the least (won - lost) with p <= 0.05; None if there is none."""
    raise NotImplementedError


def refining_pays(correct_draft, correct_refined):
    """9. True if fixing rate / breaking rate exceeds correct drafts / incorrect drafts (arXiv 2604.22273)."""
    raise NotImplementedError


def optimism(p_refine, correct_draft, correct_refined):
    """10. Choose the best threshold on the first half of the questions: row `asker` there minus on the others.

    The threshold is one of the values of p_refine there (the smallest among equally good ones), or infinity.
    """
    raise NotImplementedError


def same_answers(answers_draft, answers_refined):
    """11. Share of the refined answers equal to the draft's answer; None (unread) equals nothing."""
    raise NotImplementedError


def majority(answers):
    """12. The answer that most samples give, the earliest among equals; None counts for nothing."""
    raise NotImplementedError


def hinge(scores, correct, margin=1.0):
    """13. Another loss for the Truster: mean over all pairs of max(0, margin - (chosen - rejected)); torch tensors."""
    raise NotImplementedError


def prior_back(p, share_incorrect):
    """14. The Asker saw as many correct as incorrect drafts. p_refine if `share_incorrect` are incorrect."""
    raise NotImplementedError


def lora_weights(shapes, rank):
    """15. How many weights does LoRA train beside linear layers of these (outputs, inputs)?"""
    raise NotImplementedError


def numbered(record, subquestions):
    """16. A refinement prompt without the draft, whose sub-questions are numbered: "1. ...", "2. ..."."""
    raise NotImplementedError
