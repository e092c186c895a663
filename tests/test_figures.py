"""Statistics against known values, the training losses against slow ones, and the toy task's promises."""

import itertools
import random
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import art
import evaluate
import train_asker
import train_truster

sys.path.insert(0, str(art.ROOT / "data/toy"))
import prepare
import pretrain


def test_known_statistics():
    assert evaluate.wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)  # Newcombe (1998), table I: 0/10
    assert evaluate.wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=1e-4)  # the same table: 15/148
    assert evaluate.mcnemar(0, 0) == 1 and evaluate.mcnemar(5, 5) == 1
    assert evaluate.mcnemar(0, 6) == pytest.approx(2 / 64)
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=50).round(1), rng.random(50) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert art.auc(scores, labels) == pytest.approx(np.mean(pairs)) and art.auc([1, 2], [True, True]) is None


def test_bootstrap_against_the_formula():
    """60 questions of 400 gained, 40 lost: 5.0% more, with the standard error of a mean of 1, 0 and -1."""
    row, other = np.arange(400) < 60, (np.arange(400) >= 60) & (np.arange(400) < 100)
    found = evaluate.compare(row, other, seed=0)
    error = np.sqrt((100 / 400 - 0.05**2) / 400)
    assert found["delta"] == 0.05 and found["p"] == evaluate.mcnemar(60, 40)
    assert found["ci95"] == pytest.approx([0.05 - 1.96 * error, 0.05 + 1.96 * error], abs=0.004)
    assert evaluate.compare(row, row, seed=0) == {"delta": 0.0, "ci95": [0.0, 0.0], "p": 1.0}


