"""Ask, refine and trust over the test split, and the table of who decides, who asks and who chooses.

    python evaluate.py
    python evaluate.py --rows initial,asker,art           # adds to the rows that are there; all: every row
    python evaluate.py --compare default seed1 --row art  # the same row of two runs, question by question
    python evaluate.py --compare default --row art --against majority   # two rows of a run

Every model is asked about every question of dev and test (STAGES); then it is worked out, row by row (ROWS), which
answer would have stood. So a row costs nothing once its stages are there. Thresholds are set on dev, to maximise there
the accuracy of the row that uses them. Writes results.json, table.md, records.jsonl (of test), dev.jsonl and flips.txt
to runs/<task>/<run>.
"""

import collections
import json
import math
import sys
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


def cheap_gate(lm, args, records, drafts):
    """p_refine from a logistic regression (L2 = 1) fitted on the training samples: does a trained Asker beat it?

    It sees the question's words that occur in 3 training questions or more, and the draft's length, mean
    log-probability, and whether it was cut off.
    """
    import torch
    train = art.load_split(args, "train")
    sampled = art.load_samples(args, train)
    counts = collections.Counter(word for record in train for word in sorted(set(record["question"].lower().split())))
    vocabulary = [word for word, count in counts.most_common(2000) if count >= 3]

    def features(questions, answers):
        words = [set(record["question"].lower().split()) for record in questions]
        return torch.tensor(np.array([np.array(
            [*(word in own for word in vocabulary), answer["tokens"] / 100,
             (answer["logprob"] or 0) / max(1, answer["tokens"]), not answer["stopped"]], np.float32)
            for own, answer in zip(words, answers)]))

    pairs = [(record, sample) for record in train for sample in sampled[record["id"]]["samples"]
             if not sample.get("failed")]
    x, wrong = features(*zip(*pairs)), torch.tensor([float(not sample["correct"]) for _, sample in pairs])
    weights = logistic_regression(x, wrong)
    p = (features(records, drafts) @ weights[:-1] + weights[-1]).sigmoid().double().tolist()
    return [{"p_refine": value, "prompt_tokens": 0} for value in p]


def logistic_regression(x, y, l2=1.0):
    """Weights (features + 1,) that predict y (n,), 0 to 1, from x (n, features); the last, the intercept, has no L2."""
    import torch
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        value = value + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weights.detach()


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
    "cheap": (None, cheap_gate, ("draft",), ("ask", "cheap")),  # no model: a regression on words and numbers
}
# Name: who decides to refine the draft, what then stands in its place, who chooses between the two ("refinement":
# nobody, it stands). This applies the rules of art.ask_refine_trust to outputs that are there already.
DEFAULT_ROWS = {
    "initial": ("never", "draft", "refinement"),
    "self_refine": ("ask_self", "refined_self", "refinement"),
    "refine_always": ("always", "refined", "refinement"),
    "asker": ("ask", "refined", "refinement"),
    "art": ("ask", "refined", "trust"),
    "random_gate": ("random", "refined", "refinement"),  # as many as row asker refines: the mean over all such choices
    "oracle_gate": ("oracle", "refined", "refinement"),  # oracle: looks at the gold answer, an upper bound
    "asker_oracle": ("ask", "refined", "oracle"),  # art with a perfect Truster, at the same threshold
    "oracle_choice": ("always", "refined", "oracle"),  # as right as oracle_gate, at the cost of refining all
}
ROWS = DEFAULT_ROWS | {
    "always_truster": ("always", "refined", "trust"),
    "art_untuned": ("ask at 0.5", "refined", "trust"),  # the paper's rule, the likelier word: nothing is set on dev
    "cheap_gate": ("cheap", "refined", "refinement"),
    "self_refine_plain": ("ask_self", "refined_plain", "refinement"),
    "asker_plain": ("ask", "refined_plain", "refinement"),
    "asker_self": ("ask", "refined", "trust_self"),
    "logprob_choice": ("ask", "refined", "logprob"),  # the text with the higher log-probability in sum
    "gold_questions": ("always", "refined_gold", "refinement"),  # an upper bound, too
    "majority": ("always", "majority", "refinement"),  # the next three choose among k samples
    "weighted_vote": ("always", "weighted_vote", "refinement"),
    "best_of_k": ("always", "best_of_k", "refinement"),
    "finetuned": ("always", "finetuned", "refinement"),  # stage 1 of the Asker: the small model answers alone
    "end_to_end": ("always", "end_to_end", "refinement"),
}
GROUPS = {"the paper's rows": ("initial", "self_refine", "refine_always", "asker", "art"),
          "controls": (*(row for row in ROWS if row not in (*DEFAULT_ROWS, "gold_questions")), "random_gate"),
          "upper bounds, which look at gold": ("oracle_gate", "asker_oracle", "oracle_choice", "gold_questions")}
