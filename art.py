"""ART: Ask, Refine, and Trust (Shridhar et al., arXiv 2311.07961). The one module that all scripts share.

    question -> PREDICT -> draft -> ASK: sub-questions, and "refine?" -- no ------------------> draft
                                        |
                                        yes -> REFINE -> refinement -> TRUST -> the better one

    python art.py sample                # the LLM answers the training questions k times: what the trainings learn from
    python art.py subquestions          # only for data without sub-questions: the LLM writes them
    python art.py solve "QUESTION"      # one question through the four steps

Three parts: the method; data and commands; machinery (models, their cache, QLoRA). Read the first, skip the last.
"""

import argparse
import ast
import collections
import contextlib
import copy
import functools
import gc
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
if sys.platform == "linux":  # torch reads it when it is imported: keys and values grow by pieces of ever new sizes
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# ======================================================================================================================
# Part 1. The method. A step is a prompt, what a good answer to it looks like, how that answer is read, and a function
# of lists. A record is {"id", "question", "answer", "solution": [[sub-question, step], ...]} and, in StrategyQA,
# "facts"; an exemplar has a "draft" besides, right or wrong. `args` are the flags (part 2). `lm` is a Model (part 3):
#     lm.render(prompts, exemplars, instruction)     prompts as the model reads them
#     lm.generate(prompts, max_new_tokens, stop)     k outputs each: {"text", "stopped", "tokens", "logprob", ...}
#     lm.choose(prompts, before, options)            an output each: {"p": probability of the first of two words}
#     truster.score(texts)                           an output each: {"score"}
# and lm.chat, lm.exemplars (shots); of a trained adapter, from its args.json, lm.strategy and lm.prior_odds.
# ======================================================================================================================

# What a chat model is told behind the question; a base model is shown exemplars instead.
INSTRUCTIONS = {
    "cot": "Answer the question. Reason step by step, and {end}",
    "decomp": "Ask the sub-questions that lead to the answer, answer them one after the other, then the question, and "
              "{end}",
    "ask": "Write the sub-questions that a right answer to the question has to settle, one a line. Then check the "
           "given answer: the last line is 'Refine: Yes' if it is wrong, 'Refine: No' if it is right.",
    "refine": "Answer the sub-questions one after the other, then the question. Reason step by step, and {end}",
    "refine_plain": "Check the given answer and write a revised one. Reason step by step, and {end}",
    "choose": "Which answer to the question is better? Write one letter, A or B.",
}
END = {"number": "put the final answer in \\boxed{}.", "yes/no": "put the final answer, yes or no, in \\boxed{}."}


def instruction(task, step):
    """What a chat model is told to do in a step."""
    return INSTRUCTIONS[step].format(end=END[TASKS[task]["answer"]])


def question_block(record, facts=False):
    """The question as every prompt begins, with StrategyQA's supporting facts if asked for."""
    lines = [f"Question: {record['question']}"]
    if facts and record.get("facts"):
        lines += ["Facts:"] + [f"- {fact}" for fact in record["facts"]]
    return "\n".join(lines) + "\n"


# --- Step 1, predict: an answer by chain of thought, or by `decomp`, whose lines each ask a sub-question and answer it
# Facts are shown in step 3 (--facts refine), in steps 1 and 3 (both) or never (none); Asker and Truster never see them.


def predict_prompt(record, strategy="cot", facts=False):
    """The question, and where the answer begins."""
    return question_block(record, facts) + ("Answer:\n" if strategy == "cot" else "Answer by sub-questions:\n")


def solution_text(solution, answer, strategy="cot"):
    r"""A good answer: one step a line, then `#### answer`.

    >>> solution_text([["How many are left?", "5 - 2 = 3 are left."]], "3", "decomp")
    'How many are left? 5 - 2 = 3 are left.\n#### 3'
    """
    lines = [step if strategy == "cot" else f"{subquestion} {step}".strip() for subquestion, step in solution]
    return "\n".join([*filter(None, lines), f"#### {answer}"])


def predict(lm, args, records, temperature=0.0):
    """Step 1: an answer to each question (paper, section 3.1)."""
    return [output for (output,) in sample_answers(lm, args, records, 1, temperature)]


def sample_answers(lm, args, records, k, temperature):
    """k answers to each question: lists of k outputs."""
    strategy, facts = lm.strategy or args.strategy, args.facts == "both"
    shots = [(predict_prompt(e, strategy, facts), solution_text(e["solution"], e["answer"], strategy))
             for e in lm.exemplars]
    prompts = [predict_prompt(record, strategy, facts) for record in records]
    return solutions(lm, args, lm.render(prompts, shots, instruction(args.task, strategy)), k, temperature)


def solutions(lm, args, prompts, k=1, temperature=0.0):
    """Continue prompts up to the answer line (a base model at most up to a blank line), and read the answer."""
    stop = ANSWER_LINE[TASKS[args.task]["answer"]] + r"[^\n]*\n" + ("" if lm.chat else r"|\n\n|\n(?=Question:)")
    outputs = lm.generate(prompts, args.max_new_tokens, stop, k, temperature)
    return [[{**output, "answer": extract_answer(args.task, output["text"])} for output in samples]
            for samples in outputs]


# --- Step 2, ask: which sub-questions should the draft have settled, and does it have to be refined?

DECISION = "Refine:"  # stands before the Asker's Yes or No


def ask_prompt(record, draft):
    """Question and draft."""
    return f"{question_block(record)}Answer:\n{draft}\nSub-questions:\n"


def ask_target(subquestions, refine):
    r"""What the Asker learns to write.

    >>> ask_target(["How many are left?"], True)
    'How many are left?\nRefine: Yes'
    """
    return "\n".join([*subquestions, f"{DECISION} {'Yes' if refine else 'No'}"])


def parse_subquestions(text):
    r"""The lines before the decision, without bullets, twelve at most.

    >>> parse_subquestions("1. How many are left?\n- Who has them?\nRefine:")
    ['How many are left?', 'Who has them?']
    """
    lines = re.split(f"{DECISION}|Revised answer:", text)[0].splitlines()
    lines = [re.sub(r"^\s*(?:[-*]|\d{1,3}[.)])?\s*", "", line).strip() for line in lines]
    return [line for line in lines if line][:12]


def subquestions_of(record):
    """The gold sub-questions of a record or exemplar."""
    return [subquestion for subquestion, _ in record.get("solution", ()) if subquestion]


def ask(lm, args, records, drafts):
    """Step 2: sub-questions, and `p_refine`, the probability that the draft has to be refined (paper, section 3.2).

    `p_refine` is Yes against No behind "Refine:", which is put behind the sub-questions. Its odds are multiplied by
    `lm.prior_odds`: training balances both classes, this puts the share of wrong samples back.
    """
    shots = [(ask_prompt(e, e["draft"]), ask_target(
        subquestions_of(e), not is_correct(args.task, e["draft"], e["answer"]))) for e in lm.exemplars]
    prompts = [ask_prompt(record, draft["text"]) for record, draft in zip(records, drafts)]
    prompts = lm.render(prompts, shots, instruction(args.task, "ask"))
    outputs = [output for (output,) in lm.generate(prompts, args.max_new_tokens, DECISION)]
    asked = [parse_subquestions(output["text"]) for output in outputs]
    begun = ["\n".join([*subquestions, DECISION]) for subquestions in asked]
    decisions = lm.choose(prompts, DECISION, (" Yes", " No"), begun)
    return [{"subquestions": subquestions, "p_refine": with_odds(decision["p"], lm.prior_odds),
             "tokens": output["tokens"], "prompt_tokens": output["prompt_tokens"] + decision["prompt_tokens"],
             "stopped": output["stopped"]} for subquestions, decision, output in zip(asked, decisions, outputs)]


def with_odds(p, odds):
    """The probability whose odds are those of `p` times `odds`.

    >>> with_odds(0.5, 3), with_odds(1.0, 3)
    (0.75, 1.0)
    """
    return p * odds / (p * odds + 1 - p)


# --- Step 3, refine: an answer along the sub-questions


def refine_prompt(record, draft, subquestions=(), facts=False, show_draft=True):
    """Question, draft and sub-questions. Without sub-questions the draft is shown in any case."""
    shown = f"Answer:\n{draft}\n" if show_draft or not subquestions else ""
    asked = "".join(line + "\n" for line in ["Sub-questions:", *subquestions]) if subquestions else ""
    return f"{question_block(record, facts)}{shown}{asked}Revised answer:\n"


def refine(lm, args, records, drafts, asked=None):
    """Step 3: a revised answer along the sub-questions, or where there are none of the draft (paper, section 3.3)."""
    facts, show_draft, prompts = args.facts != "none", args.show_draft == "yes", []
    for record, draft, output in zip(records, drafts, asked or [{"subquestions": ()}] * len(records)):
        subquestions = output["subquestions"]
        shots = [(refine_prompt(e, e["draft"], subquestions_of(e) if subquestions else (), facts, show_draft),
                  solution_text(e["solution"], e["answer"])) for e in lm.exemplars]
        prompt = refine_prompt(record, draft["text"], subquestions, facts, show_draft)
        prompts += lm.render([prompt], shots, instruction(args.task, "refine" if subquestions else "refine_plain"))
    return [output for (output,) in solutions(lm, args, prompts)]


# --- Step 4, trust: which of the two answers stands?


def trust_prompt(record, text):
    """What the Truster scores."""
    return f"{question_block(record)}Answer:\n{text}"


def trust(truster, args, records, drafts, refined):
    """Step 4: the Truster's scores of draft and refinement (paper, section 3.4)."""
    old, new = (truster.score([trust_prompt(record, answer["text"]) for record, answer in zip(records, answers)])
                for answers in (drafts, refined))
    return [{"draft": a["score"], "refined": b["score"], "prompt_tokens": a["prompt_tokens"] + b["prompt_tokens"]}
            for a, b in zip(old, new)]


def choice_prompt(record, first, second):
    """Step 4 by the LLM itself: the answer is A or B."""
    return f"{question_block(record)}Answer A:\n{first}\nAnswer B:\n{second}\nBetter answer:\n"


def trust_self(lm, args, records, drafts, refined):
    """Step 4 by the LLM itself: it sees the two answers in both orders, since a model may prefer a place."""
    pairs = [*zip(drafts, refined), *zip(refined, drafts)]
    prompts = [choice_prompt(record, a["text"], b["text"]) for record, (a, b) in zip([*records, *records], pairs)]
    outputs = lm.choose(lm.render(prompts, (), instruction(args.task, "choose")), "Better answer:\n", ("A", "B"))
    return [{"draft": (a["p"] + 1 - b["p"]) / 2, "refined": (1 - a["p"] + b["p"]) / 2,
             "prompt_tokens": a["prompt_tokens"] + b["prompt_tokens"]}
            for a, b in zip(outputs, outputs[len(records):])]


