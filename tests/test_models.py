"""The engine on the toy's base: generate, choose and score against plain forward passes of transformers."""

import math
import re
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file, save_file

import art

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana".split()
PREFIX = "".join(f"Question: {a} has {n} pens. How many pens?\nAnswer:\n{a} has {n} pens.\n#### {n}\n\n"
                 for n, a in enumerate(NAMES[:4], 3))


def prompts_of(n=6, prefix=""):
    """Prompts of different lengths."""
    people = [NAMES[i: i + 2] for i in range(n)]
    return [f"{prefix}Question: {a} picked {7 + i} pens. " + f"{b} picked {2 + i} more pens than {a}. " * (i % 3 + 1)
            + f"How many pens did {b} pick?\nAnswer:\n" for i, (a, b) in enumerate(people)]


@pytest.fixture
def lm(make_run):
    return make_run().model("llm")


def flat(made):
    return [one["text"] for several in made for one in several]


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["apart", "shared"])
def test_greedy_is_what_generate_writes(lm, prefix):
    """Text for text: neither the shared prefix nor padding nor rows that leave the batch change anything."""
    made = [one for (one,) in lm.generate(prompts_of(prefix=prefix), 60)]
    local = lm.backend
    assert (len(local.shared) >= 32) == bool(prefix) and (len({one["tokens"] for one in made}) > 1)
    for one, prompt in zip(made, prompts_of(prefix=prefix)):
        ids = torch.tensor([local.tokens(prompt)])
        with torch.inference_mode():
            out = local.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        assert one["text"] == local.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()
        assert one["prompt_tokens"] == ids.shape[1] and one["tokens"] == out.shape[1] - ids.shape[1]


def test_logprob_is_that_of_the_text(lm):
    prompt = prompts_of(1)[0]
    ((made,),) = lm.generate([prompt], 96)
    local, ids = lm.backend, lm.backend.tokens(prompt)
    new = local.tokens(made["text"]) + [local.tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = local.model(input_ids=torch.tensor([ids + new])).logits[0, len(ids) - 1: -1]
    assert made["stopped"] and made["tokens"] == len(new)
    assert made["logprob"] == pytest.approx(logits.log_softmax(-1)[range(len(new)), new].sum().item(), abs=1e-3)


def test_samples_do_not_depend_on_the_batch(make_run, tmp_path):
    """One batch, one question at a time in another order, other neighbours: the same samples, and they differ."""
    def draw(folder, prompts, k=3, **changes):
        lm = make_run(tmp_path / folder, **changes).model("llm")
        return lm.generate(prompts, 40, k=k, temperature=1.0), lm.asked

    prompts = prompts_of()
    together, alone = draw("a", prompts)[0], draw("b", prompts[::-1], kv_gib=1e-6)[0]
    assert flat(together) == flat(alone[::-1]) and flat(together[1:3]) == flat(draw("c", prompts[1:3])[0])
    assert len(set(flat(together))) > len(prompts) and flat(together) != flat(draw("d", prompts, sample_seed=1)[0])
    more, asked = draw("a", prompts, k=5)  # the first three stay, and all five are those that are drawn at once
    assert [several[:3] for several in more] == together and asked == 2 * len(prompts)
    assert flat(more) == flat(draw("e", prompts, k=5)[0])


def test_a_sample_is_drawn_by_inverse_cdf():
    """The first token whose cumulated probability exceeds the row's own uniform number; temperature sharpens."""
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(4, 3)
    rows = [{"random": SimpleNamespace(random=lambda u=u: u)} for u in (1e-9, 0.199, 0.201, 0.999)]
    assert art.Local.pick(None, logits, rows, 1.0).tolist() == [0, 0, 1, 2]
    assert art.Local.pick(None, logits, rows, 0.01).tolist() == [2, 2, 2, 2]
    assert art.Local.pick(None, logits, rows, 0.0).tolist() == [2, 2, 2, 2]


def test_stop_pattern(lm):
    """The text ends behind the first match, no more is written, and what never stops counts as cut off."""
    ((whole,),) = lm.generate(prompts_of(1), 60)
    ((made,),) = lm.generate(prompts_of(1), 60, stop=r"= \d+")
    assert made["text"] == whole["text"][: re.search(r"= \d+", whole["text"]).end()] and made["stopped"]
    assert made["tokens"] < whole["tokens"]
    ((cut,),) = lm.generate(prompts_of(1), 3)
    assert not cut["stopped"] and cut["tokens"] == 3


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["apart", "shared"])
def test_choose_is_a_plain_forward_pass(lm, prefix):
    """Yes against No at the token behind "Refine:", with prompts and answers of different lengths."""
    prompts, begun = prompts_of(4, prefix), ["Who?\nRefine:", "Refine:", "How many has Ann?\nBen?\nRefine:", "Refine:"]
    made = lm.choose(prompts, "Refine:", (" Yes", " No"), begun)
    local = lm.backend
    yes, no = (local.tokenizer(f"Refine:{word}", add_special_tokens=False)["input_ids"][-1] for word in (" Yes", " No"))
    for one, prompt, text in zip(made, prompts, begun):
        ids = local.tokens(prompt) + local.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = local.model(input_ids=torch.tensor([ids])).logits[0, -1, [yes, no]]
        assert one["p"] == pytest.approx(logits.softmax(0)[0].item(), abs=1e-5) and one["prompt_tokens"] == len(ids)
    assert len({round(one["p"], 6) for one in made}) > 1


