"""Let the LLM answer: its correct and incorrect answers are what Asker and Truster learn from.

    python data/sample.py                   # runs/TASK/samples.jsonl and llm.json (the settings)
    python data/sample.py --subquestions    # for data without sub-questions: the LLM writes them

Draws --k samples of each training and dev question, and the draft of each dev question.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import art


def choose_bits(name):
    """The bits of the LLM's weights. They follow from the machine, so a resumed run takes the same.

    A GPU takes 16 bits if these fill a quarter of its memory at most, else 4. A CPU is slow with 4
    bits, often also with 16: it takes 32 if these fill half of the memory at most, else 16.
    """
    import psutil
    import torch
    import transformers
    config = art.from_pretrained("AutoConfig", name)
    with torch.device("meta"):  # counts the parameters without loading them
        parameters = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    if torch.cuda.is_available():
        return 16 if 2 * parameters < torch.cuda.mem_get_info()[1] / 4 else 4
    return 32 if 4 * parameters < psutil.virtual_memory().total / 2 else 16


def sample(args, train):
    """Write samples.jsonl and llm.json."""
    dev = art.load_split(args, "dev")
    llm = art.open_model(args, "llm")
    print(f"the LLM answers {len(train):,} training and {len(dev):,} dev questions "
          f"{args.k} times", flush=True)
    llm.label = "samples"
    drawn = art.sample_answers(llm, args, train + dev, range(args.k), args.temperature)
    llm.label = "drafts of dev"
    drafts = art.predict(llm, args, dev, args.draft_temperature)

    lines = []
    for record, samples in zip(train + dev, drawn):
        lines.append({**record, "samples": label(args, record, samples)})
    for record, line, draft in zip(dev, lines[len(train):], drafts):
        (line["draft"],) = label(args, record, [draft])
    art.write(args.shared / "samples.jsonl", lines)
    art.write(args.shared / "llm.json", {key: getattr(args, key) for key in art.LLM_KEYS})
    report(args, train, drawn[: len(train)])


def label(args, record, outputs):
    """The outputs, each with "correct"; one that was cut off is not."""
    for output in outputs:
        correct = art.is_correct(args.task, output["text"], record["answer"])
        output["correct"] = correct and output["finished"]
    return outputs


def report(args, records, drawn):
    """Print one sample, and how many are correct."""
    first, samples = drawn[0][0], [output for outputs in drawn for output in outputs]
    name = "a correct sample" if first["correct"] else "an incorrect sample"
    art.show({"question": records[0]["question"], name: first["text"]})
    failed = [output["failed"] for output in samples if output["failed"]]
    if failed:
        print(f"warning: {len(failed):,} samples failed, the first one with: {failed[0]}")
    cut_off = np.mean([not output["finished"] and not output["failed"] for output in samples])
    if cut_off > 0.02:
        print(f"warning: {cut_off:.1%} of the samples were cut off and count as incorrect: raise "
              "--max-new-tokens")
    mixed = sum(len({output["correct"] for output in outputs}) == 2 for outputs in drawn)
    print(f"{args.shared / 'samples.jsonl'}: {len(samples):,} samples of {len(records):,} training "
          f"questions, {np.mean([output['correct'] for output in samples]):.1%} correct; "
          f"{mixed:,} questions have correct and incorrect ones")


def subquestions(args, records):
    """Write subquestions.jsonl: the LLM asks what the gold solution of each question settles."""
    llm = art.open_model(args, "llm")
    llm.label = "sub-questions"
    prompts = []
    for record in records:
        solution = art.solution_text(record.get("solution", []), record["answer"])
        prompts.append(art.render(llm, args, art.ask_prompt(record, solution), "ask"))
    asked = art.write_subquestions(llm, args, prompts)
    lines = [{**record, "subquestions": output["subquestions"]}
             for record, output in zip(records, asked)]
    art.write(args.shared / "subquestions.jsonl", lines)
    art.show({"question": records[0]["question"],
              "sub-questions": "\n".join(asked[0]["subquestions"])})
    failed = sum(bool(output["failed"]) for output in asked)
    print(f"{len(asked):,} questions, {failed} failed: run python train_asker.py --task {args.task}")


def main():
    parser = art.make_parser(__doc__, "sample")
    parser.add_argument("--subquestions", action="store_true",
                        help="write sub-questions instead of samples")
    args = art.parse(parser, remember="--subquestions" in sys.argv)
    train = art.load_split(args, "train")  # before a model is loaded
    if not args.base_url and args.bits is None:
        args.bits = choose_bits(args.model)
    subquestions(args, train) if args.subquestions else sample(args, train)


if __name__ == "__main__":
    art.run(main)
