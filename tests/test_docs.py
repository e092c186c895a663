"""What stands in two places says the same."""

import json
import tomllib

import art


def lines(name):
    return [line for line in (art.ROOT / name).read_text("utf-8").splitlines() if not line.startswith(("#", "-"))]


def test_uv_and_pip_install_the_same():
    about = tomllib.loads((art.ROOT / "pyproject.toml").read_text("utf-8"))
    assert about["project"]["dependencies"] == lines("requirements.txt")
    assert about["dependency-groups"]["dev"] == lines("requirements-dev.txt")


def shipped_rows(run):
    """{row: the cells that a table of the README has for it} of a run in docs/runs."""
    rows = json.loads((art.ROOT / "docs/runs" / run / "results.json").read_text("utf-8"))["rows"]
    return {row["row"]: ["{:.1%} ({:.1%} to {:.1%})".format(row["accuracy"], *row["ci95"]),
                         art.show(row.get("mended"), "d"), art.show(row.get("broken"), "d"), f"{row['tokens']:,.0f}"]
            for row in rows}


def test_tables_are_those_of_the_shipped_runs():
    """The README's first table is the toy's, the second the real run's; results.md has more of the real one."""
    readme = (art.ROOT / "README.md").read_text("utf-8").partition("## A real model")
    results = (art.ROOT / "docs/results.md").read_text("utf-8").partition("## A real model")[2]
    for text, run, least in ((readme[0], "toy", 6), (readme[2], "gsm8k-offline", 5), (results, "gsm8k-offline", 13)):
        rows, found = shipped_rows(run), 0
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] in rows and len(cells) in (5, 7):
                assert [cells[1], *cells[-3:]] == rows[cells[0]], line
                found += 1
        assert found >= least, run
