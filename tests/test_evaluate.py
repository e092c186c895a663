"""Rows, thresholds and statistics counted again the slow way; then the script's flags on the finished toy run."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import asked_of, refused

import art
import evaluate

# What each row means: who decides, what stands in the draft's place, who chooses; the stages whose tokens are always
# spent, and those that only a refined question costs.
MEANING = {
    "initial": ("never", "draft", "refinement", "draft", ""),
    "self_refine": ("ask_self", "refined_self", "refinement", "draft ask_self", "refined_self"),
    "refine_always": ("always", "refined", "refinement", "draft ask refined", ""),
    "asker": ("ask", "refined", "refinement", "draft ask", "refined"),
    "art": ("ask", "refined", "trust", "draft ask", "refined trust"),
    "oracle_gate": ("oracle", "refined", "refinement", "draft", "ask refined"),
    "asker_oracle": ("ask", "refined", "oracle", "draft ask", "refined"),
    "oracle_choice": ("always", "refined", "oracle", "draft ask refined", ""),
    "gold_questions": ("always", "refined_gold", "refinement", "draft refined_gold", ""),
    "always_truster": ("always", "refined", "trust", "draft ask refined trust", ""),
    "art_untuned": ("ask", "refined", "trust", "draft ask", "refined trust"),
    "cheap_gate": ("cheap", "refined", "refinement", "draft", "ask refined"),
    "self_refine_plain": ("ask_self", "refined_plain", "refinement", "draft ask_self", "refined_plain"),
    "asker_plain": ("ask", "refined_plain", "refinement", "draft ask", "refined_plain"),
    "asker_self": ("ask", "refined", "trust_self", "draft ask", "refined trust_self"),
    "logprob_choice": ("ask", "refined", "logprob", "draft ask", "refined"),
    "finetuned": ("always", "finetuned", "refinement", "finetuned", ""),
    "end_to_end": ("always", "end_to_end", "refinement", "end_to_end", ""),
}


def make_outputs(seed, n_dev=20, n_test=8):
    """Outputs whose models said random things: right, wrong, unreadable and cut-off answers."""
    rng, n = random.Random(seed), n_dev + n_test
    args = SimpleNamespace(task="toy", strategy="cot", threshold=None, seed=0)
    records = [{"id": str(i), "question": f"Which, {i}?", "answer": "1"} for i in range(n)]
    outputs = evaluate.Outputs(SimpleNamespace(args=args), records[:n_dev], records[n_dev:])
    for name, (_, _, _, (part, _)) in evaluate.STAGES.items():
        for _ in range(n):
            row = {"prompt_tokens": rng.randint(10, 20), "tokens": rng.randint(1, 9)}
            if part == "candidates":
                answer = rng.choice(["1", "1", "2", None])
                row |= {"text": f"#### {answer}", "answer": answer, "stopped": rng.random() < 0.9,
                        "logprob": -rng.random()}
            elif part == "ask":
                row |= {"subquestions": ["Which?"], "p_refine": round(rng.random(), 1)}
            else:
                row = {"prompt_tokens": 30, "draft": rng.random(), "refined": rng.random()}
            outputs.known.setdefault(name, []).append({**row, "prompt_tokens": 0} if name == "cheap" else row)
            outputs.known[name][-1].pop("tokens", None) if name == "cheap" else None
    return outputs


def slow(outputs, row, threshold, part):
    """(right, tokens, refined, draft was right) of each question of a part."""
    decides, stage, chooses, always, then = MEANING[row]
    made = []
    for i in range(len(outputs.records))[part]:
        at = {name: rows[i] for name, rows in outputs.known.items()}
        right = {name: at[name]["stopped"] and at[name]["answer"] == "1" for name in ("draft", stage)}
        p = at[decides]["p_refine"] if decides in at else None
        refine = {"never": False, "always": True, "oracle": not right["draft"]}.get(decides, p is not None and
                                                                                    p >= (threshold or 0))
        better = {"refinement": True, "oracle": right[stage] > right["draft"],
                  "logprob": at[stage].get("logprob", 0) > at["draft"]["logprob"]}.get(chooses)
        if better is None:
            better = at[chooses]["refined"] > at[chooses]["draft"]
        spent = sum(at[name]["prompt_tokens"] + at[name].get("tokens", 0)
                    for name in always.split() + then.split() * bool(refine))
        made.append((right[stage] if refine and better else right["draft"], spent, refine, right["draft"]))
    return zip(*made)


@pytest.mark.parametrize("row", MEANING)
def test_row_counted_again(row):
    for seed in range(5):
        outputs = make_outputs(seed)
        about, right = evaluate.make_row(outputs, row)
        expected, tokens, refined, drafts = slow(outputs, row, about["threshold"], outputs.test)
        assert tuple(right) == expected and about["accuracy"] == np.mean(expected) and about["n"] == 8
        assert about["mended"] == sum(a > b for a, b in zip(expected, drafts))
        assert about["broken"] == sum(a < b for a, b in zip(expected, drafts))
        assert about["tokens"] == pytest.approx(np.mean(tokens))
        assert about["refined"] == np.mean(refined)
        if row == "art_untuned":
            assert about["threshold"] == 0.5
        elif row == "asker_oracle":  # row art with a perfect Truster
            assert about["threshold"] == evaluate.make_row(outputs, "art")[0]["threshold"]
        elif about["threshold"] is not None:  # no other one is better on dev
            score = {cut: sum(next(slow(outputs, row, cut, outputs.dev))) for cut in (*np.arange(0, 1.1, 0.05), 2)}
            assert sum(next(slow(outputs, row, about["threshold"], outputs.dev))) == max(score.values())


def test_random_gate_is_the_mean_over_all_choices():
    """Of as many questions as row asker refines: each subset of that size, counted."""
    outputs = make_outputs(3)
    m = round(evaluate.make_row(outputs, "asker")[0]["refined"] * 8)
    draft, refined = outputs.right("draft")[outputs.test], outputs.right("refined")[outputs.test]
    subsets = [np.isin(range(8), chosen) for chosen in itertools.combinations(range(8), m)]
    mean = np.mean([np.where(chosen, refined, draft).mean() for chosen in subsets])
    assert 0 < m < 8 and evaluate.make_row(outputs, "random_gate")[0]["accuracy"] == pytest.approx(mean)


def test_upper_bounds():
    for seed in range(20):
        outputs = make_outputs(seed)
        at = {row: evaluate.make_row(outputs, row)[0]["accuracy"] for row in MEANING}
        assert at["oracle_choice"] >= max(at["initial"], at["refine_always"], at["art"], at["always_truster"])
        assert at["oracle_gate"] >= max(at["asker"], at["cheap_gate"], at["initial"], at["refine_always"])
        assert at["asker_oracle"] >= max(at["art"], at["initial"])


def test_thresholds_come_from_dev_alone():
    """Other gold answers of test change every verdict there and no threshold; other ones of dev do."""
    def thresholds(part, gold):
        outputs = make_outputs(1)
        for record in outputs.records[getattr(outputs, part)]:
            record["answer"] = gold
        return [evaluate.make_row(outputs, row)[0]["threshold"] for row in MEANING]

    assert thresholds("test", "1") == thresholds("test", "2") != thresholds("dev", "2")
    assert sum(value is not None for value in thresholds("test", "1")) == 10


def test_unreadable_and_cut_off_answers_are_counted():
    outputs = make_outputs(0)
    rows = outputs.known["draft"][outputs.test] = [
        {**row, "text": text, "answer": None if text == "?" else "2", "stopped": stopped, **more}
        for row, (text, stopped, more) in zip(outputs.known["draft"][outputs.test], [
            ("?", True, {}), ("?", True, {}), ("2", False, {}), ("2", True, {}), ("", False, {"failed": True})] * 2)]
    about, _ = evaluate.make_row(outputs, "initial")
    assert len(rows) == 8 and (about["unparsed"], about["cut_off"], about["failed"]) == (4, 2, 1)


def test_statistics_against_published_values():
    assert evaluate.wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)  # Newcombe (1998), table I
    assert evaluate.wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=1e-4)
    for gained, lost in itertools.product(range(6), repeat=2):  # the tails of all outcomes of fair coins
        n = gained + lost
        heads = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
        tails = sum(count <= min(gained, lost) or count >= max(gained, lost) for count in heads) / 2**n
        assert evaluate.mcnemar(gained, lost) == pytest.approx(tails)


def test_bootstrap_against_the_formula():
    """60 questions of 400 gained, 40 lost: 5.0% more, with the standard error of a mean of 1, 0 and -1."""
    row, other = np.arange(400) < 60, (np.arange(400) >= 60) & (np.arange(400) < 100)
    found, error = evaluate.compare(row, other), np.sqrt((100 / 400 - 0.05**2) / 400)
    assert found["delta"] == 0.05 and found["p"] == evaluate.mcnemar(60, 40)
    assert found["ci95"] == pytest.approx([0.05 - 1.96 * error, 0.05 + 1.96 * error], abs=0.004)


def test_threshold_and_auc_against_brute_force():
    rng = np.random.default_rng(2)
    for _ in range(50):
        p, gain = rng.random(12).round(1), rng.integers(-1, 2, 12)
        best = max(gain[p >= cut].sum() for cut in [0, *p, 1.1])
        assert gain[p >= evaluate.best_threshold(p, gain)].sum() == best
        pairs = [(a > b) + 0.5 * (a == b) for a in p[gain > 0] for b in p[gain <= 0]]
        assert art.auc(p, gain > 0) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_votes_by_hand():
    """What cannot be read or was cut off has no vote, the earlier answer wins a tie, exp(score) weighs."""
    answers = [None, "5", "4", "5", "5", "4", "4"]
    samples = [{"answer": answer, "number": i, "stopped": i != 1} for i, answer in enumerate(answers)]
    scores = [{"score": score} for score in (0, 1, 2, 9, 3, 4, 5)]
    assert [evaluate.pick("majority", samples[:k], None)["number"] for k in range(1, 8)] == [0, 0, 2, 2, 3, 2, 2]
    assert [evaluate.pick("best_of_k", samples[:k], scores[:k])["number"] for k in (1, 3, 7)] == [0, 2, 3]
    assert [evaluate.pick("weighted_vote", samples[:k], scores[:k])["number"] for k in (3, 7)] == [2, 3]
    scores = [{"score": math.log(weight)} for weight in (9, 9, 2, 1, 1, 1, 0.5)]  # 4: 2 + 1 + 0.5; 5: 1 + 1
    assert evaluate.pick("weighted_vote", samples, scores)["number"] == 2


def test_vote_stops_at_the_cost_of_art(monkeypatch):
    """The first k whose tokens are not below the budget: the prompt once, each sample, and what the Truster reads."""
    samples = [{"text": f"#### {n}", "answer": n, "stopped": True, "tokens": 10, "prompt_tokens": 50} for n in "31112"]
    outputs = make_outputs(0)
    outputs.args.temperature = 1.0
    monkeypatch.setattr(art, "sample_answers", lambda lm, args, records, k, t: [(samples * 3)[:k] for _ in records])
    outputs.run.model = lambda name, label: SimpleNamespace(
        score=lambda texts: [{"score": float(text.endswith("1")), "prompt_tokens": 7} for text in texts])
    for row, budget, expected in (("majority", 85, (4, 90, 1)), ("best_of_k", 85, (3, 101, 1)),
                                  ("majority", 60, (1, 60, 0)), ("majority", math.inf, (12, 170, 1))):
        about, right = evaluate.vote_row(outputs, row, budget)
        assert (about["k"], about["tokens"], about["accuracy"]) == expected and len(right) == 8


# --- The script


def test_table_is_what_the_records_say(kit):
    rows, records = kit.results(), art.read_jsonl(kit.runs / "toy/default/records.jsonl", "")
    assert list(rows) == list(evaluate.DEFAULT_ROWS) and len(records) == 12
    assert MEANING.keys() | {"random_gate", *evaluate.VOTES} == evaluate.ROWS.keys()
    for name, row in rows.items():
        if name != "random_gate":  # an expectation
            assert row["accuracy"] == np.mean([record["right"][name] for record in records])
    for name, stage in (("initial", "draft"), ("refine_always", "refined"), ("self_refine", "refined_self")):
        texts = [record["candidates"][stage]["text"] for record in records]
        right = [art.is_correct("toy", text, record["answer"]) for text, record in zip(texts, records)]
        assert name == "self_refine" or rows[name]["accuracy"] == np.mean(right)
    engine = {"settings", "prompt", "call", "number", "on", "seconds"}
    rows = [row for record in records for part in ("candidates", "ask", "trust") for row in record[part].values()]
    assert rows and not any(engine & row.keys() for row in rows)
    assert "==== mended: " in (kit.runs / "toy/default/flips.txt").read_text()
    results = json.loads((kit.runs / "toy/default/results.json").read_text())
    assert results["machines"] == ["cpu float32"] and results["training"].keys() == {"asker", "truster", "finetuned"}


def test_load_run(kit):
    run = art.load_run(kit.runs / "toy/default")
    assert run["right.art"].dtype == bool and run["right.art"].mean() == kit.results()["art"]["accuracy"]
    assert run["ask.asker.p_refine"].shape == (12,) and run["id"][3] == "toy-test-3"
    assert run["solution"][0] == art.read_jsonl(kit.data / "toy/test.jsonl", "")[0]["solution"]


def test_dev_is_kept_too(kit):
    """The threshold of a row can be worked out again from dev.jsonl."""
    dev = art.load_run(kit.runs / "toy/default", "dev.jsonl")
    verdicts = {name: np.array([art.is_correct("toy", text, answer) for text, answer in zip(
        dev[f"candidates.{name}.text"], dev["answer"])]) for name in ("draft", "refined")}
    assert list(dev["right.initial"]) == list(verdicts["draft"] & dev["candidates.draft.stopped"])
    gain = (verdicts["refined"] & dev["candidates.refined.stopped"]).astype(int) - dev["right.initial"]
    assert evaluate.best_threshold(dev["ask.asker.p_refine"], gain) == kit.results()["asker"]["threshold"]


def test_a_table_that_changes_is_announced(copy, monkeypatch, capsys):
    """So that an edit which nobody took back does not replace the baseline unseen."""
    path = copy.runs / "toy/default/results.json"
    copy.here(monkeypatch, "evaluate")
    assert "warning" not in capsys.readouterr().err
    results = json.loads(path.read_text())
    art.write(path, {**results, "rows": [{**row, "accuracy": 0.0} for row in results["rows"]]})
    copy.here(monkeypatch, "evaluate")
    assert f"had initial 0.0%, now {copy.results()['initial']['accuracy']:.1%}; " in capsys.readouterr().err


def test_rows_are_added(copy, monkeypatch, capsys):
    """The old rows stay, the new one stands beside them, and nothing is asked twice."""
    before = copy.results()
    capsys.readouterr()
    budgets, vote = [], evaluate.vote_row
    monkeypatch.setattr(evaluate, "vote_row", lambda *how: budgets.append(how[2]) or vote(*how))
    copy.here(monkeypatch, "evaluate", "--rows", "majority,always_truster")
    assert asked_of(capsys.readouterr().out).keys() == {"samples of test"}
    after = copy.results()
    assert list(after) == [*before, "always_truster", "majority"]
    assert all(after[name] == row for name, row in before.items())
    assert budgets == [after["art"]["tokens"]]  # a vote may cost what row art costs, which is only kept here


@pytest.mark.parametrize("rows", ["art,self_refine", "finetuned", "oracle_gate,art", "art,refine_always"])
def test_a_few_rows_alone(copy, monkeypatch, rows):
    """Whatever is left out; also where questions have kinds."""
    for record in (records := art.read_jsonl(copy.data / "toy/test.jsonl", "")):
        record["kind"] = "easy"
    art.write(copy.data / "toy/test.jsonl", records)
    (copy.runs / "toy/default/results.json").unlink()
    copy.here(monkeypatch, "evaluate", "--rows", rows)
    assert set(copy.results()) == set(rows.split(","))


def test_threshold_flag(copy, monkeypatch):
    """Above 1 nothing is refined, at 0 everything."""
    for threshold, row, equal in (("2", "art", "initial"), ("0", "asker", "refine_always")):
        copy.here(monkeypatch, "evaluate", "--threshold", threshold)
        assert copy.results()[row]["accuracy"] == copy.results()[equal]["accuracy"]
        assert copy.results()[row]["refined"] == (equal != "initial")


def test_parts_of_another_run(copy, monkeypatch, capsys):
    """With Asker and Truster of the first run, another run is the same, and nothing is asked."""
    assert "train_asker.py --task toy --run b" in refused(
        monkeypatch, capsys, copy, "evaluate", "--run", "b", "--truster-from", "default")
    copy.here(monkeypatch, "evaluate", "--run", "b", "--asker-from", "default", "--truster-from", "default")
    assert copy.results("b") == copy.results() and not asked_of(capsys.readouterr().out)


def test_compare(copy, monkeypatch, capsys):
    flags = ["--asker-from", "default", "--truster-from", "default"]
    copy.here(monkeypatch, "evaluate", "--run", "b", *flags, "--threshold", "2")
    capsys.readouterr()
    copy.here(monkeypatch, "evaluate", "--compare", "default", "b", "--row", "asker")
    out = capsys.readouterr().out
    one, two = (copy.results(run)["asker"]["accuracy"] for run in ("default", "b"))
    assert f"| asker | {one:.1%} | {two:.1%} | {(one + two) / 2:.1%} |" in out
    assert f"asker, b against default: {two - one:+.1%}" in out and "n = 12" in out
    copy.here(monkeypatch, "evaluate", "--compare", "default", "--row", "refine_always", "--against", "initial")
    counted = copy.results()["refine_always"]
    assert (f"refine_always of default against initial of default: {counted['vs_initial']['delta']:+.1%}"
            in (out := capsys.readouterr().out))
    assert f"won {counted['mended']}, lost {counted['broken']}, n = 12" in out
    copy.here(monkeypatch, "evaluate", "--run", "few", *flags, "--limit", "6")
    for name, said in (("few", "not on the same test questions"), ("nobody", "no results.json of nobody")):
        assert said in refused(monkeypatch, capsys, copy, "evaluate", "--compare", "default", name)
    assert "row majority is not in the table" in refused(
        monkeypatch, capsys, copy, "evaluate", "--compare", "default", "b", "--row", "majority")


def test_a_run_that_was_trained_on_test_is_refused(copy, monkeypatch, capsys):
    """Also if only one of the adapters was."""
    test, train = (art.read_jsonl(copy.data / f"toy/{split}.jsonl", "") for split in ("test", "train"))
    art.write(copy.data / "toy/test.jsonl", [*test[1:], {**test[0], "question": train[39]["question"].upper()}])
    copy.here(monkeypatch, "train_truster", "--overwrite", "--limit-train", "38")
    assert f"trained on 1 of the test questions, as {test[0]['id']}" in refused(monkeypatch, capsys, copy, "evaluate")


def test_table_by_kind(copy, monkeypatch):
    test = art.read_jsonl(copy.data / "toy/test.jsonl", "")
    art.write(copy.data / "toy/test.jsonl", [{**r, "kind": "easy" if i % 3 else "hard"} for i, r in enumerate(test)])
    copy.here(monkeypatch, "evaluate")
    right = art.load_run(copy.runs / "toy/default")
    cells = [f"{right[f'right.{row}'][right['kind'] == 'hard'].mean():.0%}"
             for row in ("initial", "refine_always", "art")]
    assert f"| hard | 33% | {' | '.join(cells)} |" in (copy.runs / "toy/default/table.md").read_text()
