"""The four steps with a fake model: what is trained is what is parsed, and gold never reaches a prompt."""

import json
import re
from types import SimpleNamespace

import pytest
import transformers
from conftest import BASE, FakeLM

import art
import evaluate

RECORD = {"id": "x", "question": "Ann has 7 pens. Ben has 2 fewer pens than Ann. How many pens do they have together?",
          "answer": "98765", "facts": ["GOLD-FACT."],  # what is gold can be found in any prompt
          "solution": [["GOLD-QUESTION-1?", "GOLD-STEP 1."], ["GOLD-QUESTION-2?", "GOLD-STEP 2."]]}
BARE = {"id": "x", "question": RECORD["question"]}


def args_of(**changes):
    return SimpleNamespace(**{"task": "gsm8k", "strategy": "cot", "facts": "refine", "show_draft": "yes",
                              "max_new_tokens": 99, "draft_temperature": 0.0, **changes})


def run_of(llm, asker=None, truster=None, **changes):
    models = {"llm": llm, "asker": asker or llm, "truster": truster or llm}
    return SimpleNamespace(args=args_of(**changes), model=lambda name, label=None: models.get(name, llm))


def test_four_steps():
    lm, args = FakeLM(), args_of()
    (draft,) = art.predict(lm, args, [RECORD])
    assert draft["answer"] == "16" and draft["stopped"]
    (asked,) = art.ask(lm, args, [RECORD], [draft])
    assert asked["subquestions"] == ["How many has Ben?", "How many together?"] and asked["p_refine"] == 0.5
    assert asked["tokens"] == 3 and asked["prompt_tokens"] == len(lm.seen[1]) + 7  # those of the decision count, too
    assert lm.seen[-1].endswith("Sub-questions:\nHow many has Ben?\nHow many together?\nRefine:")
    (refined,) = art.refine(lm, args, [RECORD], [draft], [asked])
    assert "7 + 9 = 16\n#### 16" in lm.seen[-1] and lm.seen[-1].endswith("together?\nRevised answer:\n")
    assert refined["answer"] == "12"
    (score,) = art.trust(lm, args, [RECORD], [draft], [refined])
    assert score["draft"] == len(art.trust_prompt(RECORD, draft["text"])) and score["prompt_tokens"] == 10


def test_prior_odds_turn_the_balanced_decision_back():
    (asked,) = art.ask(FakeLM(p=0.5, prior_odds=1 / 3), args_of(), [RECORD], [{"text": "#### 16"}])
    assert asked["p_refine"] == pytest.approx(0.25)


@pytest.mark.parametrize(("p", "truster", "final"), [
    (0.4, None, "16"),  # below the threshold: nothing is refined
    (0.5, 1, "12"),  # the Truster prefers the longer text, which is the refinement
    (0.5, -1, "16"),
])
def test_loop(p, truster, final):
    """Decide at the threshold or above, then let the Truster choose; what is not needed is not asked."""
    judge = FakeLM()
    judge.score = lambda texts: [{"score": truster * len(text), "prompt_tokens": 5} for text in texts]
    judge.texts = {}
    llm = FakeLM(texts={**FakeLM.texts, "Revised answer:": "Ben has 7 - 2 = 5, 7 + 5 = 12.\n#### 12"})
    asker = FakeLM()
    asker.choose = lambda prompts, *rest: [{"p": p * ("Ann" in prompt), "prompt_tokens": 7} for prompt in prompts]
    other, row = art.ask_refine_trust(run_of(llm, asker, judge), [{"question": "Who?"}, RECORD], 0.5)
    assert row["final"]["answer"] == final and ("refined" in row) == ("trust" in row) == (p >= 0.5)
    assert len(llm.seen) == 2 + (p >= 0.5) and "refined" not in other


def ask_all_stages(record, **changes):
    """The prompts of everything that evaluate.py and solve ask about a record."""
    lm = FakeLM(exemplars=art.load_exemplars("gsm8k", changes.pop("shots", 0)))
    run = run_of(lm, **changes)
    outputs = evaluate.Outputs(run, [], [record])
    for stage in evaluate.STAGES.keys() - {"refined_gold", "cheap"}:
        outputs[stage]
    art.ask_refine_trust(run, [record], 0.5)
    seen, lm.seen = sorted(lm.seen), []
    evaluate.refine_gold(lm, run.args, [RECORD], outputs["draft"])  # an upper bound: gold sub-questions, and no more
    assert "GOLD-QUESTION" in lm.seen[0] and not re.search("GOLD-STEP|GOLD-FACT|98765", lm.seen[0])
    return seen


@pytest.mark.parametrize("strategy", ["cot", "decomp"])
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("show_draft", ["yes", "no"])
def test_gold_never_reaches_a_prompt(strategy, shots, show_draft):
    """A record with its gold fields and one without them give the same prompts in every stage of every row."""
    settings = {"strategy": strategy, "shots": shots, "show_draft": show_draft, "facts": "none"}
    with_gold, bare = ask_all_stages(RECORD, **settings), ask_all_stages(BARE, **settings)
    assert len(with_gold) == 20 and with_gold == bare
    assert not any(re.search("GOLD|98765", prompt) for prompt in with_gold)


