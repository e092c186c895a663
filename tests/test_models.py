"""A local model against transformers, on the toy's base; what chat templates and tokenizers do."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, load
from safetensors.torch import load_file, save_file

import art

NAMES = "Ann Ben Cleo Dan Eve Finn".split()
PROMPTS = [  # of different lengths
    f"Question: {a} picked {7 + i} pens. {f'{b} picked {2 + i} more than {a}. ' * (i % 3 + 1)}"
    f"How many pens did {b} pick?\nAnswer:\n" for i, (a, b) in enumerate(zip(NAMES, NAMES[1:]))]


@pytest.fixture
def changed(make_run, tmp_path):
    """A function that gives the toy's base with a chat template, other weights or JSON files."""
    def make(template="", factor=1.0, **files):
        folder = tmp_path / "base"
        shutil.copytree(BASE, folder)
        (folder / "chat_template.jinja").write_text(template, "utf-8")
        path = folder / "model.safetensors"
        save_file({name: factor * weight for name, weight in load_file(path).items()}, path)
        for name, changes in files.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
        art.load_tokenizer.cache_clear()
        return make_run(model=str(folder))
    return make


def test_greedy_text_equals_that_of_transformers(make_run, monkeypatch):
    """Neither the padding nor rows that leave the batch change a text."""
    lm, widths, pick = make_run(), [], art.Local.pick
    monkeypatch.setattr(art.Local, "pick", lambda self, logits, rows, temperature: (
        widths.append(len(rows)), pick(self, logits, rows, temperature))[1])
    outputs = [output for [output] in lm.generate(PROMPTS, 60)]
    assert len({output["tokens"] for output in outputs}) > 1 and widths[0] == len(PROMPTS)
    assert sum(widths) == sum(output["tokens"] for output in outputs)  # finished rows leave
    for output, prompt in zip(outputs, PROMPTS):
        ids = torch.tensor([lm.tokens(prompt, "")[0]])
        with torch.inference_mode():
            new = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60,
                                    do_sample=False)[:, ids.shape[1]:]
            logits = lm.model(input_ids=torch.cat([ids, new], 1)).logits[0, ids.shape[1] - 1: -1]
        assert output["text"] == lm.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        assert output["finished"] == (new[0, -1] == lm.tokenizer.eos_token_id)
        assert (output["prompt_tokens"], output["tokens"]) == (ids.shape[1], new.shape[1])
        logprob = logits.log_softmax(-1).gather(1, new.T).sum().item()
        assert output["logprob"] == pytest.approx(logprob, abs=1e-3)


def test_a_model_of_the_hub_is_identified_by_its_commit(tmp_path):
    folder, commit = tmp_path / "models--own--tiny", 40 * "a"
    shutil.copytree(BASE, folder / "snapshots" / commit)
    art.write(folder / "refs/main", commit)
    code = "import art; print(art.weights_id('own/tiny'), len(art.load_tokenizer('own/tiny')))"
    made = subprocess.run([sys.executable, "-c", code], cwd=art.ROOT, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert made.stdout == f"{commit} 600\n", made.stderr


def test_samples_depend_on_seed_prompt_and_number_alone(make_run, tmp_path):
    def draw(folder, prompts, numbers=(0, 1), **changes):
        lm = make_run(tmp_path / folder, **changes)
        samples = lm.generate(prompts, 25, None, numbers, temperature=1.0)
        return [[one["text"] for one in own] for own in samples]

    together = draw("a", PROMPTS)
    assert together == draw("b", PROMPTS[::-1], kv_gib=1e-6)[::-1]  # one row in a batch
    assert draw("c", PROMPTS[1:3], [1]) == [own[1:] for own in together[1:3]]
    assert together != draw("d", PROMPTS, sample_seed=1)
    assert len({text for own in together for text in own}) > len(PROMPTS)


def test_a_sample_is_drawn_by_inverse_cdf():
    """The first token whose cumulated probability exceeds the row's own random number."""
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(4, 3)
    rows = [{"random": SimpleNamespace(random=lambda u=u: u)} for u in (1e-9, 0.199, 0.201, 0.999)]
    assert art.Local.pick(None, logits, rows, 1.0).tolist() == [0, 0, 1, 2]
    for cold in (0.01, 0.0):
        assert art.Local.pick(None, logits, rows, cold).tolist() == [2, 2, 2, 2]


LIST = [f"Who is {name}?\n" for name in "ABCDEFGHIJ"]
ANSWER = art.ANSWER_LINE["number"] + r"[^\n]*\n|\n\n"


@pytest.mark.parametrize(("start", "stop", "written", "more", "text"), [
    ("", art.ASK_STOP, "".join(LIST[:8]), "".join(LIST[8:]), "".join(LIST[:8]).strip()),
    ("", art.ASK_STOP, "A?\nRefine:", " Yes", "A?\nRefine:"),
    ("", ANSWER, "<think>\n\n#### 7\n</think>It is 5.\n#### 5\n", "6", "It is 5.\n#### 5"),
    ("<think>\n", ANSWER, "7?\n\n#### 7\n</think>\n#### 5\n", "6", "#### 5"),
    ("<think>", ANSWER, "7?\n\n#### 7\n", "", ""),  # never ends its thought
    ("", ANSWER, "2 + 3 =", "", "2 + 3 ="),
], ids="eight decision thought begun_thought open_thought cut_off".split())
def test_where_a_text_stops(changed, monkeypatch, start, stop, written, more, text):
    """Nothing is generated after it. A thought neither stops the text nor is part of it."""
    lm = changed("{{ messages[0].content }}\nAnswer:\n" + start)
    ids, rest = (art.token_ids(lm.tokenizer, part) for part in (written, more))
    monkeypatch.setattr(art.Local, "pick", lambda self, logits, rows, temperature: torch.tensor(
        [[*ids, *rest][len(row["ids"])] for row in rows]))
    [[output]] = lm.generate(["B?"], len(ids + rest), stop)
    assert (output["text"], output["finished"]) == (text, bool(more))
    assert output["tokens"] == len(ids)


def test_a_chat_template_has_a_fixed_date(changed):
    """Else all outputs would be generated again the next day. Thinking is switched off."""
    lm = changed("{{ strftime_now('%d %b %Y') }}, {{ date_string }}, {{ enable_thinking }}: "
                 "{{ messages[0].content }}")
    assert lm.tokenizer.decode(lm.tokens("B?", "")[0]) == "26 Jul 2024, 26 Jul 2024, False: B?"


def test_an_end_of_text_that_is_appended_to_every_text_is_dropped(changed, make_run):
    text, eos = {"Sequence": {"id": "A", "type_id": 0}}, {"id": "<eos>", "type_id": 0}
    other = changed(tokenizer={"post_processor": {
        "type": "TemplateProcessing", "single": [text, {"SpecialToken": eos}], "pair": [],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}}})
    assert other.tokenizer("Who?")["input_ids"][-1] == other.tokenizer.eos_token_id
    assert other.tokens("Who?", "Ann\n") == make_run().tokens("Who?", "Ann\n")


