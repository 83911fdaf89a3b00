"""The models against forward passes written straight from the papers, in numpy and float64."""

import dataclasses
import functools
import math
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growjax.axes import axes_of, partition, put
from growjax.cost import flops
from growjax.errors import AxisError
from growjax.models import (
    BERT,
    GPT,
    T5,
    BERTConfig,
    GPTConfig,
    Llama,
    LlamaConfig,
    T5Config,
)
from growjax.nn import ACTIVATIONS, Block, Rotary, RotaryScaling


V = 11
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])
OTHERS = np.array([8, 9, 7, 9, 3, 2])
SIZES: dict[str, Any] = dict(embed=6, heads=4, head_dim=4, mlp=10, vocab=V)


def build(model, config) -> Any:
    """A model whose parameters, biases and norms too, are all moved off their initial values."""
    rng = np.random.default_rng(1)
    # The draws would be drowned, and compiling them takes most of a test's time.
    with mock.patch("jax.random.normal", lambda key, shape: jnp.zeros(shape)):
        made = eqx.filter_jit(lambda key: model(config, key=key))(jax.random.key(0))
    slots = [slot for slot in axes_of(made).of_kind("param") if slot.value is not None]
    noise = {s.steps: 0.4 * rng.normal(size=s.value.shape) for s in slots}
    return put(made, {s.steps: s.value + jnp.asarray(noise[s.steps]) for s in slots})


def arrays(tree) -> Any:
    return jax.tree.map(np.asarray, eqx.filter(tree, eqx.is_array))


def layers_of(stack):
    block = arrays(stack.block)
    depth = block.mlp.up.shape[0]
    return [jax.tree.map(lambda a, i=i: a[i], block) for i in range(depth)]


def close(ours, reference):
    assert ours.dtype == np.float64
    assert np.max(np.abs(ours - reference)) <= 1e-12 * np.max(np.abs(reference))


# The formulas ---------------------------------------------------------------------------------


def layer_norm(x, p, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * p.weight + p.bias


def rms_norm(x, p, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p.weight


def plus(x, bias):
    return x if bias is None else x + bias


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


ACTS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def turned(x, positions, theta):
    """RoPE as complex numbers: coordinates (2i, 2i + 1) turn by theta^(-2i / head_dim)."""
    angles = np.outer(positions, theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1]))
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def attend(p, x, memory, sees, scale, *, bias=None, turn=lambda x: x):
    """Head by head; query head j belongs to key/value head j // group."""
    out, (_, kv_heads, group, _) = 0, p.q.shape
    for head in range(kv_heads * group):
        j, g = divmod(head, group)
        part = lambda b, *index: None if b is None else b[index]  # noqa: E731
        q = turn(plus(x @ p.q[:, j, g], part(p.q_bias, j, g)))
        k = turn(plus(memory @ p.k[:, j], part(p.k_bias, j)))
        v = plus(memory @ p.v[:, j], part(p.v_bias, j))
        scores = q @ k.T * scale + (0 if bias is None else bias[head])
        out = out + softmax(np.where(sees, scores, -np.inf)) @ v @ p.o[j, g]
    return plus(out, p.o_bias)


def feed_forward(p, x, act):
    h = plus(x @ p.up, p.up_bias)
    h = ACTS[act](h) if p.glu is None else ACTS[act](x @ p.glu) * h
    return plus(h @ p.down, p.down_bias)


def causal(n):
    return np.arange(n)[:, None] >= np.arange(n)


