"""Speed and memory, side by side with what one would use instead. One command a table, printed as Markdown.

    T="--task gsm8k-offline --model DIR_OF_SMOLLM2_135M_INSTRUCT"
    python tests/bench.py generate $T                  # 32 questions, greedy, against transformers' generate
    python tests/bench.py generate $T --k 4 --limit 12 # 4 samples each, against generate(num_return_sequences=4)
    python tests/bench.py asker $T                     # 64 examples, against TRL's SFTTrainer and a plain Trainer
    python tests/bench.py truster $T                   # 16 questions with 8 answers, against TRL's RewardTrainer
    python tests/bench.py demo                         # the five commands of the toy, seconds a step

TRL is needed for its rows alone: pip install trl. Contestants take turns (A B A B A B), each turn in a process of its
own; loading a model is not timed. Seconds are medians, the lowest and the highest; the ratio is theirs over the kit's
in each round. The peak is that of the process, on a GPU that of its tensors. `--at-least X`: exit code 1 if the kit is
less than X times as fast as a rival.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import art

# torch is imported in the turns alone: the memory of a process counts that of its parent when it was started

# --- Measuring


def clock():
    """Seconds, when all that was started on the device is done."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def turn(argv, name):
    """One turn of a contestant in a process of its own; returns what it reports."""
    command = [sys.executable, __file__, *argv, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise art.UserError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    made = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {made['seconds']:.1f} s", file=sys.stderr)
    return made


def spread(values, form=".1f"):
    """Median, lowest and highest as text."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def head(*columns):
    """The first two lines of a Markdown table."""
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")


def compare(args, argv, rivals):
    """Let the kit and its rivals take turns, print their table; refuse a rival that the kit does not beat enough."""
    if importlib.util.find_spec("trl") is None and any("TRL" in name for name in rivals):
        print("TRL is not installed, its row is left out: pip install trl", file=sys.stderr)
        rivals = [name for name in rivals if "TRL" not in name]
    rounds = [{name: turn(argv, name) for name in ["kit", *rivals]} for _ in range(args.rounds)]
    head("contestant", "seconds (lowest to highest)", "times the kit's", "peak MiB", "times the kit's", "")
    ratios = {}
    for name in rounds[0]:
        cells = [name]
        for key, unit, form in (("seconds", 1, ".1f"), ("peak", 2**20, ".0f")):
            ratios[name, key] = [made[name][key] / made["kit"][key] for made in rounds]
            cells += [spread([made[name][key] / unit for made in rounds], form), spread(ratios[name, key], ".2f")]
        print(f"| {' | '.join(cells)} | {rounds[0][name]['note']} |")
    for name in rivals if "texts" in rounds[0]["kit"] else ():
        ours, theirs = rounds[0]["kit"]["texts"], rounds[0][name]["texts"]
        print(f"\nTexts of {name} equal to those of the kit: {sum(map(str.__eq__, ours, theirs))} of {len(ours)}.")
    slow = [name for name in rivals if statistics.median(ratios[name, "seconds"]) < (args.at_least or 0)]
    if slow or args.at_least and not rivals:
        print(f"\nThe kit is not {args.at_least} times as fast as {', '.join(slow) or 'any rival here'}.")
        sys.exit(1)


def kit_args(args, folder, training=None, **flags):
    """The kit's own arguments for a task, as its parser makes them, with an empty folder of runs."""
    flags = {"task": args.task, "data": args.data, "runs": folder, "kv_gib": args.kv_gib, **flags}
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return art.parse(art.make_parser("", training), words, training=training or "asker")


# --- Generation


def plain_generate(self, batch, settings):
    """In the place of `Local.generate`: transformers' own, on the same padded prompts, with the same stop."""
    import torch
    import transformers

    class Stop(transformers.StoppingCriteria):
        """Ends the rows in whose last tokens the pattern is found."""

        def __call__(stop, ids, scores, **more):
            tails = self.tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - 16):], skip_special_tokens=True)
            return torch.tensor([bool(re.search(settings["stop"], tail)) for tail in tails], device=ids.device)

    pad, places = self.tokenizer.pad_token_id, [(name, number) for name, _, numbers in batch for number in numbers]
    ids, mask = art.pad_left([row for _, row, _ in batch], pad, self.base.device)
    start, how = ids.shape[1], {"do_sample": False}
    if settings["temperature"]:
        how = {"do_sample": True, "temperature": settings["temperature"], "top_k": 0, "top_p": 1.0,
               "num_return_sequences": len(batch[0][2])}
    out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=settings["max_new_tokens"],
                              pad_token_id=pad, stopping_criteria=[Stop()], **how)[:, start:].tolist()
    made = {}
    for place, row in zip(places, out):
        row = [token for token in row if token != pad]
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        match = re.search(settings["stop"], text)
        made[place] = {"text": text[: match.end() if match else None].strip(), "tokens": len(row), "logprob": 0.0,
                       "stopped": bool(match) or len(row) < settings["max_new_tokens"], "prompt_tokens": start}
    return made


