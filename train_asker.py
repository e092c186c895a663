"""Fine-tune the Asker with QLoRA: first on the task, then on asking (paper, section 3.2).

    python train_asker.py

Task training, adapter `finetuned`: question -> sub-questions and steps of the gold solution. Then
adapter `asker`: question and draft -> sub-questions, then "Refine: Yes" if the draft is incorrect.
The drafts are the samples of data/sample.py; the LLM is not loaded. Both adapters are saved in
runs/TASK/RUN, each with args.json, its settings and figures.
"""

import numpy as np

import art


def encode(tokenizer, prompt, target, weight=0.0):
    """An example: the model learns to continue `prompt` with `target`.

    Returns {"input_ids", "target": its number of tokens, "decision": the position of Yes or No in
    the target (None without a decision), "weight" of the decision in the loss}.
    """
    decision = None
    ids = art.token_ids(tokenizer, target, special=False) + [tokenizer.eos_token_id]
    if weight:
        before = target[: target.rindex(art.DECISION) + len(art.DECISION)]
        decision = len(art.token_ids(tokenizer, before, special=False))
    return {"input_ids": art.token_ids(tokenizer, prompt) + ids, "target": len(ids),
            "decision": decision, "weight": weight}


def task_examples(records, tokenizer, strategy):
    """Task training: one example for each question."""
    examples = []
    for record in records:
        target = art.solution_text(record["solution"], record["answer"], strategy)
        examples.append(encode(tokenizer, art.predict_prompt(record, strategy), target))
    return examples


def drafts_of(args, records, lines):
    """[(record, draft, is it correct?), ...]: the distinct samples of each question."""
    drafts = []
    for record in records:
        for text, correct in art.distinct_samples(lines, record).items():
            drafts.append((record, text, correct))
    correct = sum(correct for *_, correct in drafts)
    if correct in (0, len(drafts)):
        raise art.too_few(lines, f"{correct} of {len(drafts)} samples are correct, but the "
                          "Asker learns from correct and incorrect ones")
    return drafts


def ask_examples(drafts, subquestions, tokenizer, max_length):
    """Asking: one example for each draft. Correct and incorrect ones that fit weigh the same."""
    examples = []
    for record, draft, correct in drafts:
        target = art.ask_target(subquestions[record["id"]], refine=not correct)
        examples.append(encode(tokenizer, art.ask_prompt(record, draft), target, weight=1.0))
    kept = [correct for (*_, correct), example in zip(drafts, examples)
            if len(example["input_ids"]) <= max_length]
    shares = {kind: kept.count(kind) / len(kept) for kind in {*kept}}
    if len(shares) < 2:
        raise art.UserError("no correct, or no incorrect draft is short enough: raise --max-length")
    for example, (*_, correct) in zip(examples, drafts):
        example["weight"] = 0.5 / shares[correct]
    return examples


def collate(pad, examples):
    """The inputs of the model, padded on the left: all targets end in the last column."""
    import torch
    ids, mask = art.pad_left([example["input_ids"] for example in examples], pad)
    width = max(example["target"] for example in examples)
    text, decision = torch.zeros(2, len(examples), width)  # weights of the tokens in the loss
    for row, example in enumerate(examples):
        start = width - example["target"]
        text[row, start:] = 1 / example["target"]
        if example["weight"]:
            place = start + example["decision"]
            text[row, place], decision[row, place] = 0.0, example["weight"]
    return {"input_ids": ids, "attention_mask": mask, "text": text, "decision": decision}


def loss(model, inputs):
    """The parts of the loss, as sums over the examples: {"text": ..., "decision": ...}.

    Cross-entropy, the mean over a target's tokens. The decision has a term of its own: as one token
    of many it would hardly count.
    """
    from torch.nn.functional import cross_entropy
    ids, mask, width = inputs["input_ids"], inputs["attention_mask"], inputs["text"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=art.positions(mask),
                   use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, -width:].flatten(),
                           reduction="none").view(-1, width)
    return {name: (losses * inputs[name]).sum() for name in ("text", "decision")}


def load_subquestions(args, records):
    """{id: sub-questions to learn}: gold, written by the LLM, or none (--subquestions)."""
    gold = {record["id"]: art.gold_subquestions(record) for record in records}
    if args.subquestions is None:
        args.subquestions = "gold" if any(gold.values()) else "generated"
        if not any(gold.values()) and not (args.shared / "subquestions.jsonl").is_file():
            args.subquestions = "none"
            print("without sub-questions the Asker learns only to decide. To learn to ask, run "
                  f"python data/sample.py --task {args.task} --subquestions")
    if args.subquestions == "generated":
        lines = art.load_samples(args, records, "subquestions", " --subquestions")
        gold = {name: line["subquestions"] for name, line in lines.items()}
    elif args.subquestions == "gold" and not any(gold.values()):
        raise art.UserError(f"{args.task} has no gold sub-questions: give --subquestions none")
    return dict.fromkeys(gold, []) if args.subquestions == "none" else gold


def dev_auc(args):
    """The AUC of p_refine on the drafts of dev: which are incorrect?"""
    records = art.load_split(args, "dev")
    lines = art.load_samples(args, records)
    drafts = [lines[record["id"]]["draft"] for record in records]
    asker = art.open_model(args, "asker")
    asker.label = "ask on dev"
    asked = art.ask(asker, args, records, drafts)
    return art.auc([output["p_refine"] for output in asked],
                   [not draft["correct"] for draft in drafts])


def main():
    parser = art.make_parser(__doc__, "asker")
    parser.add_argument("--task-epochs", type=art.NUMBER_FLAG, metavar="N",
                        help="passes of the task training; 0: none (by preset)")
    parser.add_argument("--subquestions", choices=("gold", "generated", "none"),
                        help="what to learn to ask (default: what is there, in this order)")
    args = art.parse(parser)
    tokenizer = art.load_tokenizer(args.asker_model)
    records = art.load_split(args, "train")
    lines = art.load_samples(args, records + art.load_split(args, "dev"))
    print(f"the Asker learns from the samples of {len(records):,} questions")
    subquestions, drafts = load_subquestions(args, records), drafts_of(args, records, lines)

    def train(name, records, examples, epochs, **more):
        ids, target = examples[0]["input_ids"], examples[0]["target"]
        art.show({"prompt": tokenizer.decode(ids[:-target]),
                  "target": tokenizer.decode(ids[-target:])})
        art.train_adapter(args, name, records, examples, __file__, collate, loss, epochs, **more)

    start, solved = None, [record for record in records if record.get("solution")]
    if args.task_epochs and solved:
        # the LLM's sub-questions do not match the steps one by one, so this training has none
        strategy = "decomp" if args.subquestions == "gold" else "cot"
        examples = task_examples(solved, tokenizer, strategy)
        train("finetuned", solved, examples, args.task_epochs, strategy=strategy)
        start = "finetuned"
    elif args.task_epochs:
        print("the data has no solutions: no task training")
    incorrect = np.mean([not correct for *_, correct in drafts])
    train("asker", records, ask_examples(drafts, subquestions, tokenizer, args.max_length),
          args.epochs, start=start, prior_odds=incorrect / (1 - incorrect))
    art.add_figure(args, "asker", "dev_auc", dev_auc)


if __name__ == "__main__":
    art.run(main)
