"""Fine-tune the Asker with QLoRA: first on the task itself, then on asking and deciding (paper, section 3.2).

    python train_asker.py --task toy

Stage 1, `finetuned`: question -> sub-questions and steps. Stage 2, `asker`: question and draft -> gold sub-questions
and "Refine: Yes" where the draft is wrong. The drafts are the samples of `python art.py sample`. Both adapters are
written to runs/<task>/<run>/, with figures on dev beside them in args.json.
"""

import argparse
import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import art


def encode(tokenizer, prompt, target):
    """Token ids of prompt and target, with the end-of-text token behind it so that generation learns to stop."""
    return (tokenizer(prompt)["input_ids"],
            tokenizer(target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])


def task_examples(records, tokenizer):
    """Stage 1: one example a question."""
    examples = []
    for record in records:
        prompt, target = encode(tokenizer, art.predict_prompt(record, "decomp"),
                                art.solution_text(record["solution"], record["answer"], "decomp"))
        examples.append({"prompt": prompt, "target": target, "decision": None, "weight": 0.0})
    return examples


def ask_examples(records, samples, tokenizer, decision_ids):
    """Stage 2: one example for each different draft of a question, and the share of wrong drafts.

    The decision is weighted so that Yes and No weigh the same in sum; what that takes away is put back as `shift` in
    `art.ask`.
    """
    examples, labels = [], []
    for record in records:
        drafts = {row["text"]: row["correct"] for row in samples.get(record["id"], ())}
        for draft, correct in drafts.items():
            prompt, target = encode(tokenizer, art.ask_prompt(record, draft),
                                    art.ask_target([asked for asked, _ in record["solution"]], not correct))
            place = max(i for i, token in enumerate(target) if token in decision_ids)
            examples.append({"prompt": prompt, "target": target, "decision": place})
            labels.append(not correct)
    share = float(np.mean(labels)) if labels else 0.0
    if not 0 < share < 1:
        raise art.UserError(f"{len(labels)} drafts of which {share:.0%} are wrong: the Asker needs right and wrong "
                            "ones; draw more with: python art.py sample --k 8, or use another --model and --runs")
    for example, wrong in zip(examples, labels):
        example["weight"] = 0.5 / (share if wrong else 1 - share)
    return examples, share


def make_collate(pad):
    """Batch examples: padding on the left, so that all targets stand at the end and the LM head sees them alone."""

    def collate(examples):
        ids, mask = art.left_pad([e["prompt"] + e["target"] for e in examples], pad, "cpu")
        width = max(len(e["target"]) for e in examples)
        labels = torch.full((len(examples), width), -100)
        decisions = torch.full((len(examples), width), -100)
        for row, example in enumerate(examples):
            labels[row, width - len(example["target"]):] = torch.tensor(example["target"])
            if example["decision"] is not None:
                place = width - len(example["target"]) + example["decision"]
                decisions[row, place], labels[row, place] = labels[row, place].clone(), -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "decisions": decisions,
                "weights": torch.tensor([e["weight"] for e in examples])}

    return collate


def asker_loss(model, inputs):
    """Mean cross-entropy of the target tokens, plus a term of its own for the decision.

    One token would drown among the sub-questions: it is left out of the mean and added with the weight of its class.
    """
    width = inputs["labels"].shape[1]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], position_ids=positions,
                   use_cache=False, logits_to_keep=width + 1).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    rows, places = torch.nonzero(inputs["decisions"] != -100, as_tuple=True)
    if len(rows):
        each = cross_entropy(logits[rows, places], inputs["decisions"][rows, places], reduction="none")
        loss = loss + (each * inputs["weights"][rows]).sum() / len(inputs["weights"])
    return loss