# --- The loop


def ask_refine_trust(run, records, threshold):
    """The paper's loop: {"draft", "asked", "refined", "trust", "final"} for each record, as far as it got.

    `solve` uses it. For the table evaluate.py asks every step about every question instead, and applies the same two
    rules to the outputs.
    """
    llm, args = run.model("llm"), run.args
    drafts = predict(llm, args, records, args.draft_temperature)
    asked = ask(run.model("asker"), args, records, drafts)
    results = [{"draft": draft, "asked": output, "final": draft} for draft, output in zip(drafts, asked)]
    doubted = [i for i, output in enumerate(asked) if output["p_refine"] >= threshold]
    if doubted:
        records, drafts, asked = ([column[i] for i in doubted] for column in (records, drafts, asked))
        refined = refine(llm, args, records, drafts, asked)
        scores = trust(run.model("truster"), args, records, drafts, refined)
        for i, new, score in zip(doubted, refined, scores):
            better = new if score["refined"] > score["draft"] else results[i]["draft"]
            results[i] |= {"refined": new, "trust": score, "final": better}
    return results


# --- The rival that does all four steps in one text, behind `predict_prompt`


def end_to_end_target(draft, subquestions, refine, solution):
    """What it is fine-tuned to write."""
    text = f"{draft}\nSub-questions:\n{ask_target(subquestions, refine)}"
    return f"{text}\nRevised answer:\n{solution}" if refine else text


def parse_end_to_end(text):
    r"""The answer that stands at its end.

    >>> parse_end_to_end(end_to_end_target("#### 4", [], True, "#### 3")), parse_end_to_end("#### 4\nSub-questions:\n")
    ('#### 3', '#### 4')
    """
    draft, _, rest = text.partition("\nSub-questions:")
    return rest.partition("Revised answer:\n")[2] or draft


def end_to_end(lm, args, records):
    """An answer to each question by the model that does everything."""
    outputs = lm.generate(lm.render([predict_prompt(record) for record in records]), 3 * args.max_new_tokens)
    texts = [parse_end_to_end(output["text"]) for (output,) in outputs]
    return [{**output, "text": text, "answer": extract_answer(args.task, text)}
            for (output,), text in zip(outputs, texts)]


# --- Answers: read from what a model wrote, compared as numbers or as yes/no; what cannot be read is None, never right

# What may stand before an answer: blanks, ** $ - " ( and LaTeX such as \boxed{\text{. The bounds keep it fast on junk.
_SKIP = r"(?!#)(?=[^\w\n#]{0,10}\w)[^\w\n#]{0,10}(?:\\[a-zA-Z]{1,9}[^\w\n#]{1,5}){0,2}"
_YES_NO = (r"((?i:yes|no|true|false))\b(?![-/]|(?i: or| and (?:yes|no)| one| longer| doubt| matter| idea| clue| way"
           r"| (?:definite |clear )?(?:information|evidence|data|record|answer))\b)")  # not: yes/no, no one, no idea
_PHRASE = r"\b(?i:answer(?: to (?:the|this) question)?\W{0,4}(?:is\b|:|=))"  # the answer is; **Answer:**; answer =
_WINDOW = 5000  # an answer line is read so far, and the fallbacks read so many last characters: junk costs no time
_HEAD = 100_000  # an answer line is looked for in so many first characters, then in the last ones

# The explicit answer line, `#### 18` or `#### yes`; not a heading as `#### Step 1: ...` or `#### 1. Find ...`.
ANSWER_LINE = {"number": "####" + _SKIP + r"(?![0-9][.):][ *]{1,3}[A-Za-z])[0-9]", "yes/no": "####" + _SKIP + _YES_NO}

_SIGN = r"((?:(?<![\w)\]}%$€£-])(?<![0-9)] )-)?(?:[$€£] ?-?)?)"  # - -$ $- $; not the - of 10-20, step-3, 16 -3
_DIGITS = r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"  # 1,000.50 or 12 or .5
_NUMBER = re.compile(  # not an exponent (m^2, m^{2}); sign; the 3 of 3 1/2; number; denominator
    r"(?<![0-9^])(?<!\^\{)" + _SIGN + r"(?:([0-9]+) (?=[0-9]+ ?/ ?[0-9]))?" + _DIGITS + "(?: ?/ ?" + _DIGITS + ")?"
)

GOLD = {"number": _NUMBER, "yes/no": "yes|no"}  # what a gold answer has to look like


def _plain(text):
    r"""LaTeX and Unicode made plain: `9{,}500` is 9,500 and `3\frac{1}{2}` is 3 1/2; other commands become a blank."""
    for old, new in [("−", "-"), ("–", "-"), ("{,}", ","), ("\\,", ","), ("\\!", ""), ("\\$", "$")]:
        text = text.replace(old, new)
    text = re.sub(r"(?<=[0-9])\\(?=[dt]?frac)", r" \\", text)
    text = re.sub(r"\\[dt]?frac\{([0-9.,]+)\}\{([0-9.,]+)\}", r"\1/\2", text)
    return re.sub(r"\\[a-zA-Z]{1,20}", " ", text)


def _number(text, last=False):
    """The first number of the first line (`9 * 2 = 18` counts as its result), or the last number of the text.

    >>> _number("$1,000.50 (see step 2)"), _number("9 * 2 = $18 a day"), _number("1/3 of 10", last=True), _number("1/0")
    ('1000.5', '18', '10', None)
    """
    text = _plain(text[:_WINDOW] if last else text[:_WINDOW].split("\n")[0])
    if last:
        found = ([None] + list(_NUMBER.finditer(text)))[-1]
    else:
        result = re.match(r"\W*[^A-Za-z(]*", text)[0].rpartition("=")[2]
        found = _NUMBER.search(result) or _NUMBER.search(text)
    if not found or len(found[0]) > 100:  # longer ones are runaway text, and Python refuses the longest
        return None
    sign, whole, number, below = ((part or "").replace(",", "") for part in found.groups())
    if below and Fraction(below) == 0:
        return None
    value = Fraction(whole or 0) + Fraction(number) / Fraction(below or 1)
    minus = "-" if "-" in sign and value else ""
    text = f"{minus}{value}"
    if 10**20 % value.denominator == 0:  # a decimal of up to 20 places, not as 1/3
        decimals = f"{int(value % 1 * 10**20):020}".rstrip("0")
        text = f"{minus}{int(value)}.{decimals}".rstrip(".")
    return text if len(text) <= 100 else None  # so that it reads as itself


def extract_answer(task, text):
    r"""The answer in a model's text, in canonical form, or None. The first `####` line wins: the rest is past the stop.

    Failing that, for a number: the last \boxed{}, the last "the answer is", the last number; for yes/no: the last "the
    answer is", or a text that opens with the bare word. Never a guess: "No one knows" and "I do not know" are None.

    >>> extract_answer("gsm8k", "9 * 2 = 18\n#### **$1,018.00**\n\nQuestion: 3"), extract_answer("gsm8k", "9 - 2 = 7.")
    ('1018', '7')
    >>> extract_answer("strategyqa", "So the answer is **No**."), extract_answer("strategyqa", "No one knows.")
    ('no', None)
    """
    text, kind = text or "", TASKS[task]["answer"]
    head, tail = text[:_HEAD], text[-_WINDOW:]  # a page of junk costs no time
    line = re.search(ANSWER_LINE[kind], head) or re.search(ANSWER_LINE[kind], tail)
    if kind == "number":
        if line:
            return _number(line.string[line.start() + 4 :])
        for marker in (r"\\boxed", _PHRASE):
            found = list(re.finditer(marker + "(?=" + _SKIP + "[0-9])", tail))
            if found:
                return _number(tail[found[-1].end() :])
        return _number(tail, last=True)
    words = [line[1]] if line else re.findall(rf"(?:{_PHRASE}|\\boxed)\s{{0,3}}{_SKIP}{_YES_NO}", tail)
    opening = re.match(rf"{_SKIP}{_YES_NO}(?=[^\S\n]*(?:[^\w\s]|\n|$))", text.strip()[:_WINDOW])
    word = words[-1] if words else opening[1] if opening else ""
    return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}.get(word.lower())


def is_correct(task, text, gold):
    """Does the text's answer equal the gold one? No answer is wrong.

    >>> is_correct("gsm8k", "#### $1,000.00", "1000"), is_correct("gsm8k", "I do not know", "18")
    (True, False)
    """
    answer = extract_answer(task, text)
    return answer is not None and answer == extract_answer(task, f"#### {gold}")


def verdict(task, output, gold):
    """Is an answer right? One that was cut off is not, whatever its last number."""
    return output["stopped"] and is_correct(task, output["text"], gold)


# ======================================================================================================================
# Part 2. Data and commands: tasks, files, flags; `sample`, `subquestions`, `solve`.
# ======================================================================================================================

TASKS = {  # how an answer is read; the command that makes the data; whose exemplars.jsonl it has. A new task: one line
    "toy": {"answer": "number", "prepare": "data/toy/prepare.py", "exemplars": "toy"},
    "gsm8k": {"answer": "number", "prepare": "data/prepare.py gsm8k", "exemplars": "gsm8k"},
    "gsm8k-offline": {"answer": "number", "prepare": "data/prepare.py gsm8k-offline --files DIR", "exemplars": "gsm8k"},
    "strategyqa": {"answer": "yes/no", "prepare": "data/prepare.py strategyqa", "exemplars": "strategyqa"},
}


class UserError(Exception):
    """Something the user can mend; its text is the one line they see."""


class NotTrained(UserError):
    """An adapter is not there, or not finished."""


