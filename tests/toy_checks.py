"""Does the toy have to be read? Measures what it promises on finished runs, against the targets.

    make seeds                                                # runs default, seed1, seed2: minutes each
    python tests/toy_checks.py default seed1 seed2            # four minutes a run

What has to be asked beyond evaluate.py is kept beside the other answers, so a second start costs seconds. An Asker that
never sees a draft is trained into the run "blanked".
"""

import argparse
import collections
import contextlib
import io
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import load

import art
import evaluate
import train_asker

prepare = load("data/toy/prepare.py")  # data/prepare.py has the same name
TARGETS = {  # what is measured: at least, at most
    "initial": (0.40, 0.60),
    "refine_always mends": (0.70, 1), "refine_always breaks": (0.15, 0.30),
    "Asker's AUC": (None, None), "AUC of words and word pairs": (None, None), "AUC of the blanked Asker": (None, None),
    "Asker's AUC minus the stronger of both": (0.15, 1),
    "one right, one wrong sample of a question: in order": (0.90, 1),
    "gold solution as the draft: p_refine of 0.5 or more": (0, 0.10),
    "refined along gold sub-questions": (None, None), "refined along misread ones": (None, None),
    "gold minus misread sub-questions": (0.10, 1),
    "Truster keeps what was mended": (0.90, 1), "Truster refuses what was broken": (0.80, 1),
    "of 8 refinements along gold one is right, worst kind": (0.90, 1),
    "self_refine": (None, None), "refine_always": (None, None), "asker": (None, None), "art": (None, None),
    "art minus initial": (0.10, 1), "art minus self_refine": (0.05, 1), "art minus refine_always": (0.03, 1),
    "art minus asker": (0.01, 1),
    "decomp": (None, None), "art minus decomp": (0, 1),
    "the LLM's own AUC": (None, None), "greedy drafts": (None, None),
    "solve gives the table's answer, 20 questions asked anew": (1, 1),
}


def measure(args):
    """{what is measured: value} of a finished run."""
    run = art.Run(args)
    dev, test = art.load_split(args, "dev"), art.load_split(args, "test")
    outputs = evaluate.Outputs(run, dev, test)
    made = {row: evaluate.make_row(outputs, row)[0]["accuracy"] for row in evaluate.DEFAULT_ROWS}
    right, refined = outputs.right("draft")[outputs.test], outputs.right("refined")[outputs.test]
    found = {name: made[name] for name in ("initial", "self_refine", "refine_always", "asker", "art")}
    found |= {f"art minus {name}": made["art"] - made[name] for name in found if name != "art"}
    rates = evaluate.rates(outputs, outputs.test)
    found |= {"refine_always mends": rates["mending"], "refine_always breaks": rates["breaking"]}
    takes = outputs.takes("trust", "refined")[outputs.test]
    found |= {"Truster keeps what was mended": takes[~right & refined].mean(),
              "Truster refuses what was broken": (~takes)[right & ~refined].mean()}
    found |= asker_figures(outputs, run, test, ~right)
    found |= llm_figures(run, args, dev, test)
    found["solve gives the table's answer, 20 questions asked anew"] = solved(outputs, run, test[:20])
    found["art minus decomp"] = made["art"] - found["decomp"]
    return found


def asker_figures(outputs, run, test, wrong):
    """What the Asker's decision is worth, and what the question alone is worth."""
    args, asker = run.args, run.model("asker")
    golds = [{"text": art.solution_text(record["solution"], record["answer"])} for record in test]
    on_gold = [row["p_refine"] for row in art.ask(asker, args, test, golds)]
    area, words, blanked = (art.auc(p, wrong) for p in (
        outputs.column("ask", "p_refine")[outputs.test], word_gate(outputs), blanked_asker(run, test)))
    return {"Asker's AUC": area, "AUC of words and word pairs": words, "AUC of the blanked Asker": blanked,
            "Asker's AUC minus the stronger of both": area - max(words, blanked),
            "the LLM's own AUC": art.auc(outputs.column("ask_self", "p_refine")[outputs.test], wrong),
            "one right, one wrong sample of a question: in order": pairs_in_order(run, args, test),
            "gold solution as the draft: p_refine of 0.5 or more": np.mean(np.array(on_gold) >= 0.5)}


def pairs_in_order(run, args, test):
    """Share of the pairs of a right and a wrong sample of one test question whose wrong one has the higher p_refine."""
    samples = art.sample_answers(run.model("llm", "samples of test"), args, test, 2, args.temperature)
    rights = [[art.verdict(args.task, one, record["answer"]) for one in pair] for record, pair in zip(test, samples)]
    mixed = [i for i, pair in enumerate(rights) if sum(pair) == 1]
    drafts = [samples[i][rights[i].index(kind)] for kind in (True, False) for i in mixed]
    asked = art.ask(run.model("asker", "pairs"), args, [test[i] for i in mixed] * 2, drafts)
    low, high = np.array([row["p_refine"] for row in asked]).reshape(2, -1)
    return np.mean((low < high) + 0.5 * (low == high))


def word_gate(outputs):
    """p_refine from the question's words and neighbouring pairs of words: a logistic regression on training samples.

    Its L2 is the best on dev.
    """
    import torch
    train = art.load_split(outputs.args, "train")
    samples = art.load_samples(outputs.args, train)

    def parts(record):
        words = record["question"].lower().split()
        return {*words, *zip(words, words[1:])}

    counts = collections.Counter(part for record in train for part in parts(record))
    index = {part: i for i, part in enumerate(part for part, n in counts.items() if n >= 3)}

    def features(records):
        x = torch.zeros(len(records), len(index))
        for row, record in enumerate(records):
            x[row, [index[part] for part in parts(record) & index.keys()]] = 1
        return x

    x, drafts, wrong = features(train), features(outputs.records), ~outputs.right("draft")
    y = torch.tensor([np.mean([not one["correct"] for one in samples[r["id"]]["samples"]]) for r in train]).float()
    fitted = [evaluate.logistic_regression(x, y, l2)[:-1] for l2 in (0.3, 1, 3, 10, 30)]
    gates = [(drafts @ weights).numpy() for weights in fitted]  # an intercept does not change the order
    return max(gates, key=lambda gate: art.auc(gate[outputs.dev], wrong[outputs.dev]))[outputs.test]