def test_bootstrap_interval_covers():
    """In 300 draws of paired outcomes the 95% interval of the difference holds the true one about 95% of the time."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        kind = rng.choice(3, size=400, p=[0.15, 0.25, 0.6])  # only other right, only row right, the same
        low, high = evaluate.compare(kind == 1, kind == 0, seed=0)["ci95"]
        hits += low <= 0.10 <= high
    assert 0.90 < hits / 300 < 0.99


def test_threshold_is_the_best_of_all():
    rng = np.random.default_rng(2)
    for _ in range(50):
        p, gain = rng.random(12).round(1), rng.integers(-1, 2, 12)
        best = max(gain[p >= cut].sum() for cut in [0, *p, 1.1])
        assert gain[p >= art.best_threshold(p, gain)].sum() == best


def make_records(rng, n):
    """Records as evaluate.py has them, with drafts, refinements, decisions and scores drawn at random."""
    def candidate():
        answer = rng.choice(["1", "2"])
        return {"text": f"#### {answer}", "answer": answer, "stopped": True, "tokens": 5, "prompt_tokens": 20}
    return [{"id": str(i), "question": "Which?", "answer": "1",
             "candidates": {name: candidate() for name in ("initial", "refined", "refined_plain", "refined_self")},
             "ask": {name: {"p_refine": rng.random(), "subquestions": ["Which?"], "tokens": 5, "prompt_tokens": 20}
                    for name in ("asker", "self")},
             "trust": {"truster": {"initial": rng.random(), "refined": rng.random(), "prompt_tokens": 40}}}
            for i in range(n)]


def test_thresholds_come_from_dev_only():
    """Turning round every gold answer of test moves no threshold; where test leaks into dev, this check finds it."""
    args = Namespace(task="toy", seed=0, strategy="cot", facts="refine")
    models = {name: {"parameters": 1} for name in ("llm", "asker", "truster")}
    rng = random.Random(0)
    dev, test = make_records(rng, 30), make_records(rng, 30)
    turned = [{**record, "answer": "2"} for record in test]

    def thresholds(dev, test):
        rows = ["initial", "self_refine", "self_refine_plain", "asker", "asker_plain", "art", "oracle_gate"]
        made = evaluate.make_rows(args, rows, dev, test, models)[0]
        return {row: made[row]["settings"]["threshold"] for row in made}

    def leaking(dev, test):
        return thresholds(dev + test, test)

    assert thresholds(dev, test) == thresholds(dev, turned)
    assert leaking(dev, test) != leaking(dev, turned)
    assert sum(value is not None for value in thresholds(dev, test).values()) == 5


def test_rows_on_a_hand_made_case():
    """Four questions, one of each kind: right then right, right then wrong, wrong then right, wrong then wrong."""
    right = {"initial": np.array([1, 1, 0, 0], bool), "refined": np.array([1, 0, 1, 0], bool)}
    p, trusts = {"asker": np.array([0.1, 0.6, 0.9, 0.9])}, {"truster": np.array([0, 0, 1, 1], bool)}
    taken = {row: evaluate.outcome(row, right, p, trusts, 0.5)[1].tolist()
             for row in ("initial", "refine_always", "always_truster", "asker", "art", "oracle_gate", "oracle_choice")}
    assert taken == {"initial": [False] * 4, "refine_always": [True] * 4, "always_truster": [False, False, True, True],
                     "asker": [False, True, True, True], "art": [False, False, True, True],
                     "oracle_gate": [False, False, True, True], "oracle_choice": [False, False, True, False]}
    assert evaluate.set_threshold("asker", right, p, trusts) > 0.6
    assert evaluate.set_threshold("initial", right, p, trusts) is None
    ends = evaluate.sweep("asker", right, p, trusts)
    assert ends[0] == {"threshold": 0.0, "refined_share": 1.0, "accuracy": 0.5} and ends[-1]["refined_share"] == 0


def test_vote_and_truster_among_samples():
    """No answer and one that was cut off have no vote, the earlier answer wins a tie, the Truster may take a later."""
    answers = [None, "5", "4", "5", "5", "4", "4"]
    record = {"candidates": {"samples": [{"answer": answer, "number": i, "stopped": i != 1}
                                         for i, answer in enumerate(answers)]},
              "trust": {"samples": {str(i): score for i, score in enumerate([0, 1, 2, 9, 3, 4, 5])}}}
    assert [evaluate.pick(record, "majority", k)["number"] for k in (1, 2, 3, 4, 5, 6, 7)] == [0, 0, 2, 2, 3, 2, 2]
    assert [evaluate.pick(record, "best_of_k", k)["number"] for k in (1, 3, 7)] == [0, 2, 3]


def test_curve_is_read_off_at_the_cost_of_art():
    args = Namespace(task="gsm8k", base_url=None)
    samples = [{"text": f"#### {n}", "answer": str(n), "stopped": True, "tokens": 10, "prompt_tokens": 50}
               for n in (3, 4, 4, 4, 3, 3, 3, 3)]
    test = [{"answer": "4", "candidates": {"samples": samples}, "trust": {"samples": {
        **{str(i): -i for i in range(8)}, "prompt_tokens": 800}}}]
    models = {"llm": {"parameters": 1}, "truster": {"parameters": 1}}
    k, curve = evaluate.add_curve(args, "majority", test, models, 2 * 75)  # 50 + 3 x 10 is the first that is not below
    assert k == 3 and [point["accuracy"] for point in curve] == [0, 0, 1, 1, 0]
    assert evaluate.total(curve[2]["cost"], "flops") == 2 * 80 and test[0]["candidates"]["majority"]["answer"] == "4"
    k, curve = evaluate.add_curve(args, "best_of_k", test, models, None)
    args.base_url = "http://localhost"  # reads the prompt again for each sample
    price = evaluate.add_curve(args, "majority", test, models, None)[1][-1]["cost"]
    assert evaluate.total(price, "flops") == 2 * 8 * (50 + 10)
    assert k == 8 and evaluate.total(curve[-1]["cost"], "flops") == 2 * (50 + 80 + 800) and curve[-1]["accuracy"] == 0


@pytest.mark.parametrize("task", ["gsm8k", "strategyqa", "toy"])
def test_the_papers_figures_stand_beside_the_same_of_ours(task):
    """An accuracy beside an accuracy, a difference beside a difference, nothing where ours is something else."""
    row = {"accuracy": 0.5, "same_answer": 0.25, "vs_self_refine": {"delta": 0.031}}
    results = {"task": task, "models": {"llm": {"model": "x"}},
               "rows": [{"row": name, **row} for name in ("initial", "refine_always", "asker", "art", "finetuned")]}
    shown = {tuple(line.split(" | ")[2:4]) for line in evaluate.paper(results).splitlines()[5:]}
    assert shown == {"gsm8k": {
        ("78.62%", "-"), ("more than +2 points over 78.62%", "+3.1%"), ("82.18%", "50.0%"), ("82.6%", "50.0%"),
        ("91.88%", "50.0%"), ("93.72%", "50.0%"), ("93.10%", "50.0%"), ("94.08%", "50.0%"), ("63.2%", "-"),
        ("4 to 7 points from the Truster", "-"), ("about 80%", "25.0%"), ("7,473 to train, 1,319 to test", "-")},
        "strategyqa": {("70.52%", "-"), ("73.84%", "50.0%"), ("about +5 points", "+3.1%"), ("2,290", "-"),
                       ("about +1 and +3 points", "+3.1%"), ("little help from the Truster", "-")},
        "toy": set()}[task]


def test_pair_losses_against_a_loop():
    scores, correct = torch.randn(6), torch.tensor([True, False, True, False, False, True])
    slow = [-torch.nn.functional.logsigmoid(scores[i] - scores[j]) for i, j in itertools.product(range(6), repeat=2)
            if correct[i] and not correct[j]]
    assert torch.allclose(train_truster.pair_losses(scores, correct).sort()[0], torch.stack(slow).sort()[0])


def test_truster_loss_weighs_questions_the_same(lm):
    tokenizer = lm.tokenizer
    records = [{"id": "a", "question": "One?"}, {"id": "b", "question": "Two?"}, {"id": "c", "question": "Three?"}]
    samples = {"a": [{"text": "1", "correct": True}, {"text": "2", "correct": False}, {"text": "3", "correct": False}],
               "b": [{"text": "4", "correct": False}, {"text": "5 or so", "correct": True}],
               "c": [{"text": "6", "correct": True}]}
    groups = train_truster.contrast(records, samples, tokenizer)
    assert [group["correct"] for group in groups] == [[True, False, False], [False, True]]  # "c" has no wrong one
    model = art.add_lora(art.load_scorer("data/toy/base", 32, 0), art.TaskType.SEQ_CLS, 4).eval()
    collate = train_truster.make_collate(tokenizer.pad_token_id)
    with torch.no_grad():
        both = train_truster.truster_loss(model, collate(groups))
        apart = [train_truster.truster_loss(model, collate([group])) for group in groups]
    assert both.item() == pytest.approx(sum(loss.item() for loss in apart) / 2, abs=1e-5)


def test_asker_loss_is_on_the_target_alone(lm):
    """The loss with the head on the last positions only equals one over full logits, and padding changes nothing."""
    tokenizer = lm.tokenizer
    records = [{"id": i, "question": question, "solution": [["How many pens?", "1 + 1 = 2"]] * (1 + (i == "b"))}
               for i, question in (("a", "Ann has one pen. How many?"), ("b", "Two?"))]
    samples = {i: [{"text": "#### 1", "correct": False}, {"text": "#### 2", "correct": True}] for i in "ab"}
    ids = {tokenizer(f"{art.DECISION} {word}")["input_ids"][-1] for word in ("Yes", "No")}
    asked = {record["id"]: art.subquestions_of(record) for record in records}
    examples, share = train_asker.ask_examples(records, samples, asked, tokenizer, ids)
    assert share == 0.5 and len(examples) == 4
    alone, _ = train_asker.ask_examples(records, samples, {"a": [], "b": []}, tokenizer, ids)
    assert tokenizer.decode(alone[0]["target"], skip_special_tokens=True) == "Refine: Yes"
    more = {i: [*rows, {"text": "#### 3", "correct": False}] for i, rows in samples.items()}
    whole, _ = train_asker.ask_examples([{**record, "answer": "2"} for record in records], more, asked, tokenizer, ids,
                                        end_to_end=True)
    assert tokenizer.decode(whole[0]["target"], skip_special_tokens=True) == (
        "#### 1\nSub-questions:\nHow many pens?\nRefine: Yes\nRevised answer:\n1 + 1 = 2\n#### 2")
    assert {example["weight"] for example in whole} == {1.0}  # the decision is text here: its prior stays
    for example in examples:
        assert tokenizer.decode([example["target"][example["decision"]]]).strip() in ("Yes", "No")
        assert example["target"][-1] == tokenizer.eos_token_id
    collate = train_asker.make_collate(tokenizer.pad_token_id)
    with torch.no_grad():
        fast = train_asker.asker_loss(lm.model, collate(examples)).item()
        tokens, decisions = [], []
        for example in examples:
            row = torch.tensor([example["prompt"] + example["target"]])
            logits = lm.model(input_ids=row).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")[-len(example["target"]):]
            decisions.append(losses[example["decision"]] * example["weight"])
            tokens += [loss for place, loss in enumerate(losses) if place != example["decision"]]
    assert fast == pytest.approx((sum(tokens) / len(tokens) + sum(decisions) / len(decisions)).item(), abs=1e-4)


def test_toy_solutions_and_disjointness():
    taken = set()
    splits = [prepare.make_split(name, 300, 5, taken) for name in ("train", "dev", "test")]
    questions = [record["question"] for split in splits for record in split]
    assert len(set(questions)) == 900
    for record in splits[0]:
        for _, step in record["solution"]:
            a, sign, b, result = step.split("= ")[0].split()[-3:] + [step.split("= ")[1].split()[0]]
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)
        assert record["solution"][-1][1].split("= ")[1].split()[0] == record["answer"]
    rng = random.Random(0)
    pretraining = {pretrain.document(rng).split("\n")[0].removeprefix("Question: ") for _ in range(3000)}
    assert not pretraining & set(questions) and not any(map(prepare.for_pretraining, questions))


def test_bundled_model_is_small_and_safe():
    base = art.ROOT / "data/toy/base"
    assert sum(file.stat().st_size for file in base.glob("*") if not file.name.startswith("checkpoint")) < 10e6
    assert (base / "model.safetensors").exists() and not list(base.glob("*.bin"))
