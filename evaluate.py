"""Ask, refine and trust over the test split, and the table of who decides, who asks and who chooses.

    python evaluate.py
    python evaluate.py --rows initial,asker,art           # adds to the rows that are there; all: every row
    python evaluate.py --compare default seed1 --row art  # the same row of two runs, question by question

Every model is asked about every question of dev and test (STAGES); then it is worked out, row by row (ROWS), which
answer would have stood. So a row costs nothing once its stages are there. Thresholds are set on dev, to maximise there
the accuracy of the row that uses them. Writes results.json, table.md, records.jsonl and flips.txt to runs/<task>/<run>.
"""

import collections
import functools
import json
import math
from pathlib import Path

import numpy as np

import art

MAX_K = 12  # samples of a test question, at most


def draft(lm, args, records):
    """Step 1 as the drafts are made."""
    return art.predict(lm, args, records, args.draft_temperature)


def refine_gold(lm, args, records, drafts):
    """Step 3 along the gold sub-questions: what would the best Asker bring?"""
    return art.refine(lm, args, records, drafts, [{"subquestions": art.subquestions_of(record)} for record in records])


STAGES = {  # name: the model that is asked, the step, the stages it reads, where it stands in a record
    "draft": ("llm", draft, (), ("candidates", "draft")),
    "ask_self": ("llm", art.ask, ("draft",), ("ask", "self")),
    "refined_self": ("llm", art.refine, ("draft", "ask_self"), ("candidates", "refined_self")),
    "refined_plain": ("llm", art.refine, ("draft",), ("candidates", "refined_plain")),
    "refined_gold": ("llm", refine_gold, ("draft",), ("candidates", "refined_gold")),
    "finetuned": ("finetuned", art.predict, (), ("candidates", "finetuned")),
    "end_to_end": ("end_to_end", art.end_to_end, (), ("candidates", "end_to_end")),
    "ask": ("asker", art.ask, ("draft",), ("ask", "asker")),
    "refined": ("llm", art.refine, ("draft", "ask"), ("candidates", "refined")),
    "trust_self": ("llm", art.trust_self, ("draft", "refined"), ("trust", "self")),
    "trust": ("truster", art.trust, ("draft", "refined"), ("trust", "truster")),
}
# Name: who decides to refine the draft, what then stands in its place, who chooses between the two ("newest": nobody,
# the refinement stands). This applies the rules of art.ask_refine_trust to outputs that are there already.
DEFAULT_ROWS = {
    "initial": ("never", "draft", "newest"),
    "self_refine": ("ask_self", "refined_self", "newest"),
    "refine_always": ("always", "refined", "newest"),
    "asker": ("ask", "refined", "newest"),
    "art": ("ask", "refined", "trust"),
    "random_gate": ("random", "refined", "newest"),  # as many as row asker refines: the mean over all such choices
    "oracle_gate": ("oracle", "refined", "newest"),  # oracle: looks at the gold answer, an upper bound
    "asker_oracle": ("ask", "refined", "oracle"),  # art with a perfect Truster, at the same threshold
    "oracle_choice": ("always", "refined", "oracle"),  # as right as oracle_gate, at the cost of refining all
}
ROWS = DEFAULT_ROWS | {
    "always_truster": ("always", "refined", "trust"),
    "art_untuned": ("ask at 0.5", "refined", "trust"),  # the paper's rule, the likelier word: nothing is set on dev
    "cheap_gate": ("cheap", "refined", "newest"),  # a regression on words and numbers decides
    "self_refine_plain": ("ask_self", "refined_plain", "newest"),
    "asker_plain": ("ask", "refined_plain", "newest"),
    "asker_self": ("ask", "refined", "trust_self"),
    "logprob_choice": ("ask", "refined", "logprob"),  # the text with the higher log-probability in sum
    "gold_questions": ("always", "refined_gold", "newest"),  # an upper bound, too
    "majority": ("always", "majority", "newest"),  # the next three choose among k samples
    "weighted_vote": ("always", "weighted_vote", "newest"),
    "best_of_k": ("always", "best_of_k", "newest"),
    "finetuned": ("always", "finetuned", "newest"),  # stage 1 of the Asker: the small model answers alone
    "end_to_end": ("always", "end_to_end", "newest"),
}
GROUPS = {"the paper's rows": ("initial", "self_refine", "refine_always", "asker", "art"),
          "controls": (*(row for row in ROWS if row not in (*DEFAULT_ROWS, "gold_questions")), "random_gate"),
          "upper bounds, which look at gold": ("oracle_gate", "asker_oracle", "oracle_choice", "gold_questions")}
