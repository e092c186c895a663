"""GSM8K (Cobbe et al., arXiv 2110.14168; MIT licence): download, verify, convert. About 11 MB, seconds to a minute.

    python data/gsm8k/prepare.py                               # train.jsonl, dev.jsonl, test.jsonl beside this file
    python data/gsm8k/prepare.py --files ~/grade_school_math/data     # the same from local copies, no network
    python data/gsm8k/prepare.py --files ... --offline-split 1000     # without train_socratic.jsonl: see below

The "socratic" files carry the sub-questions that the Asker learns. One raw line:

    {"question": "A robe takes 2 bolts ...", "answer": "How many bolts of white fiber does it take? ** It takes
     2/2=<<2/2=1>>1 bolt of white fiber\\nHow many bolts in total ...? ** So ... 2+1=<<2+1=3>>3 bolts of ...\\n#### 3"}

`--offline-split N` makes a task of its own, gsm8k-offline, out of the test questions alone: the first N become train
and dev, the rest test. Its folder and ids say so; its figures are not GSM8K's. An id ends in the line of the raw file.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art

COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
URL = f"https://raw.githubusercontent.com/openai/grade-school-math/{COMMIT}/grade_school_math/data/"
SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "train_socratic.jsonl": "153d86551187cfd64ef7afb59bfd0ef75cea3ae9388e7ad31e43920b6dd77872",
    "test_socratic.jsonl": "c96673362fa7a699f4836a9b6474a067448f95fe58064727501ee63ba4c3fdb6",
}
DEV = 500  # fixed, not a flag: everybody's dev is the same


def convert(raw):
    r"""Question, answer and solution of one socratic line; white space is collapsed, since a step has to be one line.

    >>> convert({"question": "Q?", "answer": "How many? ** 2*500=<<2*500=1000>>1000 bolts\n#### 1,000"})
    {'question': 'Q?', 'answer': '1000', 'solution': [['How many?', '2*500=1000 bolts']]}
    """
    text, answer = re.sub(r"<<[^<>]*>>", "", raw["answer"]).rsplit("####", 1)
    text = re.sub(r"\n(?!.* \*\*)", " ", text)  # a line without a sub-question belongs to the step before it
    parts = [[" ".join(part.split()) for part in line.partition(" **")] for line in text.split("\n")]
    solution = [[subquestion, step] for subquestion, _, step in parts if step]  # some sub-questions are not answered
    question = " ".join(raw["question"].split())
    return {"question": question, "answer": answer.strip().replace(",", ""), "solution": solution}


def load(split, task, raw, files):
    """The converted records of one raw split, checked against the plain file of the same questions."""
    hint = "; --offline-split N does without it" if split == "train" else ""
    socratic, plain = (art.read_jsonl(art.fetch(name, URL, SHA256[name], raw, files, hint))
                       for name in (f"{split}_socratic.jsonl", f"{split}.jsonl"))
    records = [{"id": f"{task}-{split}-{line}", **convert(item)} for line, item in enumerate(socratic)]
    differ = sum(any(record[key] != convert(item)[key] for key in ("question", "answer"))
                 for record, item in zip(records, plain, strict=True))
    unasked = sum(" **" not in item["answer"].split("\n")[0] for item in socratic)
    print(f"{split}: {len(records):,} questions; {differ} differ from {split}.jsonl; "
          f"{unasked} begin with a step that has no sub-question (left out)")
    return records


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--files", metavar="DIR", type=Path,
        help="read the raw files here (default: none, since they can be downloaded once, into gsm8k/raw)")
    add("--offline-split", metavar="N", type=int,
        help="write the task gsm8k-offline from the test questions alone, the first N for train and dev, a fifth of "
        "them dev (default: none, since its figures can be compared with nobody's)")
    add("--out", metavar="DIR", default=Path(__file__).resolve().parents[1], type=Path,
        help="folder in which gsm8k/ or gsm8k-offline/ is written (default: data/, where every script looks)")
    args = parser.parse_args(argv)

    raw, task = args.out / "gsm8k" / "raw", "gsm8k" if args.offline_split is None else "gsm8k-offline"
    test = load("test", task, raw, args.files)
    if args.offline_split is None:
        train, size = load("train", task, raw, args.files), DEV
    else:
        if not 5 <= args.offline_split < len(test):
            raise art.UserError(f"--offline-split {args.offline_split}: give a number from 5 to {len(test) - 1}")
        train, test, size = test[:args.offline_split], test[args.offline_split:], args.offline_split // 5
        train = [{**record, "id": record["id"].replace("-test-", "-train-")} for record in train]

    art.write_splits(args.out, task, train, test, size)


if __name__ == "__main__":
    art.run(main)

# Measured with --offline-split 1000: 800 train, 200 dev, 319 test; none dropped, no near duplicates, plain file agrees.
# In full, by construction: 6,973 train, 500 dev, 1,319 test (7,473 + 1,319 raw) if nothing is dropped. Measured on the
# plain files: no question stands in both; near duplicates: 3 of test (20 of 632; 1314 and 5162 of 602) and
# 2 of dev in train (1314 of 5162, 2950 of 674).
# test_socratic.jsonl: 14 answers with commas, 2 negative; questions 1042 and 1284 hold a sub-question without a step.
