"""Growth that is fitted inside a run: on its own batches, charged, logged, and the same after a kill."""

import dataclasses
import io
import os
import signal
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import fitting, growth, values
from growjax.algebra import NONE, AxisMap
from growjax.budget import RTX3090_BERT, FlopsClock
from growjax.errors import PlanError, StateError, TrainingError
from growjax.forecast.dryrun import dry_run
from growjax.growth import Fit, gradmax, ligo
from growjax.plan import Rate
from growjax.plan.losses import objective
from growjax.plan.steps import growth_flops
from growjax.programs.ahead import needs
from growjax.runs.checkpoint import read_lineage
from growjax.runs.records import End, Growth, Step
from growjax.runs.run import Run
from growjax.train import Options, Probe, cross_entropy, train, watch
from growjax.train.transition import fit_operator
from tests.runs import BATCH, SMALL, TOKENS, feed, losses, plan, same, steps


OPTIONS = Options(save_minutes=None, held_out_end=0, held_out=8)
GROW = ligo(mlp=20, layers=3, batches=3, rate=1e-2)
PLAN = plan(steps(2, "small"), steps(4, "large", grow=GROW, carry="reset"))


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run with a fit: its folder, its records, and what was printed."""
    folder, text = tmp_path_factory.mktemp("whole"), io.StringIO()
    console = Console(file=text, width=200)
    records = train(PLAN, feed(PLAN), run=folder, options=OPTIONS, cache=cache)
    rows = list(watch(records, PLAN, run=folder, console=console))
    return folder, rows, text.getvalue()


def growth_in(records: Any) -> Growth:
    (record,) = [r for r in records if isinstance(r, Growth)]
    return record


def test_a_fit_is_charged_in_flops_tokens_and_cost_and_logged(whole):
    folder, records, text = whole
    span, crossing = PLAN.spans[1], growth_in(records).crossing
    fit = crossing.fit
    assert fit is not None and fit.batches == 3 == len(fit.losses)
    assert fit.losses[-1] < fit.losses[0]
    assert fit.tokens == 3 * TOKENS and fit.cost == fit.flops == span.charged
    # At least as much as as many steps of the large model
    assert 3 * span.flops[0] < fit.flops < 6 * span.flops[0]
    done = [r for r in records if isinstance(r, Step)]
    before, after = done[1], done[2]
    assert after.tokens - before.tokens == 4 * TOKENS
    assert after.flops - before.flops == after.spent - before.spent == fit.flops + span.flops[0]
    last = done[-1]
    assert (last.tokens, last.flops, last.spent) == (PLAN.tokens, PLAN.flops, PLAN.cost)
    assert PLAN.timeline()[1].flops == (before.flops + fit.flops, PLAN.flops)
    lineage = read_lineage(Run(folder).checkpoints()[-2])
    assert lineage["certificate"]["fit"] == dataclasses.asdict(fit) | {"losses": list(fit.losses)}
    assert lineage["flops"] == before.flops + fit.flops
    (row,) = [row for row in Run(folder).rows() if row["kind"] == "growth"]
    assert row["crossing"]["fit"]["losses"] == list(fit.losses)
    assert f"fitted to 3 batches: loss {fit.losses[0]:.4f} to {fit.losses[-1]:.4f}" in text


def test_the_run_fits_what_one_fits_by_hand_on_the_first_batches_of_the_stage(whole, cache):
    _, records, _ = whole
    short = dataclasses.replace(PLAN, stages=PLAN.stages[:1], rate=Held(PLAN))
    small = list(train(short, feed(short), options=OPTIONS, cache=cache))
    assert losses(small) == {n: x for n, x in losses(records).items() if n < 2}
    assert isinstance(small[-1], End)

    def loss(model, batch):
        rows = eqx.filter_vmap(lambda row: cross_entropy(model, row))(batch)
        return objective(rows, jnp.sum(batch["weights"]))

    with feed(PLAN).stream(PLAN.spans[1], 0) as stream:
        batches = [next(stream)[1] for _ in range(3)]
        with feed(PLAN).stream(PLAN.spans[1], 0) as again:
            # It trains on the same batches afterwards
            np.testing.assert_array_equal(next(again)[1]["tokens"], batches[0]["tokens"])
    by_hand = fitting.fit(GROW, small[-1].model, batches, loss, key=PLAN.key("grow"))
    fit = growth_in(records).crossing.fit
    assert fit is not None
    np.testing.assert_allclose(by_hand.losses, fit.losses, rtol=1e-5)
    assert by_hand.flops == fit.flops
    big = gj.grow(by_hand.operator, small[-1].model)
    assert losses(records)[2] == pytest.approx(float(loss(big, batches[0])), rel=1e-4)


@values.register
@dataclasses.dataclass(frozen=True)
class Held(Rate):
    """The rates of another plan, whatever the cost of this one."""

    other: Any
    peak: float = 1e-2
    warmup: float = 0.0

    def at(self, done):
        spans = self.other.spans
        return self.other.learning_rate(done * sum(spans[0].costs))


class Signalled:
    """The batches of a feed, with a signal to stop before one of the fit's."""

    def __init__(self, of, at: int):
        self.of, self.digest, self.held_out, self.at = of, of.digest, of.held_out, at
        self.fits = 0

    def stream(self, span, first):
        if span.index == 1 and first == 0 and self.at >= 0:
            return _Stream(self.of.stream(span, first), self.at)
        return self.of.stream(span, first)


