"""Forks: a run that begins with the whole state of another, and plans whose first steps are shared."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax.data import Causal, Text
from growjax.errors import CheckpointError, DamagedError, PlanError
from growjax.parallel import Layout
from growjax.plan.prefix import fork_changes
from growjax.runs.checkpoint import read_lineage
from growjax.runs.fork import find_trunk
from growjax.runs.lineage import load_model
from growjax.runs.run import Run
from growjax.train import (
    Fork,
    Optimizer,
    Options,
    Plan,
    Schedule,
    Stage,
    Warmup,
    branches,
    load_plan,
    read_journal,
    save_plan,
    shared_steps,
    train,
    watch,
)
from growjax.train.commands import _fork_of as fork_of
from growjax.train.commands import describe
from tests.runs import LENGTH, SMALL, TOKENS, feed, losses, plan, same, steps


GROWN = gj.msg(mlp=24)
CONSTANT = Schedule(1e-2, "constant", warmup=Warmup(steps=2))
# A stage of windows that are twice as long
DOUBLE = Stage(tokens=4 * TOKENS, objective=Causal(2 * LENGTH, packing="concat"))
RATE = Schedule(1e-2, "wsd", warmup=Warmup(steps=2), decay=0.25)


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return {}


def trunk_plan(**changes: Any) -> Plan:
    """3 steps, a growth, and 5 steps, at rates that do not depend on the plan's length."""
    return plan(
        steps(3, "small"), steps(5, "ramp", grow=GROWN, ramp=3), **{"rate": CONSTANT} | changes
    )


def run_of(
    of: Plan, folder: Path, programs: dict[str, Any], save_at: tuple[int, ...] = (), **options: Any
) -> Any:
    records = train(
        of,
        feed(of),
        run=folder,
        options=Options(save_at=save_at, save_minutes=None, held_out_end=0, **options),
        cache=programs,
    )
    return list(watch(records, of, run=folder))


def checksums(folder: Path) -> dict[str, Any]:
    """The checksums of every array of every checkpoint of a run."""
    return {p.name: read_lineage(p)["checksums"] for p in Run(folder).checkpoints()}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, programs: dict[str, Any]) -> Any:
    """The folder of a run that kept its checkpoints, and its records."""
    folder = tmp_path_factory.mktemp("forks") / "trunk"
    return folder, run_of(trunk_plan(), folder, programs, (1, 2, 3, 5, 6))


@pytest.mark.parametrize("step", [2, 3, 5, 8, None])
def test_a_fork_that_changes_nothing_is_the_run_itself(trunk, programs, tmp_path, step):
    """Bitwise: every array of every checkpoint after it, with the counters and the data."""
    folder, whole = trunk
    forked = dataclasses.replace(trunk_plan(), fork=Fork(str(folder), step))
    records = run_of(forked, tmp_path / "fork", programs)
    assert records[0].forked == str(folder)
    assert losses(records) == {
        n: x for n, x in losses(whole).items() if n >= (8 if step is None else step)
    }
    assert same(records, whole)
    mine, theirs = checksums(tmp_path / "fork"), checksums(folder)
    assert list(mine)[-1] == list(theirs)[-1]
    assert all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())
    last = [read_lineage(Run(f).checkpoint()) for f in (folder, tmp_path / "fork")]
    for name in ("tokens", "flops", "data", "operators", "step", "stage", "level", "seed"):
        assert last[0][name] == last[1][name]
    assert last[1]["fork"]["changes"] == [] and last[0]["fork"] is None


def test_a_fork_goes_on_from_one_step_though_its_trunk_trains_on(trunk, programs, tmp_path):
    """Killed before its first checkpoint: the plan in its folder names the step."""
    shutil.copytree(trunk[0], tmp_path / "trunk")
    last = Run(tmp_path / "trunk").checkpoint()
    hidden = last.rename(tmp_path / last.name)
    forked = dataclasses.replace(trunk_plan(), fork=Fork(str(tmp_path / "trunk")))
    begun = train(forked, feed(forked), run=tmp_path / "fork", cache=programs)
    before: Any = next(begun)
    begun.close()
    hidden.rename(last)
    assert not Run(tmp_path / "fork").checkpoints()
    records = run_of(forked, tmp_path / "fork", programs)
    assert records[0].step == before.step < 8 and same(records, trunk[1])
    assert Run(tmp_path / "fork").plan().fork == Fork(str(tmp_path / "trunk"), before.step)
    assert run_of(forked, tmp_path / "fork", programs)[0].step == 8


