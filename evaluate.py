"""Ask, refine and trust over the test split, and the table of who decides, who asks and who chooses.

    python evaluate.py --task toy
    python evaluate.py --task toy --rows initial,asker,art   # --rows all also trains what end_to_end needs

Goes stage by stage over dev and test, one large model in memory at a time; a stage that is on disk is not made again.
Every threshold is set on dev, to maximise there the accuracy of the row that uses it. Writes to runs/<task>/<run>/:
results.json, table.md, costs.md, results.png (where matplotlib is installed), records.jsonl and flips.txt.
"""

import collections
import contextlib
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import art

# row: (who decides, what then stands in the place of the draft, who chooses between the two); None: no such step
ROWS = {
    "initial": (None, None, None),
    "refine_always": ("always", "refined", "most_recent"),
    "always_truster": ("always", "refined", "truster"),
    "self_refine": ("self", "refined_self", "most_recent"),
    "self_refine_plain": ("self", "refined_plain", "most_recent"),
    "asker": ("asker", "refined", "most_recent"),
    "asker_plain": ("asker", "refined_plain", "most_recent"),
    "asker_self": ("asker", "refined", "self"),
    "art": ("asker", "refined", "truster"),
    "random_gate": ("random", "refined", "most_recent"),
    "logprob_choice": ("asker", "refined", "logprob"),
    "majority": ("always", "majority", "most_recent"),
    "best_of_k": ("always", "best_of_k", "most_recent"),
    "finetuned": ("always", "finetuned", "most_recent"),
    "end_to_end": ("always", "end_to_end", "most_recent"),
    "oracle_gate": ("oracle", "refined", "most_recent"),
    "oracle_choice": ("always", "refined", "oracle"),
}
SUBQUESTIONS = {"refined": "asker", "refined_self": "self"}  # whose sub-questions a refinement has
CURVES = {"majority": "vote", "best_of_k": "truster"}  # rows over k samples, and who chooses among them
CURVE_K = (1, 2, 3, 5, 8)
ALONE = {*CURVES, "finetuned", "end_to_end"}  # candidates that are made without a draft

NEEDS = (  # the stages that a decider, a candidate and a chooser need beside the draft
    {"asker": ["ask"], "random": ["ask"], "self": ["ask_self"]},
    {"refined": ["ask", "refined"], "refined_self": ["ask_self", "refined_self"], "refined_plain": ["refined_plain"],
     "majority": ["samples"], "best_of_k": ["samples", "trust_samples"], "finetuned": ["finetuned"],
     "end_to_end": ["end_to_end"]},
    {"truster": ["trust"], "self": ["trust_self"]})
ADAPTER = {"ask": "asker", "trust": "truster", "trust_samples": "truster",  # that makes a stage; all others: the LLM
           "finetuned": "finetuned", "end_to_end": "end_to_end"}
BASE = {"asker": "asker", "finetuned": "asker", "end_to_end": "asker", "truster": "truster"}  # an adapter's model
LEARNS_FROM = {"finetuned": [], "asker": ["samples", "finetuned"], "truster": ["samples"],  # what is made before it
               "end_to_end": ["samples", "finetuned"]}
ACCURACY = "{:.1%} ({:.1%} to {:.1%})"  # with its interval
COMPUTED = "fine-tuning a 70 B model (computed)"  # training alone
PLACES = {"ask": ("ask", "asker"), "ask_self": ("ask", "self"), "trust": ("trust", "truster"),  # in the record
          "trust_self": ("trust", "self"), "trust_samples": ("trust", "samples")}


# --- Statistics ---


