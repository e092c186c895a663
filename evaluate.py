"""Ask, refine and trust over the test split, and the table of who decides, who asks and who chooses.

    python evaluate.py --task toy

Goes stage by stage over dev and test, one large model in memory at a time; a stage that is on disk is not made again.
Every threshold is set on dev, to maximise there the accuracy of the row that uses it. Writes to runs/<task>/<run>/:
results.json, table.md, results.png (where matplotlib is installed), records.jsonl and flips.txt.
"""

import argparse
import hashlib
import json
import math
import time

import numpy as np

import art

# row: (who decides, which refinement, who chooses between draft and refinement); None: that row has no such step
ROWS = {
    "initial": (None, None, None),
    "refine_always": ("always", "refined", "most_recent"),
    "always_truster": ("always", "refined", "truster"),
    "self_refine": ("self", "refined_self", "most_recent"),
    "self_refine_plain": ("self", "refined_plain", "most_recent"),
    "asker": ("asker", "refined", "most_recent"),
    "asker_plain": ("asker", "refined_plain", "most_recent"),
    "art": ("asker", "refined", "truster"),
    "random_gate": ("random", "refined", "most_recent"),
    "oracle_gate": ("oracle", "refined", "most_recent"),
    "oracle_choice": ("always", "refined", "oracle"),
}
SUBQUESTIONS = {"refined": "asker", "refined_self": "self", "refined_plain": None, None: None}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


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


# ---------------------------------------------------------------------------------------------------------------------
# The stages: each asks one model about every question of dev and test


def run_stages(args, dev, test):
    """The records of dev and test with candidates, ask and trust filled in as DESIGN's record has them."""
    shelf, records, task = art.Shelf(args), dev + test, args.task
    llm = art.fingerprint(args, args.model, art.LLM_KEYS)
    settings = {"exemplars": art.load_exemplars(task, args.shots, args.data), "max_new_tokens": args.max_new_tokens}
    samples, _ = art.load_samples(args, dev)
    dev_drafts = [samples[record["id"]][0] for record in dev]
    path = args.runs / task / "samples.jsonl"  # holds the drafts of dev
    made_by = json.loads(path.with_suffix(".args.json").read_text())
    art.require_same(made_by, llm, path, "give the flags you gave art.py sample")
    supported = {**settings, "facts": args.facts != "none"}

    def stage(name, made_by, over, batches):
        """Rows of one stage in the order of `over`, kept in a file whose name follows from all that makes them.

        What the LLM makes without an adapter is kept for all runs of the task, so that seeds and ablations share it.
        """
        digest = art.short_hash(made_by)
        folder = (shelf.folder if "asker" in made_by else args.runs / task) / "stages"
        with art.lock(folder):
            art.claim(folder / f"{name}-{digest}.jsonl", made_by)
            rows = art.stage(folder / f"{name}-{digest}.jsonl", name, [record["id"] for record in over], batches)
        return [rows[record["id"]][0] for record in over], {**made_by, name: digest}

    def adapter(name):
        weights = (shelf.folder / name / "adapter_model.safetensors").read_bytes()
        return hashlib.sha256(weights).hexdigest()[:16]

    def asker(done):
        with shelf.get("asker").use("asker") as lm:
            shift = shelf.about["asker"]["shift"]
            yield from art.ask(lm, task, records, drafts, shift=shift, max_new_tokens=args.max_new_tokens, done=done)

    by = {**llm, "test": art.data_hash(task, ["test"], args.data), "drafts": art.short_hash(dev_drafts)}
    initial, by = stage("initial", by, test, lambda done: art.predict(
        shelf.get("llm"), task, test, strategy=args.strategy, facts=args.facts == "both", done=done, **settings))
    initial = dev_drafts + initial
    drafts = [row["text"] for row in initial]

    asked_self, by_self = stage("ask_self", by, records, lambda done: art.ask(
        shelf.get("llm"), task, records, drafts, done=done, **settings))
    refined_self, _ = stage("refined_self", by_self, records, lambda done: art.refine(
        shelf.get("llm"), task, records, drafts, [row["subquestions"] for row in asked_self], done=done, **supported))
    refined_plain, _ = stage("refined_plain", by, records, lambda done: art.refine(
        shelf.get("llm"), task, records, drafts, done=done, **supported))
    asked, by = stage("ask", {**by, "asker": adapter("asker")}, records, asker)
    refined, by = stage("refined", by, records, lambda done: art.refine(
        shelf.get("llm"), task, records, drafts, [row["subquestions"] for row in asked], done=done, **supported))
    texts = [{"initial": draft, "refined": row["text"]} for draft, row in zip(drafts, refined)]
    trusted, _ = stage("trust", {**by, "truster": adapter("truster")}, records, lambda done: shelf.get("truster").score(
        records, texts, done))

    def strip(row):
        return {key: value for key, value in row.items() if key not in ("id", "sample", "correct")}

    made = zip(records, initial, refined, refined_plain, refined_self, asked, asked_self, trusted)
    return [{**record, "candidates": {"initial": strip(a), "refined": strip(b), "refined_plain": strip(c),
                                      "refined_self": strip(d)},
             "ask": {"asker": strip(e), "self": strip(f)}, "trust": {"truster": strip(g)}}
            for record, a, b, c, d, e, f, g in made]