VOTES = ("majority", "weighted_vote", "best_of_k")
TEST_ALONE = {"finetuned", "end_to_end"}  # stages without a threshold, so nobody asks them about dev


# --- Statistics


def wilson(right, n, z=1.959964):
    """95% interval of a share (Wilson, 1927); `right` may be an expectation.

    >>> [round(x, 4) for x in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def mcnemar(gained, lost):
    """Exact two-sided p of McNemar's test: on how many questions is the one row alone right, on how many the other?

    >>> round(mcnemar(2, 10), 4)
    0.0386
    """
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n) if n else 1.0


def compare(row, other, seed=0):
    """Difference in accuracy of two rows on the same questions: delta, 95% bootstrap interval, exact McNemar p."""
    difference = np.asarray(row, int) - np.asarray(other, int)
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    drawn = np.random.default_rng(seed).multinomial(len(difference), shares, 10_000) @ [-1, 0, 1] / len(difference)
    return {"delta": float(difference.mean()), "ci95": np.percentile(drawn, [2.5, 97.5]).tolist(),
            "p": mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))}


def best_threshold(p, gain):
    """The threshold on `p` (refine at or above it) with the largest sum of `gain`, the middle one among equals.

    >>> best_threshold([0.1, 0.6, 0.9], [-1, 1, 1])
    0.35
    """
    p, gain = np.asarray(p), np.asarray(gain)
    values = np.unique(p)
    cuts = [0.0, *((values[1:] + values[:-1]) / 2), np.nextafter(1, 2)]  # always, between, never
    sums = np.array([gain[p >= cut].sum() for cut in cuts])
    best = np.flatnonzero(sums == sums.max())
    return float(cuts[best[len(best) // 2]])


# --- What the models say, and what follows from it


class Evaluation:
    """Dev and test: what each stage said (asked when it is first needed), which answers are right, what each cost."""

    def __init__(self, run, dev, test):
        self.run, self.args, self.records = run, run.args, dev + test
        self.dev, self.test = slice(len(dev)), slice(len(dev), None)
        self.outputs, self.verdicts = {}, {}

    def __getitem__(self, name):
        """What a stage said, one output a record; None for dev where nobody needs it."""
        if name not in self.outputs:
            model, step, reads, _ = STAGES[name]
            part = self.test if name in TEST_ALONE else slice(None)
            inputs = [self[stage][part] for stage in reads]
            rows = step(self.run.model(model, name), self.args, self.records[part], *inputs)
            self.outputs[name] = [None] * (len(self.records) - len(rows)) + rows
        return self.outputs[name]

    def right(self, name):
        """Which answers of a stage are right: array (n,) of bool."""
        if name not in self.verdicts:
            self.verdicts[name] = np.array([row is not None and art.verdict(self.args.task, row, record["answer"])
                                            for row, record in zip(self[name], self.records)])
        return self.verdicts[name]

    def tokens(self, name):
        """Tokens read and written for each record."""
        return np.array([row["prompt_tokens"] + row.get("tokens", 0) if row else 0 for row in self[name]])

    def p_refine(self, name):
        """The probability of refining that a decider gives."""
        if name == "cheap":
            return self.cheap
        return np.array([row["p_refine"] for row in self["ask" if name == "ask at 0.5" else name]])

    @functools.cached_property
    def cheap(self):
        """p_refine of the cheap gate."""
        return cheap_gate(self)

    def takes(self, chooses, candidate):
        """Would this chooser take the refinement? Array (n,) of bool."""
        if chooses == "newest":
            return np.ones(len(self.records), bool)
        if chooses == "oracle":
            return self.right(candidate) & ~self.right("draft")
        if chooses == "logprob":
            known = [-math.inf if row["logprob"] is None else row["logprob"]
                     for name in (candidate, "draft") for row in self[name]]
            return np.array(known[: len(self.records)]) > np.array(known[len(self.records):])
        return np.array([row["refined"] > row["draft"] for row in self[chooses]])

    def gate(self, row):
        """(decides to refine, takes the refinement), arrays (n,) of bool; and the threshold (--threshold or dev)."""
        decides, candidate, chooses = ROWS[row]
        initial, takes = self.right("draft"), self.takes(chooses, candidate)
        fixed = {"never": np.zeros_like(initial), "always": np.ones_like(initial), "oracle": ~initial}
        if decides in fixed:
            return fixed[decides], fixed[decides] & takes, None
        p, threshold = self.p_refine(decides), 0.5 if decides == "ask at 0.5" else self.args.threshold
        if threshold is None:
            chooser = "trust" if chooses == "oracle" else chooses  # gold may choose, but not move a threshold
            gain = (self.right(candidate).astype(int) - initial) * self.takes(chooser, candidate)
            threshold = best_threshold(p[self.dev], gain[self.dev])
        return p >= threshold, (p >= threshold) & takes, threshold


def cheap_gate(said):
    """p_refine from a logistic regression (L2 = 1) fitted on the training samples: does a trained Asker beat it?

    It sees the question's words that occur in 3 training questions or more, and the draft's length, mean
    log-probability, and whether it was cut off.
    """
    import torch
    args = said.args
    train = art.load_split(args, "train")
    samples = art.load_samples(args, train)
    words = {record["id"]: set(record["question"].lower().split()) for record in train + said.records}
    counts = collections.Counter(word for record in train for word in words[record["id"]])
    index = {word: i for i, (word, n) in enumerate(counts.most_common(2000)) if n >= 3}

    def features(record, row):
        known = np.zeros(len(index) + 3, np.float32)
        known[[index[word] for word in words[record["id"]] & index.keys()]] = 1
        known[-3:] = row["tokens"] / 100, (row["logprob"] or 0) / max(1, row["tokens"]), not row["stopped"]
        return known

    pairs = [(record, row) for record in train for row in samples[record["id"]]["samples"] if not row.get("failed")]
    x = torch.tensor(np.array([features(*pair) for pair in pairs]))
    y = torch.tensor([float(not row["correct"]) for _, row in pairs])
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights[:-1] + weights[-1], y, reduction="sum")
        value = value + 0.5 * weights[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    drafts = torch.tensor(np.array([features(*pair) for pair in zip(said.records, said["draft"])]))
    return (drafts @ weights[:-1] + weights[-1]).sigmoid().detach().double().numpy()


# --- The rows


def asks_of(candidate):
    """The stage whose sub-questions a candidate answers, if any."""
    return {"refined": "ask", "refined_self": "ask_self"}.get(candidate)


def tokens_of(said, row, refine):
    """Tokens a question of test: every step up to the decision, and behind it those for what is refined."""
    decides, candidate, chooses = ROWS[row]
    decides = "ask" if decides == "ask at 0.5" else decides
    before = {"draft", decides, asks_of(candidate)} & STAGES.keys()
    if decides in ("oracle", "cheap", "random"):  # then the Asker is asked only where the draft is refined
        before = {"draft"}
    after = {asks_of(candidate), candidate, chooses} & STAGES.keys() - before
    spent = sum(said.tokens(name)[said.test] for name in before)
    return spent + refine * sum(said.tokens(name)[said.test] for name in after)


def make_row(said, row):
    """(figures of a row on test, which of its answers are right)."""
    decides, candidate, chooses = ROWS[row]
    initial, better = said.right("draft")[said.test], said.right(candidate)[said.test]
    old, new = said["draft"][said.test], said[candidate][said.test]
    if candidate in TEST_ALONE:
        return {**counts(new, better, initial), "tokens": float(said.tokens(candidate)[said.test].mean())}, better
    if decides == "random":
        share = said.gate("asker")[0][said.test].mean()
        right = (1 - share) * initial + share * better
        return {"accuracy": float(right.mean()), "ci95": wilson(right.sum(), len(right)), "n": len(right),
                "threshold": None, "refined": float(share), "tokens": float(tokens_of(said, row, share).mean())}, right
    refine, take, threshold = said.gate(row)
    refine, take = refine[said.test], take[said.test]
    right = np.where(take, better, initial)
    same = [a["answer"] == b["answer"] for a, b, refined in zip(old, new, refine) if refined]
    answers = [b if taken else a for a, b, taken in zip(old, new, take)]
    return {**counts(answers, right, initial), "threshold": threshold, "refined": float(refine.mean()),
            "same_answer": float(np.mean(same)) if same else None,
            "tokens": float(tokens_of(said, row, refine).mean())}, right


def counts(answers, right, initial):
    """Accuracy, and what became of the answers of a row; who decides by a threshold overwrites the first two."""
    return {"threshold": None, "refined": None,
            "accuracy": float(right.mean()), "ci95": wilson(right.sum(), len(right)), "n": len(right),
            "mended": int((right & ~initial).sum()), "broken": int((~right & initial).sum()),
            "unparsed": sum(one["answer"] is None and one["stopped"] for one in answers),
            "cut_off": sum(not one["stopped"] and not one.get("failed") for one in answers),
            "failed": sum(bool(one.get("failed")) for one in answers)}


def vote_row(said, row, budget):
    """A row that chooses among the first k samples: --vote-k, or the first k that costs what `art` does, MAX_K at most.

    On --vote-limit questions. As many samples are drawn as that cost needs by the tokens of the drafts.
    """
    args, records = said.args, said.records[said.test][: said.args.vote_limit]
    draft = np.mean([one["tokens"] for one in said["draft"][said.test][: len(records)]])
    budget = math.inf if args.vote_k else budget
    most = args.vote_k or (MAX_K if budget == math.inf else min(MAX_K, max(2, math.ceil(budget / draft))))
    samples = art.sample_answers(said.run.model("llm", "samples of test"), args, records, most, args.temperature)
    scores = score_samples(said, records, samples) if row != "majority" else [None] * len(records)
    initial, curve = said.right("draft")[said.test][: len(records)], []
    while not curve or curve[-1]["k"] < most and curve[-1]["tokens"] < budget:
        k = len(curve) + 1
        chosen = [pick(row, several[:k], several_scores) for several, several_scores in zip(samples, scores)]
        right = np.array([art.verdict(args.task, one, record["answer"]) for one, record in zip(chosen, records)])
        tokens = [vote_tokens(several[:k], several_scores) for several, several_scores in zip(samples, scores)]
        curve.append({"k": k, "accuracy": float(right.mean()), "tokens": float(np.mean(tokens))})
    return {**counts(chosen, right, initial), **curve[-1], "curve": curve}, right


def score_samples(said, records, samples):
    """The Truster's scores of the samples of each question: lists of rows."""
    prompts = [art.trust_prompt(record, one["text"]) for record, several in zip(records, samples) for one in several]
    scored = iter(said.run.model("truster", "trust samples").score(prompts))
    return [[next(scored) for _ in several] for several in samples]