ADAPTERS = ("asker", "truster", "finetuned", "end_to_end")
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


def mcnemar(won, lost):
    """Exact two-sided p of McNemar's test: on how many questions is the one row alone right, on how many the other?

    >>> round(mcnemar(2, 10), 4)
    0.0386
    """
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n) if n else 1.0


def compare(row, other, seed=0):
    """Difference in accuracy of two rows on the same questions: delta, 95% bootstrap interval, exact McNemar p.

    "won": questions on which `row` alone is right; "lost": on which `other` alone is.
    """
    difference = np.asarray(row, int) - np.asarray(other, int)
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    drawn = np.random.default_rng(seed).multinomial(len(difference), shares, 10_000) @ [-1, 0, 1] / len(difference)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return {"delta": float(difference.mean()), "ci95": np.percentile(drawn, [2.5, 97.5]).tolist(),
            "p": mcnemar(won, lost), "won": won, "lost": lost}


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


# --- What the stages give, and what follows from it


class Outputs:
    """What each stage gave on dev and test (asked when it is first needed), which answers are right, what each cost."""

    def __init__(self, run, dev, test):
        self.run, self.args, self.records = run, run.args, dev + test
        self.dev, self.test = slice(len(dev)), slice(len(dev), None)
        self.known, self.verdicts = {}, {}

    def __getitem__(self, stage):
        """An output a record; None for dev where nobody needs it."""
        if stage not in self.known:
            model, step, reads, _ = STAGES[stage]
            part = self.test if stage in TEST_ALONE else slice(None)
            inputs = [self[name][part] for name in reads]
            made = step(model and self.run.model(model, stage), self.args, self.records[part], *inputs)
            self.known[stage] = [None] * (len(self.records) - len(made)) + made
        return self.known[stage]

    def right(self, stage):
        """Which answers of a stage are right: array (n,) of bool."""
        if stage not in self.verdicts:
            self.verdicts[stage] = np.array([
                output is not None and art.verdict(self.args.task, output, record["answer"])
                for output, record in zip(self[stage], self.records)])
        return self.verdicts[stage]

    def column(self, stage, key):
        """One value of every output of a stage, as an array (n,)."""
        return np.array([output[key] for output in self[stage]])

    def tokens(self, stages):
        """Tokens that these stages read and wrote for each record of test."""
        return sum(np.array([output["prompt_tokens"] + output.get("tokens", 0) for output in self[stage][self.test]])
                   for stage in stages)

    def takes(self, chooses, candidate):
        """Would this chooser take the refinement? Array (n,) of bool."""
        if chooses == "refinement":
            return np.ones(len(self.records), bool)
        if chooses == "oracle":
            return self.right(candidate) & ~self.right("draft")
        if chooses == "logprob":
            new, old = (np.array([-math.inf if output["logprob"] is None else output["logprob"]
                                  for output in self[stage]]) for stage in (candidate, "draft"))
            return new > old
        return self.column(chooses, "refined") > self.column(chooses, "draft")

    def gate(self, row):
        """(decides to refine, takes the refinement), arrays (n,) of bool; and the threshold (--threshold or dev)."""
        decides, candidate, chooses = ROWS[row]
        initial, takes = self.right("draft"), self.takes(chooses, candidate)
        fixed = {"never": np.zeros_like(initial), "always": np.ones_like(initial), "oracle": ~initial}
        if decides in fixed:
            return fixed[decides], fixed[decides] & takes, None
        stage, _, threshold = decides.partition(" at ")
        p, threshold = self.column(stage, "p_refine"), float(threshold) if threshold else self.args.threshold
        if threshold is None:
            # gold may choose, but not move a threshold
            without_gold = self.takes("trust", candidate) if chooses == "oracle" else takes
            # +1 for a wrong draft made right, -1 for a right one made wrong, 0 where the draft is kept
            gain = (self.right(candidate).astype(int) - initial) * without_gold
            threshold = best_threshold(p[self.dev], gain[self.dev])
        return p >= threshold, (p >= threshold) & takes, threshold


