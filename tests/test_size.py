"""The sizes of the house, and what no file may say."""

import re

import pytest
from conftest import ROOT

# Files: lines and bytes at most. The aims are 1,400 lines and 60,000 bytes for art.py, 500 and 27,000
# for evaluate.py, 260 lines for data/ and 2,000 for tests/. A number here may only go down.
SIZES = {
    "art.py": (1_728, 81_900), "evaluate.py": (533, 26_600), "train_*.py": (250, None),
    "data/*.py": (322, None), "tests/**/*.py": (2_000, None),
}
FILES = [path for where in ("*.py", "data/**/*.py", "docs/**/*.py", "tests/**/*.py")
         for path in sorted(ROOT.glob(where))]
# Words that have plainer ones, and folders of the machine that the kit is written on. The
# brackets keep this file from finding itself.
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