def bucket(ahead, buckets, furthest, both_ways):
    """T5's bucket of one relative position, key minus query."""
    count, first = (buckets // 2, buckets // 2 * (ahead > 0)) if both_ways else (buckets, 0)
    distance, exact = abs(ahead) if both_ways else max(-ahead, 0), count // 2
    if distance < exact:
        return first + distance
    far = math.log(distance / exact) / math.log(furthest / exact) * (count - exact)
    return first + min(exact + int(far), count - 1)


# The models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("post_norm", [False, True])
def test_gpt(post_norm):
    with jax.enable_x64(True):
        config = GPTConfig(layers=3, positions=20, post_norm=post_norm, **SIZES)
        model, positions = build(GPT, config), np.array([4, 3, 7, 0, 1, 2, 11, 19, 6])
        ours = eqx.filter_jit(model)(TOKENS, positions=positions)
        p, sees = arrays(model), causal(len(TOKENS))
        x = p.embedding.table[TOKENS] + p.position.table[positions]
        for q in layers_of(model.blocks):
            if post_norm:
                x = layer_norm(x + attend(q.attention, x, x, sees, 0.5), q.attention_norm, 1e-5)
                x = layer_norm(x + feed_forward(q.mlp, x, "gelu_tanh"), q.mlp_norm, 1e-5)
            else:
                h = layer_norm(x, q.attention_norm, 1e-5)
                x = x + attend(q.attention, h, h, sees, 0.5)
                x = x + feed_forward(q.mlp, layer_norm(x, q.mlp_norm, 1e-5), "gelu_tanh")
        close(ours, layer_norm(x, p.norm, 1e-5) @ p.embedding.table.T)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    with jax.enable_x64(True):
        config = LlamaConfig(
            layers=3, kv_heads=2, theta=500.0, eps=1e-3, tied=tied, bias=tied, **SIZES
        )
        model, positions = build(Llama, config), np.array([4, 3, 7, 0, 1, 2, 11, 30, 6])
        ours = eqx.filter_jit(model)(TOKENS, positions=positions)
        p, sees = arrays(model), causal(len(TOKENS))
        assert p.blocks.block.attention.q.shape == (3, 6, 2, 2, 4)  # 2 groups of 2 queries
        x = p.embedding.table[TOKENS]
        for q in layers_of(model.blocks):
            h = rms_norm(x, q.attention_norm, 1e-3)
            turn = lambda h: turned(h, positions, 500.0)  # noqa: E731
            x = x + attend(q.attention, h, h, sees, 0.5, turn=turn)
            x = x + feed_forward(q.mlp, rms_norm(x, q.mlp_norm, 1e-3), "silu")
        head = p.embedding.table.T if tied else p.head
        close(ours, rms_norm(x, p.norm, 1e-3) @ head)


def test_rotary_frequencies_are_lowered_where_they_turn_too_slowly():
    plain = np.repeat(500.0 ** -(np.arange(0, 16, 2) / 16), 2)
    with jax.enable_x64(True):
        scaled = Rotary(16, 500.0, RotaryScaling(8.0, low=1.0, high=4.0, length=64)).freqs
        linear = Rotary(16, 500.0, RotaryScaling(8.0)).freqs
    for lowered, freq in zip(np.asarray(scaled), plain, strict=True):
        wave = 2 * np.pi / freq
        mix = (64 / wave - 1.0) / (4.0 - 1.0)
        between = (1 - mix) * freq / 8 + mix * freq
        expected = freq / 8 if wave > 64 / 1.0 else freq if wave < 64 / 4.0 else between
        assert abs(lowered - expected) <= 1e-15
    np.testing.assert_allclose(linear, plain / 8, rtol=1e-15)
    assert len(set((np.asarray(scaled) / plain).round(6))) == 3  # all, some and none of it
    for wrong in ((0.0,), (2.0, 4.0), (2.0, 1.0, 4.0, -1)):
        with pytest.raises(AxisError, match="(factor|length|high): expected a"):
            RotaryScaling(*wrong)  # pyright: ignore


@pytest.mark.parametrize("post_norm, first", [(True, True), (False, False), (False, True)])
def test_bert(post_norm, first):
    with jax.enable_x64(True):
        config = BERTConfig(
            layers=3,
            positions=20,
            post_norm=post_norm,
            embedding_norm=first and not post_norm,
            tied=post_norm,
            **SIZES,
        )
        model, types = build(BERT, config), np.array([0, 0, 1, 1, 1, 0, 1, 0, 0])
        mask = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1], bool)
        ours = eqx.filter_jit(model)(TOKENS, token_types=types, mask=mask)
        p, norm = arrays(model), lambda h, n: layer_norm(h, n, 1e-12)
        x = p.embedding.table[TOKENS] + p.token_type.table[types] + p.position.table[: len(TOKENS)]
        x = norm(x, p.embedding_norm) if first else x
        for q in layers_of(model.blocks):
            h = x if post_norm else norm(x, q.attention_norm)
            x = x + attend(q.attention, h, h, mask[None], 0.5)
            x = norm(x, q.attention_norm) if post_norm else x
            x = x + feed_forward(q.mlp, x if post_norm else norm(x, q.mlp_norm), "gelu")
            x = norm(x, q.mlp_norm) if post_norm else x
        x = x if post_norm else norm(x, p.norm)
        pooled = np.tanh(x[0] @ p.pooler.weight + p.pooler.bias)
        decoder = p.embedding.table.T if post_norm else p.mlm.decoder
        words = norm(ACTS["gelu"](x @ p.mlm.weight + p.mlm.bias), p.mlm.norm)
        close(ours.hidden, x)
        close(ours.pooled, pooled)
        close(ours.nsp_logits, pooled @ p.nsp + p.nsp_bias)
        close(ours.mlm_logits, words @ decoder + p.mlm.decoder_bias)


