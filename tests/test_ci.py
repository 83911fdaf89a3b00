"""What CI says of a commit: green where every target is, red where one is not."""

import os
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import pytest


CI = Path(__file__).parents[1] / ".ci" / "run"

# Says its target, and fails where that is the one to fail
MAKE = """#!/usr/bin/env bash
echo "$CI: $*"
echo "said by $1"
case "$1" in *.installed-dev) mkdir "$(dirname "$1")" ;; esac
# The target alone, or with the newest Python
case "$FAIL" in *PYTHON=) [[ "$*" != "$FAIL"* ]] ;; *) [[ "$1 $2" != "$FAIL "[^P]* ]] ;; esac
"""
# One target goes on until it is told to stop, and another stops the script
STOPPED = """#!/usr/bin/env bash
case "$1" in
  *.installed-dev) mkdir "$(dirname "$1")" ;;
  test-tpu)
    trap 'touch stopped; exit' TERM
    touch started
    for _ in {1..300}; do sleep 0.1; done ;;
  lint)
    until [ -e started ]; do sleep 0.1; done
    kill "$PPID" ;;
esac
"""

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


def run(folder: Path, make: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The script in a repository of its own, over another `make`."""
    (folder / "repo" / ".ci").mkdir(parents=True)
    shutil.copy(CI, folder / "repo" / ".ci")
    shutil.copy(CI.parents[1] / "pyproject.toml", folder / "repo")
    (folder / "make").write_text(make)
    (folder / "make").chmod(0o755)
    (folder / "said").mkdir()
    env = {"NEWEST": "python3"} | env
    env |= {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder / "said")}
    command = ["bash", folder / "repo" / ".ci" / "run"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


TARGETS = ("lint", "test", "test-tpu", "test-hf", "test-tpu PYTHON=", "test PYTHON=")


@pytest.mark.parametrize("fails", ["", *TARGETS])
def test_ci_is_red_just_where_a_target_is(tmp_path, fails):
    result = run(tmp_path, MAKE, FAIL=fails)
    assert (result.returncode == 0) == (not fails), result.stderr
    for target in TARGETS:
        assert f"true: {target}" in result.stdout
    assert result.stdout.splitlines()[-1] == "said by test"
    assert not list((tmp_path / "said").iterdir())


def test_bytecode_is_kept_whatever_the_environment_says(tmp_path):
    """Or each of the dozens of processes that tests start makes it anew."""
    make = MAKE.replace("$CI: $*", "$PYTHONDONTWRITEBYTECODE, $PIP_FLAGS")
    result = run(tmp_path, make, FAIL="", PYTHONDONTWRITEBYTECODE="1")
    assert result.stdout.startswith(", --no-compile -c ")


def test_the_oldest_pair_is_the_lowest_that_is_allowed_and_the_newest_is_what_pip_gives(tmp_path):
    project = tomllib.loads((CI.parents[1] / "pyproject.toml").read_text())["project"]
    lowest = [line.replace(">=", "==") for line in project["dependencies"]]
    make = MAKE.replace(
        'echo "$CI: $*"', 'echo "$CI: $*"; cat ${PIP_FLAGS##* } 2>/dev/null || true'
    )
    result = run(tmp_path, make, FAIL="").stdout.splitlines()
    assert all("==" in line for line in lowest)
    assert result[1 : len(lowest) + 1] == lowest
    newest = [line for line in result if "PYTHON=" in line]
    files = re.findall(r"tests/test_\w+\.py", newest[-1])
    assert len(files) > 9 and all((CI.parents[1] / name).exists() for name in files)
    assert result[result.index(newest[0]) + 1] == "said by test-tpu", "bound to the lowest versions"


def test_without_a_newer_python_ci_is_red(tmp_path):
    for version in ("3.12", "3.13"):
        (tmp_path / f"python{version}").write_text("#!/usr/bin/env bash\nexit 1\n")
        (tmp_path / f"python{version}").chmod(0o755)
    result = run(tmp_path, MAKE, FAIL="", NEWEST="", PYENV_ROOT=str(tmp_path))
    assert result.returncode != 0 and "no Python 3.12 or newer" in result.stderr


def test_what_cannot_be_installed_is_red(tmp_path):
    result = run(tmp_path, MAKE, FAIL=".venv-ci/.installed-dev")
    assert result.returncode != 0 and "said by test" not in result.stdout


def test_targets_end_with_ci(tmp_path):
    assert run(tmp_path, STOPPED).returncode != 0
    until = time.monotonic() + 30
    while not (tmp_path / "repo" / "stopped").exists():
        assert time.monotonic() < until, "a target went on without the script"
        time.sleep(0.1)
    assert not list((tmp_path / "said").iterdir())
