"""data/prepare.py on tiny raw files and on tables, and the functions that read records."""

import hashlib
import json
import sys

import pytest
from conftest import BASE, Kit, args_of, load

import art

OFFICIAL, CSV = "strategyqa --official raw", "csv raw --task own"


class Prepare(Kit):
    """data/prepare.py, which works in a temporary folder and accepts our raw files."""

    def __call__(self, command):
        words = ["prepare.py", *command.split(), "--out", str(self.data)]
        self.monkeypatch.setattr(sys, "argv", words)
        art.run(self.script.main)

    def make(self, files, command):
        """The splits that a command makes of these raw files."""
        for name, content in files.items():
            (self.folder / name).write_bytes(content.encode())
            self.script.SHA256[name] = hashlib.sha256(content.encode()).hexdigest()
        self(command)
        return splits(self.data, "own" if command == CSV else command.split()[0])


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    kit = Prepare(tmp_path, monkeypatch, capsys)
    kit.script = load("data/prepare.py")
    kit.script.DEV |= {"gsm8k": 2, "strategyqa": 2}
    monkeypatch.setattr(art, "TASKS", dict(art.TASKS))
    monkeypatch.chdir(tmp_path)
    return kit


def splits(data, task="toy", **limits):
    art.find_tasks(data)
    args = args_of(data, data=data, task=task, **limits)
    return [art.load_split(args, split) for split in ("train", "dev", "test")]


def grade_school(*questions, asked="How many? ** "):
    answer = f"{asked}\n{asked}1 + 1 = <<1+1=2>>2\npens\u2028in all\n\n#### 1,002"
    return "".join(json.dumps({"question": one, "answer": answer}) + "\n" for one in questions)


def test_gsm8k(prepare):
    """Train, dev and test. Train drops what is also in test, whatever its punctuation."""
    files = {"train_socratic.jsonl": grade_school("A?", "B?", "C?", "D?", "Is  it\u2028 E?", "F?"),
             "test_socratic.jsonl": grade_school("G?", "is it e", "H?")}
    train, dev, test = prepare.make(files, "gsm8k --files .")
    assert {record["question"][0] for record in train + dev} == {*"ABCDF"} and len(dev) == 2
    assert test[1] == {"id": "gsm8k-test-1", "question": "is it e", "answer": "1002",
                       "solution": [["How many?", "1 + 1 = 2 pens in all"]]}
    (prepare.folder / "train_socratic.jsonl").unlink()
    assert "--subquestions" not in prepare.printed()
    [record], *_ = prepare.make({"train.jsonl": grade_school(*"ABC", asked="")}, "gsm8k --files .")
    assert record["solution"] == [["", "1 + 1 = 2"], ["", "pens in all"]]
    assert "data/sample.py --task gsm8k --subquestions" in prepare.printed()


def items(qids, **changes):
    return json.dumps([{"facts": [], "decomposition": ["What is it?", "Is #1 that?"], "qid": qid,
                        "question": f"Is {qid * 3}?", "answer": i % 2 == 0, **changes}
                       for i, qid in enumerate(qids)])


def test_strategyqa(prepare):
    """Test is the first fifth: in the order of the qid, or of the official file."""
    files = {"train.json": items("ifbhdajge"), "dev.json": items("c")}
    train, dev, test = prepare.make(files, "strategyqa --files .")
    assert len(train) == 6 and len(dev) == 2 and [record["id"][-1] for record in test] == ["a", "b"]
    assert test[0]["solution"][1:] == [["Is the answer to sub-question 1 that?", ""]]
    *_, test = prepare.make({"raw": items("ifbhdajgec")}, OFFICIAL)
    assert [(record["id"][-1], record["answer"]) for record in test] == [("i", "yes"), ("f", "no")]


NUMBERS = [*map(str, range(19)), "1 1/2"]


def table(answers, separator=",", end="\n", head="question,answer"):
    lines = [head, *(f"How\x0b many are\u2028{i}?,{one}" for i, one in enumerate(answers))]
    return end.join([*lines, ""]).replace(",", separator)


@pytest.mark.parametrize(("content", "kind", "answers"), [
    (table(NUMBERS, ";"), "number", NUMBERS), (table(NUMBERS, "\t", "\r\n"), "number", NUMBERS),
    ("\ufeff" + table(["Yes", "NO"] * 10), "yes/no", ["yes", "no"]),  # as people write them
    (table(['J,"One,\n\n then "'] * 20, head="question,answer,solution"), "choice", "J")])
def test_csv(prepare, content, kind, answers):
    """60/20/20, and task.json says how answers are read. The separator is , ; or a tab."""
    parts = prepare.make({"raw": content}, CSV)
    assert [len(records) for records in parts] == [12, 4, 4] and art.answer_kind("own") == kind
    records = sum(parts, [])
    assert {record["answer"] for record in records} == {*answers}
    steps = [["", "One,"], ["", "then"]] if "One" in content else []
    assert all(record["solution"] == steps and "\u2028" in record["question"] for record in records)


