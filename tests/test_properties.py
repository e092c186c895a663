"""Random and mutated input for everything that reads what a model, a person or a killed run wrote.

A hundred inputs a test; 10,000 with: python -m pytest tests/test_properties.py --hypothesis-profile=thorough
"""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import art

PIECES = ["#### ", "####", "\\boxed{", "\\text{", "}", "\\frac{1}{2}", "{,}", "$", "€", "-", "−", "1,000", "18", "0",
          ".", ".5", ",", "/", " / ", "3 1/2", "1/0", "^", "^{2}", "=", " = ", "(", ")", "%", "**", "\n", "\r",
          "\u2028", "\x00", "\x1b[2J", " ", "\t", "the answer is ", "Answer: ", "yes", "No", "true", "no one", "doubt",
          "Refine:", "- ", "1. ", "12) ", "Step 1: ", "How many?", "٣", "²", "é", "9" * 30, "9" * 5000, "a" * 50]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.characters(), st.text(max_size=5)), max_size=40).map("".join)
CANONICAL = {"number": r"-?[0-9]+(\.[0-9]*[1-9])?|-?[0-9]+/[0-9]+", "yes/no": "yes|no"}


@pytest.mark.parametrize("task", ["gsm8k", "strategyqa"])
@given(text=TEXTS)
def test_any_text_has_an_answer_in_canonical_form_or_none(task, text):
    answer = art.extract_answer(task, text)
    assert answer is None or re.fullmatch(CANONICAL[art.TASKS[task]["answer"]], answer)
    assert answer is None or art.extract_answer(task, f"#### {answer}") == answer


@given(sign=st.sampled_from(["", "-"]), number=st.integers(0, 10**12), decimals=st.integers(0, 999))
def test_gold_answers_are_read_back(sign, number, decimals):
    """However a gold number is written, a solution that ends in it is right, and one that is off by one is wrong."""
    for gold in (f"{sign}{number}", f"{sign}{number:,}", f"{sign}{number:,}.{decimals:03}", f"{sign}{number}/7"):
        assert re.fullmatch(art.GOLD["number"], gold)
        assert art.is_correct("gsm8k", art.solution_text([["", "1 + 1 = 2"]], gold), gold)
        assert not art.is_correct("gsm8k", f"#### {number + 1}", gold)


@given(text=TEXTS)
def test_any_text_gives_at_most_twelve_plain_subquestions(text):
    asked = art.parse_subquestions(text)
    assert len(asked) <= 12 and not any(art.DECISION in line for line in asked)
    assert all(line and line == line.strip() and line in text and len(line.splitlines()) == 1 for line in asked)
    assert art.parse_end_to_end(text) in text


VALUES = st.none() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=1)
ROWS = st.lists(st.dictionaries(st.sampled_from(["settings", "are", "prompt", "number", "call", "text"]), VALUES,
                                min_size=1), max_size=6)


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("properties") / "said.jsonl"


@given(rows=ROWS, place=st.integers(0, 300), junk=st.binary(max_size=8), cut=st.integers(0, 600))
def test_any_file_can_be_read(path, rows, place, junk, cut):
    """Any objects, any bytes anywhere, cut anywhere: what a model said is read without an error, and read again."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes((content[:place] + junk + content[place + len(junk):])[:cut])
    assert art.Cache(path).outputs == art.Cache(path).outputs
    try:
        assert all(isinstance(record, dict) for record in art.read_jsonl(path, ""))
    except art.UserError as error:
        assert re.fullmatch(re.escape(str(path)) + r", line \d+: not a JSON object; .*", str(error))