# --- The rows


def stages_of(*names):
    """Those of the names that are stages, and all that these read."""
    found = STAGES.keys() & names
    return found.union(*(stages_of(*STAGES[stage][2]) for stage in found))


def cost(outputs, row, refine):
    """Tokens of each question: every step up to the decision, and behind it those for what is refined."""
    decides, candidate, chooses = ROWS[row]
    # always: the draft is paid for only where the candidate reads it
    before = set() if decides == "always" else stages_of("draft", decides.partition(" at ")[0])
    return outputs.tokens(before) + refine * outputs.tokens(stages_of(candidate, chooses) - before)


def make_row(outputs, row):
    """(figures of a row on test, which of its answers are right)."""
    decides, candidate, _ = ROWS[row]
    test = outputs.test
    initial, better = outputs.right("draft")[test], outputs.right(candidate)[test]
    if decides == "random":
        share = outputs.gate("asker")[0][test].mean()
        right = (1 - share) * initial + share * better
        return {**accuracy(right), "threshold": None, "refined": float(share),
                "tokens": float(cost(outputs, row, share).mean())}, right
    refine, take, threshold = outputs.gate(row)
    refine, take = refine[test], take[test]
    right = np.where(take, better, initial)
    pairs = list(zip(outputs["draft"][test], outputs[candidate][test]))
    same = [old["answer"] == new["answer"] for (old, new), refined in zip(pairs, refine) if refined]
    answers = [new if taken else old for (old, new), taken in zip(pairs, take)]
    return {**accuracy(right), **counts(answers, right, initial), "threshold": threshold,
            "refined": float(refine.mean()), "same_answer": float(np.mean(same)) if same else None,
            "tokens": float(cost(outputs, row, refine).mean())}, right


def accuracy(right):
    """Share of right answers, its interval, and of how many."""
    return {"accuracy": float(right.mean()), "ci95": wilson(right.sum(), len(right)), "n": len(right)}


def counts(answers, right, initial):
    """What became of the drafts, and why answers are wrong whatever they say."""
    return {"mended": int((right & ~initial).sum()), "broken": int((~right & initial).sum()),
            "unparsed": sum(output["answer"] is None and output["stopped"] for output in answers),
            "cut_off": sum(not output["stopped"] and not output.get("failed") for output in answers),
            "failed": sum(bool(output.get("failed")) for output in answers)}


def vote_row(outputs, row, budget):
    """A row that chooses among the first k samples: the first k that costs what `art` does, MAX_K at most.

    As many samples are drawn as that cost needs by the tokens of the drafts.
    """
    args, records = outputs.args, outputs.records[outputs.test]
    draft = np.mean([output["tokens"] for output in outputs["draft"][outputs.test]])
    most = MAX_K if budget == math.inf else min(MAX_K, max(2, math.ceil(budget / draft)))
    drawn = art.sample_answers(outputs.run.model("llm", "samples of test"), args, records, most, args.temperature)
    scores = score_samples(outputs, records, drawn) if row != "majority" else [[]] * len(records)
    for k in range(1, most + 1):
        tokens = np.mean([samples[0]["prompt_tokens"] + sum(sample["tokens"] for sample in samples[:k])  # one prompt
                          + sum(score["prompt_tokens"] for score in own[:k]) for samples, own in zip(drawn, scores)])
        if tokens >= budget:
            break
    chosen = [pick(row, samples[:k], own) for samples, own in zip(drawn, scores)]
    right = np.array([art.verdict(args.task, output, record["answer"]) for output, record in zip(chosen, records)])
    return {**accuracy(right), **counts(chosen, right, outputs.right("draft")[outputs.test]), "threshold": None,
            "refined": None, "k": k, "tokens": float(tokens)}, right


