"""How fast is the kit, compared with what one would use instead? Side by side in one process.

    python docs/measure/speed.py --model FOLDER --data data/gsm8k/test.jsonl

    generate   a chat model answers 32 questions, greedy; against transformers' `generate` in
               batches of 8 and of 32, sorted by length
    asker      its training against TRL's SFTTrainer: same examples, batches, steps and LoRA
    truster    its training against TRL's RewardTrainer on all pairs of the same questions

The contestants take turns, one turn each in a round. A line has the median of the seconds, and the
median and range of the ratio in a round. Loading is not timed. On a CPU these are CPU seconds (give
OMP_NUM_THREADS=1), so other programs do not count. The trainings need TRL: pip install trl.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art
import train_asker
import train_truster

CUDA = torch.cuda.is_available()
QUESTIONS, BATCH = 32, 8  # to answer; examples (Asker) or questions (Truster) in a step


def clock():
    """Seconds, once the device has done all its work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() if CUDA else time.process_time()


def race(contestants, rounds):
    """Let the contestants, {name: function that returns (seconds, note)}, take turns."""
    turns = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            with contextlib.redirect_stdout(sys.stderr):
                turns[name].append(work())
    for name, found in turns.items():
        ratios = [theirs / ours for (theirs, _), (ours, _) in zip(found, turns["the kit"])]
        seconds, ratio = median(seconds for seconds, _ in found), median(ratios)
        print(f"| {name} | {seconds:.1f} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
              f"{found[0][1]} |", flush=True)


def load(args, kit, scorer=False):
    """A frozen model: as the kit loads it, or without its own products on a CPU."""
    with contextlib.nullcontext() if kit else mock.patch.object(art, "use_onednn"):
        return art.load_base(args.model, args.bits, scorer)


def generation(args, records):
    """{name: contestant}: who writes answers to the same prompts?"""
    llm, plain = art.Local(args, args.model, args.bits), load(args, kit=False)
    llm.load()  # not timed
    pad = llm.tokenizer.pad_token_id
    prompts = [art.render(llm, args, art.predict_prompt(record), "cot") for record in records]
    prompts = sorted((llm.tokens(prompt, "")[0] for prompt in prompts), key=len)
    ends = plain.generation_config.eos_token_id
    plain.generation_config = transformers.GenerationConfig(  # without penalties
        max_new_tokens=args.max_new_tokens, pad_token_id=pad, eos_token_id=ends)

    def kit():
        llm.cache.execute("DELETE FROM answers")
        began, outputs = clock(), art.predict(llm, args, records)
        return clock() - began, f"{sum(one['tokens'] for one in outputs):,} tokens written"

    def generate(size):
        began, written = clock(), 0
        for start in range(0, len(prompts), size):
            ids, mask = art.pad_left(prompts[start: start + size], pad, plain.device)
            new = plain.generate(ids, attention_mask=mask)[:, ids.shape[1]:]
            written += int((new != pad).sum())
        return clock() - began, f"{written:,} tokens written"

    return {"the kit": kit, "`generate`, batches of 8": partial(generate, 8),
            "`generate`, batches of 32": partial(generate, 32)}


def training(args, records, name):
    """{name: contestant}: who trains for one pass over the same examples?"""
    tokenizer, lines = art.load_tokenizer(args.model), {}
    pad = tokenizer.pad_token_id
    for place, record in enumerate(records):  # two correct and two incorrect answers to each
        answers = [(record["answer"], True), ("-1", False)] * 2
        lines[record["id"]] = {"samples": [
            {"text": art.solution_text(records[place - step]["solution"], answer),
             "correct": correct, "failed": ""} for step, (answer, correct) in enumerate(answers)]}
    if name == "asker":
        script, kind, at_once, rival = train_asker, "CAUSAL_LM", 4, "SFTTrainer"
        gold = {record["id"]: art.gold_subquestions(record) for record in records}
        examples = script.ask_examples(script.drafts_of(args, records, lines), gold, tokenizer)
    else:
        script, kind, at_once, rival = train_truster, "SEQ_CLS", 1, "RewardTrainer"
        examples = script.contrast(records, lines, tokenizer)

    def turn(kit):
        model = art.add_lora(load(args, kit, scorer=name == "truster"), kind, 16)
        with tempfile.TemporaryDirectory() as folder:
            train = partial(art.fine_tune, model, examples, partial(script.collate, pad),
                            script.loss, args, Path(folder), BATCH, at_once, epochs=1)
            if not kit:
                train = trl_trainer(args, model, tokenizer, examples, rival, folder).train
            began = clock()
            train()
            return clock() - began, f"{len(examples)} examples"

    return {"the kit": partial(turn, True), f"TRL's {rival}": partial(turn, False)}


def trl_trainer(args, model, tokenizer, examples, rival, folder):
    """TRL's trainer, with the kit's examples in the kit's order and batches."""
    import trl  # isort: skip
    import datasets
    order, rows = random.Random(f"{args.seed} 0").sample(examples, len(examples)), []
    for start in range(0, len(order), BATCH):
        for one in sorted(order[start: start + BATCH], key=lambda one: len(one["input_ids"])):
            if rival == "SFTTrainer":
                ids, prompt = one["input_ids"], len(one["input_ids"]) - one["target"]
                rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
            else:  # the four pairs of a question are one batch
                rows += [{"chosen_ids": one["rows"][good], "rejected_ids": one["rows"][bad]}
                         for good in (0, 2) for bad in (1, 3)]
    dtype, steps = model.get_input_embeddings().weight.dtype, -(-len(examples) // BATCH)
    settings = getattr(trl, rival.replace("Trainer", "Config"))(
        output_dir=folder, num_train_epochs=1, optim="adamw_torch", save_strategy="no",
        per_device_train_batch_size=4, train_sampling_strategy="sequential", max_length=None,
        gradient_accumulation_steps=len(rows) // 4 // steps, use_cpu=not CUDA,
        report_to="none", disable_tqdm=True, gradient_checkpointing=False,  # the kit switches it on
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    return getattr(trl, rival)(model, settings, train_dataset=datasets.Dataset.from_list(rows),
                               processing_class=tokenizer)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of a chat model")
    add("--data", required=True, help="a file of GSM8K's records, as data/prepare.py writes")
    add("--only", default="generate,asker,truster", help="some of generate, asker, truster")
    add("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    add("--bits", type=int, default=4 if CUDA else 32, help="of the weights (32; on a GPU 4)")
    add("--rounds", type=int, default=3, help="turns of each contestant (default 3)")
    args = parser.parse_args()
    records = art.read_jsonl(args.data, "run python data/prepare.py gsm8k")[:QUESTIONS]
    with tempfile.TemporaryDirectory() as folder:
        args = argparse.Namespace(**art.DEFAULTS | vars(args), task="gsm8k", shared=Path(folder),
                                  seed=0, save_steps=10**9, report_to=None)
        print("| contestant | seconds | times the kit's | |\n| --- | --- | --- | --- |")
        for name in args.only.split(","):
            race(generation(args, records) if name == "generate"
                 else training(args, records[:BATCH], name), args.rounds)


if __name__ == "__main__":
    art.run(main)
