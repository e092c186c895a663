"""The scripts as a user meets them: kept settings, one line for a mistake."""

import re
import shutil

import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file

import art


def parsed(runs, *flags, script="evaluate"):
    return art.parse(art.make_parser("", script), ["--runs", str(runs), *flags])


def test_settings_are_kept_in_llm_json(copy):
    """Flags go before them, another LLM or task has its own; sample.py begins with the preset."""
    copy("sample", "--max-new-tokens", "40", "--k", "1", "--limit", "2")
    kept = parsed(copy.runs)
    assert (kept.max_new_tokens, kept.k, kept.bits, kept.limit) == (40, 1, 32, None)
    assert parsed(copy.runs, "--max-new-tokens", "50").max_new_tokens == 50
    other = parsed(copy.runs, "--model", "other")
    copy("sample", "--limit", "2")
    for args in (other, parsed(copy.runs)):
        assert (args.max_new_tokens, args.k, args.preset) == (128, 4, "toy")
    for args in (parsed(copy.runs, "--task", "gsm8k", "--model", "data/toy/base"),
                 parsed(copy.runs, "--task", "strategyqa", script="asker")):
        assert (args.preset, args.max_new_tokens, args.asker_model) == ("small", 512, art.SMALL)


MISTAKES = {  # those of a wrong order of the scripts are in test_each_line_leads_on
    "train_asker --run x --data MORE": "for 2 of 41 questions: run python data/sample.py",
    "train_asker --overwrite --max-length 3": "raise --max-length",
    "train_asker --overwrite --task-epochs 0 --max-length 3": "draft is short enough",
    "train_truster --run x --truster-model nobody": "nobody", "solve": "give a question in quotes",
    "evaluate --truster-from new": "run python train_truster.py --task toy --run new",
    "evaluate --compare default new": "run python evaluate.py --task toy --run new",
    "evaluate --compare default --row majority": "--rows",
    "evaluate --rows art,nobody": "--rows takes", "evaluate --threshold 0.5,2": "2 is not",
    "evaluate --run ../x": "--run NAME: use", "evaluate --run ..": "--run NAME:",
    "solve --run new Why?": "run python train_asker.py --task toy --run new",
    "sample --data EMPTY": "train.jsonl is missing: run python data/toy/prepare.py",
    "sample --task nobody": "--task takes toy, gsm8k,", "sample --runs EMPTY/FILE": "--runs DIR",
    "sample --task gsm8k --preset toy": "give --preset small", "sample --model EMPTY": "EMPTY",
    "sample --model no/such/one": "model folder no/such/one", "sample --model BARE": "tokenizer",
    "sample --model PICKLED": "PICKLED", "sample --model T5": "no LLM"}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes(copy, tmp_path, command):
    """Exit code 2 and one line, which begins with "error: ". Nothing that was written is lost."""
    copy.monkeypatch.chdir(tmp_path)
    art.write("EMPTY/FILE", "")
    shutil.copytree(BASE, "BARE", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(BASE, "PICKLED", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(f"{BASE}/model.safetensors"), "PICKLED/pytorch_model.bin")
    shutil.copytree(copy.data, "MORE")
    first, *rest = art.read_jsonl("MORE/toy/train.jsonl", "")
    art.write("MORE/toy/train.jsonl", [{**first, "answer": "7"}, *rest])
    art.write("MORE/toy/dev.jsonl", [{**first, "id": "new"}])
    art.write("T5/config.json", {"model_type": "t5"})
    before = files_of(copy.folder)
    assert MISTAKES[command] in copy.refused(*command.split())
    assert files_of(copy.folder) == before


@pytest.mark.parametrize("command", [
    "sample --run x", "sample --temp 1", "sample --k 0", "train_asker --lr nan", "solve a b"])
def test_flags_that_do_not_exist(copy, command):
    """data/sample.py has no --run: the runs of a task share their samples. No flag is guessed."""
    with pytest.raises(SystemExit, match="2"):
        copy(*command.split())
    assert re.search("error: .*argument", copy.capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(("name", "content", "command"), [
    ("llm.json", "{", "evaluate"), ("llm.json", "[]", "evaluate"), ("llm.json", "7", "solve x"),
    ("answers.sqlite", "garbage" * 99, "evaluate"), ("samples.jsonl", '{"id": "to', "train_asker"),
    ("default/asker/args.json", "{", "evaluate")])
def test_files_that_were_damaged(copy, name, content, command):
    (copy.runs / "toy" / name).write_text(content)
    assert re.search(f"{name}|--runs", copy.refused(*command.split()))


def test_each_line_leads_on(copy):
    """A user who types what the lines say gets from an empty folder to the table."""
    def follow(script, *flags):
        try:
            copy(script, *flags)
        except SystemExit:
            command = r"python (?:data/)?(\w+)\.py((?: --[a-z]+(?: \w+)?)*)"
            for name, more in re.findall(command, copy.capsys.readouterr().err):
                follow(name, *more.split())
            follow(script, *flags)

    for path in files_of(copy.runs):
        if path.suffix != ".sqlite":  # the answers stay in the cache
            path.unlink()
    follow("evaluate")
    assert "art" in copy.results()
    samples = (copy.runs / "toy/samples.jsonl").read_bytes()
    art.write(copy.runs / "toy/subquestions.jsonl", [])
    follow("train_asker", "--run", "x", "--subquestions", "generated")  # the LLM writes them
    rows = art.read_jsonl(copy.runs / "toy/subquestions.jsonl", "")
    assert len(rows) == 40 and sum(len(row["subquestions"]) for row in rows) > 20
    assert (copy.runs / "toy/samples.jsonl").read_bytes() == samples


def test_solve(copy):
    """Every step is shown; p and the threshold of row art, at first 0.5, with three digits."""
    path = copy.runs / "toy/default/results.json"
    art.write(path, {"rows": [{"row": "art", "threshold": 0.0004}]})
    copy("solve", "  Tom has  12 eggs.\nHow many? ")
    assert re.search(r"(?s)note: .*--random.* question: Tom has 12 eggs\. How many\?\n.* draft: .*"
                     r" sub-questions: .*= 0\.\d{3}, threshold 0\.000: refine\n  refined: .*"
                     r" Truster: draft -?\d.* answer: ", copy.printed())
    path.unlink()
    copy("solve", "--random")
    assert "threshold 0.500: " in copy.printed()
