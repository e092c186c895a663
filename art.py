"""ART: Ask, Refine, and Trust (Shridhar et al., arXiv 2311.07961). All scripts share this module.

    question -> LLM writes a DRAFT -> ASKER: sub-questions, and "refine?" -- no ------> draft
                                            |
                                            yes -> LLM writes a REFINED answer -> TRUSTER picks one

    python art.py "QUESTION"        # one question through the four steps
    python art.py --random          # the same with one of the test questions

The LLM is not fine-tuned. The Asker and the Truster learn by QLoRA from its answers.
Part 1 is the method. Parts 2 to 5 are its helpers: texts, files and flags, models, training.
"""

import argparse
import ast
import collections
import functools
import gc
import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# ===== Part 1. The method =====
#
# A record is one question: {"id", "question", "answer",
# "solution": [[sub-question, step], ...]}; StrategyQA has "facts", too.
# An output is what a model gave for one prompt, also a dict. "answer" in a
# record is the gold answer; in an output it is what was read from "text",
# or None. "failed" in an output is "", or why a server gave nothing usable.
# `args` are the flags (part 3). `llm`, `asker` and `truster` are Models
# (part 4). Each has three methods that return for each prompt:
#
#     generate   a list of samples, {"text", "finished", "tokens", ...}
#     choose     {"p": the probability of the first of two words, ...}
#     score      {"score": higher means "more likely correct", ...}
#
# Below, for each step: its prompt and its function. The regular
# expressions (BULLET, ...) are in part 2.

# A chat model reads an instruction in place of the prompt's last line
# ("Answer:"). A base model reads the prompt as it is.
INSTRUCTIONS = {
    "cot": "Answer the question. Reason step by step, and {end}",
    "decomp": "Ask the sub-questions that lead to the answer, answer them one after the other, "
              "then the question, and {end}",
    "ask": "Write the sub-questions that a right answer to the question has to settle, one a line. "
           "Then check the given answer: the last line is 'Refine: Yes' if it is wrong, "
           "'Refine: No' if it is right.",
    "refine": "Answer the sub-questions one after the other, then the question. "
              "Reason step by step, and {end}",
    "refine_plain": "Check the given answer and write a revised one. "
                    "Reason step by step, and {end}",
}
END = {
    "number": "put the final answer in \\boxed{}.",
    "yes/no": "put the final answer, yes or no, in \\boxed{}.",
    "choice": "put the letter of the final answer in \\boxed{}.",
}


def render(model, args, prompt, step):
    """The prompt of a step as the model reads it."""
    if not model.chat:
        return prompt
    body, _, _ = prompt.rstrip().rpartition("\n")
    end = END[answer_kind(args.task)]
    return f"{body}\n\n{INSTRUCTIONS[step].format(end=end)}"


def question_block(record, facts=False):
    """The beginning of every prompt: the question, and StrategyQA's facts if wanted."""
    lines = [f"Question: {record['question']}"]
    if facts and record.get("facts"):
        lines += ["Facts:", *(f"- {fact}" for fact in record["facts"])]
    return "\n".join([*lines, ""])


# --- Step 1, predict. The LLM writes the draft: by chain of thought
# ("cot") or by sub-questions ("decomp"). StrategyQA's facts are shown in the
# refinement (--facts refine), also for the draft (both), or never (none).
# The Asker and the Truster never see them.


def predict_prompt(record, strategy="cot", facts=False):
    """The question, and the line after which the answer begins."""
    cue = "Answer:" if strategy == "cot" else "Answer by sub-questions:"
    return f"{question_block(record, facts)}{cue}\n"


def solution_text(solution, answer, strategy="cot"):
    r"""The gold solution: one step a line, then `#### answer`.

    >>> solution_text([["How many are left?", "5 - 2 = 3 are left."]], "3", "decomp")
    'How many are left? 5 - 2 = 3 are left.\n#### 3'
    """
    lines = []
    for subquestion, step in solution:
        line = step if strategy == "cot" else f"{subquestion} {step}"
        lines.append(line.strip())
    lines.append(f"#### {answer}")
    return "\n".join(filter(None, lines))


def predict(llm, args, records, temperature=0.0):
    """Step 1: one answer for each question (paper, section 3.1)."""
    samples = sample_answers(llm, args, records, [0], temperature)
    return [answer for [answer] in samples]


def sample_answers(llm, args, records, numbers, temperature):
    """For each question a list of answers, one for each sample number.

    The same model, temperature, seed, prompt and number give the same sample.
    """
    strategy = llm.strategy or args.strategy  # "finetuned" has its own
    facts = args.facts == "both" and not llm.strategy  # it learned without
    prompts = [render(llm, args, predict_prompt(record, strategy, facts), strategy)
               for record in records]
    return write_answers(llm, args, prompts, numbers, temperature)


def write_answers(llm, args, prompts, numbers, temperature):
    """Let the LLM continue each prompt up to `#### answer`, and read the answer."""
    stop = ANSWER_LINE[answer_kind(args.task)] + r"[^\n]*\n"
    if not llm.chat:  # a base model would go on with a new question
        stop += r"|\n\n|\n(?=Question:)"
    results = llm.generate(prompts, args.max_new_tokens, stop, numbers, temperature)
    for samples in results:
        for output in samples:
            output["answer"] = extract_answer(args.task, output["text"])
    return results


# --- Step 2, ask. The Asker reads the question and the draft. It writes
# the sub-questions that a correct solution has to answer. Then it decides:
# refine? It learned from gold sub-questions, and from samples of the LLM on
# training questions: "Yes" after an incorrect one, "No" after a correct one.

DECISION = "Refine:"  # the Asker continues this with " Yes" or " No"


def ask_prompt(record, draft):
    """The text that the Asker continues."""
    return f"{question_block(record)}Answer:\n{draft}\nSub-questions:\n"


def ask_target(subquestions, refine):
    r"""The text that the Asker learns to write: one sub-question a line, then the decision.

    >>> ask_target(["How many are left?"], refine=True)
    'How many are left?\nRefine: Yes'
    """
    return "\n".join([*subquestions, f"{DECISION} {'Yes' if refine else 'No'}"])


MAX_SUBQUESTIONS = 8


def parse_subquestions(text):
    r"""The sub-questions in a text of the Asker: one a line, up to the decision or to a repetition.

    >>> parse_subquestions("1. How many are left?\n- **Who has them?**\n**Refine: Yes**")
    ['How many are left?', 'Who has them?']
    """
    subquestions = {}
    for line in re.split(LIST_END, without_thoughts(text))[0].splitlines():
        line = re.sub(BULLET, "", re.sub(BOLD, "", line).strip()).strip(" *")
        key = " ".join(line.casefold().split())
        if key in subquestions:
            break
        if not re.fullmatch(NO_WORD, line):
            subquestions[key] = line
    return [*subquestions.values()][:MAX_SUBQUESTIONS]


def gold_subquestions(record):
    """The sub-questions in the gold solution of a record."""
    return [subquestion for subquestion, _ in record.get("solution", []) if subquestion]


def write_subquestions(model, args, prompts):
    """Let a model continue each prompt with sub-questions: {"subquestions": list of str, ...}."""
    asked = [output for [output] in model.generate(prompts, args.max_new_tokens, ASK_STOP)]
    for output in asked:
        output["subquestions"] = parse_subquestions(output.pop("text"))
    return asked


def ask(asker, args, records, drafts):
    """Step 2: sub-questions, and the probability of an incorrect draft (paper, section 3.2).

    The Asker writes the sub-questions first. We then append "Refine:" and compare the probabilities
    of " Yes" and " No" as the next token. The training weighs incorrect and correct drafts alike;
    `with_prior` corrects that.

    Returns one dict for each record: {"subquestions": list of str, "p_refine": 0 to 1, ...}.
    """
    prompts = [render(asker, args, ask_prompt(record, draft["text"]), "ask")
               for record, draft in zip(records, drafts)]
    asked = write_subquestions(asker, args, prompts)
    begun = ["\n".join([*output["subquestions"], DECISION]) for output in asked]
    decisions = asker.choose(prompts, begun, (" Yes", " No"))
    for output, decision in zip(asked, decisions):
        output["p_refine"] = with_prior(decision["p"], asker.prior_odds)
        output["prompt_tokens"] += decision["prompt_tokens"]
        output["failed"] = output["failed"] or decision["failed"]
    return asked


def with_prior(p, odds):
    """Bayes: `p` was learned on balanced classes; `odds` is incorrect drafts per correct draft.

    >>> with_prior(0.5, 3)
    0.75
    """
    return p * odds / (p * odds + 1 - p)


# --- Step 3, refine. The LLM answers again, with the sub-questions (a chat
# model: as hints). The draft is hidden, unless --show-draft is yes or there
# are no sub-questions.

HINTS = "Some questions that a solution may have to answer (some may be missing or wrong):"


def refine_prompt(record, draft, subquestions=(), facts=False, show_draft=True, chat=False):
    """The question, the draft (if it is shown) and the sub-questions; or hints for a chat model."""
    if chat and subquestions and not show_draft:
        hints = map("- {}".format, subquestions)
        return "\n".join([HINTS, *hints, "", predict_prompt(record, facts=facts)])
    prompt = question_block(record, facts)
    if show_draft or not subquestions:
        prompt += f"Answer:\n{draft}\n"
    if subquestions:
        prompt += "\n".join(["Sub-questions:", *subquestions, ""])
    return prompt + "Revised answer:\n"


