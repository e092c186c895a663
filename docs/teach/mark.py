"""Mark a handed-in run: evaluate its adapters again, on the data of this student, and print JSON.

    python docs/teach/mark.py HANDED_IN/default --student 17
    python docs/teach/mark.py HANDED_IN/NAME --student 17       # after: git apply HANDED_IN/change.diff
    python docs/teach/mark.py HANDED_IN/default --student 17 --test-seed SECRET

The first two repeat the student's evaluation, with the rows and settings in results.json: the
largest difference should be 0. The third draws test questions that the student has never seen.
Adapters of another run (--asker-from, --truster-from) are taken from its folder beside NAME.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art


def command(script, *flags):
    """Run a script of the kit; its output goes to stderr."""
    done = subprocess.run([sys.executable, art.ROOT / script, *map(str, flags)], stdout=sys.stderr)
    if done.returncode:
        raise art.UserError(f"{script} failed; its last line says why")


def copy_adapter(own, train, marked):
    """Copy an adapter, unless it has another base or was trained on questions not in `train`."""
    if not (own / "args.json").is_file():
        raise art.UserError(f"there is no adapter in {own}")
    if art.read_json(own / "args.json").get("model") != art.SMALL_TOY:
        raise art.UserError(f"{own} has another base model than {art.SMALL_TOY}")
    others = {*(own / "questions.txt").read_text("utf-8").split()} - train
    if others:
        raise art.UserError(f"{own} was trained on {len(others)} questions that are not in this "
                            "student's data")
    shutil.copytree(own, marked / own.name)


def evaluate(args, handed_in, folder):
    """results.json of the handed-in adapters on the data of a student."""
    data, shared = folder / "data/toy", folder / "runs/toy"
    secret = ["--test-seed", args.test_seed] if args.test_seed is not None else []
    command("data/toy/prepare.py", "--student", args.student, "--out", data, *secret)
    train = {art.question_hash(record) for record in art.read_jsonl(data / "train.jsonl", "")}
    rows = [row["row"] for row in handed_in["rows"]]
    thresholds = ",".join(row[4:] for row in rows if "@" in row)
    asker_from, truster_from = handed_in.get("from", (None, None))
    run = SimpleNamespace(shared=args.run.parent, run=args.run.name, asker_from=asker_from,
                          truster_from=truster_from)
    for name in {"asker", "truster"} | ({"finetuned"} & {*rows}):
        copy_adapter(art.adapter_folder(run, name), train, shared / "marked")
    art.write(shared / "llm.json", handed_in["settings"])
    limits = ["--limit", args.limit] if args.limit else []
    command("evaluate.py", "--data", data.parent, "--runs", shared.parent, "--run", "marked",
            "--rows", ",".join(row for row in rows if "@" not in row),
            "--threshold", thresholds, *limits)
    return art.read_json(shared / "marked/results.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the handed-in folder of a run")
    parser.add_argument("--student", type=int, required=True, help="the student's number, from 1")
    parser.add_argument("--test-seed", type=int,
                        help="seed of the test questions (default: the student's number)")
    parser.add_argument("--limit", type=int, help="only the first questions, to try it")
    args = parser.parse_args()
    handed_in = art.read_json(args.run / "results.json")
    settings = handed_in.get("settings", {})
    if settings.get("model") != art.TOY or settings.get("base_url"):
        raise art.UserError(f"{args.run / 'results.json'} is missing, or is not a run of the toy")
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(args, handed_in, Path(folder))

    def accuracy(results):
        return {row["row"]: row["accuracy"] for row in results["rows"]}

    marked = {"student": args.student, "n": found["n"], "rows": accuracy(found),
              "art_vs": found["art_vs"]}
    if args.test_seed is None:
        ours, theirs = marked["rows"], accuracy(handed_in)
        off = [abs(ours[row] - theirs[row]) for row in ours.keys() & theirs.keys()]
        marked |= {"handed_in": theirs, "largest_difference": max(off)}
    print(json.dumps(marked, indent=1))


if __name__ == "__main__":
    art.run(main)