def blanked_asker(run, test):
    """p_refine of an Asker that is trained as the kit's, but sees no draft."""
    parser = art.make_parser("", "asker")
    parser.add_argument("--task-epochs", type=float)
    args = art.parse(parser, ["--run", "blanked", "--runs", str(run.args.runs), "--data", str(run.args.data)])
    other, tokenizer = art.Run(args), art.load_tokenizer(args.asker_model)
    train = art.load_split(args, "train")
    drafts = train_asker.drafts_of(train, art.load_samples(args, train))
    drafts = [(record, "", correct) for record, _, correct in drafts]
    asked = {record["id"]: art.subquestions_of(record) for record in train}
    train_asker.train(other, "finetuned", train, train_asker.task_examples(train, tokenizer, "decomp"),
                      args.task_epochs, strategy="decomp")
    train_asker.train(other, "asker", train, train_asker.ask_examples(drafts, asked, tokenizer), args.epochs,
                      "finetuned", prior_odds=1.0)
    return [row["p_refine"] for row in art.ask(other.model("asker"), run.args, test, [{"text": ""}] * len(test))]


def llm_figures(run, args, dev, test):
    """What the LLM does with good and with bad sub-questions, and what it can do."""
    llm = run.model("llm")
    drafts = art.predict(llm, args, test, args.draft_temperature)
    problems = problems_of(test, args.test_seed)
    misread = [[line for line, _ in prepare.solve(problem, True)[0]] for problem in problems]
    along = {"gold": [art.subquestions_of(record) for record in test], "misread": misread}

    def share_right(made):
        return np.mean([art.verdict(args.task, one, record["answer"]) for one, record in zip(made, test)])

    share = {name: share_right(art.refine(llm, args, test, drafts, [{"subquestions": one} for one in lines]))
             for name, lines in along.items()}
    decomp = argparse.Namespace(**{**vars(args), "strategy": "decomp"})
    return {"refined along gold sub-questions": share["gold"], "refined along misread ones": share["misread"],
            "gold minus misread sub-questions": share["gold"] - share["misread"],
            "of 8 refinements along gold one is right, worst kind": worst_kind(llm, args, dev),
            "decomp": share_right(art.predict(llm, decomp, test, args.draft_temperature)),
            "greedy drafts": share_right(art.predict(llm, args, test, 0.0))}


def problems_of(records, seed):
    """The problems behind the records of test, drawn again."""
    rng, found = random.Random(f"toy test {seed}"), {}
    wanted = {record["question"] for record in records}
    for _ in range(20 * len(records)):
        problem = prepare.draw_problem(rng)
        found[problem.text()] = problem
    if not wanted <= found.keys():
        sys.exit("these are not the test questions of this seed: give --test-seed")
    return [found[record["question"]] for record in records]


def worst_kind(llm, args, dev):
    """In each kind: on how many questions of dev is one of 8 refinements along gold sub-questions right? The least."""
    prompts = [art.refine_prompt(record, "", art.subquestions_of(record), show_draft=False) for record in dev]
    made = art.solutions(llm, args, llm.render(prompts), 8, args.temperature)
    shares = {}
    for record, several in zip(dev, made):
        hit = any(art.verdict(args.task, one, record["answer"]) for one in several)
        shares.setdefault(record["kind"], []).append(hit)
    return min(np.mean(hits) for hits in shares.values())


def solved(outputs, run, questions):
    """Share of the questions that `solve` gives the answer of row art, with line breaks and nothing known before."""
    takes, same = outputs.gate("art")[1][outputs.test], []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run.folder, Path(folder) / run.args.task / run.args.run)
        for number, record in enumerate(questions):
            stage = "refined" if takes[number] else "draft"
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                art.solve(argparse.Namespace(**{**vars(run.args), "runs": Path(folder), "random": False,
                                                "question": "\n" + record["question"].replace(". ", ".\n\n  ")}))
            same.append(f"  answer: {outputs[stage][outputs.test][number]['answer']}\n" in said.getvalue())
    return np.mean(same)


def line(name, values):
    """A row of the table: target, measured in each run, met in every one?"""
    low, high = TARGETS[name]
    target = "-" if low is None else f"{low:.0%} or more" if high == 1 else f"{low:.0%} to {high:.0%}"
    met = "" if low is None else "yes" if all(low <= value <= high for value in values) else "NO"
    return f"| {name} | {target} | {' | '.join(f'{value:.1%}' for value in values)} | {met} |"


def main():
    parser = art.make_parser(__doc__)
    parser.add_argument("names", nargs="+", metavar="RUN", help="finished runs")
    parser.add_argument("--test-seed", type=int, default=prepare.SPLITS["test"][1], help="that test was drawn with")
    names, words, found = parser.parse_args().names, sys.argv[1:], []
    for name in names:
        args = art.parse(parser, [*words, "--run", name])
        args.rows = args.asker_from = args.truster_from = args.threshold = None
        found.append(measure(args))
    print(f"\n| measured | target | {' | '.join(names)} | met |\n" + "| --- " * (len(found) + 3) + "|")
    for name in TARGETS:
        print(line(name, [one[name] for one in found]))


if __name__ == "__main__":
    art.run(main)