def wilson(right, n, z=1.959964):
    """95% interval of a share (Wilson, 1927); `right` may be an expectation.

    >>> [round(x, 4) for x in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def mcnemar(gained, lost):
    """Exact two-sided p of McNemar's test: `gained` and `lost` are the questions on which two rows differ.

    >>> round(mcnemar(2, 10), 4)
    0.0386
    """
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n) if n else 1.0


def compare(row, other, seed):
    """Difference in accuracy of two rows on the same questions: delta, 95% bootstrap interval, exact McNemar p."""
    difference, n = row.astype(int) - other.astype(int), len(row)
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    drawn = np.random.default_rng(seed).multinomial(n, shares, 10_000) @ np.array([-1, 0, 1]) / n
    return {"delta": float(difference.mean()), "ci95": np.percentile(drawn, [2.5, 97.5]).tolist(),
            "p": mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))}


# --- The stages: each asks one model about every question of dev and test ---


def stages_of(rows):
    """The stages that rows need beside the draft, by name."""
    return {stage for row in rows for names, step in zip(NEEDS, ROWS[row]) for stage in names.get(step, ())}


def run_stages(args, rows, dev, test):
    """Put what `rows` need into the records of dev and test: candidates, ask, trust.

    Returns {role: model} and what made it all: model, data, prompts, flags, hashes of the adapters.
    """
    shelf, task, needed = art.Shelf(args), args.task, {"initial"} | stages_of(rows)
    llm = art.fingerprint(args, args.model, art.LLM_KEYS)
    settings = {"exemplars": art.load_exemplars(task, args.shots, args.data), "max_new_tokens": args.max_new_tokens}
    samples, _ = art.load_samples(args, dev)
    path = args.runs / task / "samples.jsonl"  # holds the drafts of dev
    sampling = json.loads(art.maker(path).read_text())
    art.require_same(sampling, llm, path, "give the flags you gave art.py sample")
    supported = {**settings, "facts": args.facts != "none"}

    def strip(row):
        return {key: value for key, value in row.items() if key not in ("id", "sample", "correct")}

    def stage(name, made_by, over, step, per_id=1):
        """Make one stage if it is needed; returns what what follows from it is made by, and so the name of its file.

        What the LLM makes without an adapter is kept for all runs of the task: seeds and ablations share it.
        """
        if name not in needed:  # nor is what follows from it
            return made_by
        model = ADAPTER.get(name, "llm")
        if name in ADAPTER:
            made_by = {**made_by, model: adapter(model)}

        def batches(done):
            lm = shelf.get(model)
            with lm.use(model) if BASE.get(model) == "asker" else contextlib.nullcontext():
                yield from step(lm, done=done)

        digest = art.short_hash(made_by)
        folder = (args.runs / task / args.run if BASE.keys() & made_by.keys() else args.runs / task) / "stages"
        with art.lock(folder):
            art.claim(folder / f"{name}-{digest}.jsonl", made_by)
            made = art.stage(folder / f"{name}-{digest}.jsonl", name, [r["id"] for r in over], batches, per_id)
        part, key = PLACES.get(name, ("candidates", name))
        for record in over:
            kept = [strip(row) for row in made[record["id"]]]
            record.setdefault(part, {})[key] = kept if name == "samples" else kept[0]
        return {**made_by, name: digest}

    @functools.cache
    def adapter(name):
        """The hash of its weights."""
        about = shelf.about(name)
        if not args.adapters:  # it must have learned from the data and the samples that are here now
            now = {"data_sha256": llm["data_sha256"]}
            if "samples_sha256" in about:
                seen = [r for split in ("train", "dev") for r in art.load_task(task, split, about["limit"], args.data)]
                now["samples_sha256"] = art.load_samples(args, seen)[1]
            art.require_same(about, now, f"the adapter in {shelf.folder / name}",
                             "train it again, or name it with --adapters")
        return art.adapter_hash(shelf.folder / name)

    def asked(name):
        return [record["ask"][name]["subquestions"] for record in records]

    def pairs():
        return [{name: r["candidates"][name]["text"] for name in ("initial", "refined")} for r in records]

    alone = {**llm, "test": art.data_hash(task, ["test"], args.data)}
    drawing = {key: sampling[key] for key in ("seed", "temperature")}  # as the samples of train, for all runs
    drawn = stage("samples", {**alone, **drawing}, test, lambda lm, **how: art.draw(
        lm, args, test, max(CURVE_K), **drawing, **how), max(CURVE_K))
    records = dev + test
    for record in dev:
        record["candidates"] = {"initial": strip(samples[record["id"]][0])}
    by = {**alone, "drafts": art.short_hash([samples[record["id"]][0] for record in dev])}
    by = stage("initial", by, test, lambda lm, **how: art.predict(
        lm, task, test, strategy=args.strategy, facts=args.facts == "both", **settings, **how))
    drafts = [record["candidates"]["initial"]["text"] for record in records]
    by_self = stage("ask_self", by, records, lambda lm, **how: art.ask(lm, task, records, drafts, **settings, **how))
    stage("refined_self", by_self, records, lambda lm, **how: art.refine(
        lm, task, records, drafts, asked("self"), **supported, **how))
    stage("refined_plain", by, records, lambda lm, **how: art.refine(lm, task, records, drafts, **supported, **how))
    stage("finetuned", alone, test, lambda lm, **how: art.predict(
        lm, task, test, strategy=shelf.about("finetuned")["strategy"], **how, **(
            settings if shelf.about("finetuned")["task"] != task else  # of another task: it is shown what `initial` is
            {"max_new_tokens": args.max_new_tokens})))
    stage("end_to_end", alone, test, lambda lm, **how: art.end_to_end(  # a draft, sub-questions and a revised answer
        lm, task, test, max_new_tokens=3 * args.max_new_tokens, **how))
    by = stage("ask", by, records, lambda lm, **how: art.ask(
        lm, task, records, drafts, shift=shelf.about("asker")["shift"], max_new_tokens=args.max_new_tokens, **how))
    by = stage("refined", by, records, lambda lm, **how: art.refine(
        lm, task, records, drafts, asked("asker"), **supported, **how))
    stage("trust_self", by, records, lambda lm, **how: art.choose(lm, records, pairs(), **how))
    stage("trust", by, records, lambda truster, **how: truster.score(records, pairs(), **how))
    stage("trust_samples", drawn, test, lambda truster, **how: truster.score(
        test, [{str(i): row["text"] for i, row in enumerate(r["candidates"]["samples"])} for r in test], **how))
    models, adapters = {"llm": args.model}, sorted({ADAPTER[name] for name in needed & ADAPTER.keys()})
    for name in adapters:  # what is fine-tuned beside the Asker has its base
        models.setdefault(BASE[name], shelf.about(name)["model"])
    return models, {**llm, "limit": args.limit, "adapters": {name: adapter(name) for name in adapters}}


# --- The rows: no model is asked any more ---


def verdicts(task, records, candidate):
    """Which answers of a candidate are right: array (n,) of bool."""
    return np.array([art.verdict(task, r["candidates"][candidate], r["answer"]) for r in records])


def has_logprobs(records):
    """Is the probability of every draft and refinement known? A server may not give it."""
    made = [r["candidates"].get(name, {}) for r in records for name in ("initial", "refined")]
    return all(row.get("failed") or row.get("logprob") is not None for row in made)


def columns(task, records):
    """Arrays (n,) for the rows: which candidates are right, the p_refine of each decider, what each chooser takes."""
    right = {name: verdicts(task, records, name) for name in records[0]["candidates"] if name != "samples"}
    p = {name: np.array([r["ask"][name]["p_refine"] for r in records]) for name in records[0].get("ask", ())}
    takes = {name: np.array([r["trust"][name]["refined"] > r["trust"][name]["initial"] for r in records])
             for name in records[0].get("trust", ()) if name != "samples"}
    if has_logprobs(records):
        draft, refined = ([-math.inf if r["candidates"][name].get("failed") else r["candidates"][name]["logprob"]
                           for r in records] for name in ("initial", "refined"))
        takes["logprob"] = np.greater(refined, draft)
    return right, p, takes


def outcome(row, right, p, takes, threshold):
    """(decides to refine, takes the refinement) of a row, arrays (n,) of bool."""
    (decides, candidate, chooses), initial = ROWS[row], right["initial"]
    known = {None: np.zeros_like(initial), "always": np.ones_like(initial), "oracle": ~initial}
    refine = known[decides] if decides in known else p[decides] >= threshold
    if chooses == "oracle":
        return refine, refine & right[candidate] & ~initial
    return refine, refine & takes[chooses] if chooses in takes else refine


def set_threshold(row, right, p, takes):
    """The threshold of a row on dev, or None where it needs none."""
    decides, candidate, chooses = ROWS[row]
    if decides not in ("asker", "self"):
        return None
    gain = right[candidate].astype(int) - right["initial"]
    return art.best_threshold(p[decides], gain * takes[chooses] if chooses in takes else gain)


def sweep(row, right, p, takes):
    """Accuracy and share refined of a row at every percentile of p_refine: [{"threshold", "refined_share", ...}]."""
    points = []
    for threshold in [0.0, *np.unique(np.percentile(p[ROWS[row][0]], range(5, 100, 5))), np.nextafter(1, 2)]:
        refine, take = outcome(row, right, p, takes, threshold)
        accuracy = np.where(take, right[ROWS[row][1]], right["initial"]).mean()
        points.append({"threshold": float(threshold), "refined_share": float(refine.mean()),
                       "accuracy": float(accuracy)})
    return points


def pick(record, row, k):
    """Which of the first k samples stands: the first with the most common answer, or the Truster's favourite."""
    samples = record["candidates"]["samples"][:k]
    if row == "best_of_k":
        return samples[max(range(len(samples)), key=lambda i: record["trust"]["samples"][str(i)])]
    whole = [sample for sample in samples if sample["answer"] is not None and sample["stopped"]]
    votes = collections.Counter(sample["answer"] for sample in whole)
    return max(whole, key=lambda sample: votes[sample["answer"]], default=samples[0])  # the earliest among equals


