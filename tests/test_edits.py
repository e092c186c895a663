"""An edit is seen: what a student changes in a copy of the kit changes the table, or is refused; not so a comment."""

import shutil

import pytest
from conftest import ROOT, asked_of, edit

import art
import evaluate

EMPTIED = '''
_as_it_was = refine_prompt


def refine_prompt(record, draft, subquestions=(), facts=False, show_draft=True):
    return _as_it_was(record, draft, (), facts, show_draft)


def main():'''


@pytest.fixture
def own(copy, tmp_path):
    """The finished run beside a copy of the scripts that a test may edit."""
    shutil.copytree(ROOT / "data/toy/base", tmp_path / "code/data/toy/base")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path / "code")
    copy.root = tmp_path / "code"
    return copy


def said(own):
    """{file: bytes} of all that models said."""
    return {path.name: path.read_bytes() for path in own.runs.glob("toy/said/*.jsonl")}


def records(own):
    return art.read_jsonl(own.runs / "toy/default/records.jsonl", "")


def test_a_comment_changes_nothing(own):
    """In every script: nothing is asked, nothing is trained, and the table stays."""
    for path in own.root.glob("*.py"):
        edit(path, "\ndef main():", '\n# A comment.\n\ndef main():\n    """A docstring."""')
    edit(own.root / "train_truster.py", '    """-log sigmoid(', '    # A comment.\n    """Minus log sigmoid(')
    table, before = (own.runs / "toy/default/table.md").read_text(), said(own)
    outs = [own(script)[0] for script in ("train_asker", "train_truster", "evaluate")]
    assert not any(map(asked_of, outs)) and said(own) == before
    assert [out.count("is trained already: nothing to do") for out in outs] == [2, 1, 0]
    assert (own.runs / "toy/default/table.md").read_text() == table
    assert not any(own.log()["asked"].values())


def test_an_emptied_prompt_changes_the_table(own):
    """Sub-questions left out of the refinement: no old row stays beside a new one; drafts and asks are known."""
    old = records(own)
    edit(own.root / "art.py", "\ndef main():", EMPTIED)
    out, _ = own("evaluate", "--rows", "initial")
    assert own.results().keys() == {"initial"} and not asked_of(out)
    assert "Left out: art;" in out and "--rows art" in out
    asked = asked_of(own("evaluate", "--rows", "art")[0])
    assert asked["refined"] == 24 and not asked.keys() - {"refined", "trust"}
    some, asked = own.results(), asked_of(own("evaluate")[0])  # self-refinement has the same prompts now
    new, fresh, keys = records(own), own.results(), ("accuracy", "mended", "broken", "tokens", "threshold")
    assert not asked and fresh.keys() == set(evaluate.DEFAULT_ROWS)
    assert "art" in some and all(row.get(key) == fresh[name].get(key) for name, row in some.items() for key in keys)
    for stage, same in (("draft", True), ("refined", False)):
        assert ([row["candidates"][stage] for row in old] == [row["candidates"][stage] for row in new]) == same
    assert fresh["refine_always"]["accuracy"] == sum(row["right"]["refine_always"] for row in new) / 12


@pytest.mark.parametrize(("script", "adapter", "old", "new", "named"), [
    ("train_truster", "truster", "-logsigmoid(", "-2 * logsigmoid(", "the code of pair_losses"),
    ("train_asker", "asker", "text[row, -2], decision[row, -2] = 0.0, ", "text[row, -2], decision[row, -2] = 1.0, ",
     "the code of make_collate"),
])
def test_an_edited_loss_is_refused(own, script, adapter, old, new, named):
    """With the name of the function; nothing is touched. `--overwrite` trains anew."""
    edit(own.root / f"{script}.py", old, new)
    path = own.runs / "toy/default" / adapter / "adapter_model.safetensors"
    before = path.read_bytes()
    _, err = own(script, code=2)
    assert named in err and "--overwrite" in err and err.strip().startswith("error: ") and "Traceback" not in err
    assert path.read_bytes() == before
    own(script, "--overwrite")
    assert path.read_bytes() != before
