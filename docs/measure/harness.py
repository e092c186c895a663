"""Compare the drafts of dev with lm-evaluation-harness: same weights, same questions.

    pip install lm-eval
    python docs/measure/harness.py --task gsm8k --model FOLDER --limit 200    # after evaluate.py

The harness has its own prompts: 8 exemplars as plain text (gsm8k_cot), and none, with the chat
template (gsm8k_cot_zeroshot). Of an answer it reads the last number (its flexible-extract).
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art
import evaluate

TASKS = {"gsm8k_cot": "gsm8k-cot.yaml", "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot.yaml"}


def harness(args, name, records):
    """Which answers of the harness are correct: bools in the order of the records."""
    import lm_eval
    import torch
    chat = name == "gsm8k_cot_zeroshot"
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder, "test.jsonl")
        art.write(questions, [{"question": one["question"], "answer": one["answer"]}
                              for one in records])
        lines = [f"include: {Path(lm_eval.__file__).parent / 'tasks/gsm8k' / TASKS[name]}",
                 f"task: {name}_local", "dataset_path: json", "dataset_name: null",
                 f"dataset_kwargs: {{data_files: {{test: {questions}}}}}",
                 "training_split: null", "test_split: test",
                 "generation_kwargs: {do_sample: false, max_gen_toks: 512, "
                 "until: ['Q:', '</s>', '<|im_end|>']}"]
        if chat:
            lines.append("fewshot_split: null")
        Path(folder, f"{name}.yaml").write_text("\n".join(lines), "utf-8")
        found = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": args.model, "dtype": "bfloat16"}, batch_size=50,
            tasks=[f"{name}_local"], apply_chat_template=chat, bootstrap_iters=0,
            device="cuda" if torch.cuda.is_available() else "cpu",
            task_manager=lm_eval.tasks.TaskManager(include_path=folder))
    rows = [row for row in found["samples"][f"{name}_local"] if row["filter"] == "flexible-extract"]
    return [bool(row["exact_match"]) for row in sorted(rows, key=lambda row: row["doc_id"])]


def main():
    args = art.parse(art.make_parser(__doc__, "evaluate"))
    dev = art.load_columns(args.folder, "dev.jsonl")
    correct = dict(zip(dev["id"], dev["correct.draft"]))
    records = [record for record in art.load_split(args, "dev") if record["id"] in correct]
    ours = [correct[record["id"]] for record in records]
    print(f"the kit's drafts: {sum(ours)} of {len(ours)} correct")
    for name in TASKS:
        theirs = harness(args, name, records)
        found = evaluate.compare(ours, theirs)
        print(f"{name}: {sum(theirs)} correct; the kit {evaluate.difference(found)} points, "
              f"p = {found['p']:.2g}", flush=True)


if __name__ == "__main__":
    art.run(main)
