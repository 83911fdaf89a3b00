"""The new and the old part of a grown model: rates, decay, and entries that stay, bit by bit."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import optim
from growjax.errors import StateError
from growjax.growth import Births
from growjax.optim.divided import Division
from growjax.optim.partwise import divided, refuse_mixing
from growjax.train import Optimizer
from tests.conftest import DEEP
from tests.test_births import KEY, layers, moved


STEPS = 5
# Old and new entries share leaves: of a gated axis, of a stack, of two axes in one dimension
GROWTHS = {
    "gates": gj.msg(mlp=5),
    "layers": moved(layers=(0, 0, 1)),
    "heads and layers": gj.chain(moved(heads=(0, -1, 1)), moved(layers=(0, 1, 1))),
}
CLIP = optax.clip_by_global_norm(0.3)
RULES = {
    "clipped adamw": optax.chain(CLIP, optax.adamw(1e-2, b2=0.999, weight_decay=0.1)),
    "momentum, then clipped": optax.chain(optax.trace(0.9), CLIP, optax.scale(-1e-2)),
    "decay, then clipped": optax.chain(optax.add_decayed_weights(0.1), CLIP, optax.scale(-1e-2)),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "adagrad": optax.adagrad(1e-2),
    "every other step": optax.MultiSteps(optax.chain(CLIP, optax.adam(1e-2)), 2),
    "aged adamw": optax.chain(
        CLIP,
        optim.scale_by_adam(0.9, 0.999),
        optim.decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    ),
}
# What a rule that wants axes does where all coordinates are of one age
PLAIN = RULES | {
    "aged adamw": optax.chain(
        CLIP,
        optax.scale_by_adam(0.9, 0.999),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
}


class Grown(NamedTuple):
    """A model in double precision that has just grown, and masks of its parts."""

    op: Any
    trained: Any
    births: Births
    masks: dict[str, Any]


@functools.cache
def grown(name: str) -> Grown:
    with jax.enable_x64(True):
        small = layers(dtype=jnp.float64)
        state = gj.grow(GROWTHS[name], gj.State(small), key=KEY)
        # A weight of minus zero must not become one of zero
        trained = gj.partition(state.model)[0]
        trained = eqx.tree_at(lambda t: t.table, trained, trained.table.at[0, 0].set(-0.0))
        masks = {part: state.masks(part) for part in ("new", "old")}
        births = jax.tree.map(np.asarray, state.births)
        return Grown(GROWTHS[name], trained, births, masks)


def gradients(like: Any, step: int) -> Any:
    """Those of one step: large enough to be clipped, whatever they are taken at."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


def started(tx: Any, name: str) -> Any:
    """The state of `parts` around a rule, right after a growth."""
    small = layers(dtype=jnp.float64)
    state = tx.init(gj.partition(small)[0])
    return gj.carry(GROWTHS[name], state, small, optimizer=tx, key=KEY)


def stepped(tx: Any, **more: Any) -> Any:
    """One step as one program: weights and state after it."""

    @jax.jit
    def step(gradient, state, weights):
        updates, state = tx.update(gradient, state, weights, **more)
        return optax.apply_updates(weights, updates), state

    return step


@functools.cache
def run(rule: str, name: str, **shares: Any) -> tuple[Any, Any]:
    """Weights and state after some steps under `parts`."""
    with jax.enable_x64(True):
        tx = optim.parts(RULES[rule], **shares)
        trained, state = grown(name).trained, started(tx, name)
        step = stepped(tx)
        for n in range(STEPS):
            trained, state = step(gradients(trained, n), state, trained)
        return trained, state


def entries(tree: Any, masks: Any) -> dict[str, np.ndarray]:
    """The entries of every leaf that a mask picks, in a row each."""
    chosen = jax.tree.map(lambda x, m: np.asarray(x)[np.asarray(m)], tree, masks)
    paths = jax.tree_util.tree_leaves_with_path(chosen)
    return {jax.tree_util.keystr(path): x for path, x in paths}


