"""A run that is killed ends as if it had not been: bitwise, wherever and however often it dies."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import growjax as gj
from growjax.runs.checkpoint import read_lineage
from tests.conftest import DEEP
from tests.killed import short


ROOT = Path(gj.__file__).parents[1]
# In the order of a run: it grows before steps 3 and 9, and its gates open in steps 3 to 6
DOOMS = {
    "step:2": "before the first growth, and before anything was saved",
    "TERM twice step:1": "the second signal ends it at once",
    "INT twice step:1": "as Ctrl-C does",
    "before growth:1": "when the transition is about to begin",
    "after growth:1": "in the transition: grown, and not on record",
    "saving:1": "in the transition: the grown state is being written",
    "growth:1": "in the transition: once it is known",
    "step:3": "on the ramp",
    "before dropping:1": "when a checkpoint is not needed any more",
    "before saving:1": "between two checkpoints",
    "saving:2": "while the second one is written",
    "TERM saving:1": "asked to stop while the checkpoint of that very step is written",
    "INT before growth:1": "asked to stop while it grows",
    "INT step:1": "asked to stop between two checkpoints",
}
# Where a run goes on as after another of them: in the deep profile alone
REPEATED = ("step:2", "before saving:1")
ENDS = {"TERM twice step:1": -15, "INT twice step:1": -2, "TERM": 75, "INT": 130}


def killed(folder: Path, dooms: list[str]) -> list[int]:
    """The exit status of a session for each doom; the run is what an undisturbed one is, or it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(folder), *dooms],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    sessions: list[tuple[dict[int, float], str, int]] = [({}, "", 0)]
    losses: dict[int, float] = {}
    for line in done.stdout.splitlines():
        said: Any = json.loads(line)
        if isinstance(said, dict):
            sessions.append((losses, said["doom"], said["status"]))
            losses = {}
        else:
            losses[said[0]] = said[1]
    (expected, name, status), *others = sessions[1:]
    assert (name, status, others[-1][2]) == ("whole", 0, 0), done.stdout
    assert list(expected) == list(range(short().steps))
    seen: dict[int, float] = {}
    for end, _, _ in others:
        assert end == {n: expected[n] for n in end}
        seen |= end
    assert seen == expected
    lineages = [
        {path.name: read_lineage(path) for path in (folder / run / "checkpoints").iterdir()}
        for run in ("whole", "killed")
    ]
    last = max(lineages[0])
    assert last == max(lineages[1]) and int(last[:8]) == short().steps
    for name in lineages[0].keys() & lineages[1].keys():
        # Of every array: parameters, gates and the optimizer's state
        for what in ("checksums", "operators", "step", "stage", "tokens", "flops", "data", "level"):
            assert lineages[0][name][what] == lineages[1][name][what], (name, what)
    assert "optimizer" in " ".join(lineages[0][last]["checksums"])
    return [status for _, _, status in others[:-1]]


def test_a_run_that_is_killed_everywhere_ends_bitwise_the_same(tmp_path):
    dooms = [doom for doom in DOOMS if DEEP or doom not in REPEATED]
    ends = dict(zip(dooms, killed(tmp_path / "runs", dooms), strict=True))
    expected = {doom: ENDS.get(doom, ENDS.get(doom.split()[0], -9)) for doom in dooms}
    assert ends == expected


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_bitwise_the_same(tmp_path):
    """In saves and growths, too: 50 kills and 20 of each signal."""
    draw = random.Random(0)
    wanted = {-9: 50, 75: 20, 130: 20}
    kinds = {-9: "", 75: "TERM ", 130: "INT "}
    done = dict.fromkeys(wanted, 0)
    for attempt in range(200):
        if all(done[status] >= n for status, n in wanted.items()):
            return
        # The shorter ones come in the first steps, which a run that dies then repeats
        dooms = [f"{kind}after:{draw.randint(0, 900)}" for _ in range(3) for kind in kinds.values()]
        for status in killed(tmp_path / f"runs {attempt}", dooms):
            # A run may also have reached its end before
            assert status in (*wanted, 0)
            done[status] = done.get(status, 0) + 1
    raise AssertionError(f"too few of them came in time: {done}")