def refine(llm, args, records, drafts, asked):
    """Step 3: a refined answer for each draft (paper, section 3.3)."""
    prompts, show = [], args.show_draft == "yes"
    for record, draft, output in zip(records, drafts, asked):
        subquestions = output["subquestions"]
        prompt = refine_prompt(record, draft["text"], subquestions, args.facts != "none", show,
                               llm.chat)
        step = "refine" if show else args.strategy
        if not subquestions:
            step = "refine_plain"
        prompts.append(render(llm, args, prompt, step))
    refined = write_answers(llm, args, prompts, [0], args.refine_temperature)
    return [answer for [answer] in refined]


# --- Step 4, trust. The Truster reads the question with one answer and
# gives it a score. It never sees both answers at once, so its scores do
# not depend on their order.


def trust_prompt(record, text):
    """What the Truster scores: the question and the text of an answer."""
    return f"{question_block(record)}Answer:\n{text}"


def trust(truster, args, records, answers):
    """Step 4: the Truster's score for each answer, {"score", ...} (paper, section 3.4)."""
    pairs = zip(records, answers)
    return truster.score([trust_prompt(record, answer["text"]) for record, answer in pairs])


# --- The loop


def is_readable(output):
    """Was it finished (not cut off), and is there an answer in it?"""
    return output["finished"] and output["answer"] is not None


def better_answer(draft, refined, draft_score, refined_score):
    """The readable answer; if both or none are, the one that scores higher (a tie: the draft)."""
    if is_readable(draft) != is_readable(refined):
        return draft if is_readable(draft) else refined
    return refined if refined_score > draft_score else draft


def ask_refine_trust(llm, asker, truster, args, record, threshold):
    """The paper's loop for one question. evaluate.py does the same for many and sets `threshold`.

    Returns {"draft", "asked", "final"}; if the draft was refined, also "refined" and "scores".
    """
    [draft] = predict(llm, args, [record], args.draft_temperature)
    [asked] = ask(asker, args, [record], [draft])
    result = {"draft": draft, "asked": asked, "final": draft}
    if asked["p_refine"] >= threshold:
        [refined] = refine(llm, args, [record], [draft], [asked])
        outputs = trust(truster, args, [record, record], [draft, refined])
        scores = [output["score"] for output in outputs]
        final = better_answer(draft, refined, *scores)
        result |= {"refined": refined, "scores": scores, "final": final}
    return result


# ===== Part 2. Reading texts =====

# --- Sub-questions

REFINE = r"(?i:refine)[* ]{0,3}:"  # DECISION as models write it: **refine**:
CHECK = r"(?im:^.*\b(?:given answer|is the \w* ?answer correct))"  # no sub-question
LIST_END = rf"{REFINE}|(?i:revised answer)[* ]{{0,3}}:|{CHECK}"
BOLD = r"(?<!\w)\*\*|\*\*(?!\w)"  # not the ** of 2**3
BULLET = r"^(?:[-*+•>#]{1,6}\s+|\d{1,3}[.)](?!\d)\s*)*"  # "- ", "2) ", "1. ", not "1.5 hours"
NO_WORD = r"(?:\\(?:begin|end)\{[^{}]*\}|[\W_])*"  # \[ or --- or \begin{align*}

# Generation stops at "Refine:", after a line that repeats an earlier one, or after eight lines.
LINE = rf"(?=[^\n]*\S)(?![^\n]*{REFINE})"  # not blank, not the decision
ASK_STOP = (
    rf"{REFINE}"
    rf"|(?:^|\n){LINE}(?P<asked>[^\n]+)\n(?:(?![^\n]*{REFINE})[^\n]*\n)*?(?P=asked)\n"
    rf"|\A(?:\s*{LINE}[^\n]+\n){{{MAX_SUBQUESTIONS}}}"
)

# --- Answers. What cannot be read is None, which is never correct. Words are
# never guessed: "No one knows" is not a "no", and "A cat" is not choice A.

# What may be before an answer: blanks, ** $ ( - and LaTeX such as \boxed{\text{
GAP = r"[^\w\n#]{0,10}(?:\\[a-zA-Z]{1,9}[^\w\n#]{1,5}){0,2}"
DIGIT = "[0-9¼-¾⅐-⅞]"

# Yes or no. Not: yes/no, yes and no, "yes?", No. 5. After "no" only these words may follow,
# which excludes: no one, no idea, no evidence.
AFTER_NO = "and that|as|because|but|due|for|given|he|if|in|it|she|since|they|when"
YES_NO = (
    r"((?i:yes|true)\b(?! +(?i:or|and no)\b)"
    rf"|(?i:no|false)\b(?! +(?!(?i:{AFTER_NO})\b)\w)(?!\. ?[0-9]))(?![-/|?])"
)
# A letter. Not: A cat, A's, A-frame, A/B, "A, B", A or B. Read: B. / (B) Paris / B because ...
CHOICE = (
    r"(?:(?i:option|choice|letter)\W{1,3})?([A-J])(?![\w'’/&+-])"
    r"(?!\W{0,3}(?:[,/&]|\b(?:and|or)\b)\W{0,3}[A-J]\b)"
    r"(?=[^\w\s]|\s*\n|\s*$| \(| -| (?:as|because|since)\b)"
)
# A text that opens with the answer: "Yes, it is", "B) Paris". Not: "Yes it is", "A, as in apple"
OPENING = {
    "yes/no": YES_NO + r"(?=[^\S\n]*(?:[^\w\s]|\n|$))",
    "choice": CHOICE + r"(?=\W*(?:\n|$)|[.)]|(?<![AI])[,:])",
}
FIRST = {"number": DIGIT, "yes/no": YES_NO, "choice": CHOICE}

# What may follow an answer in its line: all but words. Units and LaTeX's \text{ dollars} may.
UNIT = "[kcm]?m|[km]?g|m?[lL]|ft|mi|lbs?|oz|mph|hrs?|h|min|s|USD|EUR|GBP|thousand|[mb]illion"
NO_WORDS = (
    r"(?:[^\w\n#\\]|[0-9_²³¼-¾⅐-⅞]|\\(?:text|math)[a-z]*\{[^{}\n]*\}"
    r"|\\(?!text|math)[a-zA-Z]*(?![a-zA-Z])|(?<=[0-9])[eE](?=[-+]?[0-9])"
    rf"|(?<![a-zA-Z])(?:{UNIT}|x(?= ?[0-9]))(?![a-zA-Z]))*(?![^\n])"
)
# The answer line: `#### 18`, `#### **$18**.`, `#### yes`. Generation stops after it. A line with
# words, as `#### 3 eggs for breakfast`, may be a heading, so generation goes on.
ANSWER_LINE = {kind: f"####{GAP}{first}{NO_WORDS}" for kind, first in FIRST.items()}
# In a finished text the last line (before a next question) may have words.
LAST_LINE = r"(?:(?!####)[^\n])*(?![^\n])(?=[\W_]*(?:\Z|Question:))"

# "the answer is", **Answer:**, answer =
PHRASE = r"\b(?i:answer(?: to (?:the|this) question)?\W{0,4}(?:is\b|:|=))"

# \boxed{...}, with up to three levels of braces in it
INSIDE = "[^{}]*"
for _ in range(3):
    INSIDE = rf"[^{{}}]*(?:\{{{INSIDE}\}}[^{{}}]*)*"
BOX = rf"\\boxed\s*\{{({INSIDE})\}}"

# --- Numbers

DIGITS = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"  # 1,000.50 or 12
    r"|(?<![\w.])\.[0-9]+)"  # .5
)
MINUS = r"(?<![\w)-])(?<![0-9)] )-"  # not the hyphen of 10-20, step-3, 16 -3
RATIONAL = (
    rf"(?P<minus>{MINUS})?"
    r"(?:(?P<whole>[0-9]+) (?=[0-9]+ ?/ ?[0-9]))?"  # the 3 of 3 1/2
    rf"(?P<above>{DIGITS})(?: ?/ ?(?P<below>{DIGITS}))?"
)
NUMBER = re.compile(rf"(?<![0-9]){RATIONAL}(?:[eE](?P<power>[-+]?[0-9]+))?")
# Arithmetic goes on after a number: 18 + 2, 2(3 + 4), 2^3
OPERATION = re.compile(r"[(^]| ?[-+*÷] ?\(?-?[0-9]")
# The numbers and signs that open a line: `9 * 2 = 18` of `9 * 2 = 18 eggs (3 = 2 + 1)`
EQUATION = re.compile(r"\W*(?:[^A-Za-z(]|(?<=[0-9])[eE](?=[-+]?[0-9])|(?<![0-9.,] )\()*")

# How a gold answer has to look: a number of up to 50 characters that is not divided by 0
GOLD = {
    "number": rf"(?=.{{1,50}}$)(?!.*/ ?[0.,]+$){RATIONAL}",
    "yes/no": "yes|no", "choice": "[A-J]",
}