def add_curve(args, row, test, models, budget):
    """Put the choice among k samples into the candidates of `test`; returns (k, [{"k", "accuracy", ...}, ...]).

    k is the first whose cost is at least `budget`, what `art` costs, so that the rival gets no less; or the last.
    The prompt is counted once, since samples share the pass over it, but on a server as often as it is sent.
    """
    def point(k):
        for record in test:
            samples = record["candidates"]["samples"][:k]
            record["candidates"][row] = {**pick(record, row, k), "tokens": sum(sample["tokens"] for sample in samples)}
            if args.base_url:
                record["candidates"][row]["prompt_tokens"] = sum(sample["prompt_tokens"] for sample in samples)
            if row == "best_of_k":  # the Truster reads each with the question
                read = record["trust"]["samples"]["prompt_tokens"] * k / max(CURVE_K)
                record["trust"][row] = {"prompt_tokens": round(read)}
        right = verdicts(args.task, test, row)
        return {"k": k, "accuracy": float(right.mean()), "ci95": wilson(int(right.sum()), len(test)),
                "cost": cost(row, test, np.ones(len(test), bool), models)}

    curve = [point(k) for k in range(1, max(CURVE_K) + 1)]
    k = next((one["k"] for one in curve if budget and total(one["cost"], unit_of(models)) >= budget), max(CURVE_K))
    point(k)  # which stays
    return k, [one for one in curve if one["k"] in {*CURVE_K, k}]


