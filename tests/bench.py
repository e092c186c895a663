"""Speed and memory, side by side with what one would use instead. One command a table, printed as Markdown.

    python tests/bench.py generate   # answers to 32 questions, greedy and k samples each, against plain `generate`
    python tests/bench.py asker      # 64 examples, against TRL's SFTTrainer and a plain Trainer
    python tests/bench.py truster    # 16 questions with k answers, against TRL's RewardTrainer
    python tests/bench.py demo       # the five scripts of `make demo`, against plain `generate`, unsorted batches
    python tests/bench.py scaling    # evaluate.py on ten times the test questions, against itself
    python tests/bench.py fit        # does it fit on a card? Random weights of a 7B or 13B shape

Without flags they run the bundled model on the toy task; tests/bench.md has the commands for a real one. Contestants
take turns (A B A B A B), each turn in a process of its own: medians, lowest and highest are printed, and the peak
memory of the process (on a GPU: of its tensors). Below each table stands the floor: the operations and bytes that the
work needs at least, over what this machine was measured to do in the same run.
"""

import argparse
import copy
import functools
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import transformers

import art
import evaluate
import train_asker
import train_truster

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def clock():
    """Seconds, when all that was started on the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_machine():
    """Operations a second of a matrix product, bytes a second of reading a large tensor: the best of five each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    square = torch.randn(2048, 2048, device=device, dtype=art.compute_dtype())
    large = torch.ones(1 << 28, device=device)

    def best(work):
        seconds = []
        for _ in range(5):
            begin = clock()
            work()
            seconds.append(clock() - begin)
        return min(seconds)

    return {"operations": 2 * 2048**3 / best(lambda: square @ square), "bytes": 4 * 2**28 / best(large.sum)}


def linear_weights(model):
    """(weights of the linear layers without LM head, those of the LM head): each is an operation or two for a token."""
    sizes = {name: module.in_features * module.out_features for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and "lora_" not in name}
    head = sum(size for name, size in sizes.items() if name.endswith("lm_head"))
    return sum(sizes.values()) - head, head