def vote_tokens(samples, scores):
    """Tokens of some samples of a question, whose prompt is read once, and of their scores."""
    read = samples[0]["prompt_tokens"] + sum(score["prompt_tokens"] for score in (scores or ())[: len(samples)])
    return read + sum(one["tokens"] for one in samples)


def pick(row, samples, scores):
    """The sample that stands: the Truster's favourite, or the first with the most votes, each of 1 or exp(score)."""
    if row == "best_of_k":
        return max(zip(samples, scores), key=lambda pair: pair[1]["score"])[0]
    votes = collections.defaultdict(float)
    for one, score in zip(samples, scores or [{"score": 0.0}] * len(samples)):
        if one["answer"] is not None and one["stopped"]:
            votes[one["answer"]] += math.exp(score["score"])
    best = max(votes, key=votes.get, default=None)
    return next((one for one in samples if one["stopped"] and one["answer"] == best), samples[0])


def make_rows(said, wanted, kept):
    """({row: what results.json says}, {row: which answers are right}, {row: why it is left out}).

    `wanted` rows may ask the models. `kept` ones stood in the table before: they stay if nothing has to be asked.
    """
    made, right, lacking = {}, {}, {}
    rows = [row for row in ROWS if row in wanted or row in kept]
    for row in sorted(rows, key=lambda row: (row in VOTES, row not in wanted)):  # a vote may cost what art costs
        said.run.offline = row not in wanted
        try:
            if row in VOTES:
                budget = made["art"]["tokens"] if "art" in made else math.inf
                figures, right[row] = vote_row(said, row, budget)
            else:
                figures, right[row] = make_row(said, row)
            made[row] = {**dict(zip(("decides", "candidate", "chooses"), ROWS[row])), "row": row,
                         "strategy": said.args.strategy, **figures}
        except art.Missing as stage:
            lacking[row] = f"its answers ({stage}) are not those of today's settings: ask them with --rows {row}"
        except art.UserError as error:
            if row in wanted and not optional(row, said.args):
                raise
            lacking[row] = str(error)
    said.run.offline = False
    for row, about in made.items():
        for other in ("initial", "self_refine"):
            if other in made and row not in (other, "random_gate"):
                about[f"vs_{other}"] = compare(right[row], right[other][: about["n"]], said.args.seed)
    return {row: made[row] for row in ROWS if row in made}, right, lacking