class _Stream:
    def __init__(self, of, at):
        self.of, self.at = of, at

    def __enter__(self):
        self.rows = self.of.__enter__()
        return self._batches()

    def __exit__(self, *error):
        return self.of.__exit__(*error)

    def _batches(self):
        for n, batch in enumerate(self.rows):
            if n == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def test_a_run_that_is_stopped_during_its_fit_fits_again_to_the_same_numbers(
    whole, cache, tmp_path
):
    _, records, _ = whole
    data: Any = Signalled(feed(PLAN), 1)
    stopped = list(train(PLAN, data, run=tmp_path, options=OPTIONS, cache=cache))
    end = stopped[-1]
    assert isinstance(end, End) and not end.finished and end.step == 2
    assert not [r for r in stopped if isinstance(r, Growth)]
    rest = list(train(PLAN, feed(PLAN), run=tmp_path, options=OPTIONS, cache=cache))
    assert losses(rest) == {n: x for n, x in losses(records).items() if n >= 2}
    assert same(rest, records)
    ours, theirs = growth_in(rest).crossing, growth_in(records).crossing
    assert (ours.fit, ours.after) == (theirs.fit, theirs.after)


# An operator of one's own --------------------------------------------------------------------------


@values.register
class Offset(Fit):
    """New units whose incoming weights are all one number: that of the batches so far."""

    size: int = eqx.field(static=True)
    batches: int = eqx.field(static=True, default=2)
    exactness = "exact-given-init"

    def start(self, model, *, key):
        return jnp.zeros(())

    def improved(self, numbers, model, measure):
        loss, _ = measure(lambda _: model, numbers)
        return numbers + 1, loss

    def maps_of(self, axes, numbers):
        old = axes.size("mlp")
        source = [*range(old), *[NONE] * (self.size - old)]
        number = 0.0 if numbers is None else numbers
        share = np.where(np.arange(self.size) < old, 1.0, 0.0)
        init = lambda key, shape, dtype: jnp.full(shape, number, dtype)  # noqa: E731
        return [AxisMap("mlp", source, share=share, init=init)]

    def frozen(self, numbers):
        return gj.zeros(mlp=self.size)

    def faults(self, numbers):
        if numbers > 2:
            yield f"the number is {numbers:g}"


def offset() -> Any:
    return plan(steps(2), steps(2, grow=Offset(size=24)))


def test_an_operator_of_ones_own_is_fitted_as_well(cache):
    own = offset()
    records = list(train(own, feed(own), options=OPTIONS, cache=cache))
    crossing = growth_in(records).crossing
    assert crossing.fit is not None and len(crossing.fit.losses) == 2
    # Without a change of the model, the loss of a fit is that of the next batches
    assert crossing.change < 1e-5
    assert crossing.fit.flops == 2 * own.spans[0].flops[0]


@pytest.mark.parametrize(
    "loss, number, message",
    [
        (np.nan, 0.0, "its fit has a loss of nan on batch 0"),
        (1.0, 7.0, "(?s)must not grow.*the number is 7"),
    ],
    ids=["nan", "refused"],
)
def test_a_fit_that_went_wrong_does_not_grow(loss, number, message):
    own: Any = offset()
    programs = {"numbers": lambda state, seed: number, "fit": lambda *_: (number, np.float32(loss))}

    def get(need: Any) -> Any:
        return programs[need[0]]

    with pytest.raises(TrainingError, match=message):
        fit_operator(own, own.spans[1], cast(Any, None), get, iter("abc"), lambda: None)