@pytest.mark.parametrize(("facts", "shown"), [("none", [0, 0, 0]), ("refine", [0, 0, 1]), ("both", [1, 0, 1])])
def test_facts_stand_where_they_are_allowed(facts, shown):
    """In the prompts of predict, ask, refine; never the sub-questions or steps of the gold solution."""
    lm, args = FakeLM(), args_of(task="strategyqa", facts=facts)
    drafts = art.predict(lm, args, [RECORD])
    asked = art.ask(lm, args, [RECORD], drafts)
    art.refine(lm, args, [RECORD], drafts, asked)
    assert ["GOLD-FACT" in lm.seen[i] for i in (0, 1, 3)] == shown
    assert not any(word in prompt for word in ("GOLD-STEP", "GOLD-QUESTION") for prompt in lm.seen)


def test_draft_is_shown_or_not():
    """Without sub-questions it is shown in any case: there would be nothing to refine."""
    shown = art.refine_prompt(RECORD, "#### 16", ["Who?"])
    hidden = art.refine_prompt(RECORD, "#### 16", ["Who?"], show_draft=False)
    assert "#### 16" in shown and "#### 16" not in hidden and "Who?" in hidden
    assert "#### 16" in art.refine_prompt(RECORD, "#### 16", (), show_draft=False)


def test_what_is_trained_is_what_is_parsed():
    subquestions = art.subquestions_of(RECORD)
    for refine in (True, False):
        target = art.ask_target(subquestions, refine)
        assert art.parse_subquestions(target) == subquestions and target.endswith("Refine: Yes") == refine
    assert art.parse_subquestions("Who?\n" * 20) == ["Who?"] * 12  # a model that does not stop
    for strategy in ("cot", "decomp"):
        text = art.solution_text(RECORD["solution"], RECORD["answer"], strategy)
        assert art.extract_answer("gsm8k", text) == "98765" and ("GOLD-QUESTION-2" in text) == (strategy == "decomp")
        assert re.search(art.ANSWER_LINE["number"] + r"[^\n]*\n", text + "\n")  # and the stop pattern ends behind it
    for refine in (True, False):
        whole = art.end_to_end_target("#### 16", subquestions, refine, "#### 12")
        assert art.parse_end_to_end(whole) == ("#### 12" if refine else "#### 16")


def test_both_orders_of_a_choice_weigh_the_same():
    """A model that always takes A prefers neither answer."""
    lm = FakeLM(p=1.0)
    (score,) = art.trust_self(lm, args_of(), [RECORD], [{"text": "#### 16"}], [{"text": "#### 12"}])
    assert score["draft"] == score["refined"] == 0.5
    assert lm.seen[0].index("16") < lm.seen[0].index("12") and lm.seen[1].index("12") < lm.seen[1].index("16")


def test_scores_that_failed_can_be_written():
    """JSON knows no infinity, though Python writes one; and the draft stands."""
    lm = FakeLM(score=lambda texts: [art.failed_output() for _ in texts])
    (score,) = art.trust(lm, args_of(), [RECORD], [{"text": "#### 16"}], [{"text": "#### 12"}])
    assert json.dumps(score, allow_nan=False) and not score["refined"] > score["draft"]


@pytest.mark.parametrize("task", ["gsm8k", "strategyqa"])
def test_exemplars_are_sound(task):
    """Each is answered rightly by its solution, and half of the drafts are wrong."""
    exemplars = art.load_exemplars(task, 99)
    assert sum(not art.is_correct(task, e["draft"], e["answer"]) for e in exemplars) * 2 == len(exemplars) > 0
    assert all(art.is_correct(task, art.solution_text(e["solution"], e["answer"]), e["answer"]) for e in exemplars)


@pytest.fixture
def chat(make_run, monkeypatch):
    """The toy's model with a chat template that prints the date."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = ("{{ date_string }} {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}"
                               "[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ")
    monkeypatch.setattr(art, "load_tokenizer", lambda name: tokenizer)
    return make_run(shots=None).model("llm")


def test_chat_rendering(chat):
    """Exemplars are turns, each question is told what to do, and the date is fixed: it is in the key."""
    (text,) = chat.render(["Question: B?\nAnswer:\n"], [("Question: A?\nAnswer:\n", "#### 1")], "Be brief.")
    day = "26 Jul 2024"
    assert text == (f"{day} {day}\n[user] Question: A?\n\nBe brief.\n[assistant] #### 1\n"
                    "[user] Question: B?\n\nBe brief.\n[assistant] ")
    assert chat.exemplars == []  # zero-shot by default; a base model has exemplars in front
    assert art.plain_text("Question: B?", [("Question: A?\nAnswer:\n", "#### 1")]).endswith("#### 1\n\nQuestion: B?")


def test_a_prompt_does_not_depend_on_its_neighbours():
    """Whoever is refined beside it, a question without sub-questions is refined by the same prompt."""
    drafts, asked = [{"text": "#### 1"}] * 2, [{"subquestions": []}, {"subquestions": ["Who?"]}]
    lm = FakeLM(exemplars=art.load_exemplars("gsm8k", 1))
    art.refine(lm, args_of(), [BARE, RECORD], drafts, asked)
    art.refine(lm, args_of(), [BARE], drafts[:1], asked[:1])
    assert lm.seen[0] == lm.seen[2]