def dev_figures(args, lm, folder, dev, drafts, shift):
    """Decisions of the trained Asker on the greedy drafts of dev, and two decoded examples."""
    texts = [drafts[record["id"]]["text"] for record in dev]
    wrong = np.array([not drafts[record["id"]]["correct"] for record in dev])
    lm.add_adapter("asker", folder)
    with lm.use("asker"):
        rows = art.stage(folder / "dev.jsonl", "ask dev", [record["id"] for record in dev],
                         lambda done: art.ask(lm, args.task, dev, texts, shift=shift, done=done))
    asked = [rows[record["id"]][0] for record in dev]
    p = np.array([row["p_refine"] for row in asked])
    threshold = art.best_threshold(p, np.where(wrong, 1, -1))
    yes = p >= threshold
    exact = np.mean([row["subquestions"] == art.subquestions_of(record) for row, record in zip(asked, dev)])
    for record, row in list(zip(dev, asked))[:2]:
        art.show_record({"question": record["question"], "draft": drafts[record["id"]]["text"],
                         "sub-questions": "\n".join(row["subquestions"]), "p_refine": f"{row['p_refine']:.2f}",
                         "the draft was": "right" if drafts[record["id"]]["correct"] else "wrong"})
    return {"n": len(dev), "wrong_drafts": float(wrong.mean()), "decision_accuracy": float(np.mean(yes == wrong)),
            "auc": art.auc(p, wrong), "precision": float(wrong[yes].mean()) if yes.any() else None,
            "recall": float(yes[wrong].mean()) if wrong.any() else None, "threshold": threshold,
            "gold_subquestions": float(exact)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, parents=[art.make_parser(training=True)],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asker-model", help="base of the Asker: folder or Hub id (preset)")
    parser.add_argument("--task-epochs", type=float, help="passes over the questions in stage 1, 0: none (preset)")
    args = art.parse(parser, "train_asker")
    train, dev = (art.load_task(args.task, split, args.limit, args.data) for split in ("train", "dev"))
    samples, samples_hash = art.load_samples(args, train + dev)
    train = [record for record in train if record.get("solution")]
    if not train:
        raise art.UserError(f"no training question of {args.task} has a `solution`: there is nothing to learn from")
    folder = args.runs / args.task / args.run
    keys = ["bits", "seed", "limit", "lr", "rank", "batch_size", "accumulate", "max_length", "task_epochs"]
    about = art.fingerprint(args, args.asker_model, keys)
    tokenizer = art.load_tokenizer(args.asker_model)
    decision_ids = {tokenizer(f"{art.DECISION} {word}", add_special_tokens=False)["input_ids"][-1]
                    for word in ("Yes", "No")}
    collate = make_collate(tokenizer.pad_token_id)
    with art.lock(folder):
        task_about = {**about, "stage": "finetuned"}
        if args.task_epochs and not art.already_trained(folder / "finetuned", task_about):
            examples = art.drop_long(task_examples(train, tokenizer), args.max_length)
            show_example(tokenizer, examples[0])
            model = art.add_lora(art.load_base(args.asker_model, args.bits), art.TaskType.CAUSAL_LM, args.rank)
            trained = art.fine_tune(model, examples, collate, asker_loss, args, folder / "finetuned", args.task_epochs)
            art.write_about(folder / "finetuned/args.json", {**task_about, **trained})
            del model
        asker_about = {**about, "stage": "asker", "epochs": args.epochs, "samples_sha256": samples_hash}
        if art.already_trained(folder / "asker", asker_about):
            return
        examples, share = ask_examples(train, samples, tokenizer, decision_ids)
        examples = art.drop_long(examples, args.max_length)
        print(f"{len(examples)} drafts of {len(train)} questions, {share:.1%} wrong")
        show_example(tokenizer, examples[0])
        base = art.load_base(args.asker_model, args.bits)
        start = folder / "finetuned" if args.task_epochs else None
        (folder / "asker/dev.jsonl").unlink(missing_ok=True)  # of an earlier adapter
        model = art.add_lora(base, art.TaskType.CAUSAL_LM, args.rank, start)
        trained = art.fine_tune(model, examples, collate, asker_loss, args, folder / "asker", args.epochs)
        if art.RANK:
            return
        del model, base
        shift = math.log(share / (1 - share))
        lm = art.LM(args.asker_model, args.bits, art.PRESETS[args.preset]["all"]["batch_tokens"], chat="no")
        figures = dev_figures(args, lm, folder / "asker", dev, {name: rows[0] for name, rows in samples.items()}, shift)
        art.write_about(folder / "asker/args.json", {
            **asker_about, **trained, "shift": shift, "threshold": figures["threshold"], "dev": figures})
    print(f"{folder / 'asker'}: on {figures['n']} greedy drafts of dev, {figures['wrong_drafts']:.1%} wrong, AUC "
          f"{art.show(figures['auc'], '.3f')}; at the threshold that is best there {figures['decision_accuracy']:.1%} "
          f"of the decisions right, precision {art.show(figures['precision'])}, recall {art.show(figures['recall'])}; "
          f"gold sub-questions word for word {figures['gold_subquestions']:.1%}")


def show_example(tokenizer, example):
    """One full training example, as the model sees it."""
    art.show_record({f"example, {part}": tokenizer.decode(example[part]) for part in ("prompt", "target")})


if __name__ == "__main__":
    art.run(main)
