"""Compare prompts of the refinement on training questions that the Asker has not seen.

    python docs/measure/refinements.py --task gsm8k --limit-train 800 --skip 600

The questions from number --skip on: their drafts, the lists of the run's Asker, and a refined answer
of each candidate, always taken or chosen by the higher mean log-probability of a token. A second
sample of the draft's prompt, which sees no list, stands beside them. No threshold, no test question.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art
import evaluate

HINTS = "Some questions that a solution may have to answer (some may be missing or wrong):"


def along_hints(llm, args, records, asked):
    """The sub-questions as hints before the question, then the draft's own instruction."""
    prompts = []
    for record, output in zip(records, asked):
        prompt = art.predict_prompt(record, args.strategy)
        if output["subquestions"]:
            hints = "\n".join(f"- {line}" for line in output["subquestions"])
            prompt = f"{HINTS}\n{hints}\n\n{prompt}"
        prompts.append(art.render(llm, args, prompt, args.strategy))
    return write(llm, args, prompts)


def write(llm, args, prompts):
    return [one for [one] in art.write_answers(llm, args, prompts, [0], args.refine_temperature)]


def candidates(llm, args, records, drafts, asked):
    """Yield (name, temperature, answers)."""
    for temperature in (0.0, 0.7):
        args.refine_temperature = temperature
        llm.label = f"refined at {temperature}"
        yield "sub-questions", temperature, art.refine(llm, args, records, drafts, asked)
    llm.label = "hints at 0.7"
    yield "hints", 0.7, along_hints(llm, args, records, asked)
    llm.label = "second sample"
    yield "second sample", 0.7, evaluate.second_sample(llm, args, records)


def points(new, old):
    found = evaluate.compare(new, old)
    return f"{evaluate.difference(found)}, {found['won']} won, {found['lost']} lost"


def main():
    parser = art.make_parser(__doc__, "evaluate")
    parser.add_argument("--skip", type=int, default=600, metavar="N",
                        help="training questions to leave out: those that the Asker learned from")
    args = art.parse(parser)
    records = art.load_split(args, "train")[args.skip:]
    llm, asker = art.open_model(args, "llm"), art.open_model(args, "asker")
    seen = (art.adapter_folder(args, "asker") / "questions.txt").read_text("utf-8").split()
    if not records or any(art.question_hash(record) in seen for record in records):
        raise art.UserError("raise --limit-train, or --skip: the Asker learned from these questions")
    llm.label, asker.label = "drafts", "lists"
    drafts = art.predict(llm, args, records, args.draft_temperature)
    asked = art.ask(asker, args, records, drafts)

    def correct(answers):
        return np.array([one["finished"] and art.is_correct(args.task, one["text"], record["answer"])
                         for one, record in zip(answers, records)], bool)

    def logprob(answers):
        return np.array([one["logprob"] / max(1, one["tokens"]) for one in answers])

    old, readable = correct(drafts), np.array([art.is_readable(one) for one in drafts])
    print(f"{len(records)} training questions, drafts: {old.mean():.1%} correct\n\n"
          "| candidate | T | fixed | broken | always (points, 95%) | chosen by log-probability |\n"
          + "| --- " * 6 + "|")
    for name, temperature, answers in candidates(llm, args, records, drafts, asked):
        new, finished = correct(answers), np.array([art.is_readable(one) for one in answers])
        takes = (finished & ~readable) | (
            (finished == readable) & (logprob(answers) > logprob(drafts)))
        print(f"| {name} | {temperature} | {(new & ~old).sum()} of {(~old).sum()} | "
              f"{(old & ~new).sum()} of {old.sum()} | {points(new, old)} | "
              f"{points(np.where(takes, new, old), old)} |", flush=True)


if __name__ == "__main__":
    art.run(main)