def test_a_fork_of_before_the_growth_may_grow_otherwise(trunk, programs, tmp_path):
    """The checkpoint on the side of a growth that the plan agrees with is taken."""
    folder, _ = trunk
    other = plan(
        steps(3),
        steps(5, grow=gj.stack(layers=4)),
        rate=CONSTANT,
        fork=Fork(str(folder), 3),
    )
    records = run_of(other, tmp_path / "fork", programs)
    assert records[0].stage == 0 and records[0].resumed.endswith("00000003-00")
    alone = dataclasses.replace(other, fork=None)
    assert same(records, run_of(alone, tmp_path / "alone", programs))
    # and after the growth for a plan that grows alike
    forked = dataclasses.replace(trunk_plan(), fork=Fork(str(folder), 3))
    first: Any = next(train(forked, feed(forked), cache=programs))
    assert str(first.resumed).endswith("00000003-01")


def test_a_finished_run_is_extended(trunk, programs, tmp_path):
    """With rates of its own; what was trained at other ones is put on record."""
    folder, whole = trunk
    first = trunk_plan()
    longer = dataclasses.replace(
        first,
        name="longer",
        stages=(*first.stages, steps(4)),
        rate=Schedule(1e-2),
        fork=Fork(str(folder)),
    )
    records = run_of(longer, tmp_path / "longer", programs)
    assert (records[0].step, records[-1].step) == (8, 12)
    fork = read_lineage(Run(tmp_path / "longer").checkpoint())["fork"]
    assert fork["run"] == str(folder) and fork["step"] == 8
    (change,) = fork["changes"]
    assert change.startswith("rate: at step 0 the learning rate was ")
    assert any(change in note for note in records[0].notes)
    # Its journal is whole: the steps before are those of the run that it was forked from
    rows = [row for row in read_journal(tmp_path / "longer") if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["loss"] for row in rows[:8]] == list(losses(whole).values())
    assert [row.get("inherited") for row in rows] == [str(folder)] * 8 + [None] * 4
    (session,) = Run(tmp_path / "longer").sessions()
    assert session.step == 8 and session.finished


def test_a_fork_goes_on_from_its_own_checkpoints_and_needs_no_trunk(trunk, programs, tmp_path):
    folder, whole = trunk
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "plan.json").write_bytes((folder / "plan.json").read_bytes())
    Run(moved).checkpoints_folder.symlink_to(Run(folder).checkpoints_folder)
    forked = dataclasses.replace(trunk_plan(), fork=Fork(str(moved), 5))
    records = train(
        forked, feed(forked), run=tmp_path / "fork", cache=programs, options=Options(held_out_end=0)
    )
    for record in records:
        if type(record).__name__ == "Step":
            break
    records.close()
    Run(moved).checkpoints_folder.unlink()
    again = run_of(forked, tmp_path / "fork", programs)
    assert again[0].forked is None
    assert same(again, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"plan.seed: was 0, is 1"),
        ({"batch": 2}, r"stages\[0\].batch: was 4, is 2"),
        ({"model": dataclasses.replace(SMALL, mlp=20)}, "plan.model.mlp: was 16, is 20"),
        ({"stages": (steps(4), steps(5, grow=GROWN, ramp=3))}, "was 3 steps long, is 4"),
        ({"stages": (steps(3), steps(1, grow=GROWN, ramp=1))}, "ramp: was 3, is 1"),
        ({"stages": (steps(8),)}, "the checkpoint is in stage 1, and the plan has 1"),
        ({"stages": (*trunk_plan().stages, DOUBLE)}, "longest window of them was 8 tokens, is 16"),
        ({"optimizer": Optimizer("lion")}, "does not hold this state"),
    ],
)
def test_a_fork_that_did_other_things_is_refused(trunk, changes, message):
    forked = dataclasses.replace(trunk_plan(), **changes, fork=Fork(str(trunk[0]), 5))
    with pytest.raises(CheckpointError, match=message):
        next(iter(train(forked, feed(forked))))


