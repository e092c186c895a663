"""Write art.ipynb from cells."""
import json, sys
cells=[]
def md(t,*tags): cells.append({"cell_type":"markdown","metadata":{"tags":list(tags)} if tags else {},"source":t.strip("\n")})
def code(t,*tags): cells.append({"cell_type":"code","metadata":{"tags":list(tags)} if tags else {},"source":t.strip("\n"),"outputs":[],"execution_count":None})

md("""
# ART: Ask, Refine, and Trust, in one lesson

A language model cannot tell when its answer is wrong, and refining every answer breaks right ones. In this lesson you will see both
happen, train two small models that decide better, and rebuild the paper's table from records by hand. It takes 25 to 30 minutes
on a laptop CPU, on Colab's CPU or on a T4. Run the cells in order; a cell that was interrupted goes on where it stopped.

Paper: Shridhar et al., [arXiv 2311.07961](https://arxiv.org/abs/2311.07961).
""")
code("""
# On Colab alone: fetch the kit and install it. KIT is the address that you would give to git clone.
KIT = ""
import sys
if "google.colab" in sys.modules:
    %cd /content
    !test -d kit || git clone -q $KIT kit
    %cd kit
    !pip uninstall -qy torchao  # peft refuses the release that Colab brings
    !grep -vE "^(torch|numpy)==" constraints.txt > /tmp/constraints.txt
    !pip install -q -r requirements.txt -c /tmp/constraints.txt  # Colab's own torch stays
""")
code("""
import os, random, subprocess

import matplotlib.pyplot as plt
import numpy as np

import art, evaluate, train_asker, train_truster

LIMIT = int(os.environ.get("LIMIT", 300))  # questions of each split
RUNS = os.environ.get("RUNS", "runs")

def kit(command):
    \"\"\"Run a script of the kit and show what it prints.\"\"\"
    words = [sys.executable, *command.split(), "--limit", str(LIMIT), "--runs", RUNS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="")
    assert process.returncode == 0, "see the last line above"
""")
md("""
## 1. Which of these drafts are wrong?

Below are five answers that the toy's language model gave. Before you run the cell after them, write down which are wrong.
""")
code("""
shipped = art.load_run("docs/runs/toy")  # a finished run, one column for each figure: no model is needed
some = random.Random(3).sample(range(len(shipped["id"])), 5)
for number, i in enumerate(some, 1):
    print(f"{number}. {shipped['question'][i]}\\n{shipped['candidates.draft.text'][i]}\\n")
""")
code("""
for number, i in enumerate(some, 1):
    verdict = "right" if shipped["right.initial"][i] else f"wrong, it is {shipped['answer'][i]}"
    print(f"{number}. {verdict}; the Asker thought: wrong with probability {shipped['ask.asker.p_refine'][i]:.2f}; "
          f"the LLM itself: {shipped['ask.self.p_refine'][i]:.2f}")
""")
md("""
You had to read the draft *against the question*. That is what the Asker has to learn, and what the LLM itself does badly.

## 2. One question through the four steps

First the LLM answers the training questions several times. The right and the wrong answers are all that Asker and Truster will
ever learn from.
""")
code("""
kit("data/toy/prepare.py") if False else subprocess.run([sys.executable, "data/toy/prepare.py"], check=True)
kit("art.py sample")
""")
md("""
The prompts, as the models see them. Every step is a text that goes on.
""")
code("""
args = art.parse(art.make_parser(""), ["--limit", str(LIMIT), "--runs", RUNS])
train = art.load_split(args, "train")
record = train[0]
sampled = art.load_samples(args, train)[record["id"]]["samples"]
draft = next((one for one in sampled if not one["correct"]), sampled[0])["text"]
asked = art.subquestions_of(record)
for step, prompt in {"1 predict": art.predict_prompt(record), "2 ask": art.ask_prompt(record, draft),
                     "3 refine": art.refine_prompt(record, draft, asked), "4 trust": art.trust_prompt(record, draft)}.items():
    print(f"=== {step}\\n{prompt}\\n")
""")
md("""
## 3. What the Asker and the Truster learn

The **Asker** sees question and draft, and learns to write the sub-questions of the gold solution and `Refine: Yes` if the draft
is wrong. Its loss is the cross-entropy of the text plus that of the one deciding word, in which right and wrong drafts weigh the
same. The **Truster** sees one answer and gives a number; its loss is `-log sigmoid(chosen - rejected)` over all pairs of a right
(chosen) and a wrong (rejected) sample of a question.
""")
code("""
print(art.ask_prompt(record, draft) + art.ask_target(asked, refine=True))
texts = art.labels_of({"samples": sampled})
print("\\nof the samples of this question", sum(texts.values()), "are chosen and", len(texts) - sum(texts.values()), "rejected")
import torch
print("pair losses if the right one is 2 points ahead, level, 2 behind:",
      [round(float(train_truster.pair_losses(torch.tensor([gap, 0.0]), torch.tensor([True, False]))), 3) for gap in (2.0, 0.0, -2.0)])
""")
code("""
kit("train_asker.py")
kit("train_truster.py")
""")
code("""
import json
def curve(adapter):
    return json.loads(open(f"{RUNS}/toy/default/{adapter}/args.json").read())["curve"]

figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for ax, adapter, part in ((axes[0], "asker", "decision"), (axes[1], "truster", "pairs")):
    points = [(point["step"], point[part]) for point in curve(adapter) if part in point]
    ax.plot(*zip(*points)); ax.axhline(0.693, ls=":", color="k"); ax.set(title=f"{adapter}: {part} (dotted: a coin)", xlabel="step")
""")
md("""
## 4. The table, row by row, by hand

`evaluate.py` asks every model about every question of dev and test once. Every row of the paper then follows in one line.
""")
code("""
kit("evaluate.py")
""")
code("""
run = art.load_run(f"{RUNS}/toy/default")
results = json.loads(open(f"{RUNS}/toy/default/results.json").read())
threshold = {row["row"]: row["threshold"] for row in results["rows"]}

draft_right, refined_right = run["right.initial"], run["right.refine_always"]
doubted = run["ask.asker.p_refine"] >= threshold["art"]
trusted = run["trust.truster.refined"] > run["trust.truster.draft"]
rows = {
    "initial": draft_right,
    "refine_always": refined_right,
    "asker": np.where(run["ask.asker.p_refine"] >= threshold["asker"], refined_right, draft_right),
    "art": np.where(doubted & trusted, refined_right, draft_right),
    "oracle_choice": draft_right | refined_right,
}
for name, right in rows.items():
    mended, broken = (right & ~draft_right).sum(), (~right & draft_right).sum()
    print(f"{name:14} {right.mean():6.1%}   mended {mended:3}   broken {broken:3}")
    assert np.isclose(right.mean(), next(row["accuracy"] for row in results["rows"] if row["row"] == name))
""")
md("""
Why not refine always? Because it breaks. Why not only where the LLM itself wants to? See `self_refine` above.

Is the difference larger than chance? Only questions on which two rows differ tell anything:
""")
code("""
evaluate.compare(rows["art"], rows["initial"])
""")
md("""
## 5. What did the Asker learn?

**By kind of question.** Each text of the toy sets one trap.
""")
code("""
for kind in np.unique(run["kind"]):
    of = run["kind"] == kind
    print(f"{kind:10} {of.mean():4.0%} of the questions: draft {draft_right[of].mean():4.0%}, refined {refined_right[of].mean():4.0%}, "
          f"ART {rows['art'][of].mean():4.0%}")
""")
md("""
**Calibration.** Of the drafts with `p_refine` about 0.7, are 70% wrong?
""")
code("""
p, wrong = shipped["ask.asker.p_refine"], ~shipped["right.initial"]
bins = np.minimum((p * 10).astype(int), 9)
points = [(p[bins == b].mean(), wrong[bins == b].mean(), (bins == b).sum()) for b in np.unique(bins)]
figure, ax = plt.subplots(figsize=(4, 4), layout="constrained")
ax.plot([0, 1], [0, 1], ":k")
ax.scatter([x for x, _, _ in points], [y for _, y, _ in points], [max(8, n / 3) for *_, n in points])
ax.set(xlabel="p_refine", ylabel="share of wrong drafts", title=f"the shipped run; AUC {art.auc(p, wrong):.3f}")
""")
md("""
**Does it read the draft, or the question alone?** Row `cheap_gate` is a regression on words of the question and the length of the
draft. If it decided as well as the Asker, the Asker would have learned nothing worth its name.
""")
code("""
kit("evaluate.py --rows cheap_gate,art_untuned")
""")
md("""
**Right by accident.** A refinement may be right though a step of it is wrong, or repeat the draft's answer. How often?
""")
code("""
same = run["candidates.draft.answer"] == run["candidates.refined.answer"]
print(f"{same.mean():.0%} of the refinements have the draft's answer; of the others {refined_right[~same].mean():.0%} are right")
""")
md("""
## 6. Change one thing

What are the sub-questions worth? Replace one function and ask again: the kit notices that the prompt is another one, and asks
only what is new. (In a script you would edit `art.refine_prompt` and run `evaluate.py --run plain --asker-from default
--truster-from default`, then `--compare default plain`.)
""")
code("""
kept = art.refine_prompt

def without_subquestions(record, draft, subquestions=(), facts=False, show_draft=True):
    return kept(record, draft, (), facts, True)

test = art.load_split(args, "test")[:100]
the_run = art.Run(args)
drafts = art.predict(the_run.model("llm"), args, test, args.draft_temperature)
asked = art.ask(the_run.model("asker"), args, test, drafts)
shares = {}
for name, function in {"with sub-questions": kept, "without": without_subquestions}.items():
    art.refine_prompt = function
    refined = art.refine(the_run.model("llm"), args, test, drafts, asked)
    shares[name] = np.array([art.verdict(args.task, new, record["answer"]) for new, record in zip(refined, test)])
art.refine_prompt = kept
print({name: f"{right.mean():.0%}" for name, right in shares.items()}, evaluate.compare(*shares.values()))
""")
md("""
## 7. A real model, replayed

The toy was built so that sub-questions help. What happens with a real model on real questions? Its answers are in `docs/runs/`; how they were
made stands in [docs/results.md](docs/results.md).
""")
code("""
real = art.load_run("docs/runs/gsm8k-offline")
for name in ("initial", "self_refine", "refine_always", "asker", "art", "oracle_choice"):
    right = real[f"right.{name}"]
    print(f"{name:14} {right.mean():6.1%}   mended {(right & ~real['right.initial']).sum():3}   broken {(~right & real['right.initial']).sum():3}")
print(evaluate.compare(real["right.art"], real["right.initial"]))
print("AUC of the Asker", art.auc(real["ask.asker.p_refine"], ~real["right.initial"]))
""")
md("""
## 8. GSM8K on a T4 (not run here)

These cells need a GPU and a network. A free session may end at any time; runs are copied to Drive if you want that.
""")
code("""
DRIVE = False  # True: keep runs in your Drive, and bring back what an earlier session left there
KEEP = "/content/drive/MyDrive/art"
if DRIVE:
    from google.colab import drive
    drive.mount("/content/drive")
    !mkdir -p {KEEP}/runs runs && rsync -a --ignore-existing {KEEP}/runs/ runs

def step(command):
    \"\"\"Run one step; with DRIVE copy the runs every ten minutes and at its end.\"\"\"
    save = f"flock /tmp/save rsync -a --delete runs/ {KEEP}/runs" if DRIVE else "true"
    !(while sleep 600; do {save}; done) > /dev/null 2>&1 & {sys.executable} {command}; kill $!; {save}
""", "t4")
code("""
step("data/prepare.py gsm8k")
step("art.py sample --task gsm8k --preset t4 --limit-train 300")
""", "t4")
code("""
step("train_asker.py --task gsm8k --limit-train 300")
step("train_truster.py --task gsm8k --limit-train 300")
""", "t4")
code("""
step("evaluate.py --task gsm8k")
""", "t4")
md("""
## 9. Your report

Write three sentences: what ART gained on the toy and on the real model, with the interval; which of the four steps limits it
there; and what you would change first. Exercises: [docs/exercises.md](docs/exercises.md).
""")
nb={"cells":cells,"metadata":{"kernelspec":{"display_name":"Python 3","language":"python","name":"python3"},"language_info":{"name":"python"}},"nbformat":4,"nbformat_minor":5}
for i,c in enumerate(cells): c["id"]=f"cell{i}"; c["source"]=c["source"].splitlines(keepends=True)
json.dump(nb,open(sys.argv[1],"w"),ensure_ascii=False,indent=1); open(sys.argv[1],"a").write("\n")
