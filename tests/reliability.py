"""What is too slow for the test suite: scripts killed 20 times each, and two processes on one folder at once.

    python tests/reliability.py kills                        # every script; `--script evaluate` for that one alone
    python tests/reliability.py two                          # two times `art.py sample` on the same runs folder
    python -m pytest tests/test_properties.py --hypothesis-profile=thorough      # 10,000 random texts a parser

A script runs once without interruption. In another folder the same command is killed (SIGKILL) by turns right behind a
write to its files, in the middle of a write, and at a random moment; each time it is started again, and at last runs to
its end. Then nothing may be lost, nothing doubled, and all it made must be the same, in 32 bits on one machine. Where a
script reaches its end before the next kill, it is checked too, what it made is deleted, and it begins anew.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import art

COMMANDS = {  # small batches, a checkpoint at every step: many places to be killed at
    "sample": ["art.py", "sample", "--bits", "32", "--k", "3", "--kv-gib", "0.01"],
    "train_asker": ["train_asker.py", "--adapter-bits", "32", "--batch-size", "8", "--save-steps", "1"],
    "train_truster": ["train_truster.py", "--adapter-bits", "32", "--batch-size", "2", "--save-steps", "1"],
    "evaluate": ["evaluate.py", "--kv-gib", "0.01"],
}
WAYS = ("behind a write", "in the middle of a write", "at a random moment")
# in what is written, this tells starts apart and not outcomes
OWN = {"seconds", "peak_memory", "resumed_at", "commit", "python", "torch", "transformers", "peft", "bitsandbytes"}


def make_data(folder, train=60, dev=30, test=30):
    """The toy task with few questions, in folder/data/toy."""
    command = [sys.executable, ROOT / "data/toy/prepare.py", "--out", folder / "data/toy", "--train", str(train),
               "--dev", str(dev), "--test", str(test)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def start(command, runs):
    """Start a script on the data beside its folder of runs; `printed` reads what it prints.

    On one thread: so small a model gains nothing by two, and sums of floats keep their order.
    """
    name, *flags = command
    with tempfile.NamedTemporaryFile(dir=runs.parent, suffix=".txt", delete=False) as out:
        process = subprocess.Popen(
            [sys.executable, ROOT / name, *flags, "--runs", runs, "--data", runs.parent / "data"], stdout=out,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.printed = lambda: Path(out.name).read_text("utf-8", errors="replace")[-3000:]
    return process


def finish(command, runs):
    """Run a script to its end; returns its seconds."""
    began, process = time.time(), start(command, runs)
    assert process.wait() == 0, process.printed()
    return time.time() - began


# --- Killing


def sizes_of(runs):
    """{file: size} of all that was written, but for locks and for what every start writes anew."""
    sizes = {}
    for folder, _, names in os.walk(runs):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # replaced in this moment
                if not name.endswith(".lock") and name != "weights.json":
                    sizes[folder, name] = os.path.getsize(Path(folder, name))
    return sizes


def kill(process, runs, wait=0.0, writes=0):
    """Kill a script after so many seconds, or behind so many writes; False if it reached its end before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(wait)
    seen = sizes_of(runs)
    while writes and process.poll() is None:
        time.sleep(0.002)
        now = sizes_of(runs)
        writes, seen = writes - (now != seen), now
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL), process.printed()
    return process.returncode != 0


