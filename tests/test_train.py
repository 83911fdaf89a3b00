"""The loop: what it reports, what it saves, and that nothing that happens to it changes a number."""

import dataclasses
import json
import math
import shutil
import types
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import train as trainer
from growjax.data import Causal
from growjax.errors import CheckpointError, TrainingError
from growjax.gates import ungated
from growjax.programs.step import checksums
from growjax.runs.checkpoint import damaged, load, read_lineage, write
from growjax.runs.lineage import births_of, load_model, model_of
from growjax.runs.run import checkpoints_in
from growjax.train import Begin, End, Growth, Options, Saved, Step, session
from tests.runs import TOKENS, every_kind, feed, losses, plan, same, steps


ROOT = Path(gj.__file__).parents[1]
train: Any = trainer.train  # tests know which record comes where; the checker does not


def row(rows: Any, i: int) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value[i]) for name, value in rows.items()}


# What it reports ---------------------------------------------------------------------------------


def test_every_step_is_reported_once_and_in_order(run):
    whole, records, _ = run
    done = [r for r in records if isinstance(r, Step)]
    assert records[0] == Begin(0, 0, None, 1) and isinstance(records[-1], End)
    assert [r.step for r in done] == list(range(whole.steps))
    assert [r.tokens for r in done] == [TOKENS * (n + 1) for n in range(whole.steps)]
    assert [r.stage for r in done] == [0] * 3 + [1] * 6 + [2] * 9
    assert done[-1].flops == whole.flops
    assert all(a.seconds <= b.seconds for a, b in zip(done, done[1:], strict=False))
    assert all(0 <= r.waited and 0 <= r.took for r in done)
    marks = [r.step for r in done if r.held_out is not None]
    assert len(marks) in (6, 7) and marks[-1] == whole.steps - 1
    assert all(math.isfinite(x) and x > 0 for r in done for x in (r.loss, r.gradient_norm))
    assert done[-1].loss < done[0].loss - 0.5


def test_growth_is_reported_between_the_steps_with_its_certificate(run):
    _, records, _ = run
    growths = [r for r in records if isinstance(r, Growth)]
    assert [g.step for g in growths] == [3, 9]
    gated, stacked = growths
    assert gated.grew == {"mlp": (16, 24), "kv_heads": (2, 4)}
    assert gated.crossing.exactness == "exact" and gated.crossing.change < 1e-5
    assert gated.crossing.after == pytest.approx(gated.crossing.before, rel=1e-5)
    assert stacked.grew == {"layers": (2, 4)} and stacked.crossing.limit is None
    assert stacked.crossing.change > 1e-3 and stacked.crossing.after != stacked.crossing.before


def test_the_certificate_is_of_the_tokens_it_says(run):
    """The loss before the first growth is that of the model in the checkpoint, on one held-out batch."""
    whole, records, folder = run
    model, _ = load_model(folder / "checkpoints" / "00000003-00")
    rows = feed(whole).held_out(whole.objective, whole.batch)
    by_row = [trainer.cross_entropy(model, row(rows, i)) for i in range(4)]
    mean = sum(jnp.sum(a * w) for a, w in by_row) / sum(jnp.sum(w) for _, w in by_row)
    first = next(r for r in records if isinstance(r, Growth))
    assert float(mean) == pytest.approx(first.crossing.before, rel=1e-5)


def test_held_out_losses_are_of_the_number_of_sequences_asked_for(run):
    """Six sequences fill a batch and a half: the other half must not count."""
    whole, records, folder = run
    model, _ = load_model(folder / "checkpoints" / "00000018-02")
    rows = feed(whole).held_out(whole.objective, 6)
    by_row = [trainer.cross_entropy(model, row(rows, i)) for i in range(6)]
    mean = sum(jnp.sum(a * w) for a, w in by_row) / sum(jnp.sum(w) for _, w in by_row)
    assert float(mean) == pytest.approx(records[-3].held_out, rel=1e-5)


