"""One solution of each exercise. The expected values come from these."""

import collections
import math

import numpy as np

import art


def fixed_broken(correct_before, correct_after):
    return (~correct_before & correct_after).sum(), (correct_before & ~correct_after).sum()


def row_asker(p_refine, threshold, correct_draft, correct_refined):
    return np.where(p_refine >= threshold, correct_refined, correct_draft).mean()


def row_art(p_refine, threshold, score_draft, score_refined, correct_draft, correct_refined):
    takes = (p_refine >= threshold) & (score_refined > score_draft)
    return np.where(takes, correct_refined, correct_draft).mean()


def gap_closed(correct_draft, correct_refined, correct_art):
    best = (correct_draft | correct_refined).mean()
    return (correct_art.mean() - correct_draft.mean()) / (best - correct_draft.mean())


def area(p_refine, incorrect_draft):
    wrong, right = p_refine[incorrect_draft], p_refine[~incorrect_draft]
    return np.mean([(w > r) + 0.5 * (w == r) for w in wrong for r in right])


def calibration_error(p_refine, incorrect_draft):
    bins = np.minimum((p_refine * 10).astype(int), 9)
    error = 0.0
    for inside in (bins == number for number in set(bins)):
        error += inside.mean() * abs(p_refine[inside].mean() - incorrect_draft[inside].mean())
    return error


def sign_test(won, lost):
    n = won + lost
    tail = sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def least_net_gain(differing):
    gains = [2 * won - differing for won in range(differing // 2, differing + 1)
             if sign_test(won, differing - won) <= 0.05]
    return min(gains, default=None)


def refining_pays(correct_draft, correct_refined):
    fixing = correct_refined[~correct_draft].mean()
    breaking = (~correct_refined)[correct_draft].mean()
    return fixing / breaking > correct_draft.mean() / (~correct_draft).mean()


def optimism(p_refine, correct_draft, correct_refined, orders):
    def accuracy(order, threshold):
        return row_asker(p_refine[order], threshold, correct_draft[order], correct_refined[order])

    gaps = []
    for order in orders:
        first, second = np.split(order, [len(order) // 2])
        thresholds = [*np.unique(p_refine[first]), math.inf]
        best = max(thresholds, key=lambda threshold: accuracy(first, threshold))  # noqa: B023
        gaps.append(accuracy(first, best) - accuracy(second, best))
    return np.mean(gaps)


def same_answers(answers_draft, answers_refined):
    return np.mean([a == b and a is not None for a, b in zip(answers_draft, answers_refined)])


def majority(answers):
    votes = collections.Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.get, default=None)


def hinge(scores, correct, margin=1.0):
    gaps = scores[correct][:, None] - scores[~correct][None, :]
    return (margin - gaps).clamp(min=0).mean()


def prior_back(p, share_incorrect):
    return p * share_incorrect / (p * share_incorrect + (1 - p) * (1 - share_incorrect))


def lora_weights(shapes, rank):
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes)


def numbered(record, subquestions):
    lines = [f"{number}. {line}" for number, line in enumerate(subquestions, 1)]
    return art.question_block(record) + "\n".join(["Sub-questions:", *lines, "Revised answer:", ""])
