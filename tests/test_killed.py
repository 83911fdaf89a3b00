"""A run that is killed ends as if it had not been: bitwise, wherever and however often it dies."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import growjax as gj
from growjax.runs.checkpoint import read_lineage
from tests.conftest import DEEP, SEVERAL_DEVICES, UNCACHED
from tests.killed import short, split


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


def killed(folder: Path, dooms: list[str], *way: str) -> list[Any]:
    """The exit status of a session for each doom; every run is what an undisturbed one is, or it fails.

    Of two hosts (`way` is "--hosts") each status is that of both. What they say is in FOLDER/log.
    """
    folder.mkdir()
    with open(folder / "log", "w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.killed", str(folder), *way, *dooms],
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | (SEVERAL_DEVICES | UNCACHED if way else {}),
        )
    out = (folder / "log").read_text()
    assert done.returncode == 0, done.stderr
    steps, finished = (split().steps, [0, 0]) if way else (short().steps, 0)
    # The sessions of each run, the undisturbed one first: the losses of each, and its status
    runs: dict[str, list[tuple[dict[int, float], Any]]] = {}
    losses: dict[int, float] = {}
    for line in out.splitlines():
        said: Any = json.loads(line) if line[:1] in '[{"' and line[1:2] != "G" else None
        if isinstance(said, dict):
            runs.setdefault(said["run"], []).append((losses, said["status"]))
            losses = {}
        elif isinstance(said, list):
            # Two hosts both say it
            assert losses.setdefault(said[0], said[1]) == said[1], out
    ((expected, status),) = runs.pop("whole")
    assert status == finished and list(expected) == list(range(steps)), out + done.stderr
    whole = lineages(folder / "whole")
    for name, sessions in runs.items():
        seen: dict[int, float] = {}
        for done_by_it, _ in sessions:
            assert done_by_it == {n: expected[n] for n in done_by_it}, (name, out)
            seen |= done_by_it
        assert seen == expected and sessions[-1][1] == finished, (name, out)
        mine = lineages(folder / name)
        assert max(mine) == max(whole) and int(max(mine)[:8]) == steps
        for at in whole.keys() & mine.keys():
            # Of every array: parameters, gates and the optimizer's state
            for what in (
                "checksums",
                "operators",
                "step",
                "stage",
                "tokens",
                "flops",
                "data",
                "level",
            ):
                assert whole[at][what] == mine[at][what], (name, at, what)
    assert "optimizer" in " ".join(whole[max(whole)]["checksums"])
    runs.pop("warm", None)
    return [status for sessions in runs.values() for _, status in sessions][: len(dooms)]


def lineages(run: Path) -> dict[str, dict[str, Any]]:
    """The lineage of every checkpoint of a run, by its name."""
    return {path.name: read_lineage(path) for path in (run / "checkpoints").iterdir()}


def test_a_run_that_is_killed_everywhere_ends_bitwise_the_same(tmp_path):
    dooms = [doom for doom in DOOMS if DEEP or doom not in REPEATED]
    ends = dict(zip(dooms, killed(tmp_path / "runs", dooms), strict=True))
    expected = {doom: ENDS.get(doom, ENDS.get(doom.split()[0], -9)) for doom in dooms}
    assert ends == expected


@pytest.mark.slow
@pytest.mark.parametrize("way", [(), ("--hosts",)], ids=["one process", "two processes"])
def test_a_run_that_is_killed_at_random_moments_ends_bitwise_the_same(tmp_path, way):
    """In saves and growths, too: 50 kills, and 20 signals that ask it to stop."""
    draw, done = random.Random(0), Counter()
    for attempt in range(20):
        wanted = {"KILL": 50 - done["KILL"], "asked": 20 - done["INT"] - done["TERM"]}
        if max(wanted.values()) <= 0:
            return
        dooms = random_dooms(draw, wanted, hosts=bool(way))
        ends = killed(tmp_path / f"runs {attempt}", dooms, *way)
        done.update(end_of(doom, status) for doom, status in zip(dooms, ends, strict=True))
    raise AssertionError(f"too few of them came in time: {done}")


def random_dooms(draw: random.Random, wanted: dict[str, int], hosts: bool) -> list[str]:
    """So many ends of sessions, "KILL" and "asked" to stop; of two hosts, of both or of one."""
    kinds = [""] * wanted["KILL"] + [draw.choice(["INT ", "TERM "]) for _ in range(wanted["asked"])]
    draw.shuffle(kinds)
    dooms = []
    for kind in kinds:
        # Nobody asks a run to stop before it began: that is the system's own end
        place = "after" if kind else draw.choice(["after", "after", "within"])
        who = draw.choice(["", "0 ", "1 "]) if hosts else ""
        # Early more often than late, since a run goes on where it ended. Hosts that are asked to stop
        # choose a step within a second or two, and may have done all by then.
        share = 0.35 * draw.random() if kind and hosts else 0.8 * draw.random() ** 2
        dooms.append(f"{who}{kind}{place}:{share:.3f}")
    return dooms


def end_of(doom: str, status: Any) -> str:
    """What a session came to: "KILL", "INT" or "TERM", or "end" where the run was over before."""
    if status in (0, [0, 0]):
        return "end"
    alone = int(doom[0]) if doom[0] in "01" else None
    kind = next((kind for kind in ("INT", "TERM") if kind in doom), "KILL")
    struck = {"KILL": -9, "INT": 130, "TERM": 75}[kind]
    if not isinstance(status, list):
        assert status == struck, (doom, status)
    elif kind == "KILL":
        # Who loses the other host ends too, and not as a run that is finished or asked to stop
        assert -9 in status and alone in (None, status.index(-9)), (doom, status)
        assert not {0, 75, 130} & {*status}, (doom, status)
    else:
        # Both stop before one step; who was not told itself heard of it as of a SIGTERM
        expected = [struck if alone in (n, None) else 75 for n in range(2)]
        assert status == expected, (doom, status)
    return kind