def optional(row, args):
    """May a row be left out with a line? If it was not named, and needs a model that is not trained by default."""
    return args.rows == "all" and row in ("finetuned", "end_to_end")


# --- What is written


def table(results):
    """results.json as a Markdown table of six columns, rows in groups."""
    made = {row["row"]: row for row in results["rows"]}
    lines = ["| row | right (95%) | against the draft (95%) | mended | broken | tokens |", "| --- " * 6 + "|"]
    for group, names in GROUPS.items():
        if names := [name for name in names if name in made]:
            lines.append(f"| *{group}* | | | | | |")
        for row in (made[name] for name in names):
            share = "{:.1%} ({:.1%} to {:.1%})".format(row["accuracy"], *row["ci95"])
            share += f", n = {row['n']}" * (row["n"] != results["n"])
            versus = row.get("vs_initial")
            delta = "{:+.1%} ({:+.1%} to {:+.1%})".format(versus["delta"], *versus["ci95"]) if versus else "-"
            lines.append(f"| {row['row']} | {share} | {delta} | {art.show(row.get('mended'), 'd')} | "
                         f"{art.show(row.get('broken'), 'd')} | {row['tokens']:,.0f} |")
    return "\n".join(lines) + "\n"


def sentences(results):
    """What the table says, a line each."""
    made = {row["row"]: row for row in results["rows"]}
    n = results["n"]
    lines = [f"{n:,} test questions; thresholds set on {results['n_dev']:,} others (dev). Mended, broken: wrong drafts "
             "made right, right drafts made wrong. Tokens: read and written by all models, a question."]
    if {"initial", "self_refine", "art"} <= made.keys():
        a, b = made["art"]["vs_initial"], made["art"]["vs_self_refine"]
        lines.append(f"ART gains {a['delta']:+.1%} over the draft (p = {a['p']:.2g}) and {b['delta']:+.1%} over "
                     f"self-refinement (p = {b['p']:.2g}); it refines {made['art']['refined']:.0%} of the drafts.")
    if "oracle_gate" in made:
        lines.append(f"With these refinements a perfect decision, or a perfect choice, would end at "
                     f"{made['oracle_gate']['accuracy']:.1%}.")
    if results["auc"]:
        areas = ", ".join(f"{name} {art.show(value, '.3f')}" for name, value in results["auc"].items())
        lines.append(f"AUC of the decision (0.5 is a coin): {areas}.")
    if rates := results.get("rates"):
        dev, test = rates["dev"], rates["test"]
        lines.append(f"Refining pays if mending/breaking exceeds right/wrong drafts (arXiv 2604.22273): dev "
                     f"{dev['mending']:.0%}/{dev['breaking']:.0%} against {dev['odds']:.2f} predicts "
                     f"{'a gain' if dev['pays'] else 'a loss'} of refine_always; test {test['mending']:.0%}/"
                     f"{test['breaking']:.0%} against {test['odds']:.2f}: {'a gain' if test['pays'] else 'a loss'}.")
    for kind in ("unparsed", "cut_off", "failed"):
        if any(row.get(kind) for row in results["rows"]):
            counted = ", ".join(f"{row['row']} {row[kind]}" for row in results["rows"] if row.get(kind))
            lines.append(f"{kind.replace('_', ' ').capitalize()}, and so wrong: {counted}.")
            if kind == "cut_off" and made.get("initial", {}).get(kind, 0) > 0.02 * n:
                lines.append("More than 2% of the drafts were cut off: raise --max-new-tokens.")
    for row in results["rows"]:
        if "curve" in row:
            points = ", ".join(f"{point['accuracy']:.1%}" for point in row["curve"])
            lines.append(f"{row['row']} with 1 to {row['k']} samples: {points}.")
    if len(results["machines"]) > 1:
        lines.append(f"Answers of different machines are mixed here: {', '.join(results['machines'])}.")
    lines += [f"Left out: {row}; {why}." for row, why in results["lacking"].items()]
    return "\n".join(filter(None, lines)) + "\n"