SCALE = {"thousand": "e3", "million": "e6", "billion": "e9", "trillion": "e12"}
REWRITES = [  # LaTeX and Unicode -> plain text, in this order
    (r"[\u2010-\u2013\u2212]", "-"),  # hyphens, the en dash and the minus sign
    # thousands: 1{,}234 and 1\,234 and no-break or thin spaces -> 1,234
    (r"(?<=[0-9])\{?(?:,\\!|,|\\[,;:! ]|[\u00a0\u2000-\u200a\u202f])\}?"
     r"(?=[0-9]{3}(?![0-9]))", ","),
    (r"\\[,;:! ]|[^\S\n]", " "),  # other spaces
    (r"(?<=[0-9])[\\$€£¥₹%]+(?=[0-9])", " "),  # $5$6 -> 5 6
    (r"\\?[$€£¥₹%]", ""),
    (rf"(?<=[0-9])(?=\\[dtc]?frac|(?![0-9]){DIGIT})", " "),  # 3½ -> 3 ½
    (r"[¼-¾⅐-⅞]", lambda found: unicodedata.normalize("NFKC", found[0])),  # ½ -> 1⁄2
    ("⁄", "/"),
    # \frac{1}{2} and \frac12 -> 1/2
    (r"\\[dtc]?frac *(?:\{ *(-?[0-9.,]+) *\}|([0-9])) *(?:\{ *([0-9.,]+) *\}|([0-9]))",
     r"\1\2/\3\4"),
    (r"\\(?:times|cdot)(?![a-z])|×|(?<=[0-9]) ?x ?(?=[0-9])", " * "),
    (r"(?<=[0-9]) +\* +10 ?\^ ?\{?(-?[0-9]{1,2})\}?", r"e\1"),  # 2 * 10^3 -> 2e3
    (r"\^ ?\{? ?-?[0-9.]+", "^"),  # m^2 -> m^
    (r"\\(?:text|math|mbox|left|right|displaystyle)[a-z]*|[{}]", " "),
    (r"\\[a-zA-Z]+", ";"),
    (r" +", " "),
    (r"= - (?=[.0-9])", "= -"),  # 2 - 7 = - 5
    # 1.5 million -> 1.5e6
    (rf"(?<=[0-9])[ *]*((?i:{'|'.join(SCALE)}))s?\b", lambda found: SCALE[found[1].lower()]),
]


def plain(text):
    r"""The text without LaTeX, currencies and special characters.

    >>> plain(r"\$9{,}500 or 3\frac{1}{2} million")
    '9,500 or 3 1/2e6'
    """
    for old, new in REWRITES:
        text = re.sub(old, new, text)
    return text


def canonical(found):
    """A match of NUMBER as 1000.5 or 1/3; None for 1/0 and for more than 100 characters."""
    if not found or len(found[0]) > 100:
        return None
    parts = {name: (part or "").replace(",", "") for name, part in found.groupdict().items()}
    below, power = Fraction(parts["below"] or 1), parts["power"] or "0"
    if below == 0 or len(power) > 3:
        return None
    value = Fraction(parts["whole"] or 0) + Fraction(parts["above"]) / below
    value *= Fraction(10) ** int(power)
    text = str(value)
    if 10**20 % value.denominator == 0:  # up to 20 decimals; others, as 1/3, stay exact
        digits = f"{int(value * 10**20):021}"
        text = f"{digits[:-20]}.{digits[-20:]}".rstrip("0").rstrip(".")
    if parts["minus"] and value:
        text = "-" + text
    return text if len(text) <= 100 else None


def solve(equation):
    """The number alone on one side of an equation, the right one first; or just a number.

    >>> solve("9 * 2 = 18"), solve("20 = 18 + 2"), solve("- 5")
    ('18', '20', '-5')
    """
    for side in reversed(equation.split("=")):
        side = re.sub(r"^([^\w.-]*)- (?=[.0-9])", r"\1-", side)
        found = NUMBER.search(side)
        if found and not OPERATION.match(side, found.end()):
            return canonical(found)
    return canonical(NUMBER.search(equation))


# --- Reading


def without_thoughts(text):
    """The text without <think>...</think>. An unclosed thought goes on to the end of the text.

    >>> without_thoughts("<think>7? No.</think>5"), without_thoughts("7? No.</think>5")
    ('5', '5')
    """
    tag = r"(?:think|thinking|thought|reasoning)\b[^<>]*>"
    text = re.sub(rf"(?is)<{tag}.*?(?:</{tag}|\Z)", "", text)
    return re.sub(rf"(?is)\A.*</{tag}", "", text)  # the prompt opened this thought


def up_to(stop, text):
    """The text up to the end of the first match of the regex `stop`, or the whole text."""
    found = re.search(stop, text) if stop else None
    return (text[: found.end()] if found else text).strip()


def extract_answer(task, text):
    r"""The answer in a text in canonical form, or None.

    From the first of these that exists: the first answer line, the last \boxed{}, the last "the
    answer is"; for numbers the last number, for the others the answer that opens the text.

    >>> extract_answer("gsm8k", "So 9 * 2 = 18.\n#### **$1,018.00**\n")
    '1018'
    >>> extract_answer("strategyqa", "No, it sinks."), extract_answer("strategyqa", "No one knows.")
    ('no', None)
    """
    kind = answer_kind(task)
    text = without_thoughts(text).strip()
    line = re.search(f"####({GAP}{FIRST[kind]}(?:{NO_WORDS}|{LAST_LINE}))", text)
    boxes = re.findall(BOX, text)
    if kind == "number":
        return read_number(line, boxes, text)
    return read_word(kind, line, boxes, text)


def read_number(line, boxes, text):
    """The number in the answer line, else in the last box that has one, else in the text."""
    if line:
        return solve(EQUATION.match(plain(line[1]))[0])
    boxes = [box for box in boxes if re.search(DIGIT, box)]
    if boxes:
        return solve(plain(boxes[-1].replace("\n", " ")))
    text = plain(text)
    said = list(re.finditer(rf"{PHRASE}(?={GAP}[0-9])", text))
    if said:
        return solve(EQUATION.match(text[said[-1].end() :].split("\n")[0])[0])
    return canonical(([None] + list(NUMBER.finditer(text)))[-1])


def read_word(kind, line, boxes, text):
    """The word in the answer line, else in the last box or phrase, else the first word."""
    word = re.compile(GAP + FIRST[kind])
    boxes = [box.strip() for box in boxes if word.match(box.strip())]
    if line or boxes:
        answer = word.match(line[1] if line else boxes[-1])[1]
    else:
        said = re.findall(rf"{PHRASE}\s{{0,3}}{GAP}{FIRST[kind]}", text)
        # else what opens the text, unless another line opens with another answer
        first = re.match(GAP + OPENING[kind], text)
        lines = re.findall(rf"(?:^|\n){GAP}{OPENING[kind]}", text)
        opens = first and len({*map(str.lower, lines)}) == 1
        answer = said[-1] if said else first[1] if opens else ""
    if kind == "yes/no":
        answer = {"true": "yes", "false": "no"}.get(answer.lower(), answer.lower())
    return answer or None


def is_correct(task, text, gold):
    """Whether the answer in the text equals the gold answer. No answer is incorrect."""
    answer = extract_answer(task, text)
    return answer is not None and answer == extract_answer(task, f"#### {gold}")


# ===== Part 3. Files and flags =====

# The kind of answer, and the script that makes the data. Other tasks are
# folders of data/ with a task.json that holds the same.
TASKS = {
    "toy": {"answer": "number", "prepare": "data/toy/prepare.py"},
    "gsm8k": {"answer": "number", "prepare": "data/prepare.py gsm8k"},
    "strategyqa": {"answer": "yes/no", "prepare": "data/prepare.py strategyqa"},
}
SAVED = "finished work is saved; run the command again, without --overwrite, to resume"


class UserError(Exception):
    """Something the user can fix. Its text is the one line they see."""


def answer_kind(task):
    """"number", "yes/no" or "choice"."""
    return TASKS[task]["answer"]


def find_tasks(data):
    """Add the tasks of the folder `data` to TASKS."""
    for path in data.glob("*/task.json"):
        about = {"prepare": f"data/prepare.py csv FILE --task {path.parent.name}",
                 **read_json(path)}
        if about.get("answer") not in GOLD:
            raise UserError(f"{path}: \"answer\" must be one of {', '.join(GOLD)}")
        TASKS[path.parent.name] = about