def test_a_task_of_a_table_is_sampled(prepare):
    """--task finds the folder, and its preset is not the toy's."""
    prepare.make({"raw": table(NUMBERS)}, CSV)
    art.TASKS.pop("own")
    Kit.__call__(prepare, "sample", "--task", "own", "--preset", "small", "--model", BASE,
                 "--max-new-tokens", "8", "--bits", "32")
    lines = art.read_jsonl(prepare.runs / "own/samples.jsonl", "")
    assert [len(line["samples"]) for line in lines] == [3] * 16 and lines[15]["draft"]["text"]
    for about in ("{}", '{"answer": "words"}', "[]", "{"):  # it has no kind of answer
        art.write(prepare.data / "own/task.json", about)
        with pytest.raises(art.UserError, match="own.task.json"):
            art.find_tasks(prepare.data)


@pytest.mark.parametrize(("command", "content", "said"), [
    ("gsm8k --files .", None, ["train_socratic.jsonl", "No such file"]),
    ("gsm8k --files .", grade_school("Another version?"), ["train_socratic.jsonl", "checksum"]),
    (OFFICIAL, items("ab", answer="no"), ['item 1: "answer"', 'item 2: "answer"']),
    (OFFICIAL, items("a", facts="A text.", answer=1), ['item 1: "answer"', 'item 1: "facts"']),
    (OFFICIAL, items("a", decomposition=[{"question": "?"}], qid=7), ['"decomposition"', '"qid"']),
    (OFFICIAL, "[3, null]", ["item 2:"]), (OFFICIAL, "5", ["raw"]), (OFFICIAL, items("abc"), ["few"]),
    (CSV, table([*NUMBERS, "6 apples", "", "1/0"]), ["'6 apples'", "''", "'1/0'"]),
    (CSV, table(NUMBERS) + table(NUMBERS).partition("\n")[2], ["row 22: its question is in row 2"]),
    (f"{CSV} --kind choice", table(["J", "K"] * 5), ["'K' is not a choice"]),
    (CSV, table(NUMBERS) + " ,5\n", ['"question"']), (CSV, table(["x"] * 99), ["79 more"]),
    (CSV, table(NUMBERS[:9]), ["10"]), (CSV, "", ["question,"]), (CSV, None, ["raw"]),
    (CSV, table(NUMBERS, head="Q,A"), ["question,"]), (CSV, table(["\udcff"]), ["UTF-8"]),
    (CSV, 'question,answer\n"open,3\n' + table(NUMBERS * 500), ["raw"]),
    ("csv raw --task toy", table(NUMBERS), ["NAME"])])
def test_what_cannot_be_used(prepare, command, content, said):
    """All faults are in one line, 20 at most, and nothing is written."""
    path = prepare.folder / ("train_socratic.jsonl" if "gsm8k" in command else "raw")
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    line = prepare.refused(command)
    assert all(part in line for part in said) and line.count("; ") <= 20, line
    assert not [*prepare.data.glob("*/*.jsonl")] and path.is_file() == (content is not None)


GOOD = {"id": "a", "question": "Is it?", "answer": "1", "solution": [["", "1"]], "facts": ["1"]}
FAULTS = {"id": [3, ["a"], " "], "question": [None, 3, ""], "facts": [None, "One text.", [1]],
          "answer": [None, True, "", "A", "six", "1.5 million", "1/0", "1/0.0", "9" * 60, " 1"],
          "solution": [None, "ab", ["ab"], [1], [["a", 1]], [["a"]], [{"a": "", "b": ""}]]}


@pytest.mark.parametrize(("key", "value"), [(key, one) for key in FAULTS for one in FAULTS[key]])
def test_faults_of_a_record(key, value):
    assert art.fault_of(GOOD, "number") is None
    assert key in art.fault_of({**GOOD, key: value}, "number")


def write_splits(folder, **more):
    for split in ("train", "dev", "test"):
        records = [{**GOOD, "id": f"{split}\u2028"}, *more.get(split, [])]
        art.write(folder / f"toy/{split}.jsonl", records)


def test_faults_of_all_splits(tmp_path):
    write_splits(tmp_path, train=[GOOD], dev=[{**GOOD, "answer": "six"}], test=[GOOD, {"id": 3}])
    with pytest.raises(art.UserError, match=r"records: \S+dev.jsonl, line 2: .* 'six'[^;]*; "
                       r"\S+test.jsonl, line 2: duplicate id a,[^;]*; \S+, line 3: \"id\"[^;]*$"):
        splits(tmp_path)


@pytest.mark.parametrize("line", ['{"id": ', "[1]", "null", "[" * 9999, '{"a": "\\ud800"}'])
def test_a_line_that_is_no_record(tmp_path, line):
    """Its number is said. A byte order mark, or a line end in a text, is no fault."""
    write_splits(tmp_path, train=[GOOD, {**GOOD, "id": "b"}])
    path = tmp_path / "toy/test.jsonl"
    path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    assert splits(tmp_path)[2][0]["id"] == "test\u2028"
    assert len(splits(tmp_path, limit=2, limit_train=1)[0]) == 1
    for text, said in ((path.read_text("utf-8") + line, "test.jsonl, line 2: not a JSON object"),
                       ("\n", "no questions in test: run python data/toy/prepare.py")):
        path.write_text(text, "utf-8")
        with pytest.raises(art.UserError, match=said):
            splits(tmp_path)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    art.write(tmp_path / "new/a.jsonl", [GOOD, {"text": "ä\u2028"}])
    with pytest.raises(UnicodeEncodeError):
        art.write(tmp_path / "new/a.jsonl", [GOOD] * 99_999 + [{"text": "\ud800"}])
    assert art.read_jsonl(tmp_path / "new/a.jsonl", "") == [GOOD, {"text": "ä\u2028"}]