def turn(name, flags=()):
    """One turn of a contestant in a process of its own; returns what it reports."""
    command = [sys.executable, __file__, *sys.argv[1:], *flags, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise art.UserError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(result):
    """The last line that a turn prints: what it measured, with its peak memory."""
    print(json.dumps({**result, "peak": art.peak_memory()}))


def spread(values, form=".1f"):
    """Median, lowest and highest as text.

    >>> spread([3, 1, 2])
    '2.0 (1.0 to 3.0)'
    """
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def head(*columns):
    """The first two lines of a Markdown table."""
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")


def compare(args, names, flags=()):
    """Let the contestants take turns and print their table; the first is the kit's own, which knows the floor."""
    if importlib.util.find_spec("trl") is None and any("TRL" in name for name in names):
        print(f"TRL is not installed (pip install trl): left out is {[name for name in names if 'TRL' in name]}")
        names = [name for name in names if "TRL" not in name]
    machine, turns = turn("machine"), {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            turns[name].append(turn(name, flags))
            print(f"{name}: {turns[name][-1]['seconds']:.1f} s", file=sys.stderr)
    first = turns[names[0]][0]
    middle = {name: statistics.median(made["seconds"] for made in several) for name, several in turns.items()}
    head("contestant", "seconds (lowest to highest)", "of the kit's", "peak MiB", "of the kit's", "")
    for name, several in turns.items():
        peaks = [made["peak"] / 2**20 for made in several]
        memory = max(peaks) / max(made["peak"] / 2**20 for made in turns[names[0]])
        print(f"| {name} | {spread([made['seconds'] for made in several])} | {middle[name] / middle[names[0]]:.2f} | "
              f"{spread(peaks, '.0f')} | {memory:.2f} | {several[0]['note']} |")
    floors = [first[kind] / machine[kind] for kind in ("operations", "bytes")]
    print(f"\nFloor: {floors[0]:.1f} s by operations ({first['operations'] / 1e12:.2f} T at "
          f"{machine['operations'] / 1e9:.0f} G/s), {floors[1]:.1f} s by bytes ({first['bytes'] / 1e9:.1f} GB at "
          f"{machine['bytes'] / 1e9:.1f} GB/s); the kit takes {middle['kit'] / max(floors):.1f} times the larger.")
    if "texts" in first and not flags:
        for name in names[1:]:
            same = sum(a == b for a, b in zip(first["texts"], turns[name][0]["texts"]))
            print(f"Texts of {name} equal to those of {names[0]}: {same} of {len(first['texts'])}.")
    print(flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


class Stop(transformers.StoppingCriteria):
    """Ends the rows in whose last tokens a pattern is found."""

    def __init__(self, tokenizer, pattern, start):
        self.tokenizer, self.pattern, self.start = tokenizer, pattern, start

    def __call__(self, ids, scores, **settings):
        tails = self.tokenizer.batch_decode(ids[:, max(self.start, ids.shape[1] - 16):], skip_special_tokens=True)
        return torch.tensor([bool(self.pattern.search(tail)) for tail in tails], device=ids.device)


@torch.inference_mode()
def plain_generate(lm, prompts, prefix, max_new_tokens, stop, k, temperature, options):
    """In place of `LM._generate`: transformers' own `generate`, one call a sample; the decision in a second pass."""
    ids, mask = art.left_pad(prompts, lm.tokenizer.pad_token_id, lm.model.device)
    made = [[] for _ in prompts]
    for _ in range(0 if options and options[1] else k):
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = lm.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=lm.tokenizer.pad_token_id,
            stopping_criteria=[Stop(lm.tokenizer, stop, ids.shape[1])] if stop else None, **sampling)[:, ids.shape[1]:]
        for several, prompt, row in zip(made, prompts, out.tolist()):
            row = [token for token in row if token != lm.tokenizer.pad_token_id]
            text = lm.tokenizer.decode(row, skip_special_tokens=True)
            match = stop.search(text) if stop else None
            text = text[: match.end()] if match else text
            several.append({"text": text.strip(), "stopped": bool(match) or len(row) < max_new_tokens, "logprob": 0.0,
                            "tokens": len(row), "prompt_tokens": len(prompt), "row": row if match else None})
    if options:
        if options[1]:
            made = [[{"text": "", "stopped": False, "logprob": 0.0, "tokens": 0, "prompt_tokens": len(prompt),
                      "row": []}] for prompt in prompts]
        rows = [prompt + (one["row"] or []) for prompt, (one,) in zip(prompts, made)]
        ids, mask = art.left_pad(rows, lm.tokenizer.pad_token_id, lm.model.device)
        logits = lm.model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        gaps = (logits[:, -1, options[0][0]] - logits[:, -1, options[0][1]]).tolist()
        for (one,), gap in zip(made, gaps):
            one["logit"] = None if one["row"] is None else gap
    return [[{key: value for key, value in one.items() if key != "row"} for one in several] for several in made]


def generate_batch(lm, prompts, max_new_tokens=256, stop=None, k=1, temperature=0.0, seed=0, options=None, done=()):
    """In place of `LM.generate`: transformers' continuous batching, which knows no stop at a text: it is cut behind."""
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0,
        eos_token_id=list(lm.ends), pad_token_id=lm.tokenizer.pad_token_id, num_return_sequences=k)
    made = []
    for output in lm.model.generate_batch(prompts, generation_config=settings).values():
        text = lm.tokenizer.decode(output.generated_tokens, skip_special_tokens=True)
        match = stop.search(text) if stop else None
        made.append({"text": (text[: match.end()] if match else text).strip(), "tokens": len(output.generated_tokens)})
    assert len(made) == len(prompts) * k  # what fails is only logged
    yield [(index, made[index * k : index * k + k]) for index in range(len(prompts))]


def generate_turn(args, name):
    """Answers to the questions by the kit, plain `generate` in the same batches with the same stop, or another."""
    records = art.load_task(args.task, "test", args.limit, args.data)
    exemplars = art.load_exemplars(args.task, args.shots, args.data)
    lm = art.LM(args.model, args.bits, args.batch_tokens, args.chat)
    if name != "kit":
        lm.model.set_attn_implementation("sdpa")
        if name == "plain generate":
            art.LM._generate = plain_generate
        else:
            art.LM.generate = generate_batch
    begin = clock()
    made = dict(pair for batch in art.predict(
        lm, args.task, records, exemplars, args.strategy, k=args.samples, temperature=0.7 if args.samples > 1 else 0.0,
        seed=args.seed, max_new_tokens=args.max_new_tokens) for pair in batch)
    seconds = clock() - begin
    texts = [row["text"] for index in sorted(made) for row in made[index]]
    written = [[row["tokens"] for row in made[index]] for index in sorted(made)]
    result = {"seconds": seconds, "texts": texts,
              "note": f"{sum(map(sum, written))} tokens written, {sum(map(sum, written)) / seconds:.0f} a second"}
    if name == "kit":
        shown = [(art.predict_prompt(e, args.strategy), art.solution_text(e["solution"], e["answer"], args.strategy))
                 for e in exemplars]
        prompts = [lm.render(art.predict_prompt(record, args.strategy), shown, art.INSTRUCTIONS[args.strategy])
                   for record in records]
        prefix, batches = lm.plan(prompts, args.max_new_tokens, args.samples)
        own = [len(prompt) - len(prefix) for prompt in prompts]
        body, head = linear_weights(lm.model)
        config = lm.model.config
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * lm.model.dtype.itemsize
        steps = sum(max(max(written[index]) for index in batch) for batch in batches)
        read = sum(count * own[i] + count**2 / 2 for i, several in enumerate(written) for count in several)
        tokens = len(prefix) + sum(own) + sum(map(sum, written))
        result |= {"operations": 2 * (body * tokens + head * sum(map(sum, written))),
                   "bytes": steps * (lm.model.get_memory_footprint() + cache * len(prefix)) + cache * read}
    return result


def generate(args):
    """Answers to questions behind the exemplars, greedy and then k samples each, against plain `generate`."""
    names = ["kit", "plain generate"] + ["generate_batch"] * torch.cuda.is_available()  # which is made for GPUs
    for samples in args.k if isinstance(args.k, tuple) else [args.k]:
        how = "greedy" if samples == 1 else f"{samples} samples each; plain: one call a sample"
        print(f"{args.limit} questions of {args.task}, {args.shots} exemplars, {args.bits} bits, at most "
              f"{args.max_new_tokens} new tokens, {how}\n")
        compare(args, names, ["--samples", str(samples)] if samples > 1 else [])


# ---------------------------------------------------------------------------------------------------------------------
# Training. Each contestant is put in place of the kit's trainer: model, settings and examples are the kit's.


def right_padded(example):
    """An Asker's example as other trainers take it: the loss is on the target alone."""
    return {"input_ids": example["prompt"] + example["target"],
            "labels": [-100] * len(example["prompt"]) + example["target"]}


def in_fp32(trainer):
    """Adapters and head as the kit trains them: TRL makes them bfloat16, which a CPU's fp32 cannot be mixed with."""
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return trainer


def sft_trainer(tokenizer, model, settings, collate, examples, loss, **more):
    import datasets
    import trl

    data = datasets.Dataset.from_list(list(map(right_padded, examples)))
    return in_fp32(trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, **more))


