"""Births of coordinates, masks of what is new, and a whole training state that grows in one call."""

import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

import growjax as gj
from growjax import optim
from growjax.algebra import NONE, AxisMap
from growjax.errors import GateError, GrowthError, StateError
from growjax.growth import Births, atoms, sources
from growjax.growth.births import MIXED
from growjax.train import Optimizer


KEY = jax.random.key(0)


class Layers(eqx.Module):
    """An axis that is looked up, produced, consumed, elementwise, stacked, and two in one dimension."""

    table: Array = gj.param("[vocab] -> embed")
    up: Array = gj.param("layers: embed -> mlp")
    gain: Array = gj.param("layers: mlp")
    heads: Array = gj.param("embed -> (heads dim)")
    back: Array = gj.param("(heads dim) -> embed")
    per_head: Array = gj.param("heads dim")
    square: Array = gj.param("mlp -> mlp")
    angles: Array = gj.buffer("mlp")
    gate: gj.Gate | None = gj.gate("layers: mlp")


SHAPES = {
    "table": (3, 2),
    "up": (2, 2, 3),
    "gain": (2, 3),
    "heads": (2, 4),
    "back": (4, 2),
    "per_head": (2, 2),
    "square": (3, 3),
    "angles": (3,),
}


def layers(scale: float = 1.0, dtype: Any = jnp.float32) -> Layers:
    rng = np.random.default_rng(0)
    arrays: Any = [jnp.asarray(scale * rng.normal(size=shape), dtype) for shape in SHAPES.values()]
    return Layers(*arrays)


class Moved(gj.Operator):
    """Any sources along any axes: pruned, permuted, repeated or drawn."""

    sources: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    exactness = "approximate"

    def maps(self, axes):
        return [AxisMap(axis, np.asarray(source)) for axis, source in self.sources]


def moved(**axes: tuple[int, ...]) -> Moved:
    return Moved(tuple(axes.items()))


# Additions, copies in place, permutations and pruning, of one and of two axes
OPERATORS = (
    moved(mlp=(0, 1, 2, NONE)),
    moved(mlp=(2, 0, 1)),
    moved(mlp=(1, 1, 0, 2)),
    moved(layers=(0, 0, 1, 1)),
    moved(layers=(1, NONE), heads=(1, 0, NONE)),
    moved(heads=(0, 1), mlp=(0, 2, 2)),
    gj.chain(moved(mlp=(0, 1, 2, NONE)), moved(layers=(0, 1, 1), mlp=(3, 3, 0))),
)


def by_hand(births: dict[str, list[int]], op: gj.Operator, number: int) -> dict[str, list[int]]:
    """Births after an operator, coordinate by coordinate."""
    births = dict(births)
    for atom in atoms(op):
        for axis, source in atom.sources:  # type: ignore[attr-defined]
            homes: set[int] = set()
            numbers = []
            for s in source:
                numbers.append(number if s == NONE or s in homes else births[axis][s])
                homes.add(s)
            births[axis] = numbers
    return births


def axes_of_leaves(model: Any) -> dict[str, list[str]]:
    return {s.path: [d.axis for d in s.dims] for s in gj.axes_of(model).of_kind("param")}


@given(st.lists(st.sampled_from(OPERATORS), min_size=1, max_size=3))
def test_births_compose_and_move_with_every_map(ops):
    model = layers()
    births, expected = Births.original(model), {a: [0] * n for a, n in gj.sizes(model).items()}
    for number, op in enumerate(ops, 1):
        if any(max(s) >= gj.sizes(model)[a] for a, s in atoms(op)[0].sources):  # type: ignore[attr-defined]
            return  # an axis was pruned below what this one reads
        births, expected = births.grown(op, model), by_hand(expected, op, number)
        model = eqx.filter_eval_shape(lambda m, op=op: op(m, key=KEY), model)
    assert {axis: np.asarray(n).tolist() for axis, n in births.of.items()} == expected
    assert births.growths == len(ops)
    # An entry is as young as the youngest of its coordinates
    for part, of in (("new", len(ops)), (0, 0), (1, 1)):
        masks = births.masks(model, part)  # type: ignore[arg-type]
        for name, axes in axes_of_leaves(model).items():
            mask = np.asarray(getattr(masks, name))
            assert mask.shape == getattr(model, name).shape and mask.dtype == bool
            entries = itertools.product(*(expected[axis] for axis in axes))
            np.testing.assert_array_equal(mask.ravel(), [max(e) == of for e in entries])
    inverted = jax.tree.map(lambda x: ~x, births.masks(model, "old"))
    assert eqx.tree_equal(inverted, births.masks(model, "new"))
    runs = [(n, v) for n, v in births.runs()["mlp"] for _ in range(v)]
    assert [n for n, _ in runs] == expected["mlp"]


