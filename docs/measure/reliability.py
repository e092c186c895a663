"""Kill each script 20 times, and run one twice at once: is anything lost, doubled or different?

    python docs/measure/reliability.py              # half an hour on one core; Linux or macOS

Each script first runs without a kill. In a second folder the same command gets SIGKILL, by turns
right after a change of its files (often in the middle of a write) and at a random time. After every
kill all finished work must be readable; in the end all must equal the first run bit for bit.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {  # small batches and a checkpoint after every step: many places to be killed at
    "data/sample.py": ["--bits", "32", "--kv-gib", "0.01"],
    "train_asker.py": ["--adapter-bits", "32", "--asker-batch", "8", "--save-steps", "1"],
    "train_truster.py": ["--adapter-bits", "32", "--truster-batch", "4", "--save-steps", "1"],
    "evaluate.py": ["--kv-gib", "0.01"],
}


def start(script, runs):
    """The script in a new process."""
    flags = [*SCRIPTS[script], "--data", runs.parent / "data", "--runs", runs]
    return subprocess.Popen([sys.executable, ROOT / script, *flags], stdout=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def files(runs):
    """{path: (size, time)} of all files; those ending in -journal or .part are being written."""
    found = {}
    for folder, _, names in os.walk(runs):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # it was renamed at this moment
                found[path] = os.stat(path).st_size, os.stat(path).st_mtime_ns
    return found


def kill(process, runs, changes, seconds):
    """Kill a process after so many changes (None: after the seconds); False if it ended before."""
    end, seen = time.time() + seconds, files(runs)
    while process.poll() is None and (changes or changes is None and time.time() < end):
        time.sleep(0.0005)
        if changes and seen != (seen := files(runs)):
            changes -= 1
    process.kill()
    return {-9: True, 0: False}[process.wait()]


def finished(runs):
    """{name: what is finished}, all of it readable."""
    made, task = {}, runs / "toy"
    if (task / "answers.sqlite").is_file():
        with contextlib.closing(sqlite3.connect(task / "answers.sqlite")) as cache:
            assert cache.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            if cache.execute("SELECT name FROM sqlite_master").fetchone():
                made.update(cache.execute("SELECT key, output FROM answers"))
    for path in task.glob("default/*/checkpoint.pt"):
        made[f"{path.parent.name}: step"] = torch.load(path, weights_only=True)["step"]
    for path in [*task.glob("*.jsonl"), *task.glob("default/*.jsonl"), *task.glob("default/*.md")]:
        made[path.name] = path.read_text("utf-8")
    for path in [*task.glob("*.json"), *task.glob("default/*.json"), *task.glob("*/*/args.json")]:
        about = json.loads(path.read_text("utf-8"))
        for key in about if about.get("finished", True) else ():
            if key not in ("seconds", "commit"):
                made[f"{path.parent.name}: {key}"] = json.dumps(about[key])
        if about.get("finished"):
            made[f"{path.parent.name}: weights"] = (path.parent / "adapter_model.safetensors").read_bytes()
    return made


def check(before, after):
    """Refuse what is lost or different; a checkpoint may be a later one."""
    for name, value in before.items():
        later = isinstance(value, int) and after.get(name, 0) > value
        assert later or after.get(name) == value, f"lost or different: {name}"


def verdict(expected, runs):
    """Refuse other results than the expected ones; else a sentence about them."""
    check(expected, finished(runs))
    check(finished(runs), expected)
    cache = sqlite3.connect(runs / "toy/answers.sqlite")
    [again] = cache.execute("SELECT MAX(rowid) - COUNT(*) FROM answers").fetchone()  # new numbers
    return f"all {len(expected):,} results are equal, {again} answers were generated twice"


def measure(script, whole, killed, kills):
    """Run the script in `whole`, kill it in `killed`, and print what was found."""
    counts, torn, ended, rng, before = [0, 0], 0, 0, random.Random(script), f"{killed}.before"
    state = finished(shutil.copytree(shutil.copytree(whole, before), killed))
    began, code = time.time(), start(script, whole).wait()
    seconds, expected = time.time() - began, finished(whole)
    while sum(counts) < kills:
        way, wait = (sum(counts) + ended) % 2, rng.uniform(0.3, 1) * seconds
        if kill(start(script, killed), killed, None if way else rng.randint(1, 25), wait):
            counts[way] += 1
            torn += any(path.endswith(("-journal", ".part")) for path in files(killed))
            check(state, state := finished(killed))
        else:  # it came to its end: begin again
            verdict(expected, killed)
            shutil.rmtree(killed)
            state, ended = finished(shutil.copytree(before, killed)), ended + 1
    assert code == start(script, killed).wait() == 0
    print(f"{script}: {counts[0]} kills after a change, {counts[1]} at a random time, {torn} left "
          f"a half-written file, {ended} ends between; {verdict(expected, killed)}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each script (default 20)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, sizes = Path(temporary), "--train 60 --dev 30 --test 30 --out".split()
        command = [sys.executable, ROOT / "data/toy/prepare.py", *sizes, folder / "data/toy"]
        subprocess.run(command, check=True)
        (whole := folder / "whole").mkdir()
        for number, script in enumerate(SCRIPTS):
            measure(script, whole, folder / f"killed{number}", args.kills)
            if number == 0:
                pair = [start(script, both := folder / "both"), start(script, both)]
                assert [process.wait() for process in pair] == [0, 0]
                print(f"{script} twice at once: both end; {verdict(finished(whole), both)}")


if __name__ == "__main__":
    main()