def plain_trainer(tokenizer, model, settings, collate, examples, loss, **more):
    tokenizer.padding_side = "right"
    return transformers.Trainer(model, settings, transformers.DataCollatorForSeq2Seq(tokenizer),
                                list(map(right_padded, examples)), **more)


def reward_trainer(tokenizer, model, settings, collate, groups, loss, **more):
    """Every pair of a right and a wrong answer is an example; a batch has as many rows as the kit's."""
    import datasets
    import trl

    pairs = [{"chosen_ids": right, "rejected_ids": wrong} for group in groups
             for right, ok in zip(group["rows"], group["correct"]) if ok
             for wrong, also in zip(group["rows"], group["correct"]) if not also]
    settings = trl.RewardConfig(**settings.to_dict(), disable_dropout=False)
    settings.per_device_train_batch_size *= len(groups[0]["rows"]) // 2
    data = datasets.Dataset.from_list(pairs)
    return in_fp32(trl.RewardTrainer(model, settings, train_dataset=data, processing_class=tokenizer, **more))


TRAINERS = {"TRL SFTTrainer": sft_trainer, "plain Trainer": plain_trainer, "TRL RewardTrainer": reward_trainer}


def solutions(records, k):
    """Answers without a model, right and wrong in turn: the steps of k solutions in the set, so lengths are real."""
    steps = [record["solution"] for record in records]
    return {record["id"]: [
        {"text": art.solution_text(steps[(i + j) % len(records)], record["answer"] if j % 2 == i % 2 else "-1"),
         "correct": j % 2 == i % 2} for j in range(k)] for i, record in enumerate(records)}


