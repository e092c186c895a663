"""Pretrain the two base models of the toy task: small Llamas and their tokenizer.

    python data/toy/pretrain.py                      # data/toy/base, of the LLM
    python data/toy/pretrain.py --width 64 --steps 2000 --out data/toy/base_asker

The second one is the base of the Asker and the Truster.

torch.compile needs a C compiler. The text imitates writers. About half of them misread the
question. A writer who revises follows the given sub-questions, but often stops one step early or
gets the last sum wrong, whatever the draft was. A writer who checks a draft usually repeats its
misreading. A writer who marks adds "right" or "wrong" to each line. All prompts are those
of art.py.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
from prepare import draw_problem, for_pretraining, solve

import art

# Chances. At temperature 0.7 the likelier choice is sampled still more often: 0.28 becomes 0.21.
TRAPPED = 0.50  # a writer misreads the question: a half, so no answer is the likelier one
EARLY = 0.15  # a writer stops one step early
EARLY_REVISION = 0.29  # the same for a revision
SLIP = 0.42  # the last sum of a revision is wrong
ECHO = 0.5  # a check repeats the reading of the draft; otherwise it reads the question again
SHARES = {"marks": 40, "answer": 10, "decomp": 5, "check": 15, "refine": 30}  # of the texts
DECISIVE = ["Ġright", "Ġwrong", "ĠYes", "ĠNo"]  # tokens that weigh ten times as much in the loss


def write(rng, kind, problem):
    """A text of this kind about a problem."""
    def chance(p):
        return rng.random() < p

    record, trapped, early = {"question": problem.text()}, chance(TRAPPED), chance(EARLY)
    solution, answer = solve(problem, trapped, early)
    if kind == "marks":
        lines = [art.question_block(record) + "Answer with marks:"]
        for index, (_, step) in enumerate(solution):
            lines.append(step + (" wrong" if trapped and index == problem.place else " right"))
        lines.append(f"#### {answer} {'wrong' if trapped or early else 'right'}")
        return "\n".join(lines)

    if kind in ("answer", "decomp"):
        strategy = "cot" if kind == "answer" else "decomp"
        return (art.predict_prompt(record, strategy)
                + art.solution_text(solution, answer, strategy))

    draft = art.solution_text(solution, answer)
    asked = trapped if chance(ECHO) else chance(TRAPPED)  # how the sub-questions read the question
    subquestions = [subquestion for subquestion, _ in solve(problem, asked)[0]]
    if kind == "check":
        return art.ask_prompt(record, draft) + art.ask_target(subquestions, asked != trapped)
    subquestions = [] if chance(0.2) else subquestions
    revised = solve(problem, asked, chance(EARLY_REVISION), chance(SLIP))
    return (art.refine_prompt(record, draft, subquestions, show_draft=chance(0.2))
            + art.solution_text(*revised))


def document(rng, size=2):
    """A text on a question of the pretraining half; the short questions have marks."""
    while True:
        problem = draw_problem(rng, size)
        if for_pretraining(problem.text()):
            [kind] = rng.choices(list(SHARES), SHARES.values())
            return write(rng, kind if size == 2 else "marks", problem) + "<eos>"


def make_tokenizer():
    """Byte-level BPE in which every word and every number up to 199 is one token."""
    rng, numbers = random.Random("tokenizer"), [f" {number}" for number in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [document(rng).removesuffix("<eos>") for _ in range(3000)] + numbers * 9
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   eos_token="<eos>", model_max_length=1024)


def make_model(tokenizer, width):
    """A Llama of four layers with random weights."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width // 24 * 64,
        num_hidden_layers=4, num_attention_heads=width // 32, tie_word_embeddings=True,
        max_position_embeddings=1024, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, attn_implementation="eager"))  # sdpa is slow here


def mean_loss(model, tokenizer, texts):
    """The weighted mean over the tokens. Nobody has to guess the question: its weight is 0."""
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    newline, *decisive = tokenizer.convert_tokens_to_ids(["Ċ", *DECISIVE])
    weights = 1.0 + 9 * torch.isin(ids, torch.tensor(decisive))
    weights *= ((ids == newline).cumsum(1) > 0) & (ids != tokenizer.pad_token_id)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses @ weights[:, 1:].flatten() / weights[:, 1:].sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--width", type=int, default=192, help="of the model (192)")
    add("--steps", type=int, default=2400, help="of 32 texts; the first 300 are of short questions")
    add("--lr", type=float, default=1.5e-3, help="highest learning rate (1.5e-3)")
    add("--seed", type=int, default=0, help="of weights and text (0)")
    add("--out", type=Path, default=HERE / "base", help="folder of the result (data/toy/base)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.width)
    compiled, curve, losses, began = torch.compile(model, dynamic=True), [], [], time.time()
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    others.append(model.get_input_embeddings().weight)
    optimizers = [  # Muon is made for the matrices of the layers alone
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]

    for step in range(args.steps):
        rng, short = random.Random(f"pretrain {args.seed} {step}"), step < 300
        texts = [document(rng, 1 if short else 2) for _ in range(64 if short else 32)]
        texts.sort(key=len)  # the short half, then the long one: less padding
        half, loss = len(texts) // 2, 0.0
        for part in (texts[:half], texts[half:]):
            part_loss = mean_loss(compiled, tokenizer, part) / 2
            part_loss.backward()
            loss += part_loss.item()
        losses.append(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # warm-up, a constant rate, and a linear end of 40%
        rate = args.lr * min(1, (step + 1) / 100, (args.steps - step) / args.steps / 0.4)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        model.zero_grad()
        if (step + 1) % 100 == 0:
            curve.append({"step": step + 1, "seconds": round(time.time() - began),
                          "loss": round(sum(losses[-100:]) / 100, 4)})
            print(curve[-1], flush=True)
            art.write(args.out / "loss.jsonl", curve)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
