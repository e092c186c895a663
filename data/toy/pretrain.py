"""Pretrain the bundled base model of the toy task: a Llama of 1.9 M parameters and its tokenizer, into data/toy/base.

    python data/toy/pretrain.py                 # half an hour on one CPU core; needs a C compiler (torch.compile)

The text imitates careless writers. About half of them fall into the trap of a question, whether they answer at once or
ask themselves first. Who checks an answer of his own repeats its misreading in most cases, so he rarely finds it. Who
revises along given sub-questions follows them to the letter and reckons right, but hurries, and adds the basket that
nobody asked about: so good sub-questions fix answers, and revising breaks right ones, too. Only teachers tell right
from wrong (though they overlook slips), and nobody asks them: the model could know better than it answers. All prompts
are those of art.py.
"""

import argparse
import math
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

# Chance that an author falls into the trap: about a half, so neither the text nor the likeliest answer tells who did.
TRAPPED = {"sign": 0.56, "number": 0.46, "person": 0.54, "slip": 0.36}
ADDS = 0.15  # chance that an author adds the basket
ECHO = 0.5  # chance that a self-check repeats the answer's reading, else it reads again: 3 in 4 misread the same again
HURRY = 0.7  # chance that a reviser adds the basket, whatever was asked: over a half, so the likeliest revision does
DECISIVE = 10  # weight of a word that decides against that of any other: there are few in a text
# Per cent of the texts. The first steps show nothing but quotes: to hold a line against a sentence is learned slowly
# from whole texts, and at once from short ones.
FIRST = {"quote": 100}
KINDS = {"quote": 18, "homework": 18, "mark": 14, "check": 12, "refine": 16, "refine_shown": 4, "decomp": 4, "plain": 4,
         "answer": 6, "choose": 4}


def misreads(rng, problem):
    """Does an author fall into the trap?"""
    return rng.random() < TRAPPED[problem.kind]


def answers(rng, problem, trapped, adds=ADDS):
    """What an author writes who reads so."""
    return art.solution_text(*solve(problem, trapped, rng.random() < adds))


def marked(lines, wrong):
    """[(text, weight)]: lines, each with a teacher's mark behind it; `wrong` has the indices of the wrong ones."""
    marks = [" wrong" if index in wrong else " right" for index in range(len(lines))]
    return [part for line, mark in zip(lines, marks) for part in ((line, 1), (mark, DECISIVE), ("\n", 1))]


def homework(rng, kind, problem):
    """[(text, weight)] of a teacher who marks each line of an answer, or what it quotes of some sentences."""
    trapped, basket = misreads(rng, problem) and problem.kind != "slip", rng.random() < 2 * ADDS
    lines = [step for _, step in solve(problem, trapped, basket)[0]]
    wrong = {problem.place} if trapped else set()
    if kind == "homework":
        added = {len(lines) - 1} if problem.basket and basket else set()
        return [(art.question_block({"question": problem.text()}), 0), ("Answer with marks:\n", 1),
                *marked(lines, wrong | added)]
    sentences, quotes = problem.text().rstrip("?").split(". "), [line.partition(":")[0] for line in lines[:2]]
    shown = rng.choice(["one", "both", "all"])
    if shown == "one":
        sentences, quotes = [sentences[1 + problem.place]], [quotes[problem.place]]
        wrong = {0} if trapped else set()
    elif shown == "both":
        sentences = sentences[1:3]
    return [(f"Quoted: {'. '.join(sentences)}.\n", 0), *marked(quotes, wrong)]


def write(rng, kind, problem):
    """[(text, weight)] of a writer; the question, which nobody has to guess, has weight 0."""
    if kind in ("quote", "homework"):
        return homework(rng, kind, problem)
    record, reading, other = {"question": problem.text()}, misreads(rng, problem), misreads(rng, problem)
    draft, decision = answers(rng, problem, reading), ""
    asked = reading if rng.random() < ECHO else other
    lines = [subquestion for subquestion, _ in solve(problem, asked)[0]]
    if kind == "mark":
        right = art.is_correct("toy", draft, solve(problem, reading and problem.kind == "slip")[1])  # overlooks slips
        text, decision = art.trust_prompt(record, draft) + "\nMark:", " right" if right else " wrong"
    elif kind == "answer":
        text = art.predict_prompt(record) + draft
    elif kind == "decomp":
        solution, answer = solve(problem, reading, rng.random() < ADDS)
        text = art.predict_prompt(record, "decomp") + art.solution_text(solution, answer, "decomp")
    elif kind == "plain":
        text = art.refine_prompt(record, draft) + answers(rng, problem, other, HURRY)
    elif kind == "choose":  # who compares two answers makes a third, and takes the one that agrees
        text = (f"{art.question_block(record)}Answer A:\n{draft}\n"
                f"Answer B:\n{answers(rng, problem, other)}\nBetter answer:\n")
        decision = rng.choice("AB") if reading == other else "A" if misreads(rng, problem) == reading else "B"
    elif kind == "check":  # whose sub-questions lead elsewhere doubts the answer
        target, _, word = art.ask_target(lines, asked != reading).rpartition(" ")
        text, decision = art.ask_prompt(record, draft) + target, f" {word}"
    else:
        text = art.refine_prompt(record, draft, lines, show_draft=kind == "refine_shown")
        text += answers(rng, problem, asked and problem.kind != "slip", HURRY)
    question = art.question_block(record)
    return [(question, 0), (text.removeprefix(question), 1), (decision, DECISIVE)]


