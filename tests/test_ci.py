"""What CI says of a commit: green where every target is, red where one is not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


CI = Path(__file__).parents[1] / ".ci" / "run"

# Says its target, and fails where that is the one to fail
MAKE = """#!/usr/bin/env bash
echo "$CI: $*"
echo "said by $1"
[ "$1" != "$FAIL" ]
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("fails", ["", "lint", "test", "test-tpu", "test-hf"])
def test_ci_is_red_just_where_a_target_is(tmp_path, fails):
    (tmp_path / "repo" / ".ci").mkdir(parents=True)
    shutil.copy(CI, tmp_path / "repo" / ".ci")
    (tmp_path / "make").write_text(MAKE)
    (tmp_path / "make").chmod(0o755)
    (tmp_path / "said").mkdir()
    path = f"{tmp_path}:{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", tmp_path / "repo" / ".ci" / "run"],
        env={"PATH": path, "FAIL": fails, "TMPDIR": str(tmp_path / "said")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.returncode == 0) == (not fails), found.stderr
    for target in ("lint", "test", "test-tpu", "test-hf"):
        assert f"true: {target} " in found.stdout
    assert found.stdout.splitlines()[-1] == "said by test"
    assert not list((tmp_path / "said").iterdir())