def read_jsonl(path, mend):
    """The records of a JSONL file; `mend` says where it comes from."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing: {mend}")
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    records = {number: parse_line(line) for number, line in enumerate(lines, 1) if line.strip()}
    for number, record in records.items():
        if record is None:
            raise UserError(f"{path}, line {number}: not a JSON object; mend or delete that line")
    return list(records.values())


def parse_line(line):
    r"""The JSON object of a line; None if it is none, or holds half a character, which nobody can write or tokenize.

    >>> parse_line('{"a": 1}'), parse_line('{"a": '), parse_line('{"a": "\\ud800"}')
    ({'a': 1}, None, None)
    """
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write(path, content):
    """Write text, a list of records or a dictionary, whole or not at all."""
    if isinstance(content, list):
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    elif isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    part = Path(f"{path}.{os.getpid()}.part")  # two processes may write the same file
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(content, encoding="utf-8", newline="\n")
    part.replace(path)


def load_task(task, split, limit=None, data=ROOT / "data"):
    """Records of data/<task>/<split>.jsonl (split: train, dev or test), the first `limit` of them."""
    path = Path(data) / task / f"{split}.jsonl"
    mend = f"make it with: python {TASKS[task]['prepare']}"
    records, gold = read_jsonl(path, mend)[:limit], GOLD[TASKS[task]["answer"]]
    if not records:
        raise UserError(f"{path} is empty: {mend}")
    for number, record in enumerate(records, 1):
        if missing := {"id", "question", "answer"} - record.keys():
            raise UserError(f"{path}, line {number}: no {', '.join(sorted(missing))} in this record")
        if not re.fullmatch(gold, str(record["answer"])):  # else a part might pass for it
            raise UserError(f"{path}, line {number}: the answer {record['answer']!r} is not a "
                            f"{TASKS[task]['answer']} and nothing else")
    distinct_ids(records)
    return records


def load_split(args, split):
    """The records of a split that --limit and, for train, --limit-train leave."""
    limits = [args.limit, args.limit_train if split == "train" else None]
    return load_task(args.task, split, min(filter(None, limits), default=None), args.data)


def distinct_ids(records):
    """Refuse an id that stands for two records: one would get the samples of the other."""
    counts = collections.Counter(record["id"] for record in records)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"an id stands for two records, {twice[0]}: they must differ, also between splits")


def load_exemplars(task, shots, data=ROOT / "data"):
    """The first `shots` hand-written exemplars of a task; none of them is an item of its data."""
    paths = [Path(folder) / TASKS[task]["exemplars"] / "exemplars.jsonl" for folder in (data, ROOT / "data")]
    path = next((path for path in paths if path.is_file()), None)
    return read_jsonl(path, "")[:shots] if shots and path else []


def load_run(folder, file="records.jsonl"):
    """The records of a finished run as columns: {"id": array, "right.art": array, "ask.asker.p_refine": array, ...}.

    Those of test; of dev with "dev.jsonl". Where a record lacks a value it is None.
    """
    records, columns = read_jsonl(Path(folder) / file, "make it with: evaluate.py"), {}
    for number, record in enumerate(records):
        values = [*record.items()]
        for name, value in values:  # it grows
            if isinstance(value, dict):
                values += [(f"{name}.{key}", inner) for key, inner in value.items()]
            else:
                columns.setdefault(name, np.full(len(records), None))[number] = value
    return {name: column if any(value is None or isinstance(value, list) for value in column)
            else np.array(column.tolist()) for name, column in columns.items()}


def load_samples(args, records):
    """{id: {"samples": [...], "draft": ...}} from `python art.py sample`, for all of `records`."""
    path, mend = args.runs / args.task / "samples.jsonl", f"make it with: python art.py sample --task {args.task}"
    sampled = {line["id"]: line for line in read_jsonl(path, mend)}
    distinct_ids(records)
    if lacking := sum(record["id"] not in sampled for record in records):
        raise UserError(f"{path} lacks {lacking} of {len(records)} questions: {mend}, with the same limits")
    return sampled


def labels_of(sampled):
    """{text: correct} of the different samples of a question; one that failed teaches nothing."""
    return {sample["text"]: sample["correct"] for sample in sampled["samples"] if not sample.get("failed")}


def question_hash(record):
    """A hash of a question's words: adapters remember which questions they were trained on."""
    return short_hash(re.findall(r"\w+", record["question"].casefold()))


def auc(scores, labels):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half; None without both.

    >>> auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    pairs = scores[labels][:, None] - scores[~labels][None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean()) if pairs.size else None


# --- Flags. What a user leaves out is taken from llm.json (the settings of the last `sample`), else from the preset.

PRESETS = {
    "toy": {"model": "data/toy/base", "asker_model": "data/toy/base", "truster_model": "data/toy/base", "k": 4,
            "shots": 0, "draft_temperature": 0.7, "max_new_tokens": 128, "max_length": 512, "kv_gib": 0.25, "lr": 2e-3,
            "asker_batch": (32, 1), "truster_batch": (8, 1), "task_epochs": 1, "epochs": 1, "save_steps": 50},
    "small": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "asker_model": "Qwen/Qwen2.5-0.5B-Instruct",
              "truster_model": "Qwen/Qwen2.5-0.5B-Instruct", "k": 3, "max_new_tokens": 512, "max_length": 1024,
              "kv_gib": 0.5, "lr": 2e-4, "asker_batch": (4, 4), "truster_batch": (1, 8), "task_epochs": 2, "epochs": 1,
              "save_steps": 25},
    "t4": {"model": "Qwen/Qwen2.5-1.5B-Instruct", "asker_model": "Qwen/Qwen2.5-1.5B",
           "truster_model": "Qwen/Qwen2.5-1.5B", "k": 4, "max_new_tokens": 512, "max_length": 1024, "kv_gib": 4.0,
           "lr": 2e-4, "asker_batch": (4, 8), "truster_batch": (1, 16), "task_epochs": 2, "epochs": 1,
           "save_steps": 50, "limit_train": 2000},  # so that a free Colab session holds it
    "16gb": {"model": "Qwen/Qwen3-8B", "asker_model": "Qwen/Qwen3-4B-Base", "truster_model": "Qwen/Qwen3-4B-Base",
             "k": 4, "max_new_tokens": 512, "max_length": 1024, "kv_gib": 6.0, "lr": 2e-4, "asker_batch": (4, 8),
             "truster_batch": (1, 16), "task_epochs": 2, "epochs": 1, "save_steps": 50, "limit_train": 2000},
    "24gb": {"model": "Qwen/Qwen2.5-7B-Instruct", "asker_model": "NousResearch/Llama-2-7b-hf",
             "truster_model": "NousResearch/Llama-2-13b-hf", "k": 5, "max_new_tokens": 512, "max_length": 1024,
             "kv_gib": 8.0, "lr": 2e-4, "asker_batch": (4, 8), "truster_batch": (1, 16), "task_epochs": 3, "epochs": 1,
             "save_steps": 50},
}
DEFAULTS = {"bits": 4, "chat": "auto", "strategy": "cot", "facts": "refine", "show_draft": "no", "temperature": 0.7,
            "draft_temperature": 0.0, "sample_seed": 0}
LLM_KEYS = ["preset", "model", "base_url", "k", "limit_train", "shots", "max_new_tokens", *DEFAULTS]  # kept in llm.json


