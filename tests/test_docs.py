"""The documents agree with the code and the shipped runs."""

import functools
import json
import re
import subprocess
import sys

import pytest

import art
import evaluate

DOCS = ["README.md", *(path.relative_to(art.ROOT).as_posix()
                       for path in sorted((art.ROOT / "docs").rglob("*.md")) if "runs" not in path.parts)]


def read(name):
    return (art.ROOT / name).read_text("utf-8")


# --- Tables


def rows_of(text):
    """[{heading: cell}, ...]: the lines of the tables whose first heading is "row"."""
    rows, headings = [], None
    for line in text.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            headings = None
        elif headings is None:
            headings = cells
        elif headings[0] == "row" and not line.startswith("| ---"):
            rows.append(dict(zip(headings, cells, strict=True)))
    return rows


@pytest.mark.parametrize("name, start, end, run, least", [
    ("README.md", "<!-- toy table -->", "\n## ", "toy", 5),
    ("docs/results.md", "## A real model", "\n### StrategyQA", "gsm8k-offline", 12),
    ("docs/results.md", "### StrategyQA", "\n## ", "strategyqa", 9),
])
def test_table_is_that_of_the_shipped_run(name, start, end, run, least):
    """Every cell. `p` and the share are from results.json, the range over seeds from check.md."""
    shipped = {row["row"]: row for row in rows_of(read(f"docs/runs/{run}/table.md"))}
    seeds = dict(re.findall(r"(?m)^\| (\w+) \| (.*) \|$", read("docs/runs/toy/check.md")))
    for row in json.loads(read(f"docs/runs/{run}/results.json"))["rows"]:
        shares = [float(share) for share in seeds.get(row["row"], "0").split(" | ")]
        shipped[row["row"]] |= {
            "correct (seed 0)": f"{row['accuracy']:.1%}",
            "lowest to highest of three training seeds": f"{min(shares):.1%} to {max(shares):.1%}",
            "p": f"{row['vs_draft']['p']:.2g}" if "vs_draft" in row else "-"}
    rows = rows_of(read(name).partition(start)[2].partition(end)[0])
    assert len(rows) >= least
    for row in rows:
        assert row.items() <= shipped[row["row"]].items()


# --- Commands


def code_of(text):
    """The inline code and the commands in code blocks, each in one line and without comments."""
    outside, inside = (text.replace("\\\n", " ").split("```")[start::2] for start in (0, 1))
    found = re.findall(r"`([^`]+)`|^ {4}(python .+)", "\n".join(outside), re.MULTILINE)
    lines = [inline or line for inline, line in found] + "\n".join(inside).splitlines()
    return [" ".join(line.split("  #")[0].split()) for line in lines]


@functools.cache
def flags_of(script):
    """The flags in the --help of a script; none if it has no --help."""
    made = subprocess.run([sys.executable, art.ROOT / script, "--help"], capture_output=True,
                          text=True, cwd=art.ROOT)
    return {*re.findall(r"--[a-z][a-z-]*", made.stdout)}


@pytest.mark.parametrize("name", [*DOCS, "Makefile"])
def test_commands_have_scripts_flags_and_rows_that_exist(name):
    lines = read(name).splitlines() if name == "Makefile" else code_of(read(name))
    for line in lines:
        for script, rest in re.findall(r"python (\S+\.py)(.*)", line):
            assert (art.ROOT / script).is_file(), line
            assert {*re.findall(r"(?<!\S)--[a-z-]+", rest)} <= flags_of(script), line
        for names in re.findall(r"--(?:rows|row|against) ([\w,]+)", line):
            assert {*names.split(",")} <= {*evaluate.ROWS, "all"}, line


@pytest.mark.parametrize("name", DOCS)
def test_flags_that_are_named_alone_exist(name):
    scripts = ["art.py", "evaluate.py", "train_asker.py", "train_truster.py", "data/sample.py",
               "data/prepare.py", "data/toy/prepare.py", "docs/teach/mark.py"]
    known = {flag for script in scripts for flag in flags_of(script)}
    foreign = {"--gpu-memory-utilization", "--continuous-batching",  # of vLLM and transformers
               "--extra-index-url", "--torch-backend"}  # of pip and uv
    named = {line.split()[0] for line in code_of(read(name)) if line.startswith("--")}
    assert named <= known | foreign


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_to_files_and_headings(name):
    for target in re.findall(r"\]\((?!http)([^)\s]*)\)", read(name)):
        path, _, heading = target.partition("#")
        path = (art.ROOT / name).parent / path if path else art.ROOT / name
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)", path.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
            assert heading in slugs, target
