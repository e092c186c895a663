"""data/prepare.py on tiny raw files, and on the real ones where they lie beside the repository; the toy's promises."""

import hashlib
import json
import random
import sys

import pytest
from conftest import ROOT, load

import art

REAL = ROOT.parent / "shared/data"


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A function that runs data/prepare.py on raw files, {name: content}, whose checksums it takes for right ones."""
    script = load("data/prepare.py")
    monkeypatch.setattr(script, "DEV", {"gsm8k": 2, "gsm8k-offline": 2, "strategyqa": 2})
    monkeypatch.setattr(script, "OFFLINE", 10)

    def make(task, files, *flags, sums=True):
        for name, content in files.items():
            art.write(tmp_path / "files" / name, content)
            if sums:
                monkeypatch.setitem(script.SHA256, name, hashlib.sha256(content.encode()).hexdigest())
        monkeypatch.setattr(sys, "argv", ["prepare.py", task, "--out", str(tmp_path / "out"), *map(str, flags)])
        art.run(script.main)
        return [art.load_task(task, split, data=tmp_path / "out") for split in ("train", "dev", "test")]

    make.script, make.files = script, tmp_path / "files"
    return make


def socratic(*questions):
    return "".join(json.dumps({"question": question, "answer": f"How many? ** 1 + {i} = <<1+{i}={1 + i}>>{1 + i} pens\n"
                                                               f"#### 1,00{i}"}) + "\n"
                   for i, question in enumerate(questions))


GSM8K = {"train_socratic.jsonl": socratic("A?", "B?", "C?", "D?", "Is  it\u2028 E?", "F?"),
         "test_socratic.jsonl": socratic("G?", "is it e", "H?")}


def test_gsm8k(prepare):
    """Train, dev out of train, test; what stands in test too is dropped from train, whatever its punctuation."""
    train, dev, test = prepare("gsm8k", GSM8K, "--files", prepare.files)
    assert (len(train), len(dev), len(test)) == (3, 2, 3)
    assert {record["question"] for record in train + dev} == {"A?", "B?", "C?", "D?", "F?"}
    assert test[1] == {"id": "gsm8k-test-1", "question": "is it e", "answer": "1001",
                       "solution": [["How many?", "1 + 1 = 2 pens"]]}
    # a task out of the test questions alone: the first N to learn from
    files = {"test_socratic.jsonl": socratic(*(f"Question {i}?" for i in range(14)))}
    splits = prepare("gsm8k-offline", files, "--files", prepare.files)
    assert [len(records) for records in splits] == [8, 2, 4] and splits[2][0]["question"] == "Question 10?"


@pytest.mark.parametrize(("text", "answer", "solution"), [
    ("Cost? ** It costs 3*4=$<<3*4=12>>12.\n#### 12", "12", [["Cost?", "It costs 3*4=$12."]]),
    ("Left? ** 3 - 8 = <<3-8=-5>>-5\n#### -5", "-5", [["Left?", "3 - 8 = -5"]]),
    ("A? ** 1\nso it is\nB? ** 2\n#### 2", "2", [["A?", "1 so it is"], ["B?", "2"]]),  # a line that nobody asked for
    ("A? ** \nA? ** 1 \n\n#### 1", "1", [["A?", "1"]]),  # a sub-question without a step, a blank line
    ("A\xa0b? ** one\u2028line\n#### 1", "1", [["A b?", "one line"]]),
])
def test_socratic_line(prepare, text, answer, solution):
    made = prepare.script.gsm8k({"question": "How \u2028 much?", "answer": text}, "x")
    assert made == {"id": "x", "question": "How much?", "answer": answer, "solution": solution}


def items(*qids):
    return [{"qid": qid, "question": f"Is {qid * 3}?", "answer": i % 2 == 0, "facts": ["A fact."],
             "decomposition": ["What is it?", "Is #1 that?"]} for i, qid in enumerate(qids)]


def test_strategyqa(prepare):
    """The first fifth in the order of the qid is test, or of the official file."""
    files = {"train.json": json.dumps(items(*"ifbhdajge")), "dev.json": json.dumps(items("c"))}
    train, dev, test = prepare("strategyqa", files, "--files", prepare.files)
    assert [len(train), len(dev)] == [6, 2] and [record["id"][-1] for record in test] == ["a", "b"]
    assert test[0]["solution"] == [["What is it?", ""], ["Is the answer to sub-question 1 that?", ""]]
    official = {"official.json": json.dumps(items(*"ifbhdajgec"))}
    _, _, test = prepare("strategyqa", official, "--official", prepare.files / "official.json")
    assert [(record["id"][-1], record["answer"]) for record in test] == [("i", "yes"), ("f", "no")]


def refusal(capsys, prepare, *how, **more):
    with pytest.raises(SystemExit) as end:
        prepare(*how, **more)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_raw_files_that_are_not_the_right_ones(prepare, capsys, tmp_path):
    """One line each: another checksum, none there, and an official file that is missing or holds no answers."""
    assert "train_socratic.jsonl: wrong checksum" in refusal(capsys, prepare, "gsm8k", GSM8K, "--files", prepare.files,
                                                             sums=False)
    assert "no train.json" in refusal(capsys, prepare, "strategyqa", {}, "--files", tmp_path)
    assert "nowhere.json" in refusal(capsys, prepare, "strategyqa", {}, "--official", tmp_path / "nowhere.json")
    hidden = {"hidden.json": '[{"qid": "1", "question": "Is it?"}]'}  # as in the official test file
    assert "hidden.json" in refusal(capsys, prepare, "strategyqa", hidden, "--official", prepare.files / "hidden.json")


@pytest.mark.skipif(not REAL.is_dir(), reason="the raw files are not here")
@pytest.mark.parametrize(("task", "counts", "flags"), [
    ("gsm8k-offline", [400, 100, 819], ["--files", REAL / "gsm8k"]),
    ("strategyqa", [1632, 200, 458], ["--files", REAL / "strategyqa"])])
def test_real_files(monkeypatch, tmp_path, task, counts, flags):
    monkeypatch.setattr(sys, "argv", ["prepare.py", task, "--out", str(tmp_path), *map(str, flags)])
    load("data/prepare.py").main()
    splits = [art.load_task(task, split, data=tmp_path) for split in ("train", "dev", "test")]
    assert [len(records) for records in splits] == counts
    train, dev, test = ({art.question_hash(record) for record in records} for records in splits)
    assert not test & (train | dev)
    solved = [art.is_correct(task, art.solution_text(r["solution"], r["answer"]), r["answer"]) for r in splits[2]]
    assert all(solved)


def test_toy_splits_are_disjoint_and_right(monkeypatch):
    """No question twice, none in the half that the base model saw, and every step adds up."""
    prepare, taken = load("data/toy/prepare.py"), set()
    monkeypatch.setitem(sys.modules, "prepare", prepare)  # which pretrain.py imports by this name
    pretrain = load("data/toy/pretrain.py")
    splits = [prepare.make_split(name, 200, 5, taken) for name in ("train", "dev", "train")]  # the last draws the same
    questions = {record["question"] for split in splits for record in split}
    for record in splits[0]:
        for _, step in record["solution"]:
            a, sign, b, _, result = step.rstrip(".").split()[-5:]
            assert {"+": int(a) + int(b), "-": int(a) - int(b)}[sign] == int(result)
        assert record["answer"] == result
    rng = random.Random(0)
    seen = {pretrain.document(rng)[0][0].strip().removeprefix("Question: ") for _ in range(2000)}
    assert len(questions) == 600 and not seen & questions and not any(map(prepare.for_pretraining, questions))