def make_parser(doc, training=None):
    """A parser with the flags that all scripts share. `training`: "asker" or "truster" adds those of a training."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    often, seldom = parser.add_argument_group("often"), parser.add_argument_group("seldom")
    add = often.add_argument
    add("--task", default="toy", choices=TASKS, help="the task (default toy: nothing to download)")
    add("--preset", choices=PRESETS, help="models and sizes (default toy; small: any machine; others: a GPU); "
                                      "every flag wins over it")
    add("--limit", type=positive, metavar="N", help="only the first N questions of each split")
    add("--limit-train", type=positive, metavar="N", help="only the first N training questions (default by preset)")
    add("--run", default="default", metavar="NAME", help="folder of adapters and tables, runs/<task>/NAME")
    if not training:
        add("--model", help="the LLM: a folder or Hub id, or its name on the server")
        add("--base-url", help="an OpenAI-compatible server that runs the LLM; the key is read from OPENAI_API_KEY")
    add = seldom.add_argument
    add("--runs", type=Path, default=ROOT / "runs", metavar="DIR", help="folder of all runs (default runs)")
    add("--data", type=Path, default=ROOT / "data", metavar="DIR", help="folder of the tasks (default data)")
    add("--seed", type=int, default=0, help="seed of training and of resampling (default 0)")
    add("--kv-gib", type=float, metavar="GIB", help="memory for the keys and values of a batch; lower it if memory "
                                                    "runs out (default by preset)")
    add("--compute", choices=("auto", "fp32"), default="auto", help="number format of products on a GPU (default auto: "
        "bf16, or fp16 where the card lacks it; fp32 is slow, and the way out where fp16 overflows)")
    add("--max-new-tokens", type=positive, metavar="N", help="longest answer; longer ones are cut off and counted")
    if training:
        add_training_flags(often.add_argument, seldom.add_argument, training)
    else:
        add_llm_flags(add)
    return parser


def add_llm_flags(add):
    """How the LLM is asked."""
    add("--bits", type=int, choices=(4, 16, 32), help="precision of the LLM's weights in bits (default 4: nf4)")
    add("--concurrency", type=positive, default=8, metavar="N", help="requests to the server at a time (default 8)")
    add("--chat", choices=("auto", "yes", "no"), help="use the chat template (default auto: if there is one)")
    add("--shots", type=int, metavar="N", help="exemplars before each question (default 0 for chat models, else 8)")
    add("--strategy", choices=("cot", "decomp"), help="the draft's: chain of thought or sub-questions (default cot)")
    add("--facts", choices=("refine", "both", "none"),
        help="where StrategyQA's facts are shown (default refine, as in the paper; both: to predict too)")
    add("--show-draft", choices=("yes", "no"), help="does the LLM see its draft when it refines along sub-questions?")
    add("--temperature", type=temperature, help="temperature of the samples (default 0.7; none: the server's own)")
    add("--draft-temperature", type=temperature, help="temperature of the drafts (default 0: greedy)")
    add("--sample-seed", type=int, metavar="SEED", help="seed of everything sampled (default 0)")
    add("--fresh", action="store_true", help="ask anew what this model was asked before with the same settings")


def add_training_flags(often, seldom, which):
    """How an adapter is trained."""
    what = "examples" if which == "asker" else "questions"
    often(f"--{which}-model", metavar="MODEL", help="base model, a folder or Hub id (default by preset)")
    often("--overwrite", action="store_true",
          help="delete what this run trained before, and what started from it; train anew")
    seldom("--adapter-bits", type=int, default=4, choices=(4, 16, 32),
           help="precision of the frozen weights in bits (default 4: nf4)")
    seldom("--lr", type=float, help="peak learning rate (default by preset; 2e-4 is QLoRA's for 7B and 13B)")
    seldom("--rank", type=positive, default=16, help="rank of the LoRA matrices, alpha is twice that (default 16)")
    seldom("--epochs", type=float, help="passes over the examples (default by preset)")
    seldom("--batch-size", type=positive, metavar="N", help=f"{what} at a time; lower it if memory runs out")
    seldom("--accumulate", type=positive, metavar="N", help="batches added up before a step")
    seldom("--max-length", type=positive, metavar="N", help="tokens; longer examples are left out, never cut")
    seldom("--save-steps", type=positive, metavar="N", help="steps between checkpoints")
    seldom("--report-to", default="none", metavar="TRACKER", help="trackio, wandb or tensorboard (default none)")
    seldom("--push", metavar="REPO", help="upload the trained adapter and a model card to this repository of the Hub; "
                                          "a new one is private")


def positive(text):
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def temperature(text):
    """A number of at least 0, or the word none."""
    if not re.fullmatch(r"none|[0-9]+\.?[0-9]*|\.[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of 0 or more nor none")
    return text if text == "none" else float(text)


def parse(parser, argv=None, training="asker"):
    """Arguments, completed by llm.json (but for `sample`, which writes it), the preset and DEFAULTS, in this order."""
    args = parser.parse_intermixed_args(argv)  # flags may stand between solve and its question
    path = args.runs / args.task / "llm.json"
    kept = {} if getattr(args, "command", "") == "sample" or not path.is_file() else json.loads(path.read_text("utf-8"))
    if getattr(args, "base_url", None) and not args.model and not kept.get("base_url"):
        raise UserError("--base-url needs --model NAME, the LLM's name on that server")
    if getattr(args, "model", None) not in (None, kept.get("model")):
        kept = {"preset": kept.get("preset")}  # another LLM has settings of its own
    args.preset = args.preset or kept.get("preset") or "toy"
    preset = PRESETS[args.preset]
    batch_size, accumulate = preset[f"{training}_batch"]
    defaults = {**DEFAULTS, **preset, "batch_size": batch_size, "accumulate": accumulate}
    for key, value in {**defaults, **kept}.items():
        if getattr(args, key, value) is None:
            setattr(args, key, value)
            if value != defaults.get(key):
                print(f"from {path}: {key} {value}")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", args.run) or args.run == "said":
        raise UserError("--run is a plain name, and not said: letters, digits, dot, hyphen, underscore")
    if args.task != "toy" and PRESETS["toy"]["model"] in [getattr(args, k, "") for k in ("model", "asker_model")]:
        print("warning: the toy's model reads nothing but questions worded as the toy's: "
              f"for {args.task} give --preset or --model", file=sys.stderr)
    return args


# --- A run, and the commands of this file


class Run:
    """The models of a run: the LLM, and the adapters of runs/<task>/<run>; at most one of them is in memory."""

    def __init__(self, args):
        self.args, self.models, self.offline = args, {}, False  # offline: nothing may be asked
        self.task = args.runs / args.task  # what its runs share
        self.folder = self.task / args.run

    def adapter(self, name):
        """Folder of an adapter: "asker", "finetuned" or "end_to_end", or "truster"."""
        other = getattr(self.args, "truster_from" if name == "truster" else "asker_from", None)
        return self.task / (other or self.args.run) / name

    def trained(self, name):
        """args.json of an adapter: what made it, and its figures; {} if it is not finished."""
        path = self.adapter(name) / "args.json"
        about = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return about if "steps" in about else {}

    def about(self, name):
        """args.json of an adapter that has to be finished."""
        if about := self.trained(name):
            return about
        folder, script = self.adapter(name), "truster" if name == "truster" else "asker"
        flags = {"finetuned": " --task-epochs 1", "end_to_end": " --end-to-end"}.get(name, "")
        raise NotTrained(f"no trained adapter in {folder}: make it with: python train_{script}.py "
                         f"--task {self.args.task} --run {folder.parent.name}{flags}")

    def model(self, name, label=None):
        """The LLM ("llm"), or the model with that adapter; `label` says what it is asked for."""
        if name not in self.models:
            self.models[name] = self.llm() if name == "llm" else self.adapted(name)
        self.models[name].label = label or name
        return self.models[name]

    def llm(self):
        """The LLM on this machine or behind a server."""
        args = self.args
        if args.base_url:
            chat, identity = args.chat != "no", {"server": args.base_url, "model": args.model}
            args.shots, load = args.shots or 0, functools.partial(Endpoint, args)
        else:
            if "none" in (args.temperature, args.draft_temperature):
                raise UserError("--temperature none is for servers: here a number is needed")
            chat = args.chat == "yes" or args.chat == "auto" and bool(load_tokenizer(args.model).chat_template)
            args.shots = (0 if chat else 8) if args.shots is None else args.shots
            identity = {"weights": weights_id(args.model, self.task), "bits": args.bits}
            load = functools.partial(Local, args.model, args.bits, args.kv_gib, chat=chat, compute=args.compute)
        return Model(self, args.model, identity, load, chat, load_exemplars(args.task, args.shots, args.data))

    def adapted(self, name):
        """The model with that adapter: no chat template and no exemplars, as it was trained."""
        about, folder = self.about(name), self.adapter(name)
        identity = {"weights": about["weights"], "bits": about["bits"], "adapter": weights_id(folder, self.task)}
        model = Model(self, name, identity, functools.partial(
            Local, about["model"], about["bits"], self.args.kv_gib, folder, scorer=name == "truster",
            compute=self.args.compute))
        model.strategy, model.prior_odds = about.get("strategy"), about.get("prior_odds", 1.0)
        return model


def sample(args):
    """k samples of every question of train and dev, and the drafts of dev: what Asker and Truster learn from."""
    run, train, dev = Run(args), load_split(args, "train"), load_split(args, "dev")
    distinct_ids(train + dev)
    announce_needs({} if args.base_url else {args.model: args.bits}, kv_gib=args.kv_gib)
    print(f"[1/5] the LLM answers {len(train) + len(dev):,} questions {args.k} times", flush=True)
    samples = sample_answers(run.model("llm", "samples"), args, train + dev, args.k, args.temperature)
    for record, outputs in zip(train + dev, samples):
        for output in outputs:
            output["correct"] = verdict(args.task, output, record["answer"])
    lines = [{"id": record["id"], "samples": outputs} for record, outputs in zip(train + dev, samples)]
    drafts = predict(run.model("llm", "drafts of dev"), args, dev, args.draft_temperature)
    for line, draft in zip(lines[len(train):], drafts):
        line["draft"] = draft
    write(run.task / "samples.jsonl", lines)
    write(run.task / "llm.json", {key: getattr(args, key) for key in LLM_KEYS})
    first, drawn = samples[0][0], [output for outputs in samples[: len(train)] for output in outputs]
    kind = "a right answer" if first["correct"] else "a wrong answer"
    show_record({"question": train[0]["question"], kind: first["text"]})
    cut = np.mean([not output["stopped"] for output in drawn])
    if cut > 0.02:
        print(f"warning: {cut:.1%} of the answers were cut off and count as wrong: raise --max-new-tokens")
    both = sum(len({output["correct"] for output in outputs}) == 2 for outputs in samples[: len(train)])
    print(f"{run.task / 'samples.jsonl'}: {len(drawn):,} samples of {len(train):,} training questions, "
          f"{np.mean([output['correct'] for output in drawn]):.1%} right; {both:,} questions have right and wrong ones")
    log_start(run)


def subquestions(args):
    """The LLM writes sub-questions from each training question and its gold solution, where a data set has none."""
    run, train = Run(args), load_split(args, "train")
    golds = [{"text": solution_text(record.get("solution", []), record["answer"])} for record in train]
    asked, path = ask(run.model("llm", "sub-questions"), args, train, golds), run.task / "subquestions.jsonl"
    write(path, [{"id": record["id"], "subquestions": output["subquestions"]} for record, output in zip(train, asked)])
    show_record({"question": train[0]["question"], "sub-questions": "\n".join(asked[0]["subquestions"])})
    print(f"{path}: {np.mean([len(output['subquestions']) for output in asked]):.1f} sub-questions a question; next: "
          f"python train_asker.py --task {args.task} --subquestions generated")
    log_start(run)


def solve(args):
    """One question through the four steps."""
    run, question = Run(args), " ".join((args.question or "").split())
    if args.random:
        question = random.choice(load_split(args, "test"))["question"]
    if not question:
        raise UserError("give a question in quotes, or --random for one of the test questions")
    path = run.folder / "results.json"
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    threshold, source = next(((row["threshold"], f"the threshold of row art in {path}") for row in rows
                              if row["row"] == "art"), (0.5, "0.5, until evaluate.py sets it on dev"))
    (result,) = ask_refine_trust(run, [{"question": question}], threshold)
    asked = result["asked"]
    decision = (f"{DECISION} {'Yes' if 'refined' in result else 'No'}  (p_refine {asked['p_refine']:.2f} against "
                f"{threshold:.2f}, {source})")
    parts = {"question": question, "1 predict": result["draft"]["text"],
             "2 ask": "\n".join([*asked["subquestions"], decision])}
    if "refined" in result:
        scores = "draft {draft:.2f}, refined {refined:.2f}".format(**result["trust"])
        parts |= {"3 refine": result["refined"]["text"], "4 trust": scores}
    show_record({**parts, "answer": result["final"]["answer"] or "none could be read"})


def show(value, form=".1%"):
    """A figure as text; "-" where there is none."""
    return "-" if value is None else format(value, form)


def show_record(parts):
    """Print named texts, {name: text}."""
    for name, text in parts.items():
        print(f"  {name}: " + str(text).replace("\n", "\n" + " " * (len(name) + 4)))


def log_start(run):
    """Append to runs/<task>/log.jsonl what this start was: command, commit, versions, seconds, asked, known, memory."""
    start = {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "seconds": round(time.time() - STARTED, 1),
             "asked": {name: model.asked for name, model in run.models.items()},
             "known": {name: model.known for name, model in run.models.items()}, "peak_memory": peak_memory(),
             **provenance()}
    with open(run.task / "log.jsonl", "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(start) + "\n")


STARTED = time.time()


def provenance():
    """Commit of the kit ("+" behind it: with changes) and versions of what it runs on."""
    from importlib.metadata import version
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=9"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"commit": commit or None, "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}}


def run(main):
    """Call a script's `main`: what the user can mend becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # on Windows, into a file: an alphabet of 256
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    kept = "what is finished is kept, the same command goes on"
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("the kit uses one GPU and one process: start it with python, not with torchrun")
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"stopped; {kept}", 130)
    except Exception as error:
        if re.search("No space left|quota exceeded|File too large|inline_container", str(error)):
            fail(f"the disk is full; {kept}")
        if isinstance(error, ImportError) and "torchao" in str(error):  # Colab brings an old one, peft refuses it
            fail(f"{error}: pip uninstall torchao, the kit does not use it")
        raise