def bits(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


# Every fifth of them has every rule, growth and part
EVERY_CASE = [(rule, name, new) for rule in RULES for name in GROWTHS for new in (False, True)]


@pytest.mark.parametrize("rule, name, new", EVERY_CASE[:: 1 if DEEP else 5])
def test_the_frozen_part_stays_bitwise_and_the_other_trains_as_if_alone(rule, name, new):
    """A reference run is given the entries that train and nothing else."""
    moves, rests = ("new", "old") if new else ("old", "new")
    trained, state = run(rule, name, **{rests: 0.0})
    before, masks = grown(name).trained, grown(name).masks
    after = entries(trained, masks[rests])
    for path, x in entries(before, masks[rests]).items():
        assert bits(x) == bits(after[path]), path
    with jax.enable_x64(True):
        tx = PLAIN[rule]
        alone = {k: jnp.asarray(x) for k, x in entries(before, masks[moves]).items()}
        own, step = jax.jit(tx.init)(alone), stepped(tx)
        for n in range(STEPS):
            gradient = entries(gradients(before, n), masks[moves])
            alone, own = step(jax.tree.map(jnp.asarray, gradient), own, alone)
    for path, x in entries(trained, masks[moves]).items():
        np.testing.assert_allclose(x, alone[path], rtol=1e-9, atol=1e-12, err_msg=path)  # type: ignore[index]
        assert np.all(x != entries(before, masks[moves])[path])
    assert eqx.tree_equal(
        jax.tree.map(np.asarray, state.births), grown(name).births, typematch=False
    )


@pytest.mark.parametrize("rule", ["clipped adamw", "aged adamw", "adagrad"])
def test_what_is_remembered_of_a_frozen_part_goes_on(rule):
    """Moments of entries that stand still are those of a run whose weights stand still."""
    name = "gates"
    _, state = run(rule, name, new=0.0)
    with jax.enable_x64(True):
        tx, trained = RULES[rule], grown(name).trained
        inner = started(optim.parts(tx), name).inner
        update = jax.jit(tx.update)
        for step in range(STEPS):
            _, inner = update(gradients(trained, step), inner, trained)
    mask = grown(name).masks["new"]
    like = lambda node: isinstance(node, type(trained))  # noqa: E731
    pairs = zip(*(jax.tree.leaves(s, is_leaf=like) for s in (state.inner, inner)), strict=True)
    moments = [(a, b) for a, b in pairs if like(a)]
    assert moments
    for a, b in moments:
        expected = entries(b, mask)
        for path, x in entries(a, mask).items():
            np.testing.assert_allclose(x, expected[path], rtol=1e-9, err_msg=path)
            assert x.size == 0 or np.any(x)


def test_a_part_that_thaws_is_not_kicked():
    """New coordinates that stood still since growth take first steps of one rate, and not of six."""
    tx = optim.adamw(1.0, b2=0.999)
    held = optim.parts(tx, new=0.0)
    with jax.enable_x64(True):
        trained, state = grown("gates").trained, started(held, "gates")
        ones = jax.tree.map(jnp.ones_like, trained)
        update = jax.jit(held.update)
        for _ in range(20):
            _, state = update(ones, state, trained)
        updates, _ = jax.jit(tx.update)(ones, state.inner, trained)
    sizes = np.abs(np.concatenate(list(entries(updates, grown("gates").masks["new"]).values())))
    np.testing.assert_allclose(sizes, 1.0, rtol=1e-5)


# Rates and decay -----------------------------------------------------------------------------


CURVE = optim.Curve(((0, 0.0), (2, 1.0), (4, 0.5)))
SHARES = {
    "constants": dict(new=2.0, old=0.25),
    "a curve for new ones": dict(new=CURVE),
    "a curve for old ones": dict(new=optim.Part(0.5), old=CURVE),
    "of the first growth": dict(old=0.5, growths={1: CURVE, 0: 3.0}),
}


def test_a_curve_is_straight_between_its_points():
    values = [float(CURVE.at(step)) for step in range(6)]
    assert values == [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]


@pytest.mark.parametrize("name", SHARES)
def test_rates_of_parts_count_from_their_growth(name):
    """Two growths, three steps apart; the updates are those of the rule, times the part's multiple."""
    tx, shares = optax.sgd(1.0), SHARES[name]
    divided_tx = optim.parts(tx, **shares)
    first, second = gj.msg(mlp=4), moved(layers=(0, 1, 1), mlp=(0, 1, 2, 3, 3))
    state = gj.State(layers(), divided_tx.init(gj.partition(layers())[0]))
    update = jax.jit(divided_tx.update)
    for step in range(8):
        if step in (2, 5):
            op = first if step == 2 else second
            state = gj.grow(op, state, optimizer=divided_tx, key=KEY)
        trained, rest = gj.partition(state.model)
        ones = jax.tree.map(jnp.ones_like, trained)
        updates, opt_state = update(ones, state.opt_state, trained)
        growths = (step >= 2) + (step >= 5)
        assert int(opt_state.births.growths) == growths
        assert eqx.tree_equal(opt_state.births, state.births)
        at = [0, 2, 5]
        expected = jax.tree.map(np.ones_like, ones)
        named: dict[Any, Any] = {part: shares.get(part, 1.0) for part in ("old", "new")}
        for part, share in (named | dict(shares.get("growths", {}))).items():
            rate = share.rate if isinstance(share, optim.Part) else share
            since = step - (at[growths] if isinstance(part, str) else at[part])
            value = float(rate.at(since)) if isinstance(rate, optim.Curve) else rate
            if growths:
                masks = state.births.masks(state.model, part)  # type: ignore[arg-type]
                expected = jax.tree.map(lambda e, m, v=value: np.where(m, v, e), expected, masks)
        for u, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(u, -e, rtol=1e-6)
        model = eqx.combine(optax.apply_updates(trained, updates), rest)
        state = gj.State(model, opt_state, births=state.births)


def test_the_decay_of_a_part_is_its_own():
    trained = grown("gates").trained
    with jax.enable_x64(True):
        zeros = jax.tree.map(jnp.zeros_like, trained)
        tx = optim.parts(
            optim.adamw(1.0, weight_decay=0.1), new=optim.Part(decay=0.0), old=optim.Part(0.5, 3.0)
        )
        updates, _ = jax.jit(tx.update)(zeros, started(tx, "gates"), trained)
        matrices = optim.matrices(trained)
    masks = grown("gates").masks["new"]
    for u, p, new, decays in zip(
        *map(jax.tree.leaves, (updates, trained, masks, matrices)), strict=True
    ):
        expected = np.where(new, 0.0, -0.15 * np.asarray(p)) if decays else 0 * np.asarray(p)
        np.testing.assert_allclose(u, expected, rtol=1e-9, atol=1e-15)
    other = optim.parts(optax.adamw(1.0, weight_decay=0.1), new=optim.Part(decay=0.0))
    with (
        jax.enable_x64(True),
        pytest.raises(StateError, match="decay: nothing in this optimizer takes a decay"),
    ):
        other.update(zeros, started(other, "gates"), trained)


def test_nothing_is_new_before_the_first_growth():
    trained = gj.partition(layers())[0]
    gradient = gradients(trained, 0)

    def first(tx: Any) -> Any:
        return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(gradient, trained)

    plain = optim.adamw(1e-2, weight_decay=0.1)
    expected = first(plain)
    for parts in (optim.parts(plain, old=0.0, new=3.0), optim.parts(plain, new=0.0)):
        assert eqx.tree_equal(first(parts), expected, rtol=1e-6)


# What cannot be done right -------------------------------------------------------------------


MIXING = {
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "muon": optax.contrib.muon(1e-2),
    "lamb": optax.lamb(1e-2),
    "blocks clipped": optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(1e-2)),
    "scaled by the tensor": optax.chain(
        optim.scale_by_adam(), optim.scale_by_parameter(), optax.scale(-1e-2)
    ),
    "novograd": optax.novograd(1e-2),
}


