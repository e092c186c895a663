"""What the README shows, run: the commands of its section on ablations, in their order, and a task of one's own."""

import ast
import json
import shlex
import subprocess
import sys
import textwrap

import pytest
from conftest import MAINS, ROOT, TINY

import art
import evaluate


def commands():
    """[[script, flag, ...], ...] of the section's code blocks."""
    section = (ROOT / "README.md").read_text().split("## Ablations")[1].split("\n## ")[0]
    lines = [line.split("#")[0].strip() for line in section.splitlines() if line.startswith("    python ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture(scope="module")
def ran(kit, tmp_path_factory):
    """The run folders after all the commands: a folder for each --runs that they name."""
    folder = kit.copy(tmp_path_factory.mktemp("ablations") / "kit").folder  # the runs that the commands start from
    monkeypatch = pytest.MonkeyPatch()
    for script, *flags in commands():
        name = flags[0] if script == "art.py" else script.removesuffix(".py")
        tiny = TINY.get(name, [])
        tiny = [word for pair in zip(tiny[::2], tiny[1::2]) if pair[0] not in flags for word in pair]
        where = ["--data", str(kit.data), "--limit", "40"] + ([] if "--runs" in flags else ["--runs", "runs"])
        monkeypatch.setattr(sys, "argv", [script, *flags, *where, *tiny])
        monkeypatch.chdir(folder)
        MAINS.get(name, art.main)()
    monkeypatch.undo()
    return folder


def rows_of(folder, run):
    return {row["row"]: row for row in json.loads((folder / run / "results.json").read_text())["rows"]}


def test_asker_that_decides_alone(ran):
    """It was trained on the decision without sub-questions, and the rows that need a Truster are not there."""
    about = json.loads((ran / "runs/toy/decision_only/asker/args.json").read_text())
    rows = rows_of(ran, "runs/toy/decision_only")
    assert about["subquestions"] == "none" and "asker" in rows and "art" not in rows


def test_one_stage(ran):
    assert not (ran / "runs/toy/one_stage/finetuned").exists() and "asker" in rows_of(ran, "runs/toy/one_stage")


def test_generated_subquestions(ran):
    """What the Asker learned from are the LLM's sub-questions, and its first stage has no sub-questions in it."""
    about = json.loads((ran / "runs/toy/generated/asker/args.json").read_text())
    rows = art.read_jsonl(ran / "runs/toy/subquestions.jsonl")
    assert about["subquestions_sha256"] == art.short_hash({row["id"]: row["subquestions"] for row in rows})
    assert json.loads((ran / "runs/toy/generated/finetuned/args.json").read_text())["strategy"] == "cot"


def test_all_rows(ran):
    rows = rows_of(ran, "runs/toy/default")
    assert list(rows) == list(evaluate.ROWS) and rows["end_to_end"]["cost"].keys() == {"asker"}
    records = art.read_jsonl(ran / "runs/toy/default/records.jsonl")
    assert all(r["candidates"]["end_to_end"]["text"] in r["candidates"]["end_to_end"]["written"] for r in records)


def test_decomposition(ran):
    rows = rows_of(ran, "runs-decomp/toy/default")
    assert rows["art"]["settings"]["strategy"] == "decomp"


def test_grid(ran, monkeypatch, capsys):
    names = [str(ran / folder) for folder in ("runs/toy/default", "runs-decomp/toy/default")]
    print(evaluate.grid(names, evaluate.read_runs(art.argparse.Namespace(runs=ran / "runs", task="toy"), names)))
    out = capsys.readouterr().out
    for cells in ("| decomp | asker | asker | truster |", "| cot | self | self | most_recent |", "| cot | - | - | - |"):
        assert cells in out


def test_adapters_of_another_run(ran, monkeypatch):
    """`--adapters` takes the fine-tuned models from elsewhere; of the same task, the row is the same."""
    monkeypatch.chdir(ran)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", "data", "--runs", "runs", "--limit", "40", "--run",
                                      "transfer", "--rows", "initial,finetuned", "--adapters", "runs/toy/default"])
    evaluate.main()
    rows, own = rows_of(ran, "runs/toy/transfer"), rows_of(ran, "runs/toy/default")
    assert rows.keys() == {"initial", "finetuned"} and rows["finetuned"]["accuracy"] == own["finetuned"]["accuracy"]


def test_task_of_your_own(tmp_path, monkeypatch, capsys):
    """The README's prepare.py and its line for TASKS, as they stand there, up to the samples and sub-questions."""
    section = (ROOT / "README.md").read_text().split("## A task of your own")[1].split("\n## ")[0]
    script = section.split("`|`):\n\n")[1].split("\n\nand one line")[0]
    entry = section.split("art.py:\n\n")[1].split("\n")[0]
    folder = tmp_path / "data/quiz"
    folder.mkdir(parents=True)
    (tmp_path / "art.py").symlink_to(ROOT / "art.py")
    (folder / "prepare.py").write_text(textwrap.dedent(script))
    lines = [f'"Ann has {n} pens and buys {n + 2}. How many pens has Ann?",{2 * n + 2},{n} + {n + 2} = {2 * n + 2}.'
             for n in range(1, 26)]
    (folder / "questions.csv").write_text("question,answer,steps\n" + "\n".join(lines) + "\n", encoding="utf-8-sig")
    subprocess.run([sys.executable, str(folder / "prepare.py")], check=True, capture_output=True)
    monkeypatch.setitem(art.TASKS, *ast.literal_eval("{" + entry + "}").popitem())
    sizes = [len(art.load_task("quiz", split, data=tmp_path / "data")) for split in ("train", "dev", "test")]
    assert sizes == [16, 4, 5]
    for command in (["sample", "--k", "2"], ["subquestions"]):
        monkeypatch.setattr(sys, "argv", ["art.py", *command, "--task", "quiz", "--data", str(tmp_path / "data"),
                                          "--runs", str(tmp_path / "runs")])
        art.main()
    assert len(art.read_jsonl(tmp_path / "runs/quiz/samples.jsonl")) == 16 * 2 + 4 * 3
    assert len(art.read_jsonl(tmp_path / "runs/quiz/subquestions.jsonl")) == 16
