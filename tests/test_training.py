"""The trainings: losses by hand, kills that change nothing, and what is refused."""

import functools
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from conftest import BASE, ROOT, args_of, edit, load
from safetensors.torch import load_file
from torch.testing import assert_close

import art
import train_asker
import train_truster

ADAPTER = "adapter_model.safetensors"
TOKENIZER = art.load_tokenizer(BASE)
COLLATE = functools.partial(train_truster.collate, TOKENIZER.pad_token_id)


def lines_of(*samples):
    """{id: line of samples.jsonl}, from (id, text, is it correct?). Those without a text failed."""
    lines = {}
    for name, text, correct in samples:
        line = lines.setdefault(name, {"id": name, "samples": []})
        line["samples"].append({"text": text, "correct": correct, "failed": "" if text else "why"})
    return lines


def test_correct_and_incorrect_drafts_weigh_the_same(make_run):
    """Equal samples are one draft, failed ones none. The Asker learns what it reads later."""
    records = [{"id": "a", "question": "Ann?"}, {"id": "b", "question": "Ben?"}]
    lines = lines_of(("a", "#### 1", False), ("a", "#### 2", True), ("a", "1 + 2\n#### 3", False),
                     ("b", "#### 2", True), ("b", "#### 2", True), ("b", "#### 9", False),
                     ("b", "", False), ("b", "long " * 99, False))
    drafts, weights = train_asker.drafts_of(None, records, lines), {" Yes": [], " No": []}
    asked, lm = {"a": ["Refine: a?"], "b": []}, make_run()
    for (record, draft, _), one in zip(drafts, train_asker.ask_examples(drafts, asked, TOKENIZER, 90)):
        ids, place = one["input_ids"], one["decision"] - one["target"]
        begun = "\n".join([*asked[record["id"]], art.DECISION])
        assert ids[:place] == lm.tokens(art.ask_prompt(record, draft), begun)[0]
        assert ids[place + 1:] == [TOKENIZER.eos_token_id]
        weights[TOKENIZER.decode(ids[place])].append(one["weight"])
    assert weights == {" Yes": [pytest.approx(2.5 / 3)] * 4, " No": [1.25] * 2}


def test_loss_of_the_asker_by_hand():
    """The mean over a target's tokens; the decision counts in a term of its own."""
    bits = torch.tensor([[3, 1, 3, 2], [1, 3, 2, 3], [3, 3, 2, 1], [1, 2, 3, 3]])  # of b after a

    def bigrams(input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        assert position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]  # the second row is padded
        return SimpleNamespace(logits=-math.log(2) * bits[input_ids][:, -logits_to_keep:])

    examples = [{"input_ids": [0, 1, 2, 3], "target": 3, "decision": 1, "weight": 0.7},
                {"input_ids": [1, 0, 3], "target": 2, "decision": None, "weight": 0.0}]
    loss = train_asker.loss(bigrams, train_asker.collate(3, examples))
    assert loss["decision"].item() == pytest.approx(0.7 * 2 * math.log(2))  # 2 after 1
    # 1 after 0 and 3 after 2, of 3 tokens; 0 after 1 and 3 after 0, of 2 tokens
    assert loss["text"].item() == pytest.approx(((1 + 1) / 3 + (1 + 2) / 2) * math.log(2))