def cost(row, records, refine, models):
    """Tokens and floating-point operations a question (2 x parameters x tokens) of each model that a row uses."""
    n, used = len(records), {name: [0, 0] for name in models}
    for stage in sorted(stages_of([row]) | ({"initial"} if ROWS[row][1] not in ALONE else set())):
        model, (part, key) = BASE.get(ADAPTER.get(stage), "llm"), PLACES.get(stage, ("candidates", stage))
        for record, share in zip(records, refine.astype(float)):
            made = record[part][row if key == "samples" else key]
            share = 1 if stage in ("initial", "ask", "ask_self") else share  # these come before the decision
            used[model][0] += share * made["prompt_tokens"]
            used[model][1] += share * made.get("tokens", 0)
    return {name: {"prompt_tokens": a / n, "tokens": b / n,  # a server does not say its parameters
                   "flops": models[name]["parameters"] and 2 * models[name]["parameters"] * (a + b) / n}
            for name, (a, b) in used.items() if a + b}


def unit_of(models):
    """What a cost is told in: operations, or tokens where the size of the LLM is not known."""
    return "flops" if models["llm"]["parameters"] else "tokens"


def total(price, unit):
    """The sum of {model: its part of a cost}, in "flops" or "tokens", those of the prompt included."""
    return sum(part[unit] if unit == "flops" else part["tokens"] + part.get("prompt_tokens", 0)
               for part in price.values())


def training_costs(args, models):
    """What drawing the samples and each training took: {"samples" or adapter: {"model", "tokens", "flops", ...}}.

    Operations: 2 for a parameter and a token that is read or written; 4 in QLoRA, forward and back through frozen
    weights; 6 where all weights are trained. The last entry is computed, no run: 70 B parameters fine-tuned on what the
    Asker's first stage read, at its operations a second.
    """
    path, folder = args.runs / args.task / "samples.jsonl", art.Shelf(args).folder
    samples = art.read_jsonl(path)
    prompts = samples if args.base_url else {row["id"]: row for row in samples}.values()  # read once for all samples
    costs = {"samples": {
        **json.loads(art.maker(path).read_text()), **models["llm"], "trainable_parameters": 0, "examples": len(samples),
        "tokens": sum(row["tokens"] for row in samples) + sum(row["prompt_tokens"] for row in prompts)}}
    for name in LEARNS_FROM:
        if (folder / name / "args.json").is_file():
            about = json.loads((folder / name / "args.json").read_text())
            costs[name] = {**about, "parameters": art.parameters(about["model"])}
    keys = ("model", "parameters", "trainable_parameters", "examples", "tokens", "seconds", "peak_memory")
    costs = {name: {key: about.get(key) for key in keys} for name, about in costs.items()}
    for name, part in costs.items():
        part["flops"] = part["parameters"] and (2 if name == "samples" else 4) * part["parameters"] * part["tokens"]
    if "finetuned" in costs:
        own, size = costs["finetuned"], int(70e9)
        flops = 6 * size * own["tokens"]
        costs[COMPUTED] = {**own, "model": "70 B", "parameters": size, "trainable_parameters": size, "flops": flops,
                           "seconds": own["seconds"] * flops / own["flops"], "peak_memory": None}
    return costs


def total_cost(row, results, price):
    """What it takes to train what a row needs and to answer all test questions at `price` a question."""
    adapters = {ADAPTER[stage] for stage in stages_of([row]) & ADAPTER.keys()}
    needed = adapters.union(*(LEARNS_FROM[name] for name in adapters)) & results["training"].keys()
    unit = unit_of(results["models"])
    return total({name: results["training"][name] for name in needed}, unit) + results["n"] * total(price, unit)


