"""The five commands as a user runs them: what they write, a second run, and bad input."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refused
from safetensors.torch import load_file

import art
import evaluate
import train_asker

LOAD_AND_SCORE = """
import sys, torch, art
folder, text = sys.argv[1:]
truster = art.Truster(folder + "/truster")
(_, (row,)), = next(truster.score([{"question": text}], [{"a": text}]))
lm = art.LM("data/toy/base")
lm.add_adapter("asker", folder + "/asker")
with torch.inference_mode(), lm.use("asker"):
    logits = lm.model(input_ids=torch.tensor([lm.render(text)])).logits[0, -1]
print(row["a"].hex(), float(logits.max()).hex(), int(logits.argmax()))
"""


def test_results(kit):
    folder = kit.runs / "toy/default"
    results = json.loads((folder / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == [row for row in evaluate.ROWS if row != "end_to_end"]
    assert results["n"] == results["n_dev"] == 40 and list(results["not_available"]) == ["end_to_end"]
    rows = {row["row"]: row for row in results["rows"]}
    records = art.read_jsonl(folder / "records.jsonl")
    for row in records[0]["right"]:
        assert rows[row]["accuracy"] == np.mean([record["right"][row] for record in records])
    assert rows.keys() - records[0]["right"].keys() == {"random_gate"}  # an expectation
    for record in records:
        assert set(record["candidates"]) == {"initial", "refined", "refined_plain", "refined_self", "finetuned",
                                             "samples", "majority", "best_of_k"}
        assert 0 <= record["trust"]["self"]["refined"] == 1 - record["trust"]["self"]["initial"] <= 1
        assert 0 <= record["ask"]["asker"]["p_refine"] <= 1
        assert {"initial", "refined"} <= set(record["trust"]["truster"])
    for name in ("initial", "refined"):  # the table must be what the records say
        share = np.mean([art.is_correct("toy", r["candidates"][name]["text"], r["answer"]) for r in records])
        assert rows["refine_always" if name == "refined" else name]["accuracy"] == share
    best = max(rows[row]["accuracy"] for row in ("initial", "refine_always", "art"))
    assert rows["oracle_choice"]["accuracy"] >= best
    mended, broken = (rows["art"]["flips"][key] for key in ("wrong_right", "right_wrong"))
    assert rows["art"]["accuracy"] - rows["initial"]["accuracy"] == pytest.approx((mended - broken) / 40)
    share = rows["asker"]["refined_share"]
    expected = (1 - share) * rows["initial"]["accuracy"] + share * rows["refine_always"]["accuracy"]
    assert rows["random_gate"]["accuracy"] == pytest.approx(expected)
    samples = [art.is_correct("toy", r["candidates"]["samples"][0]["text"], r["answer"]) for r in records]
    assert {curve[0]["accuracy"] for curve in results["curves"].values()} == {np.mean(samples)}
    assert "| art |" in kit.out["evaluate"] and "== mended: " in (folder / "flips.txt").read_text()


def test_costs_follow_the_records(kit):
    """Tokens a question, counted again from the records: who reads and writes what in each row."""
    folder = kit.runs / "toy/default"
    rows = {row["row"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    records = art.read_jsonl(folder / "records.jsonl")

    def mean(*parts):
        return np.mean([sum(part(record)["tokens"] for part in parts) for record in records])

    draft, refined = (lambda r, name=name: r["candidates"][name] for name in ("initial", "refined"))
    assert rows["initial"]["cost"]["llm"]["tokens"] == pytest.approx(mean(draft))
    assert rows["refine_always"]["cost"]["llm"]["tokens"] == pytest.approx(mean(draft, refined))
    assert rows["always_truster"]["cost"]["asker"]["tokens"] == pytest.approx(mean(lambda r: r["ask"]["asker"]))
    share = rows["asker"]["refined_share"]
    assert rows["random_gate"]["cost"]["llm"]["tokens"] == pytest.approx(mean(draft) + share * mean(refined))
    cost = rows["always_truster"]["cost"]["truster"]
    parameters = art.parameters("data/toy/base")
    assert cost["tokens"] == 0 and cost["flops"] == pytest.approx(2 * parameters * cost["prompt_tokens"])


def test_training_costs(kit):
    """Tokens and operations of what came before the table, counted again; and the price of an hour."""
    folder = kit.runs / "toy/default"
    results = json.loads((folder / "results.json").read_text())
    costs, parameters = results["training"], art.parameters("data/toy/base")
    samples = art.read_jsonl(kit.runs / "toy/samples.jsonl")
    prompts = {row["id"]: row["prompt_tokens"] for row in samples}
    tokens = sum(row["tokens"] for row in samples) + sum(prompts.values())
    assert costs["samples"]["tokens"] == tokens and costs["samples"]["flops"] == 2 * parameters * tokens
    tokenizer = art.load_tokenizer("data/toy/base")
    train = art.load_task("toy", "train", data=kit.data)
    read = sum(len(example["prompt"]) + len(example["target"])
               for example in train_asker.task_examples(train, tokenizer, "decomp"))
    assert costs["finetuned"]["tokens"] == read and costs["finetuned"]["flops"] == 4 * parameters * read
    assert costs["finetuned"]["examples"] == 40 and 0 < costs["finetuned"]["trainable_parameters"] < parameters
    large = costs[evaluate.COMPUTED]
    assert large["flops"] == 6 * 70e9 * read
    assert large["seconds"] / costs["finetuned"]["seconds"] == pytest.approx(large["flops"] / (4 * parameters * read))
    spent = {row["row"]: evaluate.total_cost(row["row"], results, row["cost"]) for row in results["rows"]}
    answering = results["n"] * evaluate.total(results["rows"][0]["cost"], "flops")
    assert spent["initial"] == pytest.approx(answering)
    trained = sum(costs[name]["flops"] for name in ("samples", "finetuned", "asker", "truster"))
    assert spent["art"] > trained + answering and spent["art"] > spent["asker"] > spent["finetuned"]
    assert (folder / "costs.md").read_text() == evaluate.cost_table(results)
    hours = evaluate.cost_table({**results, "training": {"asker": {**costs["asker"], "seconds": 1800}}}, 5)
    assert hours.splitlines()[2].endswith("| 2.50 |")


def test_summary(kit, monkeypatch, capsys):
    flags = ["--data", kit.data, "--runs", kit.runs, "--summary", "default"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "default"])
    art.run(evaluate.main)
    out = capsys.readouterr().out
    rows = json.loads((kit.runs / "toy/default/results.json").read_text())["rows"]
    accuracy = next(row["accuracy"] for row in rows if row["row"] == "art")
    assert f"| art | {accuracy:.1%} | " in out and "2 runs (default, default)" in out
    assert "nobody" in refused(monkeypatch, capsys, "evaluate", *flags, "nobody")


@pytest.mark.parametrize("script", TINY)
def test_progress_is_shown(kit, script):
    assert "%|" in kit.err[script] and ("loss" in kit.err[script] + kit.out[script]) == script.startswith("train")


def test_second_run_redoes_nothing(kit, monkeypatch, capsys):
    before = kit.files()
    results = kit.runs / "toy/default"
    rows = json.loads((results / "results.json").read_text())["rows"]
    names = ("results.json", "records.jsonl", "flips.txt", "table.md", "costs.md", "results.png")
    derived = {results / name for name in names}
    for script in TINY:
        kit.here(monkeypatch, script)
        assert "%|" not in capsys.readouterr().err
    after = kit.files()
    assert after.keys() == before.keys()
    assert {path for path in before if before[path] != after[path]} <= derived  # computed from the rest, in no time
    assert json.loads((results / "results.json").read_text())["rows"] == rows


def test_training_is_qlora(kit):
    folder = kit.runs / "toy/default"
    for name in ("finetuned", "asker", "truster"):
        weights = load_file(folder / name / "adapter_model.safetensors")
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        about = json.loads((folder / name / "args.json").read_text())
        assert about["bits"] == 4 and about["prompt_version"] == art.PROMPT_VERSION and about["steps"] > 0
    assert any(".score." in key or key.endswith("score.weight") for key in weights)
    lm = art.LM("data/toy/base")
    kinds = {type(module).__name__ for name, module in lm.model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"}


def test_fresh_process_gives_equal_logits(kit):
    """Both adapters, saved and loaded in two new processes, against each other and against this one."""
    folder = kit.runs / "toy/default"
    text = art.load_task("toy", "dev", data=kit.data)[0]["question"]
    command = [sys.executable, "-c", LOAD_AND_SCORE, str(folder), text]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    once, again = (process.communicate()[0] for process in processes)
    assert once == again
    base = art.load_scorer("data/toy/base", 4, seed=123)  # another seed: a head that was lost would show
    fresh = art.PeftModel.from_pretrained(base, folder / "truster").eval()
    ids = art.load_tokenizer("data/toy/base")(art.trust_prompt({"question": text}, text))["input_ids"]
    with torch.inference_mode():
        score = art.score_batch(fresh, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    assert float.fromhex(once.split()[0]) == score.item()


def test_asker_training_moves_the_decision(kit):
    """The figures that the script prints are those of its own predictions on dev."""
    folder = kit.runs / "toy/default/asker"
    about = json.loads((folder / "args.json").read_text())
    rows = {row["id"]: row for row in art.read_jsonl(folder / "dev.jsonl")}
    drafts = {row["id"]: row for row in art.read_jsonl(kit.runs / "toy/samples.jsonl") if row["sample"] == 0}
    p, wrong = zip(*((row["p_refine"], not drafts[name]["correct"]) for name, row in rows.items()))
    assert about["dev"]["auc"] == pytest.approx(art.auc(p, wrong))
    assert about["dev"]["decision_accuracy"] == np.mean((np.array(p) >= about["threshold"]) == np.array(wrong))


def test_solve(kit):
    question = art.load_task("toy", "test", data=kit.data)[0]["question"]
    command = [sys.executable, str(ROOT / "art.py"), "solve", "--data", str(kit.data), "--runs", str(kit.runs)]
    done = subprocess.run([*command, question], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("question:", "1 predict:", "2 ask:", "answer:"):
        assert part in done.stdout


@pytest.mark.parametrize("script", ["art.py", "train_asker.py", "train_truster.py", "evaluate.py",
                                    *(str(p.relative_to(ROOT)) for p in ROOT.glob("data/*/*.py"))])
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        if script == "art.py":  # run a second time it would register its attention again
            art.run(art.main)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not end.value.code and "usage" in capsys.readouterr().out


def test_notebook_calls_the_scripts():
    """In their order, with flags that they know; what is written is copied to Drive after each, and meanwhile."""
    cells = json.loads((ROOT / "colab.ipynb").read_text())["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    asked = [re.findall(r"python ([\w/]+\.py(?: sample)?)", line) for line in lines]
    assert sum(asked, []) == [step for task in ("toy", "gsm8k") for step in (
        f"data/{task}/prepare.py", "art.py sample", "train_asker.py", "train_truster.py", "evaluate.py")]
    for line in [line for line in lines if "--preset t4" in line]:
        assert re.fullmatch(r"!\{EVERY\} & python .* --task gsm8k --preset t4; kill \$!; \{SAVE\}", line)


@pytest.mark.parametrize("script", ["sample", "train_asker", "train_truster", "evaluate"])
def test_unknown_flag(monkeypatch, capsys, script):
    assert "--no-such" in refused(monkeypatch, capsys, script, "--no-such", "1")


def test_missing_and_empty_data(monkeypatch, capsys, copy):
    folder, flags = copy
    (folder / "data/toy/dev.jsonl").write_text("")
    assert "data/toy/prepare.py" in refused(monkeypatch, capsys, "evaluate", *flags)
    (folder / "data/toy/dev.jsonl").unlink()
    assert "data/toy/prepare.py" in refused(monkeypatch, capsys, "train_asker", *flags, *TINY["train_asker"])


def test_gold_answer_that_cannot_be_read_whole(monkeypatch, capsys, copy):
    folder, flags = copy
    path = folder / "data/toy/dev.jsonl"
    records = art.read_jsonl(path)
    for answer in ("A", "3,5", "1.5 million", ""):
        art.write_jsonl(path, [records[0], {**records[1], "answer": answer}, *records[2:]])
        assert f"dev.jsonl, line 2: the answer {answer!r}" in refused(monkeypatch, capsys, "evaluate", *flags)


def test_broken_line(monkeypatch, capsys, copy):
    folder, flags = copy
    path = folder / "runs/toy/samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    line = refused(monkeypatch, capsys, "train_truster", *flags, "--run", "other")
    assert "samples.jsonl, line 4" in line
    path.unlink()
    assert "python art.py sample" in refused(monkeypatch, capsys, "train_truster", *flags, "--run", "other")


def test_missing_adapter(monkeypatch, capsys, copy):
    folder, flags = copy
    assert "train_asker.py" in refused(monkeypatch, capsys, "evaluate", *flags, "--run", "nobody")
    shutil.rmtree(folder / "runs/toy/default/truster")
    assert "train_truster.py" in refused(monkeypatch, capsys, "solve", *flags, "How many?")


def test_adapter_of_another_base(monkeypatch, capsys, copy):
    folder, flags = copy
    path = folder / "runs/toy/default/asker/args.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "revision": "other"}))
    assert "revision = other" in refused(monkeypatch, capsys, "evaluate", *flags)
    path.write_text(json.dumps({**about, "prompt_version": 0}))
    assert "prompt_version = 0" in refused(monkeypatch, capsys, "evaluate", *flags)


def test_other_arguments_are_refused(monkeypatch, capsys, copy):
    _, flags = copy
    assert "lr = " in refused(monkeypatch, capsys, "train_asker", *flags, *TINY["train_asker"], "--lr", "0.5")
    assert "temperature = " in refused(monkeypatch, capsys, "sample", *flags, *TINY["sample"], "--temperature", "0.9")
    assert "strategy = " in refused(monkeypatch, capsys, "evaluate", *flags, "--strategy", "decomp")


def test_nothing_to_learn(monkeypatch, capsys, copy):
    folder, flags = copy
    path = folder / "runs/toy/samples.jsonl"
    art.write_jsonl(path, [{**row, "correct": True} for row in art.read_jsonl(path)])
    assert "--k 8" in refused(monkeypatch, capsys, "train_truster", *flags, "--run", "other")
    assert "--k 8" in refused(monkeypatch, capsys, "train_asker", *flags, "--run", "other", "--task-epochs", "0")


def test_question_longer_than_context(monkeypatch, capsys, copy):
    _, flags = copy
    assert "shorten the question" in refused(monkeypatch, capsys, "solve", *flags, "How many pens? " * 300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch, capsys):
    assert "needs a CUDA GPU" in refused(monkeypatch, capsys, "evaluate", "--preset", "t4")


def test_missing_model(monkeypatch, capsys, copy, tmp_path):
    _, flags = copy
    flags = ["--data", flags[1], "--runs", tmp_path / "new"]
    assert "cannot load the model" in refused(monkeypatch, capsys, "sample", *flags, "--model", tmp_path / "nothing")
    (tmp_path / "pickled").mkdir()
    config = json.loads((ROOT / "data/toy/base/config.json").read_text())
    (tmp_path / "pickled/config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "data/toy/base" / name, tmp_path / "pickled" / name)
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    line = refused(monkeypatch, capsys, "sample", *flags, "--model", tmp_path / "pickled")
    assert "safetensors" in line and "pickled ones are refused, since" in line


def test_no_git_and_no_exemplars(monkeypatch, tmp_path):
    """A machine without git, and a --data folder without exemplars: the kit's own are used, as many as there are."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert art.provenance()["commit"] is None and "torch" in art.provenance()["versions"]
    assert art.find_exemplars("gsm8k-offline", tmp_path) == ROOT / "data/gsm8k/exemplars.jsonl"
    monkeypatch.setitem(art.PRESETS["toy"]["all"], "shots", 8)
    parser = art.argparse.ArgumentParser(parents=[art.make_parser(llm=True)])
    shots = [art.parse(parser, "evaluate", ["--task", task]).shots for task in ("gsm8k", "strategyqa", "toy")]
    assert shots == [8, 6, 0]