@contextlib.contextmanager
def enough_memory(mend):
    """What runs out of memory becomes one line; it has a name in torch, in cuBLAS, in CUDA itself and on a CPU."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|ALLOC_FAILED|not enough memory|can't allocate memory", str(error)):
            raise
        raise UserError(f"out of memory: {mend}; what is finished is kept, the same command goes on") from None


def fail(text, code=2):
    """End with one line."""
    print(f"\nerror: {text}", file=sys.stderr)
    sys.exit(code)


# ======================================================================================================================
# Part 3. Machinery: the cache of what models said; models here and behind a server; QLoRA. Nothing here knows what the
# texts are about. Slow libraries are imported where they are used, so that --help answers at once.
# ======================================================================================================================


def short_hash(value):
    """A hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path):
    """Hold `path`, a file or folder, for writing; a second process is refused."""
    import filelock
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{path}.lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"another process is writing {path}: wait until it has ended, or stop it") from None


class Cache:
    """What a model said: an append-only JSONL file. An output is found again by what was really asked.

    The key is (id of the settings, hash of the prompt as the model reads it, number of the sample). The settings hold
    the hash of the weights; each stands in the file before its outputs, in a line {"settings": id, "are": {...}}.
    """

    def __init__(self, path, fresh=False):
        self.path, self.settings, self.outputs = path, {}, {}
        self.begin = path.stat().st_size if fresh and path.is_file() else 0  # what stands before that is not known
        if bad := self.read():
            print(f"{self.path}: {bad} unreadable lines skipped; their answers are asked anew", file=sys.stderr)

    def read(self):
        """Read the file; returns how many lines could not be read: a run was killed while it wrote them."""
        content, bad = self.path.read_bytes()[self.begin:] if self.path.is_file() else b"", 0
        for line in content.decode("utf-8", errors="replace").split("\n"):
            match parse_line(line):
                case {"settings": str(key), "are": dict(settings)}:
                    self.settings[key] = settings
                case {"settings": str(key), "prompt": str(prompt), "number": int(number), "call": str()} as output:
                    self.outputs[key, prompt, number] = output
                case _:
                    bad += bool(line)
        return bad

    @contextlib.contextmanager
    def writing(self):
        """Hold the file for appending."""
        with locked(self.path):
            self.read()  # another process may have added to it
            with open(self.path, "ab") as self.file:
                if self.file.tell():
                    self.file.write(b"\n")  # ends a line that is half-written; an empty one is skipped
                yield

    def append(self, lines):
        """Add lines in one write."""
        self.file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.file.flush()


class Model:
    """A model that is asked only what it has not been asked before, and loaded only then.

    `identity` says which model it is, down to its weights; it is a part of every key. `load` makes its backend, a Local
    or an Endpoint.
    """

    strategy, prior_odds, label, backend = None, 1.0, "", None

    def __init__(self, run, name, identity, load, chat=False, exemplars=()):
        self.run, self.name, self.identity, self.load, self.chat, self.exemplars = (
            run, name, identity, load, chat, exemplars)
        self.asked, self.known, self.machines = 0, 0, set()
        folder, own = run.task / "said", short_hash(identity)[:8]
        slug = re.sub(r"[^\w.-]+", "-", Path(name).name)
        found = next(folder.glob(f"*-{own}.jsonl"), None)  # the same model may have had another name
        self.cache = Cache(found or folder / f"{slug}-{own}.jsonl", getattr(run.args, "fresh", False))

    def render(self, prompts, shots=(), instruction=""):
        """Prompts as the model reads them: plain text behind its exemplars, or a chat (turns, for a server)."""
        if not self.chat:
            return [plain_text(prompt, shots) for prompt in prompts]
        turns = [chat_turns(prompt, shots, instruction) for prompt in prompts]
        if "server" in self.identity:
            return turns
        tokenizer, day = load_tokenizer(self.name), "26 Jul 2024"  # with today's date all would be asked anew tomorrow
        template = re.sub(r"strftime_now\([^()]*\)", f"'{day}'", tokenizer.get_chat_template())
        return [tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, date_string=day,
                                              add_generation_prompt=True, enable_thinking=False) for turn in turns]

    def generate(self, prompts, max_new_tokens, stop=None, k=1, temperature=0.0):
        """k texts for each prompt, up to the first match of the pattern `stop`; temperature 0 is greedy.

        Lists of k outputs {"text", "stopped", "tokens", "prompt_tokens", "logprob"}; tokens count what was written.
        """
        settings = {"kind": "generate", "max_new_tokens": max_new_tokens, "stop": stop, "temperature": temperature}
        if temperature:
            settings["sample_seed"] = self.run.args.sample_seed
        return self.answers(prompts, k, settings)

    def choose(self, prompts, before, options, begun=None):
        """Which of two options comes next? Outputs {"p": probability of the first, "prompt_tokens"}.

        `begun`: how each answer has begun; `before`: the end of the text in front of the options.
        """
        prompts = [[prompt, text] for prompt, text in zip(prompts, begun or [""] * len(prompts))]
        settings = {"kind": "choose", "before": before, "options": list(options)}
        return [output for (output,) in self.answers(prompts, 1, settings)]

    def score(self, texts):
        """The scalar that the model gives each text: outputs {"score", "prompt_tokens"}."""
        return [output for (output,) in self.answers(texts, 1, {"kind": "score"})]

    def answers(self, prompts, k, settings):
        """Lists of k outputs: known ones from the cache, the others from the model."""
        settings = {**self.identity, **settings}
        key, names = short_hash(settings), [short_hash(prompt) for prompt in prompts]
        wanted = {(key, name, number): prompt for name, prompt in zip(names, prompts) for number in range(k)}
        missing, failed = wanted.keys() - self.cache.outputs.keys(), {}
        self.known, self.asked = self.known + len(wanted) - len(missing), self.asked + len(missing)
        if missing and self.run.offline:
            raise Missing(self.label)
        if missing:
            with self.cache.writing():
                failed = self.ask(key, settings, wanted)
        known = self.cache.outputs | failed
        outputs = [[known[key, name, number] for number in range(k)] for name in names]
        self.machines |= {output["on"] for several in outputs for output in several if "on" in output}
        return outputs

    @enough_memory("lower --kv-gib")
    def ask(self, key, settings, wanted):
        """Ask for what is missing, write it batch by batch, return what failed, {key: output}: that is not kept.

        Batches are planned over what was missing when this very call was first made, and a batch that was not written
        whole is computed whole: a run that was killed makes the same batches as one that was not.
        """
        from tqdm import tqdm
        missing, call = wanted.keys() - self.cache.outputs.keys(), short_hash(list(wanted))
        items, failed = {}, {}
        for place, prompt in wanted.items():
            if place in missing or self.cache.outputs[place]["call"] == call:
                items.setdefault(place[1], (prompt, []))[1].append(place[2])
        self.announce(settings, items, len(wanted), len(missing))
        for other in self.run.models.values():
            other.backend = other.backend if other is self else None  # make room first
        backend = self.backend = self.backend or self.load()
        if key not in self.cache.settings:
            self.cache.append([{"settings": key, "are": settings}])
            self.cache.settings[key] = settings
        began = time.time()
        with tqdm(total=len(missing), desc=self.label, unit="answer", disable=None) as bar:
            for batch in backend.answers(items, settings, {place[1:] for place in missing}):
                new, seconds, began = {}, time.time() - began, time.time()
                for (name, number), output in batch.items():
                    if (key, name, number) in missing:
                        (failed if output.get("failed") else new)[key, name, number] = {
                            "settings": key, "prompt": name, "number": number, "call": call, "on": backend.machine,
                            "seconds": round(seconds / len(batch), 3), **output}
                self.cache.append(new.values())
                self.cache.outputs |= new
                bar.update(len(new))
        return failed

    def announce(self, settings, prompts, wanted, missing):
        """The line before asking: how much is known, how long the rest may take, what differs from what is there."""
        kind = {key for key, other in self.cache.settings.items() if other.get("kind") == settings["kind"]}
        before = [output for output in self.cache.outputs.values() if output["settings"] in kind]
        text = f"{self.label}: {wanted - missing:,} of {wanted:,} known, asking {missing:,}"
        if before:
            minutes = np.mean([output["seconds"] for output in before]) * missing / 60
            text += f" (about {max(1, minutes):.0f} minutes)"
        same = collections.Counter(output["settings"] for output in before if output["prompt"] in prompts)
        if same and missing == wanted:
            other = self.cache.settings[same.most_common(1)[0][0]]
            differ = [f"{name} {other.get(name)}" for name in settings if other.get(name) != settings[name]]
            text += f"; the same was asked with {', '.join(differ)}" if differ else ""
        print(text, flush=True)


class Missing(Exception):
    """An answer is not known, and nothing may be asked now."""


def plain_text(prompt, shots=()):
    """A prompt behind its exemplars, [(prompt, answer), ...], as a base model reads it."""
    return "".join(f"{shown}{answer}\n\n" for shown, answer in shots) + prompt


def chat_turns(prompt, shots=(), instruction=""):
    r"""The same as turns of a chat: the instruction takes the place of the cue, the last line of a plain prompt.

    >>> chat_turns("Question: Q?\nAnswer:\n", instruction="Answer it.")
    [{'role': 'user', 'content': 'Question: Q?\n\nAnswer it.'}]
    """
    def asked(text):
        return f"{text.rstrip().rpartition(chr(10))[0]}\n\n{instruction}" if instruction else text.rstrip()

    turns = [turn for shown, answer in shots for turn in (("user", asked(shown)), ("assistant", answer))]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", asked(prompt))]]


# --- Models on this machine


def find_model(name):
    """A folder named relative to the working directory or to the kit, else a Hub id as it stands."""
    return next((str(path) for path in (Path(name), ROOT / name) if path.is_dir()), str(name))