@pytest.mark.parametrize("name", MIXING)
def test_rules_that_mix_entries_are_refused(name):
    tx = optim.parts(MIXING[name], old=0.0)
    trained = gj.partition(layers())[0]
    with pytest.raises(StateError, match="mixes the entries of an array") as error:
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), trained)
    assert "- square" in str(error.value)
    # Slower or faster, and not frozen: nothing is mixed up
    slower = optim.parts(MIXING[name], old=0.5)
    jax.eval_shape(lambda p: slower.update(p, slower.init(p), p), trained)


def test_whole_layers_can_be_frozen_under_rules_that_mix_within_layers():
    """Where it is known which axes grew: matrices of other layers do not matter to Muon's."""
    config = gj.models.GPTConfig(
        layers=2, embed=4, heads=1, head_dim=4, mlp=8, vocab=5, positions=3, bias=False
    )
    model = eqx.filter_jit(gj.models.GPT)(config, key=KEY)
    rule = Optimizer("muon").build()

    def division(op: Any) -> Division:
        births = Births.original(model).grown(op, model)
        return Division(optim.Parts(old=0.0), births, lambda slot, growth: 0)

    deeper, wider = gj.stack(layers=4), gj.msg(mlp=12)
    big = gj.partition(gj.grow(deeper, model, key=KEY))[0]
    refuse_mixing(rule, big, division(deeper))
    wide = gj.partition(gj.grow(wider, model, key=KEY))[0]
    with pytest.raises(StateError, match=r"mlp\.up") as error:
        refuse_mixing(rule, wide, division(wider))
    assert "attention" not in str(error.value)

    # The new layers move as they do if all of them train
    @jax.jit
    def updates(gradient, big):
        state, parts = rule.init(big), division(deeper)
        some, _ = divided(rule, rule, parts, gradient, state, big, rate=1.0)
        return some, rule.update(gradient, state, big, rate=1.0)[0]

    some, every = updates(gradients(big, 0), big)
    up, all_up = some.blocks.block.mlp.up, every.blocks.block.mlp.up
    # Clipped by the norm of less, which orthogonal steps do not see
    np.testing.assert_allclose(up[2:], all_up[2:], rtol=1e-3, atol=1e-5)
    assert not np.any(up[:2]) and np.all(np.any(all_up[:2], (1, 2)))
    assert not np.any(some.embedding.table)


