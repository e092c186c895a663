"""What models and presets need, computed without a GPU: memory by fake tensors, hours by arithmetic. Nothing measured.

    python tests/fit.py               # every preset: GiB at the most, and hours of each step
    python tests/fit.py targets       # trainings of 13B, 7B and 1.5B at 512 and 1,024 tokens
    python tests/fit.py --limit 300   # the same presets on 300 questions of each split

Fake tensors have shapes and no content, so the kit's own code (add_lora, the losses, Local) runs on models that this
machine could not hold, and every byte is counted. Not counted: the CUDA context, about 0.5 GiB, and fragmentation.
"""

import argparse
import math
import random
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shapes import config_of

import art

PROMPT, ANSWER, CAP, ASKED = 150, 300, 512, 100  # tokens: question, a chat model's answer, its cap, an Asker's text
ALIVE = 0.6  # a batch takes as many steps as its longest answer: so many of its rows are alive in a step
QUESTIONS = {"train": 6973, "dev": 500, "test": 1319}  # of GSM8K
# Assumed, not measured: what an experienced reader would guess for each card. ms a layer is the time in which Python
# starts the work of one layer; TFLOP/s of 4-bit QLoRA and of reading prompts; GB/s of what a copy reaches.
CARDS = {
    "small": ("RTX 4060 Ti 16 GB", {"ms": 0.8, "train": 18, "read": 30, "GB": 240}),
    "t4": ("T4 of Colab", {"ms": 2.0, "train": 12, "read": 25, "GB": 240}),
    "16gb": ("RTX 4060 Ti 16 GB", {"ms": 0.8, "train": 18, "read": 30, "GB": 240}),
    "24gb": ("RTX 4090", {"ms": 0.65, "train": 70, "read": 120, "GB": 850}),
}


# --- Fake models