def read_jsonl(path, fix):
    """The records of a JSONL file; `fix` tells the user how to make it."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing: {fix}")
    records = []
    text = Path(path).read_text("utf-8-sig", errors="surrogateescape").rstrip()
    for number, line in enumerate(text.split("\n") if text else [], 1):
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # fails for what is not UTF-8
            record.keys()
        except (ValueError, RecursionError, AttributeError):
            raise UserError(f"{path}, line {number}: not a JSON object in UTF-8; fix or "
                            "delete it") from None
        records.append(record)
    return records


def read_json(path):
    """The dictionary in a JSON file; {} if there is no such file."""
    try:
        return {**json.loads(path.read_text("utf-8-sig"))} if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is not a JSON object: fix or delete it") from None


def write(path, content):
    """Write a text, a list of records or a dictionary, completely or not at all."""
    if isinstance(content, list):
        content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in content)
    elif isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    part = Path(f"{path}.{os.getpid()}.part")  # two processes may write the same file
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(content, encoding="utf-8", newline="\n")
    part.replace(path)


def fault_of(record, kind):
    """What is wrong with a record, or None.

    >>> fault_of({"id": "a", "question": "How many?", "answer": "six"}, "number")
    "the answer 'six' is not a number"
    """
    def texts(values):
        return isinstance(values, list) and all(isinstance(text, str) for text in values)

    for key in ("id", "question"):
        value = record.get(key)
        if not isinstance(value, str) or not value.strip():
            return f'"{key}" is not a text'
    answer = record.get("answer")
    if not isinstance(answer, str) or not re.fullmatch(GOLD[kind], answer):
        return f"the answer {answer!r} is not a {kind}"
    solution = record.get("solution", [])
    if not isinstance(solution, list) or not all(texts(one) and len(one) == 2 for one in solution):
        return '"solution" is not a list of [sub-question, step] pairs'
    return None if texts(record.get("facts", [])) else '"facts" is not a list of texts'


def faults_of(where, found, hint=""):
    """The error for many faults at once."""
    more = f" ... and {len(found) - 20} more" if len(found) > 20 else ""
    return UserError(f"{where}: {'; '.join(found[:20])}{more}{hint}")


def load_split(args, split):
    """The records of a split (train, dev or test) that --limit and --limit-train leave.

    All splits are checked; all faults are listed.
    """
    faults, ids, kept = [], set(), []
    for name in ("train", "dev", "test"):
        path = args.data / args.task / f"{name}.jsonl"
        fix = f"run python {TASKS[args.task]['prepare']}"
        records = read_jsonl(path, fix) if name == split or path.is_file() else []
        for number, record in enumerate(records, 1):
            fault = fault_of(record, answer_kind(args.task))
            if not fault and record["id"] in ids:
                fault = f"duplicate id {record['id']}, ids must be unique across all splits"
            if fault:
                faults.append(f"{path}, line {number}: {fault}")
            ids.add(str(record.get("id")))
        kept = records if name == split else kept
    if faults:
        raise faults_of("fix or delete these records", faults)
    if not kept:
        raise UserError(f"there are no questions in {split}: {fix}")
    limits = [args.limit, args.limit_train if split == "train" else None]
    return kept[: min(filter(None, limits), default=None)]


def load_samples(args, records, name="samples", flag=""):
    """{id: line}; a line is a record with "samples" (dev: "draft", too) or "subquestions"."""
    path = args.shared / f"{name}.jsonl"
    fix = f"run python data/sample.py --task {args.task}{flag}, with your other flags"
    lines = {line["id"]: line for line in read_jsonl(path, fix)}
    missing = sum(not one.items() <= lines.get(one["id"], {}).items() for one in records)
    if missing:
        raise UserError(f"{path} has nothing for {missing} of {len(records)} questions: {fix}")
    return lines


def distinct_samples(lines, record):
    """{text: is it correct?} of the samples of a question; failed ones teach nothing."""
    samples = lines[record["id"]]["samples"]
    return {one["text"]: one["correct"] for one in samples if not one["failed"]}


def too_few(lines, what):
    """The error for samples that teach nothing: cause and remedy."""
    samples = [one for line in lines.values() for one in line["samples"]]
    cut_off = [not one["finished"] and not one["failed"] for one in samples]
    return UserError(f"{what}; {sum(cut_off) / len(cut_off):.0%} of the samples were cut off. Give "
                     "data/sample.py a larger --limit, --k or --max-new-tokens, or another --model")


def load_columns(folder, file="records.jsonl"):
    """The records of a run as numpy columns: {"id": array, "correct.art": array, ...}.

    A dictionary in a record becomes columns with a dot, as "ask.p_refine". `file` may be
    dev.jsonl. Missing values are None.
    """
    import numpy as np
    columns = {}
    records = read_jsonl(Path(folder) / file, "run python evaluate.py")
    for number, record in enumerate(records):
        for name, value in record.items():
            for key, part in value.items() if isinstance(value, dict) else [("", value)]:
                column = columns.setdefault(f"{name}.{key}".rstrip("."), [None] * len(records))
                column[number] = part
    for name, column in columns.items():
        mixed = {list, type(None)} & {*map(type, column)}
        columns[name] = np.fromiter(column, object) if mixed else np.array(column)
    return columns


def auc(scores, labels):
    """The probability that a positive scores above a negative, ties half; None without both.

    >>> auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
    0.75
    """
    import numpy as np
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    pairs = scores[labels][:, None] - scores[~labels][None, :]
    return float(np.mean((pairs > 0) + 0.5 * (pairs == 0))) if pairs.size else None


def short_hash(value):
    """A hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(*sources):
    """A hash of Python code that does not change with comments and docstrings.

    >>> code_hash("x = 1") == code_hash("x = 1  # one"), code_hash("x = 1") == code_hash("x = 2")
    (True, False)
    """
    tree = ast.parse("\n".join(sources))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""  # a docstring
    return short_hash([ast.unparse(tree)])


def question_hash(record):
    """A hash of a question's words and signs; adapters keep those of theirs."""
    return short_hash(re.findall(r"[\w+*/^<>=-]+", record["question"].casefold()))


def show(parts):
    """Print names with texts."""
    for name, text in parts.items():
        print(f"  {name}: {text}".replace("\n", "\n" + " " * (len(name) + 4)))


def provenance():
    """The commit of the kit ("+": with uncommitted changes) and versions."""
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {"commit": commit, "python": sys.version.split()[0],
            **{name: version(name) for name in names}}


# --- Flags. What the user leaves out comes from llm.json (the settings of
# the last data/sample.py), then from the preset, then from DEFAULTS.

TOY, SMALL_TOY, SMALL = "data/toy/base", "data/toy/base_asker", "Qwen/Qwen2.5-0.5B-Instruct"
LLM_DEFAULTS = {
    "base_url": None, "bits": None, "k": 4, "limit_train": None, "max_new_tokens": 512,
    "strategy": "cot", "facts": "refine", "show_draft": "no", "temperature": 0.7,
    "draft_temperature": 0.0, "refine_temperature": 0.7, "sample_seed": 0}
LLM_KEYS = ["preset", "model", *LLM_DEFAULTS]  # kept in llm.json
DEFAULTS = {
    **LLM_DEFAULTS, "adapter_bits": None, "kv_gib": None, "asker_batch": 32, "asker_at_once": 4,
    "truster_batch": 16, "truster_at_once": 1, "task_epochs": 2, "epochs": 1, "lr": 2e-4,
    "max_length": 1024}
PRESETS = {
    "toy": {"model": TOY, "asker_model": SMALL_TOY, "truster_model": SMALL_TOY, "adapter_bits": 4,
            "draft_temperature": 0.7, "max_new_tokens": 128, "lr": 2e-3,
            "max_length": 512, "asker_at_once": 32, "truster_at_once": 16, "task_epochs": 1},
    "small": {"model": SMALL, "asker_model": SMALL, "truster_model": SMALL, "k": 3},
    "t4": {"model": "Qwen/Qwen2.5-1.5B-Instruct", "asker_model": "Qwen/Qwen2.5-1.5B",
           "truster_model": "Qwen/Qwen2.5-1.5B", "limit_train": 2000},
    "16gb": {"model": "Qwen/Qwen3-8B", "asker_model": "Qwen/Qwen3-4B-Base",
             "truster_model": "Qwen/Qwen3-4B-Base", "limit_train": 2000},
    "24gb": {"model": "Qwen/Qwen2.5-7B-Instruct", "asker_model": "NousResearch/Llama-2-7b-hf",
             "truster_model": "NousResearch/Llama-2-13b-hf", "k": 5, "task_epochs": 3}}


