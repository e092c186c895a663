"""Fine-tune the Truster with QLoRA: a correct answer should score above an incorrect one.

    python train_truster.py

The answers are the samples of data/sample.py, of questions with correct and incorrect ones. Every
pair is used, and each answer is scored once (paper, section 3.4). The adapter with its scalar head
is saved in runs/TASK/RUN/truster, with args.json, its settings and figures.
"""

import art


def contrast(records, lines, tokenizer):
    """The distinct answers of each question that has correct and incorrect ones."""
    groups = []
    for record in records:
        labels = art.distinct_samples(lines, record)
        if len({*labels.values()}) == 2:
            rows = [art.token_ids(tokenizer, art.trust_prompt(record, text)) for text in labels]
            groups.append({"rows": rows, "correct": list(labels.values()),
                           "input_ids": max(rows, key=len)})
    return groups


def collate(pad, groups):
    """The inputs of the model: answers in rows; `sizes` says how many belong to a question."""
    import torch
    rows = [row for group in groups for row in group["rows"]]
    labels = [label for group in groups for label in group["correct"]]
    ids, mask = art.pad_left(rows, pad)
    return {"input_ids": ids, "attention_mask": mask, "correct": torch.tensor(labels),
            "sizes": torch.tensor([len(group["rows"]) for group in groups])}


def pair_losses(scores, correct):
    """-log sigmoid(correct - incorrect) of all pairs of a question; scores and correct are (k,).

    >>> import torch
    >>> pair_losses(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([True, False, False]))
    tensor([0.6931, 0.6931])
    """
    from torch.nn.functional import logsigmoid
    return -logsigmoid(scores[correct][:, None] - scores[~correct][None, :]).flatten()


def loss(model, inputs):
    """{"pairs": the sum over the questions of the mean loss of a question's pairs}."""
    scores = art.score_batch(model, inputs["input_ids"], inputs["attention_mask"])
    sizes = inputs["sizes"].tolist()
    groups = zip(scores.split(sizes), inputs["correct"].split(sizes))
    return {"pairs": sum(pair_losses(*group).mean() for group in groups)}


def dev_auc(args):
    """The share of dev's pairs in order, the mean over the questions that have both kinds."""
    records = art.load_split(args, "dev")
    lines = art.load_samples(args, records)
    truster = art.open_model(args, "truster")
    truster.label = "trust on dev"
    labels = [art.distinct_samples(lines, record) for record in records]
    repeated = [record for record, own in zip(records, labels) for _ in own]
    answers = [{"text": text} for own in labels for text in own]
    scored = iter(art.trust(truster, args, repeated, answers))
    aucs = [art.auc([next(scored)["score"] for _ in own], list(own.values())) for own in labels]
    shares = [value for value in aucs if value is not None]
    return sum(shares) / len(shares) if shares else None


def main():
    args = art.parse(art.make_parser(__doc__, "truster"))
    tokenizer = art.load_tokenizer(args.truster_model)
    records = art.load_split(args, "train")
    lines = art.load_samples(args, records + art.load_split(args, "dev"))
    groups = contrast(records, lines, tokenizer)
    print(f"{len(groups):,} of {len(records):,} questions have correct and incorrect samples")
    if len(groups) < 8:
        raise art.too_few(lines, "the Truster needs 8 such questions")

    art.show({f"{'a correct' if correct else 'an incorrect'} answer": tokenizer.decode(ids)
              for ids, correct in zip(groups[0]["rows"], groups[0]["correct"])})
    art.train_adapter(args, "truster", records, groups, __file__, collate, loss, args.epochs)
    art.add_figure(args, "truster", "dev_auc", dev_auc)


if __name__ == "__main__":
    art.run(main)