# ---------------------------------------------------------------------------------------------------------------------
# The rows: no model is asked any more


def columns(task, records):
    """Arrays (n,) for the rows: whether each candidate is right, the p_refine of each, the Truster's choice."""
    right = {name: np.array([art.is_correct(task, r["candidates"][name]["text"], r["answer"]) for r in records])
             for name in records[0]["candidates"]}
    p = {name: np.array([r["ask"][name]["p_refine"] for r in records]) for name in records[0]["ask"]}
    trusts = np.array([r["trust"]["truster"]["refined"] > r["trust"]["truster"]["initial"] for r in records])
    return right, p, trusts


def outcome(row, right, p, trusts, threshold):
    """(decides to refine, takes the refinement) of a row, arrays (n,) of bool."""
    decides, refinement, chooses = ROWS[row]
    if decides is None:
        refine = np.zeros_like(right["initial"])
    elif decides == "always":
        refine = np.ones_like(right["initial"])
    elif decides == "oracle":
        refine = ~right["initial"]
    else:
        refine = p[decides] >= threshold
    better = {None: True, "most_recent": True, "truster": trusts,
              "oracle": refinement and right[refinement] & ~right["initial"]}
    return refine, refine & better[chooses]


def set_threshold(row, right, p, trusts):
    """The threshold of a row on dev, or None where it needs none."""
    decides, refinement, chooses = ROWS[row]
    if decides not in ("asker", "self"):
        return None
    gain = right[refinement].astype(int) - right["initial"]
    return art.best_threshold(p[decides], gain * trusts if chooses == "truster" else gain)


def cost(row, records, refine, models):
    """Tokens and floating-point operations a question (2 x parameters x tokens) of each model that a row uses."""
    decides, refinement, chooses = ROWS[row]
    n, used = len(records), {name: [0, 0] for name in models}

    def add(model, part, where):
        for record, take in zip(records, where):
            used[model][0] += take * part(record)["prompt_tokens"]
            used[model][1] += take * part(record)["tokens"]

    every = np.ones(n, int)
    add("llm", lambda r: r["candidates"]["initial"], every)
    if "self" in (decides, SUBQUESTIONS[refinement]):
        add("llm", lambda r: r["ask"]["self"], every)
    if "asker" in (decides, SUBQUESTIONS[refinement]) or decides == "random":
        add("asker", lambda r: r["ask"]["asker"], every)
    if refinement:
        add("llm", lambda r: r["candidates"][refinement], refine.astype(float))
    if chooses == "truster":  # reads the question with each of the two texts
        read = [r["trust"]["truster"]["prompt_tokens"] for r in records]
        used["truster"][0] += sum(take * tokens for take, tokens in zip(refine.astype(int), read))
    return {name: {"prompt_tokens": float(a) / n, "tokens": float(b) / n,  # a server does not say its parameters
                   "flops": models[name]["parameters"] and 2 * models[name]["parameters"] * float(a + b) / n}
            for name, (a, b) in used.items() if a + b}