def test_a_run_goes_on_with_the_draws_of_its_layout(trunk):
    own = trunk_plan(layout=Layout(step="shard_map", own_paths=True))
    with pytest.raises(CheckpointError, match="plan.layout.own_paths: was False, is True"):
        next(iter(train(own, feed(own), run=trunk[0])))


def test_a_fork_of_nothing_is_refused_with_what_there_is(trunk, tmp_path):
    forked = dataclasses.replace(trunk_plan(), fork=Fork(str(trunk[0]), 4))
    with pytest.raises(CheckpointError, match=r"before: 1, 2, 3, 5, 6, 8\..*--save-at"):
        next(iter(train(forked, feed(forked))))
    nowhere = dataclasses.replace(trunk_plan(), fork=Fork(str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match="but it has no plan.json"):
        next(iter(train(nowhere, feed(nowhere))))
    from growjax.forecast.dryrun import dry_run

    assert "but it has no plan.json" in " ".join(dry_run(nowhere, devices=1).refusals)


def test_a_fork_that_fails_leaves_a_folder_that_the_corrected_one_takes(trunk, programs, tmp_path):
    itself = dataclasses.replace(trunk_plan(), fork=Fork(str(tmp_path / "run")))
    with pytest.raises(CheckpointError, match="but it has no plan.json"):
        next(iter(train(itself, feed(itself), run=tmp_path / "run")))
    assert not (tmp_path / "run" / "plan.json").exists()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "plan.json").write_bytes(Run(trunk[0]).plan_file.read_bytes())
    with pytest.raises(CheckpointError, match="a run without a whole checkpoint"):
        next(iter(train(itself, feed(itself))))


def test_a_checkpoint_that_was_renamed_is_not_taken_for_another(trunk, programs, tmp_path):
    """By a fork of its run, by the run itself, or by whoever reads its newest model."""
    shutil.copytree(trunk[0], tmp_path / "run")
    folder = Run(tmp_path / "run").checkpoints_folder
    (folder / "00000002-00").rename(folder / "00000004-01")
    forked = dataclasses.replace(trunk_plan(), fork=Fork(str(tmp_path / "run"), 4))
    with pytest.raises(CheckpointError, match="04-01 was renamed: .* call it 00000002-00 again"):
        find_trunk(forked)
    (folder / "00000008-01").rename(folder / "00000007-01")
    newest = "07-01 was renamed: it is of stage 1 before step 8"
    with pytest.raises(CheckpointError, match=newest):
        run_of(trunk_plan(), tmp_path / "run", programs)
    with pytest.raises(CheckpointError, match=newest):
        load_model(tmp_path / "run")
    # Outside of a run, a name says nothing
    shutil.copytree(folder / "00000007-01", tmp_path / "00000001-00")
    load_model(tmp_path / "00000001-00")


def test_a_checkpoint_that_its_run_removes_is_not_called_damaged(trunk, tmp_path, monkeypatch):
    shutil.copytree(trunk[0], tmp_path / "run")
    forked = dataclasses.replace(trunk_plan(), fork=Fork(str(tmp_path / "run")))

    def removed(path, *_, **__):
        shutil.rmtree(path)
        raise DamagedError(f"{path} is not a whole checkpoint")

    monkeypatch.setattr("growjax.runs.fork.load", removed)
    with pytest.raises(CheckpointError, match="removed while it was read.*try again") as error:
        next(iter(train(forked, feed(forked))))
    assert not isinstance(error.value, DamagedError)


def test_the_folder_of_a_run_may_end_as_a_step_does(tmp_path):
    run = tmp_path / "runs@2"
    assert fork_of(f"{run}") == Fork(str(tmp_path / "runs"), 2)
    assert fork_of(f"{run}@3") == Fork(str(run), 3)
    run.mkdir()
    save_plan(trunk_plan(), run / "plan.json")
    assert fork_of(f"{run}") == Fork(str(run))


