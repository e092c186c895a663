"""The scripts as a user meets them: help, kept settings, one line for a mistake, killed runs."""

import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import BASE, ROOT, asked_of, refused
from safetensors.torch import load_file

import art


@pytest.mark.parametrize("script", (
    "art evaluate train_asker train_truster data/sample data/prepare data/toy/prepare").split())
def test_help_answers_at_once(script):
    command = [sys.executable, "-X", "importtime", ROOT / f"{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    imported = set(re.findall(r"(?m)\| +(\w+)$", done.stderr))
    assert done.returncode == 0 and "usage: " in done.stdout and "argparse" in imported
    assert not imported & {"torch", "transformers", "peft", "bitsandbytes", "openai"}


def args_of(runs, *flags, script="evaluate"):
    return art.parse(art.make_parser("", script), ["--runs", str(runs), *flags])


def test_settings_are_kept_in_llm_json(copy, monkeypatch):
    """Flags go before them, another LLM has its own, and sample.py begins with the preset."""
    copy.here(monkeypatch, "sample", "--max-new-tokens", "40", "--k", "1", "--limit", "2")
    kept = args_of(copy.runs)
    assert (kept.max_new_tokens, kept.k, kept.bits, kept.limit) == (40, 1, 32, None)
    assert args_of(copy.runs, "--max-new-tokens", "50").max_new_tokens == 50
    other = args_of(copy.runs, "--model", "other")
    copy.here(monkeypatch, "sample", "--limit", "2")
    assert (other.max_new_tokens, other.k, other.bits) == (128, 4, None)
    assert (args_of(copy.runs).max_new_tokens, args_of(copy.runs).k) == (128, 4)


def test_the_preset_follows_the_task(tmp_path):
    toy, gsm8k, own = [args_of(tmp_path, *flags.split()) for flags in (
        "--limit 1", "--task gsm8k", "--task gsm8k --model data/toy/base")]
    assert (toy.preset, toy.max_new_tokens, toy.draft_temperature) == ("toy", 128, 0.7)
    for args in (gsm8k, own, args_of(tmp_path, "--task", "strategyqa", script="asker")):
        assert (args.preset, args.max_new_tokens, args.asker_model) == ("small", 512, art.SMALL)


MISTAKES = {
    "train_asker --runs EMPTY": "run python data/sample.py --task toy --preset toy",
    "train_asker --run x --subquestions generated": "run python data/sample.py --task toy --subq",
    "train_asker --run x --data MORE": "for 1 of 41 questions: run python data/sample.py",
    "evaluate --run new": "train_asker.py --task toy --run new and python train_truster.py --task",
    "evaluate --runs EMPTY": "need none (--rows)",
    "evaluate --truster-from new": "run python train_truster.py --task toy --run new",
    "evaluate --compare default new": "run python evaluate.py --task toy --run new",
    "solve --run new Why?": "run python train_asker.py --task toy --run new",
    "sample --data EMPTY": "train.jsonl is missing: run python data/toy/prepare.py",
    "sample --task gsm8k": "run python data/prepare.py gsm8k", "solve": "give a question in quotes",
    "sample --task nobody": "--task takes toy, gsm8k,", "evaluate --run ../x": "--run NAME: use",
    "sample --task gsm8k --preset toy": "give --preset small", "evaluate --run ..": "--run NAME:",
    "sample --base-url http://localhost": "--model", "evaluate --rows art,nobody": "--rows takes",
    "train_asker --lr 1": "lr was 0.002, is now 1.0. Give --run NEW, or --overwrite",
    "train_asker --run x --max-length 3": "raise --max-length", "evaluate --threshold 2": "to 1",
    "evaluate --compare default --row majority": "--rows", "evaluate --threshold 0.5,x": "x is not",
    "sample --k 99 --max-new-tokens 9999": "--max-new-tokens", "sample --model EMPTY": "EMPTY",
    "sample --model no/such/one": "model folder no/such/one", "sample --model PICKLED": "PICKLED",
    "sample --model BARE": "tokenizer", "train_asker --run x --asker-model BARE": "tokenizer",
    "sample --runs EMPTY/FILE": "--runs DIR", "evaluate --rows draft --runs EMPTY/FILE/x": "--runs",
    "train_truster --run x --truster-model nobody": "nobody",
}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes(copy, monkeypatch, capsys, tmp_path, command):
    """Exit code 2 and one line, which begins with "error: ". Nothing that was written is lost."""
    monkeypatch.chdir(tmp_path)
    art.write("EMPTY/FILE", "")
    shutil.copytree(BASE, "BARE", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(BASE, "PICKLED", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(f"{BASE}/model.safetensors"), "PICKLED/pytorch_model.bin")
    shutil.copytree(copy.data, "MORE")
    records = art.read_jsonl("MORE/toy/train.jsonl", "")
    art.write("MORE/toy/train.jsonl", [*records, {**records[0], "id": "new"}])
    before = files_of(copy.folder)
    assert MISTAKES[command] in refused(monkeypatch, capsys, copy, *command.split())
    assert files_of(copy.folder) == before


@pytest.mark.parametrize("command", [
    "sample --run x", "sample --temp 1", "sample --k 0", "evaluate --limit 0", "evaluate --seed x",
    "train_asker --lr nan", "train_truster --rank -1", "solve --preset huge", "solve a b"])
def test_flags_that_do_not_exist(copy, monkeypatch, capsys, command):
    """data/sample.py has no --run: the runs of a task share their samples. No flag is guessed."""
    with pytest.raises(SystemExit, match="2"):
        copy.here(monkeypatch, *command.split())
    assert re.search("error: .*argument", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(("name", "content", "command"), [
    ("llm.json", "{", "evaluate"), ("llm.json", "[]", "evaluate"), ("llm.json", "7", "solve x"),
    ("default/results.json", "[1]", "evaluate"), ("answers.sqlite", "garbage" * 99, "evaluate"),
    ("default/asker/args.json", "{", "evaluate"), ("samples.jsonl", '{"id": "to', "train_asker"),
    ("default/records.jsonl", "{", "evaluate --compare default")])
def test_files_that_were_damaged(copy, monkeypatch, capsys, name, content, command):
    (copy.runs / "toy" / name).write_text(content)
    assert re.search(f"{name}|--runs", refused(monkeypatch, capsys, copy, *command.split()))


def test_each_line_leads_on(copy, monkeypatch, capsys):
    """A user who types what the lines say gets from an empty folder to the table."""
    def follow(script, *flags):
        try:
            copy.here(monkeypatch, script, *flags)
        except SystemExit:
            command = r"python (?:data/)?(\w+)\.py((?: --[a-z]+ \w+)*)"
            for name, more in re.findall(command, capsys.readouterr().err):
                follow(name, *more.split())
            follow(script, *flags)

    for path in files_of(copy.runs):
        if path.suffix != ".sqlite":  # the answers stay in the cache
            path.unlink()
    follow("evaluate")
    assert "art" in copy.results()


def test_the_llm_writes_subquestions(copy, monkeypatch):
    """Samples and settings stay."""
    before = files_of(copy.runs)
    copy.here(monkeypatch, "sample", "--subquestions")
    rows = art.read_jsonl(copy.runs / "toy/subquestions.jsonl", "")
    assert len(rows) == 40 and sum(len(row["subquestions"]) for row in rows) > 20
    changed = [path.name for path, content in before.items() if content != path.read_bytes()]
    assert changed == ["answers.sqlite"]


def test_killed_and_resumed(copy, monkeypatch, capsys):
    """What was generated is not generated again; the samples are those of a run in one go."""
    path, flags = copy.runs / "toy/samples.jsonl", ("--limit", "3", "--kv-gib", "0.0001")
    want = {line["id"]: line["samples"] for line in art.read_jsonl(path, "")}
    shutil.rmtree(copy.runs)
    process, cache = copy.start("sample", *flags), copy.runs / "toy/answers.sqlite"
    while process.poll() is None and not (cache.is_file() and cache.stat().st_size > 12_288):
        time.sleep(0.02)  # until a batch is saved
    process.kill()
    process.communicate()
    copy.here(monkeypatch, "sample", *flags)
    assert 0 < asked_of(capsys.readouterr().out)["samples"] < 24
    for line in art.read_jsonl(path, ""):
        assert [one["text"] for one in line["samples"]] == [one["text"] for one in want[line["id"]]]


def test_solve(copy, monkeypatch, capsys):
    """Every step is shown; p and the threshold of row art, at first 0.5, with three digits."""
    path = copy.runs / "toy/default/results.json"
    art.write(path, {"rows": [{"row": "art", "threshold": 0.0004}]})
    copy.here(monkeypatch, "solve", "  Tom has  12 eggs.\nHow many? ")
    assert re.search(r"(?s)note: .*--random.* question: Tom has 12 eggs\. How many\?\n.* draft: .*"
                     r" sub-questions: .*= 0\.\d{3}, threshold 0\.000: refine\n  refined: .*"
                     r" Truster: draft -?\d.* answer: ", capsys.readouterr().out)
    path.unlink()
    copy.here(monkeypatch, "solve", "--random")
    assert "threshold 0.500: " in capsys.readouterr().out
