"""What is too slow for the test suite: 20 kills a script, a small disk, the whole kit twice. See RELIABILITY.md.

    python tests/reliability.py kills      # 26 minutes, an hour on a slower CPU; --script evaluate: of that one alone
    python tests/reliability.py disk       # 4 minutes, 20 on a slower CPU; needs the right to mount
    python tests/reliability.py twice      # 3 to 5 minutes

Everything happens in a temporary folder, or in --folder, on 40 toy questions a split.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import TINY, Kit, make_data, outcome, same, tear

import art

KILLS = 20
# small batches and a checkpoint a step: many places to be killed at
MORE = {"sample": ["--batch-tokens", "2000"], "train_asker": ["--batch-size", "4"],
        "train_truster": ["--batch-size", "1"], "evaluate": ["--batch-tokens", "2500"]}


class SmallSteps(Kit):
    """The kit with more and smaller steps."""

    def flags(self, script):
        return [*super().flags(script), *MORE[script]]


def finish(kit, script):
    """Run a script to its end; its wall time in seconds."""
    began, done = time.time(), kit(script)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.time() - began


def kill_at_random(kit, script, seconds):
    """Start a script and kill it from outside after so many seconds; True if it was still at work."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(kit.command(script), cwd=kit.folder, **quiet)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def kills(folder, scripts=TINY):
    """Each of `scripts`, killed 20 times and then run to its end: it must leave what an uninterrupted run leaves.

    By turns behind the n-th write, behind it with the last line torn in half, and from outside at a random moment.
    Where a script reaches its end before, it is checked too, what it wrote is deleted, and it begins anew.
    """
    whole = SmallSteps(folder / "whole")
    make_data(whole.data)
    rng = random.Random(0)
    for script in TINY:
        seconds, killed = finish(whole, script), SmallSteps(folder / script)
        if script not in scripts:
            continue
        expected = outcome(script, whole.runs)
        whole.copy(killed.folder)
        killed.forget(script)
        counts = {"behind a write": 0, "in the middle of a line": 0, "at a random moment": 0, "finished before": 0}
        while sum(counts.values()) - counts["finished before"] < KILLS:
            how = list(counts)[sum(counts.values()) % 3]
            if how == "at a random moment":
                dead = kill_at_random(killed, script, rng.uniform(0.3, 1) * seconds)
            else:
                dead = killed(script, kill_after=rng.randint(1, 4)).returncode == -signal.SIGKILL
            if dead and how == "in the middle of a line" and not tear(killed, script):
                how = "behind a write"
            counts[how if dead else "finished before"] += 1
            if not dead:
                check(script, killed, expected)
                killed.forget(script)
        finish(killed, script)
        check(script, killed, expected)
        print(f"{script}: {counts}; the same {len(expected)} outputs", flush=True)


def check(script, kit, expected):
    """Is the outcome of a script the expected one? Else the first difference is told."""
    found = outcome(script, kit.runs)
    if not same(found, expected):
        name = next(name for name in expected.keys() | found.keys() if not same(found.get(name), expected.get(name)))
        raise AssertionError(f"{script}, {name}: {found.get(name)} instead of {expected.get(name)}")


def disk(folder):
    """Each script on a file system with room for a part of what it writes; more room, and the same command again."""
    whole = Kit(folder / "whole")
    make_data(whole.data)
    small = Kit(folder / "small")
    small.folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small.folder)], check=True)
    try:
        make_data(small.data)
        for script in TINY:
            finish(whole, script)
            used, needed = blocks(small.folder.rglob("*")), blocks(whole.written(script))
            for share in (0.2, 0.5, 0.8):
                resize(small.folder, used + int(share * needed))
                done = small(script)
                lines = [line for line in done.stderr.splitlines() if "error: " in line]
                print(f"{script}, room for {share:.0%}: exit {done.returncode}, {lines}", flush=True)
                assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
                assert len(lines) == 1 and lines[0].startswith("error: the disk is full"), done.stderr
            resize(small.folder, 200_000_000)
            finish(small, script)
            assert same(outcome(script, small.runs), outcome(script, whole.runs)), script
    finally:
        subprocess.run(["umount", str(small.folder)], check=True)


def blocks(paths):
    """What files take on a disk, in bytes."""
    return sum(path.stat().st_blocks * 512 for path in paths)


def resize(folder, size):
    """Give the file system at `folder` another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def twice(folder):
    """The five commands, two times with one seed: the same samples, figures of training, records and table."""
    kits = [Kit(folder / name) for name in ("one", "two")]
    for kit in kits:
        make_data(kit.data)
        for script in TINY:
            finish(kit, script)
    for script in TINY:
        one, two = (outcome(script, kit.runs) for kit in kits)
        exact = one == two
        assert same(one, two), script
        print(f"{script}: {len(one)} outputs the same, {'bit for bit' if exact else 'figures within 1e-3'}")
    records = [art.read_jsonl(kit.runs / "toy/default/records.jsonl") for kit in kits]
    assert records[0] == records[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "disk", "twice"))
    parser.add_argument("--script", choices=TINY, action="append", help="to be killed (all)")
    parser.add_argument("--folder", type=Path, help="where to work; it must be empty (a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = arguments.folder or Path(temporary)
        if arguments.what == "kills":
            kills(where, arguments.script or TINY)
        else:
            {"disk": disk, "twice": twice}[arguments.what](where)