def train_turn(args, name):
    """One pass over the examples by the trainer of that name; only its `train` is timed."""
    records = [r for r in art.load_task(args.task, "train", data=args.data) if r.get("solution")][: args.limit]
    ask, model_name = args.table == "asker", args.asker_model if args.table == "asker" else args.truster_model
    tokenizer, samples = art.load_tokenizer(model_name), solutions(records, 1 if args.table == "asker" else args.k)
    if ask:
        decision_ids = {tokenizer(f"{art.DECISION} {word}", add_special_tokens=False)["input_ids"][-1]
                        for word in ("Yes", "No")}
        asked = {record["id"]: art.subquestions_of(record) for record in records}
        examples, _ = train_asker.ask_examples(records, samples, asked, tokenizer, decision_ids)
        rows = [example["prompt"] + example["target"] for example in examples]
        scored = sum(len(example["target"]) for example in examples)
        model, task_type = art.load_base(model_name, args.bits), art.TaskType.CAUSAL_LM
    else:
        examples, scored = train_truster.contrast(records, samples, tokenizer), 0
        rows = [row for group in examples for row in group["rows"]]
        model, task_type = art.load_scorer(model_name, args.bits, args.seed), art.TaskType.SEQ_CLS
    (body, head), weights = linear_weights(model), model.get_memory_footprint()
    module = train_asker if ask else train_truster
    if name in TRAINERS:
        art.LossTrainer = functools.partial(TRAINERS[name], tokenizer)
    seconds, train = [], transformers.Trainer.train

    def timed(*args, **more):
        begin = clock()
        made = train(*args, **more)
        seconds.append(clock() - begin)
        return made

    transformers.Trainer.train = timed
    with tempfile.TemporaryDirectory() as folder:
        trained = art.fine_tune(art.add_lora(model, task_type, args.rank), examples,
                                module.make_collate(tokenizer.pad_token_id),
                                train_asker.asker_loss if ask else train_truster.truster_loss, args, folder, 1)
    tokens = sum(map(len, rows))  # forward, and backward for what runs through the layers: the weights are frozen
    return {"seconds": seconds[0], "note": f"{trained['steps']} steps, {tokens / seconds[0]:.0f} tokens a second",
            "operations": 4 * (body * tokens + head * scored), "bytes": 2 * trained["steps"] * weights}


def asker(args):
    """One pass of the Asker's training against TRL's SFTTrainer and a plain Trainer: same QLoRA, batch, loss mask."""
    print(f"{args.limit} ask examples of {args.task}, {args.bits} bits, batch {args.batch_size} x {args.accumulate}\n")
    compare(args, ["kit", "TRL SFTTrainer", "plain Trainer"])


def truster(args):
    """One pass of the Truster's training against TRL's RewardTrainer on the same pairs, as many rows in a batch."""
    print(f"{args.limit} questions of {args.task} with {args.k} answers, {args.bits} bits, batch "
          f"{args.batch_size} x {args.accumulate}\n")
    compare(args, ["kit", "TRL RewardTrainer"])


# ---------------------------------------------------------------------------------------------------------------------
# The demo, and ten times the test questions


