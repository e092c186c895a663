"""The lesson runs from its first to its last cell."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def test_lesson(tmp_path):
    """With few questions; the cells for Colab and for a T4 are left out."""
    cells = json.loads((ROOT / "art.ipynb").read_text("utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code" and not cell["metadata"].get("tags")]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    runs = (tmp_path / "runs").as_posix()  # the lesson splits commands as a shell does
    env = os.environ | {"LIMIT": "40", "DATA": f"{runs}/data", "RUNS": runs, "MPLBACKEND": "Agg"}
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert (tmp_path / "runs/toy/default/results.json").is_file()
