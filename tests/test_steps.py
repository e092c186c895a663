"""The four steps with a fake model: prompts, targets and parsers fit; gold reaches no prompt."""

import re

import pytest
from conftest import FakeLM, args_of, load

import art
import evaluate

QUESTION = "Ann has 7 pens. Ben has 2 fewer pens than Ann. How many pens do they have together?"
RECORD = {"id": "x", "question": QUESTION, "answer": "98765", "facts": ["GOLD-FACT."],
          "solution": [["GOLD-ASK-1?", "GOLD-STEP 1."], ["GOLD-ASK-2?", "GOLD-STEP 2."]]}


@pytest.fixture
def args(tmp_path):
    return args_of(tmp_path, task="gsm8k", refine_temperature=0.3)


def test_four_steps(args):
    """Each has its temperature and its end. A failed decision makes the output fail."""
    lm = FakeLM(p=0.5, prior_odds=1 / 3, failed="unread")
    [draft] = art.predict(lm, args, [RECORD], 0.2)
    assert draft["answer"] == "16" and draft["finished"]
    [asked] = art.ask(lm, args, [RECORD], [draft])
    assert asked["subquestions"] == ["How many has Ben?", "How many together?"]
    assert asked["p_refine"] == pytest.approx(0.25)  # with the prior
    assert asked["failed"] == "unread" and "text" not in asked
    assert asked["tokens"] == 3 and asked["prompt_tokens"] == len(lm.seen[1]) + 7  # both prompts
    assert lm.seen[-1].endswith("Sub-questions:\nHow many has Ben?\nHow many together?\nRefine:")
    [refined] = art.refine(lm, args, [RECORD], [draft], [asked])
    assert "7 + 9 = 16\n#### 16" in lm.seen[-1] and refined["answer"] == "12"
    assert lm.seen[-1].endswith("together?\nRevised answer:\n")
    assert [one["score"] for one in art.trust(lm, args, [RECORD, RECORD], [draft, refined])] == [
        len(f"Question: {QUESTION}\nAnswer:\n{answer['text']}") for answer in (draft, refined)]
    stop = lm.asked[0][1]
    assert lm.asked == [(48, stop, [0], 0.2), (48, art.ASK_STOP, [0], 0.0), (48, stop, [0], 0.3)]


def test_samples_have_the_prompt_of_the_draft(args):
    """One output for each number; the strategy of an adapter goes before that of the flags."""
    lm, prompt = FakeLM(), f"Question: {QUESTION}\nAnswer"
    [samples] = art.sample_answers(lm, args, [RECORD], [0, 3], 0.7)
    assert [sample["answer"] for sample in samples] == ["16", "16"]
    samples[1]["finished"] = False  # what was cut off is not correct
    samples = load("data/sample.py").label(args, {"answer": "16"}, samples)
    assert [sample["correct"] for sample in samples] == [True, False]
    for lm.strategy in (None, "decomp"):
        art.predict(lm, args, [RECORD])
    assert lm.seen == [f"{prompt}:\n", f"{prompt}:\n", f"{prompt} by sub-questions:\n"]
    assert [call[2:] for call in lm.asked] == [([0, 3], 0.7), ([0], 0.0), ([0], 0.0)]


def prompts_of_all_stages(args, record):
    """The prompts of everything that evaluate.py and art.py generate for a record."""
    lm = FakeLM()
    outputs = evaluate.Outputs(args, [], [{"answer": "1", **record}])
    outputs.model = lambda name, label: lm
    outputs.ask(evaluate.STAGES.keys() - {"refined_gold"})
    art.ask_refine_trust(lm, lm, lm, args, record, 0.5)
    return sorted(lm.seen)


@pytest.mark.parametrize("strategy", ["cot", "decomp"])
@pytest.mark.parametrize("show_draft", ["yes", "no"])
def test_gold_reaches_no_prompt(args, strategy, show_draft):
    """Every stage has the same prompts for a record with gold fields and for one without."""
    args.strategy, args.show_draft, args.facts = strategy, show_draft, "none"
    prompts = prompts_of_all_stages(args, RECORD)
    assert len(prompts) > len(evaluate.STAGES)
    assert prompts == prompts_of_all_stages(args, {"id": "x", "question": QUESTION})
    assert not any(re.search("GOLD|98765", prompt) for prompt in prompts)
    evaluate.refine_gold(lm := FakeLM(), args, [RECORD], [{"text": "16"}])  # the one exception
    assert "GOLD-ASK-1?" in lm.seen[0] and not re.search("GOLD-[^A]|98765", lm.seen[0])


@pytest.mark.parametrize(("facts", "shown"), [("none", ""), ("refine", "R"), ("both", "PR")])
def test_facts_are_shown_where_they_are_allowed(args, facts, shown):
    lm, args.facts = FakeLM(), facts
    drafts = art.predict(lm, args, [RECORD])
    asked = art.ask(lm, args, [RECORD], drafts)
    art.trust(lm, args, [RECORD], art.refine(lm, args, [RECORD], drafts, asked))
    steps = zip("PAART", lm.seen)  # predict, ask and decide, refine, trust
    assert "".join(step for step, prompt in steps if "GOLD-FACT" in prompt) == shown
    lm.strategy = "cot"  # "finetuned"
    assert art.predict(lm, args, [RECORD]) and "GOLD-FACT" not in lm.seen[-1]


@pytest.mark.parametrize(("show_draft", "asked", "shown"), [
    ("yes", True, True), ("no", True, False), ("no", False, True)])
def test_the_draft_is_shown_or_not(args, show_draft, asked, shown):
    """Without sub-questions it is always shown. A chat model reads hints where it is not."""
    lm, args.show_draft = FakeLM(), show_draft
    for lm.chat in (False, True):
        art.refine(lm, args, [RECORD], [{"text": "#### 16"}], [{"subquestions": ["Who?"] * asked}])
        assert [text in lm.seen[-1] for text in ("#### 16", "Who?", art.HINTS, "one after")] == [
            shown, asked, lm.chat and not shown, lm.chat and shown and asked]


def test_what_is_trained_is_what_is_parsed():
    assert art.read_decision("A better answer is B.", ["A", "B"]) in (None, "B")
    subquestions = art.gold_subquestions(RECORD)
    for refine in (True, False):
        target = art.ask_target(subquestions, refine)
        assert art.parse_subquestions(target) == subquestions
        assert art.read_decision(target, ["Yes", "No"]) == ("Yes" if refine else "No")
        assert not re.search(art.ASK_STOP, target.rsplit("Refine:")[0])
        assert re.search(art.ASK_STOP, target)
    for strategy in ("cot", "decomp"):
        text = art.solution_text(RECORD["solution"], RECORD["answer"], strategy)
        assert art.extract_answer("gsm8k", text) == "98765"
        assert ("GOLD-ASK-2" in text) == (strategy == "decomp")
        assert re.search(art.ANSWER_LINE["number"], text)  # where generation stops