def test_second_process_is_refused(monkeypatch, capsys, copy):
    folder, flags = copy
    with art.lock(folder / "runs/toy"):
        argv = ["art", "sample", *map(str, flags[:4]), "--k", "3"]
        code = f"import sys, art; sys.argv = {argv!r}; art.run(art.main)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "another process" in done.stderr and "Traceback" not in done.stderr



def test_two_processes_train_like_one(copy, monkeypatch, capsys):
    """Under torchrun, the same loss as one process with twice the accumulation; one process alone prints and writes."""
    folder, flags = copy
    flags = [*flags, "--limit", "20", "--batch-size", "1", "--task-epochs", "1", "--epochs", "0.1"]
    flags = [str(flag) for flag in (ROOT / "train_asker.py", *flags)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run([*launch, *flags, "--run", "two", "--accumulate", "1"], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(sys, "argv", [*flags, "--run", "one", "--accumulate", "2"])
    art.run(train_asker.main)
    about = {}
    for run, out in (("two", done.stdout), ("one", capsys.readouterr().out)):
        about[run] = json.loads((folder / f"runs/toy/{run}/finetuned/args.json").read_text())
        assert out.count("drafts of dev") == 1 and (folder / f"runs/toy/{run}/asker/args.json").is_file()
    assert about["two"]["steps"] == about["one"]["steps"] == 10
    assert about["two"]["loss"] == pytest.approx(about["one"]["loss"], rel=1e-4)
