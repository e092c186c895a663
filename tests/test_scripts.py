"""The scripts as a user meets them: help, settings that are remembered, a line for a mistake, the README's commands."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import BASE, MAINS, ROOT, asked_of, edit, load, refused
from safetensors.torch import load_file

import art
import evaluate

SCRIPTS = ["art.py", "train_asker.py", "train_truster.py", "evaluate.py", "data/prepare.py", "data/toy/prepare.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    """It answers at once: no library that takes seconds is imported."""
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 0 and "usage: " in done.stdout and "numpy" in imported
    assert not imported & {"torch", "transformers", "peft", "bitsandbytes"}


# --- Settings


def args_of(runs, *flags):
    """The settings of a script that asks the LLM."""
    return art.parse(art.make_parser(""), ["--runs", str(runs), *flags])


def test_later_scripts_take_the_settings_of_sample(copy, monkeypatch, capsys):
    """From llm.json; a flag wins over it, and another LLM has settings of its own."""
    copy.here(monkeypatch, "sample", "--max-new-tokens", "40", "--k", "1", "--temperature", "0.9", "--limit", "2")
    capsys.readouterr()
    args, said = args_of(copy.runs), capsys.readouterr().out
    assert (args.max_new_tokens, args.temperature, args.bits) == (40, 0.9, 4)
    assert "max_new_tokens 40" in said and "temperature 0.9" in said and "bits" not in said
    assert args_of(copy.runs, "--max-new-tokens", "50").max_new_tokens == 50
    assert args_of(copy.runs, "--model", "other").max_new_tokens == art.PRESETS["toy"]["max_new_tokens"]
    copy.here(monkeypatch, "sample", "--limit", "2")  # sample itself begins with the preset
    assert args_of(copy.runs).max_new_tokens == art.PRESETS["toy"]["max_new_tokens"]


def test_a_model_that_knows_nothing_of_the_task_is_named(copy, capsys):
    args_of(copy.runs, "--task", "gsm8k")
    assert "worded as the toy's: for gsm8k give --preset" in capsys.readouterr().err


# --- Mistakes: `refused` wants exit code 2 and one line that begins with "error:"


MISTAKES = [  # script and flags; what its line says
    (["sample", "--task", "strategyqa"], "python data/prepare.py strategyqa"),
    (["train_asker", "--runs", "EMPTY"], "make it with: python art.py sample --task toy"),
    (["train_truster", "--runs", "EMPTY"], "make it with: python art.py sample --task toy"),
    (["train_asker", "--runs", "EMPTY", "--subquestions", "generated"], "art.py sample"),
    (["train_asker", "--run", "x", "--subquestions", "generated"], "make it with: python art.py subquestions"),
    (["evaluate", "--rows", "art,nobody"], "nobody is none of initial, "),
    (["evaluate", "--run", "../x"], "--run is a plain name"),
    (["evaluate", "--run", "said"], "--run is a plain name"),
    (["evaluate", "--run", "new"], "python train_asker.py --task toy --run new"),
    (["evaluate", "--truster-from", "new"], "python train_truster.py --task toy --run new"),
    (["evaluate", "--rows", "finetuned", "--asker-from", "new"], "--run new --task-epochs 1"),
    (["train_asker", "--run", "x", "--data", "MORE"], "lacks 1 of 53 questions"),
    (["solve"], "give a question"),
    (["solve", "--run", "new", "How many?"], "train_asker.py"),
    (["sample", "--temperature", "none"], "--temperature none is for servers"),
    (["sample", "--model", "EMPTY"], "EMPTY"),
    (["train_asker", "--run", "x", "--max-length", "3"], "exceed --max-length 3 tokens"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[" ".join(command) for command, _ in MISTAKES])
def test_mistakes(copy, monkeypatch, capsys, tmp_path, command, said):
    (tmp_path / "EMPTY").mkdir()
    shutil.copytree(copy.data, tmp_path / "MORE")
    with open(tmp_path / "MORE/toy/train.jsonl", "a") as file:
        file.write('{"id": "new", "question": "?", "answer": "1"}\n')
    command = [str(tmp_path / word) if word in ("EMPTY", "MORE") else word for word in command]
    assert said in refused(monkeypatch, capsys, copy, *command)


def test_an_adapter_that_is_not_finished(copy, monkeypatch, capsys):
    """It hinders no row that does not need it, and a training that knows less of it is refused."""
    art.write(copy.runs / "toy/default/end_to_end/args.json", {"lr": 1.0})
    art.write(copy.runs / "toy/b/asker/args.json", {"lr": 1.0})
    copy.here(monkeypatch, "evaluate")
    copy.here(monkeypatch, "evaluate", "--run", "b", "--rows", "initial")
    assert "was trained otherwise: " in refused(
        monkeypatch, capsys, copy, "train_asker", "--run", "b", "--task-epochs", "0")


LINES = {  # the second line of test.jsonl, and what is said of it
    '{"id": "x", ': "test.jsonl, line 2: not a JSON object", "[1]": "line 2: not a JSON object",
    '{"id": "x", "question": "\\ud800", "answer": "1"}': "line 2: not a JSON object",  # half a character
    '{"id": "x"}': "test.jsonl, line 2: no answer, question",
    '{"id": "x", "question": "?", "answer": "A"}': "line 2: the answer 'A'",
    '{"id": "x", "question": "?", "answer": "3,5"}': "line 2: the answer '3,5'",
    '{"id": "x", "question": "?", "answer": "1.5 million"}': "line 2: the answer '1.5 million'",
    '{"id": "toy-test-0", "question": "?", "answer": "1"}': "an id stands for two records",
}


@pytest.mark.parametrize("line", [*LINES, None], ids=str)
def test_data_that_cannot_be_used(copy, monkeypatch, capsys, line):
    path = copy.data / "toy/test.jsonl"
    path.write_text(f"{path.read_text().splitlines()[0]}\n{line}\n" if line else "")
    assert LINES.get(line, "is empty: make it with: python data/toy/prepare.py") in refused(
        monkeypatch, capsys, copy, "evaluate")


def test_an_id_in_train_and_dev_is_refused(copy, monkeypatch, capsys):
    """Else a question of train would learn from the samples of another."""
    edit(copy.data / "toy/dev.jsonl", "toy-dev-3", "toy-train-3")
    assert "toy-train-3" in refused(monkeypatch, capsys, copy, "sample")


def test_pickled_weights_are_refused(copy, monkeypatch, capsys, tmp_path):
    shutil.copytree(BASE, tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled/model.safetensors"), tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "pickled/model.safetensors").unlink()
    assert "pickled" in refused(monkeypatch, capsys, copy, "sample", "--model", tmp_path / "pickled")


@pytest.mark.parametrize(("error", "code", "said"), [
    (KeyboardInterrupt(), 130, "stopped"), (OSError(28, "No space left on device"), 2, "the disk is full"),
    (art.UserError("Mend it."), 2, "Mend it.")])
def test_what_a_user_can_mend_is_one_line(capsys, error, code, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        art.run(main)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == code and line.startswith("error: ") and said in line


# --- solve


def test_solve(copy, monkeypatch, capsys):
    """White space is collapsed, all four steps are shown, and the threshold is that of row art, else 0.5."""
    question = art.load_task("toy", "test", data=copy.data)[0]["question"]
    path = copy.runs / "toy/default/results.json"
    results = json.loads(path.read_text())
    art.write(path, {**results, "rows": [{"row": "art", "threshold": 0.0}]})
    copy.here(monkeypatch, "solve", f"  {question.replace(' ', '  ')}\n")
    out = capsys.readouterr().out
    assert f"question: {question}\n" in out and "against 0.00, the threshold of row art" in out
    assert re.findall(r"^  (\d \w+|answer):", out, re.MULTILINE) == [
        "1 predict", "2 ask", "3 refine", "4 trust", "answer"]
    path.unlink()
    copy.here(monkeypatch, "solve", "--random")
    assert "0.5, until evaluate.py sets it on dev" in (out := capsys.readouterr().out)
    assert re.search(r"question: (.+)", out)[1] in (copy.data / "toy/test.jsonl").read_text()


# --- The other ways through the kit


def test_all_rows_and_generated_subquestions(copy, monkeypatch, capsys):
    """The rival that does everything in one text, every row, and an Asker that learns from the LLM's own questions."""
    copy.here(monkeypatch, "train_asker", "--end-to-end")
    copy.here(monkeypatch, "evaluate", "--rows", "all")
    assert set(copy.results()) == set(evaluate.ROWS)
    records = art.read_jsonl(copy.runs / "toy/default/records.jsonl", "")
    assert records[0]["candidates"].keys() == {"draft", "refined", "refined_self", "refined_plain", "refined_gold",
                                               "finetuned", "end_to_end"}
    copy.here(monkeypatch, "subquestions")
    rows = art.read_jsonl(copy.runs / "toy/subquestions.jsonl", "")
    assert len(rows) == 40 and any(row["subquestions"] for row in rows)
    copy.here(monkeypatch, "train_asker", "--run", "own", "--subquestions", "generated")
    assert json.loads((copy.runs / "toy/own/finetuned/args.json").read_text())["strategy"] == "cot"


