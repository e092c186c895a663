"""Fine-tune the Asker with QLoRA: first on the task itself, then on asking and deciding (paper, section 3.2).

    python train_asker.py

Stage 1, `finetuned`: question -> sub-questions and steps. Stage 2, `asker`: question and draft -> gold sub-questions
and "Refine: Yes" where the draft is wrong. The drafts are the samples of `python art.py sample`; the LLM is not loaded.
Both adapters are written to runs/<task>/<run>/, each with args.json: what made it, and its figures.
"""

import numpy as np

import art


def encode(tokenizer, prompt, target, weight=0.0):
    """An example: `target` is learned. With `weight` its last word, the decision, is a term of its own.

    That word, Yes or No, is one token: `Local.choose` asserts it.
    """
    target = tokenizer(target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": tokenizer(prompt)["input_ids"] + target, "target": len(target), "weight": weight}


def task_examples(records, tokenizer, strategy):
    """Stage 1: one example a question."""
    return [encode(tokenizer, art.predict_prompt(record, strategy),
                   art.solution_text(record["solution"], record["answer"], strategy)) for record in records]


def drafts_of(records, samples):
    """[(record, draft, is it right?), ...]: the different samples of each question; refused if all are of one kind."""
    drafts = [(record, text, correct) for record in records
              for text, correct in art.labels_of(samples[record["id"]]).items()]
    wrong = sum(not correct for *_, correct in drafts)
    if not 0 < wrong < len(drafts):
        raise art.UserError(f"{wrong} of {len(drafts)} drafts are wrong, the Asker needs right and wrong ones: draw "
                            "more with art.py sample --k 8, or use another --model")
    print(f"{len(drafts):,} drafts of {len(records):,} questions, {wrong / len(drafts):.1%} wrong")
    return drafts


def ask_examples(drafts, subquestions, tokenizer, end_to_end=False):
    """Stage 2: one example a draft; right and wrong drafts weigh the same in sum. `end_to_end`: all four steps."""
    share = np.mean([not correct for *_, correct in drafts])
    examples = []
    for record, draft, correct in drafts:
        asked = subquestions[record["id"]]
        if end_to_end:
            solution = art.solution_text(record["solution"], record["answer"])
            examples.append(encode(tokenizer, art.predict_prompt(record),
                                   art.end_to_end_target(draft, asked, not correct, solution)))
        else:
            examples.append(encode(tokenizer, art.ask_prompt(record, draft), art.ask_target(asked, not correct),
                                   0.5 / (1 - share if correct else share)))
    return examples


def make_collate(pad):
    """Batches of examples, padded on the left, so that all targets stand at the end."""
    def collate(examples):
        import torch
        ids, mask = art.pad_left([e["input_ids"] for e in examples], pad)
        width = max(e["target"] for e in examples)
        text, decision = torch.zeros(2, len(examples), width)
        for row, example in enumerate(examples):
            text[row, width - example["target"]:] = 1 / example["target"]
            if example["weight"]:
                text[row, -2], decision[row, -2] = 0.0, example["weight"]  # the last word before the end-of-text token
        return {"input_ids": ids, "attention_mask": mask, "text": text, "decision": decision}
    return collate


def loss(model, batch):
    """Cross-entropy of the targets, mean over a text, and of the decisions: one token would drown in the text's mean.

    Both are sums over the examples of the batch, {"text": ..., "decision": ...}.
    """
    from torch.nn.functional import cross_entropy
    ids, mask, width = batch["input_ids"], batch["attention_mask"], batch["text"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=art.places(mask), use_cache=False,
                   logits_to_keep=width + 1).logits[:, :-1]  # the head works only where something is learned
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, -width:].flatten(), reduction="none").view(-1, width)
    return {name: (losses * batch[name]).sum() for name in ("text", "decision")}


def load_subquestions(args, records):
    """{id: sub-questions} to learn from: gold, written by the LLM, or none (ablation)."""
    if args.subquestions == "generated":
        mend = f"make it with: python art.py subquestions --task {args.task}"
        lines = art.read_jsonl(args.runs / args.task / "subquestions.jsonl", mend)
        generated = {line["id"]: line["subquestions"] for line in lines}
        return {record["id"]: generated.get(record["id"], []) for record in records}
    gold = {record["id"]: art.subquestions_of(record) if args.subquestions == "gold" else [] for record in records}
    if args.subquestions == "gold" and not any(gold.values()):
        raise art.UserError(f"{args.task} has no sub-questions: let the LLM write them with python art.py subquestions "
                            f"--task {args.task}, then give --subquestions generated")
    return gold


