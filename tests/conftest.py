"""Fixtures: the kit's own commands, run once with tiny sizes; every test reads what they left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from safetensors.torch import load_file

import art
import evaluate
import train_asker
import train_truster

# test_properties.py: a few hundred inputs, always the same; 10,000 new ones with --hypothesis-profile=thorough
settings.register_profile("suite", max_examples=300, derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", max_examples=10_000, database=None, deadline=None)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "sample": ["--k", "3", "--batch-tokens", "8000"],
    "train_asker": ["--task-epochs", "1", "--epochs", "1", "--save-steps", "1"],
    "train_truster": ["--epochs", "1", "--save-steps", "1"],
    "evaluate": [],
}
OUTPUTS = {  # what each script writes below runs/toy
    "sample": ["samples*"],
    "train_asker": ["default/finetuned", "default/asker"],
    "train_truster": ["default/truster"],
    "evaluate": ["stages", "default/stages", "default/*.*"],
}


class Kit:
    """The scripts on a small copy of the toy task in a folder of their own."""

    def __init__(self, folder):
        self.folder, self.data, self.runs = folder, folder / "data", folder / "runs"

    def flags(self, script):
        return ["--data", str(self.data), "--runs", str(self.runs), "--limit", "40", *TINY[script]]

    def command(self, script, *flags):
        name = ["art.py", "sample"] if script == "sample" else [f"{script}.py"]
        return [sys.executable, str(ROOT / name[0]), *name[1:], *self.flags(script), *flags]

    def __call__(self, script, *flags, kill_after=0):
        """Run one script, killed after so many writes if that is given; returns its completed process."""
        return subprocess.run(self.command(script, *flags), capture_output=True, text=True, cwd=self.folder,
                              env={**os.environ, "ART_KILL_AFTER_WRITES": str(kill_after)})

    def here(self, monkeypatch, script, *flags):
        """The same in this process, which has imported what takes most of the time."""
        monkeypatch.setattr(sys, "argv", self.command(script, *flags)[1:])
        art.run(MAINS[script])

    def copy(self, folder):
        """A copy of the finished runs that a test may break."""
        shutil.copytree(self.folder, folder)
        return Kit(folder)

    def written(self, script):
        """The files that a script wrote."""
        paths = [path for pattern in OUTPUTS[script] for path in (self.runs / "toy").glob(pattern)]
        paths += [path for folder in paths for path in folder.rglob("*")]
        return [path for path in paths if path.is_file() and path.name != ".lock"]

    def forget(self, script):
        """Delete what a script wrote."""
        for path in [path for pattern in OUTPUTS[script] for path in (self.runs / "toy").glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def files(self):
        """{path: (size, time of change)} of all that was written."""
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in self.runs.rglob("*")
                if path.is_file() and path.name != ".lock"}


def make_data(folder):
    """The toy task with 40 questions a split, one with an id that would like to be a path and to wipe the screen."""
    sizes = [word for split in ("train", "dev", "test") for word in (f"--{split}", "40")]
    command = [sys.executable, str(ROOT / "data/toy/prepare.py"), *sizes, "--out", str(folder / "toy")]
    subprocess.run(command, check=True)
    for path in (folder / "toy").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1]["id"] = f"../../../../{path.stem}\x1b[2J"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """All five commands, run in order."""
    kit = Kit(tmp_path_factory.mktemp("kit"))
    make_data(kit.data)
    kit.out, kit.err = {}, {}
    test, hidden = kit.data / "toy/test.jsonl", kit.folder / "hidden"
    test.rename(hidden)  # all is sampled and trained before there is a test split
    for script in TINY:
        if script == "evaluate":
            hidden.rename(test)
        done = kit(script)
        assert done.returncode == 0, done.stderr[-3000:]
        kit.out[script], kit.err[script] = done.stdout, done.stderr
    return kit


@pytest.fixture(scope="session")
def lm():
    """The bundled model in 32 bits."""
    return art.LM("data/toy/base", bits=32, batch_tokens=2000)


@pytest.fixture
def copy(kit, tmp_path):
    """A copy of the finished run that a test may break."""
    again = kit.copy(tmp_path / "kit")
    return again.folder, ["--data", again.data, "--runs", again.runs, "--limit", "40"]


MAINS = {"sample": art.main, "solve": art.main, "train_asker": train_asker.main, "train_truster": train_truster.main,
         "evaluate": evaluate.main}


def refused(monkeypatch, capsys, script, *flags):
    """Run a script in this process; it must end with exit code 2 and one line on stderr, which is returned."""
    first = [script] if script in ("sample", "solve") else []
    monkeypatch.setattr(sys, "argv", ["script", *first, *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        art.run(MAINS[script])
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("usage") and "%|" not in line]
    assert end.value.code == 2 and "Traceback" not in "".join(lines)
    return lines[-1]


def outcome(script, runs):
    """What must be the same however often a script was killed: {name: rows, loss, size of a weight, or table}."""
    if script == "sample":
        rows = art.read_jsonl(runs / "toy/samples.jsonl")
        assert len({(row["id"], row["sample"]) for row in rows}) == len(rows), "a sample is doubled"
        return {f"{row['id']} {row['sample']}": row for row in rows}
    if script == "evaluate":
        stages = {path.name: sorted(art.read_jsonl(path), key=lambda row: (row["id"], row.get("sample", 0)))
                  for path in runs.glob("toy/**/stages/*.jsonl")}
        return {**stages, "table": (runs / "toy/default/table.md").read_text()}
    figures = {}
    for folder in (runs / "toy" / name for name in OUTPUTS[script]):
        state = json.loads((Path(art.last_checkpoint(folder / "checkpoints")) / "trainer_state.json").read_text())
        figures |= {f"{folder.name}, loss at step {entry['step']}": entry["loss"]
                    for entry in state["log_history"] if "loss" in entry}
        figures |= {f"{folder.name}, {name}": weight.norm().item()
                    for name, weight in load_file(folder / art.ADAPTER).items()}
    return figures


def same(one, other):
    """Are two outcomes the same: texts, decisions and tables exactly, figures within 1e-3?

    On some CPUs two starts give log-probabilities that differ in the sixth digit.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return abs(one - other) < 1e-3 if isinstance(one, float) and isinstance(other, float) else one == other


def tear(kit, script):
    """Cut in half the line that a script wrote last, as a kill in the middle of a write does; True if there is one."""
    journals = [path for path in kit.written(script)
                if path.suffix == ".jsonl" and path.name != "records.jsonl" and path.stat().st_size]
    if not journals:
        return False
    path = max(journals, key=lambda path: path.stat().st_mtime_ns)
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, -1) + 1
    path.write_bytes(content[: (start + len(content)) // 2])
    return True
