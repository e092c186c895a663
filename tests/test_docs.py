"""What stands in two places says the same."""

import tomllib

import art
import evaluate


def lines(name):
    return [line for line in (art.ROOT / name).read_text("utf-8").splitlines() if not line.startswith(("#", "-"))]


def test_uv_and_pip_install_the_same():
    about = tomllib.loads((art.ROOT / "pyproject.toml").read_text("utf-8"))
    assert about["project"]["dependencies"] == lines("requirements.txt")
    assert about["dependency-groups"]["dev"] == lines("requirements-dev.txt")


def rows(text):
    """[(row, [right, mended, broken, tokens]), ...] of the tables in a text that show rows of evaluate.py."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [(row[0], [row[1], *row[-3:]]) for row in cells if row[0] in evaluate.ROWS and len(row) >= 5]


def test_tables_are_those_of_the_shipped_runs():
    """The README's first table is the toy's, the second the real run's; results.md has more, and StrategyQA's."""
    readme = (art.ROOT / "README.md").read_text("utf-8").partition("## A real model")
    results = (art.ROOT / "docs/results.md").read_text("utf-8").partition("## A real model")[2].partition("\n## ")[0]
    real, _, strategyqa = results.partition("\n### StrategyQA")
    for text, run, least in ((readme[0], "toy", 6), (readme[2], "gsm8k-offline", 5), (real, "gsm8k-offline", 13),
                             (strategyqa, "strategyqa", 9)):
        shipped = dict(rows((art.ROOT / "docs/runs" / run / "table.md").read_text("utf-8")))
        for row, cells in rows(text):
            assert cells == shipped[row], row
        assert len(rows(text)) >= least, run
