"""Killed, out of disk, two at once: nothing is lost, nothing doubled. More and longer: tests/reliability.py."""

import re
import signal
import sys
import time

import pytest
import reliability
import torch

import art
import evaluate

SAMPLE = reliability.COMMANDS["sample"]
COMMANDS = {"sample": SAMPLE, "evaluate": [*reliability.COMMANDS["evaluate"], "--rows", "initial,self_refine"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The data. What is not killed runs in this process, which has imported what takes most of the time."""
    def finish(command, runs):
        name, *flags = command
        monkeypatch.setattr(sys, "argv", [name, *flags, "--runs", str(runs), "--data", str(tmp_path / "data")])
        began = time.time()
        art.run({"art.py": art.main, "evaluate.py": evaluate.main}[name])
        return time.time() - began

    reliability.make_data(tmp_path, train=16, dev=8, test=8)
    monkeypatch.setattr(reliability, "finish", finish)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_killed_loses_nothing(folder, capsys):
    """`sample` and `evaluate`, killed behind a write and in the middle of one, then run to their ends."""
    reliability.kills(folder, tuple(COMMANDS), 2, COMMANDS)
    assert len(re.findall("the same [0-9]+ outputs", capsys.readouterr().out)) == 2


def test_two_processes_at_once(folder):
    reliability.two(folder)


def test_full_disk(folder):
    """A size limit on files that ends in the middle of an answer: one line, and with room the same command goes on."""
    resource = pytest.importorskip("resource")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most[1]))  # the script inherits it
    try:
        process = reliability.start(SAMPLE, folder / "runs")
        assert process.wait() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    said = process.printed()
    assert "error: the disk is full" in said and "Traceback" not in said
    assert len(reliability.outcome(folder / "runs")) > 5  # what was finished is kept
    for runs in ("runs", "whole"):
        reliability.finish(SAMPLE, folder / runs)
    reliability.check(reliability.outcome(folder / "whole"), reliability.outcome(folder / "runs"))
