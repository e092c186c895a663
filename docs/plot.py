"""Draw a finished run as two panels into results.png beside its results.json. Needs matplotlib.

    python docs/plot.py runs/toy/default
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import art
import evaluate

COLOURS = {"the paper's rows": "C0", "controls": "0.6", "upper bounds, which look at gold": "0.85"}


def bars(axes, rows):
    """Accuracy of every row with its interval, in groups."""
    names = [(name, group) for group, names in evaluate.GROUPS.items() for name in names if name in rows]
    for place, (name, group) in enumerate(names):
        row = rows[name]
        middle, (low, high) = 100 * row["accuracy"], row["ci95"]
        axes.barh(place, middle, color="C1" if name == "art" else COLOURS[group],
                  xerr=[[max(0, middle - 100 * low)], [max(0, 100 * high - middle)]], capsize=2)
    axes.set_yticks(range(len(names)), [name for name, _ in names])
    axes.invert_yaxis()
    axes.axvline(100 * rows["initial"]["accuracy"], color="k", lw=0.8, ls=":")
    axes.set_xlabel("right answers in % (95% intervals)")
    axes.set_title("Does refining gain over the draft (dotted)?\nblue: the paper's rows, orange: ART, light: bounds",
                   fontsize=10)


def costs(axes, rows):
    """Accuracy over tokens a question, labelled directly."""
    for name, row in rows.items():
        if name.startswith(("oracle", "asker_oracle", "gold", "random")):
            continue
        axes.plot(row["tokens"], 100 * row["accuracy"], "o", color="C1" if name == "art" else "C0", ms=4)
        axes.annotate(name, (row["tokens"], 100 * row["accuracy"]), xytext=(4, 3), textcoords="offset points",
                      fontsize=8)
    axes.margins(x=0.2, y=0.1)
    axes.set_xlabel("tokens a question, all models, read and written")
    axes.set_title("What does a right answer cost?\nhigher and further left is better", fontsize=10)


def main():
    if len(sys.argv) != 2:
        raise art.UserError("give the folder of one finished run, as runs/toy/default")
    path = Path(sys.argv[1]) / "results.json"
    if not path.is_file():
        raise art.UserError(f"{path} is missing: make it with evaluate.py")
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    results = json.loads(path.read_text("utf-8"))
    rows = {row["row"]: row for row in results["rows"]}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    bars(left, rows)
    costs(right, rows)
    figure.suptitle(f"{results['task']}, {results['n']:,} test questions, LLM {Path(results['llm']).name}")
    figure.savefig(path.with_name("results.png"), dpi=120)
    print(path.with_name("results.png"))


if __name__ == "__main__":
    art.run(main)
