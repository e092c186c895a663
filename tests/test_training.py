"""The trainings: losses against slow ones, kills that change nothing, and what is refused."""

import itertools
import json
import math
import shutil
import signal
import time
from argparse import Namespace

import peft
import pytest
import torch
import transformers
from conftest import BASE, refused
from safetensors.torch import load_file, save_file

import art
import train_asker
import train_truster

ADAPTER = "adapter_model.safetensors"
RECORDS = [{"id": "a", "question": "Ann has one pen. How many?", "answer": "2",
            "solution": [["How many pens?", "1 + 1 = 2 pens."]]},
           {"id": "b", "question": "Two?", "answer": "2", "solution": [["Who?", "Ben."], ["How many?", "2 pens."]]}]
SAMPLES = {"a": {"samples": [{"text": "#### 1", "correct": False}, {"text": "#### 2", "correct": True},
                             {"text": "1 + 2 = 3\n#### 3", "correct": False}]},
           "b": {"samples": [{"text": "Ben has 2.\n#### 2", "correct": True}, {"text": "#### 2", "correct": True},
                             {"text": "#### 9", "correct": False}, {"text": "", "correct": False, "failed": True}]}}


@pytest.fixture(scope="module")
def tokenizer():
    return art.load_tokenizer(BASE)


@pytest.fixture(scope="module")
def base():
    return art.load_base(BASE, 32)


def examples_of(tokenizer, **how):
    drafts = train_asker.drafts_of(RECORDS, SAMPLES)
    return train_asker.ask_examples(drafts, {r["id"]: art.subquestions_of(r) for r in RECORDS}, tokenizer, **how)


def test_right_and_wrong_drafts_weigh_the_same(tokenizer):
    """The different drafts of each question, but for failed ones; their decisions balanced, their prior kept."""
    examples = examples_of(tokenizer)
    texts = [tokenizer.decode(e["input_ids"]) for e in examples]
    assert len(examples) == 6 and all(e["input_ids"][-1] == tokenizer.eos_token_id for e in examples)
    weights = {kind: [e["weight"] for e, text in zip(examples, texts) if f"Refine: {kind}" in text]
               for kind in ("Yes", "No")}
    assert sum(weights["Yes"]) == pytest.approx(sum(weights["No"])) and len(weights["Yes"]) == 3
    assert {tokenizer.decode(e["input_ids"][-2:-1]).strip() for e in examples} == {"Yes", "No"}  # the last word
    whole = examples_of(tokenizer, end_to_end=True)[0]  # here the decision is text like any other
    assert tokenizer.decode(whole["input_ids"][-whole["target"]:-1]) == (
        "#### 1\nSub-questions:\nHow many pens?\nRefine: Yes\nRevised answer:\n1 + 1 = 2 pens.\n#### 2")
    assert whole["weight"] == 0


def test_loss_of_the_asker_against_a_loop(base, tokenizer):
    """One example at a time, full logits, no padding: each text's mean, and the decision as a term of its own."""
    examples = examples_of(tokenizer) + train_asker.task_examples(RECORDS, tokenizer, "decomp")
    with torch.no_grad():
        fast = train_asker.loss(base, train_asker.make_collate(tokenizer.pad_token_id)(examples))
        text = decision = 0.0
        for example in examples:
            ids, n = torch.tensor([example["input_ids"]]), example["target"]
            logits = base(input_ids=ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[-n:].tolist()
            if example["weight"]:
                decision += losses.pop(-2) * example["weight"]
            text += sum(losses) / n
    assert {name: value.item() for name, value in fast.items()} == pytest.approx(
        {"text": text, "decision": decision}, rel=1e-4)


def groups_of(tokenizer, n=20):
    records = [{"id": str(i), "question": f"Ann has {i} pens. How many?"} for i in range(n)]
    samples = {str(i): {"samples": [{"text": f"#### {i}", "correct": True}] + [
        {"text": f"{i} + {j}\n#### {i + j}", "correct": False} for j in range(1, 2 + i % 2)]} for i in range(n)}
    return train_truster.contrast(records, samples, tokenizer)


def test_loss_of_the_truster_against_a_loop(tokenizer):
    """All pairs of a right and a wrong answer, each text scored alone; a question weighs 1, whatever its pairs."""
    model = art.add_lora(art.load_scorer(BASE, 32, 3), "SEQ_CLS", 4).eval()
    groups = groups_of(tokenizer, 9)
    with torch.no_grad():
        fast = train_truster.loss(model, train_truster.make_collate(tokenizer.pad_token_id)(groups))["pairs"].item()
        slow = 0.0
        for group in groups:
            scores = [model(input_ids=torch.tensor([row])).logits.item() for row in group["rows"]]
            pairs = [math.log1p(math.exp(b - a)) for (a, good), (b, bad) in
                     itertools.product(zip(scores, group["correct"]), repeat=2) if good and not bad]
            slow += sum(pairs) / len(pairs)
    assert fast == pytest.approx(slow, rel=1e-4) and {len(group["rows"]) for group in groups} == {2, 3}


def fine_tune(folder, tokenizer, loss=train_truster.loss, batch_size=4, accumulate=1, save_steps=99, n=20, epochs=2):
    """(figures, weights) of a small Truster in 32 bits."""
    model = art.add_lora(art.load_scorer(BASE, 32, 3), "SEQ_CLS", 4)
    args = Namespace(adapter_bits=32, batch_size=batch_size, accumulate=accumulate, lr=1e-3, seed=0, report_to="none",
                     save_steps=save_steps)
    collate = train_truster.make_collate(tokenizer.pad_token_id)
    figures = art.fine_tune(model, groups_of(tokenizer, n), collate, loss, args, folder, epochs)
    return figures, load_file(folder / ADAPTER)


def close(one, other, within):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=0, atol=within) for k in one)


