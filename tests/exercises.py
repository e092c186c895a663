"""Exercises, to be filled in. docs/exercises.md has the questions, hints and expected values.

    python tests/check_exercises.py     # which of them are done?

Arrays are numpy arrays with one entry a question; "right" arrays hold True and False.
"""


def mended_broken(right_before, right_after):
    """1. (wrong answers made right, right answers made wrong), two counts."""
    raise NotImplementedError


def row_asker(p_refine, threshold, right_draft, right_refined):
    """2. Accuracy of row `asker`: refine where p_refine is at least the threshold, the refinement stands."""
    raise NotImplementedError


def row_art(p_refine, threshold, score_draft, score_refined, right_draft, right_refined):
    """3. Accuracy of row `art`: as above, but the answer with the higher score stands; the draft, if they are equal."""
    raise NotImplementedError


def gap_closed(right_draft, right_refined, right_art):
    """4. Which share of the way from the draft to a perfect choice between draft and refinement does ART go?"""
    raise NotImplementedError


def area(p_refine, wrong_draft):
    """5. AUC: the chance that a wrong draft has a higher p_refine than a right one, ties half."""
    raise NotImplementedError


def calibration_error(p_refine, wrong_draft):
    """6. Expected calibration error in ten bins of equal width: the mean over questions of |mean p - share wrong|."""
    raise NotImplementedError


def sign_test(won, lost):
    """7. Exact two-sided p of McNemar's test, without a library."""
    raise NotImplementedError


def least_net_gain(differing):
    """8. If two rows differ on so many questions: the least (won - lost) with p <= 0.05; None if there is none."""
    raise NotImplementedError


def refining_pays(right_draft, right_refined):
    """9. True if mending rate / breaking rate exceeds right drafts / wrong drafts (arXiv 2604.22273)."""
    raise NotImplementedError


def optimism(p_refine, right_draft, right_refined):
    """10. Choose the best threshold on the first half of the questions: row `asker` there minus on the others.

    The threshold is one of the values of p_refine there (the smallest among equally good ones), or infinity.
    """
    raise NotImplementedError


def same_answers(answers_draft, answers_refined):
    """11. Share of the refinements with the same answer as the draft; None (nothing could be read) equals nothing."""
    raise NotImplementedError


def majority(answers):
    """12. The answer that most samples give, the earliest among equals; None counts for nothing."""
    raise NotImplementedError


def hinge(scores, correct, margin=1.0):
    """13. Another loss for the Truster: mean over all pairs of max(0, margin - (chosen - rejected)); torch tensors."""
    raise NotImplementedError


def prior_back(p, share_wrong):
    """14. The Asker learned on as many right as wrong drafts. p_refine, when in truth `share_wrong` are wrong."""
    raise NotImplementedError


def lora_weights(shapes, rank):
    """15. How many weights does LoRA train beside linear layers of these (outputs, inputs)?"""
    raise NotImplementedError


def numbered(record, subquestions):
    """16. A refinement prompt without the draft, whose sub-questions are numbered: "1. ...", "2. ..."."""
    raise NotImplementedError
