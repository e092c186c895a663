"""Fine-tune the Truster with QLoRA: a right answer to a question shall score above a wrong one (paper, section 3.4).

    python train_truster.py --task toy

The answers are the samples of `python art.py sample`. Every pair of a right (chosen) and a wrong (rejected) answer to a
question is used, each answer is scored once. The adapter with its scalar head is written to runs/<task>/<run>/truster.
"""

import numpy as np
import torch
from torch.nn.functional import logsigmoid

import art

MIN_QUESTIONS = 8  # with both right and wrong samples; below that there is nothing to learn from


def contrast(records, samples, tokenizer):
    """[{"rows": token ids of each different answer, "correct": [bool, ...]}] of questions with right and wrong ones."""
    groups = []
    for record in records:
        answers = art.labels_of(samples.get(record["id"], ()))
        if 0 < sum(answers.values()) < len(answers):
            groups.append({"rows": tokenizer([art.trust_prompt(record, text) for text in answers])["input_ids"],
                           "correct": list(answers.values())})
    return groups


def pair_losses(scores, correct):
    """-log sigmoid(chosen - rejected) over all pairs of one question; scores (k,), correct (k,) bool.

    >>> pair_losses(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([True, False, False]))
    tensor([0.6931, 0.6931])
    """
    return -logsigmoid(scores[correct][:, None] - scores[~correct][None, :]).flatten()


def make_collate(pad):
    """Put the answers of several questions below each other; `sizes` says how many belong to each question."""

    def collate(groups):
        ids, mask = art.left_pad([row for group in groups for row in group["rows"]], pad, "cpu")
        return {"input_ids": ids, "attention_mask": mask,
                "sizes": torch.tensor([len(group["rows"]) for group in groups]),
                "correct": torch.tensor([label for group in groups for label in group["correct"]])}

    return collate


def truster_loss(model, inputs):
    """Mean over questions of the mean over a question's pairs (paper, section 3.4; the mean in a question is ours)."""
    scores = art.score_batch(model, inputs["input_ids"], inputs["attention_mask"])
    sizes = inputs["sizes"].tolist()
    groups = zip(scores.split(sizes), inputs["correct"].split(sizes))
    return torch.stack([pair_losses(group, correct).mean() for group, correct in groups]).mean()


def dev_figures(truster, dev, samples):
    """Share of right/wrong pairs of dev that the Truster orders right."""
    texts = [{str(row["sample"]): row["text"] for row in samples[record["id"]]} for record in dev]
    hits = []
    for batch in truster.score(dev, texts):
        for index, (scores,) in batch:
            rows = [row for row in samples[dev[index]["id"]] if not row.get("failed")]
            hits += [scores[str(a["sample"])] > scores[str(b["sample"])]
                     for a in rows for b in rows if a["correct"] and not b["correct"]]
    return {"pairs": len(hits), "pairwise_accuracy": float(np.mean(hits)) if hits else None}


def main():
    parser = art.make_parser(training=True, doc=__doc__)
    parser.add_argument("--truster-model", help="base of the Truster: folder or Hub id (preset)")
    args = art.parse(parser, "train_truster")
    train, dev = (art.load_task(args.task, split, args.limit, args.data) for split in ("train", "dev"))
    samples, samples_hash = art.load_samples(args, train + dev)
    folder = args.runs / args.task / args.run / "truster"
    keys = ["bits", "seed", "limit", "lr", "rank", "epochs", "batch_size", "accumulate", "max_length"]
    about = {**art.fingerprint(args, args.truster_model, keys), "samples_sha256": samples_hash}
    tokenizer = art.load_tokenizer(args.truster_model)
    with art.lock(folder):
        if art.already_trained(folder, about):
            return
        groups = contrast(train, samples, tokenizer)
        print(f"{len(groups)} of {len(train)} questions have both right and wrong samples")
        if len(groups) < MIN_QUESTIONS:
            raise art.UserError(f"only {len(groups)} questions have both right and wrong samples, the Truster needs "
                                f"{MIN_QUESTIONS}: draw more with: python art.py sample --k 8, take more questions, or "
                                "use another --model with another --runs")
        groups = art.drop_long(groups, args.max_length)
        art.show_record({f"example, {'right' if correct else 'wrong'}": tokenizer.decode(row)
                         for row, correct in zip(groups[0]["rows"], groups[0]["correct"])})
        model = art.add_lora(art.load_scorer(args.truster_model, args.bits, args.seed), art.TaskType.SEQ_CLS, args.rank)
        art.check_scorer(model)
        collate = make_collate(tokenizer.pad_token_id)
        trained = art.fine_tune(model, groups, collate, truster_loss, args, folder, args.epochs)
        if art.RANK:
            return
        del model
        # what is measured is what a fresh process will load: the adapter on disk, not the one in memory
        figures = dev_figures(art.Truster(folder, about=about), dev, samples)
        art.write_about(folder / "args.json", {**about, **trained, "dev": figures})
    accuracy = art.show(figures["pairwise_accuracy"])
    print(f"{folder}: gets {accuracy} of {figures['pairs']} right/wrong pairs of dev right"
          + " (no question of dev has both)" * (not figures["pairs"]))


if __name__ == "__main__":
    art.run(main)
