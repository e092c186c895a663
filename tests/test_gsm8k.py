"""data/gsm8k/prepare.py on tiny raw files; nothing is downloaded."""

import hashlib
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import art  # noqa: E402

THINGS = "apples boats cards drums eggs forks grapes hats inks jars kites lamps mugs nuts".split()


@pytest.fixture
def prepare():
    """A fresh copy of the script: the tests change its constants."""
    spec = importlib.util.spec_from_file_location("gsm8k_prepare", ROOT / "data" / "gsm8k" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raw_pair(question, a, b):
    """The same question as a socratic and as a plain line."""
    step = f"There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b}."
    return ({"question": question, "answer": f"How many are there? ** {step}\n#### {a + b:,}"},
            {"question": question, "answer": f"{step}\n#### {a + b:,}"})


@pytest.fixture
def files(tmp_path, prepare, monkeypatch):
    """Four raw files, 14 questions for train and 14 for test, whose checksums the script takes for the right ones."""
    folder, rng = tmp_path / "local", random.Random(0)
    folder.mkdir()
    for split, verb in ("train", "buys"), ("test", "sells"):
        pairs = [raw_pair(f"Somebody {verb} {thing}. How many are there?", rng.randint(900, 999), 70)
                 for thing in THINGS]
        write_raw(prepare, monkeypatch, folder / f"{split}_socratic.jsonl", [socratic for socratic, _ in pairs])
        write_raw(prepare, monkeypatch, folder / f"{split}.jsonl", [plain for _, plain in pairs])
    monkeypatch.setattr(prepare, "DEV", 4)
    return folder


def write_raw(prepare, monkeypatch, path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setitem(prepare.SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def splits(folder):
    return {path.stem: art.read_jsonl(path) for path in sorted(folder.glob("*.jsonl")) if path.stem != "exemplars"}


@pytest.mark.parametrize(("text", "answer", "solution"), [
    ("Cost? ** It costs 3*4=$<<3*4=12>>12.\n#### 12", "12", [["Cost?", "It costs 3*4=$12."]]),
    ("Sum? ** 2*600 = <<2*600=1200>>1,200 in all\n#### 1,200", "1200", [["Sum?", "2*600 = 1,200 in all"]]),
    ("Left? ** 3 - 8 = <<3-8=-5>>-5\n#### -5", "-5", [["Left?", "3 - 8 = -5"]]),
    ("A? ** 1\nso it is\nB? ** 2\n#### 2", "2", [["A?", "1 so it is"], ["B?", "2"]]),  # a line that nobody asked for
    ("A? ** \nA? ** 1 \n\n#### 1", "1", [["A?", "1"]]),  # a sub-question without a step, a blank line
    ("A\xa0b? ** one\u2028line\n#### 1", "1", [["A b?", "one line"]]),
])
def test_convert(prepare, text, answer, solution):
    assert prepare.convert({"question": "How \u2028 much?", "answer": text}) == {
        "question": "How much?", "answer": answer, "solution": solution}


def test_full_split(prepare, files, tmp_path):
    prepare.main(["--files", str(files), "--out", str(tmp_path)])
    found = splits(tmp_path / "gsm8k")
    assert {name: len(records) for name, records in found.items()} == {"train": 10, "dev": 4, "test": 14}
    assert found["test"][3]["id"] == "gsm8k-test-3" and found["test"][3]["question"].startswith("Somebody sells drums")
    fields = {"id", "question", "answer", "solution"}
    assert all(set(record) == fields for records in found.values() for record in records)
    lines = [int(record["id"].rsplit("-", 1)[1]) for name in ("train", "dev") for record in found[name]]
    assert sorted(lines) == list(range(14))  # train and dev together are the raw train, each question once


def test_a_test_question_is_dropped_from_train(prepare, files, tmp_path, monkeypatch, capsys):
    lines = art.read_jsonl(files / "train_socratic.jsonl")
    lines[5]["question"] = art.read_jsonl(files / "test.jsonl")[2]["question"].upper().replace(".", " !")
    write_raw(prepare, monkeypatch, files / "train_socratic.jsonl", lines)
    prepare.main(["--files", str(files), "--out", str(tmp_path)])
    found = splits(tmp_path / "gsm8k")
    assert len(found["train"]) + len(found["dev"]) == 13
    seen = {art.normalise(record["question"]) for record in found["test"]}
    assert not any(art.normalise(record["question"]) in seen for name in ("train", "dev") for record in found[name])
    assert "1 dropped from train" in (out := capsys.readouterr().out) and "1 differ from train.jsonl" in out


def test_near_duplicates(prepare):
    story = "{} has {} red marbles in a bag and gives half of them away. How many marbles are left in the bag?"
    left = [{"id": "a", "question": story.format("Ann", 12)}, {"id": "b", "question": "How far is the next town?"}]
    assert art.near_duplicates(left, [{"id": "c", "question": story.format("Bob", "1,400")}]) == [("a", "c")]


def test_near_duplicates_are_counted_between_all_splits(tmp_path, capsys):
    story = "{} has {} red marbles in a bag and gives half of them away. How many marbles are left in the bag?"
    raw = [{"id": f"x-train-{i}", "question": story.format(name, i), "answer": "1"} for i, name in enumerate("ABC")]
    test = [{"id": "x-test-0", "question": story.format("D", 9), "answer": "1"}]
    art.write_splits(tmp_path, "x", raw, test, dev_size=1)
    assert "5 near duplicates stay" in capsys.readouterr().out  # all pairs of four questions but the one inside train


def test_offline_split_is_a_task_of_its_own(prepare, files, tmp_path):
    for name in "train.jsonl", "train_socratic.jsonl":
        (files / name).unlink()
    command = ["--files", str(files), "--out", str(tmp_path), "--offline-split", "10"]
    prepare.main(command)
    folder = tmp_path / "gsm8k-offline"
    found, first = splits(folder), {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: len(records) for name, records in found.items()} == {"train": 8, "dev": 2, "test": 4}
    assert all(record["id"].startswith(f"gsm8k-offline-{name}-")
               for name, records in found.items() for record in records)
    questions = [art.normalise(record["question"]) for records in found.values() for record in records]
    assert len(set(questions)) == 14
    assert not (tmp_path / "gsm8k").exists()
    prepare.main(command)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_errors_name_the_mend(prepare, files, tmp_path, monkeypatch):
    command = ["--files", str(files), "--out", str(tmp_path)]
    for size in "0", "4", "14":
        with pytest.raises(art.UserError, match="from 5 to 13"):
            prepare.main([*command, "--offline-split", size])
    (files / "train_socratic.jsonl").unlink()
    with pytest.raises(art.UserError, match="no file .*train_socratic.jsonl.*--offline-split"):
        prepare.main(command)
    with open(files / "test.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(art.UserError, match="test.jsonl: wrong checksum; replace it by https"):
        prepare.main(command)
    monkeypatch.setattr(prepare, "URL", (tmp_path / "nowhere").as_uri() + "/")
    with pytest.raises(art.UserError, match="cannot download .*--files"):
        prepare.main(command[2:])


def test_download(prepare, files, tmp_path, monkeypatch):
    """From a file:// address: fetched once, kept in raw/, the same result as from local copies."""
    monkeypatch.setattr(prepare, "URL", files.as_uri() + "/")
    prepare.main(["--out", str(tmp_path / "a")])
    prepare.main(["--files", str(files), "--out", str(tmp_path / "b")])
    assert splits(tmp_path / "a" / "gsm8k") == splits(tmp_path / "b" / "gsm8k")
    raw = tmp_path / "a" / "gsm8k" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(prepare.SHA256)
    monkeypatch.setattr(art.torch.hub, "download_url_to_file", None)  # what is there is not fetched again
    prepare.main(["--out", str(tmp_path / "a")])
    (raw / "test.jsonl").write_text("cut")
    with pytest.raises(art.UserError, match="test.jsonl: wrong checksum; delete it"):
        prepare.main(["--out", str(tmp_path / "a")])


def test_broken_download(prepare, files, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "URL", files.as_uri() + "/")
    (files / "test_socratic.jsonl").write_text("<html>not found</html>")
    with pytest.raises(art.UserError, match="invalid hash value.*--files"):
        prepare.main(["--out", str(tmp_path)])
    assert not (tmp_path / "gsm8k" / "raw" / "test_socratic.jsonl").exists()
