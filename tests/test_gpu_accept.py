"""The acceptance of a GPU and the arithmetic of the presets, as far as a CPU can run them."""

import json
import subprocess
import sys

import gpu_accept
import pytest
from conftest import ROOT


def test_every_piece_runs(tmp_path):
    """With tiny shapes: every figure is there, nothing is wrong, and the hours follow from the speeds."""
    command = [sys.executable, "tests/gpu_accept.py", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "not ok: nothing; not done: toy-fp16" in done.stdout
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {piece} | seconds |" in table for piece in gpu_accept.PIECES if piece != "toy-fp16")
    assert all(f"- `{preset}`: sample " in table for preset in gpu_accept.CAPS)
    assert json.loads((tmp_path / "toy-bf16.json").read_text())["resumed at step"] >= 1


def test_a_piece_that_hangs_or_dies_costs_only_itself(tmp_path, monkeypatch):
    gpu_accept.do_apart("machine", tmp_path, limit=0.1)
    monkeypatch.setattr(sys, "executable", "false")
    gpu_accept.do_apart("masked", tmp_path, limit=60)
    text, wrong = gpu_accept.table(tmp_path)
    assert wrong == ["machine ok", "masked ok"] and "it takes longer than 0 s" in text


ROUGH = """
import sys; sys.path.insert(0, "tests")
import art, fit, shapes
name = "Qwen/Qwen2.5-0.5B-Instruct"
print(art.memory_gib(shapes.SHAPES[name], 494e6, 4, tokens=2048, learned=1024))
fit.as_on_a_gpu()
print(fit.training_gib(name, "asker", 4, 512))
"""


def test_fake_tensors_and_the_rough_figure_agree():
    """What a training announces is what tests/fit.py counts and 1 GiB, by a fifth."""
    done = subprocess.run([sys.executable, "-c", ROUGH], capture_output=True, text=True, cwd=ROOT)
    rough, exact = map(float, done.stdout.split())
    assert rough == pytest.approx(exact + 1, rel=0.2)