@contextlib.contextmanager
def loading(name):
    """What goes wrong while a model is looked up or loaded becomes one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {str(name)!r}: {' '.join(str(error).split())[:200]}") from None


def weights_id(name, folder):
    """What tells a model from every other: the commit of a Hub model, the hash of a folder's files wherever it lies.

    Hashes are remembered in `folder`/weights.json by size and time of the files: weights are gigabytes.
    """
    path = Path(find_model(name))
    if not path.is_dir():
        import huggingface_hub
        with loading(name):
            return Path(huggingface_hub.hf_hub_download(str(name), "config.json")).parent.name
    memory = Path(folder) / "weights.json"
    known = json.loads(memory.read_text("utf-8")) if memory.is_file() else {}
    hashes = {}
    for file in sorted(path.iterdir()):
        if file.name == "adapter_config.json":  # without the path of the base, whose weights are told apart themselves
            config = json.loads(file.read_text("utf-8"))
            hashes[file.name] = short_hash([config["r"], config["lora_alpha"], sorted(config["target_modules"])])
        elif re.fullmatch(r".*\.(safetensors|jinja|model)|(generation_)?config\.json|tokenizer.*\.json", file.name):
            about = file.stat()
            place = f"{file.resolve()} {about.st_size} {about.st_mtime_ns}"
            if place not in known:
                with open(file, "rb") as content:
                    known[place] = hashlib.file_digest(content, "sha256").hexdigest()[:16]
            hashes[file.name] = known[place]
    write(memory, known)
    return short_hash(hashes)


def memory_gib(config, parameters, bits, kv_gib=0.0, tokens=0, learned=0):
    """GiB that a model needs, roughly: `tokens` at a time are trained on, in `learned` places is a word to predict.

    tests/fit.py computes the same exactly. `config`: the model's config.json.
    """
    config = {**config, **config.get("text_config", {})}
    hidden, layers, vocabulary = (config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    ends = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)  # never in 4 bits
    weights = ends * 2 + (parameters - ends) * 0.52 if bits == 4 else parameters * bits / 8
    training = tokens * 2 * (layers * hidden + 14 * config["intermediate_size"]) + learned * vocabulary * 12
    return (weights + training) / 2**30 + kv_gib + 1  # 1: the GPU's own, and what is on its way


def announce_needs(models, **sizes):
    """One line: memory and downloads of these models, {name: bits}; none for folders, nor where the Hub is not reached.

    `sizes` as in `memory_gib`.
    """
    import huggingface_hub
    gib, download, names = 0.0, 0, [name for name in models if not Path(find_model(name)).is_dir()]
    for name in names:
        try:
            about = huggingface_hub.HfApi().model_info(name, files_metadata=True, timeout=10)
            config = json.loads(Path(huggingface_hub.hf_hub_download(name, "config.json")).read_text("utf-8"))
            files = {file.rfilename: file.size or 0 for file in about.siblings
                     if re.fullmatch(r"model[\w.-]*\.safetensors|[\w.-]+\.(json|model|txt|jinja)", file.rfilename)}
            download += sum(size for file, size in files.items()
                            if not isinstance(huggingface_hub.try_to_load_from_cache(name, file), str))
            weights = sum(size for file, size in files.items() if file.endswith(".safetensors")) / 2  # in 16 bits
            parameters = about.safetensors.total if about.safetensors else weights
            gib = max(gib, memory_gib(config, parameters, models[name], **sizes))
        except Exception:  # no network, no such model (loading will say it), or a config with other names
            return
    if names:
        print(f"{', '.join(names)}: about {gib:.0f} GiB of GPU memory, {download / 1e9:.1f} GB to download", flush=True)


def compute_dtype(bits, compute="auto"):
    """fp32 on a CPU (bf16 with 16 bits); on a GPU bf16 where the card really has it, else fp16."""
    import torch
    if compute == "fp32" or bits == 32 or bits == 4 and not torch.cuda.is_available():
        return torch.float32
    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):  # a T4 emulates it
        return torch.bfloat16
    return torch.float16


@functools.cache
def load_tokenizer(name):
    """A tokenizer with a padding token."""
    import transformers
    with loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(name), trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_base(name, bits, head="AutoModelForCausalLM", compute="auto", **settings):
    """A frozen base model in 4 bits (nf4, double quantisation: QLoRA, arXiv 2305.14314), 16 or 32 bits."""
    print(f"loading {name} in {bits} bits ...", flush=True)
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gave NaN under masks: pytorch issue 196678
    gc.collect()  # what is left of a training refers to itself: its weights would stay beside the new ones
    dtype = compute_dtype(bits, compute)
    if bits == 4:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    if torch.cuda.is_available():
        settings["device_map"] = {"": 0}
    with loading(name), enough_memory("this model does not fit: take a smaller one, or fewer bits"):
        return getattr(transformers, head).from_pretrained(
            find_model(name), dtype=dtype, use_safetensors=True, trust_remote_code=False, **settings).eval()


def load_scorer(name, bits, seed=0, compute="auto"):
    """A base with a fresh scalar head, which is in fp32 and never quantised."""
    import torch
    import transformers
    transformers.set_seed(seed)
    model = load_base(name, bits, "AutoModelForSequenceClassification", compute, num_labels=1,
                      pad_token_id=load_tokenizer(name).pad_token_id)
    model.score.float()
    assert type(model.score) is torch.nn.Linear, "the head was quantised"
    return model


def plan_batches(sizes, budget):
    """Lists of indices of (rows, length), longest first, each of at most `budget` tokens when padded.

    >>> plan_batches([(1, 3), (1, 9), (2, 4), (1, 1)], budget=12)
    [[1], [2, 0], [3]]
    """
    batches, rows = [], 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        rows += sizes[index][0]
        if batches and rows * sizes[batches[-1][0]][1] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            rows = sizes[index][0]
    return batches


def pad_left(sequences, pad, device="cpu", shared=0):
    """Token ids and mask, padded on the left; but behind the first `shared` tokens, which all have in common."""
    import torch
    width = max(map(len, sequences))
    ids = [[*ids[:shared], *[pad] * (width - len(ids)), *ids[shared:]] for ids in sequences]
    mask = [[1] * shared + [0] * (width - len(ids)) + [1] * (len(ids) - shared) for ids in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def places(mask):
    """Position of each token in its row, padding aside."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def kv_bytes(config, itemsize=2):
    """Bytes of the keys and values of one token, in numbers of `itemsize` bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * itemsize


class Local:
    """A model on this machine, with an adapter or without: a language model, or a scorer with a scalar head."""

    def __init__(self, name, bits, kv_gib, adapter=None, chat=False, scorer=False, compute="auto"):
        import peft
        self.name, self.chat, self.tokenizer = name, chat, load_tokenizer(name)
        self.model = load_scorer(name, bits, compute=compute) if scorer else load_base(name, bits, compute=compute)
        if adapter:
            self.model = peft.PeftModel.from_pretrained(self.model, adapter).eval()
        self.base = self.model.get_base_model() if adapter else self.model
        ends = self.base.generation_config.eos_token_id if not scorer else None
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        dtype = self.base.get_input_embeddings().weight.dtype
        config = self.base.config.get_text_config()
        self.set_budget(kv_gib)
        self.limit = getattr(config, "max_position_embeddings", None) or math.inf
        self.machine = f"{self.base.device.type} {str(dtype).removeprefix('torch.')}"

    def set_budget(self, kv_gib):
        """Tokens of a batch: whose keys and values may be kept, and that are read at once where nothing is written."""
        config, dtype = self.base.config.get_text_config(), self.base.get_input_embeddings().weight.dtype
        self.budget = int(kv_gib * 2**30 / kv_bytes(config, dtype.itemsize))
        self.reads = min(self.budget, 16_384)  # what lies between the layers of an adapter is larger than its keys

    def answers(self, items, settings, missing):
        """Yield {(prompt's name, number): output} batch by batch. `items`: {name: (prompt, numbers)}.

        A prompt that is too long, and numbers that are not finite, as fp16 may give, have failed.
        """
        import torch
        new = settings.get("max_new_tokens", 0)
        prompts = [(name, self.tokens(prompt), numbers) for name, (prompt, numbers) in items.items()]
        fitting = [prompt for prompt in prompts if len(prompt[1]) + new <= self.limit]
        if len(fitting) < len(prompts):
            print(f"{len(prompts) - len(fitting)} prompts are too long for {self.name}, which reads {self.limit:,} "
                  "tokens: they count as failed; lower --max-new-tokens or --shots", file=sys.stderr)
            yield {(name, number): failed_output(len(ids)) for name, ids, numbers in prompts for number in numbers
                   if len(ids) + new > self.limit}
        with torch.inference_mode():
            self.read_prefix([ids for _, ids, _ in fitting] if settings["kind"] != "score" else [])
        for batch in plan_batches([(len(numbers), len(ids) + new) for _, ids, numbers in fitting],
                                  self.budget if new else self.reads):
            batch = [fitting[i] for i in batch]
            if any((name, number) in missing for name, _, numbers in batch for number in numbers):
                with torch.inference_mode():
                    outputs = getattr(self, settings["kind"])(batch, settings)
                bad = {place: failed_output(output["prompt_tokens"]) for place, output in outputs.items()
                       if any(value != value for value in output.values())}  # NaN alone is not what it is
                if bad:
                    print(f"{self.name} gave numbers that are not finite: {len(bad)} answers failed; on a GPU without "
                          "bf16 give --compute fp32", file=sys.stderr)
                yield outputs | bad

    def tokens(self, prompt):
        """Token ids of a prompt, or of [prompt, how the answer has begun]: two texts, as in training."""
        prompt, begun = prompt if isinstance(prompt, list) else (prompt, "")
        return (self.tokenizer(prompt, add_special_tokens=not self.chat)["input_ids"]
                + (self.tokenizer(begun, add_special_tokens=False)["input_ids"] if begun else []))

    def read_prefix(self, sequences):
        """What all prompts begin with, as exemplars, is read once and copied for each."""
        import torch
        shared = os.path.commonprefix(sequences)[: min(map(len, sequences), default=1) - 1]
        self.shared, self.prefix = (shared, None) if len(shared) >= 32 else ([], None)
        if self.shared:
            ids = torch.tensor([shared], device=self.base.device)
            self.prefix = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def read(self, batch, model, **settings):
        """(output of `model`, mask) for the prompts of a batch, the shared prefix copied."""
        ids, mask = pad_left([ids for _, ids, _ in batch], self.tokenizer.pad_token_id, self.base.device,
                             len(self.shared))
        cache = copy.deepcopy(self.prefix)
        if cache:
            cache.batch_repeat_interleave(len(batch))
        ids, positions = ids[:, len(self.shared):], places(mask)[:, len(self.shared):]
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                     **settings), mask

    def generate(self, batch, settings):
        """Texts, token by token; those that have ended leave the batch."""
        import torch
        texts = [{"name": name, "number": number, "ids": [], "stopped": False, "logprob": 0.0,
                  "random": random.Random(f"{settings.get('sample_seed')} {name} {number}"),
                  "prompt_tokens": len(ids)} for name, ids, numbers in batch for number in numbers]
        owners = torch.tensor([i for i, (_, _, numbers) in enumerate(batch) for _ in numbers], device=self.base.device)
        out, mask = self.read(batch, self.model, logits_to_keep=1)  # each prompt once, whatever the number of samples
        cache, logits, mask = out.past_key_values, out.logits[owners, -1].float(), mask[owners]
        cache.batch_select_indices(owners)
        writing = texts
        for _ in range(settings["max_new_tokens"]):
            tokens = self.pick(logits, writing, settings["temperature"])
            self.note(writing, tokens, logits, settings["stop"])
            going = [place for place, text in enumerate(writing) if not text["stopped"]]
            if not going:
                break
            if len(going) < len(writing):
                keep = torch.tensor(going, device=tokens.device)
                cache.batch_select_indices(keep)
                tokens, mask, writing = tokens[keep], mask[keep], [writing[place] for place in going]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = self.model(input_ids=tokens[:, None], attention_mask=mask, position_ids=places(mask)[:, -1:],
                             past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1].float()
        return {(text["name"], text["number"]): {
            "text": up_to(settings["stop"], self.tokenizer.decode(text["ids"], skip_special_tokens=True)),
            "stopped": text["stopped"], "tokens": len(text["ids"]), "prompt_tokens": text["prompt_tokens"],
            "logprob": text["logprob"]} for text in texts}

    def pick(self, logits, texts, temperature):
        """The next token of each text: the likeliest, or drawn by inverse CDF with one number from the text's source.

        So a sample follows from (seed, prompt, number) alone, whatever stands beside it in the batch.
        """
        import torch
        if not temperature:
            return logits.argmax(-1)
        cdf = (logits / temperature).double().softmax(-1).cumsum(-1)
        drawn = torch.tensor([text["random"].random() for text in texts], dtype=cdf.dtype, device=cdf.device)
        return torch.searchsorted(cdf, drawn[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)

    def note(self, texts, tokens, logits, stop):
        """Put the new tokens behind their texts, and see which of these have ended."""
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        for text, token, logprob in zip(texts, tokens.tolist(), logprobs):
            text["ids"].append(token)
            text["logprob"] += logprob
            text["stopped"] = token in self.ends
        if stop:
            tails = self.tokenizer.decode([text["ids"][-32:] for text in texts], skip_special_tokens=True)
            for text, tail in zip(texts, tails):
                text["stopped"] |= bool(re.search(stop, tail))

    def choose(self, batch, settings):
        """Probability of the first option, from the two logits at the token where the options part, in fp32."""
        import torch
        before, options = settings["before"], settings["options"]
        spelled = [self.tokenizer(before + option, add_special_tokens=False)["input_ids"] for option in options]
        parting = len(os.path.commonprefix(spelled))
        assert parting == len(self.tokenizer(before, add_special_tokens=False)["input_ids"]), (before, spelled)
        pair = torch.tensor([ids[parting] for ids in spelled], device=self.base.device)
        out, _ = self.read(batch, self.base.base_model)
        hidden, head = out.last_hidden_state[:, -1].float(), self.base.get_output_embeddings()
        logits = hidden @ head.weight[pair].float().T + (head.bias[pair].float() if head.bias is not None else 0)
        chances = (logits[:, 0] - logits[:, 1]).double().sigmoid().tolist()
        return {(name, 0): {"p": p, "prompt_tokens": len(ids)} for (name, ids, _), p in zip(batch, chances)}

    def score(self, batch, settings):
        """The scalar of each text."""
        ids, mask = pad_left([ids for _, ids, _ in batch], self.tokenizer.pad_token_id, self.base.device)
        scores = score_batch(self.model, ids, mask).tolist()
        return {(name, 0): {"score": score, "prompt_tokens": len(ids)} for (name, ids, _), score in zip(batch, scores)}


def up_to(stop, text):
    """A text up to its first match of the pattern `stop`, if there is one."""
    match = re.search(stop, text) if stop else None
    return text[: match.end() if match else None].strip()


def failed_output(prompt_tokens=0):
    """An answer that could not be had: it counts as wrong, is not kept, and is asked again by the next start."""
    return {"failed": True, "text": "", "stopped": False, "tokens": 0, "prompt_tokens": prompt_tokens, "logprob": None,
            "p": 0.0, "score": -1e9}


def score_batch(model, ids, mask):
    """Scores (rows,) of token ids (rows, length) padded on the left; the last token carries the score, in fp32."""
    import torch
    base = model.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = base.base_model(input_ids=ids, attention_mask=mask, position_ids=places(mask),
                                 use_cache=False).last_hidden_state[:, -1]
    with torch.autocast(ids.device.type, enabled=False):
        return base.score(hidden.float())[:, 0]


# --- The LLM behind a server


class Endpoint:
    """A model behind an OpenAI-compatible server. Chat turns go to /chat/completions, plain text to /completions.

    The key is read from OPENAI_API_KEY. Lost connections, 429 and 5xx are tried again by openai's client.
    """

    machine = "server"

    def __init__(self, args):
        try:
            import openai
        except ImportError:
            raise UserError("--base-url needs the official client: pip install openai") from None
        if not re.match("https?://[^/?#]", args.base_url):
            raise UserError("--base-url is an address such as http://localhost:8000/v1")
        self.openai, self.name, self.concurrency = openai, args.model, args.concurrency
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # one's own server needs no key
        self.client = openai.OpenAI(base_url=args.base_url, api_key=self.key, max_retries=5, timeout=300)
        self.silent = "none" in (args.temperature, args.draft_temperature)  # some models refuse the parameter
        self.logprobs, self.answered, self.rejected, self.refusal = True, False, 0, ""

    def answers(self, items, settings, missing):
        """As `Local.answers`, one answer at a time, in the order in which they come."""
        work = self.generate if settings["kind"] == "generate" else self.choose
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = {pool.submit(work, settings, name, number, prompt): (name, number)
                     for name, (prompt, numbers) in items.items() for number in numbers if (name, number) in missing}
            for done in as_completed(asked):
                try:
                    output, self.answered, self.rejected = done.result(), True, 0
                except self.openai.OpenAIError as error:
                    output = self.failed(error)
                yield {asked[done]: output}
            if asked and not self.answered:
                raise UserError(self.refusal)
        finally:  # after an error or Ctrl-C nothing more is asked
            pool.shutdown(wait=False, cancel_futures=True)

    def failed(self, error):
        """One question that is too long or not allowed counts as failed; whatever else goes wrong ends the run."""
        text = " ".join(str(error).split()).replace(self.key, "...")[:300]
        self.rejected += 1
        if re.search("temperature['\"]? (?:is|does) not", text):
            raise UserError("the server refuses the temperature: give --temperature none --draft-temperature none")
        self.refusal = (f"the server says: {text}; what is finished is kept, the same command goes on. Check "
                        "--base-url (most end in /v1), --model, --chat and OPENAI_API_KEY")
        if not isinstance(error, self.openai.BadRequestError) or self.rejected == 10:
            raise UserError(self.refusal) from None
        print(f"the server rejected a question: {text}", file=sys.stderr)
        return failed_output()

    def generate(self, settings, name, number, prompt):
        """One text."""
        seed = int(short_hash([settings.get("sample_seed"), name, number])[:7], 16)
        limit, stop = settings["max_new_tokens"], settings["stop"]
        text, tokens, ended_by, usage = self.request(prompt, limit, settings["temperature"], seed)
        whole = ended_by not in ("length", "content_filter")  # servers have many words for a good end
        return {"text": up_to(stop, text), "stopped": whole or bool(stop and re.search(stop, text)),
                "tokens": usage.completion_tokens, "prompt_tokens": usage.prompt_tokens,
                "logprob": sum(logprob for _, logprob, _ in tokens) if tokens else None}

    def choose(self, settings, name, number, prompt):
        """The first of two options against the second: from log-probabilities, else 0 or 1 by the word."""
        prompt, begun = prompt
        first, second = (option.strip() for option in settings["options"])
        if isinstance(prompt, str):
            prompt += begun
        elif begun:  # a server does not go on with a turn of a chat: the decision is asked for in another
            question = f"{settings['before']} {first} or {second}? Answer with this one word."
            prompt = [*prompt, {"role": "assistant", "content": begun.removesuffix(settings["before"]).strip() or "-"},
                      {"role": "user", "content": question}]
        text, tokens, _, usage = self.request(prompt, 8, 0.0, 0, top=5)
        word = re.search(rf"\b(?:{first}|{second})\b", text)
        p = float(bool(word) and word[0] == first)
        listed = next((others for token, _, others in tokens if token.strip() in (first, second)), None) or {}
        least = min(listed.values(), default=-math.inf)  # what is not listed is at most as likely as the last listed
        a, b = (max((logprob for token, logprob in listed.items() if token.strip() == option), default=least)
                for option in (first, second))
        if max(a, b) > -math.inf:
            p = 1 / (1 + math.exp(min(b - a, 700)))  # some servers give -9999, whose exponential is too large
        return {"p": p, "prompt_tokens": usage.prompt_tokens}

    def request(self, prompt, max_tokens, temperature, seed, top=0):
        """(text, [(token, logprob, {token: logprob}), ...], why it ended, usage)."""
        chat = isinstance(prompt, list)
        settings = {"model": self.name, "seed": seed}
        if not self.silent:
            settings["temperature"] = temperature
        if chat:
            settings |= {"messages": prompt, "max_completion_tokens": max_tokens}
            settings |= {"logprobs": True, "top_logprobs": top} if self.logprobs else {}
        else:
            settings |= {"prompt": prompt, "max_tokens": max_tokens, "stop": ["\nQuestion:"]}
            settings |= {"logprobs": max(top, 1)} if self.logprobs else {}
        try:
            reply = (self.client.chat if chat else self.client).completions.create(**settings)
        except ValueError:  # no JSON
            reply = None
        except self.openai.OpenAIError as error:
            if "logprobs" not in settings or "logprobs" not in str(error):
                raise
            print("the server gives no log-probabilities: decisions are read from words", file=sys.stderr)
            self.logprobs = False
            return self.request(prompt, max_tokens, temperature, seed)
        if not getattr(reply, "choices", None) or not reply.usage:
            raise UserError("the server answers, but not as an OpenAI-compatible one: most addresses end in /v1")
        choice, given = reply.choices[0], reply.choices[0].logprobs
        if chat:
            text = choice.message.content or ""
            tokens = [(token.token, token.logprob, {other.token: other.logprob for other in token.top_logprobs or ()})
                      for token in given and given.content or ()]
        else:
            text = choice.text.partition("\nQuestion:")[0]  # some servers give the stop back
            tokens = [*zip(given.tokens or (), given.token_logprobs or (), given.top_logprobs or ())] if given else []
        text = text.encode("utf-8", "replace").decode()  # without half characters
        return text, tokens, choice.finish_reason, reply.usage


# --- QLoRA. The loop is transformers.Trainer's.


@enough_memory("this training does not fit: take a smaller model, or --adapter-bits 4")
def add_lora(model, task_type, rank, start=None, seed=0):
    """LoRA on all linear layers of a frozen base; adapters and head in fp32. `start`: an adapter to go on from."""
    import peft
    import torch
    import transformers
    transformers.set_seed(seed)  # the Trainer would seed only behind the draw of the first weights
    if torch.cuda.is_available():
        dtype = model.get_input_embeddings().weight.dtype
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        embeddings = {id(layer.weight) for layer in ends if layer is not None}
        for name, weight in model.named_parameters():  # it makes all of them fp32: gigabytes, and fp32 activations
            if weight.dtype == torch.float32 and (dtype == torch.bfloat16 and "score" not in name
                                                  or id(weight) in embeddings):  # in fp16 fp32 norms avoid overflow
                weight.data = weight.data.to(dtype)
    if start:
        model = peft.PeftModel.from_pretrained(model, start, is_trainable=True)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, r=rank, lora_alpha=2 * rank,
                                                           target_modules="all-linear"))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return model


def fine_tune(model, examples, collate, loss, args, folder, epochs):
    """Train the adapter of `model`, from its last checkpoint on; returns figures of it.

    `loss(model, batch)` gives {name: sum over the examples of the batch}; every example weighs the same.
    """
    import peft
    import safetensors.torch
    steps = math.ceil(epochs * math.ceil(len(examples) / (args.batch_size * args.accumulate)))
    reset_peak_memory()
    random.Random(args.seed).shuffle(examples)  # the Trainer's sampler has a seed of its own, the same for all runs
    trainer = make_trainer(model, examples, collate, loss, args, folder / "checkpoints", steps)
    last = last_checkpoint(folder / "checkpoints")
    trainer.reported = last[0] if last else 0
    if last and last[0] >= steps:  # stopped behind the last step: the Trainer would take another
        peft.set_peft_model_state_dict(model, safetensors.torch.load_file(last[1] / "adapter_model.safetensors"))
        trainer.state = trainer.state.load_from_json(last[1] / "trainer_state.json")
    else:
        with enough_memory("lower --batch-size, and raise --accumulate as much"):
            trainer.train(resume_from_checkpoint=last and str(last[1]))
        trainer.report()
    model.save_pretrained(folder)
    history, names = trainer.state.log_history, ("step", "text", "decision", "pairs")
    clock = [entry["train_runtime"] for entry in history if "train_runtime" in entry]  # each start begins at 0
    return {"steps": steps, "trained_on": len(examples), "tokens": trainer.state.num_input_tokens_seen,
            "trainable": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "curve": [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry],
            "seconds": sum(now for now, after in zip(clock, [*clock[1:], 0.0]) if after < now),
            "resumed_at": last[0] if last else 0, "peak_memory": peak_memory()}


def training_arguments(args, folder, steps, dtype):
    """How transformers.Trainer trains, saves and logs."""
    import torch
    import transformers
    cuda = torch.cuda.is_available()
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=args.lr, lr_scheduler_type="cosine", warmup_steps=0.05,
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulate, optim="adamw_torch",
        train_sampling_strategy="batch_rebalance", seed=args.seed, use_cpu=not cuda, report_to=args.report_to,
        bf16=cuda and dtype == torch.bfloat16, fp16=cuda and dtype == torch.float16, save_steps=args.save_steps,
        save_total_limit=1, logging_steps=math.gcd(10, args.save_steps), logging_nan_inf_filter=False,
        disable_tqdm=True, remove_unused_columns=False, include_num_input_tokens_seen="non_padding")
    settings._n_gpu = min(settings.n_gpu, 1)  # DataParallel knows no 4-bit weights
    return settings


def make_trainer(model, examples, collate, loss, args, folder, steps):
    """transformers.Trainer with a loss of named parts, which it prints; it stops where one of them is not finite."""
    import transformers

    class Trainer(transformers.Trainer):
        loss_is_scaled_for_ga = True  # batches of a step differ in size: divided by the examples of a step
        parts, reported = {}, 0

        def _load_scaler(self, checkpoint):
            if self.accelerator.scaler is not None:  # else fp16 goes on as fp32, which needs none
                super()._load_scaler(checkpoint)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            per_step = args.batch_size * args.accumulate
            parts = {name: value / per_step for name, value in loss(model, inputs).items()}
            for name, value in parts.items():
                self.parts[name] = self.parts.get(name, 0.0) + value.item()
            if not all(map(math.isfinite, self.parts.values())):
                raise UserError(f"the loss is not finite at step {self.state.global_step + 1}: lower --lr, or give "
                                "--compute fp32; the last checkpoint is kept")
            return sum(parts.values())

        def log(self, logs, *rest):
            super().log({**logs, **self.report()} if "loss" in logs else logs, *rest)

        def report(self):
            """Print the mean of each part since the last report, and return it."""
            step, since, self.reported = self.state.global_step, self.reported, self.state.global_step
            means = {name: round(value / (step - since), 4) for name, value in self.parts.items() if value}
            self.parts = {}
            if means:
                said = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
                coin = " (0.69 is a coin)" if means.keys() - {"text"} else ""
                print(f"step {step}/{steps}  {said}{coin}", flush=True)
            return means

    dtype = model.get_input_embeddings().weight.dtype
    trainer = Trainer(model, training_arguments(args, folder, steps, dtype), collate, examples)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def last_checkpoint(folder):
    """(step, folder) of the last whole checkpoint, or None; its trainer_state.json is written last."""
    found = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # half-written: a run was killed
            found.append((json.loads(path.read_text("utf-8"))["global_step"], path.parent))
    return max(found, default=None)


def reset_peak_memory():
    """Let `peak_memory` count from here; on a CPU it cannot be reset."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """Bytes that tensors took at most on the GPU, else that this process took; None where neither is known."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def code_hash(function):
    """A hash of a function's syntax tree: comments, docstrings and spacing do not count."""
    tree = ast.parse(inspect.getsource(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return short_hash(ast.dump(tree))


def train_adapter(run, name, base, records, examples, functions, fine_tune, followers=(), **about):
    """Let `fine_tune(folder)` train an adapter unless it is finished; refused if something else was trained there.

    args.json holds what it follows from: `about`, examples, settings, weights, the code of `functions`; and what
    fine_tune returns. questions.txt keeps which `records` it saw. `followers` start from it: --overwrite deletes them,
    too.
    """
    args, folder = run.args, run.folder / name
    path, keys = folder / "args.json", ("seed", "lr", "rank", "batch_size", "accumulate", "max_length")
    now = {**about, **{key: getattr(args, key) for key in keys}, "bits": args.adapter_bits,
           "weights": weights_id(base, run.task), "examples": short_hash(examples),
           "code": {f.__name__: code_hash(f) for f in functions}}
    with locked(folder):
        if args.overwrite:
            for old in (folder, *(run.folder / follower for follower in followers)):
                shutil.rmtree(old, ignore_errors=True)
        then = json.loads(path.read_text("utf-8")) if path.is_file() else now
        same = {"code"}
        if then.get("batch_size", 0) * then.get("accumulate", 0) == now["batch_size"] * now["accumulate"]:
            same |= {"batch_size", "accumulate"}  # the same steps in less memory
        differ = [f"{key} ({then.get(key)} then, {value} now)" for key, value in now.items()
                  if key not in same and then.get(key) != value]
        differ += [f"the code of {key}" for key, value in now["code"].items() if then.get("code", {}).get(key) != value]
        if differ:
            raise UserError(f"{folder} was trained otherwise: {', '.join(differ)}. Give --run NEW to train beside it, "
                            "or --overwrite")
        if "steps" in then:
            return print(f"{folder} is trained already: nothing to do")
        write(folder / "questions.txt", "".join(question_hash(record) + "\n" for record in records))
        write(path, now)
        write(path, {**now, "model": base, **fine_tune(folder)})


def push(run, name):
    """Upload an adapter to the repository --push of the Hub, with a model card from its args.json."""
    import huggingface_hub
    args, about, folder = run.args, run.about(name), run.adapter(name)
    header = huggingface_hub.ModelCardData(base_model=about["model"], library_name="peft", license="other",
                                           license_name="that-of-the-base-model", tags=["art", "arxiv:2311.07961"])
    figures = {key: value for key, value in about.items() if key not in ("code", "curve", "dev")}
    figures |= {f"dev {key}": value for key, value in about.get("dev", {}).items()}
    write(folder / "README.md", "\n".join([
        "---", header.to_yaml(), "---", f"# {name} of Ask, Refine, and Trust, for {args.task}", "",
        f"A LoRA adapter of {about['model']}, trained on samples that an LLM gave to the questions of {args.task}.", "",
        f"    {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}", "", "| setting or figure | |",
        "| --- | --- |", *(f"| {key} | {value} |" for key, value in figures.items()), "",
        "The licence of the base model holds, and that of the data.", ""]))
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(args.push, private=True, exist_ok=True)
        api.upload_folder(repo_id=args.push, folder_path=folder, ignore_patterns=["checkpoints/*", "questions.txt"])
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"cannot push to {args.push}: {text}; log in with: hf auth login") from None
    print(f"{folder} is in the repository {args.push}")


def drop_long(examples, max_length):
    """Examples of at most `max_length` tokens; longer ones are left out and counted: cutting would cut the answer."""
    kept = [example for example in examples if len(example["input_ids"]) <= max_length]
    if not kept:
        raise UserError(f"all {len(examples)} examples exceed --max-length {max_length} tokens: raise it")
    long = len(examples) - len(kept)
    print(f"{len(kept):,} examples; {long:,} longer than --max-length {max_length} are left out")
    if long > 0.02 * len(examples):
        print("warning: these are more than 2%: raise --max-length")
    return kept


# ======================================================================================================================


def main():
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=("sample", "subquestions", "solve"))
    parser.add_argument("question", nargs="?", help="the question, in quotes (solve)")
    parser.add_argument("--random", action="store_true", help="solve one of the test questions")
    parser.add_argument("--k", type=positive, help="samples of a question (default by preset)")
    args = parse(parser)
    {"sample": sample, "subquestions": subquestions, "solve": solve}[args.command](args)


if __name__ == "__main__":
    run(main)
