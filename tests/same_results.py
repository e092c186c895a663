"""Do the first and this edition agree, row by row, on the same adapters and data? On the first toy, in 32 bits.

    git worktree add FIRST dd3b636                                          # the first edition
    python tests/same_results.py --first FIRST --runs DIR --limit 300
    python tests/same_results.py --first FIRST --runs DIR --limit 8 --limit-train 64     # a quick try

The first edition brings toy and base model. It samples and trains in DIR/first, unless that is done. Its adapters are
then put into a run of this edition, DIR/second, and both evaluate.py answer the first --limit questions of dev and
test, each with its own prompts, decoding and statistics. The table shows what both say of every row that neither draws
at random; exit code 1 if something differs. The refinement sees the draft, as it did in the first edition.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import art

ROWS = ["initial", "refine_always", "always_truster", "self_refine", "self_refine_plain", "asker", "asker_plain",
        "asker_self", "art", "random_gate", "logprob_choice", "finetuned", "oracle_gate", "oracle_choice"]
LLM = {"base_url": None, "bits": 32, "chat": "auto", "shots": 0, "strategy": "cot",
       "facts": "refine", "show_draft": "yes", "max_new_tokens": 96, "draft_temperature": 0.0, "temperature": 0.7,
       "sample_seed": 0, "k": 4, "preset": "toy"}
TOLERANCE = 5e-4  # of an AUC or a threshold: both print three digits


def run(folder, *words):
    """Run a script of one edition in its own folder."""
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=folder, check=True)


def make_data(first, folder, limit, limit_train):
    """The first edition's toy task; of dev and test, and of train if wished, the first questions."""
    run(first, "data/toy/prepare.py", "--out", folder / "toy")
    for split, count in (("train", limit_train), ("dev", limit), ("test", limit)):
        path = folder / f"toy/{split}.jsonl"
        art.write(path, art.read_jsonl(path, "")[:count])


def first_edition(first, folder, data):
    """Its five commands; what is finished there is not made again."""
    flags = ["--bits", 32, "--data", data, "--runs", folder]
    run(first, "art.py", "sample", *flags)
    run(first, "train_asker.py", *flags)
    run(first, "train_truster.py", *flags)
    run(first, "evaluate.py", *flags, "--rows", ",".join(ROWS))


def convert(old, new, model):
    """The first edition's samples and adapters, runs/toy of each, as this edition keeps them; `model` is its base."""
    rows = {}
    for row in art.read_jsonl(old / "samples.jsonl", ""):
        rows.setdefault(row["id"], {})[row["sample"]] = row
    samples = []
    for name, several in rows.items():  # of a question of dev, number 0 is the draft
        first = 1 if name.startswith("toy-dev") else 0
        samples.append({"id": name, "samples": [several[i] for i in range(first, first + LLM["k"])]})
        if first:
            samples[-1]["draft"] = several[0]
    art.write(new / "samples.jsonl", samples)
    art.write(new / "llm.json", LLM | {"model": str(model)})
    for name in ("asker", "finetuned", "truster"):
        about, folder = json.loads((old / "default" / name / "args.json").read_text("utf-8")), new / "default" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(old / "default" / name / file, folder / file)
        kept = {"model": str(model), "bits": about["bits"], "steps": about["steps"],
                "weights": art.weights_id(model, new)}
        if name == "finetuned":
            kept["strategy"] = about["strategy"]
        elif name == "asker":
            kept["prior_odds"] = math.exp(about["shift"])
        art.write(folder / "args.json", kept)


def figures_of_first(results):
    """{row: {figure: value}} of the first edition's results.json."""
    made = {}
    for row in results["rows"]:
        flips, gated = row["flips"] or {}, row["row"] != "finetuned"  # else nothing is refined
        made[row["row"]] = {
            "accuracy": row["accuracy"], "mended": flips.get("wrong_right"), "broken": flips.get("right_wrong"),
            "refined": row["refined_share"] if gated else None, "same answer": row["same_answer"] if gated else None,
            "unparsed": row["unparsed"], "cut off": row["cut_off"], "threshold": row["settings"]["threshold"],
            "ci95": row["ci95"], "vs_initial": row["vs_initial"], "vs_self_refine": row["vs_self_refine"]}
    return made


