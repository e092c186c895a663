"""Pretrain the bundled base model of the toy task: a Llama of 1.9 M parameters and its tokenizer, into data/toy/base.

    python data/toy/pretrain.py                 # stopped and started again it goes on

The text imitates careless writers. Half of them fall into the trap of a question, whether they answer at once or ask
themselves first. Who checks an answer of his own repeats his misreading in most of the sub-questions, so he finds slips
at best. Who revises along given sub-questions follows them to the letter, but hurries, and forgets to borrow: so good
sub-questions mend what was misread, and revising breaks right answers, too. Only who marks homework tells right from
wrong, and nobody asks him: the model could know better than it answers. All prompts are art.py's.
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
from prepare import Reading, draw_problem, for_pretraining, solve

import art

TRAPPED = 0.5  # chance that an author falls into the trap: neither the text nor the likeliest answer tells who did
SLIP = 0.07  # chance that an author forgets a ten, in each sum that passes one: the trap is not all that goes wrong
ECHO = 0.5  # chance that a self-check repeats the answer's reading, else it reads anew: 3 in 4 misread the same again
HURRY = 0.65  # chance that a reviser forgets to borrow: over a half, so the likeliest revision forgets it, too
UNSURE = 0.05  # chance that a teacher marks wrongly: nobody is perfect
DECISIVE = 10  # weight of the word that decides against that of any other: there is only one in a text
KINDS = {"check": 36, "refine": 13, "refine_unseen": 10, "decomp": 7, "plain": 5, "choose": 5, "mark": 24}  # per cent


def some(rng, rate):
    """Each of five steps with that chance."""
    return frozenset(step for step in range(5) if rng.random() < rate)


def read(rng):
    """How an author reads and reckons."""
    return Reading(rng.random() < TRAPPED, carries=some(rng, SLIP), borrows=some(rng, SLIP))


def revision(rng, problem, reading):
    """What a reviser writes who reads so."""
    return art.solution_text(*solve(problem, Reading(reading.trapped, borrows=some(rng, HURRY))))


def write(rng, kind, problem, record):
    """(text, the word that decides, if any) of a writer."""
    reading, other = read(rng), read(rng)
    solution, answer = solve(problem, reading)
    draft = art.solution_text(solution, answer)
    if kind == "decomp":
        return art.predict_prompt(record, "decomp") + art.solution_text(solution, answer, "decomp"), ""
    if kind == "plain":
        return art.refine_prompt(record, draft) + revision(rng, problem, other), ""
    if kind == "choose":  # who compares two answers makes a third, and takes the one that agrees
        second, third = solve(problem, other)[1], solve(problem, read(rng))[1]
        better = "A" if third == answer else "B" if third == second else rng.choice("AB")
        return art.choice_prompt(record, draft, art.solution_text(*solve(problem, other))), better
    if kind == "mark":
        right = (answer == solve(problem, Reading())[1]) == (rng.random() >= UNSURE)
        return art.trust_prompt(record, draft) + "\nMark:", " right" if right else " wrong"
    asked = reading if rng.random() < ECHO else other
    lines = [subquestion for subquestion, _ in solve(problem, asked)[0]]
    if kind == "check":  # whose sub-questions lead elsewhere doubts the answer
        found = solve(problem, Reading(asked.trapped))[1]
        text, _, word = art.ask_target(lines, found != answer).rpartition(" ")
        return art.ask_prompt(record, draft) + text, f" {word}"
    return art.refine_prompt(record, draft, lines, show_draft=kind == "refine") + revision(rng, problem, asked), ""


def document(rng):
    """(question, what is written below it, the word that decides): a text, on a question of the pretraining half."""
    problem = draw_problem(rng)
    while not for_pretraining(problem.text()):
        problem = draw_problem(rng)
    record = {"question": problem.text()}
    question = art.question_block(record)
    text, word = write(rng, rng.choices(list(KINDS), KINDS.values())[0], problem, record)
    return question, text.removeprefix(question), word


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
    optimizers = [  # Muon needs a third of the text that AdamW needs, but is made for matrices inside alone
        torch.optim.Muon(inner, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    return model, optimizers, [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100, (args.steps - step) / args.steps / 0.4))
        for optimizer in optimizers]


def batch(tokenizer, seed, step, rows):
    """(token ids, weights of tokens) of the short texts of a batch, and of the long ones: less padding.

    The weights of a batch sum up to 1, those of a question are 0. Follows from seed and step alone.
    """
    rng, texts = random.Random(f"pretrain {seed} {step}"), []
    for _ in range(rows):
        question, text, word = (tokenizer(part)["input_ids"] for part in document(rng))
        texts.append((question + text + word + [tokenizer.eos_token_id],
                      [0.0] * len(question) + [1.0] * len(text) + [DECISIVE] * len(word) + [1.0]))
    total = sum(sum(weights) for _, weights in texts)
    texts.sort(key=lambda text: len(text[0]))
    for half in (texts[: rows // 2], texts[rows // 2:]):
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
    parser.add_argument("--steps", type=int, default=6000, help="batches (6000)")
    parser.add_argument("--rows", type=int, default=24, help="texts of a batch (24)")
    parser.add_argument("--lr", type=float, default=5e-3, help="highest rate (5e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text (0)")
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder of the result (data/toy/base)")
    args = parser.parse_args()
    rng = random.Random(f"tokenizer {args.seed}")
    tokenizer = make_tokenizer("".join(document(rng)) for _ in range(3000))
    model, optimizers, schedules = make_model(tokenizer, args)
    parts, kept, curve, start, began = [model, *optimizers, *schedules], args.out / "checkpoint.pt", [], 0, time.time()
    if kept.is_file():
        states, curve, start = torch.load(kept)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        began -= curve[-1]["seconds"]
    losses, tokens = [], curve[-1]["tokens"] if curve else 0
    for step in range(start, args.steps):
        halves = list(batch(tokenizer, args.seed, step, args.rows))
        tokens += sum(ids.numel() for ids, _ in halves)
        losses.append(sum(backward(model, *half) for half in halves))
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
            torch.save(([part.state_dict() for part in parts], curve, step + 1), f"{kept}.part")
            Path(f"{kept}.part").replace(kept)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
