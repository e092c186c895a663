"""StrategyQA (Geva et al., arXiv 2101.02235; MIT licence): download, verify, convert. About 4 MB, seconds.

    python data/strategyqa/prepare.py                            # train.jsonl, dev.jsonl, test.jsonl beside this file
    python data/strategyqa/prepare.py --files DIR                # from your copies of train.json and dev.json, offline
    python data/strategyqa/prepare.py --official strategyqa_train.json     # in the order of the official file

Answers are public for the official train file alone, 2,290 questions. The paper tests on its first 20%. The copy that
is downloaded has lost that order, so by default the questions are put in the order of their `qid`, and figures differ
by it; with the official file given, its order is taken. One raw item:

    {"qid": "2bc9..", "question": "Are more people today related to Genghis Khan than Julius Caesar?", "answer": true,
     "facts": ["Julius Caesar had three children.", ...], "decomposition": ["How many kids did Caesar have?", ...]}

`decomposition` are the sub-questions. They come without answers, so the steps of `solution` are empty.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art

COMMIT = "1ba1e97452e189569357876f2854b01357ffbe37"
URL = f"https://raw.githubusercontent.com/eladsegal/strategyqa/{COMMIT}/data/strategyqa/"
SHA256 = {
    "train.json": "0f72560b8a6fad3db847d2f1a7524fb087297843bb45a8d3245ffd68cbe0de12",
    "dev.json": "0d94842ffb022db8fd5ecd2168b785d5cf67f6faf64f665476bad544a3eb9dde",
}
DEV = 200  # fixed, not a flag: everybody's dev is the same


def convert(raw, split):
    """One raw item as a record; `#1` in a sub-question is the answer to the first one, and says so.

    >>> raw = {"qid": "a", "question": "Q?", "answer": True, "facts": [], "decomposition": ["Who?", "Is #1 old?"]}
    >>> convert(raw, "test")["solution"]
    [['Who?', ''], ['Is the answer to sub-question 1 old?', '']]
    """
    asked = [re.sub(r"#(\d+)", r"the answer to sub-question \1", text.strip()) for text in raw["decomposition"]]
    return {"id": f"strategyqa-{split}-{raw['qid']}", "question": raw["question"].strip(),
            "answer": "yes" if raw["answer"] else "no", "solution": [[subquestion, ""] for subquestion in asked],
            "facts": [fact.strip() for fact in raw["facts"]]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--files", metavar="DIR", type=Path, help="read the raw files here (default: none, they are downloaded once)")
    add("--official", metavar="FILE", type=Path,
        help="the official strategyqa_train.json, for its order (default: order of qid)")
    add("--out", metavar="DIR", default=Path(__file__).resolve().parents[1], type=Path,
        help="folder in which strategyqa/ is written (default: data/, where every script looks)")
    args = parser.parse_args(argv)
    if args.official:
        if not args.official.is_file():
            raise art.UserError(f"no file {args.official}: give the official strategyqa_train.json, or no --official")
        items = json.loads(args.official.read_bytes())
        if not all("answer" in item for item in items):
            raise art.UserError(f"{args.official} has no answers: give strategyqa_train.json, not the test file")
    else:
        paths = [art.fetch(name, URL, SHA256[name], args.out / "strategyqa/raw", args.files) for name in SHA256]
        items = sorted((item for path in paths for item in json.loads(path.read_bytes())), key=lambda item: item["qid"])
    size = len(items) // 5
    art.write_splits(args.out, "strategyqa", [convert(item, "train") for item in items[size:]],
                     [convert(item, "test") for item in items[:size]], DEV)


if __name__ == "__main__":
    art.run(main)
