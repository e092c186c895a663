"""Killed, out of disk, two at once: nothing is lost, nothing doubled. More and longer: tests/reliability.py."""

import re
import signal

import pytest
import reliability

MORE = {"evaluate": ["--rows", "initial,self_refine"]}  # rows that need no training


@pytest.fixture
def folder(tmp_path):
    reliability.make_data(tmp_path, train=16, dev=8, test=8)
    return tmp_path


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_killed_loses_nothing(folder, capsys):
    """`sample` and `evaluate`, killed behind a write and in the middle of one, then run to their ends."""
    commands = {name: [*reliability.COMMANDS[name], *MORE.get(name, ())] for name in ("sample", "evaluate")}
    reliability.kills(folder, tuple(commands), 2, commands)
    said = capsys.readouterr().out
    assert len(re.findall("the same [0-9]+ outputs", said)) == 2, said


def test_two_processes_at_once(folder):
    reliability.two(folder)


def test_full_disk(folder):
    """A size limit on files that ends in the middle of an answer: one line, and with room the same command goes on."""
    resource = pytest.importorskip("resource")
    command = reliability.COMMANDS["sample"]
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most[1]))  # the script inherits it
    try:
        process = reliability.start(command, folder / "runs")
        assert process.wait() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    said = process.printed()
    assert "error: the disk is full" in said and "Traceback" not in said
    assert len(reliability.outcome(folder / "runs")) > 5  # what was finished is kept
    reliability.finish(command, folder / "runs")
    reliability.finish(command, folder / "whole")
    reliability.check(reliability.outcome(folder / "whole"), reliability.outcome(folder / "runs"))