def at_least(least, kind):
    """Numbers of `least` or more."""
    def convert(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise ValueError
        return value

    convert.__name__ = f"(a number of at least {least} is needed)"
    return convert


COUNT, NUMBER_FLAG = at_least(1, int), at_least(0, float)


def make_parser(doc, script):
    """The flags of a script: "solve" (art.py), "sample", "asker", "truster" or "evaluate"."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    count = functools.partial(add, type=COUNT, metavar="N")
    add("--task", default="toy", help="a folder of data/ (default toy: nothing to download)")
    add("--preset", choices=PRESETS, help="models and sizes (default: small; toy for the toy)")
    count("--limit", help="only the first N questions of each split")
    if script not in ("solve", "evaluate"):
        count("--limit-train", help="only the first N training questions")
    add("--runs", type=Path, default=ROOT / "runs", metavar="DIR", help="folder of all runs")
    add("--data", type=Path, default=ROOT / "data", metavar="DIR", help="folder of the tasks")
    if script != "sample":  # the runs of a task share their samples
        add("--run", default="default", metavar="NAME", help="results go to runs/TASK/NAME")
    if script not in ("sample", "solve"):
        add("--seed", type=int, default=0, help="seed of the training (default 0)")
    add("--kv-gib", type=NUMBER_FLAG, metavar="GIB",
        help="memory for keys and values (default: by the free GPU memory)")
    if script not in ("asker", "truster"):
        add_llm_flags(add, count, script)
        return parser
    add(f"--{script}-model", metavar="MODEL", help="base model: a folder or Hub id (by preset)")
    add("--overwrite", action="store_true", help="train this run's adapter again")
    add("--adapter-bits", type=int, choices=(4, 16, 32),
        help="bits of the frozen weights (default 4; on a CPU 32, for the toy 4)")
    add("--lr", type=NUMBER_FLAG, help="peak learning rate (default 2e-4, as QLoRA; toy: 2e-3)")
    count("--rank", default=16, help="rank of LoRA; alpha is twice that (default 16)")
    add("--epochs", type=NUMBER_FLAG, help="passes over the examples (default 1)")
    count(f"--{script}-batch", help="examples of a step (by preset)")
    count(f"--{script}-at-once", help="examples in memory at a time (by preset)")
    count("--max-length", help="longest example in tokens (by preset)")
    count("--save-steps", default=25, help="steps between checkpoints (25)")
    add("--report-to", choices=("trackio", "wandb"), help="also send the loss to this tracker")
    return parser


def add_llm_flags(add, count, script):
    """Which LLM is asked, and how."""
    add("--model", help="the LLM: a folder or Hub id, or its name on the server")
    add("--base-url", metavar="URL", help="a server with OpenAI's API; key in OPENAI_API_KEY")
    count("--concurrency", default=8, help="requests at a time (default 8)")
    add("--bits", type=int, choices=(4, 16, 32), help="bits of the LLM's weights (by its size)")
    count("--max-new-tokens", help="longest answer (default 512; toy: 128)")
    add("--strategy", choices=("cot", "decomp"), help="how to draft (default cot)")
    add("--facts", choices=("refine", "both", "none"), help="when facts are shown (default refine)")
    add("--show-draft", choices=("yes", "no"), help="show the draft when refining (default no)")
    if script != "solve":
        count("--k", help="samples of a question (by preset)")
        add("--temperature", type=NUMBER_FLAG, metavar="T", help="of the samples (default 0.7)")
    add("--draft-temperature", type=NUMBER_FLAG, metavar="T", help="(default 0: greedy; toy: 0.7)")
    add("--refine-temperature", type=NUMBER_FLAG, metavar="T", help="(default 0.7)")
    add("--sample-seed", type=int, metavar="SEED", help="seed of all sampling (default 0)")


def parse(parser, argv=None, remember=True):
    """The flags, completed from llm.json (if `remember`), the preset and DEFAULTS."""
    given = parser.parse_args(argv)
    find_tasks(given.data)
    if given.task not in TASKS:
        raise UserError(f"no task {given.task}: --task takes {', '.join(TASKS)}; make your own "
                        "with python data/prepare.py csv FILE --task NAME")
    saved = read_json(given.runs / given.task / "llm.json") if remember else {}
    if getattr(given, "model", None) not in (None, saved.get("model")):
        saved = {"preset": saved.get("preset")}  # another LLM has other settings
    preset = given.preset or saved.get("preset") or ("toy" if given.task == "toy" else "small")
    if preset == "toy" and given.task != "toy":
        raise UserError("the toy's models read only the toy's questions: give --preset small")
    if getattr(given, "base_url", None) and not (given.model or saved.get("base_url")):
        raise UserError("--base-url needs --model NAME, the LLM's name there")
    parser.set_defaults(**{**DEFAULTS, **PRESETS[preset], **saved, "preset": preset})
    args = parser.parse_args(argv)
    args.base_url = args.base_url and args.base_url.rstrip("/")
    args.shared = args.runs / args.task
    if hasattr(args, "run"):
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", args.run):
            raise UserError("--run NAME: use only letters, digits, dot, - and _")
        args.folder = args.shared / args.run
    return args


def run(main):
    """Call a script's `main`. An error that the user can fix becomes one line, exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows may lack letters
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # libraries warn about each other
    try:
        return main()
    except KeyboardInterrupt:
        message, code = f"stopped; {SAVED}", 130
    except Exception as error:
        message, code = explain(error), 2
        if not message:
            raise
    print(f"\nerror: {message}", file=sys.stderr)
    sys.exit(code)


def explain(error):
    """What the user can do about an error, in one line; "" if nothing."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if "torchao" in text:  # Colab has one that peft refuses
        return f"{text}: run pip uninstall -y torchao"
    if "Unrecognized configuration" in text:
        return "this is no LLM, or it reads images: give another --model"
    if isinstance(error, ImportError):
        return f"{text}: run pip install {error.name or '-r requirements.txt'}"
    if re.search("No space left|quota exceeded|File too large|disk is full|inline_contain", text):
        return f"the disk is full; {SAVED}"
    if re.search("out of memory|ALLOC_FAILED|not enough memory|can't allocate memory", text):
        return (f"out of memory; {SAVED}. Lower --kv-gib, --asker-at-once or --truster-at-once, or "
                "take a smaller model")
    if isinstance(error, (OSError, sqlite3.Error)):
        return f"cannot use the folder: {text}; give another --runs DIR"
    return ""


# ===== Part 4. Models =====
#
# Slow libraries are imported where they are used, for a fast --help.


class Model:
    """A model with a cache: it is loaded and asked only for what is not in the cache.

    The cache is runs/TASK/answers.sqlite. Its keys are hashes of what was asked: weights, code that
    generates, settings, prompt, how the answer has begun, number of the sample. Subclasses say in
    `compute` how new outputs are made.
    """

    strategy, prior_odds, label = None, 1.0, "answers"  # label: for the progress line

    def __init__(self, args, identity, chat):
        self.args, self.identity, self.chat = args, identity, chat
        args.shared.mkdir(parents=True, exist_ok=True)
        self.cache = sqlite3.connect(args.shared / "answers.sqlite", timeout=60)
        self.cache.execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, output TEXT)")

    def generate(self, prompts, max_new_tokens, stop=None, numbers=(0,), temperature=0.0):
        """Texts up to the first match of the pattern `stop`; temperature 0 is greedy.

        For each prompt a list with one output for each of the sample `numbers`: {"text",
        "finished", "tokens" (written), "prompt_tokens", "logprob" (sum), "failed" (why, or "")}.
        """
        settings = {"kind": "generate", "max_new_tokens": max_new_tokens, "stop": stop,
                    "temperature": temperature}
        if temperature:
            settings["seed"] = self.args.sample_seed
        questions = [(prompt, "", number) for prompt in prompts for number in numbers]
        outputs = iter(self.answers(questions, settings))
        return [[next(outputs) for _ in numbers] for _ in prompts]

    def choose(self, prompts, begun, options):
        """Which of two words continues each of the texts `begun`?

        One output for each prompt: {"p": probability of the first, "prompt_tokens", "failed"}.
        """
        questions = [(prompt, text, 0) for prompt, text in zip(prompts, begun)]
        return self.answers(questions, {"kind": "choose", "options": options})

    def score(self, texts):
        """The scalar that the model gives to each text: {"score", "prompt_tokens", "failed"}."""
        return self.answers([(text, "", 0) for text in texts], {"kind": "score"})

    def answers(self, questions, settings):
        """An output for each question (prompt, begun, number): from the cache, else computed."""
        from filelock import FileLock, Timeout
        how = short_hash({**self.identity, **settings})
        keys = [f"{how} {short_hash(question)}" for question in questions]
        wanted = dict(zip(keys, questions))
        outputs = self.cached(wanted)
        if len(outputs) < len(wanted):
            lock = FileLock(self.args.shared / "answers.lock")
            try:
                held = lock.acquire(timeout=0)
            except Timeout:  # it may generate the same ones
                print("waiting for another process that uses this folder", flush=True)
                held = lock.acquire()
            with held:
                outputs = self.cached(wanted)
                outputs |= self.generated(wanted, outputs, settings)
        return [{"failed": "", **outputs[key]} for key in keys]

    def cached(self, keys):
        """{key: output} of those that are cached."""
        select = "SELECT output FROM answers WHERE key = ?"
        rows = {key: self.cache.execute(select, [key]).fetchone() for key in keys}
        return {key: json.loads(row[0]) for key, row in rows.items() if row}

    def generated(self, wanted, cached, settings):
        """{key: output} of the questions that are not cached; saved batch by batch."""
        from tqdm import tqdm
        missing = {key: question for key, question in wanted.items() if key not in cached}
        print(f"{self.label}: {len(cached):,} of {len(wanted):,} cached, generating "
              f"{len(missing):,}", flush=True)
        outputs = {}
        with tqdm(total=len(missing), desc=self.label, unit="answer", disable=None) as bar:
            for batch in self.compute(missing, settings) if missing else []:
                rows = [(key, json.dumps(output)) for key, output in batch.items()
                        if "failed" not in output]
                with self.cache:  # one transaction: a batch is saved completely or not at all
                    self.cache.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
                outputs |= batch
                bar.update(len(batch))
        return outputs


def folder_of(name):
    """The folder of a model, relative to the working directory or the kit; None for Hub ids."""
    for path in (Path(name), ROOT / name):
        if path.is_dir():
            return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"there is no model folder {name}")
    return None


def from_pretrained(kind, name, **settings):
    """A transformers class with this name, loaded from a folder or the Hub."""
    import transformers
    try:
        return getattr(transformers, kind).from_pretrained(
            folder_of(name) or name, trust_remote_code=False, **settings)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {name!r}: give another --model, --asker-model or "
                        f"--truster-model. {reason}") from None


def weights_id(name):
    """What identifies a model: its commit on the Hub, or a hash of its files."""
    folder = folder_of(str(name))
    if not folder:  # the Hub's cache has one folder for each commit
        from transformers.utils import cached_file
        from_pretrained("AutoConfig", name)
        return Path(cached_file(name, "config.json")).parent.name
    known = r".*\.(safetensors|jinja|model)|(generation_)?config\.json|tokenizer.*\.json"
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if re.fullmatch(known, p.name)):
        size = path.stat().st_size
        with path.open("rb") as file:  # 64 MB of a large one: 15 GB take minutes
            for place in range(0, size, max(size // 64, 2**20)):
                file.seek(place)
                digest.update(file.read(2**20))
    return digest.hexdigest()


@functools.cache
def load_tokenizer(name):
    """A tokenizer that has an end-of-text token and pads with it."""
    tokenizer = from_pretrained("AutoTokenizer", name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token: take another model")
    tokenizer.pad_token = tokenizer.eos_token  # masked
    return tokenizer


def token_ids(tokenizer, text, special=True):
    """The token ids of a text, without the end-of-text token that some tokenizers append."""
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def load_base(name, bits, scorer=False):
    """A frozen model in 4 bits (nf4, double quantisation: QLoRA, arXiv 2305.14314), 16 or 32 bits.

    A `scorer` has a new scalar head, in fp32 and never quantised.
    """
    print(f"loading {name} in {bits} bits ...", flush=True)
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gave NaN: pytorch issue 196678
    gc.collect()  # frees the last trained model: it refers to itself
    torch.cuda.empty_cache()
    cuda, half = torch.cuda.is_available(), torch.bfloat16
    if cuda and not torch.cuda.is_bf16_supported(including_emulation=False):  # a T4
        half = torch.float16
    dtype = half if bits == 16 or (bits == 4 and cuda) else torch.float32
    settings = {"dtype": dtype, "use_safetensors": True, "device_map": {"": 0} if cuda else None}
    if bits == 4:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
    kind = "AutoModelForCausalLM"
    if scorer:
        kind = "AutoModelForSequenceClassification"
        settings |= {"num_labels": 1, "pad_token_id": load_tokenizer(name).pad_token_id}
    model = from_pretrained(kind, name, **settings).eval()
    for layer in model.modules():
        # on some CPUs bitsandbytes uses bf16, with other results
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if not cuda and dtype == torch.float32:
        use_onednn(model.base_model)
    if scorer:
        if type(getattr(model, "score", None)) is not torch.nn.Linear:
            raise UserError(f"{name} has no head called `score`: take another --truster-model")
        model.score.float()
    return model


def use_onednn(model):
    """Let oneDNN do the large fp32 products of inference: on AMD CPUs 2.3 times as fast as MKL."""
    import torch

    class Linear(torch.nn.Linear):
        def forward(self, x):
            large = x.dtype == torch.float32 and x.numel() * self.out_features >= 2**22
            if not large or torch.is_grad_enabled():
                return super().forward(x)
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        for layer in model.modules():
            if type(layer) is torch.nn.Linear:
                layer.__class__ = Linear


def score_batch(model, ids, mask):
    """The scores (rows,) of token ids (rows, length) that are padded on the left."""
    import torch
    base = model.get_base_model()
    out = base.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask),
                          use_cache=False)
    with torch.autocast(ids.device.type, enabled=False):  # the head stays in fp32
        return base.score(out.last_hidden_state[:, -1].float())[:, 0]


def pad_left(sequences, pad, device="cpu"):
    """Token ids and mask, both (rows, length), padded on the left."""
    import torch
    width = max(map(len, sequences))
    ids = [[pad] * (width - len(ids)) + ids for ids in sequences]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask):
    """The position of each token in its row, without the padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Local(Model):
    """A model on this machine: the LLM, or a base with an adapter."""

    loaded = None  # the one model whose weights are in memory

    def __init__(self, args, name, bits, adapter=None, scorer=False):
        self.name, self.bits, self.adapter, self.scorer = name, bits, adapter, scorer
        self.tokenizer = load_tokenizer(name)
        engine = (Local, load_base, use_onednn, score_batch, pad_left, positions, token_ids, up_to,
                  without_thoughts)
        identity = {
            "weights": weights_id(name), "bits": bits, "adapter": adapter and weights_id(adapter),
            "code": code_hash(*map(inspect.getsource, engine))}
        super().__init__(args, identity, bool(self.tokenizer.chat_template) and not adapter)

    def load(self):
        """Load the weights; the model loaded before makes room."""
        if Local.loaded is self:
            return
        if Local.loaded:
            Local.loaded.model = Local.loaded.base = None
        Local.loaded = self
        self.model = self.base = load_base(self.name, self.bits, self.scorer)
        if self.adapter:
            import peft
            self.model = peft.PeftModel.from_pretrained(self.base, self.adapter).eval()

    def token_budget(self):
        """How many tokens a batch may have: --kv-gib, divided by the bytes of a cached token."""
        import torch
        ids = torch.full((1, 256), self.tokenizer.pad_token_id, device=self.base.device)
        cache = self.base(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        size = 0
        for layer in cache.layers:
            for value in vars(layer).values():
                parts = value.values() if isinstance(value, dict) else [value]
                size += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
        torch.cuda.empty_cache()  # what is unused counts as free
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 2**31
        share = free / (8 if self.adapter else 4)  # an adapter needs memory of its own
        return int(((self.args.kv_gib or 0) * 2**30 or share) / size * 256)

    def compute(self, missing, settings):
        """Yield {key: output}, batch by batch, the longest prompts first."""
        import torch
        self.load()
        work = {"generate": self.write, "choose": self.decide, "score": self.rate}
        new = settings.get("max_new_tokens", 0)
        rows = []
        for key, (prompt, begun, number) in missing.items():
            ids, start = self.tokens(prompt, begun)
            own = random.Random(f"{settings.get('seed')} {short_hash(prompt)} {number}")
            rows.append({"key": key, "prompt": ids, "start": start, "random": own})
        rows.sort(key=lambda row: -len(row["prompt"]))
        longest = len(rows[0]["prompt"]) + new
        limit = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest > limit:
            raise UserError(f"prompt and answer may have {longest} tokens, but {self.name} reads "
                            f"{limit}: lower --max-new-tokens")
        with torch.inference_mode():
            budget = self.token_budget() if new else 16_384  # reading needs little memory
        while rows:
            size = max(1, budget // (len(rows[0]["prompt"]) + new))
            batch, rows = rows[:size], rows[size:]
            with torch.inference_mode():
                outputs = work[settings["kind"]](batch, settings)
            for row, output in zip(batch, outputs):
                if any(value != value for value in output.values()):  # nan
                    raise UserError(f"{self.name} gave numbers that are not finite: give --bits 32 "
                                    "(the LLM), or train with --adapter-bits 32")
                output["prompt_tokens"] = len(row["prompt"])
            yield {row["key"]: output for row, output in zip(batch, outputs)}

    def tokens(self, prompt, begun):
        """(token ids, start): of the prompt and of how the answer has begun.

        Each is tokenized alone, as in training. `start` is "<think>" if the chat template
        begins the answer with it.
        """
        if self.chat:
            day = "26 Jul 2024"  # some templates show today's date
            template = "{%- macro strftime_now(format) -%}" + day + "{%- endmacro -%}"
            try:
                prompt = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False,
                    chat_template=template + self.tokenizer.get_chat_template(),
                    add_generation_prompt=True, enable_thinking=False, date_string=day)
            except Exception as error:  # templates are programs of their own
                raise UserError(f"the chat template of {self.name} failed: {error}") from None
        ids = token_ids(self.tokenizer, prompt, special=not self.chat)
        if begun:
            ids = ids + token_ids(self.tokenizer, begun, special=False)
        return ids, "<think>" if self.chat and prompt.rstrip().endswith("<think>") else ""

    def pad(self, rows):
        """The prompts of a batch as the inputs of a model."""
        ids, mask = pad_left([row["prompt"] for row in rows], self.tokenizer.pad_token_id,
                             self.base.device)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask),
                "logits_to_keep": ids.new_tensor([-1])}  # with 1, bf16 on a CPU copies the head

    def write(self, rows, settings):
        """Texts, token by token. A finished row leaves the batch."""
        import torch
        for row in rows:
            row |= {"ids": [], "finished": False, "logprob": 0.0}
        inputs, writing = self.pad(rows), rows
        mask = inputs["attention_mask"]
        out = self.model(**inputs, use_cache=True)
        for _ in range(settings["max_new_tokens"]):
            logits = out.logits[:, -1].float()
            tokens = self.pick(logits, writing, settings["temperature"])
            self.note(writing, tokens, logits, settings["stop"])
            going = [place for place, row in enumerate(writing) if not row["finished"]]
            if not going:
                break
            if len(going) < len(writing):
                writing = [writing[place] for place in going]
                going = torch.tensor(going, device=tokens.device)
                out.past_key_values.reorder_cache(going)
                tokens, mask = tokens[going], mask[going]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = self.model(input_ids=tokens[:, None], attention_mask=mask,
                             position_ids=positions(mask)[:, -1:], use_cache=True,
                             past_key_values=out.past_key_values)
        return [{"text": up_to(settings["stop"], self.text(row)), "finished": row["finished"],
                 "tokens": len(row["ids"]), "logprob": row["logprob"]} for row in rows]

    def pick(self, logits, rows, temperature):
        """The next token of each row: the most probable one, or drawn with the row's numbers."""
        import torch
        if not temperature:
            return logits.argmax(-1)
        cdf = (logits / temperature).double().softmax(-1).cumsum(-1)
        drawn = torch.tensor([[row["random"].random()] for row in rows], dtype=cdf.dtype)
        tokens = torch.searchsorted(cdf, drawn.to(cdf.device) * cdf[:, -1:], right=True)
        return tokens[:, 0].clamp(max=cdf.shape[1] - 1)

    def note(self, rows, tokens, logits, stop):
        """Append the new tokens to their rows, and see which are finished."""
        ends = self.base.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs):
            row["ids"].append(token)
            row["logprob"] += logprob
            row["finished"] = token in ends
        if stop:
            tails = self.tokenizer.decode([row["ids"][-32:] for row in rows],
                                          skip_special_tokens=True)
            for row, tail in zip(rows, tails):  # the whole text is read only where it may match
                if tail.endswith("\n") or re.search(stop, tail):
                    row["finished"] |= bool(re.search(stop, self.text(row)))

    def text(self, row):
        """What a row has written so far, without thoughts."""
        text = self.tokenizer.decode(row["ids"], skip_special_tokens=True)
        return without_thoughts(row["start"] + text)

    def decide(self, rows, settings):
        """The probability of the first of two words, from the model's own logits."""
        before, first, second = (token_ids(self.tokenizer, DECISION + word, special=False)
                                 for word in ("", *settings["options"]))
        if not first[:-1] == second[:-1] == before or first == second:
            raise UserError(f"the tokenizer of {self.name} does not give Yes and No after "
                            f"{DECISION} one token each: take another model")
        out = self.model(**self.pad(rows), use_cache=False)
        logits = out.logits[:, -1, [first[-1], second[-1]]].double()
        return [{"p": p} for p in logits.softmax(-1)[:, 0].tolist()]

    def rate(self, rows, settings):
        """The score of each text."""
        ids, mask, *_ = self.pad(rows).values()
        return [{"score": score} for score in score_batch(self.model, ids, mask).tolist()]