@pytest.mark.parametrize(
    "order", ["top", "repeat", "interleave", "interpolate", "middle", "insert"]
)
def test_the_layers_that_an_operator_inserts_are_new(order):
    config = gj.models.GPTConfig(
        layers=2, embed=4, heads=1, head_dim=4, mlp=4, vocab=5, positions=3
    )
    model = eqx.filter_eval_shape(gj.models.GPT, config, key=KEY)
    first = [n for n, s in enumerate(sources(order, 2, 4)) if s not in sources(order, 2, 4)[:n]]
    masks = gj.new(gj.stack(layers=4, order=order), model)
    up = masks.blocks.block.mlp.up
    assert (
        np.flatnonzero(~up.any((1, 2))).tolist()
        == first
        == np.flatnonzero(~up.all((1, 2))).tolist()
    )
    assert not masks.embedding.table.any()
    # A trained half, whatever has gates
    gated = gj.new(gj.msg(mlp=6), model)
    assert np.flatnonzero(gated.blocks.block.mlp.up[0, 0]).tolist() == [4, 5]
    big = eqx.filter_eval_shape(lambda m: gj.msg(mlp=6)(m, key=KEY), model)
    assert jax.tree.structure(gated) == jax.tree.structure(gj.partition(big)[0])


class Dealt(gj.Operator):
    """Every head becomes two of half as many coordinates."""

    exactness = "exact"

    def maps(self, axes):
        return [AxisMap("heads", np.repeat(np.arange(axes.size("heads")), 2), over="dim")]


def test_what_is_only_dealt_out_is_as_old_as_it_was():
    """In the births of a model, and in those that an optimizer keeps."""
    tx = optim.parts(optax.sgd(0.1), old=0.0)
    state = gj.State(layers(), tx.init(gj.partition(layers())[0]))
    for op in (moved(heads=(0, 1, NONE), dim=(0, NONE, NONE, 1)), Dealt()):
        state = gj.grow(op, state, optimizer=tx, key=KEY)
        assert eqx.tree_equal(state.births, state.opt_state.births)
    assert state.births.of["heads"].tolist() == [0, 0, 0, 0, 1, 1]
    assert state.births.of["dim"].tolist() == [MIXED, MIXED] and state.births.growths == 2
    with pytest.raises(StateError, match="old entries cannot be told from new ones"):
        state.masks("new")


def test_births_for_people_and_faults():
    model = layers()
    births = Births.original(model).grown(moved(mlp=(0, 1, 2, NONE)), model)
    bigger = gj.grow(moved(mlp=(0, 1, 2, NONE)), model, key=KEY)
    births = births.grown(moved(layers=(0, 0, 1, 1), mlp=(3, 0, 1, 2, 0)), bigger)
    assert births.ranges() == {1: {"mlp": "0"}, 2: {"layers": "1, 3", "mlp": "4"}}
    with pytest.raises(StateError, match=r"layers: 4 births, 2 coordinates\n.*mlp: 5 births, 3"):
        births.masks(model)
    with pytest.raises(GrowthError, match="part: expected 'new', 'old' or the number of a growth"):
        Births.original(model).masks(model, "newest")  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match="op: expected an operator"):
        gj.new(model, model)  # type: ignore[arg-type]


# A state in one call -------------------------------------------------------------------------


RULES = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "aged adamw": optim.adamw(1e-2, weight_decay=0.1),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "schedule_free": Optimizer("schedule_free").build(),
}
GROWTHS = {
    "fresh": gj.chain(gj.msg(mlp=4), moved(layers=(0, 1, 1))),
    "matched": gj.msg(mlp=5, init="matched"),
    "copies": gj.copy(heads=3, shares="random"),
    "zeros": gj.zeros(heads=3),
    "drawn layer": moved(layers=(0, NONE, 1), mlp=(0, NONE, 1, 2)),
}


def started(rule: Any, average: Any = None) -> gj.State:
    """A state after one update."""
    model = layers()
    trained = gj.partition(model)[0]
    more = {"rate": 0.1} if isinstance(rule, optim.Rule) else {}
    _, state = rule.update(trained, rule.init(trained), trained, **more)
    return gj.State(model, state, average, cursor={"step": jnp.int32(7)})


