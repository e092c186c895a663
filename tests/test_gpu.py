"""What a GPU needs, as far as a CPU can tell: memory that runs out, number formats, and one line for each mistake."""

import gc
import os
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import shapes
import torch
import transformers
from conftest import BASE, ROOT, refused

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


def test_torchrun_is_refused(copy, monkeypatch, capsys):
    """Every process of it would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one GPU and one process" in refused(monkeypatch, capsys, copy, "sample")


@pytest.mark.skipif(sys.platform != "linux", reason="torch has it on Linux alone")
def test_allocator_is_set_before_torch_is_imported():
    code = "import os, sys, art; print(os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["expandable_segments:True", "False"]


def test_old_torchao_is_one_line(copy, monkeypatch, tmp_path):
    """As Colab brings it: peft refuses it unless the weights are in 4 bits."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").write_text("__version__ = '0.10.0'\n")
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n"
    (tmp_path / "torchao-0.10.0.dist-info/METADATA").write_text(about)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    err = copy("train_truster", "--run", "new", "--adapter-bits", "32", code=2)[1]
    assert "pip uninstall torchao" in err.splitlines()[-1] and "Traceback" not in err


def test_each_training_counts_its_own_memory(copy, monkeypatch):
    """The peak is counted anew before each stage, not only once a process."""
    calls = []
    monkeypatch.setattr(art, "reset_peak_memory", lambda: calls.append(1))
    copy.here(monkeypatch, "train_asker", "--run", "new", "--epochs", "0.1", "--task-epochs", "0.1")
    assert len(calls) == 2


def test_compute_fp32_keeps_4_bits(monkeypatch, copy):
    """The way out where fp16 overflows: every script has it, the weights stay in 4 bits, all else is in fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert art.compute_dtype(4) == torch.float16 and art.compute_dtype(4, "fp32") == torch.float32
    monkeypatch.undo()
    asked = []  # a CPU computes in fp32 anyway: so what is handed on is looked at
    monkeypatch.setattr(art, "compute_dtype", lambda bits, compute="auto": asked.append(compute) or torch.float32)
    copy.here(monkeypatch, "sample", "--fresh", "--compute", "fp32")
    copy.here(monkeypatch, "train_asker", "--run", "new", "--epochs", "0.1", "--task-epochs", "0", "--compute", "fp32")
    copy.here(monkeypatch, "train_truster", "--run", "new", "--epochs", "0.1", "--compute", "fp32")
    assert len(asked) >= 5 and set(asked) == {"fp32"}  # the LLM, two trainings, and both adapters on dev


def test_format_of_the_training_is_that_of_the_model(monkeypatch, tmp_path):
    """bf16 or fp16 by what the model was loaded with; the optimiser is the one that CPU tests run."""
    args = Namespace(lr=1e-3, batch_size=1, accumulate=1, seed=0, report_to="none", save_steps=9)
    seen = []

    def look(settings):
        seen.append((settings.bf16, settings.fp16, settings.optim))
        raise KeyboardInterrupt  # before it looks for the card

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", look)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = SimpleNamespace(get_input_embeddings=lambda d=dtype: SimpleNamespace(weight=torch.zeros(1, dtype=d)))
        with pytest.raises(KeyboardInterrupt):
            art.make_trainer(model, [], None, None, args, tmp_path, 1)
    assert seen == [(True, False, "adamw_torch"), (False, True, "adamw_torch"), (False, False, "adamw_torch")]


def test_a_training_leaves_no_weights_behind(copy, monkeypatch):
    """When the next model is loaded, those of the training are gone: a card has room for one."""
    alive, load = [], transformers.AutoModelForCausalLM.from_pretrained

    def look(*args, **settings):
        alive.append(sum(type(thing).__name__ == "Params4bit" for thing in gc.get_objects()))
        return load(*args, **settings)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", look)
    gc.collect()
    gc.disable()  # else it may come by chance
    try:
        copy.here(monkeypatch, "train_asker", "--run", "new", "--epochs", "0.1", "--task-epochs", "0.1")
    finally:
        gc.enable()
    assert len(alive) == 3 and len(set(alive)) == 1  # two trainings, and dev


@pytest.mark.parametrize(("kv_gib", "reads"), [(4, 16_384), (0.1, 3744)])
def test_batches_have_bytes(kv_gib, reads):
    """Of keys and values, whatever the model; decisions and scores write none, but they have a bound too."""
    local = object.__new__(art.Local)  # Qwen2.5-1.5B in 16 bits: 28 layers, 2 heads of 128
    config = SimpleNamespace(num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, hidden_size=1536)
    config.get_text_config = lambda: config
    weight = SimpleNamespace(weight=torch.zeros(1, dtype=torch.bfloat16))
    local.base = SimpleNamespace(config=config, get_input_embeddings=lambda: weight)
    local.set_budget(kv_gib)
    assert (local.budget, local.reads) == (int(kv_gib * 2**30 / (2 * 28 * 2 * 128 * 2)), reads)


def test_limits_hold_together(copy):
    """The preset's limit of train, --limit-train and --limit: the smallest; test is never cut by that of train."""
    def sizes(*flags):
        args = art.parse(art.make_parser(""), ["--data", str(copy.data), "--runs", "new", *flags])
        return [len(art.load_split(args, split)) for split in ("train", "test")]

    assert art.PRESETS["t4"]["limit_train"] == 2000 and sizes("--preset", "t4") == [40, 12]
    assert sizes("--limit-train", "5") == [5, 12] and sizes("--preset", "t4", "--limit", "7") == [7, 7]
    assert sizes("--limit", "9", "--limit-train", "5") == [5, 9]


def test_needs_are_said_before_anything_is_downloaded(monkeypatch, tmp_path, capsys):
    """From the sizes on the Hub, those in the cache aside; nothing of folders, nothing without a network."""
    config = shapes.SHAPES["Qwen/Qwen2.5-1.5B"]
    art.write(tmp_path / "config.json", config)
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in [
        ("model.safetensors", 3_087_467_144), ("pytorch_model.bin", 3_087_467_144), ("config.json", 660)]]
    about = SimpleNamespace(siblings=files, safetensors=SimpleNamespace(total=1_543_714_304))
    hub = SimpleNamespace(HfApi=lambda: SimpleNamespace(model_info=lambda name, **how: about),
                          hf_hub_download=lambda *name: str(tmp_path / "config.json"),
                          try_to_load_from_cache=lambda *name: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    art.announce_needs({BASE: 4})
    assert capsys.readouterr().out == ""
    art.announce_needs({"Qwen/Qwen2.5-1.5B": 4, BASE: 4}, kv_gib=4.0)
    assert capsys.readouterr().out == "Qwen/Qwen2.5-1.5B: about 6 GiB of GPU memory, 3.1 GB to download\n"
    hub.try_to_load_from_cache = lambda *name: "there"
    art.announce_needs({"Qwen/Qwen2.5-1.5B": 16}, tokens=4096, learned=2048)
    assert "about 9 GiB of GPU memory, 0.0 GB to download" in capsys.readouterr().out
    art.write(tmp_path / "config.json", {"n_embd": 768, "n_layer": 12})  # GPT-2's names
    art.announce_needs({"gpt2": 16})
    assert capsys.readouterr().out == ""
    hub.HfApi = raises(OSError("no network"))
    art.announce_needs({"Qwen/Qwen2.5-1.5B": 4})
    assert capsys.readouterr().out == ""
