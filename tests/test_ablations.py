"""The commands of the README's section on ablations, run in their order with tiny sizes."""

import json
import shlex
import sys

import pytest
from conftest import ROOT, TINY

import art
import evaluate
import train_asker
import train_truster

MAINS = {"art.py": art.main, "train_asker.py": train_asker.main, "train_truster.py": train_truster.main,
         "evaluate.py": evaluate.main}


def commands():
    """[[script, flag, ...], ...] of the section's code blocks."""
    section = (ROOT / "README.md").read_text().split("## Ablations")[1].split("\n## ")[0]
    lines = [line.split("#")[0].strip() for line in section.splitlines() if line.startswith("    python ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture(scope="module")
def ran(kit, tmp_path_factory):
    """The run folders after all the commands: a folder for each --runs that they name."""
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "runs").symlink_to(kit.runs)  # the runs that the commands start from
    monkeypatch = pytest.MonkeyPatch()
    for script, *flags in commands():
        tiny = TINY["sample" if "sample" in flags else script.removesuffix(".py")] if flags[0] != "subquestions" else []
        tiny = [word for pair in zip(tiny[::2], tiny[1::2]) if pair[0] not in flags for word in pair]
        where = ["--data", str(kit.data), "--limit", "40"] + ([] if "--runs" in flags else ["--runs", "runs"])
        monkeypatch.setattr(sys, "argv", [script, *flags, *where, *tiny])
        monkeypatch.chdir(folder)
        MAINS[script]()
    monkeypatch.undo()
    return folder


def rows_of(folder, run):
    return {row["row"]: row for row in json.loads((folder / run / "results.json").read_text())["rows"]}


def test_asker_that_decides_alone(ran):
    """It asks nothing, so that its refinement is the one without sub-questions."""
    records = art.read_jsonl(ran / "runs/toy/decision_only/records.jsonl")
    assert all(record["ask"]["asker"]["subquestions"] == [] for record in records)
    rows = rows_of(ran, "runs/toy/decision_only")
    assert "art" not in rows and rows["asker"]["accuracy"] == rows["asker_plain"]["accuracy"]


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
