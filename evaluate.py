"""Run the steps on the dev and test questions, and print the table of results.

    python evaluate.py
    python evaluate.py --rows finetuned,majority     # add rows to the table (all: every row)
    python evaluate.py --threshold 0.2,0.5,0.8       # row art at these thresholds, one row each
    python evaluate.py --compare default seed1       # row art of two runs, question by question
    python evaluate.py --compare default --row art --against majority     # two rows of one run

A STAGE is a step done for all dev and test questions. A ROW is a rule over them: its GATE says
which drafts to refine, its CHOOSER which answer to take. Thresholds and weights are set on dev.
Writes results.json, table.md, records.jsonl (test) and dev.jsonl to runs/TASK/RUN.
"""

import collections
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import art

# --- Stages: functions (model, args, records, *outputs of the stages they read) -> outputs


def draft(llm, args, records):
    """Step 1 at the temperature of the drafts."""
    return art.predict(llm, args, records, args.draft_temperature)


def second_sample(llm, args, records):
    """The draft's prompt again, at --refine-temperature (0.7 if that is 0: greedy may repeat)."""
    drawn = art.sample_answers(llm, args, records, [1], args.refine_temperature or 0.7)
    return [output for [output] in drawn]


def refine_gold(llm, args, records, drafts):
    """Step 3 with the gold sub-questions: what would the best Asker bring?"""
    asked = [{"subquestions": art.gold_subquestions(record)} for record in records]
    return art.refine(llm, args, records, drafts, asked)


def logprob_gate(_, args, records, drafts):
    """Improbable drafts first: -log p of the whole text, squeezed to 0..1. No model is asked."""
    surprises = [-(output["logprob"] or 0.0) for output in drafts]
    return [{"p_refine": s / (1 + s), "failed": ""} for s in surprises]


def samples(llm, args, records):
    """--k samples of each question, as {"samples": list of outputs}."""
    drawn = art.sample_answers(llm, args, records, range(args.k), args.temperature)
    return [{"samples": own, "tokens": sum(output["tokens"] for output in own),
             "prompt_tokens": own[0]["prompt_tokens"]} for own in drawn]


def score_samples(truster, args, records, drawn):
    """The Truster's scores of the samples, as {"scores": list}."""
    repeated = [record for record in records for _ in range(args.k)]
    scored = art.trust(truster, args, repeated, [one for own in drawn for one in own["samples"]])
    groups = [scored[start: start + args.k] for start in range(0, len(scored), args.k)]
    return [{"scores": [one["score"] for one in own],
             "prompt_tokens": sum(one["prompt_tokens"] for one in own)} for own in groups]


def vote(_, args, records, drawn, scored=None, key=lambda sample: sample["answer"]):
    """For each question the first readable sample of the group with the most votes.

    Samples with the same `key` are a group (best_of_k: each). A sample has exp(score) votes, or one.
    """
    chosen = []
    for own, scores in zip(drawn, scored or [{"scores": [0.0] * args.k}] * len(drawn)):
        votes = collections.Counter()
        for sample, score in zip(own["samples"], scores["scores"]):
            votes[key(sample)] += art.is_readable(sample) * math.exp(score)
        best = max(own["samples"], key=lambda one: (art.is_readable(one), votes[key(one)]))
        chosen.append({**best, "tokens": 0, "prompt_tokens": 0})  # stage "samples" counts them
    return chosen


@dataclass
class Stage:
    model: str | None  # "llm" or the name of an adapter; None: no model is asked
    step: object  # a function
    reads: tuple = ()  # other stages


STAGES = {  # in this order, so that models are seldom loaded again
    "draft": Stage("llm", draft),
    "second": Stage("llm", second_sample),
    "samples": Stage("llm", samples),
    "ask_self": Stage("llm", art.ask, reads=("draft",)),
    "refined_self": Stage("llm", art.refine, reads=("draft", "ask_self")),
    "refined_gold": Stage("llm", refine_gold, reads=("draft",)),
    "finetuned": Stage("finetuned", art.predict),
    "ask": Stage("asker", art.ask, reads=("draft",)),
    "refined": Stage("llm", art.refine, reads=("draft", "ask")),
    "score_draft": Stage("truster", art.trust, reads=("draft",)),
    "score_refined": Stage("truster", art.trust, reads=("refined",)),
    "score_second": Stage("truster", art.trust, reads=("second",)),
    "score_samples": Stage("truster", score_samples, reads=("samples",)),
    "logprob": Stage(None, logprob_gate, reads=("draft",)),
    "majority": Stage(None, vote, reads=("samples",)),
    "weighted_vote": Stage(None, vote, reads=("samples", "score_samples")),
    "best_of_k": Stage(None, lambda *read: vote(*read, key=id), reads=("samples", "score_samples")),
}

