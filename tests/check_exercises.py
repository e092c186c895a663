"""Which exercises are done? The values that are expected stand in docs/exercises.md.

    python tests/check_exercises.py
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import art

RUNS = art.ROOT / "docs/runs"


def columns(run):
    """The columns that the exercises need, by the names of their parameters."""
    return {"p_refine": run["ask.asker.p_refine"], "threshold": 0.5,
            "right_draft": run["right.initial"], "wrong_draft": ~run["right.initial"],
            "right_refined": run["right.refine_always"], "right_art": run["right.art"],
            "score_draft": run["trust.truster.draft"], "score_refined": run["trust.truster.refined"],
            "answers_draft": run["candidates.draft.answer"], "answers_refined": run["candidates.refined.answer"]}


def values(theirs, toy, real):
    """{exercise: a function that gives its value}. `theirs` holds the functions, `toy` and `real` are columns."""
    import torch

    def call(name, run, *names):
        return getattr(theirs, name)(*(run[key] for key in names))

    scores, correct = torch.tensor([0.5, -0.2, 1.0, 0.1]), torch.tensor([True, False, False, True])
    asker = ("p_refine", "threshold", "right_draft", "right_refined")
    return {
        "mended_broken": lambda: call("mended_broken", toy, "right_draft", "right_refined"),
        "row_asker": lambda: call("row_asker", toy, *asker),
        "row_art": lambda: call("row_art", real, *asker[:2], "score_draft", "score_refined", *asker[2:]),
        "gap_closed": lambda: call("gap_closed", toy, "right_draft", "right_refined", "right_art"),
        "area": lambda: call("area", real, "p_refine", "wrong_draft"),
        "calibration_error": lambda: call("calibration_error", toy, "p_refine", "wrong_draft"),
        "sign_test": lambda: theirs.sign_test(2, 10),
        "least_net_gain": lambda: [theirs.least_net_gain(n) for n in (5, 20, 100)],
        "refining_pays": lambda: call("refining_pays", real, "right_draft", "right_refined"),
        "optimism": lambda: call("optimism", real, "p_refine", "right_draft", "right_refined"),
        "same_answers": lambda: call("same_answers", real, "answers_draft", "answers_refined"),
        "majority": lambda: [theirs.majority(votes) for votes in (["3", "4", "4"], ["4", "3"], [None, None, "5"])],
        "hinge": lambda: float(theirs.hinge(scores, correct)),
        "prior_back": lambda: [theirs.prior_back(0.5, 0.2), theirs.prior_back(0.9, 0.3)],
        "lora_weights": lambda: theirs.lora_weights([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 16),
        "numbered": lambda: theirs.numbered({"question": "How many?"}, ["Who?", "When?"]),
    }


def expected():
    """{exercise: (value, tolerance)} as docs/exercises.md says."""
    text = (art.ROOT / "docs/exercises.md").read_text("utf-8")
    found = re.findall(r"^\d+\. `(\w+)`.*?Expected: `([^`]+)`(?:, within ([\d.]*\d))?", text, re.MULTILINE)
    return {name: (json.loads(value), float(tolerance or 0)) for name, value, tolerance in found}


def agrees(value, wanted, tolerance):
    """Equal; numbers within the tolerance."""
    if isinstance(wanted, list):
        return len(value) == len(wanted) and all(agrees(a, b, tolerance) for a, b in zip(value, wanted))
    if isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
        return value is not None and abs(value - wanted) <= tolerance
    return value == wanted


def check(theirs):
    """{exercise: "done", "not yet" or what is wrong}."""
    toy, real = (columns(art.load_run(RUNS / name)) for name in ("toy", "gsm8k-offline"))
    wanted, verdicts = expected(), {}
    for name, value_of in values(theirs, toy, real).items():
        try:
            value = value_of()
            right = agrees(value, *wanted[name])
            verdicts[name] = "done" if right else f"gives {value!r}, expected {wanted[name][0]!r}"
        except NotImplementedError:
            verdicts[name] = "not yet"
        except Exception as error:  # whatever a student's function raises is told, the other exercises go on
            verdicts[name] = f"{type(error).__name__}: {error}"
    return verdicts


def main():
    import exercises
    verdicts = check(exercises)
    for number, (name, verdict) in enumerate(verdicts.items(), 1):
        print(f"{number:2}  {name:18} {verdict}")
    print(f"{sum(verdict == 'done' for verdict in verdicts.values())} of {len(verdicts)} done")


if __name__ == "__main__":
    np.set_printoptions(legacy="1.25")
    art.run(main)
