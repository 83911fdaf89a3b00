"""A run that is killed ends as if it had not been: bitwise, wherever and however often it dies."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import growjax as gj
from growjax.runs.checkpoint import read_lineage
from tests.conftest import DEEP
from tests.killed import short


ROOT = Path(gj.__file__).parents[1]
# In the order of a run: it grows before steps 3 and 9, and its gates open in steps 3 to 6
DOOMS = {
    "step:2": "before the first growth, and before anything was saved",
    "terminated twice": "the second signal ends it at once",
    "before growth:1": "when the transition is about to begin",
    "after growth:1": "in the transition: grown, and not on record",
    "saving:1": "in the transition: the grown state is being written",
    "growth:1": "in the transition: once it is known",
    "step:3": "on the ramp",
    "before dropping:1": "when a checkpoint is not needed any more",
    "before saving:1": "between two checkpoints",
    "saving:2": "while the second one is written",
}


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
    for found, _, _ in others:
        assert found == {n: expected[n] for n in found}
        seen |= found
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
    found = dict(zip(DOOMS, killed(tmp_path / "runs", list(DOOMS)), strict=True))
    assert found == {doom: -15 if doom.startswith("term") else -9 for doom in DOOMS}
    if DEEP:
        draw, kills = random.Random(0), 0
        places = [doom.partition(":")[0] for doom in DOOMS if ":" in doom]
        while kills < 50:
            dooms = [f"{draw.choice(places)}:{draw.randint(1, 2)}" for _ in range(10)]
            folder = tmp_path / f"random {kills}"
            kills += killed(folder, dooms).count(-9)
