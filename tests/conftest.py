"""Fixtures: a finished run on the toy in tiny sizes, made by the scripts, and a fake model."""

import importlib.util
import os
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import settings

import art

settings.register_profile("suite", derandomize=True, database=None, deadline=None)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "data/toy/base")
sys.path += [str(ROOT / "data"), str(ROOT / "docs/exercises")]  # sample.py, check.py
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # tiny models: threads only wait
PATHS = {"sample": "data/sample.py", "solve": "art.py"}  # of the scripts that are not SCRIPT.py


def load(path):
    """A fresh copy of a script as a module. (Two scripts are named prepare.py.)"""
    spec = importlib.util.spec_from_file_location("loaded", ROOT / path)
    module = sys.modules["loaded"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kit:
    """The scripts, with the data and all runs in a folder of their own."""

    def __init__(self, folder, monkeypatch, capsys=None):
        self.folder, self.data, self.runs = folder, folder / "data", folder / "runs"
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def command(self, script, *flags):
        """[path of the script, flag, ...]"""
        path = ROOT / PATHS.get(script, f"{script}.py")
        return [str(word) for word in (path, "--data", self.data, "--runs", self.runs, *flags)]

    def __call__(self, script, *flags):
        """Run the script in this process, which has loaded the slow libraries."""
        command = self.command(script, *flags)
        self.monkeypatch.setattr(sys, "argv", command)
        art.run(importlib.import_module(Path(command[0]).stem).main)

    def refused(self, script, *flags):
        """The one line by which the script refuses, with exit code 2."""
        self.printed()
        with pytest.raises(SystemExit) as end:
            self(script, *flags)
        lines = [line for line in self.capsys.readouterr().err.splitlines() if line.strip()]
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    def printed(self):
        """What was printed since the last look."""
        return self.capsys.readouterr().out

    def results(self, run="default"):
        """{row: its figures in results.json}."""
        rows = art.read_json(self.runs / "toy" / run / "results.json")["rows"]
        return {row["row"]: row for row in rows}


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """The whole pipeline, run once. No test may change what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        kit = Kit(tmp_path_factory.mktemp("kit"), patch)
        sizes = ["--train", "40", "--dev", "12", "--test", "12", "--out", str(kit.data / "toy")]
        patch.setattr(sys, "argv", ["prepare.py", *sizes])
        load("data/toy/prepare.py").main()
        for script in ("sample", "train_asker", "train_truster", "evaluate"):
            kit(script)
    return kit


@pytest.fixture
def copy(kit, tmp_path, monkeypatch, capsys):
    """A copy of the data and of the finished runs, which a test may change."""
    shutil.copytree(kit.folder, tmp_path / "kit")
    return Kit(tmp_path / "kit", monkeypatch, capsys)


def args_of(folder, **changes):
    """All flags of the scripts: those of the toy, in 32 bits, with all runs in `folder`."""
    runs, bases = Path(folder), dict.fromkeys(("model", "asker_model", "truster_model"), BASE)
    return Namespace(**{
        **art.DEFAULTS, **art.PRESETS["toy"], **bases, "task": "toy", "preset": "toy", "runs": runs,
        "shared": runs / "toy", "folder": runs / "toy/default", "run": "default", "seed": 0,
        "data": ROOT / "data", "limit": None, "limit_train": None, "bits": 32, "adapter_bits": 32,
        "show_draft": "yes", "max_new_tokens": 48, "draft_temperature": 0.0, "concurrency": 8,
        "rank": 16, "save_steps": 25, "report_to": None, "overwrite": False, **changes})


@pytest.fixture
def make_run(tmp_path):
    """A function that opens the LLM: the toy's base, with its cache in a temporary folder."""
    return lambda folder=tmp_path, **changes: art.open_model(args_of(folder, **changes), "llm")


class FakeLM:
    """A model that answers by the last line of the prompt, and keeps what it was asked."""

    strategy, prior_odds, chat, label = None, 1.0, False, ""
    texts = {"Answer:": "7 + 9 = 16\n#### 16", "Answer by sub-questions:": "How? 16\n#### 16",
             "Revised answer:": "7 + 5 = 12\n#### 12",
             "Sub-questions:": "1. How many has Ben?\n- How many together?\n"}

    def __init__(self, **changes):
        vars(self).update({"seen": [], "asked": [], "p": 0.5, "failed": "", **changes})

    def generate(self, prompts, max_new_tokens, stop=None, numbers=(0,), temperature=0.0):
        self.seen += prompts
        self.asked.append((max_new_tokens, stop, [*numbers], temperature))
        usage = {"finished": True, "tokens": 3, "logprob": -1.0, "failed": ""}
        return [[{**usage, "text": self.texts.get(prompt.splitlines()[-1], ""),
                  "prompt_tokens": len(prompt)} for _ in numbers] for prompt in prompts]

    def choose(self, prompts, begun, options):
        self.seen += [prompt + text for prompt, text in zip(prompts, begun)]
        return [{"p": self.p, "prompt_tokens": 7, "failed": self.failed} for _ in prompts]

    def score(self, texts):
        self.seen += texts
        return [{"score": float(len(text)), "prompt_tokens": 5, "failed": ""} for text in texts]


def edit(path, old, new):
    """Replace a text in a file, where it must be."""
    text = path.read_text("utf-8")
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new), "utf-8")


def asked_of(out):
    """{label: generated outputs} from lines such as `LABEL: 12 of 24 cached, generating 12`."""
    found = re.findall(r"(?m)^(.+): [\d,]+ of [\d,]+ cached, generating (\d+)", out)
    return {label: int(number) for label, number in found}
