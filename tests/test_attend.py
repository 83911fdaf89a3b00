"""Attention over tiles against all scores at once, in float64: outputs, gradients, and every mask."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import growjax as gj
from growjax.cost import flops
from growjax.errors import AxisError
from growjax.nn import Attention, Mask, RelativeBias, attend
from growjax.nn.place import Place, running_on


TILE = 8
BODIES: list[Any] = ["einsum", "blockwise"]  # those of accelerators are in test_kernels.py
LENGTHS = [(21, 21), (16, 16), (5, 19)]  # tiles divide neither, both, and there are fewer queries


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr("growjax.nn.bodies.TILE", TILE)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64():
        yield


def draw(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def masks(length: int, keys: int) -> dict[str, Mask]:
    """Every condition of a mask; those about places of one sequence only where there is one."""
    pairs = np.random.default_rng(0).random((length, keys)) < 0.7
    pairs[:, 0] = True
    either = {
        "everything": Mask(),
        "padding": Mask(keys=jnp.arange(keys) % 5 != 0),
        "pairs": Mask(pairs=jnp.asarray(pairs)),
        "one row for all": Mask(pairs=jnp.arange(keys)[None] % 5 != 0),
    }
    if length != keys:
        return either
    return either | {
        "causal": Mask(causal=True),
        "prefix": Mask(causal=True, prefix=jnp.arange(keys) < 9),
        "window": Mask(causal=True, window=6),
        "window on both sides": Mask(window=jnp.asarray(5)),
        "documents": Mask(causal=True, documents=jnp.arange(keys) // 7),
    }


CASES = [(shape, name) for shape in LENGTHS for name in masks(*shape)]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_tiles_give_what_all_scores_give(shape, name):
    """And so do the gradients: by queries, keys, values and the table of a bias."""
    length, keys = shape
    mask = masks(length, keys)[name]
    q, out = draw(1, 2, 3, length, 4), draw(2, 2, 3, length, 4)
    k, v = draw(3, 2, keys, 4), draw(4, 2, keys, 4)
    bias = RelativeBias(8, 2, 3, bidirectional=True, max_distance=12, key=jax.random.key(0))
    bias = eqx.tree_at(lambda b: b.table, bias, draw(5, 8, 2, 3))

    @eqx.filter_jit
    def both(body):
        def loss(q, k, v, bias):
            values = attend(q, k, v, mask, bias, body=body)
            return jnp.sum(out * values), values

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)

    (expected, right), (gradient, tiled) = both("einsum"), both("blockwise")
    np.testing.assert_allclose(tiled, right, rtol=0, atol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_a_bias_that_is_there_as_a_whole_is_read_tile_by_tile():
    q, k, v, bias = (
        draw(1, 2, 3, 21, 4),
        draw(2, 2, 21, 4),
        draw(3, 2, 21, 4),
        draw(4, 2, 3, 21, 21),
    )
    run = [attend(q, k, v, Mask(causal=True), bias, body=body) for body in ("einsum", "blockwise")]
    np.testing.assert_allclose(*run, rtol=0, atol=1e-12)


@given(st.integers(1, 21), st.booleans(), st.integers(0, 20))
def test_tiles_outside_of_the_reach_are_never_seen(window, causal, place):
    """No key before or after the reach of a query may be seen by it."""
    mask = Mask(causal=causal, window=window)
    low, high = mask.reach(jnp.asarray(place), 1, 21)
    seen = np.asarray(mask.tile(jnp.asarray([place]), jnp.arange(21)))[0]
    assert not seen[: int(low)].any() and not seen[int(high) :].any()
    assert seen[int(low)] and seen[int(high) - 1]  # and it is no wider than it has to be


def test_scores_of_a_long_sequence_are_never_written():
    """16 times the length takes about 16 times the memory, where all scores take 256 times."""

    def temporaries(length, body):
        @jax.jit
        def gradient(q, k, v):
            return jax.grad(lambda q: attend(q, k, v, Mask(causal=True), body=body).sum())(q)

        x = [jax.ShapeDtypeStruct(s, "float32") for s in [(1, 1, length, 8), *[(1, length, 8)] * 2]]
        memory: Any = gradient.lower(*x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(1024, "blockwise") < 24 * temporaries(64, "blockwise")
    assert temporaries(1024, "blockwise") * 10 < temporaries(1024, "einsum")


def test_rows_that_see_nothing_are_finite():
    q, k, v = draw(1, 1, 1, 16, 4), draw(2, 1, 16, 4), draw(3, 1, 16, 4)
    mask = Mask(causal=True, keys=jnp.arange(16) > 9)
    for body in BODIES:
        grad = jax.grad(lambda q, body=body: attend(q, k, v, mask, body=body)[..., 10:, :].sum())(q)
        assert np.isfinite(attend(q, k, v, mask, body=body)).all() and np.isfinite(grad).all()


def test_a_body_that_does_not_exist_is_refused():
    x = draw(1, 1, 1, 4, 4)
    with pytest.raises(AxisError, match="auto, einsum, blockwise, splash, cudnn, got 'flash'"):
        inspect.unwrap(attend)(x, x[0], x[0], body="flash")  # type: ignore[arg-type]
    with pytest.raises(AxisError, match="attention: expected one of"):
        gj.models.GPTConfig(1, 8, 2, 4, 8, 11, 8, attention="flash")  # type: ignore[arg-type]


def test_masks_and_biases_of_other_lengths_are_refused():
    """A tile would clip them, and read them at wrong places without a word."""
    q, k = draw(1, 1, 1, 4, 4), draw(2, 1, 6, 4)
    short, wrong = jnp.ones(5, bool), jnp.ones((3, 5), bool)
    mask = Mask(causal=True, prefix=short, keys=short, documents=jnp.arange(5), pairs=wrong)
    for body in BODIES:
        with pytest.raises(AxisError) as caught:
            inspect.unwrap(attend)(q, k, k, mask, draw(3, 1, 1, 4, 5), body=body)
        for fault in (
            "prefix: expected [6], got [5]",
            "keys: expected [6], got [5]",
            "pairs: expected [4, 6], got [3, 5]",
            "documents: expected [6], got [5]",
            "documents: they number one sequence, and 4 queries see 6 keys",
            "bias: expected [1, 1, 4, 6], got [1, 1, 4, 5]",
        ):
            assert fault in str(caught.value)


def test_tiles_add_up_in_float32_whatever_is_attended(monkeypatch):
    """Sums over many tiles of bfloat16 would lose more than the products do."""
    monkeypatch.setattr("growjax.nn.bodies.TILE", TILE // 2)  # a CPU takes two for this length
    q, k, v = (
        draw(i, *s).astype("bfloat16") for i, s in enumerate([(1, 1, 96, 8), *[(1, 96, 8)] * 2])
    )
    exact_q, exact_k, exact_v = (x.astype("float64") for x in (q, k, v))
    right = attend(exact_q, exact_k, exact_v, body="einsum")
    tiles = attend(q, k, v, body="blockwise")
    assert tiles.dtype == jnp.bfloat16
    error = float(jnp.abs(tiles.astype("float64") - right).max())
    assert error < 0.5 * float(jnp.finfo("bfloat16").eps), error


def test_the_forward_pass_over_tiles_runs_once_under_dots():
    """What its backward pass needs is kept by name, where "nothing" computes it again."""

    def loops(remat):
        config = gj.models.GPTConfig(
            2, 8, 2, 4, 8, 11, 24, attention="blockwise", remat=remat, position="rotary"
        )
        model = gj.models.GPT(config, key=jax.random.key(0))
        trained, rest = gj.partition(model)

        def loss(trained):
            return eqx.combine(trained, rest)(jnp.arange(24) % 11).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(trained)).count("while[")

    assert loops("dots") == loops("everything") < loops("nothing")


def test_every_body_is_charged_the_same():
    x, counts = jax.ShapeDtypeStruct((3, 24, 8), "float64"), {}
    for body in ("einsum", "blockwise"):
        layer = Attention(8, 4, 2, 2, body=body, key=jax.random.key(0))
        counts[body] = flops(lambda layer, x: jax.vmap(layer)(x), layer, x)
    assert counts["einsum"] == counts["blockwise"] > 0


@pytest.mark.parametrize("config", [{"qk_norm": True}, {"position": "rotary"}])
def test_growth_is_exact_over_tiles_too(config):
    """The same function before and after, whatever new heads hold."""
    sizes = {
        "layers": 2,
        "embed": 8,
        "heads": 2,
        "head_dim": 4,
        "mlp": 8,
        "vocab": 11,
        "positions": 21,
    }
    model = gj.models.GPT(
        gj.models.GPTConfig(**sizes, **config, attention="blockwise"), key=jax.random.key(0)
    )
    model = jax.tree.map(lambda x: x.astype("float64") if eqx.is_inexact_array(x) else x, model)
    tokens = jnp.arange(21) % 11
    grown = gj.grow(gj.msg(heads=4, embed=12, layers=3), model, key=jax.random.key(1))
    before, after = (eqx.filter_jit(m)(tokens) for m in (model, grown))
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-12)


def test_long_sequences_take_tiles(monkeypatch):
    calls = []
    monkeypatch.setattr("growjax.nn.bodies.LONG", 20 * 20)
    monkeypatch.setattr(
        "growjax.nn.bodies.blockwise_attention", lambda q, *_: calls.append(q.shape) or q
    )
    for length in (19, 20):
        x = draw(1, 1, 1, length, 4)
        attend(x, x[0], x[0])
    assert calls == [(1, 1, 20, 4)]


@pytest.mark.parametrize(
    ("platform", "sides"), [("cpu", [4, 4, 8, 8, 16, 16]), ("shapes", [8] * 6)]
)
def test_on_cpus_tiles_grow_with_the_length(platform, sides, monkeypatch):
    """From half of `TILE` up to four tiles, to twice of it above eight."""
    taken = []
    monkeypatch.setattr("growjax.nn.bodies.LONG", 0)
    monkeypatch.setattr(
        "growjax.nn.bodies.blockwise_attention", lambda q, *args: taken.append(args[4]) or q
    )
    for length in (TILE, 4 * TILE, 4 * TILE + 1, 8 * TILE, 8 * TILE + 1, 64 * TILE):
        x = jnp.zeros((1, 1, length, 4))
        with running_on(Place(platform)):
            attend(x, x[0], x[0])
    assert taken == sides