def test_a_fork_is_saved_in_its_plan(trunk, tmp_path):
    forked = dataclasses.replace(trunk_plan(rate=RATE), fork=Fork(str(trunk[0]), 5))
    save_plan(forked, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == forked
    with pytest.raises(PlanError, match="step: expected a number of steps"):
        Fork("runs/a", -1)


# Trees ---------------------------------------------------------------------------------------------


def leaves() -> list[Plan]:
    """A plan, one twice as long, and one that grows where both do not."""
    short = plan_named("short", steps(8), rate=RATE)
    long = plan_named("long", steps(16), rate=RATE)
    grown = plan_named("grown", steps(4), steps(8, grow=gj.stack(layers=4)), rate=RATE)
    return [long, short, grown]


def plan_named(name: str, *stages: Any, **changes: Any) -> Plan:
    return dataclasses.replace(plan(*stages, **changes), name=name)


def test_a_warm_up_of_steps_makes_plans_of_other_lengths_alike():
    long, short, grown = leaves()
    assert shared_steps(long, short) == (6, 0)  # the shorter one falls over its last quarter
    assert shared_steps(long, grown) == (4, 0) == shared_steps(short, grown)
    by_share = [
        dataclasses.replace(p, rate=Schedule(1e-2, "wsd", decay=0.25)) for p in (long, short)
    ]
    assert shared_steps(*by_share) == (0, 0)
    tokens = [
        dataclasses.replace(p, rate=dataclasses.replace(RATE, warmup=Warmup(tokens=2 * 4 * LENGTH)))
        for p in (long, short)
    ]
    assert shared_steps(*tokens) == (6, 0)
    for other in (
        dataclasses.replace(short, seed=1),
        dataclasses.replace(short, optimizer=Optimizer(clip=0.5)),
        dataclasses.replace(short, accumulate=2),
        dataclasses.replace(short, rate=dataclasses.replace(RATE, peak=2e-2)),
    ):
        assert shared_steps(long, other) == (0, 0)


def test_plans_that_read_other_text_share_nothing():
    """Its order depends on the longest window of all stages, and its extent on what is held out."""
    short = plan_named("short", steps(8), rate=RATE)
    doubled = plan_named("doubled", *short.stages, DOUBLE, rate=RATE)
    first, other = (feed(p).batches(p.spans[0]).batch_at(0)["tokens"] for p in (short, doubled))
    assert not np.array_equal(first, other) and shared_steps(short, doubled) == (0, 0)
    replicas = [Layout(step="shard_map", own_paths=own) for own in (False, True)]
    alone, together, own = (
        dataclasses.replace(short, **changes)
        for changes in (
            {"data": Text("a"), "validation": Text("b")},
            {"data": Text("a"), "layout": replicas[0]},
            {"data": Text("a"), "layout": replicas[1]},
        )
    )
    assert shared_steps(together, dataclasses.replace(together, layout=Layout())) == (8, 0)
    for a, b in ((together, alone), (together, own)):
        assert shared_steps(a, b) == (0, 0)
        assert len(list(fork_changes(a, b, 8))) == 1


def test_a_tree_trains_what_its_plans_share_once(programs, tmp_path):
    tree = branches(leaves(), tmp_path)
    assert [b.save_at for b in tree] == [(4, 6), (), ()]
    assert [b.plan.fork and b.plan.fork.step for b in tree] == [None, 6, 4]
    for branch, alone in zip(tree, leaves(), strict=True):
        records = run_of(branch.plan, branch.run, programs, branch.save_at)
        assert min(losses(records)) == (branch.plan.fork.step if branch.plan.fork else 0)
        assert same(records, run_of(alone, tmp_path / "alone" / alone.name, programs))
        assert list(fork_changes(leaves()[0], alone, min(losses(records)))) == []
    # Once more: all of it is there, and nothing is trained again
    for branch in tree:
        assert losses(run_of(branch.plan, branch.run, programs, branch.save_at)) == {}


def test_two_plans_of_one_name_are_no_tree(tmp_path):
    with pytest.raises(PlanError, match="'tiny': two plans have this name"):
        branches([trunk_plan(), trunk_plan(seed=1)], tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../tiny", "/tiny", "a\\b"])
def test_the_folder_of_a_plan_of_a_tree_is_in_that_of_the_tree(name, tmp_path):
    with pytest.raises(PlanError, match="it must be a plain one"):
        branches([trunk_plan(), dataclasses.replace(trunk_plan(), name=name)], tmp_path)


def test_the_command_line_forks_and_trains_trees(trunk, tmp_path, monkeypatch):
    """`--fork RUN@STEP` is in the plan that is saved; several plans have a folder each."""
    from growjax.train import commands

    folder, _ = trunk
    asked: list[tuple[Plan, Path, Options]] = []

    def trained(of: Plan, run: Path, options: Options, *_: Any) -> tuple[bool, str | None]:
        asked.append((of, run, options))
        return (False, "SIGTERM") if of.name == "short" else (True, None)

    monkeypatch.setattr(commands, "_trained", trained)
    console = Console(file=io.StringIO())
    options, named = Options(save_at=(1,)), f"{folder}@5"
    assert commands.train_plans([trunk_plan()], "r", options, fork=named, console=console) == 0
    assert asked[0][0].fork == Fork(str(folder), 5) and asked[0][1] == Path("r")
    asked.clear()
    commands.train_plans([trunk_plan()], "r", options, fork="a@b", evaluations=4, console=console)
    assert asked[0][0].fork == Fork("a@b")
    assert asked[0][2].evaluate_every == trunk_plan().cost / 4
    asked.clear()
    # One that was stopped ends the tree, and its status is the tree's
    assert commands.train_plans(leaves(), tmp_path, options, console=console) == 75
    assert [(of.name, run, o.save_at) for of, run, o in asked] == [
        ("long", tmp_path / "long", (1, 4, 6)),
        ("short", tmp_path / "short", (1,)),
    ]
    with pytest.raises(
        PlanError, match="expected at least one plan, and exactly one with fork, got 3"
    ):
        commands.train_plans(leaves(), tmp_path, options, fork=str(folder), console=console)


def test_inspect_says_what_a_run_was_forked_from(trunk, programs, tmp_path):
    other = trunk_plan(rate=Schedule(1e-2))
    run_of(dataclasses.replace(other, fork=Fork(str(trunk[0]), 5)), tmp_path / "fork", programs)
    shown = io.StringIO()
    describe(tmp_path / "fork", Console(file=shown, width=300))
    assert f"forked from {trunk[0]} before step 5" in shown.getvalue()
    assert "trained otherwise before: rate: at step 0" in shown.getvalue()


# Warm-up -------------------------------------------------------------------------------------------


def test_a_warm_up_of_steps_or_tokens_ends_there():
    made = plan(steps(10), rate=Schedule(1.0, "linear", warmup=Warmup(steps=4)))
    step = made.cost / 10
    assert [made.learning_rate(n * step) for n in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]
    assert made.learning_rate(7 * step) == pytest.approx(0.5)
    assert made.learning_rate(made.cost) == 0
    by_tokens = plan(
        steps(10), rate=Schedule(1.0, "linear", warmup=Warmup(tokens=4 * 4 * LENGTH - 1), start=0.5)
    )
    assert [by_tokens.learning_rate(n * step) for n in (0, 2, 4)] == [0.5, 0.75, 1.0]


def test_a_warm_up_that_does_not_end_is_refused():
    with pytest.raises(PlanError, match="does not end before the plan: 3 steps"):
        plan(steps(3), rate=Schedule(1.0, warmup=Warmup(steps=3)))
    with pytest.raises(
        PlanError, match="decay: 0.8 of the budget does not fit after 0.5 of warmup"
    ):
        plan(steps(4), rate=Schedule(1.0, "wsd", warmup=Warmup(steps=2), decay=0.8))
    for wrong in ({}, {"steps": 3, "tokens": 4}):
        with pytest.raises(PlanError, match="expected one of steps and tokens"):
            Warmup(**wrong)


def test_a_rate_is_asked_quickly_in_a_plan_of_many_steps():
    """Its stages' costs are added up once."""
    made = plan(steps(100_000))
    assert made._span_costs is made._span_costs
    assert sum(made._span_costs) == made.cost


def test_a_tree_that_is_killed_ends_bitwise_the_same(tmp_path):
    """In the trunk, while a fork writes its first checkpoint, and in a branch."""
    dooms = ["step:5", "saving:1", "saving:5", "TERM step:3", "step:4"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(tmp_path), "--tree", *dooms],
        capture_output=True,
        text=True,
        cwd=Path(gj.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    statuses = [line["status"] for line in lines if isinstance(line, dict)]
    assert statuses[0] == statuses[-1] == 0 and 75 in statuses and -9 in statuses, done.stdout
    for name in ("tiny", "long", "other"):
        whole, killed = (checksums(tmp_path / way / name) for way in ("whole", "killed"))
        assert max(whole) == max(killed)
        assert all(whole[step] == killed[step] for step in whole.keys() & killed.keys())
