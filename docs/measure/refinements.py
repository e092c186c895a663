"""Compare prompts of the refinement on training questions that the Asker has not seen.

    python docs/measure/refinements.py --task gsm8k --limit-train 800 --skip 600

The questions from number --skip on: their drafts, the lists of the run's Asker, and a refined
answer of each candidate, always taken or chosen by the higher mean log-probability of a token. The
last line is a second sample of the draft's prompt, which sees no list. No threshold, no test
question.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import art
import evaluate
from evaluate import Row, Stage


def along_lines(temperature):
    """The question and the sub-questions on lines, then an instruction to answer them all."""
    def step(llm, args, records, drafts, asked):
        prompts = []
        for record, draft, output in zip(records, drafts, asked):
            subquestions = output["subquestions"]
            prompt = art.refine_prompt(record, draft["text"], subquestions, show_draft=False)
            how = "refine" if subquestions else "refine_plain"
            prompts.append(art.render(llm, args, prompt, how))
        return [answer for [answer] in art.write_answers(llm, args, prompts, [0], temperature)]
    return step


CANDIDATES = {
    "sub-questions, greedy": Stage("llm", along_lines(0.0), reads=("draft", "ask")),
    "sub-questions, 0.7": Stage("llm", along_lines(0.7), reads=("draft", "ask")),
    "hints (art.refine)": Stage("llm", art.refine, reads=("draft", "ask")),
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