def make_rows(args, dev, test, models):
    """One dictionary a row, as DESIGN's results.json has it: thresholds from dev, everything else from test."""
    on_dev, (right, p, trusts) = columns(args.task, dev), columns(args.task, test)
    initial, n, thresholds, decided, correct = right["initial"], len(test), {}, {}, {}
    for row, (decides, refinement, _) in ROWS.items():
        thresholds[row] = set_threshold(row, *on_dev)
        if decides == "random":  # the mean over every subset of the size that the Asker refines, exactly
            share = decided["asker"][0].mean()
            decided[row] = np.full(n, share), None
            correct[row] = (1 - share) * initial + share * right[refinement]
        else:
            decided[row] = refine, take = outcome(row, right, p, trusts, thresholds[row])
            correct[row] = np.where(take, right[refinement or "initial"], initial)
    rows = []
    for row, (decides, refinement, chooses) in ROWS.items():
        refine, take = decided[row]
        result = {"row": row, "settings": {
            "strategy": args.strategy, "ask": decides, "subquestions": SUBQUESTIONS[refinement], "trust": chooses,
            "facts": args.facts, "rounds": 1 if refinement else 0, "k": 1, "threshold": thresholds[row]},
            "accuracy": float(correct[row].mean()), "ci95": wilson(float(correct[row].sum()), n),
            "refined_share": float(refine.mean())}
        if take is None:  # an expectation has no answers to compare, count or pair
            result |= dict.fromkeys(["vs_initial", "vs_self_refine", "flips", "same_answer", "unparsed", "cut_off"])
        else:
            answers = [r["candidates"][refinement if t else "initial"] for r, t in zip(test, take)]
            same = [r["candidates"][refinement]["answer"] == r["candidates"]["initial"]["answer"]
                    for r, refined in zip(test, refine) if refined]
            result |= {
                "vs_initial": compare(correct[row], initial, args.seed),
                "vs_self_refine": compare(correct[row], correct["self_refine"], args.seed),
                "flips": {"wrong_right": int((correct[row] & ~initial).sum()),
                          "right_wrong": int((~correct[row] & initial).sum())},
                "same_answer": float(np.mean(same)) if same else None,
                "unparsed": sum(a["answer"] is None for a in answers),
                "cut_off": sum(not a["stopped"] for a in answers)}
        rows.append({**result, "failed": 0, "cost": cost(row, test, refine, models)})
    return rows, {row: pair[1] for row, pair in decided.items()}


def table(results):
    """results.json as a Markdown table."""
    lines = ["| row | accuracy (95%) | vs initial | p | vs self_refine | p | mended | broken | refined | same answer | "
             "unparsed | cut off | tokens |", "| --- " * 13 + "|"]
    for row in results["rows"]:
        low, high = row["ci95"]
        versus = [f"{c['delta']:+.1%} | {c['p']:.2g}" if c else "- | -"
                  for c in (row["vs_initial"], row["vs_self_refine"])]
        flips = row["flips"] or {"wrong_right": "-", "right_wrong": "-"}
        same = art.show(row["same_answer"], ".0%")
        counts = ["-" if row[key] is None else str(row[key]) for key in ("unparsed", "cut_off")]
        tokens = sum(c["prompt_tokens"] + c["tokens"] for c in row["cost"].values())
        if row["row"] == "oracle_gate":
            lines.append("| *upper bounds, which look at the gold answer:* " + "| " * 12 + "|")
        lines.append(f"| {row['row']} | {row['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {' | '.join(versus)} | "
                     f"{flips['wrong_right']} | {flips['right_wrong']} | {row['refined_share']:.0%} | {same} | "
                     f"{' | '.join(counts)} | {tokens:.0f} |")
    gates = [f"{name} {art.show(value['auc'], '.3f')}"
             for name, value in results["decision"].items()]
    lines += ["", f"{results['n']} questions, seed {results['seed']}. Mended and broken: wrong drafts made right, "
              "right drafts made wrong. Tokens: read and written by all models, per question.",
              "Decision to refine, AUC: " + ", ".join(gates) + "."]
    return "\n".join(lines) + "\n"


def picture(results, path):
    """Accuracy of the rows with intervals; left out, with a word, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("results.png is left out: it needs matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = results["rows"][::-1]
    middle = np.array([row["accuracy"] for row in rows])
    ends = np.abs(np.array([row["ci95"] for row in rows]).T - middle)
    colours = ["0.7" if row["row"].startswith("oracle") else "C1" if row["row"] == "art" else "C0" for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.barh([row["row"] for row in rows], 100 * middle, xerr=100 * ends, color=colours, capsize=2)
    axes.set_xlabel(f"accuracy in % ({results['task']}, {results['n']} questions, 95% intervals; grey: upper bounds)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def flips(task, records, take):
    """Text of the questions on which `art` changed a draft's verdict, mended first: the best reading of a run."""
    parts = {"mended": [], "broken": []}
    for record, taken in zip(records, take):
        before, after = record["candidates"]["initial"], record["candidates"]["refined" if taken else "initial"]
        right = [art.is_correct(task, c["text"], record["answer"]) for c in (before, after)]
        if right[0] != right[1]:
            asker, scores = record["ask"]["asker"], record["trust"]["truster"]
            parts["mended" if right[1] else "broken"].append("\n".join([
                record["id"], record["question"], "-- draft", before["text"],
                f"-- sub-questions (p_refine {asker['p_refine']:.2f})", *asker["subquestions"],
                f"-- refined (Truster: {scores['initial']:.2f} -> {scores['refined']:.2f})", after["text"],
                f"-- gold {record['answer']}"]))
    return "".join(f"==== {name}: {len(items)}\n\n" + "".join(item + "\n\n" for item in items)
                   for name, items in parts.items())


