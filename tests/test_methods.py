"""What a plan may do besides growing: choose its examples, charge a clock, look at the curvature."""

import dataclasses
import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.axes import axes_of
from growjax.budget import RTX3090_BERT, DepthClock, FlopsClock
from growjax.data.batches import held_out_batch
from growjax.errors import CheckpointError, PlanError
from growjax.models import T5Config
from growjax.plan.losses import drawn_loss
from growjax.plan.optimizer import Optimizer, Rule
from growjax.plan.stages import Work
from growjax.plan.steps import step_flops
from growjax.programs.ahead import Ahead
from growjax.select import RhoLoss, SelectiveBackprop
from growjax.train import Options, Schedule, Stage, cross_entropy, train
from tests.runs import BATCH, LENGTH, SMALL, feed, losses, plan, programs_of, same, steps, weights


OPTIONS = Options(held_out=4)
CLOCK = DepthClock("toy", (1.0, 2.0, 3.0, 4.0), rows=BATCH, forward=0.5, curvature=2.0)


def run(of, **more: Any) -> list[Any]:
    return list(train(of, feed(of), options=OPTIONS, **more))


# Selection ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"step": "shard_map"}], ids=str)
def test_a_step_trains_on_what_was_chosen_and_on_nothing_else(layout, programs):
    """One step of RHO is a plain step on the rows whose reducible loss is largest."""
    made = plan(steps(1, select=RhoLoss(offers=3)), layout=gj.train.Layout(**layout))
    reference = dataclasses.replace(made, seed=5).build()
    done = run(made, reference=reference, cache=programs)
    rows = feed(made).batches(made.spans[0]).batch_at(0)
    assert rows["tokens"].shape[0] == 3 * BATCH

    def mean(model):
        by_row, counts = jax.vmap(lambda row: cross_entropy(model, row))(rows)
        return (by_row * counts).sum(1) / counts.sum(1)

    score = np.asarray(mean(made.build()) - mean(reference))
    best = np.sort(np.argsort(-score)[:BATCH])
    expected = np.asarray(mean(made.build()))[best].mean()
    assert losses(done)[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses(done)[0] != pytest.approx(float(mean(made.build()).mean()), rel=1e-3)


def test_choosing_among_one_batch_changes_nothing(programs):
    plain, chosen = (
        run(plan(steps(3, select=select)), cache=programs)
        for select in (None, SelectiveBackprop(0.0))
    )
    assert losses(plain) == losses(chosen) and same(plain, chosen)


def test_the_next_stage_reads_on_where_all_that_was_offered_ends():
    made = plan(steps(3, select=SelectiveBackprop()), steps(2))
    first, second = (feed(made).batches(span) for span in made.spans)
    assert (first.batch, second.batch) == (2 * BATCH, BATCH)
    read = [r.tobytes() for n in range(3) for r in first.batch_at(n)["tokens"]]
    after = [r.tobytes() for n in range(2) for r in second.batch_at(n)["tokens"]]
    assert len(set(read) | set(after)) == 3 * 2 * BATCH + 2 * BATCH


def test_rho_without_its_second_model_stops_before_the_first_step():
    made = plan(steps(1, select=RhoLoss()))
    with pytest.raises(PlanError, match="reference: a stage's selector compares"):
        run(made)


def test_a_run_goes_on_with_the_second_model_that_it_began_with(programs, tmp_path):
    made = plan(steps(4, select=RhoLoss()))
    one, other = (dataclasses.replace(made, seed=n).build() for n in (5, 6))
    options = dataclasses.replace(OPTIONS, save_every=2, keep_last=9)

    def go(folder, reference):
        return list(
            train(
                made, feed(made), run=folder, options=options, reference=reference, cache=programs
            )
        )

    whole = go(tmp_path / "whole", one)
    half = tmp_path / "half"
    (half / "checkpoints").mkdir(parents=True)
    saved = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    saved[0].rename(half / "checkpoints" / saved[0].name)
    with pytest.raises(CheckpointError, match="chose by another second model"):
        go(half, other)
    assert same(go(half, one), whole)


def test_a_second_model_that_cannot_read_what_is_offered_stops_it_as_well():
    made = plan(steps(1, "chosen", select=RhoLoss()), steps(1, "all"))
    small = dataclasses.replace(SMALL, vocab=300, positions=LENGTH - 1)
    pairs = T5Config(1, 1, embed=16, heads=2, head_dim=8, mlp=16, vocab=SMALL.vocab)
    for config, faults in {
        small: [
            "8 tokens are more than the model's 7",
            "its vocabulary has 300 words, and that of the trained model 384",
        ],
        pairs: ["for one sequence, which T5 does not read"],
    }.items():
        with pytest.raises(PlanError) as error:
            run(made, reference=eqx.filter_eval_shape(config.build, jax.random.key(0)))
        assert all(fault in str(error.value) for fault in faults)
        assert "stage 0 'chosen': reference: " in str(error.value) and "'all'" not in str(
            error.value
        )


@pytest.mark.parametrize(
    "select", [SelectiveBackprop(1.0), SelectiveBackprop(2.0, offers=4)], ids=str
)
def test_looking_is_charged_as_the_clock_says(select):
    plain = plan(steps(1), clock=CLOCK)
    made = plan(steps(1, select=select), clock=CLOCK)
    free = plan(steps(1, select=select), clock=dataclasses.replace(CLOCK, forward=0.0))
    assert plain.cost == 2 * 10**9 == free.cost
    assert made.cost == plain.cost + select.offers * 10**9  # half of a step of two layers, each
    assert made.flops == free.flops == pytest.approx(plain.flops * (1 + select.offers / 3))


# Clocks ------------------------------------------------------------------------------------------


def test_a_budget_in_reference_seconds_buys_more_steps_of_a_small_model():
    small = dataclasses.replace(SMALL, layers=1)
    made = plan(
        Stage("one", share=0.25),
        Stage("two", share=0.75, grow=gj.stack(layers=2)),
        model=small,
        clock=CLOCK,
        budget=16.0,
    )
    assert [span.steps for span in made.spans] == [4, 6] and made.cost == 16 * 10**9
    assert [s.spent for s in made.spans] == [0, 4 * 10**9]
    by_seconds = plan(Stage(seconds=4.0), model=small, clock=CLOCK)
    assert by_seconds.steps == 4
    twice = dataclasses.replace(made, clock=dataclasses.replace(CLOCK, seconds=(0.5, 1.0)))
    assert twice.steps == 2 * made.steps
    scaled = dataclasses.replace(twice, budget=8.0)
    assert [s.costs for s in scaled.spans] != [s.costs for s in made.spans]
    assert [scaled.learning_rate(s.spent) for s in scaled.spans] == [
        made.learning_rate(s.spent) for s in made.spans
    ]


def test_reference_seconds_need_a_clock_that_has_them():
    with pytest.raises(PlanError, match="it charges FLOPs, and stages last seconds"):
        plan(Stage(seconds=1.0))
    with pytest.raises(PlanError, match="budget: expected a positive number or None, got -1"):
        plan(Stage(share=1.0), budget=-1.0, clock=CLOCK)
    with pytest.raises(PlanError, match="stage 0 ''(.|\n)*1 to 4 layers, and 5 run"):
        plan(Stage(seconds=1.0), clock=CLOCK, model=dataclasses.replace(SMALL, layers=5))
    with pytest.raises(PlanError, match="clock: expected a clock such as"):
        plan(Stage(seconds=1.0), clock="3090")


def test_records_say_what_was_charged(programs):
    made = plan(steps(2), clock=RTX3090_BERT)
    done = [r for r in run(made, cache=programs) if isinstance(r, gj.train.Step)]
    each = RTX3090_BERT.seconds[1] * BATCH / 128
    assert [r.spent for r in done] == pytest.approx([each, 2 * each])
    assert [r.flops for r in done] == [made.flops // 2, made.flops]


@pytest.mark.parametrize(
    "stage",
    [
        steps(300, subnet=gj.progressive_layer_drop(floor=0.2, rate=0.02, inverse=False)),
        # Past the 1,024 steps whose coins are tossed at once
        steps(1100, subnet=gj.random_path(2.5, mode="bernoulli")),
        # Chances that change in the midst of those
        Stage("", subnet=gj.path_schedule((2, 3, 4), layers=4, steps=300, mode="bernoulli")),
    ],
    ids=lambda stage: type(stage.subnet).__name__,
)
def test_layers_that_coins_leave_out_cost_nothing(stage):
    """What is charged is what each step draws: as many layers as its own flags say."""
    made = plan(stage, model=dataclasses.replace(SMALL, layers=4), clock=CLOCK, seed=3)
    axes, parts = axes_of(eqx.filter_eval_shape(made.build)), [w.part for w in made.spans[0].works]

    def depth(part, n):
        moves = part.maps(axes, key=gj.step_key(3, n), step=n)
        return moves[0].active.sum() if moves else jnp.asarray(4)

    drawn, each = np.zeros(made.steps, int), jnp.arange(made.steps)
    for part in set(parts):
        depths = jax.jit(jax.vmap(functools.partial(depth, part)))(each)
        drawn = np.where([p == part for p in parts], depths, drawn)
    step = {d: s * 1e9 for d, s in enumerate((CLOCK.line[0], *CLOCK.seconds))}
    assert list(made.spans[0].costs) == pytest.approx([step[int(d)] for d in drawn], abs=1)
    assert len(set(drawn.tolist())) >= 3
    counted = {d: n for d, n in zip(drawn.tolist(), made.spans[0].flops, strict=True)}
    gaps = {counted[d + 1] - counted[d] for d in counted if d + 1 in counted}
    assert len(gaps) == 1 and counted[4] == step_flops(made.spans[0].model, made.objective, BATCH)


# Curvature ---------------------------------------------------------------------------------------


class Watching(Optimizer):
    """Follows the second gradient alone, and asks for it every other step."""

    @property
    def curvature_every(self) -> int | None:
        return 2

    def build(self) -> Rule:
        def update(gradient, state, params, *, rate, curvature=None, labels):
            del params
            if curvature is None:
                return jax.tree.map(jnp.zeros_like, gradient), state
            # As many labels as there are places that count
            return jax.tree.map(lambda g: -rate * labels * g, curvature), state

        return Rule(lambda params: (), update)


def test_a_second_gradient_is_taken_when_a_rule_asks_for_it(programs):
    """That of labels which the model draws itself: at every place that counts, whatever the text says."""
    made = plan(steps(4), optimizer=Watching(), rate=Schedule(0.01, "constant", warmup=0.0))
    assert made.spans[0].works == (Work(None, True), Work()) * 2
    assert [i for i, _ in made.spans[0].programs] == [0, 1]
    plain = plan(steps(1)).flops
    assert made.spans[0].flops == (2 * plain, plain) * 2
    one = dataclasses.replace(made, stages=(steps(1),))
    after = weights(run(one, cache=programs))

    model, rows = one.build(), feed(one).batches(one.spans[0]).batch_at(0)
    keys = jax.random.split(gj.maps.fold_in_name(gj.step_key(0, 0), "labels"), BATCH)
    rows = {**rows, "key": jax.random.key_data(keys)}
    trained, rest = gj.partition(model)

    def loss(trained):
        by_row, counts = jax.vmap(lambda row: drawn_loss(eqx.combine(trained, rest), row))(rows)
        return (by_row * counts).sum() / counts.sum()

    labels = rows["weights"].sum()
    assert labels > BATCH
    expected = jax.tree.map(lambda p, g: p - 0.01 * labels * g, trained, jax.grad(loss)(trained))
    for x, y in zip(after, jax.tree.leaves(eqx.combine(expected, rest)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_drawn_labels_are_the_models_own():
    """The loss of many draws is the entropy of the model's distribution."""
    model = plan(steps(1)).build()
    example = {
        k: v[0]
        for k, v in held_out_batch(
            feed(plan(steps(1))).validation, plan(steps(1)).objective, 1
        ).items()
    }
    scores = jax.nn.log_softmax(gj.models.predictions(model, example))
    entropy = -(jnp.exp(scores) * scores).sum(-1)
    keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(0), 4000))
    drawn = jax.vmap(lambda k: drawn_loss(model, {**example, "key": k})[0])(keys)
    error = drawn.std(0) / 4000**0.5
    assert np.all(np.abs(drawn.mean(0) - entropy) < 5 * error)


# Growth, schedules, seeds ------------------------------------------------------------------------


@pytest.mark.parametrize("carried", ["dual", "zero", "reset"])
def test_what_becomes_of_the_optimizer(carried, programs):
    """Copied layers keep their moments, start again alone, or everything starts again."""
    made = plan(steps(3), steps(1, grow=gj.stack(layers=4), carry=carried))
    ahead = Ahead(made, programs_of(made), background=False)
    state = ahead.get(("birth", 0, None))(np.int32(0))
    ones = state._replace(optimizer=jax.tree.map(jnp.ones_like, state.optimizer))
    grown = ahead.get(("grow", 1, None))(ones, np.int32(0))
    adam = grown.optimizer[1]
    moment = np.asarray(adam.mu.blocks.block.mlp.up).mean((1, 2))
    ages = {"dual": [1, 1, 1, 1], "zero": [1, 1, 0, 0], "reset": [0, 0, 0, 0]}[carried]
    assert moment.tolist() == ages == adam.ages.of["layers"].tolist()
    embedding = float(np.mean(adam.mu.embedding.table))
    assert embedding == (0 if carried == "reset" else 1)


def test_a_rewound_rate_starts_again_from_its_peak():
    base = {"rate": Schedule(1.0, "linear", warmup=0.1)}
    stages = steps(40), steps(20), steps(40)
    plain = plan(*stages, **base)
    cost = plain.cost
    at = {u: plain.learning_rate(u * cost) for u in (0.2, 0.39, 0.5, 0.999, 1.0)}
    for kind in ("stretch", "slope"):
        again = plan(stages[0], dataclasses.replace(stages[1], rewind=kind), stages[2], **base)
        assert again.learning_rate(0.39 * cost) == at[0.39]
        assert again.learning_rate(0.4 * cost) == pytest.approx(1.0)
        slope = (again.learning_rate(0.5 * cost) - again.learning_rate(0.6 * cost)) / 0.1
        end = again.learning_rate(cost)
        if kind == "stretch":
            assert slope == pytest.approx(1 / 0.6) and end == pytest.approx(0.0, abs=1e-9)
        else:
            assert slope == pytest.approx(1 / 0.9) and end == pytest.approx((0.4 - 0.1) / 0.9)
    # A growth during the warmup rewinds nothing
    early = plan(steps(5), steps(95, rewind="slope"), **base)
    assert early.learning_rate(0.05 * cost) == plain.learning_rate(0.05 * cost)


def test_two_seeds_share_every_program(programs):
    stages = (
        steps(2),
        steps(2, "grown", grow=gj.msg(mlp=24), ramp=2, subnet=gj.random_path(2, keep=(0,))),
    )
    first, second = (plan(*stages, seed=seed) for seed in (0, 1))
    shared: dict[str, Any] = {}
    one, two = (run(of, cache=shared) for of in (first, second))
    assert one[-1].programs > 0 == two[-1].programs
    assert losses(one) != losses(two)
    assert losses(two) == losses(run(second, cache={}))


@pytest.mark.parametrize(
    "message, stage",
    [
        ("select: expected a selector such as RhoLoss", lambda: steps(1, select="rho")),
        ("carry: expected one of 'dual', 'zero', 'reset'", lambda: steps(1, carry="keep")),
        ("carry: 'zero' is for a stage that grows", lambda: steps(1, carry="zero")),
        ("rewind: expected one of 'stretch', 'slope' or None", lambda: steps(1, rewind="peak")),
    ],
)
def test_fields_that_make_no_sense_are_refused(message, stage):
    with pytest.raises(PlanError, match=message):
        plan(stage())


def test_such_plans_survive_the_trip_through_json(tmp_path):
    made = plan(
        Stage(share=0.5, select=RhoLoss(3)),
        Stage(share=0.5, grow=gj.stack(layers=4), carry="zero", rewind="slope"),
        clock=CLOCK,
        budget=30.0,
    )
    gj.train.save_plan(made, tmp_path / "plan.json")
    again = gj.train.load_plan(tmp_path / "plan.json")
    assert again == made and again.clock.identity == made.clock.identity
    assert list(itertools.chain.from_iterable(s.costs for s in again.spans)) == list(
        itertools.chain.from_iterable(s.costs for s in made.spans)
    )
    assert isinstance(plan(steps(1)).clock, FlopsClock)