def train(run, name, records, examples, epochs, start=None, followers=(), **about):
    """Train one adapter, from the adapter `start` if given, unless it is trained already."""
    args, tokenizer = run.args, art.load_tokenizer(run.args.asker_model)

    def fine_tune(folder):
        kept = art.drop_long(examples, args.max_length)
        ids, target = kept[0]["input_ids"], kept[0]["target"]
        art.show_record({"prompt": tokenizer.decode(ids[:-target]), "target": tokenizer.decode(ids[-target:])})
        model = art.load_base(args.asker_model, args.adapter_bits, compute=args.compute)
        model = art.add_lora(model, "CAUSAL_LM", args.rank, start and run.folder / start, args.seed)
        return art.fine_tune(model, kept, make_collate(tokenizer.pad_token_id), loss, args, folder, epochs)

    begun = art.weights_id(run.folder / start, run.task) if start else None
    art.train_adapter(run, name, args.asker_model, records, examples, (loss, make_collate), fine_tune, followers,
                      epochs=epochs, start=begun, **about)


def dev_figures(run, dev, samples):
    """What the trained Asker makes of the drafts of dev."""
    drafts = [samples[record["id"]]["draft"] for record in dev]
    wrong = np.array([not art.verdict(run.args.task, draft, record["answer"]) for draft, record in zip(drafts, dev)])
    if min(wrong.sum(), (~wrong).sum()) < 50:
        print(f"warning: dev has {wrong.sum()} wrong and {(~wrong).sum()} right drafts; under 50 of a kind its figures "
              "and thresholds are rough")
    asked = art.ask(run.model("asker", "dev"), run.args, dev, drafts)
    p = np.array([output["p_refine"] for output in asked])
    gold = [art.subquestions_of(record) == output["subquestions"] for record, output in zip(dev, asked)]
    return {"n": len(dev), "wrong_drafts": float(wrong.mean()), "auc": art.auc(p, wrong),
            "right_decisions": float(np.mean((p >= 0.5) == wrong)), "gold_subquestions": float(np.mean(gold))}


def main():
    parser = art.make_parser(__doc__, "asker")
    parser.add_argument("--task-epochs", type=float, help="passes over the questions in stage 1, 0: none (by preset)")
    parser.add_argument("--subquestions", default="gold", choices=("gold", "generated", "none"),
                        help="to learn to ask: the data's, the LLM's own, or none, as an ablation (default gold)")
    parser.add_argument("--end-to-end", action="store_true",
                        help="instead of the Asker, train one model that does all four steps (row end_to_end)")
    args = art.parse(parser, training="asker")
    tokens = args.batch_size * args.max_length
    art.announce_needs({args.asker_model: args.adapter_bits}, tokens=tokens, learned=tokens // 2)
    run, tokenizer = art.Run(args), art.load_tokenizer(args.asker_model)
    train_set, dev = art.load_split(args, "train"), art.load_split(args, "dev")
    samples = art.load_samples(args, train_set + dev)
    train_set = [record for record in train_set if record.get("solution")]
    print(f"[2/5] the Asker learns from the samples of {len(train_set):,} questions")
    asked, drafts = load_subquestions(args, train_set), drafts_of(train_set, samples)
    # stage 1 writes sub-questions only where they are gold: generated ones do not go with the steps one by one
    strategy = "decomp" if args.subquestions == "gold" else "cot"
    if args.task_epochs:
        train(run, "finetuned", train_set, task_examples(train_set, tokenizer, strategy), args.task_epochs,
              followers=("asker", "end_to_end"), strategy=strategy)
    wrong = np.mean([not correct for *_, correct in drafts])
    name = "end_to_end" if args.end_to_end else "asker"
    train(run, name, train_set, ask_examples(drafts, asked, tokenizer, args.end_to_end), args.epochs,
          "finetuned" if args.task_epochs else None, prior_odds=wrong / (1 - wrong))
    if not args.end_to_end:
        figures = dev_figures(run, dev, samples)
        art.write(run.folder / "asker/args.json", {**run.about("asker"), "dev": figures})
        print(f"{run.folder / 'asker'}: on {figures['n']:,} drafts of dev, {figures['wrong_drafts']:.1%} wrong, AUC "
              f"{art.show(figures['auc'], '.3f')}; {figures['right_decisions']:.1%} of the decisions at 0.5 right; "
              f"gold sub-questions word for word {figures['gold_subquestions']:.1%}")
    if args.push:
        art.push(run, name)
    art.log_start(run)


if __name__ == "__main__":
    art.run(main)
