"""Learning rates that transfer over width and depth: multiples, growth, and plans that use them."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.axes import axes_of, find, partition, put
from growjax.errors import PlanError
from growjax.models import BERTConfig, GPTConfig, T5Config
from growjax.optim.divided import Decays
from growjax.optim.transfer import Multiples, Transfer
from growjax.plan.files import load_plan, save_plan
from growjax.train import Optimizer, train
from tests.runs import SMALL, feed, losses, plan, steps


BASE = dataclasses.replace(SMALL, bias=True)
# Twice as wide, four times as deep
LARGE = dataclasses.replace(BASE, embed=32, heads=4, mlp=32, layers=8)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def shapes(config: Any) -> Any:
    return eqx.filter_eval_shape(config.build, jax.random.key(0))


def multiples(config: Any, transfer: Transfer) -> dict[str, Multiples]:
    by_steps = transfer.multiples(shapes(config))
    return {".".join(map(str, steps)): each for steps, each in by_steps.items()}


# Multiples ----------------------------------------------------------------------------------------


def test_the_multiples_of_a_decoder():
    table = multiples(LARGE, Transfer(BASE))
    block = "blocks.block"
    matrices = {f"{block}.attention.{name}": Multiples(1, 1 / 2) for name in "qkv"}
    branches = {f"{block}.attention.o": Multiples(1 / 4, 1 / 8)}
    branches |= {f"{block}.mlp.down": Multiples(1 / 4, 1 / 8)}
    biases = {
        f"{block}.{name}": Multiples(1 / 4, 1 / 4) for name in ("attention.o_bias", "mlp.down_bias")
    }
    # The norm before the tied head has its multiplier
    head = {"norm.weight": Multiples(1 / 2, 1 / 2), "norm.bias": Multiples(1 / 2, 1 / 2)}
    up = {f"{block}.mlp.up": Multiples(1, 1 / 2)}
    assert table == matrices | branches | biases | head | up


def test_a_head_of_its_own_and_width_alone():
    untied = dataclasses.replace(LARGE, tied=False)
    table = multiples(untied, Transfer(dataclasses.replace(BASE, tied=False), depth=False))
    assert table["head"] == Multiples(2**-0.5, 1 / 2)
    assert table["blocks.block.mlp.down"] == Multiples(1, 1 / 2)
    assert "norm.weight" not in table and "blocks.block.mlp.down_bias" not in table
    assert multiples(untied, Transfer(untied)) == {}


def test_each_stack_has_its_own_depth():
    fields: dict[str, Any] = {"embed": 16, "heads": 2, "head_dim": 8, "mlp": 16, "vocab": 64}
    base = T5Config(encoder_layers=2, decoder_layers=2, **fields)
    deep = T5Config(encoder_layers=4, decoder_layers=16, **fields)
    table = multiples(deep, Transfer(base))
    outs = {path: each for path, each in table.items() if path.endswith((".o", ".down"))}
    assert len(outs) == 5
    for path, each in outs.items():
        assert each == (Multiples(1 / 2, 1 / 2) if "encoder" in path else Multiples(1 / 8, 1 / 8))
    assert set(table) == set(outs)  # relative positions, which no width scales, are not among them


# The same as multipliers --------------------------------------------------------------------------


def tokens_of(config: GPTConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab, (2, 8))


def in_double(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(np.float64) if eqx.is_inexact_array(x) else x, tree)


def trained(model: Any, update: Any, init: Any, logits: Any, count: int = 3) -> Any:
    """The logits after some steps at a rate of 0.01, on one batch."""
    tokens = tokens_of(LARGE)
    params, rest = partition(model)

    @jax.jit
    def step(params, state):
        def loss(params):
            scores = jax.nn.log_softmax(logits(eqx.combine(params, rest), tokens))[:, :-1]
            return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()

        updates, state = update(jax.grad(loss)(params), state, params, rate=0.01)
        return jax.tree.map(jnp.add, params, updates), state

    state = init(params)
    for _ in range(count):
        params, state = step(params, state)
    return logits(eqx.combine(params, rest), tokens)


def test_training_is_that_of_a_model_with_multipliers(x64):
    optimizer = Optimizer(clip=None, eps=1e-30, weight_decay=0.1, decayed="weights").build()
    model = in_double(LARGE.build(jax.random.key(0)))
    transfer = Transfer(BASE)
    ours = trained(
        transfer.born(model),
        transfer.rule(optimizer).update,
        optimizer.init,
        lambda m, tokens: jax.vmap(m)(tokens),
    )

    # Multipliers in front of the residual branches and the logits, and the rates of muP
    scaled = eqx.tree_at(
        lambda m: m.blocks.branch, model, jnp.full(8, 1 / 4), is_leaf=lambda x: x is None
    )
    rates = {
        ("blocks", "block", *path.split(".")): 1 / 2
        for path in (
            "attention.q",
            "attention.k",
            "attention.v",
            "attention.o",
            "mlp.up",
            "mlp.down",
        )
    }

    def update(gradient, state, params, *, rate):
        decays = Decays({steps: 1 / factor for steps, factor in rates.items()})
        updates, state = optimizer.update(gradient, state, params, rate=rate, decays=decays)
        return put(updates, {s: find(updates, s) * f for s, f in rates.items()}), state

    theirs = trained(scaled, update, optimizer.init, lambda m, tokens: jax.vmap(m)(tokens) / 2)
    assert np.abs(np.asarray(theirs)).max() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


# Growth -------------------------------------------------------------------------------------------

GROWTHS = {
    "copy": gj.copy(embed=32, heads=4, mlp=32),
    "zeros": gj.zeros(mlp=32),
    "stack, zero": gj.stack(layers=4, branch="zero"),
    "chain": gj.chain(gj.copy(embed=32, heads=4, mlp=32), gj.stack(layers=4, branch="zero")),
}


@pytest.mark.parametrize("name", list(GROWTHS))
def test_a_grown_model_goes_on_as_a_fresh_one_with_its_weights(name, x64):
    transfer, optimizer = Transfer(BASE), Optimizer().build()
    key = jax.random.key(1)
    model = in_double(transfer.born(BASE.build(key)))
    grown = eqx.filter_jit(GROWTHS[name])(model, key=key)
    tokens = tokens_of(BASE)[0]
    # All of these keep the function, and so they do with the multiples in the weights
    call = eqx.filter_jit(lambda model: model(tokens))
    np.testing.assert_allclose(call(grown), call(model), rtol=0, atol=1e-12)

    sizes = axes_of(grown).sizes
    config = dataclasses.replace(
        BASE,
        layers=sizes["layers"],
        embed=sizes["embed"],
        mlp=sizes["mlp"],
        heads=sizes["kv_heads"],
    )
    fresh = jax.tree.unflatten(jax.tree.structure(config.build(key)), jax.tree.leaves(grown))
    rule = transfer.rule(optimizer)

    @jax.jit
    def update(params):
        return rule.update(params, rule.init(params), params, rate=0.01)[0]

    updates = [jax.tree.leaves(update(partition(each)[0])) for each in (grown, fresh)]
    assert all(np.array_equal(a, b) for a, b in zip(*updates, strict=True))
    # And not as it did before it grew
    before = update(partition(model)[0])
    down = ("blocks", "block", "mlp", "down")
    after = jax.tree.unflatten(jax.tree.structure(partition(grown)[0]), updates[0])
    ratio = np.abs(find(after, down)).max() / np.abs(find(before, down)).max()
    scale = {"copy": 1 / 2, "zeros": 1 / 2, "stack, zero": 1 / 2, "chain": 1 / 4}[name]
    assert ratio == pytest.approx(scale, rel=1e-3)


# Plans --------------------------------------------------------------------------------------------


def test_a_transfer_from_the_model_itself_changes_no_bit():
    grown = (steps(2), steps(2, grow=gj.copy(mlp=32)))
    runs = {}
    for name, transfer in (("none", None), ("own", Transfer(SMALL))):
        run = plan(*grown, transfer=transfer)
        runs[name] = losses(train(run, feed(run)))
    none, own = runs["none"], runs["own"]
    assert [own[n] for n in (0, 1, 2)] == [none[n] for n in (0, 1, 2)]
    # From the growth on, the wider matrices have a lower rate
    assert own[3] != none[3]


def test_a_model_is_born_and_trained_by_the_multiples_of_its_plan():
    small = dataclasses.replace(SMALL, layers=1)
    run = plan(steps(2), transfer=Transfer(small))
    plain = plan(steps(2))
    down = ("blocks", "block", "mlp", "down")
    born, other = (find(each.build(), down) for each in (run, plain))
    np.testing.assert_array_equal(born, 0.5 * other)
    assert losses(train(run, feed(run)))[1] != losses(train(plain, feed(plain)))[1]


def test_a_plan_with_a_transfer_is_kept_in_a_file(tmp_path):
    run = plan(steps(2), transfer=Transfer(SMALL, depth=False))
    save_plan(run, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == run


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": Optimizer("sgd")}, "sgd do not have a size of their own"),
        ({"optimizer": Optimizer("muon")}, "muon do not have a size of their own"),
        ({"optimizer": Optimizer(scale_by_parameter=True)}, "scale_by_parameter"),
        ({"model": dataclasses.replace(SMALL, head_dim=4)}, "head_dim is 8 there and 4 here"),
        ({"model": dataclasses.replace(SMALL, post_norm=True)}, "ends in a norm"),
        ({"transfer": Transfer(dataclasses.replace(SMALL, layers=0))}, "no layers"),
        (
            {
                "transfer": Transfer(
                    BERTConfig(
                        layers=1, embed=8, heads=1, head_dim=8, mlp=8, vocab=384, positions=8
                    )
                ),
                "model": dataclasses.replace(SMALL, head_dim=8),
            },
            None,
        ),
    ],
    ids=["sgd", "muon", "scaled", "head_dim", "post-LN", "no layers", "bert"],
)
def test_plans_whose_rate_cannot_transfer_are_refused(changes, message):
    fields = {"transfer": Transfer(SMALL), **changes}
    if message is None:
        # Axes of the same names are enough: another kind of model may be the base
        plan(steps(2), **fields)
        return
    with pytest.raises(PlanError, match=message):
        plan(steps(2), **fields)


def test_fresh_layers_without_the_multiple_of_the_depth_are_refused():
    grow = gj.fresh(layers=4)
    with pytest.raises(PlanError, match="init='matched'"):
        plan(steps(2), steps(2, grow=grow), transfer=Transfer(SMALL))
    plan(steps(2), steps(2, grow=gj.fresh(layers=4, init="matched")), transfer=Transfer(SMALL))
    plan(steps(2), steps(2, grow=grow), transfer=Transfer(SMALL, depth=False))


# Coordinate checks --------------------------------------------------------------------------------


@functools.cache
def moved(width: int, depth: int, transfers: bool) -> tuple[float, float]:
    """How far some steps of AdamW move the residual stream and the logits (root mean squares)."""
    base = dataclasses.replace(BASE, embed=16, heads=2, mlp=64, layers=1)
    config = dataclasses.replace(base, embed=width, heads=width // 8, mlp=4 * width, layers=depth)
    optimizer = Optimizer().build()
    transfer = Transfer(base)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 384, (8, 8)))

    def stream(model: Any) -> Any:
        x = jax.vmap(lambda row: model._embed(row, jnp.arange(8))[0])(tokens)
        return jax.vmap(lambda row: model.blocks(row))(x)

    @jax.jit
    def run(key):
        model = config.build(key)
        model = transfer.born(model) if transfers else model
        params, rest = partition(model)
        rule = transfer.rule(optimizer) if transfers else optimizer

        def loss(params):
            scores = jax.nn.log_softmax(jax.vmap(eqx.combine(params, rest))(tokens))[:, :-1]
            return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()

        def step(carried, _):
            params, state = carried
            updates, state = rule.update(jax.grad(loss)(params), state, params, rate=2e-3)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (after, _), _ = jax.lax.scan(step, (params, rule.init(params)), length=5)
        ends = [eqx.combine(p, rest) for p in (params, after)]
        changes = [
            jnp.sqrt(jnp.mean(jnp.square(b - a)))
            for a, b in ([stream(m) for m in ends], [jax.vmap(m)(tokens) for m in ends])
        ]
        return changes

    before, after = run(jax.random.key(0))
    return float(before), float(after)


def spread(corners: list[tuple[int, int]], transfers: bool) -> tuple[float, float]:
    """The largest change over the smallest, of the stream and of the logits."""
    changes = np.array([moved(*corner, transfers) for corner in corners])
    low, high = changes.min(0), changes.max(0)
    return float(high[0] / low[0]), float(high[1] / low[1])


def test_updates_move_a_large_model_as_far_as_a_small_one():
    corners = [(16, 1), (128, 8)]
    stream, logits = spread(corners, transfers=True)
    assert stream < 3 and logits < 2
    stream, logits = spread(corners, transfers=False)
    assert stream > 4 and logits > 3


@pytest.mark.slow
def test_updates_move_models_of_all_widths_and_depths_as_far():
    corners = [(width, depth) for width in (16, 64, 256) for depth in (1, 4, 16)]
    stream, logits = spread(corners, transfers=True)
    assert stream < 3 and logits < 2
    stream, logits = spread(corners, transfers=False)
    assert stream > 8 and logits > 4
