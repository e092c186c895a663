"""Models of the presets without a download: their shapes, and random weights in the place of a checkpoint."""

import copy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import art

LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 32768, "head_dim": 128,
         "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36}


def shape(family, hidden, mlp, layers=None, heads=None, kv_heads=None, **more):
    """The settings of a model: its family's, and sizes of its own."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
             "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {**family, **{key: size for key, size in sizes.items() if size}, **more}


SHAPES = {  # as their config.json on the Hub has them
    "Qwen/Qwen2.5-0.5B-Instruct": shape(QWEN2, 896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": shape(QWEN2, 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-1.5B": shape(QWEN2, 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-7B-Instruct": shape(QWEN2, 3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "Qwen/Qwen3-4B-Base": shape(QWEN3, 2560, 9728, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": shape(QWEN3, 4096, 12288, tie_word_embeddings=False),
    "NousResearch/Llama-2-7b-hf": shape(LLAMA, 4096, 11008, 32, 32, 32),
    "NousResearch/Llama-2-13b-hf": shape(LLAMA, 5120, 13824, 40, 40, 40),
}
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000}


def config_of(name):
    """The configuration of a model, without the Hub."""
    import transformers
    sizes = {key: value for key, value in SHAPES[name].items() if key != "model_type"}
    return transformers.AutoConfig.for_model(SHAPES[name]["model_type"], **sizes, pad_token_id=0)


def device():
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_tokens(count, tiny):
    import torch
    return torch.randint(5, SMALL["vocab_size"] if tiny else 30_000, (count,)).tolist()


class RandomWeight:
    """A weight of a checkpoint that is not there: made when it is read, so that a model is quantised layer by layer."""

    def __init__(self, name, shape, dtype):
        self.name, self.shape, self.dtype = name, shape, dtype

    def __getitem__(self, where):
        import torch
        weight = torch.randn(self.shape, device=device(), dtype=self.dtype) * 0.02
        return weight + 1 if "norm" in self.name else weight


def use_random_models(dtype, tiny):
    """Let the kit load models with random weights of the shapes above, in the number format of a card."""
    import torch
    import transformers
    art.compute_dtype = lambda bits, compute="auto": getattr(torch, dtype) if device() == "cuda" else torch.float32
    tokenizer = art.load_tokenizer("data/toy/base")
    art.load_tokenizer = lambda name: tokenizer

    def loader(head):
        def load(name, dtype, use_safetensors, num_labels=None, pad_token_id=0, **settings):
            config = config_of(name)
            for key, value in {**(SMALL if tiny else {}), "num_labels": num_labels or 1}.items():
                setattr(config, key, value)
            with torch.device("meta"):
                empty = head.from_config(config)
            weights = {key: RandomWeight(key, weight.shape, dtype) for key, weight in empty.state_dict().items()
                       if not (config.tie_word_embeddings and key == "lm_head.weight")}
            return type(empty).from_pretrained(None, config=copy.deepcopy(config), state_dict=weights, dtype=dtype,
                                               **settings)
        return load

    for head in (transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification):
        head.from_pretrained = loader(head)