def run_script(command):
    """Seconds and peak bytes of one script in a process of its own."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "script", *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise art.UserError(f"{command} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - begin, json.loads(done.stdout.splitlines()[-1])["peak"]


def script(argv):
    """Run a script of the kit, then report; `plain` before its name puts the plain variant in place first."""
    if argv[0] == "plain":
        argv = argv[1:]
        make_plain()
    sys.argv = argv
    main = {"art.py": art.main, "train_asker.py": train_asker.main, "train_truster.py": train_truster.main,
            "evaluate.py": evaluate.main}[argv[0]]
    main()
    report({})


def make_plain():
    """The kit as one would write it first: plain `generate`, batches in the order of the questions, full logits."""

    def in_order(lengths, budget):
        batches = []
        for index in range(len(lengths)):
            longest = max([lengths[index], *(lengths[i] for i in batches[-1])]) if batches else 0
            if batches and (len(batches[-1]) + 1) * longest <= budget:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def full_logits(model, inputs):
        def all_positions(logits_to_keep, **more):
            return SimpleNamespace(logits=model(**more).logits[:, -logits_to_keep:])

        return loss(all_positions, inputs)

    loss, train_asker.asker_loss = train_asker.asker_loss, full_logits
    art.LM._generate, art.plan_batches = plain_generate, in_order


def toy_data(folder, *sizes):
    """The toy task in a folder of its own; returns the flags that name it."""
    subprocess.run([sys.executable, ROOT / "data/toy/prepare.py", "--out", folder / "data/toy", *map(str, sizes)],
                   check=True, stdout=subprocess.DEVNULL)
    return ["--data", folder / "data", "--runs", folder / "runs"]


def demo(args):
    """The scripts of `make demo` after the data is made, against the plain variant; each stage's share."""
    stages = [["art.py", "sample"], ["train_asker.py"], ["train_truster.py"], ["evaluate.py"]]
    limit = ["--limit", args.limit] if args.limit else []
    seconds = {"kit": [], "plain": []}
    for _ in range(args.rounds):
        for name, before in (("kit", []), ("plain", ["plain"])):
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                flags = toy_data(Path(folder)) + limit
                seconds[name].append([time.perf_counter() - begin])
                seconds[name][-1] += [run_script([*before, *stage, *flags])[0] for stage in stages]
            print(f"{name}: {sum(seconds[name][-1]):.0f} s", file=sys.stderr)
    total = {name: statistics.median(map(sum, several)) for name, several in seconds.items()}
    head("stage", "kit, seconds", "share", "plain, seconds", "of the kit's")
    for number, stage in enumerate([["data/toy/prepare.py"], *stages]):
        kit, plain = (statistics.median(one[number] for one in seconds[name]) for name in ("kit", "plain"))
        print(f"| {' '.join(stage)} | {kit:.1f} | {kit / total['kit']:.0%} | {plain:.1f} | {plain / kit:.2f} |")
    print(f"| all | {spread(list(map(sum, seconds['kit'])))} | 100% | {spread(list(map(sum, seconds['plain'])))} | "
          f"{total['plain'] / total['kit']:.2f} |")


def scaling(args):
    """evaluate.py on some test questions and on ten times as many, in turns; nothing is kept between them."""
    with tempfile.TemporaryDirectory() as folder:
        folder, made = Path(folder), {}
        flags = toy_data(folder, "--train", 64, "--dev", 40, "--test", 10 * args.limit)
        for stage in (["art.py", "sample"], ["train_asker.py"], ["train_truster.py"]):
            run_script([*stage, *flags])
        test = (folder / "data/toy/test.jsonl").read_text().splitlines(keepends=True)
        for _ in range(args.rounds):
            for count in (args.limit, 10 * args.limit):
                (folder / "data/toy/test.jsonl").write_text("".join(test[:count]))
                made.setdefault(count, []).append(run_script(["evaluate.py", *flags]))
                print(f"{count}: {made[count][-1][0]:.1f} s", file=sys.stderr)
                for stages in list(folder.glob("runs/toy/**/stages")):
                    shutil.rmtree(stages)
    small, large = ([statistics.median(values) for values in zip(*made[count])] for count in made)
    head("test questions", "seconds (lowest to highest)", "of the first", "peak MiB", "of the first")
    for count, turns in made.items():
        seconds, peaks = zip(*turns)
        print(f"| {count} | {spread(seconds)} | {statistics.median(seconds) / small[0]:.2f} | "
              f"{spread([peak / 2**20 for peak in peaks], '.0f')} | {statistics.median(peaks) / small[1]:.2f} |")


