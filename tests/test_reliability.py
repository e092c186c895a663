"""Killed, out of disk, out of memory, other inputs in the same folder: nothing lost, nothing mixed. See RELIABILITY.md.

What is too slow for a test suite, such as 20 kills a script, is in tests/reliability.py.
"""

import ast
import io
import json
import math
import re
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, outcome, refused, same, tear
from safetensors.torch import load_file, save_file

import art
import evaluate
import train_truster

SCRIPTS = sorted(path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "tests")))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("script", "writes"), [("sample", 3), ("train_asker", 7), ("train_asker", 9),
                                                ("train_truster", 2), ("evaluate", 13)])
def test_killed_loses_nothing(kit, tmp_path, monkeypatch, capsys, script, writes):
    """Killed in the middle of a run, and of a line; the same command then leaves what an uninterrupted run left."""
    again = kit.copy(tmp_path / "kit")
    again.forget(script)
    killed = again(script, kill_after=writes)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    torn = tear(again, script)
    assert torn == (not script.startswith("train"))
    again.here(monkeypatch, script)
    said = capsys.readouterr()
    assert ("1 half-written line dropped" in said.err) == torn
    assert ("going on from" in said.out) == script.startswith("train")
    assert same(outcome(script, again.runs), outcome(script, kit.runs))


@pytest.mark.parametrize("script", ["sample", "train_truster"])
def test_full_disk(kit, tmp_path, monkeypatch, capsys, script):
    """A quota that ends in the middle of a sample, or of a checkpoint: one clear line, and what was written is kept."""
    resource = pytest.importorskip("resource")
    again, path = kit.copy(tmp_path / "kit"), tmp_path / "kit/runs/toy/samples.jsonl"
    again.forget(script)
    whole = (kit.runs / "toy/samples.jsonl").read_bytes()
    quota = len(whole) // 2 if script == "sample" else 100_000
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (quota, most[1]))
    try:
        assert "the disk is full" in refused(monkeypatch, capsys, script, *again.flags(script))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    if script == "sample":
        assert path.read_bytes() == whole[:quota]
    else:
        assert path.read_bytes() == whole and not (again.runs / "toy/default/truster/args.json").exists()
        assert list(again.runs.glob("toy/default/truster/checkpoints/checkpoint-1/*"))  # a part of one,
        assert art.last_checkpoint(again.runs / "toy/default/truster/checkpoints") is None  # which is not taken for one


def test_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_step": '), (12, "")):
        art.write_text(tmp_path / f"checkpoint-{step}/trainer_state.json", state)
    (tmp_path / "checkpoint-13").mkdir()
    assert art.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert art.last_checkpoint(tmp_path / "checkpoint-13") is None


CHANGES = {  # what is changed: more flags, or an attribute of art, or a split; and the difference that is named
    "arguments": (["--bits", "16"], "bits = 4, now it is 16"),
    "seed": (["--seed", "1"], "seed = 0, now it is 1"),
    "model": (["--MODEL", str(ROOT / "data/toy/base")], "model = data/toy/base, now it is "),
    "revision": (("model_revision", lambda name: "other"), "revision = "),
    "prompts": (("PROMPT_VERSION", art.PROMPT_VERSION + 1), f"prompt_version = {art.PROMPT_VERSION}, now it is "),
    "data": ("dev", "data_sha256 = "),
}


def change_question(path):
    """One question of a split is worded otherwise; its id stays."""
    records = art.read_jsonl(path)
    records[0]["question"] += " Think well."
    art.write_jsonl(path, records)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("script", ["sample", "train_asker", "train_truster"])
def test_other_input_is_refused(kit, tmp_path, monkeypatch, capsys, script, change):
    """A finished output, one thing changed, the same command: refused with the difference named, nothing written."""
    again, (how, named), flags = kit.copy(tmp_path / "kit"), CHANGES[change], []
    if isinstance(how, list):
        flags = [how[0].replace("MODEL", f"{script}-model".removeprefix("train_").replace("sample-", "")), how[1]]
    elif isinstance(how, tuple):
        monkeypatch.setattr(art, *how)
    else:
        change_question(again.data / f"toy/{how}.jsonl")
    before = again.files()
    assert named in refused(monkeypatch, capsys, script, *again.flags(script), *flags)
    assert again.files() == before