def cost_table(results, hour_price=None):
    """Samples and trainings as a Markdown table; the price of an hour adds the money."""
    head = ["what", "model", "parameters", "trained", "examples", "tokens", "seconds", "peak GiB", "operations"]
    rows = []
    for name, part in results["training"].items():
        counts = [art.show(part[key], ",") for key in ("parameters", "trainable_parameters", "examples", "tokens")]
        peak = part["peak_memory"] and part["peak_memory"] / 2**30
        rows.append([name, part["model"], *counts, art.show(part["seconds"], ",.0f"), art.show(peak, ".1f"),
                     art.show(part["flops"], ".1e")])
        if hour_price:
            rows[-1].append(art.show(part["seconds"] and part["seconds"] / 3600 * hour_price, ",.2f"))
    seconds, peak = results["seconds"], results["peak_memory"]
    took = f"{seconds:,.0f} s" + (f", {peak / 2**30:.1f} GiB at most" if peak else "")
    took += f", {seconds / 3600 * hour_price:,.2f} of money" if hour_price else ""
    return markdown(head + ["money"] * bool(hour_price), rows) + (
        f"\n\nevaluate.py took {took}; tokens and operations of each row are in results.json. Seconds and GiB are of "
        "this machine; those of a start that was stopped before its end are missing.\n")


def make_rows(args, rows, dev, test, models):
    """({row: its dictionary in results.json}, {row: takes the refinement}, curves, sweeps).

    Thresholds come from dev, everything else from test, whose records get {row: is it right} as "right".
    """
    on_dev, on_test = columns(args.task, dev), columns(args.task, test)
    right, initial, n = on_test[0], on_test[0]["initial"], len(test)
    thresholds, decided, correct, curves, k = {}, {}, {}, {}, dict.fromkeys(rows, 1)
    for row in sorted(rows, key=lambda row: row in CURVES):  # these need to know what `art` costs
        decides, candidate, _ = ROWS[row]
        if row in CURVES:
            budget = total(cost("art", test, decided["art"][0], models), unit_of(models)) if "art" in decided else None
            k[row], curves[row] = add_curve(args, row, test, models, budget)
            right[candidate] = verdicts(args.task, test, candidate)
        thresholds[row] = set_threshold(row, *on_dev)
        if decides == "random":  # the mean over every subset of the size that the Asker refines, exactly
            gate = outcome("asker", *on_test, set_threshold("asker", *on_dev))[0]
            decided[row] = np.full(n, gate.mean()), None
            correct[row] = (1 - gate.mean()) * initial + gate.mean() * right[candidate]
        else:
            decided[row] = refine, take = outcome(row, *on_test, thresholds[row])
            correct[row] = np.where(take, right[candidate or "initial"], initial)
    for number, record in enumerate(test):  # for tests between any two rows
        record["right"] = {row: bool(correct[row][number]) for row in rows if decided[row][1] is not None}
    results, strategies = {}, {"end_to_end": "cot"}  # of rows that do not take the flag
    if "finetuned" in rows:
        strategies["finetuned"] = art.Shelf(args).about("finetuned")["strategy"]
    for row in rows:
        decides, candidate, chooses = ROWS[row]
        refine, take = decided[row]
        alone, asker = candidate in ALONE, SUBQUESTIONS.get(candidate)
        asked = asker and any(record["ask"][asker]["subquestions"] for record in test)  # an ablation asks nothing
        facts = args.facts if not alone or row in CURVES and args.facts == "both" else "none"  # samples are drafts
        results[row] = result = {"row": row, "settings": {
            "strategy": strategies.get(row, args.strategy), "ask": None if alone else decides,
            "subquestions": asker if asked else None, "trust": CURVES.get(row) if alone else chooses, "facts": facts,
            "rounds": 1 if candidate and not alone else 0, "k": k[row], "threshold": thresholds[row]},
            "accuracy": float(correct[row].mean()), "ci95": wilson(float(correct[row].sum()), n),
            "refined_share": 0.0 if alone else float(refine.mean())}
        if take is None:  # an expectation has no answers to compare, count or pair
            result |= dict.fromkeys(["vs_initial", "vs_self_refine", "flips", "same_answer", "unparsed", "cut_off",
                                     "failed"])
        else:
            answers = [r["candidates"][candidate if t else "initial"] for r, t in zip(test, take)]
            same = [r["candidates"][candidate]["answer"] == r["candidates"]["initial"]["answer"]
                    for r, refined in zip(test, refine) if refined]
            result |= {
                "vs_initial": compare(correct[row], initial, args.seed),
                "vs_self_refine": compare(correct[row], correct["self_refine"], args.seed)
                if "self_refine" in rows else None,
                "flips": {"wrong_right": int((correct[row] & ~initial).sum()),
                          "right_wrong": int((~correct[row] & initial).sum())},
                "same_answer": float(np.mean(same)) if same else None,
                "unparsed": sum(a["answer"] is None and a["stopped"] for a in answers),
                "cut_off": sum(not a["stopped"] and not a.get("failed") for a in answers),
                "failed": sum(a.get("failed", False) for a in answers)}
        result["cost"] = cost(row, test, refine, models)
    sweeps = {row: sweep(row, *on_test) for row in ("asker", "art") if row in rows}
    return results, {row: pair[1] for row, pair in decided.items()}, curves, sweeps


