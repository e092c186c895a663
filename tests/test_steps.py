"""The four steps with a fake model: prompts, targets and parsers fit; gold reaches no prompt."""

import re

import pytest
from conftest import FakeLM, args_of

import art
import evaluate

QUESTION = "Ann has 7 pens. Ben has 2 fewer pens than Ann. How many pens do they have together?"
RECORD = {"id": "x", "question": QUESTION, "answer": "98765", "facts": ["GOLD-FACT."],
          "solution": [["GOLD-ASK-1?", "GOLD-STEP 1."], ["GOLD-ASK-2?", "GOLD-STEP 2."]]}


@pytest.fixture
def args(tmp_path):
    return args_of(tmp_path, task="gsm8k")


def test_four_steps(args):
    lm = FakeLM()
    [draft] = art.predict(lm, args, [RECORD])
    assert draft["answer"] == "16" and draft["finished"]
    [asked] = art.ask(lm, args, [RECORD], [draft])
    assert asked["subquestions"] == ["How many has Ben?", "How many together?"]
    assert asked["p_refine"] == 0.5 and "text" not in asked
    # the tokens of the decision count, too
    assert asked["tokens"] == 3 and asked["prompt_tokens"] == len(lm.seen[1]) + 7
    assert lm.seen[-1].endswith("Sub-questions:\nHow many has Ben?\nHow many together?\nRefine:")
    [refined] = art.refine(lm, args, [RECORD], [draft], [asked])
    assert "7 + 9 = 16\n#### 16" in lm.seen[-1] and refined["answer"] == "12"
    assert lm.seen[-1].endswith("together?\nRevised answer:\n")
    scores = art.trust(lm, args, [RECORD, RECORD], [draft, refined])
    assert [one["score"] for one in scores] == [
        len(f"Question: {QUESTION}\nAnswer:\n{answer['text']}") for answer in (draft, refined)]


def test_samples_have_the_prompt_of_the_draft(args):
    """One output for each number; the strategy of an adapter goes before that of the flags."""
    lm = FakeLM()
    [samples] = art.sample_answers(lm, args, [RECORD], [0, 3], 0.7)
    assert [sample["answer"] for sample in samples] == ["16", "16"]
    art.predict(lm, args, [RECORD])
    assert lm.seen[0] == lm.seen[1] == f"Question: {QUESTION}\nAnswer:\n"
    art.predict(FakeLM(seen=lm.seen, strategy="decomp"), args, [RECORD])
    assert lm.seen[2] == f"Question: {QUESTION}\nAnswer by sub-questions:\n"


def test_temperatures_and_stop_patterns(args):
    """Drafts, samples and refined answers have temperatures of their own; lists have ASK_STOP."""
    seen, lm = [], FakeLM()

    def generate(prompts, max_new_tokens, stop=None, numbers=(0,), temperature=0.0):
        seen.append((max_new_tokens, list(numbers), temperature, stop))
        return FakeLM.generate(lm, prompts, max_new_tokens, stop, numbers, temperature)

    lm.generate, args.refine_temperature = generate, 0.3
    drafts = art.predict(lm, args, [RECORD], 0.2)
    art.sample_answers(lm, args, [RECORD], range(2), 0.9)
    art.refine(lm, args, [RECORD], drafts, art.ask(lm, args, [RECORD], drafts))
    assert [call[:3] for call in seen] == [(48, [0], 0.2), (48, [0, 1], 0.9), (48, [0], 0.0),
                                           (48, [0], 0.3)]
    assert seen[2][3] == art.ASK_STOP and seen[0][3] == seen[1][3] == seen[3][3] != art.ASK_STOP


def test_prior_odds_undo_the_balance_of_the_training(args):
    [asked] = art.ask(FakeLM(p=0.5, prior_odds=1 / 3), args, [RECORD], [{"text": "#### 16"}])
    assert asked["p_refine"] == pytest.approx(0.25)


def test_a_failed_decision_makes_the_output_fail(args):
    lm = FakeLM()
    lm.choose = lambda *_: [{"p": float("nan"), "prompt_tokens": 0, "failed": "unread"}]
    assert art.ask(lm, args, [RECORD], [{"text": "#### 16"}])[0]["failed"] == "unread"


@pytest.mark.parametrize(("p", "sign", "final"), [
    (0.4, 0, "16"),  # below the threshold
    (0.5, 1, "12"),  # this Truster prefers the longer text, the refined answer
    (0.5, -1, "16"),
])
def test_the_loop(args, p, sign, final):
    """Refine at the threshold or above, then the Truster chooses; nothing else is generated."""
    asker, truster = FakeLM(p=p), FakeLM(texts={})
    truster.score = lambda texts: [{"score": sign * len(text)} for text in texts]
    llm = FakeLM(texts={**FakeLM.texts, "Revised answer:": "Ben has 7 - 2 = 5. 7 + 5\n#### 12"})
    result = art.ask_refine_trust(llm, asker, truster, args, RECORD, 0.5)
    assert result["final"]["answer"] == final and len(llm.seen) == 1 + (p >= 0.5)
    assert ("refined" in result) == ("scores" in result) == (p >= 0.5)


@pytest.mark.parametrize(("draft", "refined", "scores", "chosen"), [
    ((True, "1"), (True, "2"), (0.0, 1.0), "refined"),
    ((True, "1"), (True, "2"), (1.0, 1.0), "draft"),  # equal scores
    ((True, "1"), (False, "2"), (0.0, 1.0), "draft"),  # cut off
    ((True, None), (True, "2"), (1.0, 0.0), "refined"),  # the draft cannot be read
    ((False, "1"), (False, "2"), (0.0, 1.0), "refined"),
])
def test_a_finished_answer_goes_before_one_that_was_cut_off(draft, refined, scores, chosen):
    outputs = {"draft": dict(zip(("finished", "answer"), draft)),
               "refined": dict(zip(("finished", "answer"), refined))}
    assert art.better_answer(*outputs.values(), *scores) is outputs[chosen]


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
    assert not re.search("GOLD-STEP|GOLD-ASK", "".join(lm.seen))


def test_the_draft_is_shown_or_not():
    """Without sub-questions it is always shown: there would be nothing to refine."""
    hidden = art.refine_prompt(RECORD, "#### 16", ["Who?"], show_draft=False)
    assert "#### 16" in art.refine_prompt(RECORD, "#### 16", ["Who?"])
    assert "#### 16" not in hidden and "Who?" in hidden
    assert "#### 16" in art.refine_prompt(RECORD, "#### 16", (), show_draft=False)


def test_what_is_trained_is_what_is_parsed():
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


def test_a_chat_model_reads_an_instruction(args):
    """In place of the last line of the prompt; a base model reads the prompt as it is."""
    prompt = "Question: B?\nAnswer:\n"
    rendered = art.render(FakeLM(chat=True), args, prompt, "cot")
    assert rendered.startswith("Question: B?\n\nAnswer the question. ") and "boxed" in rendered
    assert art.render(FakeLM(), args, prompt, "cot") == prompt