def score_samples(outputs, records, drawn):
    """The Truster's scores of the samples of each question: lists of outputs."""
    prompts = [art.trust_prompt(record, sample["text"])
               for record, samples in zip(records, drawn) for sample in samples]
    scores = iter(outputs.run.model("truster", "trust samples").score(prompts))
    return [[next(scores) for _ in samples] for samples in drawn]


def pick(row, samples, scores):
    """The sample that stands: the Truster's favourite, or the first with the most votes, each of 1 or exp(score)."""
    if row == "best_of_k":
        return max(zip(samples, scores), key=lambda pair: pair[1]["score"])[0]
    votes = collections.defaultdict(float)
    for sample, score in zip(samples, scores or [{"score": 0.0}] * len(samples)):
        if sample["answer"] is not None and sample["stopped"]:
            votes[sample["answer"]] += math.exp(score["score"])
    best = max(votes, key=votes.get, default=None)
    return next((sample for sample in samples if sample["stopped"] and sample["answer"] == best), samples[0])


def make_rows(outputs, wanted, kept):
    """({row: what results.json says}, {row: which answers are right}, {row: why it is left out}).

    `wanted` rows may ask the models. `kept` ones stood in the table before: they stay if nothing has to be asked.
    """
    figures, right, lacking, args = {}, {}, {}, outputs.args
    rows = [row for row in ROWS if row in wanted or row in kept]
    for row in sorted(rows, key=lambda row: (row in VOTES, row not in wanted)):  # a vote may cost what art costs
        outputs.run.offline = row not in wanted  # kept rows come from the cache alone
        try:
            if row in VOTES:
                about, verdicts = vote_row(outputs, row, figures["art"]["tokens"] if "art" in figures else math.inf)
            else:
                about, verdicts = make_row(outputs, row)
        except art.Missing as stage:
            lacking[row] = f"its answers ({stage}) are not those of today's settings: ask them with --rows {row}"
        except art.NotTrained as error:  # with --rows all what needs an adapter that nobody trained may be left out
            if row in wanted and not (args.rows == "all" and row in TEST_ALONE):
                raise
            lacking[row] = str(error)
        else:
            who = dict(zip(("decides", "candidate", "chooses"), ROWS[row]))
            figures[row], right[row] = {**who, "row": row, "strategy": args.strategy, **about}, verdicts
    outputs.run.offline = False
    for row, about in figures.items():
        for other in ("initial", "self_refine"):
            if other in figures and row not in (other, "random_gate"):
                about[f"vs_{other}"] = compare(right[row], right[other], args.seed)
    return {row: figures[row] for row in ROWS if row in figures}, right, lacking


# --- What is written


def table(results):
    """results.json as a Markdown table of six columns, rows in groups."""
    rows = {row["row"]: row for row in results["rows"]}
    lines = ["| row | right (95%) | against the draft (95%) | mended | broken | tokens |", "| --- " * 6 + "|"]
    for group, names in GROUPS.items():
        if names := [name for name in names if name in rows]:
            lines.append(f"| *{group}* | | | | | |")
        for row in (rows[name] for name in names):
            share = "{:.1%} ({:.1%} to {:.1%})".format(row["accuracy"], *row["ci95"])
            versus = row.get("vs_initial")
            delta = "{:+.1%} ({:+.1%} to {:+.1%})".format(versus["delta"], *versus["ci95"]) if versus else "-"
            lines.append(f"| {row['row']} | {share} | {delta} | {art.show(row.get('mended'), 'd')} | "
                         f"{art.show(row.get('broken'), 'd')} | {row['tokens']:,.0f} |")
    return "\n".join(lines) + "\n"