def test_evaluation_redoes_what_depends_on_a_change(kit, tmp_path, monkeypatch, capsys):
    """Another Truster: its stage alone is made again. Another test question: the first stage is begun in a new file."""
    again = kit.copy(tmp_path / "kit")
    path = again.runs / "toy/default/truster" / art.ADAPTER
    save_file({name: -weight for name, weight in load_file(path).items()}, path)
    before = again.files()
    again.here(monkeypatch, "evaluate")
    new = {path.name.split("-")[0] for path in again.files().keys() - before.keys()}
    assert new == {"trust", "trust_samples"}
    change_question(again.data / "toy/test.jsonl")
    monkeypatch.setattr(art, "predict", lambda lm, task, records, *more, **how: refuse(how["done"]))
    assert "asked again without set()" in refused(monkeypatch, capsys, "evaluate", *again.flags("evaluate"))


def test_adapters_of_other_samples_are_refused(kit, tmp_path, monkeypatch, capsys):
    """They may have learned from what is now a test question, or from another LLM."""
    again = kit.copy(tmp_path / "kit")
    path = again.runs / "toy/samples.jsonl"
    rows = art.read_jsonl(path)
    art.write_jsonl(path, [{**rows[0], "text": "#### 1"}, *rows[1:]])
    line = refused(monkeypatch, capsys, "evaluate", *again.flags("evaluate"))
    assert "samples_sha256 = " in line and "--adapters" in line
    again.here(monkeypatch, "evaluate", "--adapters", str(kit.runs / "toy/default"))


def test_outputs_say_what_made_them(kit, tmp_path, monkeypatch, capsys):
    """What nobody claims is not adopted, and samples are not finished before their maker has said so."""
    again = kit.copy(tmp_path / "kit")
    about = art.maker(again.runs / "toy/samples.jsonl")
    kept = json.loads(about.read_text())
    assert kept["k"] == 3
    art.write_json(about, {key: value for key, value in kept.items() if key != "k"})  # as if killed at its very end
    assert "is not finished" in refused(monkeypatch, capsys, "train_truster", *again.flags("train_truster"))
    again.here(monkeypatch, "sample")
    assert json.loads(about.read_text())["k"] == 3
    about.unlink()
    assert "samples.args.json, which says" in refused(monkeypatch, capsys, "sample", *again.flags("sample"))


def test_one_id_for_two_questions_is_refused(kit, tmp_path, monkeypatch, capsys):
    again = kit.copy(tmp_path / "kit")
    again.forget("sample")
    dev = art.read_jsonl(again.data / "toy/dev.jsonl")
    art.write_jsonl(again.data / "toy/dev.jsonl", [{**dev[0], "id": "toy-train-3"}, *dev[1:]])
    assert "'toy-train-3' stands for two" in refused(monkeypatch, capsys, "sample", *again.flags("sample"))
    with pytest.raises(art.UserError, match="'a' stands for two"):
        art.stage(tmp_path / "x.jsonl", "x", ["a", "a"], None)


