"""Greedy texts and decisions equal transformers' own: window, experts, hybrid and logit scaling."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "docs/measure/architectures.py"
spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: several threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text", "granite", "gpt_oss"])
def test_equals_transformers(name, capsys):
    equal = architectures.measure(architectures.compare, name)
    row = capsys.readouterr().out
    assert equal and "6 of 6 equal" in row, row


@pytest.mark.parametrize("role", ["Asker", "Truster"])
def test_a_saved_adapter_is_reloaded(role, capsys):
    equal = architectures.measure(architectures.train, "llama", role, 32)
    row = capsys.readouterr().out
    assert equal and "reloaded off by 0e+00" in row, row
