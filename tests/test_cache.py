"""What is cached is not generated again; what an edit or other weights change is."""

import multiprocessing
import os
import shutil
import signal
import sys
import time

import pytest
from conftest import BASE, ROOT, args_of, asked_of, edit, load

import art

PROMPTS = ["one", "two", "three"]


class Fake(art.Model):
    """A model that answers with the prompt, one at a time, and keeps what it was asked."""

    def __init__(self, folder, weights="x", seed=0):
        super().__init__(args_of(folder, sample_seed=seed), {"weights": weights}, chat=False)
        self.computed = []

    def compute(self, missing, settings):
        for key, (prompt, _, number) in missing.items():
            self.computed.append(prompt)
            yield {key: {"text": f"{prompt} {number}"}}


def test_cached_outputs_are_not_generated_again(tmp_path):
    first = Fake(tmp_path).generate(PROMPTS, 9, numbers=[0, 1])
    assert first[0] == [{"failed": "", "text": "one 0"}, {"failed": "", "text": "one 1"}]
    again = Fake(tmp_path, seed=1)  # greedy texts do not depend on the seed
    assert again.generate(["three", "one"] * 2, 9, numbers=[1]) == [first[2][1:], first[0][1:]] * 2
    assert again.generate(["new", "one"], 9, numbers=range(3))[1][2]["text"] == "one 2"
    assert again.computed == ["new"] * 3 + ["one"]


def test_other_weights_and_settings_are_generated(tmp_path):
    settings = {"max_new_tokens": 9, "temperature": 1.0}
    Fake(tmp_path).generate(PROMPTS, **settings)
    for own, changes in (({"weights": "y"}, {}), ({"seed": 1}, {}), ({}, {"max_new_tokens": 8}),
                         ({}, {"stop": "x"}), ({}, {"temperature": 0.5})):
        (model := Fake(tmp_path, **own)).generate(PROMPTS, **settings | changes)
        assert model.computed == PROMPTS
    Fake(tmp_path).choose(PROMPTS, ["x:"] * 3, ("A", "B"))
    model.choose(PROMPTS, ["x:", "y:", "x:"], ("A", "B"))  # how the answers have begun
    assert model.computed == [*PROMPTS, "two"]


class Dying(Fake):
    """It generates after two have looked, and is killed in the transaction of the fifth output."""

    def cached(self, keys):
        outputs, folder = super().cached(keys), self.args.shared
        (folder / f"{os.getpid()}.looked").touch()
        while len([*folder.glob("*.looked")]) < 2:
            time.sleep(0.01)
        return outputs

    def compute(self, missing, settings):
        for batch in super().compute(missing, settings):
            time.sleep(0.1)
            yield batch
            if len(self.computed) == 4:
                self.cache.execute("INSERT INTO answers VALUES ('torn', 'torn')")
                os.kill(os.getpid(), signal.SIGKILL)


def generate_or_die(folder):
    Dying(folder).generate(PROMPTS, 9, numbers=[0, 1])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_one_of_two_processes_is_killed(tmp_path, capfd):
    """SQLite rolls back what was not complete. The other has waited and generates the rest."""
    new = multiprocessing.get_context("spawn").Process
    both = [new(target=generate_or_die, args=[tmp_path]) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) == [-9, 0]
    assert capfd.readouterr().out.count("waiting for another process that uses this folder") == 1
    (model := Fake(tmp_path)).generate(PROMPTS, 9, numbers=[0, 1])
    keys = model.cache.execute("SELECT key FROM answers").fetchall()
    assert not model.computed and len(keys) == 6 and ("torn",) not in keys


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
    ("return logits.argmax(-1)", "return (+logits).argmax(-1)", ["predict", "ask"]),  # of Local
    ("- 1).clamp(min=0)", "- 1).clamp(min=+0)", ["predict", "ask"]),  # of a function
    ("{draft}\\nSub-questions:\\n", "{draft}\\nAsk:\\n", ["ask"]),
    ("return logits.argmax(-1)", "return logits.argmax(-1)  # a comment", []),
    ('"""The next token of each row', '"""A docstring', []),
], ids="method function prompt comment docstring".split())
def test_an_edit_is_seen(tmp_path, capsys, old, new, steps):
    """Only what it may change is generated again."""
    assert generated(art, tmp_path, capsys) == {"predict": 1, "ask": 1}
    assert generated(art, tmp_path, capsys) == {}
    shutil.copy(ROOT / "art.py", tmp_path)
    edit(tmp_path / "art.py", old, new)
    assert list(generated(load(tmp_path / "art.py"), tmp_path, capsys)) == steps


def test_weights_tell_models_apart(tmp_path):
    """The content counts, not the place and the date; a large file is read at many places."""
    folder, ids = shutil.copytree(BASE, tmp_path / "base"), set()
    assert art.weights_id(folder) == art.weights_id(BASE)
    for at in (0, 70_000_000, 10**8):
        (folder / "model.safetensors").write_bytes(bytes(at) + b"x" * 2**21 + bytes(10**8 - at))
        ids.add(art.weights_id(folder))
    assert len(ids) == 3
