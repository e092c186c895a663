"""Drafts of the kit against lm-evaluation-harness: the same weights, the same questions, its prompts and its reading.

    pip install lm-eval        # for this comparison alone
    python tests/harness.py --model DIR --task gsm8k-offline --limit 100

The drafts are those of dev, from `python art.py sample`. The harness asks twice: few-shot (gsm8k_cot, plain text) and
zero-shot (gsm8k_cot_zeroshot, chat template), and reads the last number of an answer (flexible-extract).
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import art
import evaluate

TASKS = {"gsm8k_cot": ("gsm8k-cot.yaml", False), "gsm8k_cot_zeroshot": ("gsm8k-cot-zeroshot.yaml", True)}  # chat?


def local_task(name, records, folder):
    """The harness's task on our questions, as a file of its own; returns its name."""
    import lm_eval
    art.write(folder / "test.jsonl", [{key: record[key] for key in ("question", "answer")} for record in records])
    source = Path(lm_eval.__file__).parent / "tasks/gsm8k" / TASKS[name][0]
    (folder / f"{name}.yaml").write_text("\n".join([
        f"include: {source}", f"task: {name}_local", "dataset_path: json", "dataset_name: null", "dataset_kwargs:",
        f"  data_files: {{test: {folder / 'test.jsonl'}}}", "training_split: null", "test_split: test",
        *(["fewshot_split: null"] if name == "gsm8k_cot_zeroshot" else []),
        "generation_kwargs: {do_sample: false, max_gen_toks: 512, until: ['Q:', '</s>', '<|im_end|>']}"]), "utf-8")
    return f"{name}_local"


def harness(args, name, records):
    """Which answers of the harness are right: list of bool, in the order of the records."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    with tempfile.TemporaryDirectory() as folder:
        task = local_task(name, records, Path(folder))
        found = simple_evaluate(
            model="hf", model_args={"pretrained": args.model, "dtype": "bfloat16"}, tasks=[task], batch_size=80,
            device="cuda" if torch.cuda.is_available() else "cpu", apply_chat_template=TASKS[name][1],
            task_manager=TaskManager(include_path=folder), bootstrap_iters=0)
    rows = [row for row in found["samples"][task] if row["filter"] == "flexible-extract"]
    return [bool(row["exact_match"]) for row in sorted(rows, key=lambda row: row["doc_id"])]


def main():
    args = art.parse(art.make_parser(__doc__))
    records = art.load_split(args, "dev")
    samples = art.load_samples(args, records)
    ours = [art.verdict(args.task, samples[record["id"]]["draft"], record["answer"]) for record in records]
    print(f"the kit's drafts: {sum(ours)} of {len(ours)} right")
    for name in TASKS:
        theirs = harness(args, name, records)
        made = evaluate.compare(ours, theirs, args.seed)
        print("{}: {} of {} right; the kit {:+.1%} ({:+.1%} to {:+.1%}), p = {:.2g}".format(
            name, sum(theirs), len(theirs), made["delta"], *made["ci95"], made["p"]), flush=True)


if __name__ == "__main__":
    art.run(main)