def sentences(results):
    """What the table says, a line each."""
    rows = {row["row"]: row for row in results["rows"]}
    given, n_dev = results["threshold"], results["n_dev"]
    lines = [f"{results['n']:,} test questions; thresholds "
             + (f"set on {n_dev:,} others (dev)" if given is None else f"given: {given}")
             + ". Mended, broken: wrong drafts made right, right drafts made wrong. Tokens: read and written by all "
             "models, a question."]
    if {"initial", "self_refine", "art"} <= rows.keys():
        a, b = rows["art"]["vs_initial"], rows["art"]["vs_self_refine"]
        lines.append(f"ART gains {a['delta']:+.1%} over the draft (p = {a['p']:.2g}) and {b['delta']:+.1%} over "
                     f"self-refinement (p = {b['p']:.2g}); it refines {rows['art']['refined']:.0%} of the drafts.")
    if "art" in rows and (sampled := [f"{row} {rows[row]['k']}" for row in VOTES if row in rows]):
        lines.append(f"Samples a question: {', '.join(sampled)}; the fewest that cost as many tokens as ART, "
                     f"{MAX_K} at most.")
    if "oracle_gate" in rows:
        lines.append(f"With these refinements a perfect decision, or a perfect choice, would end at "
                     f"{rows['oracle_gate']['accuracy']:.1%}.")
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
        if counted := [f"{name} {row[kind]}" for name, row in rows.items() if row.get(kind)]:
            lines.append(f"{kind.replace('_', ' ').capitalize()}, and so wrong: {', '.join(counted)}.")
    if rows.get("initial", {}).get("cut_off", 0) > 0.02 * results["n"]:
        lines.append("More than 2% of the drafts were cut off: raise --max-new-tokens.")
    if len(results["machines"]) > 1:
        lines.append(f"Answers of different machines are mixed here: {', '.join(results['machines'])}.")
    return "\n".join(lines + [f"Left out: {row}; {why}." for row, why in results["lacking"].items()]) + "\n"