def generate_turn(args, name, folder):
    """Answers to the questions behind the exemplars; both contestants get the kit's batches."""
    own = kit_args(args, folder, model=args.model, bits=args.bits, shots=args.shots, chat="no",
                   max_new_tokens=args.max_new_tokens)
    records = art.load_task(args.task, "test", args.limit, args.data)
    run = art.Run(own)
    lm = run.model("llm")
    if name != "kit":
        art.Local.generate, art.Local.read_prefix = plain_generate, lambda self, rows: None
    lm.backend = lm.load()
    began = clock()
    made = art.sample_answers(lm, own, records, args.k, 0.7 if args.k > 1 else 0.0)
    seconds, tokens = clock() - began, sum(one["tokens"] for several in made for one in several)
    result = {"seconds": seconds, "note": f"{tokens} tokens written, {tokens / seconds:.0f} a second"}
    return result if args.k > 1 else {**result, "texts": [one["text"] for (one,) in made]}


# --- Training. Model, LoRA, optimiser, batch size and examples are the kit's, in one pass; only the trainer changes.


def labelled(example):
    """An Asker's example as other trainers take it: the loss is on the target alone."""
    ids, target = example["input_ids"], example["target"]
    return {"input_ids": ids, "labels": [-100] * (len(ids) - target) + ids[-target:]}


def rival_trainer(name, args, model, tokenizer, examples, folder):
    """The trainer that a contestant uses in the place of the kit's."""
    import torch
    import transformers
    cuda = torch.cuda.is_available()
    settings = {
        "output_dir": folder, "num_train_epochs": 1, "learning_rate": args.lr, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05, "per_device_train_batch_size": args.batch_size, "optim": "adamw_torch", "seed": 0,
        "gradient_accumulation_steps": args.accumulate, "use_cpu": not cuda, "report_to": "none",
        "bf16": cuda and art.compute_dtype(args.adapter_bits) == torch.bfloat16, "save_steps": args.save_steps,
        "disable_tqdm": True, "gradient_checkpointing": False}  # on a GPU the kit's model has it already
    if name == "plain Trainer":  # pads on the right, logits at every position
        tokenizer.padding_side = "right"
        return transformers.Trainer(model, transformers.TrainingArguments(**settings),
                                    transformers.DataCollatorForSeq2Seq(tokenizer), list(map(labelled, examples)))
    import datasets
    import trl
    if name == "TRL SFTTrainer":
        data = datasets.Dataset.from_list(list(map(labelled, examples)))
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**settings, max_length=None), train_dataset=data,
                                 processing_class=tokenizer)
    else:  # every pair of a right and a wrong answer is an example; a batch has as many rows as the kit's
        pairs = [{"chosen_ids": right, "rejected_ids": wrong} for group in examples
                 for right, ok in zip(group["rows"], group["correct"]) if ok
                 for wrong, also in zip(group["rows"], group["correct"]) if not also]
        settings["per_device_train_batch_size"] *= len(examples[0]["rows"]) // 2
        trainer = trl.RewardTrainer(model, trl.RewardConfig(**settings, disable_dropout=False, max_length=None),
                                    train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer)
    for weight in trainer.model.parameters():  # TRL makes adapters bf16, which is another training
        if weight.requires_grad:
            weight.data = weight.data.float()
    return trainer


def answers_without_a_model(records, k):
    """k answers a question, right and wrong in turn: the steps of solutions in the set, so that lengths are real."""
    made = {record["id"]: {"samples": []} for record in records}
    for i, record in enumerate(records):
        for j in range(k):
            right, other = j % 2 == i % 2, records[(i + j) % len(records)]
            text = art.solution_text(other["solution"], record["answer"] if right else "-1")
            made[record["id"]]["samples"].append({"text": text, "correct": right})
    return made


