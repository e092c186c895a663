"""GSM8K and StrategyQA (both under the MIT licence): download, verify, convert to data/<task>/{train,dev,test}.jsonl.

    python data/prepare.py gsm8k                                     # Cobbe et al., arXiv 2110.14168; 11 MB
    python data/prepare.py strategyqa                                # Geva et al., arXiv 2101.02235; 4 MB
    python data/prepare.py gsm8k --files DIR                         # from your copies of the raw files, offline
    python data/prepare.py gsm8k-offline --files DIR                 # a task out of GSM8K's test questions alone
    python data/prepare.py strategyqa --official strategyqa_train.json      # in the order of the official file

GSM8K's "socratic" files carry the sub-questions that the Asker learns: `How many ...? ** 2+1=<<2+1=3>>3`.
StrategyQA's come without answers, so the steps of its solutions are empty. The paper tests on the first 20% of the
official file; the copy that is downloaded has lost its order, so the questions are put in that of their `qid`.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import art

GSM8K = ("https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
         "grade_school_math/data/")
STRATEGYQA = ("https://raw.githubusercontent.com/eladsegal/strategyqa/1ba1e97452e189569357876f2854b01357ffbe37/"
              "data/strategyqa/")
SHA256 = {
    "train_socratic.jsonl": "153d86551187cfd64ef7afb59bfd0ef75cea3ae9388e7ad31e43920b6dd77872",
    "test_socratic.jsonl": "c96673362fa7a699f4836a9b6474a067448f95fe58064727501ee63ba4c3fdb6",
    "train.json": "0f72560b8a6fad3db847d2f1a7524fb087297843bb45a8d3245ffd68cbe0de12",
    "dev.json": "0d94842ffb022db8fd5ecd2168b785d5cf67f6faf64f665476bad544a3eb9dde",
}
DEV = {"gsm8k": 500, "strategyqa": 200}  # questions; fixed, not a flag: everybody's dev is the same


def fetch(url, name, files):
    """A raw file as text, verified: the user's copy in `files`, or downloaded once into data/raw."""
    path = Path(files or HERE / "raw") / name
    try:
        if not path.is_file() and not files:
            path.parent.mkdir(exist_ok=True)
            with urllib.request.urlopen(url + name, timeout=60) as reply:
                path.write_bytes(reply.read())
        content = path.read_bytes()
    except OSError as error:
        raise art.UserError(f"no {name} ({error}): put it in a folder and give --files FOLDER") from None
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        path.unlink() if not files else None
        raise art.UserError(f"{path}: wrong checksum; try again, or replace it by {url}{name}")
    return content.decode()


def gsm8k(raw, name):
    r"""A record of one socratic line; white space is collapsed, since a step has to be one line.

    >>> gsm8k({"question": "Q?", "answer": "How many? ** 2*500=<<2*500=1000>>1000 bolts\n#### 1,000"}, "x")
    {'id': 'x', 'question': 'Q?', 'answer': '1000', 'solution': [['How many?', '2*500=1000 bolts']]}
    """
    text, answer = re.sub(r"<<[^<>]*>>", "", raw["answer"]).rsplit("####", 1)
    text = re.sub(r"\n(?!.* \*\*)", " ", text)  # a line without a sub-question belongs to the step before it
    parts = [[" ".join(part.split()) for part in line.partition(" **")] for line in text.split("\n")]
    return {"id": name, "question": " ".join(raw["question"].split()), "answer": answer.strip().replace(",", ""),
            "solution": [[asked, step] for asked, _, step in parts if step]}  # some sub-questions are not answered


def strategyqa(raw):
    """A record of one item; `#1` in a sub-question is the answer to the first one, and says so.

    >>> raw = {"qid": "a", "question": "Q?", "answer": True, "facts": [], "decomposition": ["Is #1 old?"]}
    >>> strategyqa(raw)["solution"]
    [['Is the answer to sub-question 1 old?', '']]
    """
    asked = [re.sub(r"#(\d+)", r"the answer to sub-question \1", text.strip()) for text in raw["decomposition"]]
    return {"id": f"strategyqa-{raw['qid']}", "question": raw["question"].strip(), "facts": raw["facts"],
            "answer": "yes" if raw["answer"] else "no", "solution": [[text, ""] for text in asked]}


def read_official(path):
    """The items of StrategyQA's own training file, in its order."""
    try:
        items = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise art.UserError(f"cannot read {path}: {error}") from None
    if not all(isinstance(item, dict) and {"answer", "decomposition", "facts"} <= item.keys() for item in items):
        raise art.UserError(f"{path} is not the official training file: its items need answer, decomposition and facts")
    return items


def write_splits(folder, train, test, dev_size):
    """Carve dev from train, drop from train what stands in test, and write the three splits."""
    seen = {art.question_hash(record) for record in test}
    kept = [record for record in train if art.question_hash(record) not in seen]
    chosen = set(random.Random(0).sample(range(len(kept)), dev_size))
    splits = {"train": [record for i, record in enumerate(kept) if i not in chosen],
              "dev": [kept[i] for i in sorted(chosen)], "test": test}
    for split, records in splits.items():
        art.write(folder / f"{split}.jsonl", records)
        print(f"{folder / split}.jsonl: {len(records):,} questions")
    print(f"{len(train) - len(kept)} dropped from train, being in test\n{json.dumps(splits['train'][0])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("gsm8k", "gsm8k-offline", "strategyqa"))
    parser.add_argument("--files", metavar="DIR", help="read the raw files here (default: download them)")
    parser.add_argument("--offline-split", type=art.positive, default=500, metavar="N",
                        help="gsm8k-offline: so many questions to learn from, a fifth of them dev (default 500)")
    parser.add_argument("--official", metavar="FILE", type=Path, help="strategyqa: in the order of the official file")
    parser.add_argument("--out", metavar="DIR", default=HERE, type=Path, help="folder of the tasks (default data)")
    args = parser.parse_args()
    if args.task == "strategyqa":
        raw = read_official(args.official) if args.official else sorted(
            (item for name in ("train.json", "dev.json") for item in json.loads(fetch(STRATEGYQA, name, args.files))),
            key=lambda item: item["qid"])
        records = [strategyqa(item) for item in raw]
        train, test, dev = records[len(records) // 5:], records[: len(records) // 5], DEV["strategyqa"]
    else:
        splits = {split: [gsm8k(json.loads(line), f"{args.task}-{split}-{number}") for number, line in enumerate(
            fetch(GSM8K, f"{split}_socratic.jsonl", args.files).strip().split("\n"))]
            for split in (["test"] if args.task == "gsm8k-offline" else ["train", "test"])}
        train, test, dev = splits.get("train"), splits["test"], DEV["gsm8k"]
        if train is None and args.offline_split >= len(test):
            raise art.UserError(f"--offline-split {args.offline_split} leaves none of {len(test)} questions for test")
        if train is None:
            train, test, dev = test[: args.offline_split], test[args.offline_split:], args.offline_split // 5
    write_splits(args.out / args.task, train, test, dev)


if __name__ == "__main__":
    art.run(main)
