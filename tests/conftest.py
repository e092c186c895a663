"""Fixtures: a finished toy run in tiny sizes, made by the kit's own scripts, and a fake model."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import settings

import art
import evaluate
import train_asker
import train_truster

# test_properties.py: a few inputs, always the same; 10,000 new ones with --hypothesis-profile=thorough
settings.register_profile("suite", max_examples=100, derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", max_examples=10_000, database=None, deadline=None)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "data/toy/base")
MAINS = {"sample": art.main, "subquestions": art.main, "solve": art.main, "train_asker": train_asker.main,
         "train_truster": train_truster.main, "evaluate": evaluate.main}
TINY = {"train_asker": ["--save-steps", "2"], "train_truster": ["--save-steps", "1"]}
PIPELINE = ("sample", "train_asker", "train_truster", "evaluate")


def load(path):
    """A fresh copy of a script as a module: both data/prepare.py and data/toy/prepare.py are named prepare."""
    spec = importlib.util.spec_from_file_location("loaded", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kit:
    """The scripts under `root`, on tiny toy data, with all runs in a folder of their own."""

    def __init__(self, folder, root=ROOT):
        self.folder, self.root, self.data, self.runs = folder, root, folder / "data", folder / "runs"

    def command(self, script, *flags):
        """[path of the script, flag, ...]"""
        name = ["art.py", script] if MAINS[script] is art.main else [f"{script}.py"]
        where = ["--data", self.data, "--runs", self.runs, *TINY.get(script, [])]
        return [str(word) for word in (self.root / name[0], *name[1:], *where, *flags)]

    def start(self, script, *flags):
        """The script as a process of its own."""
        return subprocess.Popen([sys.executable, *self.command(script, *flags)], stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.PIPE, cwd=self.root, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    def __call__(self, script, *flags, code=0):
        """The same, waited for; (stdout, stderr) of a process that has to end with this exit code."""
        process = self.start(script, *flags)
        out, err = process.communicate()
        assert process.returncode == code, err[-3000:]
        return out, err

    def here(self, monkeypatch, script, *flags):
        """The script in this process, which has imported what takes most of the time."""
        monkeypatch.setattr(sys, "argv", self.command(script, *flags))
        art.run(MAINS[script])

    def copy(self, folder, root=None):
        """A copy of the data and of the finished runs that a test may break."""
        shutil.copytree(self.folder, folder)
        return Kit(folder, root or self.root)

    def results(self, run="default"):
        """{row: what results.json says of it}."""
        return {row["row"]: row for row in json.loads((self.runs / "toy" / run / "results.json").read_text())["rows"]}

    def log(self):
        """The last line of log.jsonl."""
        return art.read_jsonl(self.runs / "toy/log.jsonl", "")[-1]


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """All five commands, run in their order; no test may change what they wrote."""
    kit = Kit(tmp_path_factory.mktemp("kit"))
    with pytest.MonkeyPatch.context() as patch:
        sizes = ["--train", "40", "--dev", "12", "--test", "12", "--out", str(kit.data / "toy")]
        patch.setattr(sys, "argv", ["prepare.py", *sizes])
        load("data/toy/prepare.py").main()
        for script in PIPELINE:
            kit.here(patch, script)
    return kit


@pytest.fixture
def copy(kit, tmp_path):
    """A copy of the finished run that a test may break."""
    return kit.copy(tmp_path / "kit")


@pytest.fixture
def make_run(tmp_path):
    """A function that gives an art.Run on the toy's base in 32 bits, its runs in a temporary folder."""
    def make(folder=tmp_path / "runs", **changes):
        args = Namespace(**{
            "task": "toy", "runs": Path(folder), "run": "default", "data": ROOT / "data", "model": BASE, "bits": 32,
            "base_url": None, "chat": "auto", "shots": 0, "strategy": "cot", "facts": "refine", "show_draft": "yes",
            "max_new_tokens": 48, "temperature": 0.7, "draft_temperature": 0.0, "sample_seed": 0, "kv_gib": 0.25,
            "seed": 0, "fresh": False, "concurrency": 8, "compute": "auto", **changes})
        return art.Run(args)
    return make


class FakeLM:
    """A model that answers each step by the last line of the prompt, and keeps every prompt that it was shown."""

    strategy, prior_odds, chat, exemplars = None, 1.0, False, ()
    texts = {"Answer:": "7 + 9 = 16\n#### 16", "Answer by sub-questions:": "How? 16\n#### 16",
             "Revised answer:": "7 + 5 = 12\n#### 12", "Sub-questions:": "1. How many has Ben?\n- How many together?\n"}

    def __init__(self, **changes):
        self.seen, self.p = [], 0.5
        vars(self).update(changes)

    def render(self, prompts, shots=(), instruction=""):
        return [art.plain_text(prompt, shots) for prompt in prompts]

    def generate(self, prompts, max_new_tokens, stop=None, k=1, temperature=0.0):
        self.seen += prompts
        return [[{"text": self.texts.get(prompt.splitlines()[-1], ""), "stopped": True, "tokens": 3,
                  "prompt_tokens": len(prompt), "logprob": -1.0}] * k for prompt in prompts]

    def choose(self, prompts, before, options, begun=None):
        self.seen += [prompt + text for prompt, text in zip(prompts, begun or [""] * len(prompts))]
        assert all(prompt.endswith(before) for prompt in self.seen[-len(prompts):])
        return [{"p": self.p, "prompt_tokens": 7} for _ in prompts]

    def score(self, texts):
        self.seen += texts
        return [{"score": float(len(text)), "prompt_tokens": 5} for text in texts]


def refused(monkeypatch, capsys, kit, script, *flags):
    """The one line by which a script refuses, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        kit.here(monkeypatch, script, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not line.startswith("warning")]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def edit(path, old, new):
    """Replace a piece of code or text that has to be there."""
    text = path.read_text("utf-8")
    assert text.count(old) >= 1, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new), "utf-8")


def asked_of(out):
    """{label: answers asked} from the lines `draft: 12 of 24 known, asking 12 ...`."""
    return {name: int(n.replace(",", "")) for name, n in re.findall(r"^(.+): [\d,]+ of .* known, asking ([\d,]+)",
                                                                     out, re.MULTILINE)}
