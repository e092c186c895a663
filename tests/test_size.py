"""The sizes of the house, and what no file may say."""

import re

import pytest
from conftest import ROOT

# Lines and bytes at most; a number may only go down. Aims: art.py 1,400 and 60,000, evaluate.py 500
# and 27,000, data/ 260 lines.
SIZES = {
    "art.py": (1_725, 81_900), "evaluate.py": (531, 26_600), "train_*.py": (250, None),
    "data/*.py": (322, None), "tests/**/*.py": (2_000, None)}
FILES = [path for where in ("*.py", "data/**/*.py", "docs/**/*.py", "tests/**/*.py")
         for path in sorted(ROOT.glob(where))]
# Words that have plainer ones, and folders of the author (the brackets keep this file out).
FORBIDDEN = re.compile(r"(?i)\b([a]new|[m]end(s|ed|ing)?|[w]hoever|in the [p]lace of)\b"
                       r"|/([w]ork|[r]oot|[o]pt)/|/[h]ome/\w|/[U]sers/")
HOSTS = {"raw.githubusercontent.com", "github.com", "huggingface.co", "arxiv.org",
         "download.pytorch.org", "localhost", "127.0.0.1"}


@pytest.mark.parametrize("files", SIZES)
def test_sizes(files):
    """Bytes count, too, so that nothing is won by dense lines."""
    texts = [path.read_text("utf-8") for path in ROOT.glob(files)]
    lines, size = SIZES[files]
    assert 0 < sum(text.count("\n") for text in texts) <= lines
    assert size is None or sum(len(text.encode()) for text in texts) <= size


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_and_hosts(path):
    text = path.read_text("utf-8")
    assert not FORBIDDEN.search(text)
    assert {*re.findall(r"https?://([\w.-]+)", text)} <= HOSTS