# --- Rows: the rules of art.ask_refine_trust, applied to outputs that are there already


@dataclass
class Row:
    """Gate below the threshold: the draft. Else the chooser takes the draft or the other answer."""

    gate: str = "always"  # or "never", "word", "random", "oracle", or a stage with p_refine
    answer: str = "refined"  # the stage of the answer that may replace the draft
    chooser: str | None = None  # "truster", "logprob", "both", "oracle"; None: takes the other
    threshold: float | None = None  # of a stage; None: set on dev


ROWS = {
    "draft": Row(gate="never", answer="draft"),
    "self_refine": Row(gate="ask_self", answer="refined_self"),  # the LLM is its own Asker
    "refine_always": Row(),  # with the Asker's sub-questions
    "asker": Row(gate="ask"),  # ART without a Truster
    "art": Row(gate="ask", chooser="truster"),  # the paper's loop
    "art_both": Row(gate="ask", chooser="both"),
    # art_both with a second sample in place of the refined answer: does asking help?
    "second_sample": Row(gate="ask", answer="second", chooser="both"),
    "always_truster": Row(chooser="truster"),
    "always_logprob": Row(chooser="logprob"),
    "logprob_gate": Row(gate="logprob"),
    "word_gate": Row(gate="word"),  # one word, found on dev, decides: can it replace the Asker?
    "random_gate": Row(gate="random"),  # as often as asker, at random: what is expected
    "oracle_choice": Row(chooser="oracle"),  # oracle: looks at gold, an upper bound
}
DEFAULT_ROWS = list(ROWS)
ROWS |= {
    "art_untuned": Row(gate="ask", chooser="truster", threshold=0.5),  # as in the paper
    "art_logprob": Row(gate="ask", chooser="logprob"),
    "oracle_gate": Row(gate="oracle"),
    "asker_oracle": Row(gate="ask", chooser="oracle"),  # at the threshold of art
    "gold_questions": Row(answer="refined_gold"),  # looks at gold, too
    "finetuned": Row(answer="finetuned"),  # the Asker's base answers, after task training
    "majority": Row(answer="majority"),
    "weighted_vote": Row(answer="weighted_vote"),
    "best_of_k": Row(answer="best_of_k"),
}


def with_reads(names):
    """The stages among the names, and all stages that these read."""
    found = STAGES.keys() & names
    return found.union(*(with_reads(STAGES[name].reads) for name in found))


def stages_of(row):
    """The stages that a row needs."""
    names = {row.answer, row.gate}
    if row.chooser or row.gate != "always":
        names.add("draft")
    if row.chooser in ("truster", "both") or (row.gate, row.chooser) == ("ask", "oracle"):
        names |= {"score_draft", f"score_{row.answer}"}
    return with_reads(names)


def adapters_of(row):
    """The adapters that a row needs."""
    return {STAGES[stage].model for stage in stages_of(row)} - {"llm", None}


# --- Statistics

Z = 1.959964  # for 95%