def tear(runs, since):
    """Leave what a kill in the middle of a write leaves; False if nothing was written since then.

    That is half of the last line of answers, or behind the last whole checkpoint a next one whose last file is half.
    """
    paths = [path for pattern in ("toy/said/*.jsonl", "toy/*/*/checkpoints/*/trainer_state.json")
             for path in runs.glob(pattern) if path.stat().st_mtime > since]
    if not paths:
        return False
    path, begin = max(paths, key=lambda path: path.stat().st_mtime), 0
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        begin = content.rfind(b"\n", 0, -1) + 1
    else:
        step = int(path.parent.name.removeprefix("checkpoint-"))
        following = path.parents[1] / f"checkpoint-{step + 1}"
        if following.exists():  # the kill itself was in the middle of it
            return True
        path = shutil.copytree(path.parent, following) / path.name
    path.write_bytes(content[: (begin + len(content)) // 2])
    return True


def kills(folder, wanted=tuple(COMMANDS), number=20, commands=COMMANDS):
    """Kill each of the `wanted` scripts so often: it must leave what one leaves that was not killed."""
    whole, rng = folder / "whole", random.Random(0)
    whole.mkdir()
    for script, command in commands.items():
        before, killed = folder / f"before-{script}", folder / f"killed-{script}"
        shutil.copytree(whole, before)
        seconds, expected = finish(command, whole), outcome(whole)
        shutil.copytree(before, killed)
        counts = dict.fromkeys([*WAYS, "ended before that"], 0)
        while script in wanted and sum(counts[way] for way in WAYS) < number:
            way, began = WAYS[sum(counts.values()) % len(WAYS)], time.time()
            limit = {"wait": rng.uniform(0.3, 1) * seconds} if way == WAYS[2] else {"writes": rng.randint(1, 12)}
            if not kill(start(command, killed), killed, **limit):
                way = "ended before that"
                check(expected, outcome(killed))
                shutil.rmtree(killed)
                shutil.copytree(before, killed)
            elif way == WAYS[1] and not tear(killed, began):
                way = WAYS[0]
            counts[way] += 1
        if script in wanted:
            finish(command, killed)
            exact, made = check(expected, outcome(killed)), len(expected) - len(outcome(before))
            print(f"{script}: {', '.join(f'{way} {count}' for way, count in counts.items())}; the same {made:,} "
                  f"outputs, {exact}", flush=True)


# --- What a script made


def outcome(runs):
    """{name: what must be the same however often a script was killed}; refused if an answer is there twice."""
    made, task = {}, runs / "toy"
    for path in task.glob("said/*.jsonl"):
        for row in filter(None, map(art.parse_line, path.read_text("utf-8").split("\n"))):  # None: half a line
            name = f"{path.name} {row['settings']} {row.get('prompt')} {row.get('number')}"
            assert name not in made, f"{name} is there twice"
            made[name] = without_own(row)
    for path in [*task.glob("samples.jsonl"), *task.glob("default/records.jsonl")]:
        rows = art.read_jsonl(path, "")
        assert len({row["id"] for row in rows}) == len(rows), f"{path}: an id is there twice"
        made |= {f"{path.name} {row['id']}": without_own(row) for row in rows}
    for path in [*task.glob("llm.json"), *task.glob("default/results.json"), *task.glob("default/*/args.json")]:
        made[str(path.relative_to(runs))] = without_own(json.loads(path.read_text("utf-8")))
    for path in [*task.glob("default/*.md"), *task.glob("default/*.txt")]:
        made[path.name] = path.read_text("utf-8")
    for path in task.glob("default/*/adapter_model.safetensors"):
        made |= {f"{path.parent.name} {name}": weight for name, weight in load_file(path).items()}
    return made


def without_own(value):
    """A value of a JSON file without what tells starts apart."""
    if isinstance(value, dict):
        return {key: without_own(inner) for key, inner in value.items() if key not in OWN}
    return [without_own(inner) for inner in value] if isinstance(value, list) else value


def same(one, other, tolerance):
    """Are two outcomes the same: texts, counts and decisions exactly, figures within `tolerance`?"""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b, tolerance) for a, b in zip(one, other))
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=tolerance)
    return abs(one - other) <= tolerance if isinstance(one, float) and isinstance(other, float) else one == other


def check(expected, found):
    """Refuse an outcome that is not the expected one; returns how exactly it is, in words."""
    lost, new = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert not lost and not new, f"lost: {len(lost)}, as {lost[:2]}; new: {len(new)}, as {new[:2]}"
    for name, value in expected.items():
        assert same(value, found[name], 1e-4), f"{name}: {found[name]} in the place of {value}"
    return "bit for bit" if same(expected, found, 0) else "figures within 1e-4"


def two(folder, command=COMMANDS["sample"]):
    """One process alone, and two at once in another folder: one of these is refused, and nothing is doubled."""
    finish(command, folder / "alone")
    pair = [start(command, folder / "both") for _ in range(2)]
    codes = [process.wait() for process in pair]
    assert sorted(codes) == [0, 2], [process.printed() for process in pair]
    refused = pair[codes.index(2)].printed()
    assert "error: another process is writing" in refused and "Traceback" not in refused, refused
    expected = outcome(folder / "alone")
    exact = check(expected, outcome(folder / "both"))
    print(f"two at once: one is refused; the same {len(expected):,} outputs as of one alone, {exact}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "two"))
    parser.add_argument("--script", default="all", choices=(*COMMANDS, "all"), help="which one to kill (default all)")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="kills of each script (default 20)")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in (default a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        make_data(folder)
        if args.what == "two":
            two(folder)
        else:
            last = list(COMMANDS).index(args.script) + 1 if args.script in COMMANDS else None
            kills(folder, (args.script,) if last else tuple(COMMANDS), args.kills, dict(list(COMMANDS.items())[:last]))


if __name__ == "__main__":
    main()
