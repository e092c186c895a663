"""Mark a handed-in run: evaluate its adapters again, on the data of this student, and print JSON.

    python docs/teach/mark.py HANDED_IN/default --student 17
    python docs/teach/mark.py HANDED_IN/default --student 17 --test-seed SECRET

The folder needs asker/, truster/ and results.json. The first command repeats the student's own
evaluation; the second one asks test questions that the student has never seen.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art


def command(script, *flags):
    """Run a script of the kit; its output goes to stderr."""
    done = subprocess.run([sys.executable, art.ROOT / script, *map(str, flags)], stdout=sys.stderr)
    if done.returncode:
        raise art.UserError(f"{script} failed; its last line says why")


def evaluate(run, folder, student, test_seed, limit):
    """results.json of the handed-in adapters on the data of a student."""
    data, runs = folder / "data", folder / "runs"
    secret = ["--test-seed", test_seed] if test_seed is not None else []
    command("data/toy/prepare.py", "--student", student, "--out", data / "toy", *secret)
    for name in ("asker", "truster"):
        if not (run / name / "args.json").is_file():
            raise art.UserError(f"{run} has no folder {name} with an adapter")
        shutil.copytree(run / name, runs / "toy/marked" / name)
    limits = ["--limit", limit] if limit else []
    command("evaluate.py", "--data", data, "--runs", runs, "--run", "marked", *limits)
    return art.read_json(runs / "toy/marked/results.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the handed-in folder of a run")
    parser.add_argument("--student", type=int, required=True, help="the student's number")
    parser.add_argument("--test-seed", type=int, help="other test questions (default: the student's)")
    parser.add_argument("--limit", type=int, help="only the first questions, for a try")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(args.run, Path(folder), args.student, args.test_seed, args.limit)
    handed_in = art.read_json(args.run / "results.json")

    def accuracy(results):
        return {row["row"]: row["accuracy"] for row in results.get("rows", [])}

    ours, theirs = accuracy(found), accuracy(handed_in)
    off = [abs(ours[row] - theirs[row]) for row in ours.keys() & theirs.keys()]
    print(json.dumps({"student": args.student, "n": found["n"], "rows": ours,
                      "art_vs": found["art_vs"], "handed_in": theirs,
                      "largest_difference": max(off, default=None)}, indent=1))


if __name__ == "__main__":
    art.run(main)
