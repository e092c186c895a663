"""Reading answers: one table of strings for each kind, and the promise that no string raises or takes long."""

import re
import time

import pytest

import art

NUMBERS = [
    # the answer line
    ("#### 18", "18"), ("####18", "18"), ("####    18   ", "18"), ("9 * 2 = 18\n#### 18", "18"),
    ("So it is 9 * 2 = #### 18", "18"), ("#### 18\n\nQuestion: Tom has 3 apples.\nAnswer:\n#### 5", "18"),
    ("#### 18\nThe answer is 7. \\boxed{6}", "18"), ("The answer is 7. \\boxed{6}\n#### 18", "18"),
    ("#### $1,000.50", "1000.5"), ("#### **18**", "18"), ("**#### 18**", "18"), ("#### \\boxed{18}", "18"),
    ("#### $\\boxed{18}$", "18"), ("#### \\(18\\)", "18"), ("#### \\text{18 dollars}", "18"), ("#### -5", "-5"),
    ("#### 5 (see step 2)", "5"), ("#### 18 (9 * 2 = 18, with 3 left)", "18"), ("#### 9 * 2 = $18", "18"),
    ("#### (9 - 3) * 2 = 12", "12"), ("#### 10-20", "10"), ("#### 18 dollars for 2 days", "18"),
    ("#### Step 1: add\n2 + 3 = 5\n#### 7", "7"), ("#### Step 1: add 2 and 3\nIt is 5.", "5"),
    ("#### 1. Find the eggs\nShe has 9.\n#### 2. Sell them\nShe gets 18.", "18"),
    ("#### 2) **Sum**\n4 + 5 = 9\n#### 9", "9"), ("#### Answer: 18\nThat took 2 steps.", "18"),
    ("####\nI count 18", "18"), ("#### 5.", "5"), ("#### 5. \nDone in 2 steps", "5"),
    # boxed, then the phrase, then the last number
    ("\\boxed{3}, no: \\boxed{18} in 2 steps", "18"), ("\\boxed{18} so the answer is 7", "18"),
    ("\\boxed{\\$1{,}800.00} and 3", "1800"), ("\\boxed{\\text{18 eggs}} from 3", "18"),
    ("\\boxed{} The answer is 7 of 9", "7"), ("\\boxed{x = 18}", "18"), ("The answer is 18. It took 2 steps.", "18"),
    ("The answer is 3. Wait, the answer is 18, as 2 more.", "18"), ("**Answer:** 18 (in 2 steps)", "18"),
    ("Final answer: $18 for 3", "18"), ("ANSWER = 18 by step 4", "18"), ("the answer is **$18** for 3", "18"),
    ("the answer is \\(18\\), 3 each", "18"), ("The answer is 9 * 2 = 18 in 3 days", "18"),
    ("The answer to the question is 18, 3 each", "18"), ("The answer is not clear, but 9 and 18", "18"),
    ("She makes 9 * 2 = $18", "18"), ("9 * 2 = <<9*2=18>>18 dollars.", "18"), ("From 3 to 18 apples", "18"),
    # forms of a number
    ("8,000", "8000"), ("1,234,567", "1234567"), ("9{,}500", "9500"), ("9\\,500", "9500"), ("9,\\!500", "9500"),
    ("1,000.50", "1000.5"), (".50", "0.5"), ("0.125", "0.125"), ("18.00", "18"), ("007", "7"), ("-0", "0"),
    ("100", "100"), ("It is 5.", "5"), ("It is 18...", "18"), ("7, ok ..", "7"), ("2, 3", "3"), ("x = -5", "-5"),
    ("(-5)", "-5"), ("\u22125 degrees", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("-\\$5", "-5"), ("-1,000.5", "-1000.5"),
    ("\u20ac18", "18"), ("18\u20ac", "18"), ("\u00a318.20", "18.2"), ("$ 18", "18"), ("50%", "50"), ("50\\%", "50"),
    ("18kg", "18"), ("50 m^2", "50"), ("50 \\text{ cm}^{2}", "50"), ("1/2", "0.5"), ("1 / 2", "0.5"),
    ("-1/2", "-0.5"), ("1/3", "1/3"), ("2/6", "1/3"), ("-2/6", "-1/3"), ("6/3", "2"), ("\\frac{1}{2}", "0.5"),
    ("-\\dfrac{1}{3}", "-1/3"), ("\\boxed{\\frac{1}{2}}", "0.5"), ("#### \\frac{7}{2}", "3.5"), ("3 1/2", "3.5"),
    ("-3 1/2", "-3.5"), ("3\\frac{1}{2}", "3.5"), ("3 1/x", "1"),
    # a hyphen that is no minus
    ("10-20", "20"), ("10\u201320", "20"), ("step-3", "3"), ("16-3", "3"), ("16 -3", "3"), ("16 - 3", "3"),
    ("$16-$3", "3"), ("5%-10%", "10"), ("(2+1)-3", "3"), ("5\u20ac-10\u20ac", "10"), ("---5", "5"),
    # nothing to read
    ("", None), (" \n\t", None), ("I do not know", None), ("None", None), ("####", None), ("#### unknown", None),
    ("eighteen", None), ("$ - . , / %", None), ("1/0", None), ("#### 5/0.00", None), ("\\frac{1}{0}", None),
    ("9" * 5000, None), ("#### " + "9" * 4301, None), ("1/" + "9" * 4301, None), ("\u00b2 \u0663", None),
]

YES_NO = [
    ("#### yes", "yes"), ("#### No", "no"), ("#### NO.", "no"), ("#### **yes**", "yes"),
    ("#### \\boxed{\\text{yes}}", "yes"), ("#### true", "yes"), ("#### False", "no"),
    ("#### yes, because the answer is no", "yes"), ("#### yes\n\nQuestion: Is it?\n#### no", "yes"),
    ("No. But then\n#### yes", "yes"), ("#### Yesterday\n#### no", "no"), ("#### No one knows", None),
    ("#### no idea", None), ("The answer is: no idea.", None), ("#### No information is available", None),
    ("The answer is no way to know", None), ("\\boxed{no clear answer}", None), ("#### yes and no", None),
    ("#### no and that is all", "no"), ("#### yes/no", None), ("#### yes or no", None), ("#### 18", None),
    ("#### Step 1: yes", None), ("So the answer is yes.", "yes"), ("the answer is no", "no"),
    ("The answer is **No**.", "no"), ('The answer is "yes".', "yes"), ("The answer is \u201cno\u201d.", "no"),
    ("**Answer:** True", "yes"), ("Answer:\nYes", "yes"), ("The answer to this question is no because 3 > 2", "no"),
    ("the answer is yes. No, the answer is no.", "no"), ("The answer is \\(\\text{no}\\)", "no"),
    ("so \\boxed{Yes}", "yes"), ("Yes, but the answer is no", "no"), ("The answer is not yes", None),
    ("The answer is no longer clear", None), ("The answer is nobody", None), ("Yes", "yes"), ("  no  ", "no"),
    ("Yes, ice is cold.", "yes"), ("No.", "no"), ("no\nIce is cold.", "no"), ("**No**, ice is cold.", "no"),
    ("No - ice is cold.", "no"), ("False.", "no"), ("True!", "yes"), ("No one knows", None), ("No-one knows", None),
    ("Nobody knows.", None), ("Nothing.", None), ("yesterday, it was", None), ("I do not know", None),
    ("Not sure. Maybe yes, maybe no.", None), ("Ice is cold, no?", None), ("", None), ("None", None), ("18", None),
]


def readable(text):
    text = str(text)
    return (text if len(text) <= 60 else text[:20] + "(long)").replace("\n", "\u23ce") or "(empty)"


@pytest.mark.parametrize(("text", "answer"), NUMBERS, ids=readable)
def test_number(text, answer):
    assert art.extract_answer("gsm8k", text) == answer


@pytest.mark.parametrize(("text", "answer"), YES_NO, ids=readable)
def test_yes_no(text, answer):
    assert art.extract_answer("strategyqa", text) == answer


def test_fraction_that_is_too_long_to_read_again():
    assert art.extract_answer("gsm8k", "." + "9" * 60) is None and art.extract_answer("toy", "9" * 97 + "/8") is None
    assert art.extract_answer("gsm8k", "." + "9" * 30) == "9" * 30 + "/1" + "0" * 30


@pytest.mark.parametrize("answer", sorted({answer for _, answer in NUMBERS if answer}))
def test_canonical_form_reads_as_itself(answer):
    assert art.extract_answer("gsm8k", f"#### {answer}") == answer


@pytest.mark.parametrize(("task", "text", "gold", "correct"), [
    ("gsm8k", "#### 18.0", "18", True), ("gsm8k", "#### 1000", "1,000", True), ("gsm8k", "#### 1/2", "0.5", True),
    ("gsm8k", "#### -5", "-5", True), ("gsm8k", "#### 5", "-5", False), ("gsm8k", "#### 81", "18", False),
    ("gsm8k", "#### 0.33", "1/3", False), ("gsm8k", "I do not know", "18", False), ("gsm8k", "", "", False),
    ("gsm8k", "unknown", "unknown", False), ("toy", "The answer is 18.", "18", True),
    ("strategyqa", "#### Yes", "yes", True), ("strategyqa", "#### true", "yes", True),
    ("strategyqa", "#### no", "yes", False), ("strategyqa", "I do not know", "no", False),
])
def test_is_correct(task, text, gold, correct):
    assert art.is_correct(task, text, gold) is correct


def test_what_was_cut_off_is_wrong():
    """Its last number may be the gold one by chance."""
    made = {"text": "Ann has 7 + 5 = 12", "stopped": False}
    assert art.is_correct("toy", made["text"], "12") and not art.verdict("toy", made, "12")
    assert art.verdict("toy", {**made, "stopped": True}, "12")


@pytest.mark.parametrize(("kind", "text", "stops"), [
    ("number", "9 * 2 = 18\n#### 18\n", True), ("number", "#### **$1,000.50** a day\nQuestion:", True),
    ("number", "#### 18", False),  # more digits may come
    ("number", "#### Step 1: add 2\n", False), ("number", "#### 1. Find the eggs\n", False),
    ("number", "####\n18\n", False), ("yes/no", "#### yes\n", True), ("yes/no", "#### yes", False),
    ("yes/no", "#### Yesterday\n", False),
])
def test_answer_line_as_a_stop(kind, text, stops):
    assert bool(re.search(art.ANSWER_LINE[kind] + r"[^\n]*\n", text)) is stops


JUNK = ["7", "#", "#### ", "1,234", ",5", "5,", " ", "\n", "1/", "1 ", "1 1/", ".", "1.", "- ", "-", "$", "$-", "^"]
JUNK += ["^{", "answer", "answer is ", "answer     ", "answer is 1 ", "answer is no one ", "yes ", "no", "(", "="]
JUNK += ["{,}", "\\"]
JUNK += ["####1. a", "#### no one ", "####\\abcdefghi", "####\\a \\b \\c \\d ", "#### \\$-"]
JUNK += ["#### 1", "####" + " " * 10, "####" + " " * 30, "\\boxed{", "\\boxed{1", "\\frac{", "\\frac{1}{"]


@pytest.mark.parametrize("task", ["gsm8k", "strategyqa"])
@pytest.mark.parametrize(("before", "after"), [("", ""), ("yes", ""), ("", "\n#### 1x")])
def test_linear_time_on_junk(task, before, after):
    """Ten times the text takes ten times the CPU time (100 if quadratic): 30 are granted, and 20 ms."""
    def seconds(text):
        start = time.thread_time()
        art.extract_answer(task, text)
        return time.thread_time() - start

    for junk in JUNK:
        texts = [before + (junk * (size // len(junk) + 1))[:size] + after for size in (10_000, 100_000, 1_000_000)]
        short, middle, long = (min(seconds(text) for _ in range(3)) for text in texts)
        assert middle < 30 * short + 0.02 and long < 30 * middle + 0.02, junk