def markdown(head, rows):
    """A table; short rows are filled with empty cells."""
    rows = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def table(results):
    """results.json as a Markdown table."""
    head = ["row", "accuracy (95%)", "vs initial", "p", "vs self_refine", "p", "mended", "broken", "refined",
            "same answer", "unparsed", "cut off", "failed", "tokens"]
    rows = []
    for row in results["rows"]:
        versus = [art.show(compared and compared[key], form) for compared in (row["vs_initial"], row["vs_self_refine"])
                  for key, form in (("delta", "+.1%"), ("p", ".2g"))]
        flips = [art.show(row["flips"] and row["flips"][key], "d") for key in ("wrong_right", "right_wrong")]
        counts = [art.show(row[key], "d") for key in ("unparsed", "cut_off", "failed")]
        tokens = sum(c["prompt_tokens"] + c["tokens"] for c in row["cost"].values())
        if row["row"] == "oracle_gate":
            rows.append(["*upper bounds, which look at the gold answer:*"])
        rows.append([row["row"], ACCURACY.format(row["accuracy"], *row["ci95"]), *versus, *flips,
                     f"{row['refined_share']:.0%}", art.show(row["same_answer"], ".0%"), *counts, f"{tokens:.0f}"])
    rows += [[row, f"not available: {reason}"] for row, reason in results["not_available"].items()]
    lines = [markdown(head, rows), "", f"{results['n']} questions, seed {results['seed']}, thresholds set on "
             f"{results['n_dev']} others (dev). Mended and broken: wrong drafts made right, right drafts made wrong. "
             "Unparsed, cut off and failed answers count as wrong. Tokens: read and written by all models, a question."]
    if results["decision"]:
        lines.append("Decision to refine, AUC: " + ", ".join(
            f"{name} {art.show(value['auc'], '.3f')}" for name, value in results["decision"].items()) + ".")
    by_name = {row["row"]: row for row in results["rows"]}
    for name, curve in results["curves"].items():
        points = ", ".join(f"{point['accuracy']:.1%} (k = {point['k']})" for point in curve)
        share = ""
        if "art" in by_name:
            price, budget = (total(by_name[row]["cost"], unit_of(results["models"])) for row in (name, "art"))
            share = f", {price / budget:.0%} of what art costs" if budget else ""
        lines.append(f"{name}: {points}; in the table k = {by_name[name]['settings']['k']}{share}.")
    return "\n".join(lines) + "\n"


def paper(results):
    """Ours beside the paper's figures for the task, as a Markdown table; empty where the paper has no such task."""
    figures = [f for f in art.read_jsonl(art.ROOT / "docs/paper.jsonl") if f["task"] == results["task"]]
    made, rows = {row["row"]: row for row in results["rows"]}, []
    for figure in figures:
        ours = made.get(figure["row"], {}).get(figure["ours"])  # the same thing as the paper's, or nothing
        shown = art.show(ours["delta"], "+.1%") if isinstance(ours, dict) else art.show(ours)
        rows.append([figure["row"], figure["llm"], figure["figure"], shown, figure["status"], figure["source"]])
    text = markdown(["row", "the paper's LLM", "paper", "ours", "status", "source"], rows)
    return f"\nThe paper's figures beside ours ({results['models']['llm']['model']}):\n\n{text}\n" if rows else ""