def test_loss_of_the_truster_by_hand(monkeypatch):
    """All pairs of a correct and an incorrect answer; the questions weigh the same."""
    scores = torch.tensor([1.0, 0.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(art, "score_batch", lambda model, ids, mask: scores)
    loss = train_truster.loss(None, COLLATE([
        {"rows": [[1], [2, 3]], "correct": [True, False]},
        {"rows": [[4], [5], [6]], "correct": [False, True, False]}]))
    one_apart, equal = math.log(1 + math.exp(-1)), math.log(2)
    assert loss["pairs"].item() == pytest.approx(one_apart + (equal + one_apart) / 2)


def fine_tune(folder, loss=train_truster.loss, at_once=4, **flags):
    """(figures, weights) of a small Truster after 10 steps."""
    records = [{"id": n, "question": f"Ann has {n} pens. How many?"} for n in range(20)]
    samples = [(n, f"#### {n + off}", off == 0) for n in range(20) for off in range(2 + n % 2)]
    groups = train_truster.contrast(records, lines_of(*samples), TOKENIZER)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    model = art.add_lora(art.load_base(BASE, 32, scorer=True), "SEQ_CLS", 4)
    args = args_of(folder, **{"lr": 1e-3, "save_steps": 99, **flags})
    figures = art.fine_tune(model, groups, COLLATE, loss, args, folder, 4, at_once, epochs=2)
    return {**figures, "seconds": 0}, load_file(folder / ADAPTER)


@pytest.mark.parametrize(("dies_at", "save_steps", "left"), [
    (2, 99, 10), (3, 2, 8), (8, 5, 5), (None, 1, 0)])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, dies_at, save_steps, left):
    """Killed before the first checkpoint, after one, or before the adapter was written."""
    whole, calls = fine_tune(tmp_path / "whole"), []

    def loss(model, inputs):
        calls.append(1)
        return sys.exit() if len(calls) == dies_at else train_truster.loss(model, inputs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(peft.PeftModel, "save_pretrained", lambda *_: sys.exit())
        fine_tune(tmp_path / "killed", loss, save_steps=save_steps)
    calls, dies_at = [], None
    figures, weights = fine_tune(tmp_path / "killed", loss, save_steps=save_steps)
    assert figures == whole[0] and figures["steps"] == 10 and len(calls) == left
    assert_close(weights, whole[1], rtol=0, atol=0)


def test_a_step_does_not_depend_on_what_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """The curve also goes to a tracker."""
    sent = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(
        init=lambda project, name: sent.append(name), finish=lambda: sent.append("finished"),
        log=lambda means, step: sent.append({"step": step, **means})))
    _, weights = fine_tune(tmp_path / "four")
    figures, others = fine_tune(tmp_path / "three", at_once=3, report_to="trackio")
    assert_close(weights, others, rtol=0, atol=1e-5)
    assert sent == ["toy default three", *figures["curve"], "finished"]


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    factors = iter([1, 1, 1, 1, 1, math.nan])
    with pytest.raises(art.UserError, match="the loss is not finite at step 6: lower --lr"):
        fine_tune(tmp_path, lambda model, inputs: {
            "pairs": next(factors) * train_truster.loss(model, inputs)["pairs"]}, save_steps=3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3


def test_a_saved_truster_scores_as_transformers_own_class(tmp_path, make_run):
    """The head is in fp32."""
    fine_tune(tmp_path / "new")
    texts = [f"Question: {'Ann has 3 pens. ' * n}How many?\nAnswer:\n#### {n}" for n in range(5)]
    loaded, half = (art.Local(make_run().args, BASE, bits, tmp_path / "new", scorer=True)
                    for bits in (32, 16))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        BASE, num_labels=1, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "new").eval()
    expected = [plain(**TOKENIZER(text, return_tensors="pt")).logits.item() for text in texts]
    scores = [output["score"] for output in loaded.score(texts)]
    assert scores == pytest.approx(expected, abs=1e-4) and len({*scores}) == 5
    scores = torch.tensor([output["score"] for output in half.score(texts)])
    assert half.base.dtype == torch.bfloat16 and (scores.bfloat16().float() != scores).any()


def about_of(kit, name, run="default"):
    return art.read_json(kit.runs / "toy" / run / name / "args.json")


def test_the_pipeline_trains_with_qlora(kit):
    """4 bits, LoRA on all layers, asking after the task training; args.json has the AUC on dev."""
    for name in ("finetuned", "asker", "truster"):
        weights = load_file(kit.runs / "toy/default" / name / ADAPTER)
        assert about_of(kit, name)["bits"] == 4 and about_of(kit, name)["finished"]
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert sum("lora_A" in name for name in weights) == 4 * 7
    base, start = art.load_base(art.SMALL_TOY, 4), kit.runs / "toy/default/finetuned"
    layers = [layer for name, layer in base.named_modules() if "_proj" in name]
    assert {type(layer).__name__ for layer in layers} == {"Linear4bit"}
    assert about_of(kit, "asker")["start"] == art.weights_id(start)
    begun = peft.get_peft_model_state_dict(art.add_lora(base, "CAUSAL_LM", 16, start))
    assert_close(begun, load_file(start / ADAPTER), rtol=0, atol=0)
    dev = art.load_columns(kit.runs / "toy/default", "dev.jsonl")
    auc = art.auc(dev["ask.p_refine"], ~dev["correct.draft"].astype(bool))
    assert about_of(kit, "asker")["dev_auc"] == auc and 0 < about_of(kit, "truster")["dev_auc"] < 1


def test_auc_of_the_truster_on_dev(copy, monkeypatch):
    """1 if all correct answers have a higher score."""
    monkeypatch.setattr(art, "trust", lambda truster, args, records, answers: [
        {"score": art.is_correct("toy", answer["text"], record["answer"])}
        for record, answer in zip(records, answers)])
    assert train_truster.dev_auc(args_of(copy.runs, data=copy.data)) == 1.0


def test_other_settings_code_and_examples_are_refused(copy, tmp_path):
    line = copy.refused("train_truster", "--lr", "0.5")
    assert "lr was 0.002, is now 0.5. Give --run NEW, or --overwrite" in line
    script = Path(shutil.copy(ROOT / "train_truster.py", tmp_path))
    copy.monkeypatch.setattr(sys, "argv", copy.command("train_truster"))
    edit(script, "the Truster needs 8", "it needs 8")  # in main
    load(script).main()
    edit(script, "-logsigmoid(", "-2 * logsigmoid(")
    with pytest.raises(art.UserError, match="code was"):
        load(script).main()
    edit(copy.runs / "toy/samples.jsonl", "####", "So ####")
    assert "examples was" in copy.refused("train_truster")
    copy("train_truster", "--overwrite", "--lr", "0.5")
    assert about_of(copy, "truster")["lr"] == 0.5


@pytest.mark.parametrize(("key", "flags"), [("solution", []), ("", ["--subquestions", "none"])])
def test_an_asker_that_only_decides(copy, key, flags):
    """Without task training: from data without solutions, or on demand."""
    path = copy.data / "toy/train.jsonl"
    art.write(path, [{name: record[name] for name in record.keys() - {key}}
                     for record in art.read_jsonl(path, "")])
    copy("train_asker", "--run", "x", *flags)
    out, task = copy.printed(), about_of(copy, "finetuned", "x")
    assert "target: Refine: " in out and task.get("strategy", "cot") == "cot"
    assert ("no task training" in out) == ("only to decide" in out) == (not task) == bool(key)
    copy("evaluate", "--run", "x", "--truster-from", "default", "--rows", "draft,finetuned")
    assert ("finetuned" in copy.results("x")) == (not key)
