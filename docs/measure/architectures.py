"""Compare the models part of art.py with transformers, on tiny random models.

Greedy texts from an uneven batch are compared with model.generate on one prompt at a time, P(Yes)
with the model's own logits. With --train, a model after one step of QLoRA is compared with its
saved adapter in a fresh model. Exit code 1 if any two results differ.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art

TEXT = "Tom has 12 apples and 5 bags. Each bag costs 3 coins. How many coins does Tom pay? " * 2
PROMPTS = [TEXT[:end] for end in (5, 90, 20, 50, 106, 36)]  # 5 to 54 tokens
BASE = {"vocab_size": 549, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
WINDOW = {"sliding_window": 16}  # shorter than the texts
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}
LINEAR = {"linear_key_head_dim": 16, "linear_value_head_dim": 16,  # three layers of four
          "linear_num_key_heads": 2, "linear_num_value_heads": 4}
CONFIGS = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "gemma2": MIXED, "gemma3_text": MIXED,
    "mistral": WINDOW, "gpt_oss": {**MIXED, **EXPERTS}, "phi3": WINDOW,
    "granite": {"logits_scaling": 8.0}, "cohere2": MIXED, "olmo3": MIXED,
    "qwen3_5_text": LINEAR, "qwen3_next": {**LINEAR, **EXPERTS},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
                  "mamba_chunk_size": 16, "lm_head_multiplier": 0.5},
    "gemma4_text": {**MIXED, "global_head_dim": 32, "num_kv_shared_layers": 2,
                    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 549}}


def save(name, folder):
    """A random model in fp32, also written into a folder, with the tokenizer of the toy."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **BASE, **CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim > 1:  # larger than usual: then the texts do not repeat one token
            weight.data.normal_(std=0.15)
    model.save_pretrained(folder)
    for file in (art.ROOT / art.TOY).glob("token*"):
        shutil.copy(file, folder)
    return model


def expected_texts(model, prompts):
    """(greedy token ids for each prompt alone, end): `end` ends the texts at different lengths."""
    texts = [model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)[0, len(ids):]
             .tolist() for ids in prompts]
    def cut(end):
        return [text[:(text + [end]).index(end) + 1] for text in texts]
    end = max(sorted({*sum(texts, [])}), key=lambda token: len({*map(len, cut(token))}))
    return cut(end), end


def compare(name, folder, flags):
    """(table row, are all results equal?) of one architecture."""
    model, llm = save(name, folder), art.Local(flags, str(folder), 32)
    *prompts, begun = llm.tokenizer([*PROMPTS, "Refine:"])["input_ids"]
    yes, no = (llm.tokenizer(word)["input_ids"][-1] for word in ("Refine: Yes", "Refine: No"))
    texts, end = expected_texts(model, prompts)
    model.generation_config.eos_token_id = [1, end]
    model.generation_config.save_pretrained(folder)  # the kit loads the model after this
    with torch.inference_mode():
        logits = [model(torch.tensor([ids + begun])).logits[0, -1] for ids in prompts]
    p = [(row[yes] - row[no]).sigmoid().item() for row in logits]
    llm.tokenizer.decode = lambda ids, **settings: str(ids)  # compares token by token
    written = [output["text"] for [output] in llm.generate(PROMPTS, 40)]
    equal = sum(map(str.__eq__, written, map(str, texts)))
    outputs = llm.choose(PROMPTS, ["Refine:"] * len(PROMPTS), (" Yes", " No"))
    off = max(abs(output["p"] - value) for output, value in zip(outputs, p))
    with torch.inference_mode():
        size = flags.kv_gib * 2**30 / llm.token_budget()
    row = f"{equal} of 6 equal, p {min(p):.2f} to {max(p):.2f} off by {off:.0e}, {size:4.0f} bytes"
    return row, equal == 6 and off < 1e-5 and len({*map(len, texts)}) > 1


def train(name, folder, flags, role, bits):
    """(table row, is the saved adapter equal?) of an Asker or a Truster after one step."""
    scorer, adapter = role == "Truster", folder / "adapter"
    save(name, folder)
    ids, mask = art.pad_left(art.load_tokenizer(str(folder))(PROMPTS)["input_ids"], 0)
    def predict(model):  # scores, or logits of the next token
        if scorer:
            return art.score_batch(model, ids, mask)
        return model(input_ids=ids, attention_mask=mask).logits[:, -1]
    model = art.load_base(str(folder), bits, scorer)
    model = art.add_lora(model, "SEQ_CLS" if scorer else "CAUSAL_LM", rank=4).train()
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    before = predict(model)
    before.square().mean().backward()
    idle = sum(weight.grad is None or not weight.grad.any() for key, weight in trained.items()
               if "lora_A" not in key)  # matrix B is zero, so A has no gradient in the first step
    torch.optim.AdamW(trained.values(), lr=0.01).step()
    model.eval().save_pretrained(adapter)
    fresh = art.Local(flags, str(folder), bits, adapter, scorer)
    fresh.load()
    with torch.inference_mode():
        after, again = predict(model), predict(fresh.model)
    moved, off = ((other - after).abs().max().item() for other in (before, again))
    row = f"moved by {moved:.2f}, reloaded off by {off:.0e}, {idle} of {len(trained)} idle"
    return row, moved > 1e-3 and off < 1e-5 and not idle


def measure(work, name, *settings):
    """Print one table row. Returns whether all results are equal, or the kit refuses the model."""
    start, label = time.time(), "".join(f"{part!s:13}" for part in (name, *settings))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = SimpleNamespace(shared=Path(folder), kv_gib=0.25, sample_seed=0)
        try:
            row, equal = work(name, Path(folder), flags, *settings)
        except Exception as error:  # one row; the others are still measured
            equal = isinstance(error, art.UserError)
            row = f"{'refused' if equal else 'FAILED'}: {error}".replace(folder, name)
    print(f"{label}{row}, {time.time() - start:.1f} s", flush=True)
    return equal


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CONFIGS))
    parser.add_argument("--train", action="store_true", help="train, save and reload instead")
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster: the models are tiny
    transformers.logging.disable_progress_bar()
    jobs = [(compare, name) for name in args.names or CONFIGS]
    if args.train:
        jobs = [(train, name, role, bits)
                for name in args.names or ("llama", "gemma3_text", "qwen3_5_text", "lfm2")
                for role in ("Asker", "Truster") for bits in (32, 4)]
    sys.exit(not all([measure(*job) for job in jobs]))


if __name__ == "__main__":
    art.run(main)
