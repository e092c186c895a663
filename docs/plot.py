"""Draw one question worked through the four steps, and what a finished run gained.

    python docs/plot.py runs/toy/default      # needs matplotlib

Writes steps.png (the question) and results.png (the question and six rows) beside results.json.
"""

import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import art

FROZEN, TRAINED = "#c6d8ec", "#f6c58f"  # the LLM; the Asker and the Truster
ROWS = {"draft": "draft", "self_refine": "self_refine\n(the LLM alone)",
        "word_gate": "word_gate\n(gate: one word)", "always_truster": "always_truster\n(no gate)",
        "art": "art", "best_of_k": "best_of_k\n(4 samples)",
        "oracle_choice": "oracle_choice\n(sees gold)"}


def example(records):
    """A short record that ART fixes; draft and refined answer have as many lines."""
    fixed = [record for record in records
             if record["correct"]["art"] and not record["correct"]["draft"]
             and record["draft"]["text"].count("\n") == record["refined"]["text"].count("\n")]
    if not fixed:
        raise art.UserError("row art fixed no answer in this run: there is nothing to draw")
    return min(fixed, key=lambda record: len(record["question"] + record["draft"]["text"]))


def flow(axes, record, threshold):
    """The four steps as boxes with the texts of a record."""
    draft, refined, asked = record["draft"], record["refined"], record["ask"]
    scores = [record[stage]["score"] for stage in ("score_draft", "score_refined")]
    boxes = [
        ("the question", record["question"], "white"),
        ("1 predict: the LLM writes a draft (incorrect)", draft["text"], FROZEN),
        ("2 ask: the Asker's sub-questions", "\n".join([
            *asked["subquestions"],
            f"p_refine = {asked['p_refine']:.2f}",
            f"below the threshold {threshold:.2f} the draft is kept; here: refine"]),
         TRAINED),
        ("3 refine: the LLM answers the sub-questions", refined["text"], FROZEN),
        ("4 trust: the Truster scores both answers",
         "draft {:.1f}, refined {:.1f}: the refined answer is kept".format(*scores), TRAINED)]
    y, middles = 0.0, []
    for title, text, colour in boxes:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 58)]
        height = 1.0 + 0.85 * len(lines)
        axes.text(0.5, y - height / 2, "\n".join([title, *lines]),
                  ha="center", va="center", fontsize=10, linespacing=1.25,
                  bbox={"boxstyle": "round,pad=0.4", "fc": colour, "ec": "0.4"})
        middles.append((y, y - height))
        y -= height + 0.9
    for (_, bottom), (top, _) in zip(middles, middles[1:]):
        axes.annotate("", (0.5, top - 0.05), (0.5, bottom - 0.25),
                      arrowprops={"arrowstyle": "-|>", "color": "0.3"})
    axes.set(xlim=(0, 1), ylim=(y + 0.5, 0.4))
    axes.set_title("blue: the LLM, not fine-tuned; orange: fine-tuned", fontsize=12)
    axes.axis("off")


def bars(axes, rows, n):
    """Accuracy of at most six rows with intervals; how many drafts were fixed and broken."""
    names = [name for name in ROWS if name in rows][:6]
    for place, name in enumerate(names):
        row = rows[name]
        middle, (low, high) = 100 * row["accuracy"], row["ci95"]
        colour = "0.65" if name == "art" else "0.88"
        axes.barh(place, middle, color=colour, ec="0.4",
                  xerr=[[middle - 100 * low], [100 * high - middle]], capsize=3)
        text = f"{middle:.1f}%"
        if name != "draft":
            text += f"   +{row['fixed']} fixed, \N{MINUS SIGN}{row['broken']} broken"
        axes.text(1.5, place, text, va="center", fontsize=10)
    axes.set_yticks(range(len(names)), [ROWS[name] for name in names], fontsize=11)
    axes.invert_yaxis()
    axes.set_xlabel(f"correct in % of {n:,} test questions (95% intervals)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    if len(sys.argv) != 2:
        raise art.UserError("give the folder of one finished run, as runs/toy/default")
    folder = Path(sys.argv[1])
    records = art.read_jsonl(folder / "records.jsonl", "run python evaluate.py")
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    results = json.loads((folder / "results.json").read_text("utf-8"))
    rows = {row["row"]: row for row in results["rows"]}
    if "art" not in rows:
        raise art.UserError(f"{folder} has no row art: run python evaluate.py")
    for name, width, columns in ("steps.png", 6.5, 1), ("results.png", 12, 2):
        figure, axes = pyplot.subplots(1, columns, figsize=(width, 6.5), layout="constrained",
                                       squeeze=False)
        flow(axes[0, 0], example(records), rows["art"]["threshold"])
        if columns == 2:
            bars(axes[0, 1], rows, results["n"])
        figure.savefig(folder / name, dpi=120)
        print(folder / name)


if __name__ == "__main__":
    art.run(main)