def figures_of_second(results):
    """The same of this edition's."""
    def versus(row, other):  # the first edition did not count questions won and lost
        about = row.get(f"vs_{other}")
        return about and {name: about[name] for name in ("delta", "ci95", "p")}

    return {row["row"]: {
        "accuracy": row["accuracy"], "mended": row.get("mended"), "broken": row.get("broken"),
        "refined": row["refined"] if row["row"] != "finetuned" else None, "unparsed": row.get("unparsed"),
        "same answer": row.get("same_answer") if row["row"] != "finetuned" else None,
        "cut off": row.get("cut_off"), "threshold": row["threshold"], "ci95": row["ci95"],
        "vs_initial": versus(row, "initial"), "vs_self_refine": versus(row, "self_refine")} for row in results["rows"]}


def equal(one, other):
    """Are two figures the same; a difference to itself, which one edition leaves out, is none."""
    if isinstance(one, dict) or isinstance(other, dict):
        none = {"delta": 0.0, "ci95": [0.0, 0.0], "p": 1.0}
        one, other = (none if value is None else value for value in (one, other))
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return abs(one - other) < TOLERANCE if isinstance(one, float) and isinstance(other, float) else one == other


def compare(one, two):
    """Print the table of both results.json; returns whether they agree."""
    first, second = figures_of_first(one), figures_of_second(two)
    shown = {"accuracy": ".1%", "mended": "d", "broken": "d", "refined": ".1%", "unparsed": "d", "cut off": "d",
             "threshold": ".3f"}
    print(f"\n{two['n']} test questions; first edition / this one\n\n| row | {' | '.join(shown)} | |\n"
          + "| --- " * (len(shown) + 2) + "|")
    agree = True
    for row in ROWS:
        lacking = [f"no row in the {name} edition" for name, made in (("first", first), ("second", second))
                   if row not in made]
        if lacking:
            print(f"| {row} {'| ' * (len(shown) + 1)}| {', '.join(lacking)} |")
            agree = False
            continue
        a, b = first[row], second[row]
        cells = [f"{art.show(a[name], form)} / {art.show(b[name], form)}" for name, form in shown.items()]
        differ = [name for name in a if not equal(a[name], b[name])]
        print(f"| {row} | {' | '.join(cells)} | {'differs: ' + ', '.join(differ) if differ else 'same'} |")
        agree = agree and not differ
    for name, here in (("asker", "Asker"), ("self", "the LLM itself")):
        a, b = one["decision"][name]["auc"], two["auc"][here]
        print(f"\nAUC of {here}: {art.show(a, '.4f')} / {art.show(b, '.4f')}, {'same' if equal(a, b) else 'differs'}.")
        agree = agree and equal(a, b)
    return agree


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=Path, required=True, help="a checkout of the first edition")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the data and the runs of both")
    parser.add_argument("--limit", type=int, default=300, help="questions of dev and of test (default 300)")
    parser.add_argument("--limit-train", type=int, help="training questions (default all)")
    args = parser.parse_args()
    first, folder = args.first.resolve(), args.runs.resolve()
    if not (folder / "data/toy/test.jsonl").is_file():
        make_data(first, folder / "data", args.limit, args.limit_train)
    found = len(art.load_task("toy", "test", None, folder / "data"))
    assert found == args.limit, f"{folder} was begun with --limit {found}: give another folder"
    first_edition(first, folder / "first", folder / "data")
    convert(folder / "first/toy", folder / "second/toy", first / "data/toy/base")
    run(ROOT, "evaluate.py", "--data", folder / "data", "--runs", folder / "second", "--rows", ",".join(ROWS))
    results = [json.loads((folder / name / "toy/default/results.json").read_text("utf-8"))
               for name in ("first", "second")]
    sys.exit(0 if compare(*results) else 1)


if __name__ == "__main__":
    main()