def train_turn(args, name, folder):
    """One pass over the examples; only `train` is timed."""
    import transformers

    import train_asker
    import train_truster
    module = train_asker if args.table == "asker" else train_truster
    own = kit_args(args, folder, args.table, **{f"{args.table}_model": args.model}, adapter_bits=args.bits, epochs=1,
                   batch_size=args.batch_size, accumulate=args.accumulate, max_length=4096)
    records = [record for record in art.load_task(args.task, "train", None, args.data) if record.get("solution")]
    records, tokenizer = records[: args.limit], art.load_tokenizer(args.model)
    if args.table == "asker":
        drafts = train_asker.drafts_of(records, answers_without_a_model(records, 1))
        asked = {record["id"]: art.subquestions_of(record) for record in records}
        examples, kind = train_asker.ask_examples(drafts, asked, tokenizer), "CAUSAL_LM"
        model, tokens = art.load_base(args.model, args.bits), sum(len(one["input_ids"]) for one in examples)
    else:
        examples, kind = train_truster.contrast(records, answers_without_a_model(records, args.k), tokenizer), "SEQ_CLS"
        model, tokens = art.load_scorer(args.model, args.bits), sum(len(row) for one in examples for row in one["rows"])
    model, seconds, train = art.add_lora(model, kind, own.rank), [], transformers.Trainer.train

    def timed(*words, **more):
        began = clock()
        train(*words, **more)
        seconds.append(clock() - began)

    transformers.Trainer.train = timed
    if name == "kit":
        steps = art.fine_tune(model, examples, module.make_collate(tokenizer.pad_token_id), module.loss, own,
                              Path(folder), 1)["steps"]
    else:
        trainer = rival_trainer(name, own, model, tokenizer, examples, folder)
        trainer.train()
        steps = trainer.state.global_step
    return {"seconds": seconds[0], "note": f"{steps} steps, {tokens / seconds[0]:.0f} tokens of the examples a second"}


# --- The demo


def demo(args):
    """The five commands of the toy, on a fresh folder in each round."""
    steps = ["data/toy/prepare.py", "art.py sample", "train_asker.py", "train_truster.py", "evaluate.py"]
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds, flags = [], ["--data", f"{folder}/data", "--runs", f"{folder}/runs"]
            flags += ["--limit", str(args.limit)] if args.limit else []
            for step in steps:
                began = time.perf_counter()
                words = ["--out", f"{folder}/data/toy"] if step == steps[0] else flags
                subprocess.run([sys.executable, *step.split(), *words], cwd=ROOT, check=True, stdout=sys.stderr)
                seconds.append(time.perf_counter() - began)
            log = art.read_jsonl(Path(folder, "runs/toy/log.jsonl"), "")
            rounds.append({"seconds": seconds, "peak": [0, *((row["peak_memory"] or 0) / 2**20 for row in log)]})
    totals = [sum(made["seconds"]) for made in rounds]
    head("step", "seconds (lowest to highest)", "share", "peak MiB")
    for i, step in enumerate(steps):
        seconds, peak = ([made[key][i] for made in rounds] for key in ("seconds", "peak"))
        share = statistics.median(seconds) / statistics.median(totals)
        print(f"| {step} | {spread(seconds)} | {share:.0%} | {f'{max(peak):.0f}' if i else '-'} |")
    print(f"| all | {spread(totals)} | 100% | |")


TABLES = {  # a turn, the rivals, the defaults
    "generate": (generate_turn, ["plain generate"], {"limit": 32, "k": 1, "bits": 32}),
    "asker": (train_turn, ["TRL SFTTrainer", "plain Trainer"], {"limit": 64, "batch_size": 4, "accumulate": 8}),
    "truster": (train_turn, ["TRL RewardTrainer"], {"limit": 16, "k": 8, "batch_size": 1, "accumulate": 16}),
    "demo": (None, [], {}),
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--task", default="toy", choices=art.TASKS)
    add("--model", default="data/toy/base", help="folder or Hub id (default the toy's)")
    add("--limit", type=int, help="questions (default generate 32, asker 64, truster 16, demo all)")
    add("--k", type=int, help="answers a question (default generate 1: greedy; truster 8)")
    add("--bits", type=int, default=4, help="precision of the weights (default generate 32, else 4)")
    add("--shots", type=int, default=8, help="exemplars (default 8)")
    add("--max-new-tokens", type=int, default=128)
    add("--kv-gib", type=float, default=0.5, help="keys and values of a batch (default 0.5)")
    add("--batch-size", type=int, help="default asker 4, truster 1")
    add("--accumulate", type=int, help="default asker 8, truster 16")
    add("--rounds", type=int, default=3, help="turns of each contestant (default 3)")
    add("--at-least", type=float, metavar="X", help="exit code 1 if a rival takes less than X times as long")
    add("--data", type=Path, default=ROOT / "data")
    add("--only", help=argparse.SUPPRESS)
    one_turn, rivals, defaults = TABLES[parser.parse_args(argv).table]
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.table == "demo":
        demo(args)
    elif args.only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({**one_turn(args, args.only, folder), "peak": art.peak_memory()}))
    else:
        print(f"`python tests/bench.py {' '.join(argv)}`\n")
        compare(args, argv, rivals)


if __name__ == "__main__":
    art.run(main)
