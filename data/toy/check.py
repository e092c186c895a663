"""Does the toy have to be read? Compares finished runs with simple baselines, question by question.

    make seeds                                                 # runs default, seed1 and seed2
    python data/toy/check.py default seed1 seed2               # some minutes a run

Trains one more Asker, in the run "blanked": it never sees a draft. Its AUC tells what the question
alone reveals.
"""

import random
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
from prepare import SPLITS, draw_problem, solve

import art
import evaluate
import train_asker


def measure(args):
    """{what is measured: value} of a finished run, on test."""
    dev, test = art.load_split(args, "dev"), art.load_split(args, "test")
    outputs = evaluate.Outputs(args, dev, test)
    rows = {name: evaluate.ROWS[name] for name in (
        *evaluate.DEFAULT_ROWS, "art_untuned", "finetuned", "weighted_vote", "best_of_k")}
    outputs.ask({"draft", "logprob", "refined_gold"}.union(
        *map(evaluate.stages_of, rows.values())))
    correct = {name: evaluate.make_row(outputs, row)[1] for name, row in rows.items()}
    correct["word_pair_gate"] = word_pair_gate(outputs)
    found = {name: correct[name].mean() for name in correct}
    for other in [name for name in correct if name != "art"]:
        found[f"art minus {other}"] = found["art"] - found[other]
    found["McNemar p, art against always_truster"] = evaluate.compare(
        correct["art"], correct["always_truster"])["p"]

    drafts, refined = (outputs.correct[stage][outputs.test] for stage in ("draft", "refined"))
    takes = outputs.takes("refined", "truster")[outputs.test]
    gold = outputs.correct["refined_gold"][outputs.test]
    found["refined with gold sub-questions"] = gold.mean()
    found["refined with misread sub-questions"] = with_misread(args, outputs, test)
    found["Truster keeps what was fixed"] = takes[~drafts & refined].mean()
    found["Truster rejects what was broken"] = (~takes)[drafts & ~refined].mean()
    for gate in ("ask", "ask_self", "logprob"):
        p = outputs.column(gate, "p_refine")[outputs.test]
        found[f"AUC of gate {gate}"] = art.auc(p, ~drafts)
    found["AUC of the blanked Asker"] = art.auc(blanked_asker(args, test), ~drafts)
    baseline = max(found["AUC of gate logprob"], found["AUC of the blanked Asker"])
    found["AUC of gate ask minus the best of both"] = found["AUC of gate ask"] - baseline
    return found


def word_pair_gate(outputs):
    """Row word_gate with two words that are both in the question, or not: the best pair on dev."""
    bags = [set(record["question"].casefold().split()) for record in outputs.records]
    words = sorted(set().union(*bags[outputs.dev]))
    has = np.array([[word in bag for word in words] for bag in bags], float)
    gain = outputs.gain(evaluate.ROWS["word_gate"], None)
    both = has[outputs.dev].T @ (gain[outputs.dev, None] * has[outputs.dev])  # gain of each pair
    sums = np.stack([both, gain[outputs.dev].sum() - both])
    unless, first, second = np.unravel_index(sums.argmax(), sums.shape)
    refine = (has[:, first] * has[:, second] == 1) != bool(unless)
    return np.where(refine, outputs.correct["refined"], outputs.correct["draft"])[outputs.test]


def with_misread(args, outputs, test):
    """The accuracy of refined answers with sub-questions that fall into the trap."""
    rng, wanted = random.Random(f"toy test {args.test_seed}"), {one["question"] for one in test}
    problems = {}  # of the test questions, drawn again
    for _ in range(20 * len(test)):
        problem = draw_problem(rng)
        problems[problem.text()] = problem
    if not wanted <= problems.keys():
        raise art.UserError("these are not the test questions of this seed: give --test-seed")
    asked = []
    for record in test:
        solution, _ = solve(problems[record["question"]], trapped=True)
        asked.append({"subquestions": [subquestion for subquestion, _ in solution]})
    drafts = outputs.of["draft"][outputs.test]
    refined = art.refine(outputs.model("llm", "with misread"), args, test, drafts, asked)
    return np.mean([one["finished"] and art.is_correct(args.task, one["text"], record["answer"])
                    for one, record in zip(refined, test)])


def blanked_asker(args, test):
    """p_refine of an Asker that is trained as the kit's, but sees no draft."""
    prompt = art.ask_prompt
    art.ask_prompt = lambda record, draft: prompt(record, "")
    where = ["--runs", str(args.runs), "--data", str(args.data), "--run", "blanked"]
    try:
        sys.argv = ["train_asker.py", *where]
        train_asker.main()
        blanked = art.parse(art.make_parser("", "evaluate"), where)
        asker = art.open_model(blanked, "asker")
        asker.label = "blanked"
        asked = art.ask(asker, args, test, [{"text": ""}] * len(test))
    finally:
        art.ask_prompt = prompt
    return [output["p_refine"] for output in asked]


def main():
    parser = art.make_parser(__doc__, "evaluate")
    parser.add_argument("names", nargs="+", metavar="RUN", help="finished runs")
    parser.add_argument("--test-seed", type=int, default=SPLITS["test"][1],
                        help="the seed that data/toy/prepare.py was given")
    names, words, found = parser.parse_args().names, sys.argv[1:], []
    for name in names:
        found.append(measure(art.parse(parser, [*words, "--run", name])))
    print(f"\n| measured | {' | '.join(names)} |\n" + "| --- " * (len(names) + 1) + "|")
    for what in found[0]:
        print(f"| {what} | {' | '.join(f'{one[what]:.3g}' for one in found)} |")


if __name__ == "__main__":
    art.run(main)
