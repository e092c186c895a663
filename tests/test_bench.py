"""The benchmark's own code: its contestants do the same work."""

import bench
import pytest
import reliability


def test_plain_generate_writes_the_same(tmp_path, capsys):
    reliability.make_data(tmp_path, train=8, dev=4, test=4)
    flags = ["--data", str(tmp_path / "data"), "--limit", "4", "--shots", "0", "--max-new-tokens", "48"]
    with pytest.raises(SystemExit) as end:
        bench.main(["generate", *flags, "--rounds", "1", "--at-least", "1000"])
    said = capsys.readouterr().out
    assert "Texts of plain generate equal to those of the kit: 4 of 4." in said
    assert said.count("\n| ") == 4 and end.value.code == 1 and "not 1000.0 times as fast as plain generate" in said
