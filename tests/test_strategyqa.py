"""data/strategyqa/prepare.py on tiny raw files, and the doctests of all data scripts; nothing is downloaded."""

import doctest
import hashlib
import importlib.util
import json

import pytest

import art


def load(name):
    """A fresh copy of data/<name>.py."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), art.ROOT / f"data/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gsm8k/prepare", "strategyqa/prepare", "toy/prepare"])
def test_doctests(name):
    assert doctest.testmod(load(name)).failed == 0


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two raw files of 15 questions in all, and the script that takes their checksums for the right ones."""
    script = load("strategyqa/prepare")
    items = [{"qid": f"{97 * i % 100:02d}", "answer": i % 2 == 0,
              "question": f"Is {'abcdefghijklmno'[i] * 3} a {'onmlkjihgfedcba'[i] * 3}?",
              "facts": ["A fact."], "decomposition": ["What is it?", "Is #1 that?"]} for i in range(15)]
    sums = {}
    for name, part in (("train.json", items[:10]), ("dev.json", items[10:])):
        (tmp_path / name).write_text(json.dumps(part))
        sums[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    (tmp_path / "official.json").write_text(json.dumps(items))
    monkeypatch.setattr(script, "SHA256", sums)
    monkeypatch.setattr(script, "DEV", 3)
    return script, tmp_path


def test_splits_follow_the_qid_or_the_official_order(files):
    script, folder = files
    script.main(["--files", str(folder), "--out", str(folder / "a")])
    splits = {split: art.load_task("strategyqa", split, data=folder / "a") for split in ("train", "dev", "test")}
    assert [len(records) for records in splits.values()] == [9, 3, 3]
    qids = [record["id"].split("-")[-1] for record in splits["test"]]
    assert qids == sorted(f"{97 * i % 100:02d}" for i in range(15))[:3]
    script.main(["--official", str(folder / "official.json"), "--out", str(folder / "b")])
    test = art.load_task("strategyqa", "test", data=folder / "b")
    assert [record["id"].split("-")[-1] for record in test] == ["00", "97", "94"]
    assert [record["answer"] for record in test] == ["yes", "no", "yes"]
    assert test[0]["solution"] == [["What is it?", ""], ["Is the answer to sub-question 1 that?", ""]]


def test_missing_official_file(files):
    script, folder = files
    with pytest.raises(art.UserError, match="--official"):
        script.main(["--official", str(folder / "nowhere.json")])
    (folder / "hidden.json").write_text('[{"qid": "1", "question": "Is it?"}]')  # as in the official test file
    with pytest.raises(art.UserError, match="no answers"):
        script.main(["--official", str(folder / "hidden.json")])