@given(
    st.sampled_from(sorted(RULES)),
    st.sampled_from(sorted(GROWTHS)),
    st.sampled_from(["dual", "zero"]),
    st.booleans(),
)
def test_a_state_grows_as_its_parts_do_by_hand(rule, name, copies, under_jit):
    tx, op = RULES[rule], GROWTHS[name]
    state = started(tx)
    # Under `jit` nothing is freed
    options: dict[str, Any] = {"optimizer": tx, "key": KEY, "copies": copies, "donate": under_jit}
    grow = lambda s: gj.grow(op, s, **options)  # noqa: E731
    grown = (eqx.filter_jit(grow) if under_jit else grow)(state)
    assert eqx.tree_equal(grown.model, gj.grow(op, state.model, key=KEY))
    expected = gj.carry(op, state.opt_state, state.model, optimizer=tx, key=KEY, copies=copies)
    assert eqx.tree_equal(grown.opt_state, expected)
    assert eqx.tree_equal(grown.cursor, state.cursor) and grown.average is None
    births = Births.original(state.model).grown(op, state.model)
    assert eqx.tree_equal(grown.births, jax.tree.map(jnp.asarray, births))
    assert eqx.tree_equal(grown.masks(), jax.tree.map(jnp.asarray, gj.new(op, state.model)))


@pytest.mark.parametrize("name", GROWTHS)
def test_averages_follow_and_a_fresh_coordinate_has_its_own_weight(name):
    op, state = GROWTHS[name], started(RULES["sgd"])
    trained = gj.partition(state.model)[0]
    blank = jax.tree.map(jnp.zeros_like, trained)
    ema = optax.EmaState(jnp.int32(3), layers(2.0))  # type: ignore[arg-type]
    state = eqx.tree_at(
        lambda s: s.average,
        state,
        {"same": state.model, "blank": blank, "ema": ema},
        is_leaf=lambda x: x is None,
    )
    grown = gj.grow(op, state, optimizer=RULES["sgd"], key=KEY)
    big = gj.partition(grown.model)[0]
    # Of the weights themselves: it stays them. Of zeros: old ones and copies are zero
    assert eqx.tree_equal(grown.average["same"], grown.model)
    fresh = {"fresh": {"mlp": [3]}, "matched": {"mlp": [3, 4]}, "zeros": {"heads": [2]}}
    fresh["drawn layer"] = {"layers": [1], "mlp": [1]}
    for path, axes in axes_of_leaves(big).items():
        zero, own = np.asarray(getattr(grown.average["blank"], path)), getattr(big, path)
        split = [gj.sizes(big)[axis] for axis in axes]
        drawn = [
            np.isin(np.arange(gj.sizes(big)[axis]), fresh.get(name, {}).get(axis, []))
            for axis in axes
        ]
        drawn = np.logical_or.reduce(np.meshgrid(*drawn, indexing="ij"))
        expected = np.where(drawn, np.asarray(own).reshape(split), 0).reshape(zero.shape)
        np.testing.assert_array_equal(zero, expected, err_msg=path)
    assert isinstance(grown.average["ema"], optax.EmaState) and grown.average["ema"].count == 3
    doubled = grown.average["ema"].ema
    # Twice the weights where there is a source, and the grown model's buffers
    assert eqx.tree_equal(doubled.angles, grown.model.angles)
    twice = np.asarray(doubled.up) - np.asarray(grown.average["blank"].up)
    gap = np.asarray(big.up) - np.asarray(grown.average["blank"].up)
    np.testing.assert_allclose(twice, 2 * gap, rtol=1e-6)


class Numbered(eqx.Module):
    """A parameter of whole numbers, which moves but is not trained."""

    down: Array = gj.param("mlp -> embed")
    kinds: Array = gj.param("-> mlp")


def test_whole_numbers_of_an_average_are_those_of_the_grown_model():
    model = Numbered(jnp.ones((3, 2)), jnp.arange(3))
    average = [model, gj.partition(model)[0]]
    grown = gj.grow(gj.copy(mlp=5), gj.State(model, average=average))
    whole, half = grown.average
    assert eqx.tree_equal(whole, grown.model) and half.kinds is None
    assert grown.model.kinds.tolist() == [0, 1, 2, 0, 1]
    assert eqx.tree_equal(half.down, grown.model.down)


def test_a_states_old_arrays_are_freed_if_asked_to():
    state = started(RULES["sgd"], layers(2.0))
    old = {id(x): x for x in jax.tree.leaves((state.model, state.opt_state, state.average))}
    table = state.model.table
    grown = gj.grow(gj.msg(mlp=4), state, optimizer=RULES["sgd"], key=KEY, donate=True)
    assert grown.model.table is table and not table.is_deleted()
    assert state.model.up.is_deleted() and state.average.up.is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves(grown))
    assert sum(x.is_deleted() for x in old.values()) >= 6