def picture(results, path):
    """Accuracy of the rows, against the Asker's threshold and against cost; left out where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("results.png is left out: it needs matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = {row["row"]: row for row in results["rows"]}
    middle = np.array([row["accuracy"] for row in rows.values()])
    ends = np.abs(np.array([row["ci95"] for row in rows.values()]).T - middle)
    colours = ["0.7" if row.startswith("oracle") else "C1" if row == "art" else "C0" for row in rows]
    figure, (bars, gate, costs) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    bars.barh(list(rows), 100 * middle, xerr=100 * ends, color=colours, capsize=2)
    bars.invert_yaxis()
    bars.set_xlabel(f"accuracy in % ({results['task']}, {results['n']} questions, 95% intervals; grey: upper bounds)")
    for name, points in results["sweeps"].items():
        thresholds = [point["threshold"] for point in points]
        line, = gate.plot(thresholds, [100 * point["accuracy"] for point in points], label=f"{name}: accuracy")
        gate.plot(rows[name]["settings"]["threshold"], 100 * rows[name]["accuracy"], "o", color=line.get_color())
    if results["sweeps"]:  # the same for all of them: the Asker decides
        gate.plot(thresholds, [100 * point["refined_share"] for point in points], "--", color="0.6",
                  label="share refined")
    gate.set(xlabel="threshold on p_refine (dot: the one from dev)", ylabel="%")
    costs.set_prop_cycle(color=pyplot.cm.tab20.colors)
    for name, points in results["curves"].items():
        costs.plot([total_cost(name, results, point["cost"]) for point in points],
                   [100 * point["accuracy"] for point in points], ".-", label=f"{name}, k = 1 to {points[-1]['k']}")
    for (name, row), around in zip(rows.items(), ends.T):
        if row["flips"] and name not in results["curves"] and not name.startswith("oracle"):
            costs.errorbar(total_cost(name, results, row["cost"]), 100 * row["accuracy"], 100 * around[:, None],
                          fmt="o", capsize=2, label=name)
    unit = unit_of(results["models"])
    if COMPUTED in results["training"] and unit == "flops":
        costs.axvline(results["training"][COMPUTED]["flops"], color="0.6", linestyle="--", label=COMPUTED)
    costs.set(xscale="log", xlabel=f"{'floating-point operations' if unit == 'flops' else unit}: training and all test "
             "questions", ylabel="accuracy in %")
    for axes in (gate, costs):
        if axes.get_legend_handles_labels()[0]:  # not all rows may have been asked for
            axes.legend(fontsize="x-small")
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    part.replace(path)
    pyplot.close(figure)


def flips(task, records, take):
    """Text of the questions on which `art` changed a draft's verdict, mended first: the best reading of a run."""
    parts = {"mended": [], "broken": []}
    for record, taken in zip(records, take):
        before, after = record["candidates"]["initial"], record["candidates"]["refined" if taken else "initial"]
        right = [art.verdict(task, c, record["answer"]) for c in (before, after)]
        if right[0] != right[1]:
            asker, scores = record["ask"]["asker"], record["trust"]["truster"]
            parts["mended" if right[1] else "broken"].append("\n".join([
                record["id"], record["question"], "-- draft", before["text"],
                f"-- sub-questions (p_refine {asker['p_refine']:.2f})", *asker["subquestions"],
                f"-- refined (Truster: {scores['initial']:.2f} -> {scores['refined']:.2f})", after["text"],
                f"-- gold {record['answer']}"]))
    return art.visible("".join(f"==== {name}: {len(items)}\n\n" + "".join(item + "\n\n" for item in items)
                               for name, items in parts.items()))


def read_runs(args, names):
    """results.json of finished runs, given as --run names or as folders."""
    runs = []
    for name in names:
        path = next((p for p in (args.runs / args.task / name, Path(name)) if (p / "results.json").is_file()), None)
        if not path:
            raise art.UserError(f"no results.json of {name}: make it with: python evaluate.py --run {name}")
        runs.append(json.loads((path / "results.json").read_text()))
        same = {key: runs[0][key] for key in ("task", "n", "data_sha256")}
        art.require_same(runs[-1], same, path, "give runs on the same questions")
    return runs


def summary(names, runs):
    """Several runs side by side as a Markdown table: mean accuracy, its range, and each run's difference and p."""
    head = ["row", "mean accuracy", "lowest to highest", "vs initial (p of each run)", "vs self_refine (p of each)"]
    lines = []
    tables = [{row["row"]: row for row in run["rows"]} for run in runs]
    for name in [name for name in tables[0] if all(name in table for table in tables)]:
        rows = [table[name] for table in tables]
        accuracy = [row["accuracy"] for row in rows]
        versus = [f"{np.mean([row[key]['delta'] for row in rows]):+.1%} "
                  f"({', '.join(format(row[key]['p'], '.2g') for row in rows)})"
                  if all(row[key] for row in rows) else "-" for key in ("vs_initial", "vs_self_refine")]
        lines.append([name, f"{np.mean(accuracy):.1%}", f"{min(accuracy):.1%} to {max(accuracy):.1%}", *versus])
    areas = [f"{gate} {', '.join(art.show(run['decision'][gate]['auc'], '.3f') for run in runs)}"
             for gate in runs[0]["decision"] if all(gate in run["decision"] for run in runs)]
    return (f"{markdown(head, lines)}\n\n{len(runs)} runs ({', '.join(names)}), the same {runs[0]['n']} questions in "
            f"each. Decision to refine, AUC of each run: {'; '.join(areas)}.")


def grid(names, runs):
    """The paper's grid over several runs: strategy x sub-questions x who asks x who trusts, as a Markdown table."""
    lines = []
    for name, run in zip(names, runs):
        for row in run["rows"]:
            how = row["settings"]
            if row["row"] in ("initial", "refine_always") or how["ask"] in ("self", "asker"):
                cells = [how[key] or "-" for key in ("strategy", "subquestions", "ask", "trust")]
                lines.append([name, *cells, ACCURACY.format(row["accuracy"], *row["ci95"])])
    return markdown(["run", "strategy", "sub-questions", "who asks", "who trusts", "accuracy (95%)"], lines)


