"""Gates between 0 and 1, part by part, against the formulas of masked structural growth in numpy."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import growjax as gj
from growjax import testing
from growjax.axes import axes_of, get, partition, put
from growjax.errors import AxisError, GateError
from growjax.gates import Gate
from growjax.models import BERT, GPT, BERTConfig, GPTConfig
from growjax.nn import MLP, Attention, Norm, Stacked, causal, make_block


EPS = 1e-3
LEVELS = pytest.mark.parametrize("m", [0.0, 0.3, 1.0])


def filled(make, dtype=jnp.float64):
    """What `make(key)` makes, every weight random: without compiling how it is drawn."""
    with jax.enable_x64(dtype == jnp.float64):
        shapes = testing.randomise(eqx.filter_eval_shape(make, jax.random.key(0)))
        return jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.full(x.shape, EPS), shapes)


def level(m: float, old: int, size: int) -> np.ndarray:
    return np.where(np.arange(size) < old, 1.0, m)


def behind(model, **values):
    """The model with gates of these values; `a__b` is the place a.b."""
    gates: dict[Any, Gate] = {
        tuple(k.split("__")): Gate(jnp.asarray(v), jnp.asarray(v) < 1) for k, v in values.items()
    }
    return put(model, gates)


def stream(size: int = 6, length: int = 4) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(length, size))


def close(ours, expected):
    ours = np.asarray(ours)
    assert ours.dtype == np.float64
    assert np.abs(ours - expected).max() <= 1e-13 * max(np.abs(expected).max(), 1)


# Norms: x has weights c in the statistics, and the output is multiplied by c ------------------


def masked_norm(x, c, gain: Any = 1.0, bias: Any = 0.0, *, centre=True, eps=EPS):
    S = c.sum()
    mu = (c * x).sum(-1, keepdims=True) / S if centre else 0.0
    var = (c * (x - mu) ** 2).sum(-1, keepdims=True) / S
    return (gain * (x - mu) / np.sqrt(var + eps) + bias) * c


@LEVELS
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_weights_its_statistics_and_its_output(kind, m):
    with jax.enable_x64(True):
        x, c = stream(), level(m, 4, 6)
        norm = filled(lambda key: Norm(6, kind))
        bias = 0.0 if norm.bias is None else np.asarray(norm.bias)
        expected = masked_norm(x, c, np.asarray(norm.weight), bias, centre=kind == "layer")
        close(behind(norm, gate=c)(jnp.asarray(x)), expected)


@given(st.integers(0, 99), st.sampled_from([0.1, 0.3, 1.0]), st.sampled_from(["layer", "rms"]))
def test_the_laws_of_a_masked_norm(seed, m, kind):
    rng = np.random.default_rng(seed)
    c, x = np.where(rng.random(6) < 0.5, m, 1.0), rng.normal(size=(2, 6))
    unmasked = np.sort(rng.permutation(6)[:4])
    with jax.enable_x64(True):
        plain = put(Norm(6, kind, bias=False), {("eps",): jnp.asarray(EPS)})

        def norm(x, c, eps=EPS):
            return np.asarray(
                put(behind(plain, gate=c), {("eps",): jnp.asarray(eps)})(jnp.asarray(x))
            )

        close(norm(x, np.ones(6)), np.asarray(plain(jnp.asarray(x))))  # (a) all ones
        hard = np.isin(np.arange(6), unmasked).astype(float)
        part = np.asarray(
            Norm(len(unmasked), kind, eps=EPS, bias=False)(jnp.asarray(x[:, unmasked]))
        )
        close(norm(x, hard)[:, unmasked], part)  # (b) zeros and ones: the sub-vector
        order = rng.permutation(6)
        close(norm(x[:, order], c[order]), norm(x, c)[:, order])  # (c) permutations
        if kind == "layer":
            close(norm(x + 5, c), norm(x, c))  # (d) shifts
        close(norm(x * 5, c, 25 * EPS), norm(x, c))  # (d) scales
        y = norm(x, c, 1e-14) / c  # before the output is masked
        if kind == "layer":
            assert np.abs((c * y).sum(-1) / c.sum()).max() < 1e-9  # (e) weighted mean
        np.testing.assert_allclose((c * y**2).sum(-1) / c.sum(), 1, rtol=1e-9)
        close(
            norm(x, c) / c, masked_norm(x, c / c.sum(), centre=kind == "layer") / (c / c.sum())
        )  # (f)


# Width ---------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


@LEVELS
@pytest.mark.parametrize("glu", [False, True])
def test_hidden_units_are_masked_before_the_activation_or_after_the_product(glu, m):
    with jax.enable_x64(True):
        x, c = stream(), level(m, 3, 5)
        mlp = filled(lambda key: MLP(6, 5, activation="silu", glu=glu, key=key))
        w = jax.tree.map(np.asarray, mlp)
        z = x @ w.up + w.up_bias
        h = c * (silu(x @ w.glu) * z) if glu else silu(c * z)
        close(behind(mlp, gate=c)(jnp.asarray(x)), h @ w.down + w.down_bias)
        if not glu and m == 0.3:  # act(m z) is not m act(z)
            assert np.abs(silu(c * z) - c * silu(z)).max() > 0.05


def attend(w, x, kv: Any = 1.0, group: Any = 1.0, head_dim: Any = 1.0):
    """Attention where heads have masks `kv`, queries in a group `group`, coordinates `head_dim`."""
    kv = np.broadcast_to(kv, w.k.shape[1])[:, None]
    g = np.broadcast_to(group, w.q.shape[2])[:, None]
    q = (np.einsum("te,ekgd->tkgd", x, w.q) + w.q_bias) * kv[:, None] * g * head_dim
    k = (np.einsum("te,ekd->tkd", x, w.k) + w.k_bias) * kv * head_dim
    v = (np.einsum("te,ekd->tkd", x, w.v) + w.v_bias) * kv * head_dim
    p = np.exp(w.scale * np.einsum("tkgd,skd->kgts", q, k))
    read = np.einsum("kgts,skd->tkgd", p / p.sum(-1, keepdims=True), v) * g
    return np.einsum("tkgd,kgde->te", read, w.o) + w.o_bias


@LEVELS
@pytest.mark.parametrize(
    "axis, old, size", [("kv_heads", 1, 2), ("group", 2, 3), ("head_dim", 3, 4)]
)
def test_heads_mask_queries_keys_and_values_each(axis, old, size, m):
    with jax.enable_x64(True):
        x, c = stream(), level(m, old, size)
        attention = filled(lambda key: Attention(6, 6, 2, 4, key=key))
        masked = behind(attention, **{f"gate_{axis}": c})
        w = jax.tree.map(np.asarray, attention)
        expected = attend(w, x, **{"kv" if axis == "kv_heads" else axis: c})
        close(masked(jnp.asarray(x)), expected)
        if m == 0.3:
            assert np.abs(expected - attend(w, x)).max() > 1e-3


@LEVELS
@pytest.mark.parametrize("post_norm", [False, True])
def test_the_stream_is_masked_where_branches_join_it_or_in_the_norm(post_norm, m):
    with jax.enable_x64(True):
        c = level(m, 4, 6)
        x = stream() * c
        block = filled(lambda key: make_block(6, 2, 3, 5, post_norm=post_norm, key=key))
        places = ("gate", "attention_norm__gate", "mlp_norm__gate")
        out = behind(block, **dict.fromkeys(places, c))(jnp.asarray(x))
        w = jax.tree.map(np.asarray, block)
        for norm, f in [(w.attention_norm, block.attention), (w.mlp_norm, block.mlp)]:
            branch = lambda h, f=f: np.asarray(f(jnp.asarray(h)))  # noqa: E731
            if post_norm:
                x = masked_norm(x + branch(x), c, norm.weight, norm.bias)
            else:
                x = x + c * branch(masked_norm(x, c, norm.weight, norm.bias))
        close(out, x)


SIZES: dict[str, Any] = dict(layers=2, embed=6, heads=2, head_dim=2, mlp=5, vocab=7, positions=4)
TOKENS = np.asarray([3, 1, 4], np.int32)


@LEVELS
def test_embeddings_and_the_norm_before_the_head_are_masked(m):
    with jax.enable_x64(True):
        c, model = level(m, 4, 6), filled(lambda key: GPT(GPTConfig(**SIZES), key=key))
        table = np.asarray(model.embedding.table)
        x = c * (table[TOKENS] + np.asarray(model.position.table)[:3])
        x = np.asarray(model.blocks(jnp.asarray(x), mask=causal()))
        x = masked_norm(x, c, np.asarray(model.norm.weight), np.asarray(model.norm.bias))
        close(behind(model, gate=c, norm__gate=c)(TOKENS), x @ table.T)


@LEVELS
def test_a_pooler_is_masked_after_its_tanh(m):
    with jax.enable_x64(True):
        c, model = level(m, 4, 6), filled(lambda key: BERT(BERTConfig(**SIZES), key=key))
        output = behind(model, pooler__gate=c)(TOKENS)
        w = jax.tree.map(np.asarray, model.pooler)
        close(output.pooled, c * np.tanh(np.asarray(output.hidden)[0] @ w.weight + w.bias))


# Depth ---------------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize("post_norm", [False, True])
def test_a_new_layer_is_mixed_with_its_own_input(post_norm, m):
    def make(key):
        return make_block(6, 2, 3, 5, post_norm=post_norm, key=key)

    with jax.enable_x64(True):
        stack = filled(lambda key: Stacked(make, 3, key=key))
        c, x = np.asarray([1.0, m, m]), stream()
        out = behind(stack, gate=c)(jnp.asarray(x))
        for i, ci in enumerate(c):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], stack.block)
            x = ci * np.asarray(layer(jnp.asarray(x))) + (1 - ci) * x
        close(out, x)


# Growth behind gates -------------------------------------------------------------------------


def sevens(key, shape, dtype):
    return jnp.full(shape, 7, dtype)


def wave(key, shape, dtype):
    return 0.4 * jnp.sin(1.0 + jnp.arange(np.prod(shape), dtype=dtype) ** 2).reshape(shape)


def gpt(dtype=jnp.float64, **sizes):
    return filled(lambda key: GPT(GPTConfig(**{**SIZES, **sizes}), key=key), dtype)


def grown(op, model):
    return eqx.filter_jit(op)(model, key=jax.random.key(0))


@pytest.mark.parametrize("family", ["BERT", "GPT"])
def test_new_coordinates_of_every_hidden_state_are_exactly_zero_at_level_0(family):
    with jax.enable_x64(True):
        config = {"BERT": BERTConfig, "GPT": GPTConfig}[family](**SIZES)
        model = filled(lambda key: {"BERT": BERT, "GPT": GPT}[family](config, key=key))
        new = grown(gj.msg(embed=9, init=sevens), model)
        if family == "BERT":
            states = [new(TOKENS).hidden, new(TOKENS).pooled]
        else:
            x = np.append(stream(length=3), np.zeros((3, 3)), -1)
            states = [new.blocks(jnp.asarray(x)), new.norm(jnp.asarray(x))]
    for state in states:
        assert np.abs(state[..., :6]).min() > 0 and not state[..., 6:].any()


def test_gradients_of_new_weights_rise_with_the_level_and_those_of_queries_and_keys_with_its_cube():
    with jax.enable_x64(True):
        model = grown(gj.msg(mlp=8, heads=3, layers=3, init=wave), gpt())

        @jax.jit
        def gradient(m):
            trained, rest = partition(gj.ramp(model, m))
            f = lambda t: jnp.sum(jnp.sin(eqx.combine(t, rest)(TOKENS)))  # noqa: E731
            return jax.grad(f)(trained).blocks.block

        low, high = gradient(jnp.asarray(1e-3)), gradient(jnp.asarray(1e-2))
    old, new = slice(0, 2), slice(2, None)  # old layers; the third layer is new
    for place, where, order in [
        (("mlp", "up"), (old, ..., slice(5, None)), 1),
        (("mlp", "up_bias"), (old, slice(5, None)), 1),
        (("mlp", "down"), (old, slice(5, None)), 1),
        (("mlp", "up"), (new, ..., slice(0, 5)), 1),
        (("attention", "o"), (new, slice(0, 2)), 1),
        (("attention_norm", "weight"), (new,), 1),
        (("attention", "v"), (old, slice(None), new), 1),
        (("attention", "o"), (old, new), 1),
        (("attention", "q"), (old, slice(None), new), 3),
        (("attention", "k"), (old, slice(None), new), 3),
        (("mlp", "up"), (old, ..., slice(0, 5)), 0),
    ]:
        small, large = (np.linalg.norm(np.asarray(get(g, place))[where]) for g in (low, high))
        assert np.log10(large / small) == pytest.approx(order, abs=0.1), (place, order)


class Counter:
    """A jitted forward pass that counts how often it is compiled."""

    def __init__(self):
        self.traces = 0
        self.run = jax.jit(self._run)

    def _run(self, model, m=None):
        self.traces += 1
        return (model if m is None else gj.ramp(model, m))(TOKENS)


LEVELS_OF_A_RAMP = [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("axis, size", [("mlp", 7), ("heads", 4), ("head_dim", 6)])
def test_units_of_zeros_behind_gates_never_learn(axis, size):
    with jax.enable_x64(True):
        x = jnp.asarray(stream())
        make = {"mlp": lambda key: MLP(6, 5, key=key)}.get(
            axis, lambda key: Attention(6, 2, 2, 4, key=key)
        )
        part = gj.ramp(gj.msg(**{axis: size}, init="zeros")(filled(make)), 0.5)
        slope = eqx.filter_jit(eqx.filter_grad(lambda part: jnp.sum(jnp.sin(part(x)))))(part)
    new = 0
    for slot in axes_of(part).of_kind("param"):
        for i, dim in enumerate(slot.dims):
            if slot.value is not None and dim.axis == {"heads": "kv_heads"}.get(axis, axis):
                fresh = np.split(get(slope, slot.steps), [{"mlp": 5, "heads": 2}.get(axis, 4)], i)[
                    1
                ]
                assert not fresh.any()
                new += fresh.size
    assert new


def test_a_whole_ramp_is_one_program_with_the_level_as_an_argument():
    model, counter = grown(gj.msg(mlp=8, init=wave), gpt(jnp.float32)), Counter()
    outputs = [counter.run(model, m) for m in LEVELS_OF_A_RAMP]
    assert counter.traces == 1
    assert len({float(y.sum()) for y in outputs}) == len(outputs)


def test_a_whole_ramp_is_one_program_with_the_level_in_the_model():
    model, counter = grown(gj.msg(mlp=8, init=wave), gpt(jnp.float32)), Counter()
    counter.run(model)
    for m in LEVELS_OF_A_RAMP:
        counter.run(gj.ramp(model, m))
    assert counter.traces == 1


def gates(model):
    return {s.path: float(s.value.value.min()) for s in axes_of(model).of_kind("gate") if s.value}


def test_ramp_and_settle_can_be_limited_to_some_axes():
    model = grown(gj.msg(mlp=8, heads=3, init=sevens), gpt(jnp.float32))
    mlp, heads = "blocks.block.mlp.gate", "blocks.block.attention.gate_kv_heads"
    assert gates(model) == {mlp: 0, heads: 0}
    assert gates(gj.ramp(model, 0.5, axes=["mlp"])) == {mlp: 0.5, heads: 0}
    assert gates(gj.ramp(gj.ramp(model, 1.0), 0.5)) == {mlp: 0.5, heads: 0.5}
    half = gj.settle(gj.ramp(model, 1, axes=["mlp"]), axes=["mlp"])
    assert gates(half) == {heads: 0}
    again = grown(gj.msg(mlp=9, init=sevens), half)  # settled axes grow while others ramp
    assert gates(again) == {mlp: 0, heads: 0}
    with pytest.raises(GateError, match=f"'kv_heads' is still ramping.*\n.*{heads}"):
        gj.msg(heads=4)(half)
    named = gj.ramp(half, 0.5, axes=["heads"])  # as growth takes them
    assert gates(named) == gates(gj.ramp(half, 0.5, axes=["kv_heads"])) == {heads: 0.5}
    assert not gates(gj.settle(gj.ramp(half, 1, axes=["heads"]), axes=["heads"]))
    with pytest.raises(AxisError, match="unknown axis 'head'.*kv_heads=3"):
        gj.ramp(half, 0.5, axes=["head"])
    for axes in (["embed"], ["mlp"], ["mlp", "heads"], ["group"]):
        with pytest.raises(GateError, match=f"no gate on {axes[0]}"):
            gj.ramp(half, 0.5, axes=axes)


@pytest.mark.parametrize("m", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_level_outside_0_and_1_is_refused(m):
    model = behind(filled(lambda key: Norm(6), jnp.float32), gate=np.ones(6, np.float32))
    with pytest.raises(GateError, match=r"level: expected a number in \[0, 1\], got"):
        gj.ramp(model, m)


def test_settling_an_open_gate_changes_nothing_but_the_tree():
    with jax.enable_x64(True):
        model = gj.ramp(grown(gj.msg(mlp=8, embed=8, heads=3, layers=3, init=wave), gpt()), 1.0)
        settled = gj.settle(model)
        close(Counter().run(settled), np.asarray(Counter().run(model)))
    assert not gates(settled) and eqx.tree_equal(partition(settled)[0], partition(model)[0])


def test_a_settled_model_is_the_program_of_one_that_never_grew():
    sizes: dict[str, Any] = dict(mlp=8, embed=8, layers=3)
    model = gj.ramp(grown(gj.msg(heads=3, **sizes, init=wave), gpt(jnp.float32)), 1.0)
    born = jax.tree.map(lambda x: x, gpt(jnp.float32, heads=3, **sizes))
    text = [jax.jit(Counter()._run).lower(m).as_text() for m in (gj.settle(model), born, model)]
    assert text[0] == text[1] != text[2]


def test_settle_refuses_a_gate_that_is_not_open_and_a_trace():
    model = grown(gj.msg(mlp=8, init=sevens), gpt(jnp.float32))
    with pytest.raises(GateError, match=r"blocks\.block\.mlp\.gate: level 0.5"):
        gj.settle(gj.ramp(model, 0.5))
    with pytest.raises(GateError, match="outside jit"):
        jax.jit(gj.settle)(gj.ramp(model, 1.0))
    with pytest.raises(GateError, match="no gate"):
        gj.settle(gpt(jnp.float32))
