"""Pretrain the bundled base model of the toy task: a Llama of 1.9 M parameters and its tokenizer, into data/toy/base.

    python data/toy/pretrain.py                 # 25 minutes on two CPU cores

The text imitates writers who read with different care. In plain answers, self-checks and plain revisions they are
*careless*: each trap of a problem catches them with probability 0.6. Who writes sub-questions out before answering, or
marks homework, is *careful* (0.08), and who revises along given sub-questions follows them; but who revises also likes
to use every number in sight, asked for or not. So the model knows better than it answers, good sub-questions bring that
out, its own ones share the blind spots of its answers, and revising breaks right answers too. All prompts are art.py's.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
from prepare import Reading, draw_problem, for_pretraining, solve

import art

CARELESS, CAREFUL = 0.6, 0.08  # chance that a trap catches the reader
OVERDOING = 0.85  # chance that a reviser adds a basket nobody asked about
KINDS = {"predict": 30, "decomp": 12, "check": 14, "refine": 24, "refine_plain": 8, "choose": 4, "mark": 8}  # per cent


def read(rng, rate, basket):
    """A reading in which each trap catches with the given rate, and the basket with its own."""
    return Reading((rng.random() < rate, rng.random() < rate), rng.random() < rate, rng.random() < rate,
                   rng.random() < basket)


def attempt(rng, problem, rate, basket=0.03):
    """(sub-questions, text of a plain answer, answer) of a reader."""
    reading = read(rng, rate, basket if problem.basket else 0)
    solution, answer = solve(problem, reading)
    return [subquestion for subquestion, _ in solution], art.solution_text(solution, answer), answer


def wrong_first(rng, problem):
    """A careless draft, drawn once more where it is right: who revises mostly has a reason to."""
    gold = solve(problem, Reading())[1]
    draft = attempt(rng, problem, CARELESS)
    return draft if draft[2] != gold else attempt(rng, problem, CARELESS)


def document(rng):
    """One text of the pretraining corpus: prompt and continuation, on a question of the pretraining half."""
    problem = draw_problem(rng)
    record = {"question": problem.text()}
    if not for_pretraining(record["question"]):
        return document(rng)
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    if kind == "predict":
        return art.predict_prompt(record) + attempt(rng, problem, CARELESS)[1]
    if kind == "decomp":
        solution, answer = solve(problem, read(rng, CAREFUL, 0))
        return art.predict_prompt(record, "decomp") + art.solution_text(solution, answer, "decomp")
    if kind == "check":  # reads the question again, as carelessly, and compares
        draft, again = attempt(rng, problem, CARELESS), attempt(rng, problem, CARELESS)
        return art.ask_prompt(record, draft[1]) + art.ask_target(again[0], draft[2] != again[2])
    if kind == "refine":  # along sub-questions of another careless reader: who asks himself asks as he answers
        draft = wrong_first(rng, problem)
        reading = read(rng, CARELESS, 0)
        subquestions = [subquestion for subquestion, _ in solve(problem, reading)[0]]
        reading.basket = problem.basket is not None and rng.random() < OVERDOING
        return art.refine_prompt(record, draft[1], subquestions) + art.solution_text(*solve(problem, reading))
    if kind == "refine_plain":
        draft = wrong_first(rng, problem)
        return art.refine_prompt(record, draft[1]) + attempt(rng, problem, CARELESS, OVERDOING)[1]
    if kind == "choose":
        first, second, again = (attempt(rng, problem, CARELESS) for _ in range(3))
        if first[2] == second[2]:
            return document(rng)
        better = "A" if again[2] == first[2] else "B" if again[2] == second[2] else rng.choice("AB")
        return art.choice_prompt(record, first[1], second[1]) + better
    draft, again = attempt(rng, problem, CARELESS), attempt(rng, problem, CAREFUL)
    return f"{art.trust_prompt(record, draft[1])}\nMark: {'right' if draft[2] == again[2] else 'wrong'}"


def make_tokenizer(texts):
    """Byte-level BPE of 512 entries in which every digit stands alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   model_max_length=1024)


def batch(tokenizer, seed, step, rows, length):
    """(rows, length) token ids; each row begins with a document. Follows from seed and step alone."""
    rng, lines = random.Random(f"pretrain {seed} {step}"), []
    for _ in range(rows):
        line = []
        while len(line) < length:
            line += tokenizer(document(rng))["input_ids"] + [tokenizer.eos_token_id]
        lines.append(line[:length])
    return torch.tensor(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="of 2,048 tokens each (6000: the loss is flat by then)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak, after 100 steps; linear (3e-3: largest stable)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text (0)")
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder of the result (data/toy/base)")
    args = parser.parse_args()
    rng = random.Random(f"tokenizer {args.seed}")
    tokenizer = make_tokenizer(document(rng) for _ in range(3000))
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * max(0, 1 - step / args.steps))
    entries, losses = [], []
    began = time.time()
    for step in range(args.steps):
        rows = batch(tokenizer, args.seed, step, 8, 256)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sys.exit(f"the loss is {losses[-1]} at step {step + 1}: lower --lr")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            entries.append({"step": step + 1, "tokens": (step + 1) * 2048, "loss": round(sum(losses) / len(losses), 4),
                            "seconds": round(time.time() - began)})
            losses = []
            art.write(args.out / "loss.jsonl", entries)
            print(entries[-1], flush=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