class Refused(Exception):
    """The server refused these settings."""


class Server(Model):
    """A chat model behind a server with OpenAI's API.

    openai's client repeats a request after a lost connection, 429 and 5xx. A setting that the
    server refuses is left out from then on, also of the key. A reply that cannot be used has
    failed: it is incorrect and not cached, and the run goes on.
    """

    complete = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"}

    def __init__(self, args):
        import openai
        super().__init__(args, {"server": args.base_url, "model": args.model}, chat=True)
        self.failures, self.told = 0, False
        self.api_key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        self.client = openai.OpenAI(
            base_url=args.base_url, api_key=self.api_key, max_retries=5, timeout=300)
        self.path, self.name = args.shared / "servers.json", f"{args.base_url} {args.model}"
        self.refused = read_json(self.path).get(self.name, [])

    def answers(self, questions, settings):
        """As in Model. The key holds what is sent: the settings that the server accepts."""
        settings = {"max_new_tokens": self.args.max_new_tokens, "temperature": 0.0, **settings}
        limit = settings.pop("max_new_tokens")  # a decision may think as long as an answer
        send = {"logprobs": True, "top_logprobs": 5, "max_completion_tokens": limit}
        for name in settings.keys() & {"temperature", "seed"}:
            send[name] = settings.pop(name)
        while True:
            accepted = {name: send[name] for name in send if name not in self.refused}
            if "max_completion_tokens" not in accepted:
                accepted["max_tokens"] = limit
            try:
                return super().answers(questions, {**settings, "send": accepted})
            except Refused as refused:
                names = ", ".join(refused.args)
                print(f"the server refuses {names}: left out from now on", flush=True)
                self.refused = [*self.refused, *refused.args]
                write(self.path, {**read_json(self.path), self.name: self.refused})

    def compute(self, missing, settings):
        """Yield {key: output}, one by one."""
        pool = ThreadPoolExecutor(self.args.concurrency)
        try:
            jobs = {pool.submit(self.attempt, question, settings): key
                    for key, question in missing.items()}
            for job in as_completed(jobs):
                output = job.result()
                self.failures = self.failures + 1 if "failed" in output else 0
                if self.failures == 20:
                    raise UserError(f"20 replies in a row failed, the last one: {output['failed']}."
                                    " Check --base-url (most end in /v1) and --model")
                silent = output.get("logprob", 0) is None and "failed" not in output
                if silent and "logprobs" in settings["send"] and not self.told:
                    print("the server gives no log-probabilities", flush=True)
                    self.told = True
                yield {jobs[job]: output}
        finally:  # after an error or Ctrl-C no new request is sent
            pool.shutdown(wait=False, cancel_futures=True)

    def attempt(self, question, settings):
        """The output for one question, or one that has "failed"."""
        import openai as errors
        work = self.write if settings["kind"] == "generate" else self.decide
        try:
            return work(*question, settings)
        except (errors.OpenAIError, ValueError, TypeError, AttributeError) as error:  # unusable
            text = f"{error} {getattr(error, 'body', None) or ''}"
            text = " ".join(text.split()).replace(self.api_key, "...")[:300]
            hopeless = (errors.AuthenticationError, errors.NotFoundError, errors.APIConnectionError)
            if isinstance(error, hopeless) and not isinstance(error, errors.APITimeoutError):
                raise UserError(f"the server failed: {text} Check --base-url (most end in /v1), "
                                "--model and OPENAI_API_KEY") from None
            too_long = re.search("context|too large", text)
            if getattr(error, "status_code", 0) in (400, 403, 422) and not too_long:
                for names in (["top_logprobs"], ["logprobs", "top_logprobs"], ["temperature"],
                              ["seed"], ["max_completion_tokens"]):
                    if names[0] in settings["send"] and names[0] in text:
                        raise Refused(*names) from None
            return {"failed": text, "text": "", "finished": False, "tokens": 0,
                    "prompt_tokens": 0, "logprob": None, "p": math.nan}

    def request(self, turns, send):
        """(text without thoughts, is it complete, its tokens' log-probabilities, usage)."""
        reply = self.client.chat.completions.create(
            model=self.args.model, **send,
            messages=[{"role": role, "content": text} for role, text in turns])
        [choice, *_] = getattr(reply, "choices", None) or [None]
        text = choice and choice.message and choice.message.content or ""
        if isinstance(text, list):  # some servers send parts
            text = "".join(part.get("text") or "" for part in text
                           if part.get("type", "text") == "text")
        text = text.encode("utf-8", "replace").decode()  # no half characters
        text = without_thoughts(text).strip()
        reason = str(choice and choice.finish_reason).lower()
        if not text or reason in ("error", "abort", "content_filter"):
            raise ValueError(f"no usable text (finish_reason {reason}) in {reply}")
        tokens = getattr(choice.logprobs, "content", None) or []
        tokens = [token for token in tokens if token.logprob is not None]
        usage = {"tokens": getattr(reply.usage, "completion_tokens", None) or len(tokens),
                 "prompt_tokens": getattr(reply.usage, "prompt_tokens", None) or 0}
        return text, reason in self.complete, tokens, usage

    def write(self, prompt, begun, number, settings):
        """One text."""
        send, stop = settings["send"], settings["stop"]
        if "seed" in send:  # one for each sample: equal seeds would give equal texts
            seed = int(short_hash([send["seed"], prompt, number])[:7], 16)
            send = {**send, "seed": seed}
        text, complete, tokens, usage = self.request([("user", prompt)], send)
        return {**usage, "text": up_to(stop, text),
                "finished": complete or bool(stop and re.search(stop, text)),
                "logprob": sum(token.logprob for token in tokens) if tokens else None}

    def decide(self, prompt, begun, number, settings):
        """The probability of the first of two words: from log-probabilities, else 1 or 0."""
        first, second = words = [option.strip() for option in settings["options"]]
        asked = begun.removesuffix(DECISION).strip() or "-"  # a server does not continue a turn
        turns = [("user", prompt), ("assistant", asked),
                 ("user", f"{DECISION} {first} or {second}? Answer with this one word.")]
        text, _, tokens, usage = self.request(turns, settings["send"])
        word = read_decision(text, words)
        if not word:
            raise ValueError(f"neither {first} nor {second} in {text!r}")
        p = float(word == first)
        said = [token for token in tokens if read_decision(token.token, words) == word]
        if re.match(rf"\W*{word}\b", text, re.I):  # with an explanation
            said = said[-len(re.findall(rf"\b{word}\b", text, re.I)):][:1]
        for token in said[-1:]:
            mass = dict.fromkeys([*words, None], 0.0)
            for other in token.top_logprobs or []:
                mass[read_decision(other.token, words)] += (
                    math.nan if other.logprob is None else math.exp(other.logprob))
            if mass[first] + mass[second] > 0:
                p = mass[first] / (mass[first] + mass[second])
        return {"p": p, "prompt_tokens": usage["prompt_tokens"]}