JUDGED = {
    "batch": {"batch": 8},
    "accumulate": {"accumulate": 2},
    "stage's batch": {"stage": {"batch": 12}},
    "stage's objective": {"stage": {"objective": Causal(16, packing="concat")}},
}


@pytest.mark.parametrize("change", JUDGED)
def test_held_out_losses_depend_on_neither_batch_nor_stage(programs, change):
    """On the model as it was born, or nearly: window by window, marks and end alike."""
    still = trainer.Schedule(1e-30, "constant", warmup=0.0)
    changes = dict(JUDGED[change])
    stage = changes.pop("stage", {})

    def judged(of: Any) -> tuple[float, Any]:
        # 13 and 30 fill no whole number of any of the batches
        options = Options(held_out=13, held_out_end=30)
        records = list(train(of, feed(of), options=options, cache=programs))
        return records[-2].held_out, records[-1].held_out

    few, many = judged(plan(steps(3), rate=still))
    other_few, other_many = judged(plan(steps(6, **stage), rate=still, **changes))
    assert many.windows == other_many.windows == 30 and np.all(many.weights == 8)
    np.testing.assert_allclose(other_many.sums, many.sums, rtol=1e-5)
    assert np.array_equal(other_many.weights, many.weights)
    assert other_few == pytest.approx(few, rel=1e-6) and few != many.loss