@pytest.mark.parametrize(("changes", "prompt", "options", "said"), [
    ({"template": "{{ raise_exception('') }}"}, "B?", None, "the chat template of .* failed"),
    ({"template": "{% if %}"}, "B?", None, "the chat template of .* failed"),
    ({"tokenizer_config": {"eos_token": None}}, "B?", None, "has no end-of-text token"),
    ({"factor": math.nan}, "B?", None, "not finite"),
    ({}, "How many? " * 500, None, "tokens, but .* reads 1024: lower --max-new-tokens"),
    *(({}, "B?", two, "one token each") for two in (
        (" Yes", " Yes"), (" 1 2", " 1 3"), (" Yes", " No 1")))])
def test_what_a_model_cannot_do_is_one_line(changed, make_run, changes, prompt, options, said):
    """Nothing is cached."""
    with pytest.raises(art.UserError, match=said):
        lm = changed(**changes)
        lm.choose([prompt], [""], options) if options else lm.generate([prompt], 20)
    assert make_run().cache.execute("SELECT count(*) FROM answers").fetchone() == (0,)


def test_a_killed_run_is_resumed_in_the_same_batches(make_run, tmp_path, monkeypatch):
    """The longest prompts come first. (Rounding depends on the neighbours in a batch.)"""
    batches, outputs, dies, write = [], [], iter([0, 0, 1]), art.Local.write

    def write_or_die(self, rows, settings):
        if next(dies, 0):
            raise KeyboardInterrupt
        batches.append([(len(row["prompt"]), row["key"]) for row in rows])
        return write(self, rows, settings)

    monkeypatch.setattr(art.Local, "write", write_or_die)
    for folder in ("killed", "killed", "whole"):
        with contextlib.suppress(KeyboardInterrupt):
            lm = make_run(tmp_path / folder, kv_gib=0.001)
            outputs.append(lm.generate(PROMPTS, 20, None, [0, 1], 1.0))
    n, [resumed, whole] = len(batches) // 2, outputs
    assert n > 3 and batches[:n] == batches[n:] and resumed == whole
    lengths = [length for batch in batches[:n] for length, _ in batch]
    assert lengths == sorted(lengths, reverse=True)


architectures = load("docs/measure/architectures.py")


@pytest.mark.parametrize("job", [
    *((architectures.compare, name) for name in ("gemma3_text", "qwen3_5_text", "granite", "gpt_oss")),
    *((architectures.train, "llama", role, 32) for role in ("Asker", "Truster"))])
def test_architectures(job, capsys):
    """Window, hybrid, scaled logits, experts: as transformers. A saved adapter is reloaded."""
    equal = architectures.measure(*job)
    row = capsys.readouterr().out
    assert equal and ("6 of 6 equal" in row or "reloaded off by 0e+00" in row), row
