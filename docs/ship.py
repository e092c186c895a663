"""Copy a finished run to docs/runs/NAME: its table, and the records without their long texts.

    python docs/ship.py runs/toy/default toy
    python docs/ship.py runs/gsm8k/default gsm8k --without-texts     # all stages, numbers alone
"""

import argparse
import difflib
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import art

KEPT = ("id", "kind", "question", "answer", "correct")
ANSWER = ("text", "answer", "finished", "failed", "tokens", "logprob")


def slim(record):
    """A record with the draft, the refined answer, the decision and the scores of both answers."""
    kept = {key: record[key] for key in KEPT if key in record}
    stages = {"draft": ANSWER, "refined": ANSWER, "ask": ("p_refine", "subquestions"),
              "score_draft": ("score",), "score_refined": ("score",)}
    for stage, keys in stages.items():
        if stage in record:  # the run may have no Asker, or no Truster
            kept[stage] = {key: record[stage][key] for key in keys}
    return kept


def numbers(record):
    """A record without question and texts: every stage, and the sizes of the Asker's list."""
    kept = {key: record[key] for key in ("id", "answer", "correct")}
    keys = {*ANSWER, "prompt_tokens", "p_refine", "score"} - {"text"}
    for stage, output in record.items():
        if isinstance(output, dict) and stage != "correct":
            kept[stage] = {key: output[key] for key in sorted(output.keys() & keys)}
    if "ask" in record:
        gold, asked = art.gold_subquestions(record), record["ask"]["subquestions"]
        last = re.split(r"(?<=[.!?])\s+", record["question"])[-1]
        end = asked[-1].lower() if asked else ""
        alike = difflib.SequenceMatcher(None, end, last.lower(), autojunk=False).ratio()
        kept["lists"] = [len(asked), len(gold), alike > 0.6]
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="its name in docs/runs")
    parser.add_argument("--without-texts", action="store_true", help="of data that is not ours")
    args = parser.parse_args()
    folder, fix = HERE / "runs" / args.name, "run python evaluate.py first"
    for name in ("records.jsonl", "dev.jsonl"):
        records = art.read_jsonl(args.run / name, fix)
        shorten = numbers if args.without_texts else slim
        art.write(folder / name, [shorten(record) for record in records])
    results = (args.run / "results.json").read_text("utf-8")
    results = json.loads(results.replace(f"{art.ROOT.as_posix()}/", ""))
    llm = Path(results["settings"]["model"])
    if llm.is_absolute():  # where it is on this machine does not matter
        results["settings"]["model"] = llm.name
    art.write(folder / "results.json", results)
    art.write(folder / "table.md", (args.run / "table.md").read_text("utf-8"))
    print(f"{folder}: {results['n']:,} test questions")


if __name__ == "__main__":
    art.run(main)
