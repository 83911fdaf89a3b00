"""Plans as data: what is refused, what is worked out before anything runs, and the trip through JSON."""

import dataclasses
import io
import json
import re
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax import data
from growjax.budget import decayed
from growjax.data import MLM, UL2, Causal, SpanCorruption
from growjax.errors import DataError, FormatError, LayoutError, PlanError
from growjax.forecast.dryrun import dry_run
from growjax.models import BERTConfig, LlamaConfig, T5Config
from growjax.nn import RotaryScaling
from growjax.plan.files import differences
from growjax.plan.schedule import Schedule
from growjax.plan.steps import Steps
from growjax.train import Layout, Optimizer, Plan, Stage, load_plan, save_plan
from growjax.values import from_dict, to_dict
from tests.runs import SMALL, every_kind, plan, steps


T5_SMALL = T5Config(
    encoder_layers=2, decoder_layers=2, embed=16, heads=2, head_dim=8, mlp=32, vocab=384
)
FAULTS = {
    "batch: expected a positive integer": lambda: plan(steps(1), batch=0),
    "accumulate: expected a positive integer": lambda: plan(steps(1), accumulate=0),
    "4 sequences cannot be computed in 3 equal parts": lambda: plan(steps(1), accumulate=3),
    "model: expected a configuration such as GPTConfig(...)": lambda: plan(steps(1), model="gpt"),
    "objective: expected an objective such as Causal(128), got 128": lambda: plan(
        steps(1), objective=128
    ),
    "99 tokens are more than the model's 16": lambda: plan(steps(1), objective=Causal(99)),
    "for an encoder and a decoder, which GPT does not read": lambda: plan(
        steps(1), objective=SpanCorruption(16)
    ),
    "for one sequence, which T5 does not read": lambda: plan(steps(1), model=T5_SMALL),
    "stages: expected at least one": lambda: plan(),
    "budget: the stages are shares": lambda: plan(Stage(share=1.0)),
    "budget: no stage is a share": lambda: plan(steps(1), budget=1e9),
    "budget: expected a positive": lambda: plan(Stage(share=1.0), budget=-1.0),
    "all together 1, got [0.5, 0.4]": lambda: plan(Stage(share=0.5), Stage(share=0.4), budget=1e9),
    "every one must have a share": lambda: plan(Stage(share=1.0), steps(1), budget=1e9),
    "one of tokens, flops, seconds and share, got none": lambda: plan(Stage()),
    "seconds and share, got tokens and share": lambda: plan(steps(1, share=1.0), budget=1e9),
    "tokens: expected a positive": lambda: plan(Stage(tokens=0)),
    "flops: expected a positive": lambda: plan(Stage(flops=0)),
    "share: expected a share above 0": lambda: plan(
        Stage(share=-1.0), Stage(share=2.0), budget=1e9
    ),
    "grow: expected an operator": lambda: plan(steps(1, grow={"mlp": 32})),
    "subnet: expected a sub-network such as": lambda: plan(steps(1, subnet=3)),
    "rewarm: expected a share": lambda: plan(steps(1, rewarm=2)),
    "stage '' cannot be run:\n  - batch: expected a positive integer": lambda: steps(1, batch=-1),
    "such as Causal(128) or None, got 3": lambda: steps(1, objective=3),
    "ramp: expected a number of steps": lambda: plan(steps(1, ramp=-1)),
    "ramp of 5 steps is longer than its 4 steps": lambda: plan(
        steps(4, grow=gj.msg(mlp=32), ramp=5)
    ),
    "ramp: it grows mlp behind gates": lambda: plan(steps(4, grow=gj.msg(mlp=32))),
    "ramp: it grows nothing behind gates": lambda: plan(
        steps(4, grow=gj.stack(layers=3, order="top"), ramp=2)
    ),
    "'mlp' is still ramping": lambda: plan(
        steps(4, grow=gj.chain(gj.msg(mlp=32), gj.msg(mlp=48)), ramp=2)
    ),
    "mlp=8 is smaller than the model's 16": lambda: plan(steps(4, grow=gj.msg(mlp=8), ramp=2)),
    "'top' copies the last 3 layers, but there are 2": lambda: plan(
        steps(4, grow=gj.stack(layers=5, order="top"))
    ),
    "expected between 2 (the fixed layers) and 2, got 3": lambda: plan(
        steps(4, subnet=gj.random_path(3))
    ),
    "paths are made for 4 layers, and the model has 2": lambda: plan(
        Stage(subnet=gj.path_schedule((3, 4), layers=4, steps=6))
    ),
    "unknown axis 'layers'": lambda: plan(
        Stage(subnet=gj.path_schedule((2,), layers=2, steps=6)),
        model=T5_SMALL,
        objective=SpanCorruption(16),
    ),
    "path schedule has a length of its own; leave tokens out": lambda: plan(
        steps(6, subnet=gj.path_schedule((2,), layers=2, steps=6))
    ),
    "peak: expected a positive": lambda: Schedule(0.0),
    "warmup: expected a share": lambda: Schedule(1.0, warmup=1.0),
    "shape: expected one of 'linear'": lambda: Schedule(1.0, "step"),  # type: ignore[arg-type]
    "final: expected a share": lambda: Schedule(1.0, final=2.0),
    "decay: 0.9 of the budget does not fit": lambda: Schedule(1.0, "wsd", warmup=0.2, decay=0.9),
    "b2: expected a rate": lambda: Optimizer(b2=1.0),
    "weight_decay: expected 0 or more": lambda: Optimizer(weight_decay=-1.0),
    "clip: expected a positive norm or None": lambda: Optimizer(clip=0.0),
    "name: expected one of 'adamw'": lambda: Optimizer("adam"),  # type: ignore[arg-type]
    "the factor of the learning rate and the steps": lambda: Optimizer(new_rate=2.0),
    "decayed: expected one of 'matrices'": lambda: Optimizer(decayed="gains"),  # type: ignore[arg-type]
    "rho: expected a positive number": lambda: Optimizer("sophia", rho=0.0),
    "refresh_every: expected 1 or more": lambda: Optimizer("sophia", refresh_every=0),
    "momentum: expected a rate": lambda: Optimizer("muon", momentum=1.0),
    "b3: expected a rate": lambda: Optimizer("ademamix", b3=1.0),
    "alpha: expected 0 or more": lambda: Optimizer("ademamix", alpha=-1.0),
    "give b1 above 0": lambda: Optimizer("schedule_free", b1=0.0),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_plan_that_cannot_be_run_is_refused(message):
    with pytest.raises(PlanError, match=re.escape(message)):
        FAULTS[message]()


def test_all_faults_come_in_one_error():
    with pytest.raises(PlanError) as error:
        plan(
            steps(4, objective=Causal(99)),
            steps(3, name="wide", grow=gj.msg(mlp=32), ramp=4),
            steps(3, name="narrow", grow=gj.msg(mlp=8), ramp=2),
        )
    faults = re.findall(r"^  - (.*)$", str(error.value), re.MULTILINE)
    assert [fault[:16] for fault in faults] == [
        "stage 0 '': obje",
        "stage 1 'wide': ",
        "stage 2 'narrow'",
    ]


def test_a_plan_knows_its_cost_before_it_runs():
    run = plan(
        steps(3),
        steps(4, grow=gj.msg(mlp=32), ramp=4),
        steps(2, grow=gj.stack(layers=3, order="top")),
        Stage(subnet=gj.path_schedule((2, 2.5, 3), layers=3, steps=12)),
    )
    assert [span.start for span in run.spans] == [0, 3, 7, 9]
    assert [(s.sizes["layers"], s.sizes["mlp"]) for s in run.spans] == [
        (2, 16),
        (2, 32),
        (3, 32),
        (3, 32),
    ]
    narrow, wide, deep, *_ = (set(span.flops) for span in run.spans)
    assert len(narrow) == len(wide) == len(deep) == 1 and max(narrow) < max(wide) < max(deep)
    paths = run.spans[3].flops
    assert set(paths[:4]) == wide and set(paths[4:8]) == wide | deep and set(paths[8:]) == deep
    assert run.flops == sum(map(sum, (span.flops for span in run.spans))) and run.steps == 21
    assert [i for i, _ in run.spans[3].programs] == [0, paths.index(max(deep))]


@pytest.mark.parametrize(
    "stage, rule",
    [
        (Stage(subnet=gj.path_schedule((2, 2.5, 3.25, 4), layers=4, steps=24)), "adamw"),
        (steps(24, subnet=gj.random_path(2.5)), "adamw"),
        (steps(24, subnet=gj.random_path(3)), "adamw"),
        (steps(24, subnet=gj.random_path(3, mode="bernoulli")), "adamw"),
        (steps(24), "sophia"),
    ],
)
def test_a_step_does_what_it_would_do_alone(stage, rule):
    """Steps that are alike are worked out together; which ones are is not taken for granted here."""
    model = dataclasses.replace(SMALL, layers=4)
    run = plan(stage, model=model, optimizer=Optimizer(rule), seed=5)
    (span,) = run.spans
    for i in range(24):
        rules = {"seed": 5, "clock": run.clock, "curvature_every": run.optimizer.curvature_every}
        alone = Steps(stage, span.model, span.batch, span.objective, start=0, **rules)
        work, ops = alone.step(i)
        assert span.works[i] == work and span.flops[i] == sum(op.flops for op in ops)


def test_a_single_layer_may_be_skipped_by_a_coin():
    one, two = (plan(steps(1), model=dataclasses.replace(SMALL, layers=n)).flops for n in (1, 2))
    coins = steps(16, subnet=gj.random_path(0.5, keep=(), mode="bernoulli"))
    (span,) = plan(coins, model=dataclasses.replace(SMALL, layers=1)).spans
    assert set(span.flops) == {one, 2 * one - two}


def test_shares_of_a_budget_are_kept_to_within_half_a_step():
    one = plan(steps(1)).flops
    run = plan(
        Stage(share=0.3),
        Stage(share=0.45, grow=gj.stack(layers=4, order="top")),
        Stage(share=0.25, subnet=gj.random_path(3)),
        budget=50.3 * one,
    )
    spent = np.cumsum([sum(span.flops) for span in run.spans])
    step = [span.flops[-1] for span in run.spans]
    assert np.all(np.abs(spent - np.array([0.3, 0.75, 1.0]) * 50.3 * one) <= np.array(step) / 2)
    assert plan(Stage(flops=7.4 * one)).steps == 7


def test_a_stage_may_change_the_batch_and_the_length():
    run = plan(steps(4), steps(4, batch=8, objective=Causal(16, packing="concat")))
    assert [s.step_tokens for s in run.spans] == [32, 128] and [s.steps for s in run.spans] == [
        4,
        1,
    ]
    assert run.spans[1].tokens == 128 and run.tokens == 256
    assert run.spans[1].flops[0] > 4 * run.spans[0].flops[0]


def test_flops_are_those_of_a_forward_pass_times_three():
    """Against a count by hand: 2 FLOPs for every weight and token, and attention's two products."""
    run, t = plan(steps(1)), 8
    layer = 4 * 16 * 16 + 2 * 16 * 16
    attention = 2 * t * 16
    per_token = 2 * (2 * (layer + attention) + 16 * 384)
    assert run.flops == 3 * 4 * t * per_token


# Learning rates ----------------------------------------------------------------------------------


def test_the_learning_rate_follows_cost_up_and_down_to_zero():
    grows = steps(5, grow=gj.stack(layers=4, order="top"))
    run = plan(steps(5), grows, rate=Schedule(3e-3, warmup=0.1))
    assert run.learning_rate(0) == 0.0 == run.learning_rate(run.flops)
    assert run.learning_rate(0.1 * run.flops) == pytest.approx(3e-3)
    assert run.learning_rate(0.55 * run.flops) == pytest.approx(1.5e-3)
    assert plan(steps(10), rate=Schedule(3e-3, warmup=0.0)).learning_rate(0) == 3e-3


SHAPES = {
    "linear": [0.5, 1.0, 0.5, 0.0],
    "cosine": [0.5, 1.0, 0.5, 0.0],
    "wsd": [0.5, 1.0, 1.0, 0.0],
    "constant": [0.5, 1.0, 1.0, 1.0],
    "inverse_sqrt": [0.5, 1.0, (0.1 / 0.55) ** 0.5, 0.1**0.5],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_the_learning_rate(shape):
    rate = Schedule(2.0, shape, warmup=0.1)
    assert [rate.at(d) / 2 for d in (0.05, 0.1, 0.55, 1.0)] == pytest.approx(SHAPES[shape])
    assert decayed(rate.at(1.0), rate.peak) == (shape in ("linear", "cosine", "wsd"))


def test_shapes_fall_as_they_say():
    assert Schedule(1.0, "cosine", warmup=0.0).at(0.25) == pytest.approx(0.5 + 0.5 * 0.5**0.5)
    assert Schedule(1.0, "wsd", warmup=0.0, decay=0.5).at(0.75) == pytest.approx(0.5)
    assert Schedule(1.0, final=0.1, warmup=0.0).at(1.0) == pytest.approx(0.1)


class Tariff(gj.budget.Clock):
    """A clock of which everything can be wrong."""

    unit, per_unit = "dollars", 100
    price: Any = 3
    name: Any = "the tariff of 2026"

    def cost(self, op):
        return self.price

    @property
    def identity(self):
        return self.name


def tariff(**changes) -> gj.budget.Clock:
    return type("Tariff", (Tariff,), changes)()


def test_a_budget_may_be_in_any_unit():
    made = plan(Stage(share=1.0), clock=tariff(price=np.int64(5)), budget=1.2)
    assert made.cost == 120 and made.spans[0].steps == 24
    table = io.StringIO()
    Console(file=table, width=120).print(dry_run(made))
    assert re.search(r"cost in dollars +│ +1\.2 ", table.getvalue())


@pytest.mark.parametrize(
    "clock, fault",
    [
        ({"unit": ""}, 'Tariff.unit: expected a noun such as "seconds" or "dollars", got \'\''),
        ({"unit": "two\nlines"}, "Tariff.unit: expected a noun"),
        ({"unit": None}, "Tariff.unit: expected a noun"),
        ({"per_unit": 0}, "Tariff.per_unit: expected a positive integer, got 0"),
        ({"per_unit": 0.5}, "Tariff.per_unit: expected a positive integer, got 0.5"),
        ({"name": ""}, "Tariff.identity: expected a string that no other clock has, got ''"),
        ({"price": 0.25}, "return a whole number of 0 or more for Op(kind='train'"),
        (
            {"price": -1},
            "got -1; round it, and let per_unit say how many of them are one of dollars",
        ),
        ({"price": None}, "got None; round it"),
        ({"price": 0}, "clock: 'the tariff of 2026' charges nothing for any step"),
    ],
)
def test_a_clock_that_cannot_charge_is_refused_with_the_plan(clock, fault):
    with pytest.raises(PlanError, match=re.escape(fault)):
        plan(steps(2), clock=tariff(**clock))


def test_all_faults_of_a_clock_are_named_at_once():
    with pytest.raises(
        PlanError, match=r"Tariff\.unit: (.|\n)*Tariff\.per_unit: (.|\n)*Tariff\.identity: "
    ):
        plan(steps(2), clock=tariff(unit=3, per_unit=-2, name=None))
    with pytest.raises(PlanError, match="it charges dollars, and stages last seconds"):
        plan(Stage(seconds=2.0), clock=tariff())


def test_a_stage_may_warm_up_again():
    run = plan(steps(4), steps(4, rewarm=0.5), rate=Schedule(1.0, "constant", warmup=0.0))
    eighth = run.flops / 8
    rates = [run.learning_rate(x * eighth) for x in (0, 3.9, 4, 5, 6, 7)]
    assert rates == pytest.approx([1, 1, 0, 0.5, 1, 1])


# JSON --------------------------------------------------------------------------------------------

PLANS = {
    "every kind": every_kind,
    "BERT": lambda: plan(
        steps(2),
        model=BERTConfig(layers=2, embed=16, heads=2, head_dim=8, mlp=32, vocab=384, positions=16),
        objective=MLM(16, whole_word=True),
        data=data.Text("books", glob="*.txt"),
    ),
    "Llama": lambda: plan(
        steps(2, subnet=gj.random_part(mlp=16)),
        model=LlamaConfig(
            layers=2,
            embed=16,
            heads=4,
            kv_heads=2,
            head_dim=8,
            mlp=32,
            vocab=384,
            dtype="bfloat16",
            scaling=RotaryScaling(8.0, length=64),
        ),
        layout=Layout(data=2, fsdp=4, tensor=2),
        optimizer=Optimizer("lion", clip=None),
    ),
    "UL2": lambda: plan(steps(2), model=T5_SMALL, objective=UL2(32), data=data.StandardLibrary()),
    "PLD": lambda: plan(steps(2, subnet=gj.progressive_layer_drop(), batch=8)),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_survives_the_trip_through_json(name, tmp_path):
    before = PLANS[name]()
    save_plan(before, tmp_path / "plan.json")
    after = load_plan(tmp_path / "plan.json")
    assert after == before and to_dict(after) == to_dict(before)
    assert [s.flops for s in after.spans] == [s.flops for s in before.spans]


def test_what_cannot_be_saved_or_read_is_said(tmp_path):
    ramped = steps(
        2, grow=gj.msg(mlp=24, init=lambda key, shape, dtype: jax.numpy.ones(shape, dtype)), ramp=1
    )
    with pytest.raises(
        PlanError, match=r"stages\[0\].grow.init: .*no import leads to this function"
    ):
        save_plan(plan(ramped), tmp_path / "plan.json")
    with pytest.raises(FormatError, match="is no number, string, tuple, dict, function or value"):
        to_dict(jax.numpy.ones(2))
    for text, message in [
        ("{", "not JSON: Expecting property name"),
        ("[]", "expected a Plan, got ()"),
        ('{"is": "subprocess:Popen"}', "subprocess:Popen is nothing that a file may hold"),
        ('{"is": "Plan"}', "'Plan' is a name of growjax 0.1, whose files are not read any more"),
        ('{"is": "growjax:Schedule", "peak": 1}', "expected a Plan, and it is a growjax:Schedule"),
        ('{"is": "growjax:Plan", "speed": 2}', "Plan has no 'speed'; it has name, model"),
        ('{"is": "growjax:Plan"}', "Plan lacks name, model, stages, batch, objective, rate"),
        (
            '{"is": "growjax:Plan", "seed": {"is": "growjax:Plan"}}',
            "seed: expected an integer of 0",
        ),
    ]:
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PlanError, match=re.escape(message)):
            load_plan(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="nowhere.json: No such file"):
        load_plan(tmp_path / "nowhere.json")


def test_differences_are_named():
    old, new = every_kind(), every_kind(seed=1, batch=2)
    assert list(differences(to_dict(old), to_dict(new))) == [
        "plan.batch: was 4, is 2",
        "plan.seed: was 0, is 1",
    ]
    deeper = dataclasses.replace(old, model=dataclasses.replace(SMALL, eps=1e-6))
    assert list(differences(to_dict(old), to_dict(deeper))) == [
        "plan.model.eps: was 1e-05, is 1e-06"
    ]
    assert from_dict(json.loads(json.dumps(to_dict(old)))) == old


# Layouts -----------------------------------------------------------------------------------------

LAYOUTS = {
    "fsdp: expected a positive number of devices, got 0": lambda: Layout(fsdp=0),
    "tensor: expected a positive number of devices, got -1": lambda: Layout(tensor=-1),
    "data: expected a positive number of devices, or -1, got -2": lambda: Layout(data=-2),
    "step: expected one of 'auto', 'shard_map'": lambda: Layout(step="pmap"),  # type: ignore[arg-type]
    "'shard_map' is for replicas alone": lambda: Layout(fsdp=2, step="shard_map"),
    "own_paths: only replicas under step='shard_map'": lambda: Layout(own_paths=True),
    "fsdp=3 x tensor=1 does not make 8 devices": lambda: Layout(fsdp=3).resolved(8),
    "data=4 x fsdp=4 x tensor=1 does not make 8": lambda: Layout(data=4, fsdp=4).resolved(8),
}


@pytest.mark.parametrize("message", LAYOUTS)
def test_a_layout_that_is_none_is_refused(message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        LAYOUTS[message]()


def test_a_model_with_fewer_words_than_the_tokenizer_is_refused():
    from tests.runs import feed

    with pytest.raises(DataError, match="384 words and the model 300"):
        feed(plan(steps(1), model=dataclasses.replace(SMALL, vocab=300)))


def test_plans_compare_by_what_they_say():
    assert every_kind() == every_kind() and isinstance(every_kind(), Plan)
    assert every_kind() != every_kind(seed=1)