def wilson(correct, n):
    """95% confidence interval of a share (Wilson, 1927). `correct` may be an expected number.

    >>> [round(bound, 4) for bound in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    p, z = correct / n, Z * Z / n
    middle, half = p + z / 2, math.sqrt(z * (p * (1 - p) + z / 4))
    return [max(0, middle - half) / (1 + z), min(1, (middle + half) / (1 + z))]


def mcnemar(won, lost):
    """Exact McNemar: how often do fair coins split won + lost at least as unevenly?"""
    n, least = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


def compare(new, old):
    """Two rows on the same questions: {"delta", "ci95", "p", "won", "lost", "n"}.

    ci95: the adjusted Wald interval for paired shares (Bonett and Price, 2012).
    """
    change = np.asarray(new, int) - np.asarray(old, int)
    won, lost, n = int((change > 0).sum()), int((change < 0).sum()), len(change)
    a, b = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    bounds = [round(max(-1, a - b - half), 4), round(min(1, a - b + half), 4)]
    return {"delta": (won - lost) / n, "ci95": bounds, "p": mcnemar(won, lost), "won": won,
            "lost": lost, "n": n}


def best_threshold(p, gain):
    """The threshold on `p` with the largest sum of `gain`; among equal ones the middle one.

    >>> best_threshold([0.1, 0.6, 0.9], [-1, 1, 1])
    0.35
    """
    p, gain = np.asarray(p), np.asarray(gain)
    values = np.unique(p[~np.isnan(p)])
    between = (values[1:] + values[:-1]) / 2
    cuts = [0.0, *between, math.nextafter(1, 2)]  # always, between two values, never
    sums = np.array([gain[p >= cut].sum() for cut in cuts])
    best = np.flatnonzero(sums == sums.max())
    return float(cuts[best[len(best) // 2]])


def logistic_weights(x, y):
    """Weights (d,) of a logistic regression, no constant, ridge 1; x (n, d), y (n,) bool."""
    weights = np.zeros(x.shape[1])
    for _ in range(50):  # Newton's method; the problem is convex
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x.T * (p * (1 - p))) @ x + np.eye(len(weights))
        weights -= np.linalg.solve(curvature, x.T @ (p - y) + weights)
    return weights


# --- What the models gave: arrays (n,) have one entry a question, dev first, then test


class Outputs:
    """The outputs of the stages on dev and test, and what gates and choosers make of them."""

    def __init__(self, args, dev, test):
        self.args, self.records = args, dev + test
        self.dev, self.test = slice(len(dev)), slice(len(dev), None)
        self.of, self.correct, self.models = {}, {}, {}  # stage: outputs; stage: array of bool
        self.word = None  # of the word gate

    def ask(self, stages):
        """Ask the models of these stages, in the order of STAGES."""
        for name, stage in STAGES.items():
            if name in stages:
                model = stage.model and self.model(stage.model, name)
                read = [self.of[other] for other in stage.reads]
                self.of[name] = made = stage.step(model, self.args, self.records, *read)
                if "text" in made[0]:
                    self.correct[name] = np.array([
                        output["finished"] and art.is_correct(self.args.task, output["text"],
                                                              record["answer"])
                        for output, record in zip(made, self.records)], bool)

    def model(self, name, label):
        """A model, opened once. `label` says in the progress line what it is asked."""
        if name not in self.models:
            self.models[name] = art.open_model(self.args, name)
        self.models[name].label = label
        return self.models[name]

    def column(self, stage, key):
        """One value of every output of a stage; None becomes nan."""
        return np.array([output.get(key, 0) for output in self.of[stage]], float)

    def tokens(self, stages):
        """The tokens that these stages read and wrote for each question."""
        return sum(self.column(one, key) for one in stages for key in ("prompt_tokens", "tokens"))

    def gain(self, row, chooser):
        """+1 where the answer that the chooser takes fixes the draft, -1 where it breaks it."""
        change = self.correct[row.answer].astype(int) - self.correct["draft"]
        return change * self.takes(row.answer, chooser)

    def gate(self, row):
        """The gate's p_refine, from 0 to 1."""
        known = {"always": 1.0, "never": 0.0, "oracle": ~self.correct["draft"]}
        if row.gate in known:
            return np.zeros(len(self.records)) + known[row.gate]
        if row.gate != "word":
            return self.column(row.gate, "p_refine")
        # refine if (or unless) one word is in the question: the word with the largest gain on dev
        bags = [set(re.findall(r"\w+", record["question"].casefold())) for record in self.records]
        words = sorted(set().union(*bags[self.dev]))
        has = np.array([[word in bag for word in words] for bag in bags])
        has = np.hstack([has, ~has])
        best = int(np.argmax(self.gain(row, row.chooser)[self.dev] @ has[self.dev]))
        self.word = ("if " if best < len(words) else "unless ") + words[best % len(words)]
        return has[:, best].astype(float)

    def margin(self, answer, chooser):
        """How much a chooser prefers an answer to the draft; above 0: it takes the answer."""
        if chooser == "oracle":
            return self.correct[answer].astype(float) - self.correct["draft"]
        if chooser == "truster":
            return self.column(f"score_{answer}", "score") - self.column("score_draft", "score")
        if chooser == "logprob":  # the mean of a token
            new, old = (self.column(stage, "logprob") / np.maximum(1, self.column(stage, "tokens"))
                        for stage in (answer, "draft"))
            return new - old
        if chooser == "both":
            return self.both(answer)
        raise art.UserError(f"no chooser {chooser} in Outputs.margin")

    def both(self, answer):
        """The margins of Truster and log-probability, divided by their deviations, weighed on dev.

        The weights are fitted where just one answer is correct. No log-probabilities: Truster.
        """
        truster, logprob = (self.margin(answer, chooser) for chooser in ("truster", "logprob"))
        if np.isnan(logprob).all():
            return truster
        margins = [truster, np.nan_to_num(logprob)]  # nan: an answer failed
        x = np.stack([margin / (margin[self.dev].std() or 1) for margin in margins], axis=1)
        correct = self.correct[answer][self.dev]
        changed = correct != self.correct["draft"][self.dev]
        weights = logistic_weights(x[self.dev][changed], correct[changed])
        return x @ (weights if changed.any() else [1, 1])

    def takes(self, answer, chooser):
        """Does the chooser take this answer? An array of bool."""
        if chooser is None:
            return np.ones(len(self.records), bool)
        answers = zip(self.of["draft"], self.of[answer], self.margin(answer, chooser))
        return np.array([art.better_answer(old, new, 0, margin) is new
                         for old, new, margin in answers])

    def decide(self, row):
        """(refine, take, threshold): two arrays of bool, and the threshold on p_refine."""
        p, threshold = self.gate(row), row.threshold
        if row.gate in STAGES and threshold is None:  # asker_oracle has art's threshold
            gain = self.gain(row, "truster" if row.chooser == "oracle" else row.chooser)
            threshold = best_threshold(p[self.dev], gain[self.dev])
        refine = p >= threshold if row.gate in STAGES else p > 0
        return refine, refine & self.takes(row.answer, row.chooser), threshold