def test_decomposition_and_shown_drafts_are_asked_anew(copy, monkeypatch, capsys):
    capsys.readouterr()
    copy.here(monkeypatch, "evaluate", "--show-draft", "yes")
    asked = asked_of(capsys.readouterr().out)
    assert asked["refined_self"] > 0 and not asked.keys() - {"refined", "refined_self", "trust"}
    copy.here(monkeypatch, "evaluate", "--strategy", "decomp", "--rows", "initial")
    assert asked_of(capsys.readouterr().out) == {"draft": 24}
    assert copy.results()["initial"]["strategy"] == "decomp" and list(copy.results()) == ["initial"]


# --- The README


def readme():
    """[[script, flag, ...], ...] of the lines that start the kit's scripts, in the README's ```bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"python (\w+/)*\w+\.py\b", line)]


def test_readme(copy, monkeypatch, capsys):
    """Its commands in their order: on the toy with tiny data, for other tasks up to the data that is missing here."""
    assert {words[0] for words in readme()} >= set(SCRIPTS[:4])
    shutil.rmtree(copy.runs)
    for script, *flags in readme():
        name = flags[0] if script == "art.py" else script.removesuffix(".py")
        out = copy.data / ("toy" if "toy" in script else "")
        own = copy.command(name) if name in MAINS else ["", "--out", str(out)]
        sizes = ["--train", "40", "--dev", "12", "--test", "12"] if script == "data/toy/prepare.py" else []
        files = ["--files", str(copy.folder / "nowhere")] if script == "data/prepare.py" else []
        monkeypatch.setattr(sys, "argv", [script, *flags, *own[1 + (script == "art.py"):], *sizes, *files])
        code = 0
        try:
            art.run(MAINS[name] if name in MAINS else load(script).main)
        except SystemExit as end:
            code = end.code
        other = files or {"--task", "--preset"} & set(flags)
        error = capsys.readouterr().err.strip().splitlines()[-1:] or [""]
        assert code == (2 if other else 0) and bool(other) == error[0].startswith("error: "), (script, flags, error)
    assert "art" in copy.results()


# --- Nothing of a model or a file is run


@pytest.mark.parametrize("script", [*SCRIPTS, "data/toy/pretrain.py"])
def test_no_code_comes_from_outside(script):
    """No eval, exec, pickle, shell, and no code of a model's repository: it has to be said, else transformers asks."""
    for node in ast.walk(ast.parse((ROOT / script).read_text("utf-8"))):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
        assert not names & {"pickle", "marshal", "shelve", "joblib"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system") and "shell" not in given
            assert called != "torch.load" or given.get("weights_only") == "True"
            loads = called.endswith((".from_pretrained", ").from_pretrained", ".from_config"))
            if loads and "Peft" not in called:
                assert given.get("trust_remote_code") == "False", ast.unparse(node)


def test_code_of_a_model_is_not_run(tmp_path, monkeypatch):
    """Nor is anybody asked whether it may be: a class might answer yes."""
    art.write(tmp_path / "config.json", {"model_type": "new", "auto_map": {
        name: "code.Own" for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")}})
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for make in (art.load_tokenizer, lambda name: art.load_base(name, 32)):
        with pytest.raises(art.UserError, match="cannot load"):
            make(str(tmp_path))
    assert not (tmp_path / "ran").exists()
