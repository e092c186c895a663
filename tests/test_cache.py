"""What a model said: known answers are not asked again, whatever happened to the file, and nothing false is known."""

import shutil
import subprocess
import sys

import pytest
from conftest import BASE
from safetensors.torch import load_file, save_file

import art


class Backend:
    """A model that answers with its own prompt, and counts what it was asked."""

    machine = "fake"

    def __init__(self, fail=()):
        self.asked, self.fail = [], fail

    def answers(self, items, settings, missing):
        for name, (prompt, numbers) in items.items():
            for number in (number for number in numbers if (name, number) in missing):
                self.asked.append(prompt)
                yield {(name, number): art.failed_output() if prompt in self.fail else {"text": f"{prompt} {number}"}}


def refuse():
    raise AssertionError("a model was loaded although everything is known")


@pytest.fixture
def model_of(make_run):
    """A function that gives a fresh art.Model on the same file, as the next start of a script has it."""
    def make(backend=None, **changes):
        return art.Model(make_run(**changes), "some/model", {"weights": "x"}, lambda: backend or refuse())
    return make


PROMPTS = ["one", "two", "three"]


def texts(made):
    return [[one["text"] for one in several] for several in made]


def test_known_answers_are_not_asked_again(model_of):
    first = model_of(backend := Backend()).generate(PROMPTS, 9, k=2)
    assert backend.asked == ["one", "one", "two", "two", "three", "three"]
    again = model_of()  # whose backend raises
    assert again.generate(PROMPTS, 9, k=2) == first and (again.known, again.asked) == (6, 0)
    assert again.generate(["three", "one", "one"], 9) == [first[2][:1], first[0][:1], first[0][:1]]  # in any order


@pytest.mark.parametrize("changes", [{"max_new_tokens": 8}, {"stop": "x"}, {"temperature": 0.5}])
def test_other_settings_are_asked_anew_and_named(model_of, capsys, changes):
    model_of(Backend()).generate(PROMPTS, 9)
    capsys.readouterr()
    backend = Backend()
    model_of(backend).generate(PROMPTS, **{"max_new_tokens": 9, **changes})
    out = capsys.readouterr().out
    assert len(backend.asked) == 3 and f"the same was asked with {next(iter(changes))} " in out
    assert "0 of 3 known, asking 3" in out


def test_a_prompt_is_the_text_and_how_the_answer_has_begun(model_of):
    model_of(Backend()).choose(PROMPTS, ":", ("A", "B"), ["x:"] * 3)
    model_of(backend := Backend()).choose(PROMPTS, ":", ("A", "B"), ["x:", "y:", "x:"])
    assert backend.asked == [["two", "y:"]]


DAMAGE = {  # what a kill or a bad disk may leave: the file's lines -> its bytes, and how many lines are unreadable
    "torn": (lambda lines: b"\n".join([*lines[:-1], lines[-1][:30]]), 1),
    "no line feed": (lambda lines: b"\n".join(lines), 0),
    "cut in the middle": (lambda lines: b"\n".join([lines[0], lines[1][:30], *lines[2:], b""]), 1),
    "junk bytes": (lambda lines: b"\n".join([lines[0], b"\xff\xfe\x80{", *lines[2:], b""]), 1),
    "nothing but NUL": (lambda lines: b"\n".join([*lines[:-1], b"\0" * 500]), 1),
    "other JSON": (lambda lines: b"\n".join([lines[0], b"[1]", b'{"id": "x"}', *lines[2:], b""]), 2),
    "settings lost": (lambda lines: b"\n".join([*lines[1:], b""]), 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unreadable_lines_are_skipped_and_asked_anew(model_of, capsys, damage):
    """Only what is missing is asked; and the next start knows everything."""
    first = model_of(Backend()).generate(PROMPTS, 9)
    path = model_of(Backend()).cache.path
    change, bad = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes().splitlines()))
    capsys.readouterr()
    again = model_of(backend := Backend())
    assert (f"{bad} unreadable lines skipped" in capsys.readouterr().err) == bool(bad)
    assert texts(again.generate(PROMPTS, 9)) == texts(first) and len(backend.asked) == min(bad, 1)
    assert texts(model_of().generate(PROMPTS, 9)) == texts(first)


def test_a_failed_answer_is_not_kept(model_of):
    made = model_of(Backend(fail=["two"])).generate(PROMPTS, 9)
    assert [one["failed"] for (one,) in made if "failed" in one] == [True]
    assert model_of(backend := Backend()).generate(PROMPTS, 9)[1][0]["text"] == "two 0" and backend.asked == ["two"]


def test_a_batch_that_is_not_whole_is_computed_whole(model_of):
    """So that a killed run makes the batches of one that was not: rounding depends on the neighbours."""
    class Batches(Backend):
        def answers(self, items, settings, missing):
            self.asked.append([prompt for prompt, _ in items.values()])
            yield {(name, 0): {"text": f"{prompt} 0"} for name, (prompt, _) in items.items()}

    model_of(Batches()).generate(PROMPTS, 9)
    path = model_of(Batches()).cache.path
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    model_of(backend := Batches()).generate(PROMPTS, 9)
    assert backend.asked == [PROMPTS]
    model_of(backend := Batches()).generate([*PROMPTS, "four"], 9)  # another question: what is known stays out of it
    assert backend.asked == [["four"]]


def test_fresh_asks_anew(model_of):
    model_of(Backend()).generate(PROMPTS, 9)
    fresh = model_of(backend := Backend(), fresh=True)
    fresh.generate(PROMPTS, 9)
    fresh.generate(PROMPTS, 9)  # once
    assert backend.asked == PROMPTS
    assert model_of().generate(PROMPTS, 9)


def test_a_second_process_is_refused(model_of):
    """In words, and without a change to the file; afterwards it goes on."""
    model_of(Backend()).generate(PROMPTS, 9)
    model = model_of(Backend())
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('held', flush=True)\n    input()"
    holder = subprocess.Popen([sys.executable, "-c", code, f"{model.cache.path}.lock"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    before = model.cache.path.read_bytes()
    with pytest.raises(art.UserError, match="another process is writing .*jsonl"):
        model.generate(["four"], 9)
    model_of().generate(PROMPTS, 9)  # who only reads is not refused
    assert model.cache.path.read_bytes() == before
    holder.communicate("\n")
    model.generate(["four"], 9)


def base_at(folder, change):
    """The toy's base in a folder of its own, its weights multiplied."""
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * change for name, weight in weights.items()}, folder / "model.safetensors",
              {"format": "pt"})
    return str(folder)


def test_weights_tell_models_apart(make_run, tmp_path):
    """The same name and path, other weights: asked anew. The old weights again, or another path and name: known."""
    def ask(folder, change):
        lm = make_run(model=base_at(tmp_path / folder, change)).model("llm")
        lm.generate(PROMPTS, 3)
        return lm.asked

    cases = [("base", 1.0), ("base", 0.5), ("base", 0.5), ("base", 1.0), ("elsewhere/base", 1.0), ("elsewhere/b", 1.0)]
    assert [ask(*case) for case in cases] == [3, 3, 0, 0, 0, 0]


def test_last_line_of_a_log_is_that_of_the_start(kit):
    """log.jsonl: command, versions, seconds, what was asked and known, memory."""
    row = kit.log()
    assert row["command"].startswith("evaluate.py --data") and row["asked"].keys() == {"llm", "asker", "truster"}
    assert row["asked"]["llm"] > 0 and row["known"]["asker"] > 0 and row["seconds"] > 0 and row["torch"]
    assert len(art.read_jsonl(kit.runs / "toy/log.jsonl", "")) == 4  # a line a start
