"""Fine-tune the Truster with QLoRA: a right answer to a question shall score above a wrong one (paper, section 3.4).

    python train_truster.py

The answers are the samples of `python art.py sample`; the LLM is not loaded. Every pair of a right (chosen) and a wrong
(rejected) answer to a question is used, and each answer is scored once. The adapter with its scalar head is written to
runs/<task>/<run>/truster, with args.json: what made it, and its figures.
"""

import numpy as np

import art


def contrast(records, samples, tokenizer):
    """The different answers to each question that has right and wrong ones; "input_ids" is the longest of them."""
    groups = []
    for record in records:
        answers = art.labels_of(samples[record["id"]])
        if 0 < sum(answers.values()) < len(answers):
            rows = tokenizer([art.trust_prompt(record, text) for text in answers])["input_ids"]
            groups.append({"rows": rows, "correct": list(answers.values()), "input_ids": max(rows, key=len)})
    print(f"{len(groups):,} of {len(records):,} questions have both right and wrong samples")
    if len(groups) < 8:
        raise art.UserError("the Truster needs 8 of them: draw more with art.py sample --k 8, or use another --model")
    return groups


def make_collate(pad):
    """Put the answers of several questions below each other; `sizes` says how many belong to each question."""
    def collate(groups):
        import torch
        ids, mask = art.pad_left([row for group in groups for row in group["rows"]], pad)
        return {"input_ids": ids, "attention_mask": mask,
                "sizes": torch.tensor([len(group["rows"]) for group in groups]),
                "correct": torch.tensor([label for group in groups for label in group["correct"]])}
    return collate


def pair_losses(scores, correct):
    """-log sigmoid(chosen - rejected) over all pairs of one question; scores (k,), correct (k,) bool.

    >>> import torch
    >>> pair_losses(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([True, False, False]))
    tensor([0.6931, 0.6931])
    """
    from torch.nn.functional import logsigmoid
    return -logsigmoid(scores[correct][:, None] - scores[~correct][None, :]).flatten()


def loss(model, batch):
    """Sum over the questions of the batch of the mean over a question's pairs."""
    scores, sizes = art.score_batch(model, batch["input_ids"], batch["attention_mask"]), batch["sizes"].tolist()
    groups = zip(scores.split(sizes), batch["correct"].split(sizes))
    return {"pairs": sum(pair_losses(group, correct).mean() for group, correct in groups)}


def dev_figures(run, dev, samples):
    """Share of right/wrong pairs of dev that the Truster orders right."""
    texts = {(record["id"], text): art.trust_prompt(record, text)
             for record in dev for text in art.labels_of(samples[record["id"]])}
    outputs = run.model("truster", "dev").score(list(texts.values()))
    scores = {key: output["score"] for key, output in zip(texts, outputs)}
    hits = []
    for record in dev:
        labels = art.labels_of(samples[record["id"]])
        right, wrong = ([scores[record["id"], text] for text, correct in labels.items() if correct is kind]
                        for kind in (True, False))
        hits += [a > b for a in right for b in wrong]
    return {"pairs": len(hits), "right_pairs": float(np.mean(hits)) if hits else None}


def main():
    args = art.parse(art.make_parser(__doc__, "truster"), training="truster")
    tokens = args.batch_size * art.PRESETS[args.preset]["k"] * args.max_length
    art.announce_needs({args.truster_model: args.adapter_bits}, tokens=tokens)
    run, tokenizer = art.Run(args), art.load_tokenizer(args.truster_model)
    train_set, dev = art.load_split(args, "train"), art.load_split(args, "dev")
    samples = art.load_samples(args, train_set + dev)
    print(f"[3/5] the Truster learns from the samples of {len(train_set):,} questions")
    groups = contrast(train_set, samples, tokenizer)

    def fine_tune(folder):
        kept = art.drop_long(groups, args.max_length)
        art.show_record({"a right answer" if correct else "a wrong answer": tokenizer.decode(ids)
                         for ids, correct in zip(kept[0]["rows"], kept[0]["correct"])})
        model = art.load_scorer(args.truster_model, args.adapter_bits, args.seed, args.compute)
        model = art.add_lora(model, "SEQ_CLS", args.rank, seed=args.seed)
        return art.fine_tune(model, kept, make_collate(tokenizer.pad_token_id), loss, args, folder, args.epochs)

    art.train_adapter(run, "truster", args.truster_model, train_set, groups,
                      (loss, pair_losses, make_collate, art.score_batch), fine_tune, epochs=args.epochs)
    figures = dev_figures(run, dev, samples)  # the adapter is loaded from disk, as evaluate.py will
    folder = run.folder / "truster"
    art.write(folder / "args.json", {**run.about("truster"), "dev": figures})
    print(f"{folder}: {art.show(figures['right_pairs'])} of {figures['pairs']:,} right/wrong pairs of dev in order")
    if args.push:
        art.push(run, "truster")
    art.log_start(run)


if __name__ == "__main__":
    art.run(main)