def test_padding_tokens_have_one_position_and_others_are_counted_from_behind_it():
    """As in RoBERTa, by the ids of tokens, whatever the mask; and a classifier reads the pooled token."""
    config = BERTConfig(
        **SIZES, layers=0, positions=11, padding=1, nsp_head=False, mlm_head=False, labels=3
    )
    with jax.enable_x64(True):
        model = build(BERT, config)
        p, ours = arrays(model), model(TOKENS)  # of which two are padding
        places = [2, 1, 3, 1, 4, 5, 6, 7, 8]
        x = p.embedding.table[TOKENS] + p.token_type.table[0] + p.position.table[places]
        close(ours.hidden, layer_norm(x, p.embedding_norm, 1e-12))
        close(ours.label_logits, np.asarray(ours.pooled) @ p.classifier + p.classifier_bias)
    with pytest.raises(AxisError, match="9 of them from place 0 on, but there is room for 8"):
        dataclasses.replace(config, positions=10).build(jax.random.key(0))(jnp.asarray(TOKENS))
    with pytest.raises(AxisError, match="those up to padding=1 are no real token's"):
        dataclasses.replace(config, positions=2)
    with pytest.raises(AxisError, match="labels: it reads the pooler, which is off"):
        dataclasses.replace(config, pooler=False)


T5_SIZES: dict[str, Any] = dict(
    encoder_layers=2, decoder_layers=3, buckets=8, max_distance=20, **SIZES
)


@pytest.mark.parametrize(
    "make, act, scaled",
    [
        (T5Config, "relu", True),
        (T5Config.v1_1, "gelu_tanh", False),
        (T5Config.ul2, "silu", False),
    ],
    ids=["v1_0", "v1_1", "ul2"],
)
def test_t5(make, act, scaled):
    with jax.enable_x64(True):
        config = make(**T5_SIZES)
        model, source = build(T5, config), np.arange(27) * 7 % V
        mask = np.arange(27) % 5 != 2
        ours = eqx.filter_jit(model)(source, OTHERS, encoder_mask=mask)
        p = arrays(model)

        def bias(table, n, both_ways):
            index = [[bucket(j - i, 8, 20, both_ways) for j in range(n)] for i in range(n)]
            return table.reshape(8, -1)[np.array(index)].transpose(2, 0, 1)

        def stack(x, blocks, bias, sees, memory):
            for q in layers_of(blocks):
                h = rms_norm(x, q.attention_norm, 1e-6)
                x = x + attend(q.attention, h, h, sees, 1.0, bias=bias)
                if memory is not None:
                    h = rms_norm(x, q.cross_norm, 1e-6)
                    x = x + attend(q.cross, h, memory, mask[None], 1.0)
                x = x + feed_forward(q.mlp, rms_norm(x, q.mlp_norm, 1e-6), act)
            return x

        x = p.embedding.table[source]
        x = stack(x, model.encoder, bias(p.encoder_bias.table, 27, True), mask[None], None)
        memory = rms_norm(x, p.encoder_norm, 1e-6)
        x, n = p.embedding.table[OTHERS], len(OTHERS)
        x = stack(x, model.decoder, bias(p.decoder_bias.table, n, False), causal(n), memory)
        x = rms_norm(x, p.decoder_norm, 1e-6)
        close(ours, x / math.sqrt(6) @ p.embedding.table.T if scaled else x @ p.head)