def test_a_state_that_cannot_grow_says_all_that_is_wrong():
    model, tx = layers(), RULES["sgd"]
    op = gj.msg(mlp=4)
    state = gj.State(model, tx.init(gj.partition(model)[0]), [jnp.zeros((2, 2)), jnp.zeros(())])
    with pytest.raises(StateError) as error:
        gj.grow(op, state, key=KEY)
    assert "optimizer: expected the transformation" in str(error.value)
    assert "average[0]: expected a model like the one that grows" in str(error.value)
    narrow = gj.State(model, average=gj.grow(op, model, key=KEY))
    with pytest.raises(
        StateError, match=r"average\.up: expected shape \(2, 2, 3\), got \(2, 2, 4\)"
    ):
        gj.grow(op, narrow, key=KEY)
    with pytest.raises(StateError, match="opt_state: expected the optimizer's state"):
        gj.grow(op, gj.State(model), optimizer=tx, key=KEY)
    with pytest.raises(StateError, match="optimizer: a model is grown alone"):
        gj.grow(op, model, optimizer=tx, key=KEY)
    other = Births.original(gj.grow(op, model, key=KEY))
    with pytest.raises(StateError, match="mlp: 4 births, 3 coordinates"):
        gj.grow(op, gj.State(model, births=other), key=KEY)


@pytest.mark.parametrize("op", [gj.warm(mlp=5, perturb=0.0), gj.copy(mlp=6, noise=0.1)])
def test_averages_are_finished_as_weights_are(op):
    """A shrink, a gain or noise is no part of the gather: without it an average is of another model."""
    model = started(RULES["sgd"]).model
    grown = gj.grow(op, gj.State(model, average=model), key=KEY)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, gj.partition(grown.average)[0], gj.partition(grown.model)[0])

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state, params)

    tx = optax.GradientTransformation(lambda params: params, update)
    carried = gj.carry(op, gj.partition(model)[0], model, optimizer=tx, key=KEY)
    jax.tree.map(close, carried, gj.partition(grown.model)[0])


@pytest.mark.parametrize("under_jit", [False, True])
def test_the_gates_of_a_state_are_those_of_its_model_and_its_whole_averages(under_jit):
    whole, half = layers(2.0), gj.partition(layers(3.0))[0]
    state = started(RULES["sgd"], {"whole": whole, "half": half, "count": jnp.int32(3)})
    grown = gj.grow(gj.msg(mlp=4), state, optimizer=RULES["sgd"], key=KEY)
    ramp = eqx.filter_jit(gj.ramp) if under_jit else gj.ramp
    ramped, opened = ramp(grown, 0.5), ramp(grown, 1.0)
    settled = gj.settle(opened)
    for before, after, change in (
        (grown, ramped, lambda model: gj.ramp(model, 0.5)),
        (opened, settled, gj.settle),
    ):
        assert type(after) is gj.State and eqx.tree_equal(after.model, change(before.model))
        assert eqx.tree_equal(after.average["whole"], change(before.average["whole"]))
        for name in ("half", "count"):
            assert eqx.tree_equal(after.average[name], before.average[name])
        for name in ("opt_state", "cursor", "births"):
            assert eqx.tree_equal(getattr(after, name), getattr(before, name))
        optax.incremental_update(after.model, after.average["whole"], 0.1)
    with pytest.raises(GateError, match="only gates at 1 can be settled"):
        gj.settle(ramped)
    with pytest.raises(GateError, match="this model has no gate"):
        gj.ramp(state, 0.5)
    with pytest.raises(GateError, match="no gate on embed"):
        gj.ramp(grown, 0.5, axes=["embed"])


def test_masks_of_a_growth_that_has_not_been_are_refused():
    state = gj.grow(gj.msg(mlp=4), gj.State(layers()), key=KEY)
    for number in (2, -1):
        with pytest.raises(GrowthError, match=f"expected a growth from 0 to 1, .* got {number}"):
            state.masks(number)


@pytest.mark.parametrize("key", [0, "a", jax.random.split(jax.random.key(0), 2), jnp.zeros(2)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(GrowthError, match="key: expected one key"):
        gj.grow(gj.msg(mlp=4), layers(), key=key)
    with pytest.raises(GrowthError, match="key: expected one key"):
        gj.certify(gj.msg(mlp=4), layers(), jnp.zeros((1, 2)), key=key)
    with pytest.raises(StateError, match=r"key: expected one key such as jax.random.key\(0\)"):
        gj.carry(gj.msg(mlp=4), (), layers(), optimizer=optax.sgd(0.1), key=key)
    with pytest.raises(StateError, match="births: expected gj.Births"):
        gj.grow(gj.msg(mlp=4), gj.State(layers(), births=3), key=KEY)  # type: ignore[arg-type]