def summary(folder, names):
    """Several runs side by side as a Markdown table: mean accuracy, its range, and each run's difference and p."""
    runs = []
    for name in names:
        path = folder / name / "results.json"
        if not path.is_file():
            raise art.UserError(f"{path} is missing: make it with: python evaluate.py --run {name}")
        runs.append(json.loads(path.read_text()))
    for name, run in zip(names, runs):
        same = {key: runs[0][key] for key in ("task", "n", "data_sha256", "models")}
        art.require_same(run, same, folder / name, "give runs of the same models on the same questions")
    lines = ["| row | mean accuracy | lowest to highest | vs initial (p of each run) | vs self_refine (p of each) |",
             "| --- " * 5 + "|"]
    for rows in zip(*(run["rows"] for run in runs)):
        accuracy = [row["accuracy"] for row in rows]
        versus = [f"{np.mean([row[key]['delta'] for row in rows]):+.1%} "
                  f"({', '.join(format(row[key]['p'], '.2g') for row in rows)})"
                  if rows[0][key] else "-" for key in ("vs_initial", "vs_self_refine")]
        lines.append(f"| {rows[0]['row']} | {np.mean(accuracy):.1%} | {min(accuracy):.1%} to {max(accuracy):.1%} | "
                     f"{' | '.join(versus)} |")
    areas = {gate: ", ".join(art.show(run["decision"][gate]["auc"], ".3f") for run in runs)
             for gate in ("asker", "self")}
    return "\n".join([*lines, "", f"{len(runs)} runs ({', '.join(names)}), the same {runs[0]['n']} questions in each. "
                      f"Decision to refine, AUC of each run: asker {areas['asker']}; self {areas['self']}."])


def main():
    parser = argparse.ArgumentParser(description=__doc__, parents=[art.make_parser(llm=True)],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", nargs="+", metavar="RUN", help="only print these finished runs side by side")
    args, began = art.parse(parser, "evaluate"), time.time()
    if args.summary:
        print(summary(args.runs / args.task, args.summary))
        return
    folder = args.runs / args.task / args.run
    dev, test = (art.load_task(args.task, split, args.limit, args.data) for split in ("dev", "test"))
    with art.lock(folder):
        records = run_stages(args, dev, test)
        about = {name: art.read_about(folder / name, f"train_{name}.py")["model"] for name in ("asker", "truster")}
        known = {"llm": args.model, **about}
        models = {name: {"model": model, "parameters": None if name == "llm" and args.base_url else
                         art.parameters(model)} for name, model in known.items()}
        dev, test = records[: len(dev)], records[len(dev):]
        rows, takes = make_rows(args, dev, test, models)
        wrong = [not art.is_correct(args.task, r["candidates"]["initial"]["text"], r["answer"]) for r in test]
        results = {
            "task": args.task, "models": models, "n": len(test), "seed": args.seed, **art.provenance(),
            "data_sha256": art.data_hash(args.task, ["train", "dev", "test"], args.data),
            "seconds": round(time.time() - began, 1),
            "decision": {name: {"auc": art.auc([r["ask"][name]["p_refine"] for r in test], wrong)}
                         for name in ("asker", "self")},
            "rows": rows}
        path = folder / "results.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        if all(before.get(key) == results[key] for key in ("task", "models", "n", "data_sha256", "rows")):
            results |= {key: before[key] for key in ("commit", "versions", "seconds")}  # of the run that made them
        for record, taken in zip(test, takes["art"]):
            record["final"] = record["candidates"]["refined" if taken else "initial"]["answer"]
        art.write_jsonl(folder / "records.jsonl", test)
        art.write_text(folder / "flips.txt", flips(args.task, test, takes["art"]))
        art.write_text(folder / "table.md", table(results))
        picture(results, folder / "results.png")
        art.write_text(path, json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"{folder}: results.json, table.md, records.jsonl, flips.txt ({results['seconds']:.0f} s)")


if __name__ == "__main__":
    art.run(main)
