"""What a GPU needs, as far as a CPU can tell: memory that runs out, number formats, and one line for each mistake."""

import pytest
import torch
import transformers
from conftest import refused

import art

# the names under which memory runs out: torch's allocator, cuBLAS beside it, CUDA itself, a CPU
OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuda": torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
}


def raises(error):
    """A function that raises it, whatever it is given."""
    def call(*args, **kwargs):
        raise error
    return call


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
@pytest.mark.parametrize(("script", "where", "flag"), [
    ("sample", (art.Local, "generate"), "--kv-gib"),
    ("train_truster", (transformers.Trainer, "training_step"), "--batch-size"),
    ("train_truster", (transformers.AutoModelForSequenceClassification, "from_pretrained"), "a smaller one"),
])
def test_memory_that_runs_out_is_one_line(copy, monkeypatch, capsys, name, script, where, flag):
    monkeypatch.setattr(*where, raises(OUT_OF_MEMORY[name]))
    run = ["--run", "new"] if script == "train_truster" else ["--fresh"]
    assert f"out of memory: {flag}" in refused(monkeypatch, capsys, copy, script, *run).replace(
        "lower ", "").replace("this model does not fit: take ", "")


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="device-side assert"), art.enough_memory("lower --kv-gib"):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_smaller_batches_go_on_with_the_same_training(copy, monkeypatch, capsys):
    """The mend of an out-of-memory: as many examples a step make the same adapter, fewer do not."""
    copy.here(monkeypatch, "train_truster", "--batch-size", "2", "--accumulate", "4")
    assert "trained already" in capsys.readouterr().out
    assert "batch_size (8 then, 2 now)" in refused(monkeypatch, capsys, copy, "train_truster", "--batch-size", "2")