def test_options_that_do_not_part_are_refused(lm):
    for options in ((" Yes", " Yes"), (" 1 2", " 1 3")):
        with pytest.raises(AssertionError):
            lm.choose(prompts_of(1), "Refine:", options)


def save_scorer(folder, seed=3):
    """An adapter of a scorer whose LoRA matrices and head are random."""
    model = art.add_lora(art.load_scorer(BASE, 32, seed), "SEQ_CLS", 4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)


def score(local, texts):
    """Scores of a backend in one batch."""
    (rows,) = local.answers({text: (text, [0]) for text in texts}, {"kind": "score"}, {(text, 0) for text in texts})
    return [rows[text, 0]["score"] for text in texts]


def test_score_is_a_plain_forward_pass(tmp_path):
    """Of transformers' sequence classifier, one text at a time: padding of any size changes nothing."""
    save_scorer(tmp_path)
    texts = [prompt * (i + 1) for i, prompt in enumerate(prompts_of(4))]
    made = score(art.Local(BASE, 32, 0.25, tmp_path, scorer=True), texts)
    plain = peft.PeftModel.from_pretrained(art.load_scorer(BASE, 32, seed=9), tmp_path).eval()
    for one, text in zip(made, texts):
        with torch.inference_mode():
            expected = plain(input_ids=torch.tensor([art.load_tokenizer(BASE)(text)["input_ids"]])).logits.item()
        assert one == pytest.approx(expected, abs=1e-4)


def test_head_of_the_scorer_computes_in_fp32(tmp_path):
    """On a base in 16 bits: scores of bf16 have 8 bits, in which many pairs would be equal."""
    save_scorer(tmp_path)
    local = art.Local(BASE, 16, 0.25, tmp_path, scorer=True)
    scores = torch.tensor(score(local, prompts_of()))
    assert local.machine == "cpu bfloat16" and local.base.score.weight.dtype == torch.float32
    assert (scores.bfloat16().float() != scores).any()


def test_a_prompt_that_is_too_long_has_failed(lm, capsys):
    """It counts as wrong, the others are answered, and the next start asks it again."""
    long, short = "How many pens? " * 300, prompts_of(1)[0]
    (bad,), (good,) = lm.generate([long, short], 20)
    assert bad["failed"] and not bad["stopped"] and good["tokens"] == 20 and "1 prompts are too long" in \
        capsys.readouterr().err
    assert len(lm.cache.outputs) == 1 and len(art.Cache(lm.cache.path).outputs) == 1
    lm.generate([long, short], 20)
    assert (lm.asked, lm.known) == (3, 1)


def test_numbers_that_are_not_finite_make_no_answer(make_run, tmp_path, capsys):
    """Neither a text nor a decision nor a score, and none is kept."""
    shutil.copytree(BASE, tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file({name: weight * math.nan for name, weight in weights.items()}, tmp_path / "base/model.safetensors",
              {"format": "pt"})
    lm = make_run(model=str(tmp_path / "base")).model("llm")
    rows = [one for (one,) in lm.generate(prompts_of(2), 5)] + lm.choose(prompts_of(2), "Refine:", (" Yes", " No"))
    save_scorer(tmp_path / "adapter")
    scorer = art.Local(str(tmp_path / "base"), 32, 0.25, tmp_path / "adapter", scorer=True)
    (scored,) = scorer.answers({"x": ("Text", [0])}, {"kind": "score"}, {("x", 0)})
    assert all(row["failed"] for row in [*rows, *scored.values()]) and not lm.cache.outputs
    assert "not finite" in capsys.readouterr().err


def test_number_format_follows_the_card(monkeypatch):
    """fp32 without a card; fp16 on one that only emulates bf16, as a T4 does; bf16 on one that has it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [art.compute_dtype(bits) for bits in (4, 16, 32)] == [torch.float32, torch.bfloat16, torch.float32]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert [art.compute_dtype(bits) for bits in (4, 16, 32)] == [torch.float16, torch.float16, torch.float32]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert art.compute_dtype(4) == torch.bfloat16