def kinds_table(said, right):
    """Share and accuracies by kind of question, where the task tells the kinds; "" otherwise."""
    kinds = [record.get("kind") for record in said.records[said.test]]
    if None in kinds or not {"initial", "refine_always", "art"} <= right.keys():
        return ""
    lines = ["| kind of question | share | draft | refined | ART |", "| --- " * 5 + "|"]
    for kind in sorted(set(kinds)):
        of = np.array([one == kind for one in kinds])
        cells = [f"{right[row][of].mean():.0%}" for row in ("initial", "refine_always", "art")]
        lines.append(f"| {kind} | {of.mean():.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def rates(said, part):
    """Mending and breaking rate of refining every draft, and whether it pays."""
    initial, better = said.right("draft")[part], said.right("refined")[part]
    if initial.all() or not initial.any():
        return None
    mending, breaking = (float(x) for x in (better[~initial].mean(), (~better)[initial].mean()))
    odds = float(initial.mean() / (1 - initial.mean()))
    return {"mending": mending, "breaking": breaking, "odds": odds, "pays": mending > breaking * odds}


def flips(said, right, each=10):
    """The questions on which `art` changed the verdict of a draft, broken ones first: the best reading of a run."""
    parts = {"broken": [], "mended": []}
    columns = [said[name][said.test] for name in ("draft", "ask", "refined", "trust")]
    initial = said.right("draft")[said.test]
    for record, old, asked, new, score, was, now in zip(said.records[said.test], *columns, initial, right):
        if was != now:
            parts["mended" if now else "broken"].append("\n".join([
                record["id"], record["question"], "-- draft", old["text"],
                f"-- sub-questions (p_refine {asked['p_refine']:.2f})", *asked["subquestions"],
                f"-- refined (Truster: {score['draft']:.2f} -> {score['refined']:.2f})", new["text"],
                f"-- gold {record['answer']}", "", ""]))
    return "".join(f"==== {name}: {len(found)}, the first {min(each, len(found))}\n\n" + "".join(found[:each])
                   for name, found in parts.items())


def as_records(said, right):
    """The records of test, enriched by what each stage said and by which row was right."""
    made = []
    for i, record in enumerate(said.records[said.test], said.dev.stop):
        row = {**record, "candidates": {}, "ask": {}, "trust": {}}
        for name, (_, _, _, (part, key)) in STAGES.items():
            if name in said.outputs:
                drop = ("settings", "prompt", "call", "number", "on", "seconds")
                row[part][key] = {k: v for k, v in said[name][i].items() if k not in drop}
        row["right"] = {name: bool(column[i - said.dev.stop]) for name, column in right.items()
                        if name != "random_gate" and i - said.dev.stop < len(column)}
        made.append(row)
    return made


def compare_runs(args):
    """Finished runs (names or folders): every row side by side, and the paired difference of --row in the first two."""
    runs, paths = [], []
    for name in args.compare:
        path = next((p for p in (args.runs / args.task / name, Path(name)) if (p / "results.json").is_file()), None)
        if path is None:
            raise art.UserError(f"no results.json of {name}: make it with: python evaluate.py --task {args.task} "
                                f"--run {name}")
        paths.append(path)
        runs.append({row["row"]: row for row in json.loads((path / "results.json").read_text("utf-8"))["rows"]})
    lines = [f"| row | {' | '.join(args.compare)} | mean | range |", "| --- " * (3 + len(runs)) + "|"]
    for row in [row for row in ROWS if all(row in run for run in runs)]:
        shares = [run[row]["accuracy"] for run in runs]
        cells = [f"{share:.1%}" for share in [*shares, np.mean(shares)]]
        lines.append(f"| {row} | {' | '.join(cells)} | {min(shares):.1%} to {max(shares):.1%} |")
    print("\n".join(lines))
    if len(runs) > 1:
        print(paired(args, *(art.load_run(path) for path in paths[:2])))


def paired(args, first, second):
    """The difference of --row in two runs, given as columns, on the questions that both have."""
    name = f"right.{args.row}"
    if list(first["id"]) != list(second["id"]):
        raise art.UserError("the runs are not on the same test questions: a paired difference needs that")
    if name not in first or name not in second:
        raise art.UserError(f"row {args.row} is not in both runs: add it with evaluate.py --rows {args.row}")
    both = [(old, new) for old, new in zip(first[name], second[name]) if old is not None and new is not None]
    made = compare([new for _, new in both], [old for old, _ in both], args.seed)
    return "\n{}, {} against {}: {:+.1%} ({:+.1%} to {:+.1%}), exact McNemar p = {:.3g}, n = {:,}".format(
        args.row, args.compare[1], args.compare[0], made["delta"], *made["ci95"], made["p"], len(both))


def parse_args():
    parser = art.make_parser(__doc__)
    add = parser.add_argument_group("evaluation").add_argument
    add("--rows", help=f"comma-separated, of {', '.join(ROWS)}, or all (default {', '.join(DEFAULT_ROWS)})")
    add("--compare", nargs="+", metavar="RUN", help="only compare finished runs, by name or folder")
    add("--row", default="art", choices=[row for row in ROWS if row != "random_gate"],
        help="the row that --compare compares question by question (default art)")
    add("--threshold", type=float, help="decide by this threshold on p_refine, in the place of the one set on dev")
    add("--asker-from", metavar="RUN", help="take Asker and finetuned of this run (of another task: ../TASK/RUN)")
    add("--truster-from", metavar="RUN", help="take the Truster of this run")
    add("--vote-k", type=art.positive, metavar="K", help="samples of a test question (default: what costs as much as "
                                                         f"art, {MAX_K} at most)")
    add("--vote-limit", type=art.positive, metavar="N", help="the rows that vote on the first N test questions alone")
    args = art.parse(parser)
    names = ROWS if args.rows == "all" else args.rows.split(",") if args.rows else DEFAULT_ROWS
    if unknown := set(names) - ROWS.keys():
        raise art.UserError(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}, all")
    return args, list(names)


def refuse_leaks(run, test):
    """Adapters that were trained on questions of test would make the table worthless."""
    for name in ("finetuned", "asker", "end_to_end", "truster"):
        path = run.adapter(name) / "questions.txt"
        seen = set(path.read_text("utf-8").split()) if path.is_file() else set()
        if leaked := [record["id"] for record in test if art.question_hash(record) in seen]:
            raise art.UserError(f"{run.adapter(name)} was trained on {len(leaked)} of the test questions, as "
                                f"{leaked[0]}: train an adapter on other questions")


def main():
    args, wanted = parse_args()
    if args.compare:
        return compare_runs(args)
    run = art.Run(args)
    dev, test = art.load_split(args, "dev"), art.load_split(args, "test")
    refuse_leaks(run, test)
    adapters = [run.about(name) for name in ("asker", "truster") if (run.adapter(name) / "args.json").is_file()]
    models = {about["model"]: about["bits"] for about in adapters} | ({} if args.base_url else {args.model: args.bits})
    art.announce_needs(models, kv_gib=args.kv_gib)
    art.banner(4, 5, f"{len(dev):,} questions of dev and {len(test):,} of test through the steps")
    path = run.folder / "results.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": []}
    said = Evaluation(run, dev, test)
    made, right, lacking = make_rows(said, wanted, {row["row"] for row in before["rows"]})
    wrong = ~said.right("draft")[said.test]
    deciders = {"Asker": "ask", "the LLM itself": "ask_self", "cheap gate": "cheap" if "cheap_gate" in made else ""}
    results = {
        "task": args.task, "llm": args.model, "n": len(test), "n_dev": len(dev), "seed": args.seed,
        "settings": {key: getattr(args, key, None) for key in art.LLM_KEYS},
        "rows": list(made.values()), "lacking": lacking,
        "auc": {name: art.auc(said.p_refine(stage)[said.test], wrong) for name, stage in deciders.items()
                if stage in said.outputs or stage == "cheap"},
        "machines": sorted(set().union(*(model.machines for model in run.models.values()))),
        "training": {name: run.about(name) for name in ("asker", "truster", "finetuned", "end_to_end")
                     if (run.adapter(name) / "args.json").is_file()},
        **art.provenance()}
    if "refined" in said.outputs and rates(said, said.dev) and rates(said, said.test):
        results["rates"] = {"dev": rates(said, said.dev), "test": rates(said, said.test)}
    art.write(run.folder / "records.jsonl", as_records(said, right))
    if "art" in made:
        art.write(run.folder / "flips.txt", flips(said, right["art"]))
    text = table(results) + "\n" + kinds_table(said, right) + sentences(results)
    art.write(run.folder / "table.md", text)
    art.write(path, results)
    art.banner(5, 5, f"who decides, who asks, who chooses\n\n{text}")
    print(f"Read {run.folder / 'flips.txt'}: what ART broke and mended.\nTry next: python art.py solve --task "
          f"{args.task} --random; python evaluate.py --task {args.task} --rows all")
    art.log_start(args, run)


if __name__ == "__main__":
    art.run(main)