def test_the_end_is_judged_on_every_window_there_is(run):
    whole, records, folder = run
    end = records[-1].held_out
    text = feed(whole).validation
    assert end.windows == (len(text) - 1) // 8 and end.weights.sum() == 8 * end.windows
    model, _ = load_model(folder)
    rows = feed(whole).held_out(whole.objective, end.windows)
    for i in (0, end.windows // 2, end.windows - 1):
        loss, weights = trainer.cross_entropy(model, row(rows, i))
        assert float(jnp.sum(loss * weights)) == pytest.approx(end.sums[i], rel=1e-5)


def test_ramps_open_in_their_steps_and_leave_no_gates(run):
    _, records, _ = run
    levels = [r.level for r in records if isinstance(r, Step) and r.stage == 1]
    assert levels == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    model = records[-1].model
    assert not any(slot.arrays() for slot in gj.axes_of(model).of_kind("gate"))
    assert gj.sizes(model) == {**gj.sizes(model), "layers": 4, "mlp": 24, "kv_heads": 4}


def test_one_program_for_each_need_and_nothing_recompiles(run):
    """A birth, 3 evaluations and seals (of 3 models), 2 growths, and steps for 1 + 1 + 2 sizes."""
    _, records, _ = run
    assert records[-1].programs == 1 + 3 + 3 + 2 + 4


def test_a_stage_that_does_not_grow_drops_the_gates_of_the_one_before(programs):
    grown = steps(2, grow=gj.msg(mlp=24), ramp=2)
    p = plan(steps(1), grown, steps(2), steps(1, grow=gj.stack(layers=4, order="top")))
    records = list(train(p, feed(p), options=Options(held_out=4), cache=programs))
    assert len(losses(records)) == 6 and gj.sizes(records[-1].model)["layers"] == 4


def test_the_rate_and_the_norms_are_what_was_used(programs):
    """One step of plain gradient descent, done by hand."""
    p = plan(
        steps(1),
        optimizer=trainer.Optimizer("sgd", b1=0.0, clip=None),
        rate=trainer.Schedule(0.5, "constant", warmup=0.0),
    )
    records = list(train(p, feed(p), options=Options(held_out=4), cache=programs))
    trained, rest = gj.partition(p.build())
    rows = jax.tree.map(jnp.asarray, feed(p).batches(p.spans[0]).batch_at(0))

    def mean(trained):
        pairs = jax.vmap(lambda row: trainer.cross_entropy(eqx.combine(trained, rest), row))(rows)
        return jnp.sum(pairs[0] * pairs[1]) / jnp.sum(pairs[1])

    loss, gradient = jax.jit(jax.value_and_grad(mean))(trained)
    leaves = jax.tree.leaves(gradient)
    step = records[1]
    assert step.loss == pytest.approx(float(loss), rel=1e-5) and step.rate == 0.5
    norm = float(jnp.sqrt(sum(jnp.sum(g * g) for g in leaves)))
    assert step.gradient_norm == pytest.approx(norm, rel=1e-4)
    after = jax.tree.map(lambda x, g: x - 0.5 * g, trained, gradient)
    model = gj.partition(records[-1].model)[0]
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_parts_of_a_batch_add_up_to_the_whole(run, programs):
    whole, records, _ = run
    in_parts = every_kind(accumulate=2)
    again = losses(train(in_parts, feed(in_parts), options=Options(held_out=4), cache=programs))
    expected = losses(records)
    assert again.keys() == expected.keys()
    assert [again[n] for n in again] == pytest.approx([expected[n] for n in again], abs=2e-4)


def test_data_go_on_where_the_stage_before_left_off():
    """Blocks are as long as the longest window, so a cursor means the same in every stage."""
    long = Causal(16, packing="concat")
    p = plan(steps(3), steps(4, batch=8), steps(8, objective=long), steps(2))
    batches = [feed(p).batches(span) for span in p.spans]
    assert [b.block for b in batches] == [16] * 4
    # Two windows of 8 to a block: 3 x 4 windows, then 2 x 8, then 4 x 4 whole blocks
    assert [b.start for b in batches] == [0, 6, 14, 30]
    assert [(b.batch, b.seed, b.rank, b.count) for b in batches] == [
        (4, 0, 0, 1),
        (8, 0, 0, 1),
        (4, 0, 0, 1),
        (4, 0, 0, 1),
    ]


def test_the_timeline_of_a_plan_lists_stages_and_paths():
    p = every_kind()
    assert [era.label for era in p.timeline()] == ["small", "ramp", "stack and paths"]
    eras = p.timeline(paths=True)
    assert [era.label for era in eras] == ["small", "ramp", "path 3", "path 3.5", "whole model"]
    assert (eras[0].start, eras[0].flops[0], eras[0].spent[0]) == (0, 0, 0)
    assert (eras[-1].stop, eras[-1].flops[1], eras[-1].spent[1]) == (p.steps, p.flops, p.cost)
    for a, b in zip(eras, eras[1:], strict=False):
        assert (a.stop, a.flops[1], a.spent[1]) == (b.start, b.flops[0], b.spent[0])
    assert [era.start for era in p.timeline()] == [span.start for span in p.spans]


def test_a_profile_is_of_the_steps_asked_for(programs, tmp_path):
    p = plan(steps(4))
    options = Options(held_out=4, profile=(1, 2))
    list(train(p, feed(p), run=tmp_path, options=options, cache=programs))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    # Going on after its first step, there is none to end
    late = Options(held_out=4, profile=(0, 9))
    assert list(train(p, feed(p), run=tmp_path, options=late, cache=programs))[-1].finished


def test_compiling_in_the_background_changes_nothing(run, programs):
    whole, records, _ = run
    options = Options(held_out=4, background=False)
    again = list(train(whole, feed(whole), options=options, cache=programs))
    assert losses(again) == losses(records) and same(again, records)


# Checkpoints and resume --------------------------------------------------------------------------


def test_checkpoints_stand_on_both_sides_of_every_growth(run):
    _, records, folder = run
    saved = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert saved == sorted(Path(r.path).name for r in records if isinstance(r, Saved))
    assert {"00000003-00", "00000003-01", "00000009-01", "00000009-02", "00000018-02"} <= set(saved)


@pytest.mark.parametrize(
    "name",
    ["00000002-00", "00000003-00", "00000003-01", "00000006-01", "00000014-02", "00000018-02"],
)
def test_a_resumed_run_is_bitwise_the_same(run, programs, name, tmp_path):
    """From before, between and after growths, on a ramp and between paths."""
    whole, records, folder = run
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(folder / "checkpoints" / name, tmp_path / "checkpoints" / name)
    options = Options(evaluate_every=whole.flops / 6, held_out=6)
    again = list(train(whole, feed(whole), run=tmp_path, options=options, cache=programs))
    step, stage = map(int, name.split("-"))
    assert again[0] == Begin(stage, step, str(tmp_path / "checkpoints" / name), 1)
    expected = {n: loss for n, loss in losses(records).items() if n >= step}
    assert losses(again) == expected and same(again, records)
    marks = [
        [r.held_out for r in rs if isinstance(r, Step) and r.step >= step]
        for rs in (records, again)
    ]
    assert marks[0] == marks[1]
    seconds = [r.seconds for r in again if isinstance(r, Step)]
    assert all(s > read_lineage(folder / "checkpoints" / name)["seconds"] for s in seconds)


def test_checkpoints_are_written_by_time(programs, tmp_path):
    p = plan(steps(5))
    options = Options(held_out=4, save_minutes=1e-9, keep_last=9)
    records = list(train(p, feed(p), run=tmp_path, options=options, cache=programs))
    assert [r.step for r in records if isinstance(r, Saved)] == [1, 2, 3, 4, 5]
    options = Options(held_out=4, keep_last=9)
    records = list(train(p, feed(p), run=tmp_path / "b", options=options, cache=programs))
    assert [r.step for r in records if isinstance(r, Saved)] == [5]


def test_hosts_agree_on_the_time_to_save_and_seldom_ask(monkeypatch):
    """Of two clocks that differ, that of process 0 counts, and both save before the same step."""
    sent: list[int] = []
    clocks: list[Any] = [types.SimpleNamespace(time=0.0, now=None) for _ in range(2)]
    for clock in clocks:
        clock.now = lambda clock=clock: clock.time
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    timers = [session.SaveTimer(1.0, clock) for clock in clocks]
    for timer in timers:
        timer.restart(0)
    saves = []
    for n in range(1, 2000):
        clocks[0].time, clocks[1].time = 0.1 * n, 0.17 * n
        monkeypatch.setattr(session.hosts, "number_of_first", lambda x: sent.append(x) or x)
        first = timers[0].due(n)
        monkeypatch.setattr(session.hosts, "number_of_first", lambda x: sent[-1])
        assert timers[1].due(n) == first
        if first:
            saves.append(n)
            for timer in timers:
                timer.restart(n)
    assert saves == [600, 1200, 1800] and len(sent) < 60


def test_options_that_make_no_sense_are_refused_at_once():
    with pytest.raises(TrainingError) as error:
        Options(evaluate_every=0, held_out=0, save_every=0, save_minutes=-1, keep_last=0)
    assert str(error.value).count("\n  - ") == 5


def test_checkpoints_stand_in_the_order_of_their_numbers(tmp_path):
    """A plan may have 1,000 stages; as text, stage 100 stands before stage 99."""
    names = ["00000099-99", "00000100-99", "00000100-100", "100000000-101"]
    for name in [*names, "00000099-99.damaged", "lock"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == names
    assert "goes on from step 99 (00000099-99)" in str(damaged(tmp_path / names[1], "cut off"))


def test_a_checkpoint_that_cannot_be_written_is_named():
    with pytest.raises(CheckpointError, match="/dev/null/a/00000000-00 could not be written: "):
        write(Path("/dev/null/a/00000000-00"), {"x": np.zeros(2)}, {})


def test_lineage_says_everything(run):
    whole, records, folder = run
    lineage = read_lineage(folder / "checkpoints" / "00000012-02")
    operators = [gj.values.to_dict(s.grow) for s in whole.stages[1:]]
    assert lineage["operators"] == json.loads(json.dumps(operators))
    assert lineage["births"]["layers"] == [[0, 2], [2, 2]]
    assert lineage["births"]["mlp"] == [[0, 16], [1, 8]] and lineage["births"]["embed"] == [[0, 16]]
    assert eqx.tree_equal(births_of(lineage), whole.spans[2].births)
    assert lineage["parent"] == "00000010-02" and lineage["data"] == feed(whole).digest
    assert lineage["step"] == 12 and lineage["stage"] == 2 and lineage["tokens"] == 12 * TOKENS
    assert lineage["flops"] == sum(sum(s.flops) for s in whole.spans[:2]) + sum(
        whole.spans[2].flops[:3]
    )
    grown = read_lineage(folder / "checkpoints" / "00000003-01")
    crossing = next(r for r in records if isinstance(r, Growth)).crossing
    assert grown["certificate"] == dataclasses.asdict(crossing) and grown["level"] == 0.0
    assert read_lineage(folder / "checkpoints" / "00000006-01")["level"] == 0.75


def test_a_checkpoint_is_enough_to_rebuild_its_model(run):
    whole, records, folder = run
    for name, stage in [("00000002-00", 0), ("00000006-01", 1), ("00000018-02", 2)]:
        model, lineage = load_model(folder / "checkpoints" / name)
        wanted = jax.tree.leaves(model_of(lineage))
        assert [x.shape for x in jax.tree.leaves(model)] == [x.shape for x in wanted]
        assert gj.sizes(model) == whole.spans[stage].sizes
    ramped, _ = load_model(folder / "checkpoints" / "00000006-01")
    gates = [s.value for s in gj.axes_of(ramped).of_kind("gate") if s.arrays()]
    assert gates and all(set(np.unique(g.value)) == {0.75, 1.0} for g in gates)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(records[-1].model), strict=True):
        assert np.array_equal(a, b)


def test_moments_are_carried_through_a_growth(run):
    """Old coordinates keep what was averaged for them, new ones start from nothing."""
    whole, _, folder = run
    moments = []
    for name, span in [("00000003-00", whole.spans[0]), ("00000003-01", whole.spans[1])]:
        trained = gj.partition(ungated(span.model))[0]
        state = jax.eval_shape(whole.optimizer.build().init, trained)
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x, s=where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state
        )
        path = folder / "checkpoints" / name
        moments.append(load(path, {"optimizer": shapes}, only=("optimizer",))["optimizer"][1])
    before, after = moments
    for moment in ("mu", "nu"):
        old, new = (getattr(s, moment).blocks.block.mlp.down for s in (before, after))
        assert np.abs(old).max() > 0
        np.testing.assert_array_equal(new[:, :16], old)
        assert not np.any(new[:, 16:])
    assert after.ages.of["mlp"].tolist() == [3] * 16 + [0] * 8


