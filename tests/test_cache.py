"""What is cached is not generated again; what an edit or other weights change is."""

import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import BASE, ROOT, args_of, asked_of, edit, load
from safetensors.torch import load_file, save_file

import art

PROMPTS = ["one", "two", "three"]


class Fake(art.Model):
    """A model that answers with the prompt, one at a time, and keeps what it was asked."""

    def __init__(self, folder, weights="x", fails="", seed=0):
        super().__init__(args_of(folder, sample_seed=seed), {"weights": weights}, chat=False)
        self.computed, self.fails = [], fails

    def compute(self, missing, settings):
        for key, (prompt, _, number) in missing.items():
            self.computed.append(prompt)
            failed = {"failed": "why"} if prompt == self.fails else {}
            yield {key: {"text": f"{prompt} {number}", **failed}}


def test_cached_outputs_are_not_generated_again(tmp_path):
    first = Fake(tmp_path).generate(PROMPTS, 9, numbers=[0, 1])
    assert first[0] == [{"failed": "", "text": "one 0"}, {"failed": "", "text": "one 1"}]
    again = Fake(tmp_path, seed=1)  # greedy texts do not depend on the seed
    assert again.generate(PROMPTS, 9, numbers=[0, 1]) == first and not again.computed
    assert again.generate(["three", "one"] * 2, 9, numbers=[1]) == [first[2][1:], first[0][1:]] * 2
    assert again.generate(["new", "one"], 9, numbers=range(3))[1][2]["text"] == "one 2"
    assert again.computed == ["new"] * 3 + ["one"]


def test_other_weights_and_settings_are_generated(tmp_path, capsys):
    settings = {"max_new_tokens": 9, "temperature": 1.0}
    Fake(tmp_path).generate(PROMPTS, **settings)
    for own, changes in (({"weights": "y"}, {}), ({"seed": 1}, {}), ({}, {"max_new_tokens": 8}),
                         ({}, {"stop": "x"}), ({}, {"temperature": 0.5})):
        (model := Fake(tmp_path, **own)).generate(PROMPTS, **settings | changes)
        assert model.computed == PROMPTS
    assert capsys.readouterr().out.count("0 of 3 cached, generating 3") == 6
    Fake(tmp_path).choose(PROMPTS, ["x:"] * 3, ("A", "B"))
    model.choose(PROMPTS, ["x:", "y:", "x:"], ("A", "B"))  # how the answers have begun
    assert model.computed == [*PROMPTS, "two"]


def test_failed_outputs_are_not_cached(tmp_path):
    assert Fake(tmp_path, fails="two").generate(PROMPTS, 9)[1][0]["failed"] == "why"
    model = Fake(tmp_path)
    assert model.generate(PROMPTS, 9)[1][0]["failed"] == "" and model.computed == ["two"]


def test_two_at_once_generate_nothing_twice(tmp_path, capsys):
    """The second waits until the first has ended, and says so."""
    def work():
        second.append(Fake(tmp_path))
        second[0].generate(PROMPTS, 9)

    first, second, thread = Fake(tmp_path), [], threading.Thread(target=work)
    compute = first.compute

    def slow(*args):
        thread.start()
        while "waiting for another process" not in capsys.readouterr().out:
            time.sleep(0.01)
        return compute(*args)

    first.compute = slow
    first.generate(PROMPTS, 9)
    assert thread.join() is None and not second[0].computed


PROCESS = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from test_cache import *
class Dying(Fake):
    def compute(self, missing, settings):
        for batch in super().compute(missing, settings):
            yield batch
            if len(self.computed) == int(sys.argv[4]):  # in the transaction of the next output
                self.cache.execute("INSERT INTO answers VALUES ('torn', 'torn')")
                os.kill(os.getpid(), signal.SIGKILL)
Dying(sys.argv[3]).generate(PROMPTS, 9, numbers=[0, 1])
"""


def start(folder, dies_at):
    words = map(str, [PROCESS, ROOT, ROOT / "tests", folder, dies_at])
    return subprocess.Popen([sys.executable, "-c", *words])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_in_a_transaction(tmp_path):
    """SQLite rolls back what was not complete."""
    assert start(tmp_path, 4).wait() == -9
    (model := Fake(tmp_path)).generate(PROMPTS, 9, numbers=[0, 1])
    assert model.computed == ["three"] * 2
    assert not model.cache.execute("SELECT * FROM answers WHERE key = 'torn'").fetchall()


def test_two_processes_share_a_folder(tmp_path):
    assert [process.wait() for process in [start(tmp_path, -1), start(tmp_path, -1)]] == [0, 0]
    (model := Fake(tmp_path)).generate(PROMPTS, 9, numbers=[0, 1])
    assert not model.computed
    assert model.cache.execute("SELECT count(*) FROM answers").fetchone() == (6,)


def generated(module, folder, capsys):
    """{step: number of outputs that had to be generated}, by a copy of art.py."""
    args, record = args_of(folder, max_new_tokens=2), {"id": "a", "question": "How many pens?"}
    lm = module.open_model(args, "llm")
    lm.label = "predict"
    drafts = module.predict(lm, args, [record])
    lm.label = "ask"
    module.ask(lm, args, [record], drafts)
    return asked_of(capsys.readouterr().out)


@pytest.mark.parametrize(("old", "new", "steps"), [
    ('mask = inputs["attention_mask"]', 'mask = +inputs["attention_mask"]', ["predict", "ask"]),
    ("return logits.argmax(-1)", "return (+logits).argmax(-1)", ["predict", "ask"]),  # pick
    ("logits = out.logits[:, -1, [", "logits = +out.logits[:, -1, [", ["predict", "ask"]),
    ("- 1).clamp(min=0)", "- 1).clamp(min=+0)", ["predict", "ask"]),  # positions
    ("{draft}\\nSub-questions:\\n", "{draft}\\nAsk:\\n", ["ask"]),  # a prompt
    ("return logits.argmax(-1)", "return logits.argmax(-1)  # a comment", []),
    ('"""The next token of each row', '"""A docstring', []),
], ids=["write", "pick", "decide", "positions", "prompt", "comment", "docstring"])
def test_an_edit_is_seen(tmp_path, capsys, old, new, steps):
    """Only what it may change is generated again."""
    assert generated(art, tmp_path, capsys) == {"predict": 1, "ask": 1}
    assert generated(art, tmp_path, capsys) == {}
    shutil.copy(ROOT / "art.py", tmp_path)
    edit(tmp_path / "art.py", old, new)
    assert list(generated(load(tmp_path / "art.py"), tmp_path, capsys)) == steps


def test_weights_tell_models_apart(tmp_path):
    """Equal files at another path are the same model."""
    shutil.copytree(BASE, tmp_path / "base")
    assert art.weights_id(str(tmp_path / "base")) == art.weights_id(BASE)
    path = tmp_path / "base/model.safetensors"
    save_file({name: weight * 0.5 for name, weight in load_file(path).items()}, path)
    assert art.weights_id(str(tmp_path / "base")) != art.weights_id(BASE)
