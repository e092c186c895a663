"""Compare prompts of the refinement on training questions that the Asker has not seen.

    python docs/measure/refinements.py --task gsm8k --limit-train 800 --skip 600

The questions from number --skip on: their drafts, the lists of the run's Asker, and a refined
answer of each candidate, always taken or chosen by the higher mean log-probability of a token. The
last line is a second sample of the draft's prompt, which sees no list. No threshold, no test
question.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art
import evaluate
from evaluate import Row, Stage

HINTS = "Some questions that a solution may have to answer (some may be missing or wrong):"


def refine_at(temperature):
    """Step 3 at another temperature."""
    def step(llm, args, *read):
        args = argparse.Namespace(**{**vars(args), "refine_temperature": temperature})
        return art.refine(llm, args, *read)
    return step


def along_hints(llm, args, records, _, asked):
    """The sub-questions as hints before the question, then the draft's own instruction."""
    prompts = []
    for record, output in zip(records, asked):
        prompt = art.predict_prompt(record, args.strategy)
        if output["subquestions"]:
            hints = "\n".join(f"- {line}" for line in output["subquestions"])
            prompt = f"{HINTS}\n{hints}\n\n{prompt}"
        prompts.append(art.render(llm, args, prompt, args.strategy))
    return [answer for [answer] in art.write_answers(llm, args, prompts, [0], 0.7)]


CANDIDATES = {
    "sub-questions, greedy": Stage("llm", refine_at(0.0), reads=("draft", "ask")),
    "sub-questions, 0.7": Stage("llm", refine_at(0.7), reads=("draft", "ask")),
    "hints, 0.7": Stage("llm", along_hints, reads=("draft", "ask")),
    "second sample": evaluate.STAGES["second"]}


def points(correct, drafts):
    found = evaluate.compare(correct, drafts)
    return f"{evaluate.difference(found)}, {found['won']} won, {found['lost']} lost"


def main():
    parser = art.make_parser(__doc__, "evaluate")
    parser.add_argument("--limit-train", type=art.COUNT, metavar="N", help="only the first N")
    parser.add_argument("--skip", type=int, default=600, metavar="N",
                        help="training questions to leave out: those that the Asker learned from")
    args = art.parse(parser)
    records = art.load_split(args, "train")[args.skip:]
    if not records:
        raise art.UserError("no question is left: raise --limit-train, or lower --skip")
    rows = {name: Row(answer=name) for name in CANDIDATES}
    evaluate.check_adapters(args, {"asker": evaluate.ROWS["asker"]}, records)
    evaluate.STAGES.update(CANDIDATES)
    outputs = evaluate.Outputs(args, [], records)
    outputs.ask({"draft", "ask", *CANDIDATES})
    drafts = outputs.correct["draft"]
    print(f"{len(records)} training questions, drafts: {drafts.mean():.1%} correct\n\n"
          "| candidate | fixed | broken | always (points, 95%) | chosen by log-probability |\n"
          + "| --- " * 5 + "|")
    for name, row in rows.items():
        figures, always = evaluate.make_row(outputs, row)
        _, chosen = evaluate.make_row(outputs, Row(answer=name, chooser="logprob"))
        print(f"| {name} | {figures['fixed']} of {(~drafts).sum()} | {figures['broken']} of "
              f"{drafts.sum()} | {points(always, drafts)} | {points(chosen, drafts)} |")


if __name__ == "__main__":
    art.run(main)