# ---------------------------------------------------------------------------------------------------------------------
# Does it fit?

SHAPES = {"7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
          "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
          "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}}


SHARED = 1000  # tokens that the exemplars take in front of every question


class RandomWeight:
    """A weight of a checkpoint that is not there: made when it is read, so that the whole never stands in memory."""

    def __init__(self, shape):
        self.shape = shape

    def __getitem__(self, where):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if len(self.shape) == 1:  # of a norm
            return torch.ones(self.shape, device=device)
        return torch.randn(self.shape, device=device, dtype=art.compute_dtype()).mul_(0.02)


def load_random(shape, load_base=art.load_base):
    """An `art.load_base` whose models are Llamas of that shape with random weights; the loading is the real one."""

    def load(name, bits=4, head=transformers.AutoModelForCausalLM, **settings):
        own = {key: settings.pop(key) for key in ("num_labels", "pad_token_id") if key in settings}
        config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape], **own)
        with torch.device("meta"):
            empty = head.from_config(config)
        weights = {key: RandomWeight(weight.shape) for key, weight in empty.state_dict().items()}

        def from_pretrained(name, **more):
            return type(empty).from_pretrained(None, config=copy.deepcopy(config), state_dict=weights, **more)

        return load_base(name, bits, SimpleNamespace(from_pretrained=from_pretrained), **settings)

    return load


def fit_turn(args, name):
    """QLoRA steps of Asker or Truster, generation batches, or one question; random tokens, all as long as allowed."""
    art.load_base, base = load_random(args.shape), "data/toy/base"  # the bundled tokenizer will do
    draw, seconds = torch.Generator().manual_seed(0), []

    def tokens(count):
        return torch.randint(5, 1000, (count,), generator=draw).tolist()

    if name == "generate":
        lm, shared = art.LM(base, args.bits, chat="no"), tokens(SHARED)
        own, rows = args.max_length - args.max_new_tokens, args.batch_tokens // args.max_length
        prompts = [shared + tokens(own) for _ in range(rows)]
        for _ in range(2):
            begin = clock()
            made = lm._generate(prompts, shared, args.max_new_tokens, None, 1, 0.0, None)
            seconds.append(clock() - begin)
        return {"rate": sum(one["tokens"] for (one,) in made) / seconds[-1],
                "note": f"{rows} rows, {args.max_new_tokens} new tokens behind {SHARED} shared and {own} of their own"}
    if name == "solve":  # LLM and Asker share their weights, the Truster comes after them
        begin, new = clock(), args.max_new_tokens
        lm = art.LM(base, args.bits, chat="no")
        lora = art.LoraConfig(r=args.rank, target_modules="all-linear")
        lm.model = art.get_peft_model(lm.model, lora).eval()
        for _ in range(3):  # predict, ask, refine
            lm._generate([tokens(args.max_length)], [], new, None, 1, 0.0, None)
        del lm
        art.load_base = load_random(args.truster_shape)
        truster = art.load_scorer(base, args.bits, args.seed)
        with torch.inference_mode():
            art.score_batch(truster, *art.left_pad([tokens(args.max_length)] * 2, 0, truster.device))
        return {"rate": 3 * new / (clock() - begin), "note": f"one question: {args.shape} LLM and Asker, "
                f"{args.truster_shape} Truster, {3 * new} tokens written, loading included"}
    sizes = {key: value for key, value in art.PRESETS[args.preset][f"train_{name}"].items()
             if getattr(args, key, "") is None}
    args = argparse.Namespace(**{**vars(args), **sizes, "accumulate": 1})
    if name == "asker":
        target = args.max_length // 4
        examples = [{"prompt": tokens(args.max_length - target), "target": tokens(target), "decision": target - 1,
                     "weight": 1.0} for _ in range(3 * args.batch_size)]
        model, kind, module = art.load_base(base, args.bits), art.TaskType.CAUSAL_LM, train_asker
    else:
        examples = [{"rows": [tokens(args.max_length) for _ in range(args.k)],
                     "correct": [j % 2 == 0 for j in range(args.k)]} for _ in range(3 * args.batch_size)]
        model, kind, module = art.load_scorer(base, args.bits, args.seed), art.TaskType.SEQ_CLS, train_truster

    def loss(model, inputs):
        seconds.append(clock())  # from here to the next one is a step, optimiser included
        return getattr(module, f"{name}_loss")(model, inputs)

    with tempfile.TemporaryDirectory() as folder:
        art.fine_tune(art.add_lora(model, kind, args.rank), examples, module.make_collate(0), loss, args, folder, 1)
    rows = args.batch_size * (1 if name == "asker" else args.k)
    return {"rate": rows * args.max_length / (seconds[2] - seconds[1]),
            "note": f"{rows} rows of {args.max_length} tokens a step"}


