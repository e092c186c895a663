"""Documents, exercises and lesson agree with the code and the shipped runs."""

import functools
import json
import os
import re
import subprocess
import sys

import check
import exercises
import pytest
import solutions

import art
import evaluate

DOCS = ["README.md", *(path.relative_to(art.ROOT).as_posix()
                       for path in sorted((art.ROOT / "docs").rglob("*.md")) if "runs" not in path.parts)]


def read(name):
    return (art.ROOT / name).read_text("utf-8")


def python(*words, **env):
    """A finished Python process."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=art.ROOT, env=os.environ | env,
                          capture_output=True, text=True)


# --- Tables


def rows_of(text):
    """[{heading: cell}, ...]: the lines of the tables whose first heading is "row"."""
    rows = []
    for head, body in re.findall(r"(?m)^(\| row .*)\n\| ---.*\n((?:\|.*\n?)+)", text):
        names, *lines = [[cell.strip(" *") for cell in line.strip("|").split("|")]
                         for line in [head, *body.splitlines()]]
        rows += [dict(zip(names, cells, strict=True)) for cells in lines]
    return rows


@pytest.mark.parametrize("name, start, end, run, least", [
    ("README.md", "<!-- toy table -->", "\n## ", "toy", 5),
    ("docs/results.md", "## A real model", "\n### StrategyQA", "gsm8k", 12),
    ("docs/results.md", "### StrategyQA", "\n## ", "strategyqa", 9)])
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


def code_of(text):
    """The inline code and the commands in code blocks, each in one line and without comments."""
    outside, inside = (text.replace("\\\n", " ").split("```")[start::2] for start in (0, 1))
    found = re.findall(r"`([^`]+)`|^ {4}(python .+)", "\n".join(outside), re.MULTILINE)
    lines = [inline or line for inline, line in found] + "\n".join(inside).splitlines()
    return [" ".join(line.split("  #")[0].split()) for line in lines]


@functools.cache
def help_of(script):
    """(flags in the --help of a script, modules that Python imports for it)."""
    made = python("-X", "importtime", script, "--help")
    flags = {*re.findall(r"--[a-z][a-z-]*", made.stdout)}
    return flags, {*re.findall(r"(?m)\| +(\w+)$", made.stderr)}


SCRIPTS = ("art.py evaluate.py train_asker.py train_truster.py data/sample.py data/prepare.py "
           "data/toy/prepare.py docs/teach/mark.py").split()
FOREIGN = {"--gpu-memory-utilization", "--continuous-batching",  # of vLLM and transformers
           "--extra-index-url", "--torch-backend"}  # of pip and uv


def test_help_answers_at_once():
    for flags, imported in map(help_of, SCRIPTS):
        assert "--help" in flags and "argparse" in imported
        assert not imported & {"torch", "transformers", "peft", "bitsandbytes", "openai"}


@pytest.mark.parametrize("name", [*DOCS, "Makefile"])
def test_commands_have_scripts_flags_and_rows_that_exist(name):
    """So have flags that are named alone."""
    known = FOREIGN.union(*(help_of(script)[0] for script in SCRIPTS))
    for line in read(name).splitlines() if name == "Makefile" else code_of(read(name)):
        for script, rest in re.findall(r"python (\S+\.py)(.*)", line):
            assert (art.ROOT / script).is_file(), line
            assert {*re.findall(r"(?<!\S)--[a-z-]+", rest)} <= help_of(script)[0], line
        for names in re.findall(r"--(?:rows|row|against) ([\w,]+)", line):
            assert {*names.split(",")} <= {*evaluate.ROWS, "all"}, line
        assert not line.startswith("--") or line.split()[0] in known, line


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


def test_stubs_are_not_done_and_solutions_are():
    stubs, solved = check.check(exercises), check.check(solutions)
    assert {*stubs.values()} == {"not yet"} and {*solved.values()} == {"done"}
    assert stubs.keys() == solved.keys() and len(stubs) == 16
    text, made = check.in_docs(check.expected())
    assert text == made, "run python docs/exercises/check.py --docs"
    assert solutions.sign_test(2, 10) == pytest.approx(evaluate.mcnemar(2, 10))


@pytest.mark.parametrize("function, verdict", [
    (lambda *args: None, "gives None, expected ["),
    (lambda *args: 1 / 0, "ZeroDivisionError: division by zero (test_docs.py, line ")])
def test_checker_tells_what_is_wrong(monkeypatch, function, verdict):
    monkeypatch.setattr(exercises, "fixed_broken", function)
    assert check.check(exercises)["fixed_broken"].startswith(verdict)


def test_a_run_is_marked_on_the_data_of_a_student(copy):
    """Adapters that were trained on other data are refused. Those of another run are found."""
    copy("train_truster", "--run", "x")
    copy("evaluate", "--run", "x", "--asker-from", "default")
    command = "docs/teach/mark.py", copy.runs / "toy/x", "--student", "3", "--limit", "4"
    assert "40 questions that are not in this student's data" in python(*command).stderr
    for name in ("default/asker", "x/truster"):
        art.write(copy.runs / "toy" / name / "questions.txt", "")
    assert (marks := json.loads(python(*command).stdout))["rows"].keys() == marks["handed_in"].keys()


def test_the_lesson_runs_from_its_first_to_its_last_cell(tmp_path):
    """With few questions; the cells for Colab and for a T4 are left out."""
    cells = [cell for cell in json.loads(read("art.ipynb"))["cells"] if cell["cell_type"] == "code"]
    code = ["".join(cell["source"]) for cell in cells if not cell["metadata"].get("tags")]
    runs = (tmp_path / "runs").as_posix()  # the lesson splits commands as a shell does
    env = {"LIMIT": "40", "DATA": f"{runs}/data", "RUNS": runs, "MPLBACKEND": "Agg"}
    made = python("-c", "\n".join(code), **env)
    assert made.returncode == 0, made.stderr[-2000:]
    assert (tmp_path / "runs/toy/default/results.json").is_file()