def test_a_checksum_sees_every_bit_and_every_place():
    x = jnp.arange(24.0).reshape(4, 6)
    (plain,) = checksums(x)
    for other in (x.at[2, 3].add(2**-20), x[::-1], x[:, ::-1], x.at[0, 0].set(-0.0)):
        assert checksums(other)[0] != plain
    mixed = {"a": jnp.array([True, False]), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.int8(-1)}
    swapped = {**mixed, "a": jnp.array([False, True])}
    assert [a == b for a, b in zip(checksums(mixed), checksums(swapped), strict=True)] == [0, 1, 1]


def test_only_what_is_asked_for_is_kept(programs, tmp_path):
    p = plan(steps(7), steps(3, grow=gj.stack(layers=4, order="top")))
    options = Options(held_out=4, save_every=1, keep_last=2, keep_every=4)
    list(train(p, feed(p), run=tmp_path, options=options, cache=programs))
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [
        "00000001-00",  # the first of each stage
        "00000004-00",
        "00000007-01",
        "00000008-01",
        "00000009-01",
        "00000010-01",
    ]


def test_a_checkpoint_of_another_size_is_refused_leaf_by_leaf(run):
    _, _, folder = run
    small, large = (folder / "checkpoints" / name for name in ("00000002-00", "00000018-02"))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model = model_of(read_lineage(large))
    trained, rest = gj.partition(model)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        {"trained": trained, "rest": rest},
    )
    with pytest.raises(CheckpointError) as error:
        load(small, shapes, only=("trained", "rest"))
    text = str(error.value)
    assert "float32[2, 16, 16] in the checkpoint, expected float32[4, 16, 24]" in text
    # All that is in a layer, since there are more of them
    assert text.count("\n  - ") == len(jax.tree.leaves(model.blocks)) and "growjax grow" in text