# Plans ---------------------------------------------------------------------------------------------


def test_clocks_of_seconds_charge_a_fit_by_the_price_of_the_stages_flops():
    timed = plan(*PLAN.stages, clock=dataclasses.replace(RTX3090_BERT, fit="linear"))
    free, span = PLAN.spans[1], timed.spans[1]
    assert span.fit_flops == free.fit_flops
    assert span.charged == pytest.approx(free.fit_flops * span.costs[0] / span.flops[0], abs=1)
    assert PLAN.clock == FlopsClock() and free.charged == free.fit_flops


def test_lesa_is_charged_for_its_network_and_other_fills_for_nothing():
    three = dataclasses.replace(SMALL, layers=3)

    def grown(**fields: Any) -> Any:
        op = growth.between(layers=5, **fields)
        return plan(steps(2), steps(2, grow=op), model=three).spans[1]

    assert grown().charged == grown(fill="transport").charged == 0
    two, four, six = (grown(fill="lesa", epochs=n).charged for n in (2, 4, 6))
    assert 0 < two and four - two == six - four > 0
    assert grown(fill="lesa").fit_tokens == 0
    chained = growth.chain(gj.copy(mlp=24), growth.between(layers=5, fill="lesa"))
    assert plan(steps(2), steps(2, grow=chained), model=three).spans[1].charged > 0


def test_the_fit_of_a_candidate_is_part_of_its_trial():
    plain = steps(4, "plain")
    probe = Probe(PLAN, 1, (PLAN.stages[1], plain), steps=2)
    span = PLAN.spans[1]
    assert probe.costs[0] == span.fit_cost + 2 * span.costs[0] == span.charged + 2 * span.costs[0]
    assert probe.plans[1].stages[1].charge == probe.costs[0]
    assert probe.plans[0].spans[1].charged == probe.costs[1] + span.fit_cost


def test_a_forecast_knows_the_fit_and_its_programs():
    span, forecast = PLAN.spans[1], dry_run(PLAN)
    text = io.StringIO()
    Console(file=text, width=200).print(forecast)
    note = f"stage 1: {GROW} is fitted first: {span.fit_flops:.4g} FLOPs, {3 * TOKENS} tokens"
    assert note in text.getvalue() and not forecast.refusals
    assert forecast.flops == PLAN.flops
    assert forecast.stages[1].cost == PLAN.cost - sum(PLAN.spans[0].costs)
    kinds = [need[0] for need in needs(span, first=False)]
    assert kinds[:4] == ["numbers", "fit", "grow", "before"]


def test_accumulation_and_selection_are_charged_for_the_rows_they_read():
    two = growth_flops(GROW, PLAN.spans[0].model, PLAN.objective, 2 * BATCH)
    one = growth_flops(GROW, PLAN.spans[0].model, PLAN.objective, BATCH)
    # Making the large model does not depend on the rows
    assert one < two < 2 * one
    chosen = plan(
        steps(2),
        steps(4, grow=GROW, carry="reset", select=gj.select.SelectiveBackprop(offers=2)),
    )
    assert chosen.spans[1].fit_flops == two and chosen.spans[1].fit_tokens == 6 * TOKENS


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: plan(steps(2, grow=GROW)),
            PlanError,
            "fitted to the first 3 batches of its stage",
        ),
        (lambda: plan(steps(4, grow=ligo(vocab=400))), PlanError, "no matrix grows these axes"),
        (lambda: plan(steps(4, grow=gradmax(mlp=99))), PlanError, "at most 16 directions, got 83"),
        (lambda: dry_run(plan(steps(4, grow=GROW))).check(), PlanError, "carry='dual'"),
        (lambda: train_one(plan(steps(2), steps(4, grow=GROW))), StateError, "carry='reset'"),
    ],
    ids=["short", "table", "directions", "forecast", "state"],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_trained(make, error, message):
    with pytest.raises(error, match=message):
        make()


def train_one(of: Any) -> None:
    next(train(of, feed(of), options=OPTIONS))


def test_fits_are_values():
    for op in (GROW, gradmax(mlp=24, batches=2, gates=("glu",))):
        assert values.from_dict(values.to_dict(op)) == op
        assert growth.parse(str(op)) == op
    assert "2303.00980" in gj.cite(PLAN) and "2201.05125" in gj.cite(gradmax(mlp=24))
