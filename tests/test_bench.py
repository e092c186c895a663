"""The benchmark's own code: its contestants do the same work, and random models of a shape train and generate."""

import argparse
import functools
import re
import weakref

import bench
import pytest
import torch
import transformers
from test_steps import prompts_of, run

import art


def test_plain_generate_does_the_same(lm, monkeypatch):
    prompts, stop = prompts_of(lm, 4), art.answer_stop("toy", False)
    settings = [{"stop": stop, "max_new_tokens": 48},
                {"stop": re.compile("####.*\\n"), "options": ([5, 6], False), "max_new_tokens": 48},
                {"options": ([5, 6], True), "max_new_tokens": 1}]
    kit = [run(lm, prompts, **how) for how in settings]
    monkeypatch.setattr(art.LM, "_generate", bench.plain_generate)
    plain = [run(lm, prompts, **how) for how in settings]
    for ours, theirs in zip(kit, plain):
        assert [ours[i][0]["text"] for i in range(4)] == [theirs[i][0]["text"] for i in range(4)]
    for made in zip(kit[1:], plain[1:]):
        ours, theirs = ([one[i][0]["logit"] for i in range(4)] for one in made)
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert len(run(lm, prompts, k=3, temperature=1.0, max_new_tokens=4)[0]) == 3


def test_continuous_batching_does_the_same(monkeypatch):
    lm = art.LM("data/toy/base", 32)
    prompts, stop = prompts_of(lm, 3), art.answer_stop("toy", False)
    kit = run(lm, prompts, stop=stop, max_new_tokens=48)
    lm.model.set_attn_implementation("sdpa")
    monkeypatch.setattr(art.LM, "generate", bench.generate_batch)
    few = transformers.ContinuousBatchingConfig(num_blocks=16)  # else the cache fills most of the memory
    monkeypatch.setattr(lm.model, "generate_batch", functools.partial(lm.model.generate_batch,
                                                                      continuous_batching_config=few))
    made = run(lm, prompts, stop=stop, max_new_tokens=48)
    assert [kit[i][0]["text"] for i in range(3)] == [made[i][0]["text"] for i in range(3)]


@pytest.mark.parametrize("table, name", [("asker", "kit"), ("asker", "plain Trainer"), ("truster", "kit")])
def test_training_turns(kit, monkeypatch, table, name):
    """A turn of a contestant trains on the examples and says what it measured."""
    monkeypatch.setattr(transformers.Trainer, "train", transformers.Trainer.train)  # put back afterwards
    monkeypatch.setattr(art, "LossTrainer", art.LossTrainer)
    sizes = {"table": table, "asker_model": "data/toy/base", "truster_model": "data/toy/base", "task": "toy",
             "data": kit.data, "limit": 4, "k": 2, "bits": 4, "batch_size": 2, "accumulate": 1, "rank": 4, "lr": 1e-3,
             "seed": 0, "save_steps": 9, "report_to": "none", "max_length": 512}
    made = bench.train_turn(argparse.Namespace(**sizes), name)
    assert made["seconds"] > 0 and made["operations"] > 0 and made["note"].startswith(("2 steps", "1 steps"))


def test_random_model_of_a_shape(monkeypatch):
    """Built through the kit's own 4-bit loading, one weight in memory at a time; all four pieces run."""
    monkeypatch.setattr(art, "load_base", art.load_base)  # put back afterwards
    made, alive, make = [], [], bench.RandomWeight.__getitem__

    def counted(self, where):
        weight = make(self, where)
        if self.shape in [(192, 64), (64, 192)]:
            made.append(weakref.ref(weight))
            alive.append(sum(one() is not None for one in made))
        return weight

    monkeypatch.setattr(bench.RandomWeight, "__getitem__", counted)
    model = bench.load_random("tiny")("data/toy/base", 4)
    assert len(made) == 6 and max(alive) == 1
    assert type(model.model.layers[1].mlp.up_proj).__name__ == "Linear4bit" and model.lm_head.weight.std() > 0
    sizes = {"shape": "tiny", "bits": 4, "preset": "toy", "batch_size": 2, "accumulate": 1, "max_length": 32, "k": 2,
             "max_new_tokens": 4, "batch_tokens": 64, "rank": 4, "lr": 1e-3, "seed": 0, "save_steps": 9,
             "truster_shape": "tiny"}
    for name in ("asker", "truster", "generate", "solve"):
        result = bench.fit_turn(argparse.Namespace(**sizes, report_to="none"), name)
        assert result["rate"] > 0 and result["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "fit", "--shape", "13b", "--memory", "16"])
    bench.main()
    assert capsys.readouterr().out == "no GPU is present: whether it fits is not measured\n"
