"""How much GPU memory does each preset need? Computed without a GPU, in a few minutes.

    python docs/measure/memory.py
    python docs/measure/memory.py --presets small --free 80 --max-length 512

The kit's own code (add_lora, the losses, Local) runs on fake tensors, which have shapes and no
content, and all bytes that exist at the same time are counted, but not CUDA itself (about 0.5 GiB)
and fragmentation. Bits and --kv-gib are the kit's choice; questions have 150 tokens, answers 512.
"""

import argparse
import random
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art
import train_asker

QUESTION, CAP = 150, 512  # tokens
FREE = {"small": 5.5, "t4": 14.5, "16gb": 15.5, "24gb": 23.5}  # GiB of the card for one program
QWEN2, LLAMA = {"model_type": "qwen2", "vocab_size": 151936}, {"model_type": "llama"}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}
SHAPES = {  # hidden size, size of the MLP, layers, heads, heads of keys; tied embeddings?
    "Qwen/Qwen2.5-0.5B-Instruct": (QWEN2, 896, 4864, 24, 14, 2, True),
    "Qwen/Qwen2.5-1.5B": (QWEN2, 1536, 8960, 28, 12, 2, True),
    "Qwen/Qwen2.5-7B-Instruct": ({**QWEN2, "vocab_size": 152064}, 3584, 18944, 28, 28, 4, False),
    "Qwen/Qwen3-4B-Base": (QWEN3, 2560, 9728, 36, 32, 8, True),
    "Qwen/Qwen3-8B": (QWEN3, 4096, 12288, 36, 32, 8, False),
    "NousResearch/Llama-2-7b-hf": (LLAMA, 4096, 11008, 32, 32, 32, False),
    "NousResearch/Llama-2-13b-hf": (LLAMA, 5120, 13824, 40, 40, 40, False),
}


def make_model(name, dtype=torch.bfloat16, scorer=False):
    """A model of this shape without a checkpoint."""
    family, hidden, mlp, layers, heads, keys, tied = SHAPES[name.replace("1.5B-Instruct", "1.5B")]
    config = transformers.AutoConfig.for_model(
        **family, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=tied,
        pad_token_id=0, num_labels=1)
    kind = "SequenceClassification" if scorer else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=dtype).eval()
    if scorer:
        model.score.weight = torch.nn.Parameter(torch.empty(1, hidden))  # in fp32
    return model