def fit_piece(args, name):
    """A piece under the memory limit, with the memory that the device itself reports in use, sampled all the time."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 2**30 / total))
    used, done = [], threading.Event()

    def watch():
        while not done.wait(0.005):
            free, all_of_it = torch.cuda.mem_get_info()
            used.append(all_of_it - free)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        made = fit_turn(args, name)
        made["fits"] = True
    except torch.OutOfMemoryError as error:
        made = {"fits": False, "rate": 0.0, "note": str(error).split(".")[0]}
    done.set()
    watcher.join()
    return {**made, "reserved": torch.cuda.max_memory_reserved(), "device": max(used)}


def fit(args):
    """Peak memory of QLoRA steps, a generation batch and one question through all four, on a card cut to --memory."""
    if not torch.cuda.is_available():
        print("no GPU is present: whether it fits is not measured")
        return
    print(f"{torch.cuda.get_device_name()}, cut down to {args.memory} GiB; {args.shape} Llama with random weights, "
          f"sizes of --preset {args.preset}\n")
    head("piece", "fits", "tensors, peak GiB", "reserved", "device, all in all", "tokens a second", "")
    for name in ("asker", "truster", "generate", "solve"):
        made = turn(name)
        peaks = " | ".join(f"{made[key] / 2**30:.2f}" for key in ("peak", "reserved", "device"))
        fits = made["fits"] and made["device"] <= args.memory * 2**30
        print(f"| {name} | {'yes' if fits else 'no'} | {peaks} | {made['rate']:.0f} | {made['note']} |", flush=True)


def main():
    if sys.argv[1:2] == ["script"]:
        return script(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    defaults = {generate: {"limit": 32, "k": (1, 4), "bits": 32},
                asker: {"limit": 64, "batch_size": 4, "accumulate": 8},
                truster: {"limit": 16, "k": 8, "batch_size": 1, "accumulate": 16}, demo: {}, scaling: {"limit": 100},
                fit: {"preset": "24gb"}}
    for call, values in defaults.items():
        one = tables.add_parser(call.__name__, parents=[art.make_parser(llm=True, training=True)], help=call.__doc__,
                                description=call.__doc__)
        one.add_argument("--asker-model", help="base of the Asker: folder or Hub id (preset)")
        one.add_argument("--truster-model", help="base of the Truster: folder or Hub id (preset)")
        one.add_argument("--k", type=int, help="samples a question (generate: 1, then 4; truster: 8; fit: preset)")
        one.add_argument("--rounds", type=int, default=3, help="turns of each contestant (3)")
        one.add_argument("--shape", default="7b", choices=SHAPES, help="of the model that shall fit (7b)")
        one.add_argument("--truster-shape", default="13b", choices=SHAPES, help="of the Truster of one question (13b)")
        one.add_argument("--memory", type=float, default=16, help="GiB of the card it shall fit on (16)")
        one.add_argument("--only", help=argparse.SUPPRESS)
        one.add_argument("--samples", type=int, default=1, help=argparse.SUPPRESS)
        one.set_defaults(call=call, **values)
    if sys.argv[1:2] == ["fit"] and not torch.cuda.is_available():
        return fit(None)
    args = art.parse(parser, f"train_{sys.argv[1]}")
    turns = {generate: generate_turn, asker: train_turn, truster: train_turn, fit: fit_piece}
    if args.only == "machine":
        report(measure_machine())
    elif args.only:
        report(turns[args.call](args, args.only))
    else:
        args.call(args)


if __name__ == "__main__":
    art.run(main)