def test_changed_weights_and_templates_are_noticed(tmp_path):
    """Of a model in a folder: the last bytes of its weights, and a chat template beside them."""
    shutil.copytree(ROOT / "data/toy/base", tmp_path / "base")
    seen = {art.model_revision(tmp_path / "base")}
    with (tmp_path / "base/model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    seen.add(art.model_revision(tmp_path / "base"))
    (tmp_path / "base/chat_template.jinja").write_text("{{ messages }}")
    seen.add(art.model_revision(tmp_path / "base"))
    assert len(seen) == 3


def refuse(done):
    raise art.UserError(f"asked again without {done}")


def test_other_versions_are_said_and_recorded(kit, tmp_path, monkeypatch, capsys):
    again = kit.copy(tmp_path / "kit")
    now = {"commit": "1234567", "versions": {**art.provenance()["versions"], "torch": "9.9"}}
    monkeypatch.setattr(art, "provenance", lambda: now)
    again.here(monkeypatch, "sample")
    said = capsys.readouterr().err
    assert f"torch = {torch.__version__.split('+')[0]}" in said and "now 9.9" in said and "now 1234567" in said
    about = json.loads((again.runs / "toy/samples.args.json").read_text())
    assert about["continued_by"] == [now] and about["provenance"] != now
    again.here(monkeypatch, "sample")
    assert "warning" not in capsys.readouterr().err  # said once
    assert json.loads((again.runs / "toy/samples.args.json").read_text()) == about




def train(folder, loss, save_steps):
    """A small Truster, 20 questions in batches of 6, two passes; (figures, its weights)."""
    tokenizer = art.load_tokenizer("data/toy/base")
    records = [{"id": str(i), "question": f"Ann has {i} pens. How many?"} for i in range(20)]
    samples = {str(i): [{"text": f"#### {i}", "correct": True}, {"text": f"#### {i + 1}", "correct": False}]
               for i in range(20)}
    groups = train_truster.contrast(records, samples, tokenizer)
    model = art.add_lora(art.load_scorer("data/toy/base", 32, 0), art.TaskType.SEQ_CLS, 4)
    args = Namespace(bits=32, batch_size=6, accumulate=1, lr=1e-2, seed=0, save_steps=save_steps, report_to="none")
    trained = art.fine_tune(model, groups, train_truster.make_collate(tokenizer.pad_token_id), loss, args, folder, 2)
    return trained, {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("save_steps", [1, 9])
def test_training_out_of_memory(tmp_path, capsys, save_steps):
    """Batches of more than 2 fail from a step on, with and without a checkpoint by then: the steps remain the same.

    The loss is a mean over questions: a step must give the loss it gives with enough memory.
    """
    def short(most, calls):
        def loss(model, inputs):
            calls.append(len(inputs["sizes"]))
            if calls[-1] > most and len(calls) > 3:
                raise torch.OutOfMemoryError("simulated")
            return train_truster.truster_loss(model, inputs)
        return loss

    enough, expected = train(tmp_path / "enough", train_truster.truster_loss, save_steps)
    capsys.readouterr()
    little, weights = train(tmp_path / "little", short(2, calls := []), save_steps)
    assert "a batch of 6 becomes 2 batches of 3" in (said := capsys.readouterr()).err
    assert "a batch of 3 becomes 3 batches of 1" in said.err and set(calls) == {6, 3, 2, 1}
    assert ("going on from" in said.out) == (save_steps == 1)
    assert little["steps"] == enough["steps"] == 8
    assert little["loss"] == pytest.approx(enough["loss"], abs=1e-4)
    assert all(torch.allclose(weights[name], expected[name], atol=1e-3) for name in expected)
    with pytest.raises(art.UserError, match="--max-length"):
        train(tmp_path / "none", short(0, []), save_steps)


@pytest.mark.parametrize(("bad", "save_steps", "step", "last"), [
    (6, 3, 6, "checkpoint-3"), (7, 5, 8, "checkpoint-5"), (8, 10, 8, None)])  # the last step is a checkpoint too
def test_no_checkpoint_holds_what_is_not_finite(tmp_path, bad, save_steps, step, last):
    """A loss is not a number: the checkpoint due at that step is not written, the one before it is kept."""
    calls = []

    def loss(model, inputs):
        calls.append(1)
        return train_truster.truster_loss(model, inputs) * (math.nan if len(calls) == bad else 1)

    with pytest.raises(art.UserError, match=f"loss is nan at step {step}"):
        train(tmp_path, loss, save_steps)
    kept = art.last_checkpoint(tmp_path / "checkpoints")
    assert (kept and Path(kept).name) == last and not (tmp_path / art.ADAPTER).exists()


def test_gradients_that_never_come_right_in_fp16():
    """One that overflows is left out, as is due; twenty in a row are no overflow."""
    watch, state, fp16 = art.StopOnNonFinite(), Namespace(global_step=400), Namespace(fp16=True)
    watch.on_train_begin(fp16, state, None)
    for step, norm in ((410, math.inf), (420, 1.0), (430, math.inf), (440, math.inf)):
        watch.on_log(fp16, Namespace(global_step=step), None, {"loss": 1.0, "grad_norm": norm})
    with pytest.raises(art.UserError, match="grad_norm is inf at step 450"):
        watch.on_log(fp16, Namespace(global_step=450), None, {"loss": 1.0, "grad_norm": math.inf})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_numbers_that_are_not_finite_make_no_answer(tmp_path, temperature):
    shutil.copytree(ROOT / "data/toy/base", tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file({name: weight * math.nan for name, weight in weights.items()}, tmp_path / "base/model.safetensors",
              {"format": "pt"})
    lm = art.LM(tmp_path / "base", bits=32)
    with pytest.raises(art.UserError, match="not finite: use --bits 32"):
        list(art.predict(lm, "toy", [{"question": "How many?"}], temperature=temperature))


def test_ids_name_no_files(kit):
    """One question of each split has an id such as ../../../../test: it is in the records, and in no file's name."""
    ids = {record["id"] for record in art.read_jsonl(kit.runs / "toy/default/records.jsonl")}
    assert "../../../../test\x1b[2J" in ids
    assert {path.name for path in kit.folder.iterdir()} == {"data", "runs"}
    assert not [path for path in kit.folder.parent.rglob("*")
                if "\x1b" in path.name or path.name in ("train", "dev", "test")]


def test_model_text_cannot_steer_a_terminal(kit):
    """flips.txt, the table and what is printed hold no control character, whatever is in a record."""
    (record,) = art.read_jsonl(kit.runs / "toy/default/records.jsonl")[1:2]
    for text, name in (("#### 7", "refined"), ("\x1b[2J\x07\r\u202e | wiped", "initial")):
        record["candidates"][name] = {**record["candidates"][name], "text": text}
    text = evaluate.flips("toy", [{**record, "answer": "7"}], [True])
    assert "wiped" in text and "mended: 1" in text and not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    folder = kit.runs / "toy/default"
    for shown in (*kit.out.values(), (folder / "flips.txt").read_text(), (folder / "table.md").read_text()):
        assert "\x1b[2J" not in shown


def test_pickles_are_refused(kit, tmp_path, monkeypatch, capsys):
    """An adapter that holds pickled weights alone, though peft would read them."""
    again = kit.copy(tmp_path / "kit")
    folder = again.runs / "toy/default/truster"
    torch.save(load_file(folder / art.ADAPTER), folder / "adapter_model.bin")
    (folder / art.ADAPTER).unlink()
    assert f"no trained adapter ({art.ADAPTER}" in refused(monkeypatch, capsys, "evaluate", *again.flags("evaluate"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_comes_from_outside(path):
    """No eval, exec, pickle or code of a model's repository anywhere, and torch.load for weights alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
        assert not names & {"pickle", "marshal", "shelve", "joblib"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system")
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "shell" not in given
            assert called != "torch.load" or given.get("weights_only") == "True"
            loads = called.endswith((".from_pretrained", ".from_config")) and not called.startswith("Peft")
            assert given.get("trust_remote_code") == ("False" if loads else None)  # unsaid, transformers asks


def test_code_of_a_model_is_not_run(tmp_path, monkeypatch):
    """Nor is anybody asked whether it may be: a class might answer yes."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "new", "auto_map": {name: "code.Own" for name in ("AutoConfig", "AutoTokenizer")}}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (art.load_tokenizer, art.load_config, art.load_base):
        with pytest.raises(art.UserError, match="cannot load the model"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_any_character_can_be_printed(monkeypatch, tmp_path):
    """As on Windows, where output into a file knows 256 characters; half a character in a file is an error of it."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    art.run(lambda: print("3 \u2212 1 \U0001f600", flush=True))
    assert written.getvalue().split() == [b"3", b"\\u2212", b"1", b"\\U0001f600"]
    (tmp_path / "x.jsonl").write_text('{"id": "1"}\n{"question": "\\ud800"}\n')
    with pytest.raises(art.UserError, match="line 2"):
        art.read_jsonl(tmp_path / "x.jsonl")
