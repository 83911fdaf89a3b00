"""The losses of early exits, added as in LayerSkip: values, gradients, curricula and what they cost."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import testing, values
from growjax.axes import partition
from growjax.budget import RTX3090_BERT
from growjax.data import Causal
from growjax.errors import AxisError, PlanError, SubnetError
from growjax.models import GPTConfig
from growjax.nn import cross_entropies, per_token
from growjax.plan import Optimizer, Plan, Schedule, Stage, cross_entropy


KEY = jax.random.key(1)
CONFIG = GPTConfig(
    layers=4, embed=8, heads=2, head_dim=4, mlp=6, vocab=11, positions=8, remat="everything"
)
EXAMPLE = {
    "tokens": jnp.asarray([1, 4, 2, 8, 5, 7, 3, 6]),
    "targets": jnp.asarray([4, 2, 8, 5, 7, 3, 6, 0]),
    "weights": jnp.asarray([1.0, 1, 0, 1, 1, 1, 1, 0]),
}
ALL = gj.layer_skip(rate=0.0, exits=0.5, summed=True)
TURNING = gj.layer_skip(rate=0.0, exits=0.3, every=3, summed=True, curriculum="rotate")


def first(model, depth: int):
    """The model of the first layers."""
    blocks = jax.tree.map(lambda w: w[:depth], model.blocks.block)
    return eqx.tree_at(lambda m: m.blocks.block, model, blocks)


def loss_of(model, example):
    losses, weights = cross_entropy(model, example)
    return jnp.sum(losses * weights)


@pytest.mark.parametrize(
    "part, weights",
    [
        (ALL, {2: 0.5, 3: 1.5, 4: 4.5}),
        # Exits after layers l with (l + 2) % 3 == 0: 1 and, always, the last
        (TURNING.at(2), {2: 0.3, 4: 3.9}),
    ],
    ids=["all", "rotated"],
)
def test_the_loss_is_the_weighted_sum_of_those_of_the_first_layers(part, weights):
    """And so is the gradient, of the layers as of the norm and the head that all exits share."""
    total = sum(weights.values())
    with jax.enable_x64(True):
        model = testing.Architecture("GPT", (("layers", 4), ("tied", False))).model()
        example = {**EXAMPLE, "tokens": EXAMPLE["tokens"][:5], "targets": EXAMPLE["targets"][:5]}
        example["weights"] = EXAMPLE["weights"][:5].astype(jnp.float64)
        trained, rest = partition(model)

        def summed(trained):
            return loss_of(part(eqx.combine(trained, rest), key=KEY), example)

        def apart(trained):
            whole = eqx.combine(trained, rest)
            return sum(
                weight / total * loss_of(first(whole, depth), example)
                for depth, weight in weights.items()
            )

        ours, theirs = (jax.jit(jax.value_and_grad(f))(trained) for f in (summed, apart))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_chunks_of_tokens_give_the_same_sum():
    with jax.enable_x64(True):
        model = testing.Architecture("GPT", (("layers", 4),)).model()
        readout = ALL(model, key=KEY).readout({"tokens": EXAMPLE["tokens"][:5]})
        targets = EXAMPLE["targets"][:5]
        whole = per_token(cross_entropies, readout, targets)
        for chunk in (2, 5, 7):
            part = per_token(cross_entropies, readout, targets, chunk=chunk)
            np.testing.assert_allclose(part, whole, rtol=1e-12)
        with pytest.raises(AxisError, match="early exits, whose losses are added"):
            readout.logits()


def test_curricula_rotate_the_exits_or_add_them_from_the_last_on():
    depths = [TURNING.at(n).depths(8)[0].tolist() for n in range(4)]
    assert depths == [[1, 4, 7, 8], [3, 6, 8], [2, 5, 8], [1, 4, 7, 8]]
    assert TURNING.at(0) == TURNING.at(3) != TURNING.at(1) and TURNING.steady(4) == 5
    more = gj.layer_skip(exits=0.2, every=2, summed=True, curriculum="gradual", steps=80, layers=4)
    # One layer more every 80 / 8 steps
    sets = {n: more.at(n).depths(4)[0].tolist() for n in (0, 9, 10, 19, 20, 30, 99)}
    assert sets == {0: [4], 9: [4], 10: [4], 19: [4], 20: [2, 4], 30: [2, 4], 99: [2, 4]}
    assert [more.steady(n) for n in (0, 9, 10, 29, 30)] == [10, 10, 20, 30, np.inf]
    assert values.from_dict(values.to_dict(more.at(20))) == more.at(20)


def test_all_layers_are_reached_and_each_is_dropped_by_its_chance():
    skip = gj.layer_skip(rate=0.4, exits=0.5, summed=True)
    on = skip.tossed(4, 0, 0, 4000)
    np.testing.assert_allclose(on.mean(0), 1 - np.asarray(skip.dropped(4, 0)), atol=0.03)
    np.testing.assert_allclose(skip.chances(4, 0), 1 - np.asarray(skip.dropped(4, 0)))


def plan_of(part, **changes) -> Plan:
    stage = Stage(tokens=12 * 4 * 8, subnet=part)
    fields: dict[str, Any] = dict(batch=4, objective=Causal(8), rate=Schedule(1e-3), seed=5)
    return Plan("p", CONFIG, (stage,), **fields | changes)


def test_a_step_is_charged_for_its_layers_and_for_the_logits_of_every_exit():
    whole = plan_of(None).spans[0].flops[0]
    one = plan_of(dataclasses.replace(ALL, summed=False, exits=0.0)).spans[0].flops[0]
    logits = 3 * 4 * 2 * 8 * CONFIG.embed * CONFIG.vocab
    assert one == whole
    # The exit after the first layer has no weight, and is not computed
    assert set(plan_of(ALL).spans[0].flops) == {whole + 2 * logits}
    dropping = gj.layer_skip(rate=0.5, exits=0.5, summed=True)
    layer = whole - plan_of(gj.random_path(3, keep=())).spans[0].flops[0]
    for step, charged in enumerate(plan_of(dropping).spans[0].flops):
        runs = int(dropping.tossed(4, 5, step, 1).sum())
        assert charged == whole - (4 - runs) * layer + 2 * logits
    turned = plan_of(TURNING).spans[0]
    counts = [sum(w > 0 for w in TURNING.at(n).depths(4)[1]) for n in range(12)]
    assert list(turned.flops) == [whole + (n - 1) * logits for n in counts]
    assert len(turned.programs) == 3 and set(counts) == {1, 2}


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: plan_of(ALL, clock=RTX3090_BERT), PlanError, "the clock charges layers alone"),
        (
            lambda: plan_of(ALL, optimizer=Optimizer("sophia")),
            PlanError,
            "curvature the optimizer does not know",
        ),
        (lambda: gj.layer_skip(curriculum="rotate"), SubnetError, "give summed=True"),
        (
            lambda: gj.layer_skip(summed=True, curriculum="gradual", steps=9),
            SubnetError,
            "over how many of each",
        ),
        (lambda: gj.layer_skip(layers=4), SubnetError, "only exits that come one by one"),
        (lambda: gj.layer_skip().depths(0), SubnetError, "expected layers .* got none"),
        (lambda: shapes(TURNING, "GPT"), SubnetError, "take skip.at"),
        (
            lambda: shapes(
                gj.layer_skip(summed=True, curriculum="gradual", steps=9, layers=5).at(0), "GPT", 0
            ),
            SubnetError,
            "the model has 2 layers, expected 5",
        ),
        (lambda: shapes(ALL, "BERT"), AxisError, "early exits, and the model around it reads only"),
    ],
    ids=["clock", "curvature", "curriculum", "gradual", "layers", "none", "step", "depth", "model"],
)
def test_what_cannot_be_added_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def shapes(part, family: str, step: int | None = None):
    """The shapes of a model's outputs with early exits."""
    architecture = testing.Architecture(family)
    model = eqx.filter_eval_shape(lambda: testing.drawn(architecture))
    call = lambda model: part(model, key=KEY, step=step)(EXAMPLE["tokens"][:5])  # noqa: E731
    return eqx.filter_eval_shape(call, model)