def kinds_table(outputs, right):
    """Share and accuracies by kind of question, where the task tells the kinds; "" otherwise."""
    kinds = np.array([record.get("kind") for record in outputs.records[outputs.test]])
    rows = ("initial", "refine_always", "art")
    if None in kinds or not right.keys() >= set(rows):
        return ""
    lines = ["| kind of question | share | draft | refined | ART |", "| --- " * 5 + "|"]
    for kind in sorted(set(kinds)):
        cells = [f"{right[row][kinds == kind].mean():.0%}" for row in rows]
        lines.append(f"| {kind} | {np.mean(kinds == kind):.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def rates(outputs, part):
    """Mending and breaking rate of refining every draft, and whether it pays."""
    initial, better = outputs.right("draft")[part], outputs.right("refined")[part]
    if initial.all() or not initial.any():
        return None
    mending, breaking = float(better[~initial].mean()), float((~better)[initial].mean())
    odds = float(initial.mean() / (1 - initial.mean()))
    return {"mending": mending, "breaking": breaking, "odds": odds, "pays": mending > breaking * odds}


def flips(outputs, right, each=10):
    """The questions on which `art` changed the verdict of a draft, broken ones first: the best reading of a run."""
    texts, initial = {"broken": [], "mended": []}, outputs.right("draft")[outputs.test]
    columns = [outputs[stage][outputs.test] for stage in ("draft", "ask", "refined", "trust")]
    for record, draft, asked, refined, score, was, now in zip(outputs.records[outputs.test], *columns, initial, right):
        if was != now:
            texts["mended" if now else "broken"].append("\n".join([
                record["id"], record["question"], "-- draft", draft["text"],
                f"-- sub-questions (p_refine {asked['p_refine']:.2f})", *asked["subquestions"],
                f"-- refined (Truster: {score['draft']:.2f} -> {score['refined']:.2f})", refined["text"],
                f"-- gold {record['answer']}", "", ""]))
    return "".join(f"==== {name}: {len(found)}, the first {min(each, len(found))}\n\n" + "".join(found[:each])
                   for name, found in texts.items())


def as_records(outputs, split, right):
    """The records of a split, enriched by what each stage gave and by which row was right."""
    records, cached = [], {"settings", "prompt", "call", "number", "on", "seconds"}
    for number, record in enumerate(outputs.records[split]):
        enriched = {**record, "candidates": {}, "ask": {}, "trust": {}}
        for stage, (*_, (part, name)) in STAGES.items():
            if output := stage in outputs.known and outputs[stage][split][number]:  # dev is not asked everything
                enriched[part][name] = {key: value for key, value in output.items() if key not in cached}
        enriched["right"] = {row: bool(column[number]) for row, column in right.items() if row != "random_gate"}
        records.append(enriched)
    return records


def compare_runs(args):
    """Finished runs (names or folders): every row side by side, and the paired difference that was asked for."""
    runs, paths = [], []
    for name in args.compare:
        path = next((p for p in (args.runs / args.task / name, Path(name)) if (p / "results.json").is_file()), None)
        if path is None:
            raise art.UserError(f"no results.json of {name}: make it with: python evaluate.py --task {args.task} "
                                f"--run {name}")
        paths.append(path)
        runs.append({row["row"]: row for row in json.loads((path / "results.json").read_text("utf-8"))["rows"]})
    print(f"| row | {' | '.join(args.compare)} | mean | range |\n" + "| --- " * (3 + len(runs)) + "|")
    for row in [row for row in ROWS if all(row in run for run in runs)]:
        shares = [run[row]["accuracy"] for run in runs]
        cells = [f"{share:.1%}" for share in [*shares, np.mean(shares)]]
        print(f"| {row} | {' | '.join(cells)} | {min(shares):.1%} to {max(shares):.1%} |")
    if len(runs) > 1 or args.against:
        print(paired(args, art.load_run(paths[0]), art.load_run(paths[:2][-1])))


def paired(args, first, second):
    """--row of the second run minus the same row, or --against, of the first, on the questions that both have."""
    old, new = args.against or args.row, args.row
    older, newer = args.compare[0], args.compare[:2][-1]
    if list(first["id"]) != list(second["id"]):
        raise art.UserError("the runs are not on the same test questions: a paired difference needs that")
    for run, row, name in ((first, old, older), (second, new, newer)):
        if f"right.{row}" not in run or None in list(run[f"right.{row}"]):
            raise art.UserError(f"row {row} is not in run {name}: add it with evaluate.py --rows {row}, and the flags "
                                "of that run")
    difference = compare(second[f"right.{new}"], first[f"right.{old}"], args.seed)
    return ("\n{} of {} against {} of {}: {:+.1%} ({:+.1%} to {:+.1%}), exact McNemar p = {:.3g}, won {won}, "
            "lost {lost}, n = {:,}").format(new, newer, old, older, difference["delta"], *difference["ci95"],
                                            difference["p"], len(first["id"]), **difference)


def parse_args():
    parser = art.make_parser(__doc__)
    add = parser.add_argument_group("evaluation").add_argument
    add("--rows", help=f"comma-separated, of {', '.join(ROWS)}, or all (default {', '.join(DEFAULT_ROWS)})")
    add("--compare", nargs="+", metavar="RUN", help="only compare finished runs, by name or folder")
    add("--row", default="art", choices=[row for row in ROWS if row != "random_gate"],
        help="the row that --compare compares question by question (default art)")
    add("--against", metavar="ROW", choices=[row for row in ROWS if row != "random_gate"],
        help="compare --row (of the second run, if there are two) with this row of the first")
    add("--threshold", type=float, help="decide by this threshold on p_refine, in the place of the one set on dev")
    add("--asker-from", metavar="RUN", help="take Asker and finetuned of this run (of another task: ../TASK/RUN)")
    add("--truster-from", metavar="RUN", help="take the Truster of this run")
    args = art.parse(parser)
    if args.against and not args.compare:
        raise art.UserError("--against needs --compare RUN")
    names = ROWS if args.rows == "all" else args.rows.split(",") if args.rows else DEFAULT_ROWS
    if unknown := set(names) - ROWS.keys():
        raise art.UserError(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}, all")
    return args, list(names)


def refuse_leaks(run, test):
    """Adapters that were trained on questions of test would make the table worthless."""
    for name in ADAPTERS:
        path = run.adapter(name) / "questions.txt"
        seen = set(path.read_text("utf-8").split()) if path.is_file() else set()
        if leaked := [record["id"] for record in test if art.question_hash(record) in seen]:
            raise art.UserError(f"{run.adapter(name)} was trained on {len(leaked)} of the test questions, as "
                                f"{leaked[0]}: train an adapter on other questions")


def summary(outputs, figures, lacking):
    """What results.json holds."""
    run, args, test = outputs.run, outputs.args, outputs.test
    wrong = ~outputs.right("draft")[test]
    results = {
        "task": args.task, "llm": args.model, "n": len(wrong), "n_dev": outputs.dev.stop, "seed": args.seed,
        "threshold": args.threshold,
        "settings": {key: getattr(args, key) for key in art.LLM_KEYS if hasattr(args, key)},
        "rows": list(figures.values()), "lacking": lacking,
        "auc": {name: art.auc(outputs.column(stage, "p_refine")[test], wrong) for name, stage in (
            ("Asker", "ask"), ("the LLM itself", "ask_self"), ("cheap gate", "cheap")) if stage in outputs.known},
        "machines": sorted(set().union(*(model.machines for model in run.models.values()))),
        "training": {name: about for name in ADAPTERS if (about := run.trained(name))},
        **art.provenance()}
    if "refined" in outputs.known:
        both = {"dev": rates(outputs, outputs.dev), "test": rates(outputs, test)}
        results |= {"rates": both} if all(both.values()) else {}
    return results


def warn_changed(path, before, figures):
    """Say which rows of the table that is about to be replaced change or go: an edit may have been forgotten."""
    now = {row["row"]: figures.get(row["row"], {}).get("accuracy") for row in before}
    if changed := [f"{row['row']} {row['accuracy']:.1%}, now {art.show(now[row['row']])}" for row in before
                   if now[row["row"]] != row["accuracy"]]:
        print(f"warning: {path} had {'; '.join(changed)}. Give what you change a run of its own: --run NAME",
              file=sys.stderr)


def main():
    args, wanted = parse_args()
    if args.compare:
        return compare_runs(args)
    run = art.Run(args)
    dev, test = art.load_split(args, "dev"), art.load_split(args, "test")
    refuse_leaks(run, test)
    models = {about["model"]: about["bits"] for name in ("asker", "truster") if (about := run.trained(name))}
    models |= {} if args.base_url else {args.model: args.bits}
    art.announce_needs(models, kv_gib=args.kv_gib)
    print(f"[4/5] {len(dev):,} questions of dev and {len(test):,} of test through the steps", flush=True)
    path = run.folder / "results.json"
    before = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    outputs = Outputs(run, dev, test)
    figures, right, lacking = make_rows(outputs, wanted, {row["row"] for row in before})
    if before and before[0]["n"] >= len(test):  # a try with --limit may be replaced
        warn_changed(path, before, figures)
    results = summary(outputs, figures, lacking)
    right_on_dev = {"initial": outputs.right("draft")[outputs.dev]}  # other rows are for test
    art.write(run.folder / "records.jsonl", as_records(outputs, outputs.test, right))
    art.write(run.folder / "dev.jsonl", as_records(outputs, outputs.dev, right_on_dev))
    if "art" in figures:
        art.write(run.folder / "flips.txt", flips(outputs, right["art"]))
    text = table(results) + "\n" + kinds_table(outputs, right) + sentences(results)
    art.write(run.folder / "table.md", text)
    art.write(path, results)
    print(f"[5/5] who decides, who asks, who chooses\n\n{text}")
    if "art" in figures:
        print(f"Read {run.folder / 'flips.txt'}: what ART broke and mended.")
    print(f"Try next: python art.py solve --task {args.task} --random; "
          f"python evaluate.py --task {args.task} --rows all")
    art.log_start(run)


if __name__ == "__main__":
    art.run(main)