def test_t5_scale_and_tying_are_independent():
    def scaled(**choices):
        model = eqx.filter_eval_shape(T5, T5Config(**T5_SIZES, **choices), key=jax.random.key(0))
        return model.output_scale is not None, model.head is None

    assert scaled() == (True, True)
    assert scaled(scale_output=False) == (False, True)
    assert scaled(tied=False) == (False, False)
    assert scaled(tied=False, scale_output=True) == (True, False)


def test_bert_heads_can_be_off():
    config = BERTConfig(
        layers=1, positions=9, mlm_head=False, nsp_head=False, pooler=False, **SIZES
    )
    model = eqx.filter_eval_shape(BERT, config, key=jax.random.key(0))
    output = eqx.filter_eval_shape(model, TOKENS)
    assert output.hidden.shape == (9, 6)
    assert output.pooled is output.mlm_logits is output.nsp_logits is None


# What all of them promise ---------------------------------------------------------------------


CASES: dict[str, Any] = {
    "gpt": (GPT, GPTConfig(layers=2, positions=20, **SIZES)),
    "llama": (Llama, LlamaConfig(layers=2, kv_heads=2, **SIZES)),
    "bert": (BERT, BERTConfig(layers=2, positions=20, **SIZES)),
    "t5 encoder": (T5, T5Config(**T5_SIZES)),
    "t5 decoder": (T5, T5Config.v1_1(**T5_SIZES)),
}


@functools.cache
def built(name):
    return build(*CASES[name])


def run(name, model, tokens, mask=None):
    tokens, others = jnp.asarray(tokens), jnp.asarray(OTHERS)
    if name == "bert":
        return model(tokens, mask=mask).mlm_logits
    if name == "t5 encoder":
        return model(tokens, others, encoder_mask=mask)
    if name == "t5 decoder":
        return model(others, tokens, decoder_mask=mask)
    return model(tokens, mask=mask)


@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_seen(name):
    model = built(name)
    forward = eqx.filter_jit(lambda tokens, mask: run(name, model, tokens, mask))
    masks = {"left": np.arange(9) >= 3, "right": np.arange(9) < 6, "inside": np.arange(9) != 4}
    for where, real in masks.items():
        changed = np.where(real, TOKENS, (TOKENS + 1) % V)
        rows = slice(None) if name == "t5 encoder" else real
        same = [
            np.array_equal(forward(TOKENS, mask)[rows], forward(changed, mask)[rows])
            for mask in (real, np.ones(9, bool))
        ]
        # Without the mask padding is seen, unless causality hides it already.
        assert same == [True, where == "right" and name not in ("bert", "t5 encoder")]
    assert np.all(np.isfinite(forward(TOKENS, np.zeros(9, bool))))


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_positions_undo_padding_on_the_left(name):
    model = built(name)
    padded, positions = np.append([7, 7, 7], TOKENS), np.append([0, 0, 0], np.arange(9))
    ours = eqx.filter_jit(model)(padded, positions=positions, mask=np.arange(12) >= 3)[3:]
    np.testing.assert_allclose(ours, eqx.filter_jit(model)(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_compute(name):
    """Logits stay float32 and within 5% of the largest: 2 to 5 layers of 8-bit mantissas."""
    model, config = CASES[name]
    forward = eqx.filter_jit(lambda model: run(name, model, TOKENS))
    ours = forward(build(model, dataclasses.replace(config, dtype="bfloat16")))
    exact = forward(built(name))
    error = np.abs(ours - exact).max() / np.abs(exact).max()
    assert ours.dtype == np.float32
    assert 1e-4 < error < 0.05


def test_remat_changes_nothing():
    def outcome(remat):
        model = put(built("t5 encoder"), {("encoder", "remat"): remat, ("decoder", "remat"): remat})
        loss = lambda model: jnp.sum(run("t5 encoder", model, TOKENS) ** 2)  # noqa: E731
        value, slope = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)
        return jax.tree.leaves((value, slope))

    whole = outcome("everything")
    for remat in ("dots", "nothing"):
        for ours, reference in zip(outcome(remat), whole, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-4 * np.abs(whole[0]))


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "t5 encoder"])
def test_remat_keeps_less_and_computes_again(name):
    """Numbers that the forward scans keep for the backward pass, and what that costs in products."""
    stacks = ("encoder", "decoder") if name.startswith("t5") else ("blocks",)
    stored, paid = {}, {}
    for remat in ("nothing", "attention", "dots", "everything"):
        model = put(built(name), {(stack, "remat"): remat for stack in stacks})
        trained, rest = partition(model)
        loss = lambda t, rest=rest: jnp.sum(run(name, eqx.combine(t, rest), TOKENS) ** 2)  # noqa: E731
        program = jax.make_jaxpr(jax.grad(loss))(trained).jaxpr
        scans = [e for e in program.eqns if e.primitive.name == "scan"]
        stored[remat] = sum(
            math.prod(x.aval.shape) for e in scans if not e.params["reverse"] for x in e.outvars
        )
        paid[remat] = flops(jax.grad(loss), trained)
    assert stored["nothing"] < stored["attention"] < stored["dots"] < stored["everything"]
    assert paid["nothing"] > paid["attention"] > paid["dots"] > paid["everything"]


