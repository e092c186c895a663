"""Draw the method and what a finished run gained into results.png beside results.json.

    python docs/plot.py runs/toy/default      # needs matplotlib
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import art

FROZEN, TRAINED = "#c6d8ec", "#f6c58f"  # the LLM; the Asker and the Truster
ROWS = {"draft": "the draft", "self_refine": "self-refinement", "art": "ART",
        "oracle_choice": "best choice (sees gold)"}


def flow(axes):
    """The four steps, with the branch after the Asker."""
    boxes = {"predict": (0, 3, "1 predict", "LLM writes a draft", FROZEN),
             "ask": (0, 2, "2 ask", "Asker: sub-questions,\nrefine?", TRAINED),
             "refine": (0, 1, "3 refine", "LLM answers along\nthe sub-questions", FROZEN),
             "trust": (0, 0, "4 trust", "Truster scores\nboth answers", TRAINED),
             "draft": (1.25, 2, "the draft is kept", "", "white"),
             "better": (1.25, 0, "the better one is kept", "", "white")}
    for x, y, title, text, colour in boxes.values():
        axes.text(x, y, f"{title}\n{text}".strip(), ha="center", va="center", fontsize=11,
                  bbox={"boxstyle": "round,pad=0.5", "fc": colour, "ec": "0.4"})
    arrows = [("predict", "ask", ""), ("ask", "refine", "yes"), ("refine", "trust", ""),
              ("ask", "draft", "no"), ("trust", "better", "")]
    for start, end, label in arrows:
        (x, y), (to_x, to_y) = boxes[start][:2], boxes[end][:2]
        sideways = y == to_y
        tail = (x + 0.42, y) if sideways else (x, y - 0.32)
        head = (to_x - 0.42, to_y) if sideways else (to_x, to_y + 0.32)
        axes.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": "0.3"})
        if label:
            axes.text((tail[0] + head[0]) / 2 + 0.12 * (not sideways),
                      (tail[1] + head[1]) / 2 + 0.1 * sideways, label, ha="center", fontsize=11)
    axes.set(xlim=(-0.6, 1.85), ylim=(-0.6, 3.5))
    axes.set_title("blue: the LLM, never trained; orange: small, fine-tuned", fontsize=12)
    axes.axis("off")


def bars(axes, rows, n):
    """Accuracy of four rows with intervals; how many drafts were fixed and broken."""
    for place, name in enumerate(ROWS):
        row = rows[name]
        middle, (low, high) = 100 * row["accuracy"], row["ci95"]
        colour = {"art": TRAINED, "oracle_choice": "0.88"}.get(name, FROZEN)
        axes.barh(place, middle, color=colour, ec="0.4",
                  xerr=[[middle - 100 * low], [100 * high - middle]], capsize=3)
        text = f"{middle:.1f}%"
        if name != "draft":
            text += f"\n+{row['fixed']} fixed, \N{MINUS SIGN}{row['broken']} broken"
        axes.text(1.5, place, text, va="center", fontsize=11)
    axes.set_yticks(range(len(ROWS)), ROWS.values(), fontsize=11)
    axes.invert_yaxis()
    axes.set_xlabel(f"correct in % of {n:,} test questions (95% intervals)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    if len(sys.argv) != 2:
        raise art.UserError("give the folder of one finished run, as runs/toy/default")
    path = Path(sys.argv[1]) / "results.json"
    if not path.is_file():
        raise art.UserError(f"{path} is missing: run python evaluate.py")
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    results = json.loads(path.read_text("utf-8"))
    rows = {row["row"]: row for row in results["rows"]}
    if missing := [row for row in ROWS if row not in rows]:
        raise art.UserError(f"{path} has no row {', '.join(missing)}: run python evaluate.py "
                            f"--task {results['task']} --rows {','.join(missing)}")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    flow(left)
    bars(right, rows, results["n"])
    figure.suptitle(f"Ask, Refine, and Trust on {results['task']}, "
                    f"LLM {results['settings']['model']}", fontsize=13)
    figure.savefig(path.with_name("results.png"), dpi=120)
    print(path.with_name("results.png"))


if __name__ == "__main__":
    art.run(main)