def read_decision(text, words):
    """The word that is the text, begins it, or ends it after a colon.

    >>> read_decision("**Refine: YES**", ["Yes", "No"]), read_decision("Not sure.", ["Yes", "No"])
    ('Yes', None)
    """
    for word in words:
        begins = rf"[\W_]*(refine\W+)?{word}\s*([^\w\s]|\n)"
        if re.match(rf"(?s:(.*:)?[\W_]*{word}[\W_]*$)|{begins}", text, re.I):
            return word
    return None


def adapter_folder(args, name):
    """The folder of an adapter: "asker", "finetuned" or "truster"."""
    source = "truster_from" if name == "truster" else "asker_from"
    return args.shared / (getattr(args, source, None) or args.run) / name


def how_to_train(args, name):
    """The command that trains an adapter; "" if it is trained."""
    folder = adapter_folder(args, name)
    if read_json(folder / "args.json").get("finished"):
        return ""
    script = "train_truster.py" if name == "truster" else "train_asker.py"
    return f"python {script} --task {args.task} --run {folder.parent.name}"


def open_model(args, name):
    """The LLM ("llm"), or a base with the adapter of this name."""
    if name == "llm":
        return Server(args) if args.base_url else Local(args, args.model, args.bits or 4)
    folder = adapter_folder(args, name)
    if command := how_to_train(args, name):
        raise UserError(f"no trained adapter in {folder}: run {command}")
    about = read_json(folder / "args.json")
    model = Local(args, about["model"], about["bits"], folder, scorer=name == "truster")
    if model.identity["weights"] != about["weights"]:
        raise UserError(f"{model.name} has changed: train {folder} again, with --overwrite")
    model.strategy, model.prior_odds = about.get("strategy"), about.get("prior_odds", 1.0)
    return model