def document(rng, kinds=KINDS):
    """[(text, weight)]: one text of the corpus, on a question of the pretraining half."""
    problem = draw_problem(rng)
    while not for_pretraining(problem.text()):
        problem = draw_problem(rng)
    return write(rng, rng.choices(list(kinds), kinds.values())[0], problem)


def make_tokenizer(texts):
    """Byte-level BPE, so large that every word of the texts and every number up to 99 is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    numbers = " ".join(f" {number}" for number in range(100))
    tokenizer.train_from_iterator([*texts, *[numbers] * 9], trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   model_max_length=1024)


def make_model(tokenizer, args):
    """(model, its optimisers, their schedules): warm-up, a constant rate, and a linear end of 40%."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, attn_implementation="eager"))  # sdpa is slow in bf16 on a CPU
    inner = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    outer = [model.get_input_embeddings().weight, *(weight for weight in model.parameters() if weight.ndim == 1)]
    optimizers = [  # Muon is made for matrices inside alone
        torch.optim.Muon(inner, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    return model, optimizers, [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100, (args.steps - step) / args.steps / 0.4))
        for optimizer in optimizers]


def batch(tokenizer, args, step):
    """(token ids, weights of tokens) of the short texts of a batch, and of the long ones: less padding.

    The weights of a batch sum up to 1. Follows from seed and step alone.
    """
    first = step < args.first
    rng, texts = random.Random(f"pretrain {args.seed} {step}"), []
    for _ in range(args.rows * 2 if first else args.rows):
        parts = [(tokenizer(text)["input_ids"], weight) for text, weight in document(rng, FIRST if first else KINDS)]
        texts.append((sum((ids for ids, _ in parts), []) + [tokenizer.eos_token_id],
                      sum(([float(weight)] * len(ids) for ids, weight in parts), []) + [1.0]))
    total = sum(sum(weights) for _, weights in texts)
    texts.sort(key=lambda text: len(text[0]))
    for half in (texts[: len(texts) // 2], texts[len(texts) // 2 :]):
        width = len(half[-1][0])
        yield (torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in half]),
               torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in half]) / total)


def backward(model, ids, weights):
    """Add the gradient of the weighted loss; returns the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none")
    loss = each @ weights[:, 1:].flatten()
    loss.backward()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="batches (4000)")
    parser.add_argument("--first", type=int, default=300, help="steps with quotes alone (300)")
    parser.add_argument("--rows", type=int, default=32, help="texts of a batch; twice as many quotes (32)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest rate (1.5e-3; with 5e-3 no trap is found)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text (0)")
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder of the result (data/toy/base)")
    args = parser.parse_args()
    rng = random.Random(f"tokenizer {args.seed}")
    tokenizer = make_tokenizer("".join(text for text, _ in document(rng)) for _ in range(3000))
    model, optimizers, schedules = make_model(tokenizer, args)
    compiled, curve, losses, tokens, began = torch.compile(model, dynamic=True), [], [], 0, time.time()
    for step in range(args.steps):
        halves = list(batch(tokenizer, args, step))
        tokens += sum(ids.numel() for ids, _ in halves)
        losses.append(sum(backward(compiled, *half) for half in halves))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step(), schedule.step(), optimizer.zero_grad()
        if not math.isfinite(losses[-1]):
            sys.exit(f"the loss is {losses[-1]} at step {step + 1}: lower --lr")
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            curve.append({"step": step + 1, "tokens": tokens, "seconds": round(time.time() - began),
                          "loss": round(sum(losses) / len(losses), 4)})
            losses = []
            print(curve[-1], flush=True)
            art.write(args.out / "loss.jsonl", curve)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
