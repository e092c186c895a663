"""Random and mutated input for everything that reads what a model, a person or a killed run wrote.

A few hundred inputs a test; 10,000 with: python -m pytest tests/test_properties.py --hypothesis-profile=thorough
"""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import art

PIECES = ["#### ", "####", "\\boxed{", "\\text{", "}", "\\frac{1}{2}", "{,}", "$", "€", "-", "−", "1,000", "18", "0",
          ".", ".5", ",", "/", " / ", "3 1/2", "1/0", "^", "^{2}", "=", " = ", "(", ")", "%", "**", "\n", "\r",
          "\u2028", "\x00", "\x1b[2J", " ", "\t", "the answer is ", "Answer: ", "yes", "No", "true", "no one", "doubt",
          "Refine:", "- ", "1. ", "12) ", "Step 1: ", "How many?", "٣", "²", "é", "9" * 30, "9" * 5000, "a" * 50]
MUTATED = st.lists(st.one_of(st.sampled_from(PIECES), st.characters(), st.text(max_size=5)), max_size=40).map("".join)
TEXTS = st.one_of(MUTATED, st.text())
ANSWER = {"number": r"-?[0-9]+(\.[0-9]*[1-9])?|-?[0-9]+/[0-9]+", "yes/no": "yes|no"}


@pytest.mark.parametrize("task", art.TASKS)
@given(text=TEXTS)
def test_any_text_has_an_answer_in_canonical_form_or_none(task, text):
    answer = art.extract_answer(task, text)
    assert answer is None or re.fullmatch(ANSWER[art.TASKS[task]["answer"]], answer)
    assert answer is None or art.extract_answer(task, f"#### {answer}") == answer


@given(text=TEXTS)
def test_any_text_gives_at_most_twelve_plain_subquestions(text):
    asked = art.parse_subquestions(text)
    assert len(asked) <= 12
    assert all(line and line == line.strip() and line in text and len(line.splitlines()) == 1 for line in asked)
    assert not any(art.DECISION in line for line in asked)


@given(text=TEXTS)
def test_what_is_shown_has_no_control_characters(text):
    shown = art.visible(text)
    assert all(c == "\n" or c.isprintable() for c in shown) and shown.count("\n") == text.count("\n")


VALUES = st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.text(), max_size=2)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["id", "question", "answer"]), VALUES), max_size=4)


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("properties") / "records.jsonl"


@given(records=RECORDS, cut=st.integers(0, 10_000))
def test_a_journal_keeps_every_whole_line(path, records, cut):
    """Whatever is written is read back; cut anywhere, a journal keeps the lines before the cut."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(content)
    assert art.read_jsonl(path) == records
    path.write_bytes(content[:cut])
    assert art.read_jsonl(path, journal=True) == records[: content[:cut].count(b"\n")]
    assert path.read_bytes() == content[: content[:cut].rfind(b"\n") + 1]


@given(records=RECORDS, place=st.integers(0, 10_000), junk=st.binary(max_size=8))
def test_a_broken_line_is_named(path, records, place, junk):
    """Any bytes anywhere: records, or the documented error with file and line; a journal's end is repaired, no more."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    content = content[:place] + junk + content[place + len(junk):]
    for journal in (False, True):
        path.write_bytes(content)
        try:
            assert all(isinstance(record, dict) for record in art.read_jsonl(path, journal=journal))
        except art.UserError as error:
            number = int(re.fullmatch(re.escape(str(path)) + ", line ([0-9]+): not a JSON object; .*", str(error))[1])
            with pytest.raises((ValueError, AssertionError)):
                record = json.loads(content.split(b"\n")[number - 1])
                json.dumps(record, ensure_ascii=False).encode()  # half a character, torn from its other half
                assert isinstance(record, dict)


READERS = {"subquestions": art.parse_subquestions, "visible": art.visible}


@pytest.mark.parametrize("reader", READERS)
def test_linear_time(reader):
    """As for answers in test_answers.py: ten times the text may take thirty times as long (100 if quadratic)."""
    for piece in PIECES:
        times = []
        for size in (30_000, 300_000):
            start = time.perf_counter()
            READERS[reader]((piece * (size // len(piece) + 1))[:size])
            times.append(time.perf_counter() - start)
        assert times[1] < 30 * times[0] + 0.1, piece