# ===== Part 5. QLoRA: a small adapter is trained beside a frozen model =====


def add_lora(model, task_type, rank, start=None):
    """LoRA on all linear layers of a frozen model; `start` is an adapter to continue from.

    What is trained (the adapter, the Truster's head) is in fp32.
    """
    import peft
    import torch
    if torch.cuda.is_available():  # saves memory
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if start:
        model = peft.PeftModel.from_pretrained(model, start, is_trainable=True)
    else:
        config = peft.LoraConfig(task_type=task_type, r=rank, lora_alpha=2 * rank,
                                 target_modules="all-linear")
        try:
            model = peft.get_peft_model(model, config)
        except ValueError as error:  # Mamba layers
            raise UserError(f"PEFT cannot train this model: {error}") from None
    for weight in model.parameters():
        norm = weight.ndim == 1 and weight.dtype == torch.float16  # may overflow in fp16
        if weight.requires_grad or norm:
            weight.data = weight.data.float()
    return model


def fine_tune(model, examples, collate, loss, args, folder, batch, at_once, epochs):
    """Train the adapter of `model` and save it in `folder`. Returns {"steps", "curve", ...}.

    `collate(examples)` makes the inputs; `loss(model, inputs)` returns {name: sum over the
    examples}. A step takes `batch` examples, `at_once` of them in memory. It resumes from a
    checkpoint, which is written every --save-steps steps.
    """
    import torch
    device, dtype = model.device, model.get_input_embeddings().weight.dtype
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps_a_pass = math.ceil(len(examples) / batch)
    steps = math.ceil(epochs * steps_a_pass)

    path = folder / "checkpoint.pt"
    saved = {"step": 0, "curve": [], "seconds": 0, "sums": {}, "seen": 0}
    if path.is_file():
        saved = torch.load(path, map_location=device, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"] or scaler.state_dict())
        model.load_state_dict(saved["weights"], strict=False)
        print(f"resuming at step {saved['step']} of {steps}")
    tracker = args.report_to and importlib.import_module(args.report_to)
    if tracker:
        tracker.init(project="art", name=f"{args.task} {args.run} {folder.name}")

    model.train()
    curve, began = saved["curve"], time.time() - saved["seconds"]
    sums, seen = collections.Counter(saved["sums"]), saved["seen"]  # since the last print
    for step in range(saved["step"], steps):
        done = step + 1
        number, place = divmod(step, steps_a_pass)
        order = random.Random(f"{args.seed} {number}").sample(examples, len(examples))
        chosen = order[place * batch: (place + 1) * batch]
        chosen.sort(key=lambda example: len(example["input_ids"]))  # less padding
        for start in range(0, len(chosen), at_once):
            inputs = collate(chosen[start: start + at_once])
            inputs = {name: value.to(device) for name, value in inputs.items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                parts = loss(model, inputs)
            scaler.scale(sum(parts.values()) / len(chosen)).backward()
            sums.update({name: part.item() for name, part in parts.items()})
        seen += len(chosen)
        if not all(map(math.isfinite, sums.values())) or scaler.get_scale() < 1e-3:
            raise UserError(f"the loss is not finite at step {done}: lower --lr, or give "
                            "--adapter-bits 32")

        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        warm_up = done / (0.05 * steps)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(warm_up, cosine)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if done % 10 == 0 or done == steps:
            means = {name: round(value / seen, 4) for name, value in sums.items() if value}
            curve.append({"step": done, **means})
            print("  ".join(f"{key} {value:.4g}" for key, value in curve[-1].items()), flush=True)
            if tracker:
                tracker.log(means, step=done)
            sums, seen = collections.Counter(), 0
        if done % args.save_steps == 0 or done == steps:
            state = {"step": done, "curve": curve, "seconds": time.time() - began,
                     "sums": dict(sums), "seen": seen, "weights": weights,
                     "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            torch.save(state, f"{path}.part")
            Path(f"{path}.part").replace(path)
    if tracker:
        tracker.finish()
    model.save_pretrained(folder)
    return {"steps": steps, "trained_on": len(examples), "seconds": round(time.time() - began),
            "curve": curve}


def train_adapter(args, name, records, examples, script, collate, loss, epochs, start=None,
                  **settings):
    """Train the adapter "finetuned", "asker" or "truster", unless it is finished.

    args.json holds the settings (a training with others is refused), versions and figures.
    """
    import torch
    role = "truster" if name == "truster" else "asker"
    base, batch, at_once = (getattr(args, f"{role}_{key}") for key in ("model", "batch", "at_once"))
    args.adapter_bits = args.adapter_bits or (4 if torch.cuda.is_available() else 32)
    folder, start = args.folder / name, start and args.folder / start
    now = {**settings, "weights": weights_id(base), "bits": args.adapter_bits, "seed": args.seed,
           "lr": args.lr, "rank": args.rank, "max_length": args.max_length, "batch": batch,
           "epochs": epochs, "start": start and weights_id(start), "examples": short_hash(examples),
           "code": code_hash(Path(script).read_text("utf-8").partition("\ndef main")[0])}
    short = [example for example in examples if len(example["input_ids"]) <= args.max_length]
    print(f"{len(short):,} of {len(examples):,} examples have at most {args.max_length} tokens")
    if not short:
        raise UserError("no example is short enough: raise --max-length")
    if args.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
        if name == "finetuned":  # the Asker continues from it
            shutil.rmtree(args.folder / "asker", ignore_errors=True)
    about = read_json(folder / "args.json")
    for key, value in now.items():
        if about and about.get(key) != value:
            raise UserError(f"{folder} was trained with other settings: {key} was "
                            f"{about.get(key)}, is now {value}. Give --run NEW, or --overwrite")
    if about.get("finished"):
        print(f"{folder} is trained already")
        return
    write(folder / "questions.txt", "\n".join(map(question_hash, records)))
    write(folder / "args.json", about := {**now, "model": base, **provenance(), "finished": False})
    torch.manual_seed(args.seed)  # first weights of head and adapter
    model = load_base(base, args.adapter_bits, scorer=role == "truster")
    model = add_lora(model, "SEQ_CLS" if role == "truster" else "CAUSAL_LM", args.rank, start)
    collate = functools.partial(collate, load_tokenizer(base).pad_token_id)
    figures = fine_tune(model, short, collate, loss, args, folder, batch, at_once, epochs)
    write(folder / "args.json", {**about, **figures, "finished": True})


def add_figure(args, name, key, measure):
    """Add a figure on dev, `measure(args)`, to the adapter's args.json, once."""
    path = args.folder / name / "args.json"
    about = read_json(path)
    if key not in about:
        about[key] = measure(args)
        write(path, about)
    figure = "none, all are of one kind" if about[key] is None else f"{about[key]:.3f}"
    print(f"AUC on dev (1 is perfect, 0.5 guessing): {figure}")


def main():
    parser = make_parser(__doc__, "solve")
    parser.add_argument("question", nargs="?", help="the question, in quotes")
    parser.add_argument("--random", action="store_true", help="take one of the test questions")
    args = parse(parser)
    record = {"question": " ".join((args.question or "").split())}
    if args.random:
        record = random.choice(load_split(args, "test"))
    elif not record["question"]:
        raise UserError("give a question in quotes, or --random")
    elif args.preset == "toy":
        print("note: the toy's models read only the toy's questions (--random)")

    rows = read_json(args.folder / "results.json").get("rows", [])  # set on dev
    threshold = next((row["threshold"] for row in rows if row["row"] == "art"), 0.5)
    models = [open_model(args, name) for name in ("llm", "asker", "truster")]
    result = ask_refine_trust(*models, args, record, threshold)
    asked, refined = result["asked"], result.get("refined")
    decision = "refine" if refined else "keep the draft"
    show({"question": record["question"], "draft": result["draft"]["text"],
          "sub-questions": "\n".join(asked["subquestions"]),
          "decision": f"p_refine = {asked['p_refine']:.3f}, threshold {threshold:.3f}: {decision}"})
    if refined:
        scores = "draft {:.2f}, refined {:.2f}".format(*result["scores"])
        show({"refined": refined["text"], "Truster": scores})
    final = result["final"]
    why = final["failed"] or "cut off, or unreadable"
    show({"answer": final["answer"] if is_readable(final) else f"none: {why}"})
    if args.random:
        show({"gold": record["answer"]})


if __name__ == "__main__":
    run(main)
