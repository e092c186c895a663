"""What the records of a finished run say: its rows, pairs of rows, AUCs with intervals.

    python docs/measure/report.py docs/runs/gsm8k
    python docs/measure/report.py docs/runs/gsm8k --below 400    # test questions with such a number

Thresholds and weights are fitted again, on dev. Intervals of AUC are bootstrap intervals over
questions (2,000 draws, seed 0). No model is asked.
"""

import argparse
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art
import evaluate

PAIRS = [("art_both", "draft"), ("art_both", "self_refine"), ("art_both", "second_sample"),
         ("art", "draft"), ("art", "self_refine"), ("art", "always_truster"), ("art", "art_logprob"),
         ("art_logprob", "draft")]


def load(folder, below):
    """(Outputs as evaluate.py has them, results.json)."""
    art.find_tasks(art.ROOT / "data")
    dev, test = (art.read_jsonl(folder / name, "run python evaluate.py, then docs/ship.py")
                 for name in ("dev.jsonl", "records.jsonl"))
    results = art.read_json(folder / "results.json")
    if below:
        test = [one for one in test if int(re.search(r"\d*$", one["id"])[0] or below) < below]
        if not test:
            raise art.UserError(f"no id of {folder} ends in a number below {below}")
    outputs = evaluate.Outputs(SimpleNamespace(task=results["task"]), dev, test)
    for stage in evaluate.STAGES:
        if stage not in dev[0]:
            continue
        outputs.of[stage] = made = [{"failed": "", **record[stage]} for record in dev + test]
        if "answer" in made[0]:
            outputs.correct[stage] = np.array([
                one["finished"] and art.is_correct(
                    results["task"], f"#### {one['answer']}\n", record["answer"])
                for one, record in zip(made, outputs.records)], bool)
    if "logprob" not in outputs.of:
        outputs.of["logprob"] = evaluate.logprob_gate(None, None, None, outputs.of["draft"])
    return outputs, results


def interval(scores, labels):
    """AUCs (or the difference of two: `scores` is a pair) with a 95% bootstrap interval."""
    def value(chosen):
        found = [art.auc(one[chosen], labels[chosen]) for one in scores]
        return None if None in found else found[0] - (found[1] if len(found) == 2 else 0)

    draws = np.random.default_rng(0).integers(0, len(labels), (2000, len(labels)))
    drawn = [one for one in map(value, draws) if one is not None]
    if not drawn:
        return "-"
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{value(np.arange(len(labels))):.3f} ({low:.3f} to {high:.3f})"


def aucs(outputs, part):
    """[(name, AUC with interval), ...]: gates on all drafts, choosers where refining changed."""
    drafts, lines = outputs.correct["draft"][part], []
    for stage in ("ask", "ask_self", "logprob"):
        if stage in outputs.of:
            p = outputs.column(stage, "p_refine")[part]
            lines.append((f"gate {stage}", interval([p[p >= 0]], ~drafts[p >= 0])))
    if "score_refined" not in outputs.of:
        return lines
    refined = outputs.correct["refined"][part]
    changed = refined != drafts
    margins = {chooser: np.nan_to_num(outputs.margin("refined", chooser))[part][changed]
               for chooser in ("truster", "logprob", "both")}
    for chooser, margin in margins.items():
        lines.append((f"chooser {chooser}", interval([margin], refined[changed])))
    for new, old in (("both", "truster"), ("both", "logprob"), ("truster", "logprob")):
        lines.append((f"{new} minus {old}",
                      interval([margins[new], margins[old]], refined[changed])))
    return lines


def always_taken(outputs):
    """[cells of a line, ...]: what each answer fixes and breaks, beside the second sample."""
    drafts, second = (outputs.correct[stage][outputs.test] for stage in ("draft", "second"))
    for stage in ("refined", "refined_self", "refined_gold", "second"):
        if stage in outputs.correct:
            new = outputs.correct[stage][outputs.test]
            fixed = evaluate.compare(new[~drafts], second[~drafts])
            broken = evaluate.compare(~new[drafts], ~second[drafts])
            yield [stage, f"{(new & ~drafts).sum()} of {(~drafts).sum()}",
                   f"{(~new & drafts).sum()} of {drafts.sum()}",
                   *("-" if stage == "second" else evaluate.difference(found)
                     for found in (fixed, broken))]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished or shipped run")
    parser.add_argument("--below", type=int, metavar="N", help="only ids with a number below N")
    args = parser.parse_args()
    outputs, results = load(args.run, args.below)
    if results["rows"][0]["row"] != "draft":
        raise art.UserError(f"{args.run} has no row draft: add it with evaluate.py --rows")
    n, rows = len(outputs.records[outputs.test]), {}
    print(f"{n:,} test questions, {len(outputs.records[outputs.dev]):,} of dev\n\n"
          "| row | correct (95%) | points over the draft (95%) | p | fixed | broken |\n"
          + "| --- " * 6 + "|")
    for row in results["rows"]:
        name = row["row"]
        rule = evaluate.ROWS.get(name)  # none for art@T
        if name == "random_gate" or not rule or not evaluate.stages_of(rule) <= outputs.of.keys():
            continue
        if rule.gate == "word" and "question" not in outputs.records[0]:
            continue
        figures, rows[name] = evaluate.make_row(outputs, rule)
        found, (low, high) = evaluate.compare(rows[name], rows["draft"]), figures["ci95"]
        gain = f"{evaluate.difference(found)} | {found['p']:.2g}" if name != "draft" else "- | -"
        print(f"| {name} | {figures['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {gain} | "
              f"{figures['fixed']} | {figures['broken']} |")
    print(f"\n| pair | points (95%) | p | won | lost |\n{'| --- ' * 5}|")
    for new, old in PAIRS:
        if {new, old} <= rows.keys():
            found = evaluate.compare(rows[new], rows[old])
            print(f"| {new} minus {old} | {evaluate.difference(found)} | {found['p']:.2g} | "
                  f"{found['won']} | {found['lost']} |")
    if "second" in outputs.correct:
        print("\n| always taken | fixed | broken | fixed: points more than a second sample (95%) | "
              f"broken: the same |\n{'| --- ' * 5}|")
        for cells in always_taken(outputs):
            print(f"| {' | '.join(cells)} |")
    parts = {"test": outputs.test, "dev": outputs.dev}
    print(f"\n| AUC (95%) | {' | '.join(parts)} |\n{'| --- ' * 3}|")
    for (name, first), (_, second) in zip(*(aucs(outputs, part) for part in parts.values())):
        print(f"| {name} | {first} | {second} |")
    lists = [record["lists"] for record in outputs.records[outputs.test] if "lists" in record]
    if lists:
        lines, gold, ends = np.array(lists, float).T
        print(f"\nlists of the Asker: {lines.mean():.2f} lines (gold {gold.mean():.2f}); "
              f"{np.mean(lines == gold):.0%} are as long as gold, {ends.mean():.0%} end in a line "
              "like the question's")


if __name__ == "__main__":
    art.run(main)
