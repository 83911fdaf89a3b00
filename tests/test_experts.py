"""Experts against a plain loop over tokens: routing, both bodies, auxiliary losses, cost and training."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import cost, testing
from growjax.axes import put
from growjax.errors import AxisError
from growjax.forecast.dryrun import dry_run
from growjax.gates import Gate
from growjax.models import GPTConfig, LlamaConfig
from growjax.nn import Experts
from growjax.plan.losses import objective
from growjax.train import Layout, cross_entropy
from tests.runs import SMALL, feed, losses, plan, steps


TOKENS, EMBED, MLP, COUNT = 5, 8, 6, 4
ACT = {"silu": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0)}


def experts(**options: Any) -> Experts:
    """A layer in float64 with every weight random."""
    options = {"per_token": 2, "glu": True, "activation": "silu", **options}
    with jax.enable_x64(True):
        layer = eqx.filter_eval_shape(
            lambda key: Experts(EMBED, MLP, COUNT, **options, key=key), jax.random.key(0)
        )
        return testing.randomise(layer)


def inputs(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, TOKENS, EMBED))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive(layer: Experts, x: np.ndarray) -> np.ndarray:
    """One token and one expert after the other."""
    w = jax.tree.map(np.asarray, layer)
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        logits = row @ w.router
        chosen = np.argsort(-logits, kind="stable")[: w.per_token]
        weights = softmax(logits[chosen]) if w.norm_topk_prob else softmax(logits)[chosen]
        for e, weight in zip(chosen, weights, strict=True):
            h = row @ w.up[e] + (0 if w.up_bias is None else w.up_bias[e])
            act = ACT[w.activation]
            h = act(h) if w.glu is None else act(row @ w.glu[e]) * h
            out[t] += weight * (h @ w.down[e] + (0 if w.down_bias is None else w.down_bias[e]))
        if w.shared is not None:
            s = w.shared
            h = row @ s.up + (0 if s.up_bias is None else s.up_bias)
            h = ACT[s.activation](row @ s.glu) * h
            out[t] += h @ s.down + (0 if s.down_bias is None else s.down_bias)
    return out


@eqx.filter_jit
def outputs_and_gradients(layer, x):
    def total(layer, x):
        y = jax.vmap(layer)(x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = eqx.filter_value_and_grad(total, has_aux=True)(layer, x)
    return y, gradient


CASES = {
    "SwiGLU": dict(bias=False),
    "SwiGLU with biases and shared experts": dict(shared=2),
    "plain": dict(glu=False, activation="relu"),
    "softmax first": dict(norm_topk_prob=False, bias=False),
    "one of them": dict(per_token=1, norm_topk_prob=False),
    "all of them": dict(per_token=COUNT),
}


@pytest.mark.parametrize("name", CASES)
def test_experts_compute_what_a_loop_over_tokens_does(name):
    layer, x = experts(**CASES[name]), inputs()
    expected = np.stack([naive(layer, row) for row in x])
    with jax.enable_x64(True):
        results = [
            outputs_and_gradients(put(layer, {("body",): body}), jnp.asarray(x))
            for body in ("dense", "ragged", "gathered", "auto")
        ]
    for y, gradient in results:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_no_token_is_dropped_where_all_choose_one_expert():
    layer, x = experts(per_token=1, bias=False), np.abs(inputs())
    router = np.zeros((EMBED, COUNT))
    router[:, 2] = 1
    with jax.enable_x64(True):
        layer = put(layer, {("router",): jnp.asarray(router)})
        assert np.all(np.asarray(jax.vmap(layer.route)(jnp.asarray(x)).chosen) == 2)
        for body in ("dense", "ragged"):
            y = jax.vmap(put(layer, {("body",): body}))(jnp.asarray(x))
            np.testing.assert_allclose(y, [naive(layer, r) for r in x], rtol=0, atol=1e-12)


def test_a_stack_of_models_runs_each_with_its_own_weights():
    x = inputs()
    with jax.enable_x64(True):
        layer = put(experts(bias=False), {("body",): "ragged"})
        both = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), eqx.filter(layer, eqx.is_array))
        run = jax.vmap(lambda w: jax.vmap(eqx.combine(w, layer))(jnp.asarray(x)))
        y = np.asarray(run(both))
    for i, scale in enumerate((1, 2)):
        scaled = jax.tree.map(lambda w: np.asarray(w) * scale, layer)  # noqa: B023
        np.testing.assert_allclose(y[i], [naive(scaled, r) for r in x], rtol=0, atol=1e-11)


def test_more_experts_a_token_than_experts_are_refused():
    with pytest.raises(AxisError, match="per_token: expected 1 to 4, the number of experts, got 5"):
        Experts(EMBED, MLP, 4, per_token=5, key=jax.random.key(0))


# Routing -------------------------------------------------------------------------------------


def test_the_router_computes_in_float32_under_bfloat16():
    layer = jax.tree.map(lambda w: w.astype(jnp.float32), experts())
    x = jnp.asarray(inputs()[0], jnp.bfloat16)
    y, auxiliary = layer.with_auxiliary(x)
    assert y.dtype == jnp.bfloat16 and auxiliary is not None and auxiliary.dtype == jnp.float32
    routes = layer.route(x)
    assert routes.weights.dtype == jnp.float32
    logits = np.asarray(x, np.float64) @ np.asarray(layer.router, np.float64)
    top = -np.sort(-logits, axis=-1)[:, :2]
    np.testing.assert_allclose(routes.weights, softmax(top), atol=1e-6)


def test_auxiliary_losses_are_those_of_switch_and_st_moe():
    layer, x = experts(aux_loss_coef=0.5, z_loss_coef=0.25), inputs()[0]
    logits = x @ np.asarray(layer.router)
    chosen = np.argsort(-logits, axis=-1)[:, :2]
    share = np.bincount(chosen.ravel(), minlength=COUNT) / chosen.size
    balance = COUNT * np.sum(share * softmax(logits).mean(0))
    z = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    with jax.enable_x64(True):
        _, auxiliary = layer.with_auxiliary(jnp.asarray(x))
        assert layer.with_auxiliary(jnp.asarray(x))[1] is not None
        silent = put(layer, {("aux_loss_coef",): 0.0, ("z_loss_coef",): 0.0})
        assert silent.with_auxiliary(jnp.asarray(x))[1] is None
    assert auxiliary is not None
    assert float(auxiliary) == pytest.approx(0.5 * balance + 0.25 * z, rel=1e-12)


def test_balanced_experts_have_a_balance_loss_of_one():
    layer = experts(aux_loss_coef=1.0, z_loss_coef=0.0, per_token=1)
    with jax.enable_x64(True):
        layer = put(layer, {("router",): jnp.asarray(1e-9 * np.eye(EMBED, COUNT))})
        auxiliary = layer.with_auxiliary(jnp.eye(COUNT, EMBED))[1]
    assert auxiliary is not None and float(auxiliary) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("order", [True, False], ids=["top-k first", "softmax first"])
@pytest.mark.parametrize("body", ["dense", "ragged"])
def test_experts_behind_a_closed_gate_change_nothing(order, body):
    """Whatever they hold: the output, its auxiliary loss, and every gradient of the old ones, bitwise."""
    small, x = experts(norm_topk_prob=order, body=body), jnp.asarray(inputs())
    with jax.enable_x64(True):
        x = jnp.asarray(inputs())

        def larger(fill: float) -> Experts:
            widened: Any = {
                (name,): jnp.concatenate(
                    [w, jnp.full((*w.shape[:axis], 3, *w.shape[axis + 1 :]), fill)], axis
                )
                for name, axis in dict(
                    router=1, up=0, glu=0, down=0, up_bias=0, down_bias=0
                ).items()
                for w in [getattr(small, name)]
            }
            new = jnp.arange(COUNT + 3) >= COUNT
            gate = Gate((~new).astype(float), new)
            return put(small, widened | {("expert_gate",): gate})

        @eqx.filter_jit
        def run(layer):
            y, auxiliary = jax.vmap(layer.with_auxiliary)(x)
            return y, auxiliary

        before, (after, poisoned) = run(small), map(run, map(larger, (1.0, 1000.0)))
        for a, b, c in zip(before, after, poisoned, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13)
            np.testing.assert_array_equal(b, c)
        # Half open, the weight of a new expert in the softmax is halved
        half = larger(1.0)
        half = put(half, {("expert_gate",): half.expert_gate.at(0.5)})  # type: ignore[union-attr]
        logits = np.asarray(x[0]) @ np.asarray(half.router)
        expected = softmax(logits + np.log([1] * COUNT + [0.5] * 3))
        everything = put(half, {("per_token",): COUNT + 3, ("norm_topk_prob",): True})
        routes = everything.route(x[0])
        spread = np.zeros_like(expected)
        np.put_along_axis(spread, np.asarray(routes.chosen), np.asarray(routes.weights), -1)
    np.testing.assert_allclose(spread, expected, rtol=1e-12)


# Models --------------------------------------------------------------------------------------


SIZES: dict[str, Any] = dict(layers=2, embed=16, heads=2, head_dim=8, vocab=31)
CONFIGS = {
    "GPT": (GPTConfig, dict(positions=16)),
    "Llama": (LlamaConfig, dict(kv_heads=1)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_chosen_experts_and_the_router(name):
    make, more = CONFIGS[name]
    tokens = jax.ShapeDtypeStruct((8,), jnp.int32)

    def model(**options):
        return eqx.filter_eval_shape(make(**SIZES, **more, **options).build, jax.random.key(0))

    counts = []
    for body in ("dense", "ragged", "gathered", "auto"):
        options: Any = dict(experts=8, experts_per_token=2, shared_experts=1, expert_body=body)
        counts.append(cost.flops(model(mlp=12, **options), tokens))
    router = 2 * 8 * 16 * 8 * 2  # two FLOPs x tokens x embed x experts x layers
    assert counts == [cost.flops(model(mlp=3 * 12), tokens) + router] * 4
    # Batched or not, and with more products in a GLU
    rows = jax.ShapeDtypeStruct((3, 8), jnp.int32)
    batched = cost.flops(lambda m, rows: jax.vmap(m)(rows), model(mlp=12, **options), rows)
    assert batched == 3 * counts[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_experts_generates_what_it_reads(name):
    make, more = CONFIGS[name]
    config = make(**SIZES, **more, mlp=12, experts=4, shared_experts=1)
    model = testing.randomise(eqx.filter_eval_shape(config.build, jax.random.key(0)))
    model = jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.full(x.shape, 1e-5), model)
    if name == "Llama":
        model = put(model, {("rotary", "freqs"): config.build(jax.random.key(0)).rotary.freqs})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, 6))
    whole, cache = model(tokens), model.cache(6)
    first, cache = model.extend(tokens[:4], cache, 0)
    second, _ = model.extend(tokens[4:], cache, 4)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=2e-5)


def test_options_of_experts_are_checked():
    with pytest.raises(AxisError) as caught:
        GPTConfig(**SIZES, mlp=8, positions=8, experts=2, experts_per_token=3, aux_loss_coef=-1.0)
    for line in ("experts_per_token: 3 cannot be chosen from 2 experts", "aux_loss_coef: "):
        assert line in str(caught.value)


# Training ------------------------------------------------------------------------------------


def mixture(**changes: Any) -> Any:
    return dataclasses.replace(SMALL, mlp=8, experts=4, **changes)


def test_training_adds_auxiliary_losses_and_evaluation_does_not():
    model = mixture(aux_loss_coef=0.5).build(jax.random.key(0))
    rows = {
        "tokens": jnp.asarray(np.random.default_rng(0).integers(0, 99, (3, 8))),
        "targets": jnp.asarray(np.random.default_rng(1).integers(0, 99, (3, 8))),
        "weights": jnp.asarray(np.random.default_rng(2).integers(0, 2, (3, 8)), jnp.float32),
    }
    by_row = jax.vmap(lambda row: cross_entropy(model, row))(rows)
    positions, weights, auxiliary = by_row  # type: ignore[misc]
    silent = put(model, {})
    for name in ("aux_loss_coef", "z_loss_coef"):
        silent = put(silent, {("blocks", "block", "mlp", name): 0.0})
    plain = jax.vmap(lambda row: cross_entropy(silent, row))(rows)
    assert len(plain) == 2 and auxiliary.shape == (3,) and bool(jnp.all(auxiliary > 0.5))
    np.testing.assert_allclose(positions, plain[0], rtol=1e-6)
    per_row, total = np.asarray(weights).sum(-1), np.asarray(weights).sum()
    expected = np.sum(np.asarray(positions * weights)) + np.sum(np.asarray(auxiliary) * per_row)
    np.testing.assert_allclose(objective(by_row, total), expected / total, rtol=1e-6)


def test_a_mixture_trains_alike_in_parts_and_by_replica(programs):
    def trained(**changes):
        of = plan(steps(3), model=mixture(aux_loss_coef=0.1), **changes)
        records = list(gj.train.train(of, feed(of), cache=programs, devices=jax.devices()[:1]))
        return list(losses(records).values())

    one = trained()
    assert one[-1] < one[0]
    assert trained(accumulate=2) == pytest.approx(one, abs=1e-5)
    assert trained(layout=Layout(step="shard_map")) == pytest.approx(one, abs=1e-5)


def test_a_plan_of_experts_costs_what_xla_counts():
    of = plan(
        steps(1, "dense"), steps(2, "mixture", grow=gj.upcycle(experts=4)), layout=Layout(experts=2)
    )
    forecast = dry_run(of, devices=2)
    assert forecast.refusals == () and forecast.mesh == dict(data=1, fsdp=1, tensor=1, experts=2)
    for stage in forecast.stages:
        assert stage.xla_ratio == pytest.approx(1, abs=0.02)


def test_layers_that_do_not_run_have_no_auxiliary_loss():
    model = mixture(aux_loss_coef=0.5).build(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)
    blocks = model.blocks
    whole = blocks.with_auxiliary(x, mask=gj.nn.causal())[1]

    def with_(**fields):
        changed = put(blocks, {(name,): value for name, value in fields.items()})
        return changed.with_auxiliary(x, mask=gj.nn.causal())[1]

    first = with_(active=jnp.asarray([True, False]))
    np.testing.assert_allclose(first, with_(gate=Gate(jnp.asarray([1.0, 0.0]), jnp.zeros(2, bool))))
    assert 0 < float(first) < float(whole)
    assert float(with_(active=jnp.asarray([False, False]))) == 0


class Halved(gj.nn.Block):
    """A block of one's own, written before there were auxiliary losses."""

    def __call__(self, x, *args, **kwargs):
        return 0.5 * super().__call__(x, *args, **kwargs)


def test_a_block_with_a_call_of_its_own_is_called():
    def make(key):
        block = gj.nn.make_block(16, 2, 8, 8, experts=4, key=key)
        return Halved(**{f.name: getattr(block, f.name) for f in dataclasses.fields(block)})

    with jax.enable_x64(True):
        blocks = gj.nn.Stacked(make, 1, key=jax.random.key(0))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)))
        y, auxiliary = blocks.with_auxiliary(x)
        one = jax.tree.map(lambda w: w[0] if eqx.is_array(w) else w, blocks.block)
        assert auxiliary is None and y.dtype == jnp.float64
        np.testing.assert_allclose(y, one(x), rtol=1e-12, atol=1e-12)