def make_row(outputs, row):
    """(figures of a row on test, which of its answers are correct)."""
    test, drafts, other = outputs.test, outputs.correct["draft"], outputs.correct[row.answer]
    refine, take, threshold = outputs.decide(ROWS["asker"] if row.gate == "random" else row)
    if row.gate == "random":  # expected if each question is refined so often
        refine = take = np.full(len(drafts), refine[test].mean())
        correct, threshold = (1 - take) * drafts + take * other, None
    else:
        gates = outputs.of.get(row.gate, [{"failed": ""}] * len(drafts))
        correct = np.where(take, other, drafts) & [not gate["failed"] for gate in gates]
    # all questions pay for draft and gate, refined ones for the other stages, too
    stages = stages_of(row)
    before = stages & with_reads({"draft", row.gate})
    tokens = outputs.tokens(before) + refine * outputs.tokens(stages - before)
    figures = {"accuracy": float(correct[test].mean()),
               "ci95": wilson(correct[test].sum(), len(correct[test])), "threshold": threshold,
               "refined": float(refine[test].mean()), "tokens": float(tokens[test].mean())}
    if row.gate != "random":
        answers = zip(outputs.of["draft"], outputs.of[row.answer], take, gates)
        answers = [gate if gate["failed"] else new if taken else old
                   for old, new, taken, gate in answers][test]
        answered = [one for one in answers if not one["failed"]]
        figures["fixed"] = int((correct & ~drafts)[test].sum())
        figures["broken"] = int((~correct & drafts)[test].sum())
        figures["failed"] = len(answers) - len(answered)
        figures["cut_off"] = sum(not one["finished"] for one in answered)
        figures["unread"] = sum(one["finished"] and one["answer"] is None for one in answered)
    return figures, correct[test]


def aucs(outputs):
    """AUC on test. Gates: is the draft incorrect? Choosers: where one is correct, which one?"""
    test, drafts, found = outputs.test, outputs.correct["draft"], {}
    for stage in sorted(outputs.of.keys() & {"ask", "ask_self", "logprob"}):
        p = outputs.column(stage, "p_refine")[test]
        found[f"gate {stage}"] = art.auc(p[p >= 0], ~drafts[test][p >= 0])  # nan: failed
    if "score_refined" in outputs.of:
        refined = outputs.correct["refined"][test]
        changed = refined != drafts[test]
        for chooser in ("truster", "logprob", "both"):
            margin = np.nan_to_num(outputs.margin("refined", chooser)[test])
            found[f"chooser {chooser}"] = art.auc(margin[changed], refined[changed])
    return found