def choose_rows(args):
    """(the rows asked for, {row: why it cannot be had}). By default all rows whose models are trained."""
    folder = art.Shelf(args).folder
    named = args.rows not in (None, "all")
    names = args.rows.split(",") if named else list(ROWS)
    if unknown := set(names) - set(ROWS):
        raise art.UserError(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}, all")
    if args.rows == "all" and not args.adapters and not (folder / "end_to_end/args.json").is_file():
        train_end_to_end(args, folder)
    flags = {"finetuned": "--task-epochs 1 --run ANOTHER", "end_to_end": "--end-to-end"}
    lacking = {} if named else {name: f"`python train_asker.py {flags[name]}` makes it" for name in flags
                                if not (folder / name / "args.json").is_file()}
    return [row for row in ROWS if row in names and row not in lacking], lacking


def train_end_to_end(args, folder):
    """Train what the row end_to_end needs as the Asker of the run was trained."""
    about = art.read_about(folder / "asker", "train_asker.py")
    keys = ("limit", "seed", "bits", "lr", "rank", "batch_size", "accumulate", "max_length", "task_epochs", "epochs",
            "subquestions")
    flags = {**{key: getattr(args, key) for key in ("task", "preset", "run", "runs", "data")},
             **{key: about[key] for key in keys}, "asker_model": about["model"]}
    words = [word for key, value in flags.items() if value is not None
             for word in (f"--{key.replace('_', '-')}", str(value))]
    if subprocess.run([sys.executable, str(art.ROOT / "train_asker.py"), "--end-to-end", *words]).returncode:
        raise art.UserError("end_to_end could not be trained (see above): give --rows without it")


def main():
    parser = art.make_parser(llm=True, doc=__doc__)
    add = parser.add_argument
    add("--rows", help=f"comma-separated, of {', '.join(ROWS)}; all: trains what end_to_end needs, too (those whose "
                       "models are trained)")
    add("--adapters", type=Path, metavar="FOLDER",
        help="take Asker, Truster and finetuned from this run, also of another task (the run itself)")
    add("--summary", nargs="+", metavar="RUN", help="only print these finished runs side by side")
    add("--grid", nargs="+", metavar="RUN", help="only print the paper's grid over these finished runs or run folders")
    add("--gpu-hour-price", type=float, help="what an hour of this machine costs; adds the money to costs.md (none)")
    args, began = art.parse(parser, "evaluate"), time.time()
    for names, show in ((args.summary, summary), (args.grid, grid)):
        if names:
            print(show(names, read_runs(args, names)))
            return
    folder = args.runs / args.task / args.run
    dev, test = (art.load_task(args.task, split, args.limit, args.data) for split in ("dev", "test"))
    rows, lacking = choose_rows(args)
    with art.lock(folder):
        used, made_by = run_stages(args, rows, dev, test)
        models = {name: {"model": model, "parameters": None if name == "llm" and args.base_url else
                         art.parameters(model)} for name, model in used.items()}
        if "logprob_choice" in rows and not has_logprobs(dev + test):
            rows.remove("logprob_choice")
            lacking["logprob_choice"] = "the server gives no log-probabilities"
        made, takes, curves, sweeps = make_rows(args, rows, dev, test, models)
        wrong = ~verdicts(args.task, test, "initial")
        results = {
            "task": args.task, "models": models, "n": len(test), "n_dev": len(dev), "seed": args.seed,
            **art.provenance(),
            "data_sha256": art.data_hash(args.task, ["train", "dev", "test"], args.data),
            "made_by": made_by, "seconds": round(time.time() - began, 1), "peak_memory": art.peak_memory(),
            "training": training_costs(args, models),
            "decision": {name: {"auc": art.auc([r["ask"][name]["p_refine"] for r in test], wrong)}
                         for name in test[0].get("ask", ())},
            "rows": list(made.values()), "not_available": lacking, "curves": curves, "sweeps": sweeps}
        path = folder / "results.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        if all(before.get(key) == results[key] for key in ("made_by", "models", "n", "n_dev", "data_sha256", "rows")):
            results |= {key: before[key] for key in ("commit", "versions", "seconds", "peak_memory") if key in before}
        if "art" in takes:
            for record, taken in zip(test, takes["art"]):
                record["final"] = record["candidates"]["refined" if taken else "initial"]["answer"]
            art.write_text(folder / "flips.txt", flips(args.task, test, takes["art"]))
        else:
            (folder / "flips.txt").unlink(missing_ok=True)  # of other rows
        art.write_jsonl(folder / "records.jsonl", test)
        art.write_text(folder / "table.md", table(results) + paper(results))
        art.write_text(folder / "costs.md", cost_table(results, args.gpu_hour_price))
        picture(results, folder / "results.png")
        art.write_json(path, results)
    print("\n".join([table(results) + paper(results), cost_table(results, args.gpu_hour_price)]))
    written = sorted(path.name for path in folder.glob("[a-z]*.*"))
    print(f"{folder}: {', '.join(written)} ({results['seconds']:.0f} s)")


if __name__ == "__main__":
    art.run(main)
