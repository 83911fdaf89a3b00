"""The choices of a decoder: each with every operator in float64, and what they compute."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import testing
from growjax.axes import put
from growjax.errors import AxisError, PlanError
from growjax.models import DecoderConfig, Labels, LlamaConfig, Sight
from growjax.models.causal import Classifier
from growjax.nn import LongRotary, Mask, Rotary, RotaryScaling, YarnScaling, attend


LONG = LongRotary((1.0, 2.0), (3.0, 4.0), length=3, magnitude=1.5)
SIZES: dict[str, Any] = dict(
    layers=4, embed=8, heads=4, kv_heads=2, head_dim=4, mlp=6, vocab=11, remat="everything"
)
# Together they have every choice, and every two that meet in one part of the model
CHOICES: dict[str, dict[str, Any]] = {
    "gemma": dict(
        placement="both",
        plus_one=True,
        qk_norm="head",
        pattern=(Sight(window=2, theta=10.0), Sight(theta=100.0, scaling=RotaryScaling(2.0))),
        attention_cap=5.0,
        logit_cap=3.0,
        embed_scale=2.0,
        scale=0.7,
        tied=True,
    ),
    "olmo": dict(placement="after", qk_norm="width", bias=True),
    "neox": dict(
        norm="layer",
        parallel=True,
        turned=2,
        bias=True,
        o_bias=True,
        mlp_bias=True,
        glu=False,
        activation="gelu",
    ),
    "phi": dict(pattern=(Sight(window=3, scaling=LONG),)),
    "smol": dict(
        bias=True, pattern=(Sight(), Sight(window=2, rotary=False), Sight(rotary=False)), tied=True
    ),
    "olmoe": dict(experts=3, qk_norm="width", norm_topk_prob=False, z_loss_coef=0.0),
    "shared": dict(
        **dict(experts=3, shared_mlp=5, shared_gate=True, norm_topk_prob=False, z_loss_coef=0.0),
        head=Labels(3, padding=7),
    ),
    "mixed": dict(
        placement="both",
        plus_one=True,
        qk_norm="width",
        parallel=True,
        o_bias=True,
        turned=2,
        pattern=(Sight(scaling=YarnScaling(4.0, length=8, fast=2.0)),),
    ),
}
OPERATORS: dict[str, Any] = {
    "msg": gj.msg(embed=12, mlp=8, heads=8, kv_heads=4, layers=6, init="matched"),
    "msg head_dim": gj.msg(head_dim=6),
    "msg group": gj.msg(heads=6),
    "copy": gj.chain(gj.copy(embed=16, mlp=9, heads=8, shares="random"), gj.stack(layers=5)),
    "copy head_dim": gj.copy(head_dim=8, kv_heads=4),
    "zeros": gj.zeros(embed=12, mlp=9),
    "closed": gj.stack(layers=8, order="insert", branch="zero"),
    "regroup": gj.regroup(kv_heads=4),
    "experts": gj.experts(5),
    "upcycle": gj.upcycle(experts=4, granularity=2),
}


def configured(name: str) -> DecoderConfig:
    return DecoderConfig(**SIZES | CHOICES[name])


def built(name: str, dtype: Any = jnp.float64) -> Any:
    with jax.enable_x64(True):
        model = testing.randomise(configured(name).build(jax.random.key(0)))
        return jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, model)


TOKENS = jnp.asarray([[1, 2, 3, 4, 5], [7, 0, 10, 7, 7]])


def fitting(name: str, op: str) -> bool:
    """Whether an operator keeps the function of a model, as far as it says."""
    layer_norm = CHOICES[name].get("norm") == "layer"
    mixture = "experts" in CHOICES[name]
    return not (
        (op == "zeros" and layer_norm)
        or (op == "experts" and not mixture)
        or (op == "upcycle" and mixture)
    )


def pairs() -> list[Any]:
    """Every choice with every operator; in the quick profile every operator with two models."""
    quick = {"msg": ("gemma", "mixed"), "copy": ("olmo", "gemma"), "closed": ("gemma", "neox")}
    quick |= {"zeros": ("mixed", "shared"), "regroup": ("olmo",), "copy head_dim": ("smol",)}
    quick |= {"msg group": ("mixed",), "msg head_dim": ("phi",)}
    quick |= {"experts": ("olmoe",), "upcycle": ("phi",)}
    return [
        pytest.param(name, op, marks=() if name in quick[op] else pytest.mark.slow)
        for name in CHOICES
        for op in OPERATORS
        if fitting(name, op)
    ]


@pytest.mark.parametrize(("name", "op"), pairs())
def test_every_choice_keeps_its_function_under_every_operator(name: str, op: str):
    operator = OPERATORS[op]
    if op == "copy":
        operator = gj.growth.atoms(operator)[0]
    testing.assert_preserves(operator, built(name), TOKENS)


def test_closed_layers_end_in_a_gain_of_zero_and_keep_what_it_multiplies():
    with jax.enable_x64(True):
        model = built("gemma")
        big = gj.stack(layers=8, order="insert", branch="zero")(model)
    block = jax.tree.map(np.asarray, big.blocks.block)
    for after, last in (("attention_after", block.attention.o), ("mlp_after", block.mlp.down)):
        gain = 1 + getattr(block, after).weight
        assert not gain[1::2].any() and gain[::2].all()
        # With a norm behind them, zeros here would be divided by the root of epsilon at the first step
        assert np.array_equal(last[1::2], last[::2])


def test_factors_multiply_the_gain_where_it_is_one_more_than_the_weight():
    config = dataclasses.replace(configured("gemma"), layers=2, pattern=(Sight(),))
    path = "blocks.block.attention.k_norm.weight"
    with jax.enable_x64(True):
        model = testing.randomise(eqx.filter_eval_shape(config.build, jax.random.key(0)))
        model = jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.ones(x.shape), model)
        gain = 1 + np.asarray(model.blocks.block.attention.k_norm.weight, float)
        rows = ((1, 0), (0, 1), (2, 3))
        operators = (
            (gj.stack(layers=(0, 1, 1), scale={path: 0.5}), [*gain, gain[1] / 2]),
            (gj.growth.learned(depth={path: rows}), [*gain, 2 * gain[0] + 3 * gain[1]]),
            (gj.growth.context(4.0, length=8), gain * (0.1 * np.log(4.0) + 1) ** 2),
        )
        for op, expected in operators:
            weight = eqx.filter_jit(op)(model).blocks.block.attention.k_norm.weight
            np.testing.assert_allclose(1 + np.asarray(weight), expected, rtol=1e-5)


def test_layers_take_their_window_and_their_rotation_along():
    attention = gj.stack(layers=6, order="top")(built("smol", jnp.float32)).blocks.block.attention
    full = gj.nn.NO_WINDOW
    assert attention.window.tolist() == [full, 2, full, full, full, full]
    assert attention.turn.tolist() == [0, 1, 1, 0, 1, 0]


def test_yarn_makes_larger_what_is_turned_of_the_keys():
    part = dataclasses.replace(DecoderConfig(**SIZES), layers=1, turned=2)
    some = dataclasses.replace(DecoderConfig(**SIZES), pattern=(Sight(), Sight(rotary=False)))
    yarn = gj.growth.context(4.0, length=8)
    model = part.build(jax.random.key(0))
    ratio = yarn(model).blocks.block.attention.k / model.blocks.block.attention.k
    expected = [(0.1 * np.log(4.0) + 1) ** 2] * 2 + [1.0] * 2
    np.testing.assert_allclose(np.asarray(ratio)[0, 0, 0], expected, rtol=1e-5)
    with pytest.raises(AxisError, match="some layers have no positions"):
        yarn(eqx.filter_eval_shape(some.build, jax.random.key(0)))


def test_layers_that_grow_from_none_have_the_window_of_the_pattern():
    sizes: dict[str, Any] = SIZES | dict(layers=0)
    none = DecoderConfig(**sizes, pattern=(Sight(window=3),))
    model = testing.randomise(eqx.filter_eval_shape(none.build, jax.random.key(0)))
    model = jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.ones(x.shape, x.dtype), model)
    grown = eqx.filter_jit(gj.fresh(layers=2))(model, key=jax.random.key(1))
    assert grown.blocks.block.attention.window.tolist() == [3, 3]
    with pytest.raises(AxisError, match="pattern: expected at most one, .* got 2"):
        DecoderConfig(**sizes, pattern=(Sight(window=3), Sight()))


@pytest.mark.parametrize("name", ["gemma", "phi"])
def test_a_cache_gives_the_logits_of_the_whole_sequence(name: str):
    with jax.enable_x64(True):
        model, tokens = built(name), TOKENS[0]
        whole, cache = model(tokens[:3]), model.cache(5)
        first, cache = model.extend(tokens[:3], cache, 0)
        np.testing.assert_allclose(first, whole, atol=1e-12)
        if name == "gemma":  # LongRoPE turns keys in the cache by the frequencies of their time
            rest, _ = model.extend(tokens[3:], cache, 3)
            np.testing.assert_allclose(rest, model(tokens)[3:], atol=1e-12)


@pytest.mark.parametrize("name", ["gemma", "olmo", "mixed"])
def test_norms_stand_before_after_or_around_branches(name: str):
    """The stream is written out with the parts of the first block."""
    with jax.enable_x64(True):
        model = built(name)
        block = jax.tree.map(lambda x: x[0], model.blocks.block)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)))
        before = lambda norm, x: x if norm is None else norm(x)  # noqa: E731
        y = block.attention(before(block.attention_norm, x))
        y = x + block.attention_after(y)
        read = x if CHOICES[name].get("parallel") else y
        expected = y + block.mlp_after(block.mlp(before(block.mlp_norm, read)))
        np.testing.assert_allclose(block(x), expected, atol=1e-12)
        assert (block.attention_norm is None) == (name == "olmo")


def test_labels_are_scored_by_the_last_token_or_by_all():
    hidden = configured("olmo").build(jax.random.key(0))
    hidden = put(hidden, {("lm",): False, ("head",): None})
    rows = {}
    for labels in (Labels(3), Labels(3, padding=7), Labels(3, "token")):
        head = Classifier(8, labels, key=jax.random.key(1))
        rows[labels.of, labels.padding] = put(hidden, {("classifier",): head})
    weight = rows["token", None].classifier.weight
    for tokens in TOKENS:  # of which the second ends in two 7
        every = jax.nn.softmax(rows["token", None](tokens) + 0.0)
        scores = hidden(tokens) @ weight
        np.testing.assert_allclose(every, jax.nn.softmax(scores), rtol=1e-5)
        last = 2 if tokens[-1] == 7 else 4
        np.testing.assert_allclose(rows["sequence", 7](tokens), scores[last], rtol=1e-5)
        np.testing.assert_allclose(rows["sequence", None](tokens), scores[4], rtol=1e-5)
        mask = jnp.arange(5) < 4
        shown = (hidden(tokens, mask=mask) @ weight)[3]
        np.testing.assert_allclose(rows["sequence", None](tokens, mask=mask), shown, rtol=1e-5)
    for read in (hidden.predict, hidden.readout, rows["token", None].predict):
        with pytest.raises(
            PlanError, match="head: a decoder is trained and evaluated as a language"
        ):
            read({"tokens": TOKENS[0]})
    with pytest.raises(PlanError, match="its head of words"):
        hidden.extend(TOKENS[0], hidden.cache(5), 0)


def test_shared_experts_behind_a_gate():
    mixture = gj.nn.Experts(
        8, 6, 3, shared_mlp=5, shared_gate=True, glu=True, bias=False, key=jax.random.key(0)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
    gate = jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.float32)
    alone = put(mixture, {("shared",): None})(x)
    level = 1 / (1 + np.exp(-np.asarray(x @ gate)))
    assert mixture.shared is not None
    expected = alone + level[:, None] * mixture.shared(x)
    np.testing.assert_allclose(
        put(mixture, {("shared_gate",): gate})(x), expected, rtol=1e-5, atol=1e-6
    )
    faults: list[dict[str, Any]] = [{"shared_mlp": 1}, {"shared_gate": True}]
    for wrong in faults:
        with pytest.raises(AxisError, match=f"{next(iter(wrong))}: there are no experts"):
            DecoderConfig(**SIZES | wrong)


def test_a_cap_bends_scores_alike_in_both_bodies_and_in_their_gradients():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=s)) for s in ((1, 2, 9, 4), (1, 9, 4), (1, 9, 4)))

        def run(q, k, body):
            return (attend(q, k, v, Mask(causal=True, window=4), cap=0.5, body=body) ** 2).sum()

        (one, both), (other, tiles) = (
            jax.value_and_grad(run, (0, 1))(q, k, body) for body in ("einsum", "blockwise")
        )
        np.testing.assert_allclose(one, other, rtol=1e-12)
        for a, b in zip(both, tiles, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
        scores = 0.5 * jnp.tanh(jnp.einsum("gtd,sd->gts", q[0], k[0]) / 0.5)
        seen = np.tril(np.ones((9, 9), bool)) & ~np.tril(np.ones((9, 9), bool), -4)
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
        np.testing.assert_allclose(one, ((weights @ v[0]) ** 2).sum(), rtol=1e-12)


def test_positions_turn_a_part_of_a_head_and_factors_leave_the_rest():
    scaling = YarnScaling(4.0, length=8, fast=2.0, slow=1.0)
    cos, sin = Rotary(8, 100.0, scaling, 4)(jnp.arange(4))
    size = 0.1 * np.log(4.0) + 1
    assert np.array_equal(cos[:, 4:], np.ones((4, 4))) and not sin[:, 4:].any()
    np.testing.assert_allclose(cos[0, :4], size, rtol=1e-6)
    # The first pair turns 1.3 times in 8 places, between `fast` and `slow`; the second 0.13 times
    ramp = np.clip((np.arange(2) - 0.0) / 1.0, 0, 1)
    freqs = np.asarray([1.0, 0.1]) * (1 - ramp + ramp / 4)
    np.testing.assert_allclose(sin[1, [0, 2]], size * np.sin(freqs), rtol=1e-6)


def test_long_sequences_have_frequencies_of_their_own():
    rotary = Rotary(4, 100.0, LONG)
    short, long = rotary(jnp.arange(3))[1], rotary(jnp.arange(4))[1]
    np.testing.assert_allclose(short[1, [0, 2]], 1.5 * np.sin([1.0, 0.1 / 2.0]), rtol=1e-6)
    np.testing.assert_allclose(long[1, [0, 2]], 1.5 * np.sin([1 / 3.0, 0.1 / 4.0]), rtol=1e-6)


def test_choices_that_do_not_fit_are_listed():
    wrong: dict[str, Any] = dict(turned=3, pattern=(Sight(),) * 5)
    with pytest.raises(AxisError) as caught:
        DecoderConfig(**SIZES | wrong)
    for message in ("pattern: expected at most 4", "turned: expected an even number"):
        assert message in str(caught.value)
    with pytest.raises(AxisError, match="a divisor for each of the 1 pairs"):
        DecoderConfig(**{**SIZES, "turned": 2, "pattern": (Sight(scaling=LONG),)})
    with pytest.raises(AxisError, match="expected equally many, got 1 and 2"):
        LongRotary((1.0,), (1.0, 2.0), length=8)


def test_a_llama_is_a_decoder_with_its_own_name():
    sizes = {k: v for k, v in SIZES.items() if k != "remat"}
    llama = LlamaConfig(**sizes, theta=50.0, bias=True, qk_norm=True)
    one, other = (c.build(jax.random.key(0)) for c in (llama, llama.decoder()))
    assert type(one) is gj.models.Llama and type(other) is gj.models.Decoder
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(a, b)