# --- What is printed and written


def difference(pair):
    """A paired difference in points."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*np.multiply(100, [pair["delta"], *pair["ci95"]]))


def table(results):
    """results.json as Markdown: the rows, and what can be said of them."""
    rows = {row["row"]: row for row in results["rows"]}
    lines = ["| row | correct (95%) | points over the draft (95%) | fixed | broken | tokens |",
             "| --- " * 6 + "|"]
    for name, row in rows.items():
        share = "{:.1%} ({:.1%} to {:.1%})".format(row["accuracy"], *row["ci95"])
        gain = difference(row["vs_draft"]) if "vs_draft" in row else "-"
        lines.append(f"| {name} | {share} | {gain} | {row.get('fixed', '-')} | "
                     f"{row.get('broken', '-')} | {row['tokens']:,.0f} |")
    lines += ["", f"{results['n']:,} test questions; thresholds and weights from "
              f"{results['n_dev']:,} dev questions; tokens read and written for a question."]
    for other, found in results["art_vs"].items():
        lines.append(f"ART gains {difference(found)} points over {other} (exact McNemar p = "
                     f"{found['p']:.2g}, won {found['won']}, lost {found['lost']}).")
    if "art" in rows:
        lines.append(f"ART refines {rows['art']['refined']:.1%} of the drafts: threshold "
                     f"{rows['art']['threshold']:.3f}.")
    found = [f"{name} {value:.3f}" for name, value in results["auc"].items() if value is not None]
    lines.append(f"AUC (0.5 is a coin): {', '.join(found) or 'none'}.")
    for kind in ("cut_off", "unread", "failed"):
        found = [f"{name} {row[kind]}" for name, row in rows.items() if row.get(kind)]
        if found:
            lines.append(f"Incorrect because {kind.replace('_', ' ')}: {', '.join(found)}.")
    return "\n".join([*lines, ""])


def as_records(outputs, part, correct):
    """{**record, stage: its output, ..., "correct": {row: bool}} for each record of dev or test."""
    records = []
    for number, record in enumerate(outputs.records[part]):
        stages = {name: made[part][number] for name, made in outputs.of.items()}
        own = {row: bool(column[number]) for row, column in correct.items() if row != "random_gate"}
        records.append({**record, **stages, "correct": own})
    return records


def compare_runs(args):
    """Print the rows of finished runs side by side, and a paired difference."""
    runs = []
    for name in args.compare:
        folder = args.shared / name if (args.shared / name).is_dir() else Path(name)
        fix = f"run python evaluate.py --task {args.task} --run {name}, or give a folder"
        runs.append(art.read_jsonl(folder / "records.jsonl", fix))
    print(f"| row | {' | '.join(args.compare)} |\n{'| --- ' * (1 + len(runs))}|")
    for row in runs[0][0]["correct"]:
        if all(row in run[0]["correct"] for run in runs):
            shares = [f"{np.mean([r['correct'][row] for r in run]):.1%}" for run in runs]
            print(f"| {row} | {' | '.join(shares)} |")
    first, second, old, new = runs[0], runs[:2][-1], args.against or args.row, args.row
    if [record["id"] for record in first] != [record["id"] for record in second]:
        raise art.UserError("a paired difference needs runs on the same test questions")
    if old not in first[0]["correct"] or new not in second[0]["correct"]:
        raise art.UserError(f"no row {old} or {new}: add it by --rows, art@T by --threshold T")
    found = compare([r["correct"][new] for r in second], [r["correct"][old] for r in first])
    print(f"\n{new} of {args.compare[:2][-1]} minus {old} of {args.compare[0]}: "
          f"{difference(found)} points, exact McNemar p = {found['p']:.3g}, won {found['won']}, "
          f"lost {found['lost']}, n = {found['n']:,}")


def parse_args():
    """(args, {name: Row} of the wanted rows)."""
    parser = art.make_parser(__doc__, "evaluate")
    add = parser.add_argument
    add("--rows", default=",".join(DEFAULT_ROWS), metavar="ROW,...",
        help=f"rows to add to earlier ones: all, or some of {', '.join(ROWS)}")
    add("--threshold", default="", metavar="T,...", help="also row art at these thresholds")
    add("--compare", nargs="+", metavar="RUN", help="only compare finished runs (names, folders)")
    add("--row", default="art", metavar="ROW", help="the row to compare (art)")
    add("--against", metavar="ROW", help="compare with this row of the first run")
    add("--asker-from", metavar="RUN", help="use the Asker of this run")
    add("--truster-from", metavar="RUN", help="use the Truster of this run")
    args = art.parse(parser)
    names = set(ROWS if args.rows == "all" else args.rows.split(","))
    if unknown := names - ROWS.keys():
        raise art.UserError(f"no row {', '.join(sorted(unknown))}: --rows takes {', '.join(ROWS)}")
    old = {row["row"] for row in art.read_json(args.folder / "results.json").get("rows", [])}
    rows = {name: row for name, row in ROWS.items() if name in names | old}  # old rows stay
    texts = {name[4:] for name in old if "@" in name} | {*args.threshold.split(",")}
    for text in sorted(filter(None, texts)):
        if not re.fullmatch(r"0?\.\d+|[01](\.0*)?", text) or float(text) > 1:
            raise art.UserError(f"--threshold: {text} is not a number from 0 to 1")
        rows[f"art@{text}"] = Row(gate="ask", chooser="truster", threshold=float(text))
    return args, rows


def check_adapters(args, rows, test):
    """Refuse missing adapters before anything is asked, and adapters trained on test questions."""
    names = sorted(set().union(*map(adapters_of, rows.values())))
    commands = dict.fromkeys(filter(None, [art.how_to_train(args, name) for name in names]))
    if commands:
        free = ",".join(name for name, row in ROWS.items() if not adapters_of(row))
        raise art.UserError(f"adapters are missing: run {' and '.join(commands)}, or give "
                            f"--asker-from, --truster-from; the rows {free} need none (--rows)")
    for name in names:
        seen = (art.adapter_folder(args, name) / "questions.txt").read_text("utf-8").split()
        if leaked := [record["id"] for record in test if art.question_hash(record) in seen]:
            raise art.UserError(f"the adapter {name} was trained on {len(leaked)} of the test "
                                f"questions, for example {leaked[0]}: train on other questions")


def main():
    args, rows = parse_args()
    if args.compare:
        return compare_runs(args)
    dev, test = art.load_split(args, "dev"), art.load_split(args, "test")
    if not any(map(art.gold_subquestions, test)):
        rows.pop("gold_questions", None)
    if art.read_json(art.adapter_folder(args, "asker") / "args.json").get("start", 1) is None:
        rows.pop("finetuned", None)  # no task training
    check_adapters(args, rows, test)
    print(f"{len(dev):,} dev and {len(test):,} test questions", flush=True)
    outputs = Outputs(args, dev, test)
    outputs.ask({"draft", "logprob"}.union(*map(stages_of, rows.values())))

    figures, correct = [], {}
    for name, row in rows.items():
        found, correct[name] = make_row(outputs, row)
        figures.append({"row": name, **found})
        if "draft" in correct and name not in ("draft", "random_gate"):
            figures[-1]["vs_draft"] = compare(correct[name], correct["draft"])
    results = {"task": args.task, "n": len(test), "n_dev": len(dev), "seed": args.seed,
               "settings": {key: getattr(args, key) for key in art.LLM_KEYS},
               "from": [args.asker_from, args.truster_from],
               **art.provenance(), "rows": figures, "auc": aucs(outputs),
               "word_gate": outputs.word}
    results["art_vs"] = {row: compare(correct["art"], correct[row])
                         for row in ("draft", "self_refine") if {row, "art"} <= correct.keys()}
    art.write(args.folder / "records.jsonl", as_records(outputs, outputs.test, correct))
    drafts = {"draft": outputs.correct["draft"]}
    art.write(args.folder / "dev.jsonl", as_records(outputs, outputs.dev, drafts))
    art.write(args.folder / "table.md", text := table(results))
    art.write(args.folder / "results.json", results)
    print(f"\n{text}")


if __name__ == "__main__":
    art.run(main)
