"""The four steps with a fake model, generation against transformers' own, and what must never be in a prompt."""

import json
import re

import pytest
import torch
import transformers

import art

RECORD = {"id": "x", "question": "Ann has 7 pens. Ben has 2 fewer pens than Ann. How many pens do they have together?",
          "answer": "12", "facts": ["Pens are made of secrets."],
          "solution": [["How many pens does Ben have?", "Ben has 7 - 2 = 5 pens."],
                       ["How many together?", "They have 7 + 5 = 12 pens."]]}


class FakeLM:
    """Answers each step by looking at the end of the prompt; keeps every prompt it was shown."""

    chat = False

    def __init__(self):
        self.seen = []

    def tokenizer(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def option_ids(self, before, options):
        return [1, 2]

    def render(self, prompt, exemplars=(), instruction=""):
        return self.tokenizer("".join(f"{p}{a}\n\n" for p, a in exemplars) + prompt)["input_ids"]

    def generate(self, prompts, options=None, k=1, done=(), **how):
        for index, ids in enumerate(prompts):
            prompt = "".join(map(chr, ids))
            self.seen.append(prompt)
            text = {"Answer:": "7 + 9 = 16\n#### 16", "Revised answer:": "7 + 5 = 12\n#### 12",
                    "Sub-questions:": "1. How many has Ben?\n- How many together?\nRefine:"}
            made = {"text": text.get(prompt.splitlines()[-1], ""), "stopped": True, "tokens": 3,
                    "prompt_tokens": len(ids), "logprob": -1.0, "logit": 2.0}
            if index not in done:
                yield [(index, [made] * k)]


def only(batches):
    """The one row of a step on one record."""
    ((_, rows),) = [pair for batch in batches for pair in batch]
    return rows[0]


def test_four_steps_with_a_fake_model():
    lm = FakeLM()
    draft = only(art.predict(lm, "gsm8k", [RECORD]))
    assert draft["answer"] == "16" and not art.is_correct("gsm8k", draft["text"], RECORD["answer"])
    asked = only(art.ask(lm, "gsm8k", [RECORD], [draft["text"]], shift=-2.0))
    assert asked["subquestions"] == ["How many has Ben?", "How many together?"] and asked["p_refine"] == 0.5
    refined = only(art.refine(lm, "gsm8k", [RECORD], [draft["text"]], [asked["subquestions"]]))
    assert art.is_correct("gsm8k", refined["text"], RECORD["answer"])
    assert "7 + 9 = 16\n#### 16" in lm.seen[2] and "How many has Ben?\nHow many together?\nRevised" in lm.seen[2]


@pytest.mark.parametrize("strategy", ["cot", "decomp"])
@pytest.mark.parametrize("shots", [0, 2])
def test_gold_never_reaches_a_prompt(strategy, shots):
    """A record with its gold fields and one without give the same prompts at every step; facts only when asked for."""
    exemplars = art.load_exemplars("gsm8k", shots)
    bare = {"question": RECORD["question"]}
    seen = []
    for record in (RECORD, bare):
        lm = FakeLM()
        list(art.predict(lm, "gsm8k", [record], exemplars, strategy))
        list(art.ask(lm, "gsm8k", [record], ["#### 16"], exemplars))
        list(art.refine(lm, "gsm8k", [record], ["#### 16"], [["Who?"]], exemplars))
        list(art.refine(lm, "gsm8k", [record], ["#### 16"], exemplars=exemplars))
        seen.append([*lm.seen, art.trust_prompt(record, "#### 16"), art.choice_prompt(record, "a", "b")])
    assert seen[0] == seen[1] and not any("secrets" in prompt for prompt in seen[0])
    lm = FakeLM()
    list(art.refine(lm, "gsm8k", [RECORD], ["#### 16"], [["Who?"]], facts=True))
    assert "secrets" in lm.seen[0] and "5 pens" not in lm.seen[0]


def test_exemplars_are_sound():
    """Each is answered rightly by its solution, and half of the drafts are wrong."""
    for task in ("gsm8k", "strategyqa"):
        exemplars = art.read_jsonl(art.ROOT / f"data/{task}/exemplars.jsonl")
        wrong = [not art.is_correct(task, e["draft"], e["answer"]) for e in exemplars]
        assert sum(wrong) * 2 == len(wrong)
        for e in exemplars:
            assert art.is_correct(task, art.solution_text(e["solution"], e["answer"]), e["answer"])


def prompts_of(lm, n=12, shots=2):
    words = "Ann Ben Cleo Dan Eve Finn Gus Hana Ivan Jill Kim Leo".split()
    records = [{"question": f"{a} picked {7 + i} pens. "
                            f"{b} picked {2 + i % 5} {'more' if i % 2 else 'fewer'} pens than {a}. "
                            + (f"{c} picked 3 times as many pens as {b}. " if i % 3 else "")
                            + f"How many pens did {c if i % 3 else b} pick?"}
               for i, (a, b, c) in enumerate(zip(words, words[3:] + words, words[5:] + words))]
    shown = [("Question: Kim sold 9 hats. Leo sold 4 more hats than Kim. How many hats did Leo sell?\nAnswer:\n",
              "Leo sold 9 + 4 = 13 hats.\n#### 13")] * shots
    if not shots:  # a revised answer is the end of a text: the model closes it itself
        return [lm.render(art.refine_prompt(record, "#### 9")) for record in records[:n]]
    return [lm.render(art.predict_prompt(record), shown) for record in records[:n]]


def run(lm, prompts, **how):
    return dict(pair for batch in lm.generate(prompts, **how) for pair in batch)


def test_attention_of_its_own(lm, tmp_path):
    """A model that computes its attention itself is left to it: the same texts as from plain `generate`."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=len(lm.tokenizer), hidden_size=32, num_hidden_layers=2, alibi=False,
                                       num_attention_heads=2, bos_token_id=None, eos_token_id=1)
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    own = art.LM(str(tmp_path), 32)
    prompts = prompts_of(own, 4)
    assert own.plan(prompts, 8, 1)[0] == [] and lm.plan(prompts, 8, 1)[0] != []
    for index, (made,) in run(own, prompts, max_new_tokens=8).items():
        ids = torch.tensor([prompts[index]])
        plain = own.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert made["text"] == own.tokenizer.decode(plain[0, ids.shape[1]:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("shots", [0, 2])
def test_greedy_is_what_generate_writes(lm, shots):
    """In 32 bits: cached prefix, left padding and rows that leave the batch change nothing against plain `generate`."""
    prompts = prompts_of(lm, shots=shots)
    made = run(lm, prompts, max_new_tokens=48)
    for index, ids in enumerate(prompts):
        out = lm.model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False,
                                pad_token_id=lm.tokenizer.pad_token_id)
        assert made[index][0]["text"] == lm.tokenizer.decode(out[0][len(ids):], skip_special_tokens=True).strip()
    assert shots or len({made[index][0]["tokens"] for index in made}) > 1  # rows did end at different times


def test_batches_and_prefix_do_not_change_the_text(lm, monkeypatch):
    prompts, stop = prompts_of(lm), art.answer_stop("toy", False)
    together = run(lm, prompts, max_new_tokens=48, stop=stop)
    monkeypatch.setattr(lm, "batch_tokens", 1)
    alone = run(lm, prompts, max_new_tokens=48, stop=stop)
    assert [together[i][0]["text"] for i in together] == [alone[i][0]["text"] for i in together]
    assert all(m["stopped"] and m["text"].splitlines()[-1].startswith("####") for (m,) in together.values())
    assert together[0][0]["logprob"] == pytest.approx(alone[0][0]["logprob"], abs=1e-3)


def test_logprob_is_that_of_the_text(lm):
    prompt = prompts_of(lm, shots=0)[0]
    made = run(lm, [prompt], max_new_tokens=96)[0][0]
    assert made["stopped"]
    ids = lm.tokenizer(made["text"], add_special_tokens=False)["input_ids"] + [lm.tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    assert made["logprob"] == pytest.approx(logits.log_softmax(-1)[range(len(ids)), ids].sum().item(), abs=1e-2)


def test_samples_differ_and_follow_the_seed(lm):
    prompts = prompts_of(lm, 6)
    first, again, other = (run(lm, prompts, max_new_tokens=40, k=4, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    texts = [[[made["text"] for made in several] for several in outs.values()] for outs in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and any(len(set(several)) > 1 for several in texts[0])


def test_resumed_batches_are_the_same(lm, monkeypatch):
    prompts = prompts_of(lm)
    monkeypatch.setattr(lm, "batch_tokens", 600)
    whole = run(lm, prompts, max_new_tokens=40, k=2, temperature=1.0)
    done = set(lm.plan(prompts, 40, 2)[1][0])
    rest = run(lm, prompts, max_new_tokens=40, k=2, temperature=1.0, done=done)
    assert 0 < len(rest) < len(whole) and all(rest[i] == whole[i] for i in rest)


def test_out_of_memory_halves_the_batch(lm, monkeypatch, capsys):
    prompts, generate = prompts_of(lm), lm._generate

    def small(batch, *settings):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("simulated")
        return generate(batch, *settings)

    expected = run(lm, prompts, max_new_tokens=40)
    monkeypatch.setattr(lm, "_generate", small)
    made = run(lm, prompts, max_new_tokens=40)
    assert {i: m[0]["text"] for i, m in made.items()} == {i: m[0]["text"] for i, m in expected.items()}
    assert "halved" in capsys.readouterr().err


def test_out_of_memory_halves_the_trusters_batch(kit, monkeypatch, capsys):
    truster, score_batch = art.Truster(kit.runs / "toy/default/truster"), art.score_batch
    records = [{"question": f"Ann picked {i} pens. How many?"} for i in range(4)]
    texts = [{"initial": f"#### {i}", "refined": f"She picked {i}.\n#### {i + 1}"} for i in range(4)]

    def small(model, ids, mask):
        if len(ids) > 3:
            raise torch.OutOfMemoryError("simulated")
        return score_batch(model, ids, mask)

    def scores():
        made = dict(pair for batch in truster.score(records, texts) for pair in batch)
        return [made[i][0][name] for i in range(4) for name in texts[i]]

    expected = scores()
    monkeypatch.setattr(art, "score_batch", small)
    assert scores() == pytest.approx(expected, abs=1e-3) and "halved" in capsys.readouterr().err


def test_decision_is_read_in_the_same_pass(lm):
    """p_refine equals the softmax over Yes and No behind the text that was written, asked in a second pass."""
    record = {"question": "Ann picked 7 pens. Ben picked 2 fewer pens than Ann. How many pens did Ben pick?"}
    asked = only(art.ask(lm, "toy", [record], ["Ben picked 7 + 2 = 9 pens.\n#### 9"], max_new_tokens=60))
    written = "\n".join([*asked["subquestions"], art.DECISION])
    ids = lm.render(art.ask_prompt(record, "Ben picked 7 + 2 = 9 pens.\n#### 9")) + lm.tokenizer(written)["input_ids"]
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
        yes, no = logits[lm.option_ids(art.DECISION, [" Yes", " No"])].tolist()
    assert asked["p_refine"] == pytest.approx(torch.tensor([yes, no]).softmax(0)[0].item(), abs=1e-4)
    cut = only(art.ask(lm, "toy", [record], ["Ben picked 7 + 2 = 9 pens.\n#### 9"], max_new_tokens=2))
    assert not cut["stopped"] and 0 < cut["p_refine"] < 1  # never came to the decision: it is put to the model


def test_chat_prompt(lm, monkeypatch):
    """With a chat template the exemplars are turns and the instruction stands in front once; nothing is doubled."""
    template = ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
                "{% if add_generation_prompt %}[assistant] {% endif %}")
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    monkeypatch.setattr(lm, "chat", True)
    ids = lm.render("Question: B?\nAnswer:\n", [("Question: A?\nAnswer:\n", "#### 1")], "Be brief.")
    assert lm.tokenizer.decode(ids) == ("[user] Be brief.\n\nQuestion: A?\nAnswer:\n[assistant] #### 1\n"
                                        "[user] Question: B?\nAnswer:\n[assistant] ")


def test_stage_keeps_what_is_there(tmp_path):
    path, calls = tmp_path / "stage.jsonl", []

    def batches(done):
        calls.append(set(done))
        for index in range(3):
            if index not in done:
                yield [(index, [{"sample": j, "text": f"{index}{j}"} for j in range(2)])]

    rows = art.stage(path, "x", ["a", "b", "c"], batches, per_id=2)
    content = path.read_text()
    path.write_text(content[: content.index('"21"')])  # killed in the middle of the last line
    assert art.stage(path, "x", ["a", "b", "c"], batches, per_id=2) == rows
    assert calls == [set(), {0, 1}] and sorted(path.read_text()) == sorted(content)
    art.stage(path, "x", ["a", "b", "c"], batches, per_id=2)
    assert len(calls) == 2


def test_control_characters_cannot_reach_the_terminal(capsys):
    art.show_record({"answer": "\x1b[2J\x07wiped\nnext\u202e"})
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", capsys.readouterr().out)


def test_truster_head_is_checked():
    base = art.load_scorer("data/toy/base", 4, 0)
    model = art.add_lora(base, art.TaskType.SEQ_CLS, 4)
    art.check_scorer(model)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trainable)
    assert all(model.get_parameter(name).dtype == torch.float32 for name in trainable)
    model.base_model.model.score.modules_to_save["default"].half()
    with pytest.raises(AssertionError):
        art.check_scorer(model)


def test_training_stops_at_nan():
    state, stop = transformers.TrainerState(), art.StopOnNonFinite().on_log
    settings = transformers.TrainingArguments(use_cpu=True)
    with pytest.raises(art.UserError, match="loss is nan at step 0"):
        stop(settings, state, None, logs={"loss": float("nan")})
    with pytest.raises(art.UserError, match="grad_norm is inf"):
        stop(settings, state, None, logs={"loss": 1.0, "grad_norm": float("inf")})
    stop(settings, state, None, logs={"loss": 1.0, "grad_norm": 3.0})


def test_examples_of_a_step_are_sorted():
    """Every example once an epoch, each time in another order; long ones lie together within a step, not across."""
    lengths = [(7 * i) % 40 for i in range(40)]

    def order(epoch):
        return list(art.SortedSteps(lengths, step=8, seed=0, epoch=lambda: epoch))

    epochs = [order(epoch) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    steps = [[lengths[i] for i in epochs[0][start : start + 8]] for start in range(0, 40, 8)]
    assert all(step == sorted(step, reverse=True) for step in steps)
    assert all(min(step) < 20 <= max(step) for step in steps)  # each step has short and long ones


def test_number_format_follows_the_card(monkeypatch):
    """fp32 without a card; fp16 on one that only emulates bf16, as a T4 does; bf16 on one that has it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert art.compute_dtype(4) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert art.compute_dtype(4) == torch.float16 and art.compute_dtype(32) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert art.compute_dtype(4) == torch.bfloat16


def test_long_examples_are_left_out_and_counted(capsys):
    examples = [{"prompt": [1] * n, "target": [1, 2]} for n in (3, 4, 5)]
    assert art.drop_long(examples, 6) == examples[:2] and "1 of 3 examples left out" in capsys.readouterr().out
    groups = [{"rows": [[1] * 3, [1] * n]} for n in (3, 9)]
    assert art.drop_long(groups, 6) == groups[:1] and art.drop_long(groups, 9) == groups
    with pytest.raises(art.UserError, match="--max-length 4"):
        art.drop_long(examples, 4)


def test_records_are_plain_json(tmp_path):
    text = "line\u2028separator, caf\u00e9, \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
    rows = [{"id": "a", "text": text}]
    art.write_jsonl(tmp_path / "a.jsonl", rows)
    assert art.read_jsonl(tmp_path / "a.jsonl") == rows == [json.loads((tmp_path / "a.jsonl").read_text("utf-8"))]
