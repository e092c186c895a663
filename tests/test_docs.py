"""What stands in two places says the same."""

import tomllib

import art


def lines(name):
    return [line for line in (art.ROOT / name).read_text("utf-8").splitlines() if not line.startswith(("#", "-"))]


def test_uv_and_pip_install_the_same():
    about = tomllib.loads((art.ROOT / "pyproject.toml").read_text("utf-8"))
    assert about["project"]["dependencies"] == lines("requirements.txt")
    assert about["dependency-groups"]["dev"] == lines("requirements-dev.txt")
