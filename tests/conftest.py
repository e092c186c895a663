"""Fixtures: the kit's own commands, run once with tiny sizes; every test reads what they left."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "sample": ["--k", "3"],
    "train_asker": ["--task-epochs", "1", "--epochs", "1", "--save-steps", "2"],
    "train_truster": ["--epochs", "1", "--save-steps", "2"],
    "evaluate": [],
}


class Kit:
    """The scripts on a small copy of the toy task in a folder of their own."""

    def __init__(self, folder):
        self.folder, self.data, self.runs = folder, folder / "data", folder / "runs"

    def command(self, script, *flags):
        name = ["art.py", "sample"] if script == "sample" else [f"{script}.py"]
        where = ["--data", str(self.data), "--runs", str(self.runs), "--limit", "40"]
        return [sys.executable, str(ROOT / name[0]), *name[1:], *where, *TINY[script], *flags]

    def __call__(self, script, *flags):
        """Run one script; returns its completed process."""
        return subprocess.run(self.command(script, *flags), capture_output=True, text=True, cwd=self.folder)

    def files(self):
        """{path: (size, time of change)} of all that was written."""
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in self.runs.rglob("*")
                if path.is_file() and path.name != ".lock"}


def make_data(folder):
    """The toy task with 40 questions a split."""
    sizes = [word for split in ("train", "dev", "test") for word in (f"--{split}", "40")]
    command = [sys.executable, str(ROOT / "data/toy/prepare.py"), *sizes, "--out", str(folder / "toy")]
    subprocess.run(command, check=True)


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """All five commands, run in order."""
    kit = Kit(tmp_path_factory.mktemp("kit"))
    make_data(kit.data)
    kit.out, kit.err = {}, {}
    for script in TINY:
        done = kit(script)
        assert done.returncode == 0, done.stderr[-3000:]
        kit.out[script], kit.err[script] = done.stdout, done.stderr
    return kit


@pytest.fixture(scope="session")
def lm():
    """The bundled model in 32 bits."""
    import art

    return art.LM("data/toy/base", bits=32, batch_tokens=2000)