@pytest.mark.parametrize("name, stacks", [("gpt", 1), ("llama", 1), ("bert", 1), ("t5 encoder", 2)])
def test_depth_is_traced_once(name, stacks, monkeypatch):
    traced, call = [], Block.with_auxiliary
    monkeypatch.setattr(Block, "with_auxiliary", lambda *a, **k: traced.append(1) or call(*a, **k))
    model, config = CASES[name]

    def program(depth):
        depths = {f.name: depth for f in dataclasses.fields(config) if "layers" in f.name}
        deeper = dataclasses.replace(config, **depths)
        deep = eqx.filter_eval_shape(model, deeper, key=jax.random.key(0))
        traced.clear()
        jaxpr = eqx.filter_make_jaxpr(run)(name, deep, TOKENS)[0]
        return len(traced), len(jaxpr.eqns)

    assert program(24) == program(6)
    assert len(traced) == stacks


FAULTS: dict[Any, Any] = {
    GPTConfig: (
        dict(layers=-1, embed=-1, head_dim=3, kv_heads=3, positions=2.5, position="rotary")
        | dict(norm="batch", activation="swish", dtype="int8", eps=0.0, remat="some"),
        "layers embed positions norm activation eps dtype remat heads head_dim",
    ),
    LlamaConfig: (
        dict(layers=1, kv_heads=3, head_dim=5, theta=-1.0, dtype="bf17"),
        "theta dtype heads head_dim",
    ),
    BERTConfig: (
        dict(layers=1, positions=0, token_types=0, pooler=False),
        "positions token_types nsp_head",
    ),
    T5Config: (
        dict(encoder_layers=-1, decoder_layers=1, buckets=6, max_distance=3, activation="swish"),
        "encoder_layers activation buckets max_distance",
    ),
}


@pytest.mark.parametrize("config", FAULTS)
def test_a_wrong_config_is_told_everything(config):
    choices, complaints = FAULTS[config]
    listed = "".join(rf"\n  - {name}: .*" for name in complaints.split())
    with pytest.raises(AxisError, match=f"^{config.__name__} is not a model:{listed}$"):
        config(**SIZES | choices)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_gelu_and_its_derivatives_are_those_of_the_formula(dtype):
    """Under `shard_map` too, where JAX's own derivative of `erfc` is refused since JAX 0.11."""
    x = np.linspace(-6, 6, 49)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    with jax.enable_x64(True):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.PartitionSpec("data")

        def derivative(order):
            f = ACTIVATIONS["gelu"]
            for _ in range(order):
                f = jax.grad(f)
            whole = jax.shard_map(jax.vmap(f), mesh=mesh, in_specs=rows, out_specs=rows)
            return np.asarray(jax.jit(whole)(jnp.asarray(x, dtype)))

        derivatives = [derivative(order) for order in range(3)]
    expected = [x * cdf, cdf + x * density, (2 - x * x) * density]
    tolerance = 1e-14 if dtype == "float64" else 2e-6
    for one, other in zip(derivatives, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one, other, atol=tolerance)
