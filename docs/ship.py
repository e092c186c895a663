"""Copy a finished run to docs/runs/NAME: its table, and of each question the verdicts and numbers, without the texts.

    python docs/ship.py runs/toy/default toy
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import art


def slim(record):
    """A record without what is a text: that of the question, of the answers and of the sub-questions."""
    kept = {key: record[key] for key in ("id", "kind", "right", "trust") if key in record}
    kept["candidates"] = {name: {key: output[key] for key in ("answer", "stopped", "tokens", "logprob")}
                          for name, output in record["candidates"].items()}
    kept["ask"] = {name: {"p_refine": output["p_refine"], **counts(output)} for name, output in record["ask"].items()}
    return kept


def counts(output):
    """How many sub-questions, and how many different ones."""
    asked = output.get("subquestions")
    return {} if asked is None else {"subquestions": len(asked), "different": len(set(asked))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="its name in docs/runs")
    args = parser.parse_args()
    folder = HERE / "runs" / args.name
    art.write(folder / "records.jsonl", [slim(record) for record in art.read_jsonl(args.run / "records.jsonl", "")])
    results, table = ((args.run / name).read_text("utf-8").replace(f"{art.ROOT}/", "")  # not where they were made
                      for name in ("results.json", "table.md"))
    results = json.loads(results)
    for about in results["training"].values():
        about.pop("code", None)
    art.write(folder / "results.json", results)
    art.write(folder / "table.md", table)
    print(f"{folder}: {results['n']:,} questions")


if __name__ == "__main__":
    art.run(main)