def quantise(model):
    """Give the linear layers fake weights in 4 bits: nf4, double quantisation."""
    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear and name not in ("lm_head", "score"):
            n, shape, empty, byte = layer.weight.numel(), layer.weight.shape, torch.empty, torch.uint8
            weight = torch.nn.Parameter(empty((n // 2, 1), dtype=byte), requires_grad=False)
            weight.quant_state = QuantState(
                absmax=empty(n // 64, dtype=byte), shape=shape, code=empty(16), blocksize=64,
                quant_type="nf4", dtype=model.dtype, offset=empty(()), state2=QuantState(
                    absmax=empty(-(-n // 64 // 256)), code=empty(256), blocksize=256,
                    dtype=torch.float32))
            vars(weight).update(bnb_quantized=True, compress_statistics=True, quant_type="nf4")
            layer.__class__, layer.weight = Linear4bit, weight
            vars(layer).update(quant_state=weight.quant_state, compute_dtype=model.dtype,
                               compute_type_is_set=True, quant_storage=byte,
                               support_avx512bf16_for_cpu=False)
    model.is_loaded_in_4bit = True


class Counting(TorchDispatchMode):
    """Counts the bytes of all tensors: `now`, and the `most` so far."""

    now, most = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(torch.utils._pytree.tree_leaves(out))
        return out

    def add(self, values):
        for storage in (x.untyped_storage() for x in values if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata).atexit = False
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)

    def free(self, key):
        self.now -= self.alive.pop(key)


def gib(name, card, work, *words, bits=4, scorer=False):
    """GiB that `work(model, *words)` takes at the most, with the model; card: (dtype, free GiB)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(name, card[0], scorer)
        with Counting() as count:
            count.alive = {}
            torch.cuda.mem_get_info = lambda: (card[1] * 2**30 - count.now, card[1] * 2**30)
            if bits == 4:
                quantise(model)
            count.add([*model.parameters(), *model.buffers()])
            work(model, *words)
    return f"{count.most / 2**30:.1f}"


def train(model, rows, length):
    """A step of a training: examples (Asker) or answers (Truster) in `rows`."""
    scorer = hasattr(model, "score")
    model = art.add_lora(model, "SEQ_CLS" if scorer else "CAUSAL_LM", 16).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:  # gradients and the optimizer's numbers stay from the first step on
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    ids, mask = torch.ones(2, rows, length, dtype=torch.long)
    inputs = dict(zip(("text", "decision"), torch.zeros(2, rows, length // 2)),
                  input_ids=ids, attention_mask=mask)
    with torch.autocast("cpu", model.dtype):
        losses = scorer and art.score_batch(model, ids, mask)
        sum(losses if scorer else train_asker.loss(model, inputs).values()).backward()


@torch.inference_mode()
def ask(model, prompt, adapter=True):
    """A full batch of Local: read prompts, write the last token of an answer, decide; or score."""
    local = object.__new__(art.Local)
    local.args, local.tokenizer = SimpleNamespace(kv_gib=None), SimpleNamespace(pad_token_id=0)
    local.adapter, local.base = adapter, model
    kind = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    local.model = art.add_lora(model, kind, 16) if adapter else model
    for weight in model.parameters():
        if weight.ndim == 1:  # norms are in fp32 only for a training in fp16
            weight.data = weight.data.to(model.dtype)
    texts = [{"prompt": [0] * (prompt + CAP)}] * (16_384 // (prompt + CAP))
    if kind == "SEQ_CLS":
        return art.score_batch(local.model, *list(local.pad(texts).values())[:2])
    rows = [{"prompt": [0] * prompt, "random": random}] * (local.token_budget() // (prompt + CAP))
    cache = local.model(**local.pad(rows), use_cache=True).past_key_values
    for layer in cache.layers:
        heads, _, size = layer.keys.shape[1:]
        layer.keys, layer.values = layer.keys.new_empty(2, len(rows), heads, prompt + CAP, size)
    mask = torch.ones(len(rows), prompt + CAP + 1, dtype=torch.long)
    logits = local.model(input_ids=mask[:, -1:], attention_mask=mask, past_key_values=cache,
                         position_ids=art.positions(mask)[:, -1:]).logits[:, -1].float()
    local.pick(logits, rows, 0.7)
    logits.log_softmax(-1)
    del cache, logits
    local.model(**local.pad(texts))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default=",".join(FREE), help="some of small, t4, 16gb, 24gb")
    parser.add_argument("--free", type=float, help="GiB of the card (default by preset)")
    parser.add_argument("--max-length", type=int, default=1024, help="of an example (default 1024)")
    args = parser.parse_args()
    torch.cuda.is_available = lambda: True  # the kit's code takes the way of a GPU
    torch.nn.Module.to = lambda self, *args, **kwargs: self  # all is there already
    print("| preset | LLM (bits) | Asker: training, asking | Truster: training, scoring | card |\n"
          "| --- | --- | --- | --- | --- |")
    for name in args.presets.split(","):
        preset, free = {**art.DEFAULTS, **art.PRESETS[name]}, args.free or FREE[name]
        card = torch.float16 if name == "t4" else torch.bfloat16, free
        llm, asker, truster = (preset[key] for key in ("model", "asker_model", "truster_model"))
        with torch.device("meta"):  # the rule of data/sample.py
            bits = 16 if 2 * make_model(llm).num_parameters() < free * 2**30 / 4 else 4
        answers = preset["k"] * preset["truster_at_once"]
        print(f"| `{name}` | {gib(llm, card, ask, QUESTION, False, bits=bits)} ({bits})",
              f"| {gib(asker, card, train, preset['asker_at_once'], args.max_length)},",
              gib(asker, card, ask, QUESTION + CAP),
              f"| {gib(truster, card, train, answers, args.max_length, scorer=True)},",
              gib(truster, card, ask, QUESTION, scorer=True), f"| {free:g} GiB |", flush=True)


if __name__ == "__main__":
    main()