def test_every_example_weighs_the_same(tokenizer, tmp_path):
    """However the examples of a step are split into batches, the weights after 10 steps are the same."""
    (figures, once), (_, twice), (_, other) = (
        fine_tune(tmp_path / str(i), tokenizer, batch_size=size, accumulate=times)
        for i, (size, times) in enumerate([(4, 1), (2, 2), (2, 1)]))
    assert figures["steps"] == 10 and close(once, twice, 1e-5) and not close(once, other, 1e-3)


@pytest.mark.parametrize(("bad", "save_steps", "kept"), [(6, 3, 3), (7, 5, 5), (8, 10, None)])
def test_training_stops_at_nan(tokenizer, tmp_path, bad, save_steps, kept):
    """With one line, and no checkpoint holds what is not finite: not that of the same step, nor that of the last."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        return {"pairs": train_truster.loss(model, batch)["pairs"] * (math.nan if len(calls) == bad else 1)}

    with pytest.raises(art.UserError, match="the loss is not finite at step"):
        fine_tune(tmp_path, tokenizer, loss, save_steps=save_steps, epochs=1.6)  # 8 steps
    last = art.last_checkpoint(tmp_path / "checkpoints")
    assert (last and last[0]) == kept and not (tmp_path / ADAPTER).exists()


LONG = {"train_asker": (["finetuned", "asker"], ["--task-epochs", "4", "--epochs", "1"]),
        "train_truster": (["truster"], ["--epochs", "8"])}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("script", LONG)
def test_killed_and_resumed_equals_uninterrupted(copy, monkeypatch, capsys, script):
    """Killed as soon as there is a checkpoint, then started again: every weight is the same, bit for bit.

    What only fp16 has in its checkpoints does not hinder.
    """
    names, flags = LONG[script]
    flags, began = [*flags, "--save-steps", "1"], time.time()
    copy.here(monkeypatch, script, *flags, "--run", "whole")
    abouts = [json.loads((copy.runs / "toy/whole" / name / "args.json").read_text()) for name in names]
    assert 0 < sum(about["seconds"] for about in abouts) < time.time() - began
    process, folder = copy.start(script, *flags, "--run", "killed"), copy.runs / "toy/killed" / names[0]
    while not art.last_checkpoint(folder / "checkpoints"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / ADAPTER).exists()
    torch.save({}, art.last_checkpoint(folder / "checkpoints")[1] / "scaler.pt")
    copy.here(monkeypatch, script, *flags, "--run", "killed")
    assert json.loads((folder / "args.json").read_text())["resumed_at"] >= 1
    for name in names:
        assert close(*(load_file(copy.runs / "toy" / run / name / ADAPTER) for run in ("whole", "killed")), within=0)


def test_stopped_behind_the_last_checkpoint(copy, monkeypatch):
    """Everything is trained, but args.json does not say so yet: no further step, the same weights."""
    folder = copy.runs / "toy/default/truster"
    about = json.loads((folder / "args.json").read_text())
    art.write(folder / "args.json", {key: value for key, value in about.items() if key != "steps"})
    expected = load_file(folder / ADAPTER)
    (folder / ADAPTER).unlink()
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *args, **kwargs: pytest.fail("a further step"))
    copy.here(monkeypatch, "train_truster")
    assert close(load_file(folder / ADAPTER), expected, 0)
    assert json.loads((folder / "args.json").read_text())["steps"] == about["steps"]


def test_adapters_load_in_plain_peft(kit):
    """Without this kit: transformers' model, PEFT's adapter, and the same decision."""
    folder = kit.runs / "toy/default/asker"
    plain = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(plain, folder).eval()
    ids = torch.tensor([art.load_tokenizer(BASE)("Question: How many?\nAnswer:\n#### 3")["input_ids"]])
    local = art.Local(BASE, 32, 0.25, folder)
    with torch.inference_mode():
        assert torch.allclose(plain(input_ids=ids).logits, local.model(input_ids=ids).logits, atol=1e-4)
        with plain.disable_adapter():
            assert not torch.allclose(plain(input_ids=ids).logits, local.model(input_ids=ids).logits, atol=1e-2)


def test_training_is_qlora(kit):
    """4-bit nf4 base, adapters in fp32, and args.json says what made them."""
    for name, every in {"finetuned": 2, "asker": 2, "truster": 1}.items():  # steps between two reports, conftest.TINY
        folder = kit.runs / "toy/default" / name
        about, weights = json.loads((folder / "args.json").read_text()), load_file(folder / ADAPTER)
        assert about["bits"] == 4 and {weight.dtype for weight in weights.values()} == {torch.float32}
        assert about["steps"] > 0 and about["curve"][-1]["step"] == about["steps"] // every * every
        assert sum(weight.numel() for weight in weights.values()) == about["trainable"]
    assert any("score" in name for name in weights)
    kinds = {type(module).__name__ for name, module in art.load_base(BASE, 4).named_modules() if "_proj" in name}
    assert kinds == {"Linear4bit"}
    about = json.loads((kit.runs / "toy/default/asker/args.json").read_text())
    assert about["start"] == art.weights_id(kit.runs / "toy/default/finetuned", kit.runs / "toy")
    labels = [kind for row in art.read_jsonl(kit.runs / "toy/samples.jsonl", "")[:40]
              for kind in art.labels_of(row).values()]
    assert about["prior_odds"] == pytest.approx(labels.count(False) / labels.count(True))


@pytest.mark.parametrize("script", ["train_asker", "train_truster"])
def test_other_settings_examples_or_weights_are_refused(copy, monkeypatch, capsys, tmp_path, script):
    """Each with its name, then and now; hours are at stake."""
    assert "lr (0.002 then, 0.5 now)" in refused(monkeypatch, capsys, copy, script, "--lr", "0.5")
    assert "seed (0 then, 1 now)" in refused(monkeypatch, capsys, copy, script, "--seed", "1")
    shutil.copytree(BASE, tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file({k: weight * 2 for k, weight in weights.items()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    model = script.replace("train_", "--") + "-model"
    assert "weights (" in refused(monkeypatch, capsys, copy, script, model, tmp_path / "base")
    path = copy.runs / "toy/samples.jsonl"
    rows = art.read_jsonl(path, "")
    for row in rows:
        row["samples"][0]["text"] += " Indeed."
    art.write(path, rows)
    assert "examples (" in refused(monkeypatch, capsys, copy, script, *(["--task-epochs", "0"] * (script[6] == "a")))


@pytest.mark.parametrize("script", LONG)
def test_seed(copy, monkeypatch, script):
    """The same one makes the same adapter, in a process that has drawn random numbers before; another makes another."""
    adapters = []
    for seed in (0, 0, 1):
        flags = ["--seed", seed, "--run", f"run{len(adapters)}", *(["--task-epochs", "0"] * (script == "train_asker"))]
        torch.rand(1 + len(adapters))
        copy.here(monkeypatch, script, "--epochs", "0.1", *flags)
        adapters.append(load_file(copy.runs / f"toy/run{len(adapters)}/{LONG[script][0][-1]}" / ADAPTER))
    assert close(adapters[0], adapters[1], 0)
    lora_a = [weight for name, weight in adapters[0].items() if "lora_A" in name]
    assert not any(torch.equal(a, adapters[2][name]) for name, a in adapters[0].items() if "lora_A" in name) and lora_a


def test_long_examples_are_left_out_and_counted(capsys):
    examples = [{"input_ids": [1] * n} for n in (3, 6, 7)]
    assert art.drop_long(examples, 6) == examples[:2]
    out = capsys.readouterr().out
    assert "2 examples; 1 longer than --max-length 6 are left out" in out and "raise --max-length" in out
    with pytest.raises(art.UserError, match="--max-length 2"):
        art.drop_long(examples, 2)


def test_nothing_to_learn(copy, monkeypatch, capsys):
    """Without wrong samples there is nothing to tell apart, and with a few there is too little."""
    path = copy.runs / "toy/samples.jsonl"
    rows = art.read_jsonl(path, "")
    art.write(path, [{**row, "samples": [{**one, "correct": True} for one in row["samples"]]} for row in rows])
    assert "0 of" in (line := refused(monkeypatch, capsys, copy, "train_asker", "--run", "x")) and "--k 8" in line
    assert "needs 8 of them" in refused(monkeypatch, capsys, copy, "train_truster", "--run", "x")


@pytest.mark.parametrize("script, adapter", [("train_asker", "asker"), ("train_truster", "truster")])
def test_push(copy, monkeypatch, capsys, script, adapter):
    """The adapter and its card go to the Hub, what is private stays; what the Hub refuses is one line."""
    import huggingface_hub
    sent = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **settings: sent.update(settings))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **settings: sent.update(settings))
    copy.here(monkeypatch, script, "--push", "me/mine")
    folder = copy.runs / "toy/default" / adapter
    assert (sent["repo_id"], sent["folder_path"], sent["private"]) == ("me/mine", folder, True)
    assert "questions.txt" in sent["ignore_patterns"]
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.base_model == "data/toy/base" and "--push me/mine" in card.text
    assert f"| seed | {json.loads((folder / 'args.json').read_text())['seed']} |" in card.text

    def refuse(self, repo, **settings):
        raise ValueError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(SystemExit):
        copy.here(monkeypatch, script, "--push", "me/mine")
    assert "cannot push to me/mine: no token; log in with: hf auth login" in capsys.readouterr().err