def test_what_is_judged_stays_too_if_the_rule_averages():
    rule = optim.parts(Optimizer("schedule_free").build(), old=0.0)
    small = layers()
    trained, rest = gj.partition(small)
    opt_state, gradient, step = rule.init(trained), gradients(trained, 0), stepped(rule, rate=0.1)
    for _ in range(2):
        trained, opt_state = step(gradient, opt_state, trained)
    state = gj.State(eqx.combine(trained, rest), opt_state)
    state = gj.grow(gj.msg(mlp=5), state, optimizer=rule, key=KEY)
    before = gj.partition(state.model)[0]
    judged = rule.evaluated(before, state.opt_state)
    trained, opt_state = before, state.opt_state
    for n in range(3):
        trained, opt_state = step(gradients(trained, n), opt_state, trained)
    old = state.masks("old")
    after = rule.evaluated(trained, opt_state)
    assert not eqx.tree_equal(entries(judged, old), entries(before, old))
    for path, x in entries(judged, old).items():
        assert bits(x) == bits(entries(after, old)[path]), path
    assert not eqx.tree_equal(entries(after, state.masks()), entries(judged, state.masks()))
    slower = optim.parts(Optimizer("schedule_free").build(), old=0.5)
    with pytest.raises(StateError, match="this rule averages its weights"):
        jax.eval_shape(lambda p: slower.update(p, slower.init(p), p, rate=0.1), trained)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optim.Curve(()), "points: expected pairs of a step"),
        (lambda: optim.Curve(((3, 1.0), (3, 2.0))), "expected steps that rise"),
        (lambda: optim.Curve(((0, -1.0),)), "both 0 or more"),
        (lambda: optim.Part(rate=-1.0), "rate: expected"),
        (lambda: optim.Part(decay=float("nan")), "decay: expected"),
        (lambda: optim.Parts(new="fast"), "new: expected"),  # type: ignore[arg-type]
        (lambda: optim.Parts(growths=((1, 0.0), (1, 1.0))), "expected each number once"),
        (lambda: optim.Parts(growths=((-1, 0.0),)), "growths: expected their numbers"),
    ],
)
def test_parts_out_of_range_are_refused_when_they_are_made(make, message):
    with pytest.raises(StateError, match=message):
        make()


def test_parts_of_another_state_are_refused():
    model = {"up": jnp.ones((2, 3))}
    with pytest.raises(StateError, match=r"state: expected that of parts\(...\).init, got tuple"):
        optim.parts(optax.sgd(0.1)).update(model, optax.sgd(0.1).init(model), model)


def test_parts_of_what_is_no_optimizer_are_refused():
    with pytest.raises(StateError, match="optimizer: expected an optax transformation .* got None"):
        optim.parts(None)
    with pytest.raises(StateError, match=r"growths: expected a dict .* got \[1.0\]"):
        optim.parts(optax.sgd(0.1), growths=[1.0])  # type: ignore[arg-type]


def test_parts_need_the_parameters():
    tx = optim.parts(optax.sgd(1.0), old=0.0)
    trained = gj.partition(layers())[0]
    with pytest.raises(
        StateError, match="params: expected the parameters, whose axes define the parts"
    ):
        tx.update(trained, tx.init(trained))


class Fused(eqx.Module):
    """A leaf of two blocks, of which one has an axis whose size is a number."""

    both: jax.Array = gj.param("(mlp + 2 heads) <- embed")
    down: jax.Array = gj.param("mlp -> embed")
    back: jax.Array = gj.param("embed <- heads")


def test_blocks_of_one_leaf_have_parts_of_their_own():
    rng = np.random.default_rng(0)
    fill = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tx = optim.parts(optim.adamw(0.1), old=0.0)
    small = Fused(fill(3 + 2 * 2, 2), fill(3, 2), fill(2, 2))
    state = gj.State(small, tx.init(gj.partition(small)[0]))
    state = gj.grow(moved(mlp=(0, 1, 2, 2), heads=(0, -1, 1)), state, optimizer=tx, key=KEY)
    trained = gj.partition(state.model)[0]
    updates, _ = tx.update(gradients(trained, 0), state.opt_state, trained)
    moves = np.asarray(updates.both).any(1)
    # Four of `mlp`, then three heads twice
    assert moves.tolist() == [False, False, False, True, *([False, True, False] * 2)]
