"""Which exercises are done? The expected values are what solutions.py gives.

    python docs/exercises/check.py
    python docs/exercises/check.py FILE --json      # as JSON: {exercise: verdict}
    python docs/exercises/check.py --docs           # write the expected values into README.md
"""

import argparse
import functools
import importlib.util
import json
import re
import sys
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import art

RUNS = art.ROOT / "docs/runs"


def columns(run):
    """The columns that the exercises need, by the names of their parameters."""
    rng, n = np.random.default_rng(0), len(run["id"])
    orders = [rng.permutation(n) for _ in range(50)]
    return {"p_refine": run["ask.p_refine"], "threshold": 0.5,
            "correct_draft": run["correct.draft"], "incorrect_draft": ~run["correct.draft"],
            "correct_refined": run["correct.refine_always"], "correct_art": run["correct.art"],
            "score_draft": run["score_draft.score"], "score_refined": run["score_refined.score"],
            "answers_draft": run["draft.answer"], "answers_refined": run["refined.answer"],
            "orders": orders}


def values(theirs, toy, real):
    """{exercise: a function that gives its value}. `theirs` has the functions; columns of two runs."""
    import torch

    def call(name, run, *names):
        return getattr(theirs, name)(*(run[key] for key in names))

    scores, correct = torch.tensor([0.5, -0.2, 1.0, 0.1]), torch.tensor([True, False, False, True])
    asker = ("p_refine", "threshold", "correct_draft", "correct_refined")
    return {
        "fixed_broken": lambda: call("fixed_broken", toy, "correct_draft", "correct_refined"),
        "row_asker": lambda: call("row_asker", toy, *asker),
        "row_art": lambda: call("row_art", real, *asker[:2], "score_draft", "score_refined",
                                *asker[2:]),
        "gap_closed": lambda: call("gap_closed", toy, "correct_draft", "correct_refined",
                                   "correct_art"),
        "area": lambda: call("area", real, "p_refine", "incorrect_draft"),
        "calibration_error": lambda: call("calibration_error", toy, "p_refine", "incorrect_draft"),
        "sign_test": lambda: theirs.sign_test(2, 10),
        "least_net_gain": lambda: [theirs.least_net_gain(n) for n in (5, 20, 100)],
        "refining_pays": lambda: call("refining_pays", real, "correct_draft", "correct_refined"),
        "optimism": lambda: call("optimism", real, *asker[:1], *asker[2:], "orders"),
        "same_answers": lambda: call("same_answers", real, "answers_draft", "answers_refined"),
        "majority": lambda: [theirs.majority(votes) for votes in (
            ["3", "4", "4"], ["4", "3"], [None, None, "5"])],
        "hinge": lambda: theirs.hinge(scores, correct),
        "prior_back": lambda: [theirs.prior_back(0.5, 0.2), theirs.prior_back(0.9, 0.3)],
        "lora_weights": lambda: theirs.lora_weights(
            [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 16),
        "numbered": lambda: theirs.numbered({"question": "How many?"}, ["Who?", "When?"]),
    }


@functools.cache
def shipped_runs():
    """The columns of the toy's and of the real run."""
    return [columns(art.load_columns(RUNS / name)) for name in ("toy", "gsm8k")]


def expected():
    """{exercise: value}: what the solutions give on the shipped runs."""
    import solutions
    return {name: plain(value()) for name, value in values(solutions, *shipped_runs()).items()}


def in_docs(wanted):
    """(README.md, the same with the expected values put in)."""
    text = (HERE / "README.md").read_text("utf-8")

    def put(found):
        value = json.loads(json.dumps(wanted[found[2]], default=float), parse_float=rounded)
        return f"{found[1]}`{json.dumps(value)}`"

    return text, re.sub(r"(?m)(^\d+\. `(\w+)`.*Expected: )`[^`]+`", put, text)


def rounded(number):
    return round(float(number), 5)


def plain(value):
    """Without the types of numpy and torch; tuples become lists."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def agrees(value, wanted):
    """Equal; numbers up to 0.0005."""
    if isinstance(wanted, list):
        return (isinstance(value, list) and len(value) == len(wanted)
                and all(agrees(*pair) for pair in zip(value, wanted)))
    if isinstance(wanted, float):
        return isinstance(value, (int, float)) and abs(value - wanted) <= 0.0005
    return type(value) is type(wanted) and value == wanted


def check(theirs):
    """{exercise: "done", "not yet" or what is wrong}."""
    wanted, verdicts = expected(), {}
    for name, value_of in values(theirs, *shipped_runs()).items():
        try:
            value = plain(value_of())
            verdicts[name] = ("done" if agrees(value, wanted[name])
                              else f"gives {value!r}, expected {wanted[name]!r}")
        except NotImplementedError:
            verdicts[name] = "not yet"
        except Exception as error:  # the other exercises go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdicts[name] = (f"{type(error).__name__}: {error} "
                              f"({Path(where.filename).name}, line {where.lineno})")
    return verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "exercises.py",
                        help="the filled-in exercises (default exercises.py beside this script)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--docs", action="store_true", help="write the expected values")
    args = parser.parse_args()
    if args.docs:
        return art.write(HERE / "README.md", in_docs(expected())[1])
    if not args.file.is_file():
        raise art.UserError(f"there is no file {args.file}")
    spec = importlib.util.spec_from_file_location("theirs", args.file)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    verdicts = check(theirs)
    if args.json:
        return print(json.dumps(verdicts, indent=1))
    for number, (name, verdict) in enumerate(verdicts.items(), 1):
        print(f"{number:2}  {name:18} {verdict}")
    print(f"{sum(verdict == 'done' for verdict in verdicts.values())} of {len(verdicts)} done")


if __name__ == "__main__":
    np.set_printoptions(legacy="1.25")
    art.run(main)