def packed(weight):
    """A weight in 4 bits as bitsandbytes keeps it: nf4, double quantisation. It holds no numbers."""
    import bitsandbytes
    import torch
    state, n, empty = bitsandbytes.functional.QuantState, weight.numel(), torch.empty
    scales = state(absmax=empty(math.ceil(n / 64 / 256)), code=empty(256), blocksize=256, dtype=torch.float32)
    new = torch.nn.Parameter(empty((n // 2, 1), dtype=torch.uint8), requires_grad=False)
    new.quant_state = state(absmax=empty(n // 64, dtype=torch.uint8), shape=weight.shape, code=empty(16), blocksize=64,
                            quant_type="nf4", dtype=torch.bfloat16, offset=empty(()), state2=scales)
    new.bnb_quantized, new.compress_statistics, new.quant_type = True, True, "nf4"
    return new


def skeleton(name, dtype, scorer):
    """A model with 4-bit layers on torch's device "meta": modules alone."""
    import torch
    import transformers
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    config = config_of(name)
    config.num_labels = 1
    head = transformers.AutoModelForSequenceClassification if scorer else transformers.AutoModelForCausalLM
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                               bnb_4bit_compute_dtype=dtype)
    with torch.device("meta"):
        return replace_with_bnb_linear(head.from_config(config), ["lm_head", "score"], settings)


def fill(model, dtype):
    """Give a skeleton fake weights, as load_base and load_scorer would have loaded them."""
    import torch
    made = {}
    for module in model.modules():
        kept = {**module._parameters, **module._buffers}
        for key, weight in kept.items():
            if weight is not None and id(weight) not in made:  # embeddings may be tied
                if type(module).__name__ == "Linear4bit" and key == "weight":
                    new = packed(weight)
                    module.quant_state = new.quant_state
                elif key in module._parameters:
                    kind = torch.float32 if module is getattr(model, "score", None) else dtype
                    new = torch.nn.Parameter(torch.empty(weight.shape, dtype=kind))
                else:
                    new = torch.empty(weight.shape, dtype=weight.dtype)
                made[id(weight)] = new, weight  # the old one is kept, or another would get its id
            if weight is not None:
                (module._parameters if key in module._parameters else module._buffers)[key] = made[id(weight)][0]
    model.is_loaded_in_4bit = True
    return model.eval()


def counting():
    """A mode that counts the bytes of all tensors that are alive: `now`, and `most` so far."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        now, most = 0, 0

        def __init__(self):
            super().__init__()
            self.alive = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                    storage = tensor.untyped_storage()
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
            return out

        def freed(self, key):
            self.now -= self.alive.pop(key)

    return Counting()


def gib_at_most(work, name, dtype, scorer=False):
    """GiB that `work(torch, model)` takes at the most, the model with it; everything in it is fake."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    dtype = getattr(torch, dtype)
    model = skeleton(name, dtype, scorer)
    with FakeTensorMode(allow_non_fake_inputs=True), counting() as count:
        work(torch, fill(model, dtype))
    return count.most / 2**30


def as_on_a_gpu():
    """The kit's code takes the way of a GPU, though the fake tensors say that they are on a CPU."""
    import bitsandbytes  # noqa: F401  before it is told that there is a GPU
    import peft  # noqa: F401
    import torch
    torch.cuda.is_available = lambda: True
    torch.nn.Module.to = lambda self, *args, **kwargs: self  # all is in its place already


# --- Memory


def training_gib(name, kind, batch, length, dtype="bfloat16", k=1):
    """GiB of a training at the most: a step of `batch` examples (Truster: questions with k answers) of `length`."""
    import train_asker

    def work(torch, model):
        model = art.add_lora(model, "SEQ_CLS" if kind == "truster" else "CAUSAL_LM", 16).train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimiser = torch.optim.AdamW(trained)
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        optimiser.step()  # its own numbers are there from the first step on
        ids = torch.zeros(batch * k, length, dtype=torch.long)
        with torch.autocast("cpu", getattr(torch, dtype)):
            if kind == "truster":  # the loss needs contents for its pairs, which are a few bytes
                value = art.score_batch(model, ids, torch.ones_like(ids)).sum()
            else:
                learned = torch.zeros(2, batch, length // 2)
                value = sum(train_asker.loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                                                     "text": learned[0], "decision": learned[1]}).values())
        value.backward()

    return gib_at_most(work, name, dtype, kind == "truster")


def asking_gib(name, kv_gib, dtype="bfloat16", adapter=False, kinds=("generate", "choose")):
    """{kind: GiB at the most} of a full batch of Local: prompts, a step at the cap, decisions, scores."""
    def local_of(model, scorer):
        import peft
        local = object.__new__(art.Local)
        local.model = local.base = model
        if adapter:
            local.model = peft.get_peft_model(model, peft.LoraConfig(
                task_type="SEQ_CLS" if scorer else "CAUSAL_LM", r=16, target_modules="all-linear")).eval()
        local.tokenizer, local.shared, local.prefix = SimpleNamespace(pad_token_id=0), [], None
        local.set_budget(kv_gib)
        return local

    def prompts(local, torch):
        rows = local.budget // (PROMPT + CAP)
        local.read([("", [0] * PROMPT, [0])] * rows, local.model, logits_to_keep=1)

    def step(local, torch):
        import transformers
        config, rows = local.base.config, local.budget // (PROMPT + CAP)
        width = art.kv_bytes(config) // (2 * config.num_hidden_layers * config.num_key_value_heads * 2)
        cache = transformers.DynamicCache()
        for layer in range(config.num_hidden_layers):
            size = rows, config.num_key_value_heads, PROMPT + CAP - 1, width
            cache.update(*(torch.empty(size, dtype=getattr(torch, dtype)) for _ in "kv"), layer)
        mask = torch.ones(rows, PROMPT + CAP, dtype=torch.long)
        logits = local.model(input_ids=mask[:, -1:], attention_mask=mask, position_ids=art.places(mask)[:, -1:],
                             past_key_values=cache, use_cache=True).logits[:, -1].float()
        local.pick(logits, [{"random": random}] * rows, 0.7)

    def choose(local, torch):
        rows = local.reads // (PROMPT + ANSWER + ASKED)
        local.read([("", [0] * (PROMPT + ANSWER + ASKED), [0])] * rows, local.base.base_model)

    def score(local, torch):
        ids = torch.zeros(local.reads // (PROMPT + ANSWER), PROMPT + ANSWER, dtype=torch.long)
        art.score_batch(local.model, ids, torch.ones_like(ids))

    def run(work, scorer):
        def inside(torch, model):
            with torch.inference_mode():
                work(local_of(model, scorer), torch)
        return gib_at_most(inside, name, dtype, scorer)

    works = {"generate": (prompts, step), "choose": (choose,), "score": (score,)}
    return {kind: max(run(work, kind == "score") for work in works[kind]) for kind in kinds}


# --- Hours, by arithmetic on the assumptions of CARDS


def parameters(name):
    """(in 4-bit layers, in embeddings and head) of a model."""
    config = config_of(name)
    width = art.kv_bytes(config) // 4  # of keys in all layers, in numbers
    layer = 2 * config.hidden_size * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) \
        * config.num_attention_heads + 3 * config.hidden_size * config.intermediate_size
    ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + 2 * width * config.hidden_size, ends


class Assumed:
    """Hours of work on a card of CARDS."""

    def __init__(self, card, kv_gib):
        self.card, self.kv_gib = card, kv_gib

    def writing(self, name, answers, length=ANSWER, adapter=False):
        """Hours to write so many answers: the slower of Python, which starts the work of each layer, and the card."""
        config, (quantised, ends) = config_of(name), parameters(name)
        rows = min(answers, self.kv_gib * 2**30 / (art.kv_bytes(config) * (PROMPT + CAP)))
        alive = rows * ALIVE
        python = self.card["ms"] / 1e3 * config.num_hidden_layers * (2 if adapter else 1)
        moved = 4.5 * quantised + 3 * alive * (PROMPT + length / 2) * art.kv_bytes(config)  # unpack; copy, read
        work = moved / self.card["GB"] / 1e9 + 2 * (quantised + ends) * alive / self.card["read"] / 1e12
        return math.ceil(answers / rows) * length / ALIVE * max(python, work) / 3600

    def reading(self, name, tokens, kind):
        return 2 * parameters(name)[0] * tokens / self.card["read"] / 1e12 / 3600

    def training(self, name, tokens, kind):
        """Forward, forward again (checkpoints) and backward."""
        return 6 * parameters(name)[0] * tokens / self.card["train"] / 1e12 / 3600


def hours(preset, speed, limit=None):
    """{step: hours} of the five steps on GSM8K, default rows."""
    train, dev, test = (min(count, limit or count) for count in QUESTIONS.values())
    train, both = min(train, preset.get("limit_train", train)), dev + test
    llm, asker, truster, k = (preset[key] for key in ("model", "asker_model", "truster_model", "k"))
    drafted = PROMPT + ANSWER + ASKED
    stages = train * (PROMPT + ANSWER) * preset["task_epochs"] + train * k * drafted * preset["epochs"]
    return {
        "sample": speed.writing(llm, (train + dev) * k) + speed.writing(llm, dev),
        "train_asker": speed.training(asker, stages, "asker"),
        "train_truster": speed.training(truster, train / 2 * k * (PROMPT + ANSWER), "truster"),  # half have both kinds
        "evaluate": (speed.writing(asker, both, ASKED, adapter=True) + speed.reading(asker, 2 * both * drafted, "asker")
                     + speed.writing(llm, test) + 2 * speed.writing(llm, both) + speed.writing(llm, both, ASKED)
                     + speed.reading(truster, 2 * both * drafted, "truster")),
    }


# --- Tables


def head(*columns):
    """The first two lines of a Markdown table."""
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")


def targets():
    """The trainings that decide what fits where."""
    head("training in bf16", "GiB at 512 tokens", "GiB at 1,024")
    for label, *what, k in [("Truster Llama-2-13B, 2 questions with 5 answers", "NousResearch/Llama-2-13b-hf",
                             "truster", 2, 5),
                            ("Asker Llama-2-7B, 8 examples", "NousResearch/Llama-2-7b-hf", "asker", 8, 1),
                            ("Asker Qwen2.5-1.5B, 4 examples", "Qwen/Qwen2.5-1.5B", "asker", 4, 1)]:
        made = [f"{training_gib(*what, length, k=k):.1f}" for length in (512, 1024)]
        print(f"| {label} | {' | '.join(made)} |", flush=True)


def presets(limit):
    """Memory and hours of each preset that is for a GPU."""
    head("preset", "LLM", "Asker: training, asking", "Truster: training, scoring", "card")
    for name in ("small", "t4", "16gb", "24gb"):
        preset, dtype = art.PRESETS[name], "float16" if name == "t4" else "bfloat16"
        kv, length = preset["kv_gib"], preset["max_length"]
        llm = asking_gib(preset["model"], kv, dtype)
        asking = asking_gib(preset["asker_model"], kv, dtype, True)
        scoring = asking_gib(preset["truster_model"], kv, dtype, True, ("score",))
        asker, truster = (training_gib(preset[f"{kind}_model"], kind, preset[f"{kind}_batch"][0], length, dtype,
                                       preset["k"] if kind == "truster" else 1) for kind in ("asker", "truster"))
        print(f"| `{name}` | {max(llm.values()):.1f} | {asker:.1f}, {max(asking.values()):.1f} | {truster:.1f}, "
              f"{scoring['score']:.1f} | {CARDS[name][0]} |", flush=True)
    print()
    show_hours(limit)


def show_hours(limit):
    """Hours of each step."""
    head("preset", "card", "sample", "train_asker", "train_truster", "evaluate", "sum")
    for name, (card, speed) in CARDS.items():
        made = hours(art.PRESETS[name], Assumed(speed, art.PRESETS[name]["kv_gib"]), limit)
        cells = [f"{value:.1f}" for value in [*made.values(), sum(made.values())]]
        print(f"| `{name}` | {card} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", default="presets", choices=("presets", "targets", "hours"))
    parser.add_argument("--limit", type=art.positive, help="questions of each split (default all)")
    args = parser.parse_args()
    as_on_a_gpu()
    {"presets": lambda: presets(args.limit), "targets": targets, "hours": lambda: show_hours(args.limit)}[args.table]()


if __name__ == "__main__":
    main()
