"""More models of others: sizes in a configuration, norms and convolutions in groups, mixed sums."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax.annotation.packing import unpack
from growjax.annotation.traced import call
from growjax.axes import axes_of
from growjax.errors import AxisError, GrowthError
from tests import zoo, zoo_more
from tests.conftest import DEEP
from tests.test_inference import LAYERS, RESIDUAL, TOKENS, ZOO, Bare, roles


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


SOUND = zoo.normal((2, 3, 7))
GROUPED = "(groups channels)"
# The model, a batch, what a person would annotate, and an operator for it
MODELS = {
    "sizes in a configuration": (
        zoo_more.MinGPT,
        TOKENS,
        {"wte": "[vocab] -> embed", "wpe": "[wpe_rows] -> embed", "h.*.ln_?": "~embed"}
        | {"h.*.attn.qkv": "embed -> 3 head 4", "h.*.attn.proj": "head 4 -> embed"}
        | {"h.*.mlp": "embed -> mlp -> embed", "ln_f": "~embed", "head": "embed -> classes"},
        {"stacks": {"h": "layers"}, "residual": ["layers"]}
        | {"statics": {"h.*.attn.config.n_head": "head", "h.*.attn.config.n_embd": "4 head"}},
        gj.chain(gj.copy(head=3, mlp=33, embed=16), gj.stack(layers=3, branch="zero")),
    ),
    "norms of groups": (
        zoo_more.GroupNormed,
        SOUND,
        {"into.weight": f"-> {GROUPED} 3 1", "into.bias": f"-> {GROUPED} 1"}
        | {"blocks.*.norm.weight": "(groups ~channels)", "blocks.*.norm.bias": GROUPED}
        | {"blocks.*.one.weight": f"mlp <- {GROUPED} 3", "blocks.*.one.bias": "-> mlp 1"}
        | {"blocks.*.two.weight": f"{GROUPED} <- mlp 3", "blocks.*.two.bias": f"-> {GROUPED} 1"}
        | {"head.weight": f"classes <- {GROUPED}", "head.bias": "-> classes"},
        {"stacks": {"blocks": "layers"}, "residual": ["layers"], "stream": "channels"}
        | {"statics": {"blocks.*.norm.groups": "groups"}},
        gj.chain(
            gj.copy(groups=3, channels=4, mlp=8),
            gj.stack(layers=3, branch="zero", stream="channels"),
        ),
    ),
    "a group for each channel": (
        lambda: zoo_more.ResNeXt(6),
        SOUND,
        {"into": "3 -> channels", "blocks.*.one": "channels -> mlp", "blocks.*.groups": "mlp"}
        | {"blocks.*.two": "mlp -> channels", "head": "channels -> classes"},
        {"stacks": {"blocks": "layers"}, "residual": ["layers"], "stream": "channels"},
        gj.chain(
            gj.copy(channels=5, mlp=8),
            gj.stack(layers=3, branch="zero", stream="channels"),
        ),
    ),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_inferred_is_what_a_person_would_annotate_and_grows_exactly(name):
    make, batch, specs, options, op = MODELS[name]
    small = gj.infer(zoo.build(make), batch)
    by_hand = gj.annotate(zoo.build(make), specs, **options, example=batch)
    assert roles(axes_of(small)) == roles(axes_of(by_hand))
    assert dict(small.statics).items() >= options.get("statics", {}).items()
    assert (small.residual, small.stream) == (by_hand.residual, by_hand.stream)

    @eqx.filter_jit
    def outputs(model):
        return jax.vmap(model)(batch), jax.vmap(op(model))(batch)

    before, after = outputs(small)
    np.testing.assert_allclose(after, before, rtol=1e-11, atol=1e-11)


def test_a_shared_configuration_follows_in_every_block():
    small = gj.infer(zoo.build(zoo_more.MinGPT), TOKENS)
    big = eqx.filter_eval_shape(gj.copy(head=3), small).model
    assert {(b.attn.config.n_head, b.attn.config.n_embd) for b in big.h} == {(3, 12)}
    assert big.config == zoo_more.Config()  # that of the model itself is not read
    assert any(
        "4 in h.*.attn.qkv.weight" in note and "does not run" in note for note in small.notes
    )


def test_channels_of_a_group_norm_are_copied_evenly():
    small = gj.infer(zoo.build(zoo_more.GroupNormed), SOUND)
    with pytest.raises(GrowthError, match="copies are uneven"):
        gj.copy(channels=3)(small)
    big = eqx.filter_eval_shape(gj.copy(channels=4), small).model
    assert (big.blocks[0].norm.groups, big.blocks[0].norm.channels) == (2, 8)


def test_channels_that_a_convolution_reads_in_groups_do_not_grow():
    small = gj.infer(zoo.build(zoo_more.ResNeXt), SOUND)
    assert gj.sizes(small) == dict(channels=4, layers=2, classes=2)
    notes = [note for note in small.notes if "a convolution takes it in groups" in note]
    assert any(note.startswith("3 in blocks.*.groups.weight") for note in notes)
    op = gj.chain(gj.copy(channels=8), gj.stack(layers=4, branch="zero", stream="channels"))
    outputs = jax.jit(jax.vmap(lambda x: (small(x), op(small)(x))))(SOUND)
    np.testing.assert_allclose(*outputs, rtol=1e-11, atol=1e-11)


def running_statistics():
    model, state = eqx.nn.make_with_state(zoo.BatchNormed)(2)
    return gj.infer(zoo.filled(model), zoo.normal((2, 3, 7)), state=state)


@pytest.mark.parametrize("name", sorted({*ZOO, *MODELS, "batch norms"}))
def test_every_operator_that_fits_is_certified(name):
    """In the quick profile for two models: each takes some seconds."""
    if not DEEP and name not in ("gru", "norms of groups"):
        pytest.skip("certified in the deep profile")
    if name == "batch norms":
        small, batch = running_statistics(), zoo.normal((2, 3, 7))
    else:
        make, batch = {**ZOO, **MODELS}[name][:2]
        small = gj.infer(zoo.build(make), batch)
    # Without running statistics, which grow
    forward = lambda model, batch: jax.tree.leaves(call(unpack(model.tree), batch))[0]  # noqa: E731
    table, key = axes_of(small), jax.random.key(0)
    inner = [a for a in table.sizes if {"consumed", "produced"} <= table.roles(a)]
    double: dict[str, Any] = {axis: 2 * table.size(axis) for axis in inner}
    closed: dict[str, Any] = {a: n for a, n in double.items() if not table.normalised(a)}
    ops = [gj.copy(**double, shares="equal")]
    ops += [gj.zeros(**closed)] if closed else []
    layers: dict[str, Any] = dict.fromkeys(small.residual, 3)
    ops += [gj.stack(**layers, branch="zero", stream=small.stream)] if layers else []
    for op in ops:
        record = gj.certify(op, small, batch, key=key, forward=forward)
        if name == "mamba":  # exp(exp(1000)) is infinite, and 0 times infinity no zero
            poison = {fill: same for fill, same in record.poison.items() if fill != "1000"}
            record = dataclasses.replace(record, poison=poison)
        assert record.passed, f"{name}: {record}"


# A tied head ------------------------------------------------------------------------------------


SHARED = RESIDUAL | {"shared.pytree.0": "[vocab] -> embed", "positions": "[positions] -> embed"}


def test_a_norm_before_a_tied_head_has_to_take_the_share():
    """The axes alone do not show it, but `eqx.nn.Shared` does, and so does the program."""
    model = zoo.build(zoo.Tied)
    message = r"axis 'embed': the program sums over it \(dot_general near shared.pytree.0.weight\)"
    with pytest.raises(AxisError, match=message):
        gj.annotate(model, SHARED | {"norm": "~embed"}, **LAYERS, example=TOKENS)
    message = "shared: a Linear reads 'embed' through shared.pytree.0.weight, .* size, 8, in place"
    with pytest.raises(AxisError, match=message):
        gj.annotate(model, SHARED | {"norm": "~embed"}, **LAYERS)
    with pytest.raises(AxisError, match=message):
        gj.annotate(zoo.build(lambda: zoo.Tied(norm=False)), SHARED, **LAYERS)
    assert gj.annotate(model, SHARED | {"norm": "~embed"}, **LAYERS, gates=["embed"]).gates
    small = gj.annotate(model, SHARED | {"norm": "~embed ->"}, **LAYERS)
    outputs = jax.jit(jax.vmap(lambda x: (small(x), gj.copy(embed=16)(small)(x))))(TOKENS)
    np.testing.assert_allclose(*outputs, rtol=1e-11, atol=1e-11)


class Written(eqx.Module):
    """Blocks between a table and itself, or between a table and no head at all."""

    table: Array
    blocks: list[zoo.Block]
    norm: eqx.nn.LayerNorm
    tied: bool = eqx.field(static=True)

    def __init__(self, tied):
        self.table, self.tied = jnp.ones((11, 8)), tied
        self.blocks = [zoo.Block(8, key=zoo.KEY) for _ in range(2)]
        self.norm = eqx.nn.LayerNorm(8)

    def __call__(self, tokens):
        x = self.table[tokens]
        for block in self.blocks:
            x = block(x)
        x = jax.vmap(self.norm)(x)
        return x @ self.table.T if self.tied else x


def test_a_head_that_is_written_as_a_product_with_the_table_is_no_surprise():
    """Neither its spec nor its class shows it: only that nothing else reads the stream at the end."""
    blocks = {name: spec for name, spec in zoo.TOWER.items() if name.startswith("blocks")}
    specs = {"table": "[vocab] -> embed", **blocks}
    message = "'embed': no array after the blocks consumes it.*declare it '~embed ->'"
    for tied in (True, False):
        model = zoo.build(lambda tied=tied: Written(tied))
        with pytest.raises(AxisError, match=message):
            gj.annotate(model, specs | {"norm": "~embed"}, **LAYERS)
        assert gj.annotate(model, specs | {"norm": "~embed"}, **LAYERS, gates=["embed"]).gates
    model = zoo.build(lambda: Written(True))
    small = gj.annotate(model, specs | {"norm": "~embed ->"}, **LAYERS)
    outputs = jax.jit(jax.vmap(lambda x: (small(x), gj.copy(embed=16)(small)(x))))(TOKENS)
    np.testing.assert_allclose(*outputs, rtol=1e-11, atol=1e-11)
    headless = zoo.build(lambda: Written(False))
    assert gj.annotate(headless, specs | {"norm": "~embed"}, **LAYERS, example=TOKENS)
    small = gj.infer(headless, TOKENS)
    assert "    example=batch,\n" in str(small) and "embed" in gj.sizes(small)
    again = eval(str(small), {"gj": gj, "model": headless, "batch": TOKENS})
    assert again.specs == small.specs and again.residual == small.residual == ("layers",)


class Reader(eqx.Module):
    """An encoder whose stream is read by the blocks of a decoder alone."""

    tables: tuple[Array, Array]
    encoder: list[zoo.Block]
    decoder: list[tuple[eqx.nn.Linear]]
    head: eqx.nn.Linear

    def __init__(self):
        self.tables = jnp.ones((11, 8)), jnp.ones((11, 6))
        self.encoder = [zoo.Block(8, key=zoo.KEY) for _ in range(2)]
        self.decoder = [(eqx.nn.Linear(8, 6, key=zoo.KEY),) for _ in range(2)]
        self.head = eqx.nn.Linear(6, 3, key=zoo.KEY)

    def __call__(self, tokens):
        memory, x = (table[tokens] for table in self.tables)
        for block in self.encoder:
            memory = block(memory)
        for (block,) in self.decoder:
            x = x + jax.vmap(block)(memory)
        return jax.vmap(self.head)(x)


def test_a_stream_that_blocks_of_another_stack_read_needs_no_head():
    model = zoo.build(Reader)
    small = gj.infer(model, TOKENS)
    assert "example=batch" not in str(small) and list(gj.sizes(small).values()).count(8) == 1
    assert eval(str(small), {"gj": gj, "model": model}).specs == small.specs
    (axis,) = [axis for axis, size in gj.sizes(small).items() if size == 8]
    wider: dict[str, Any] = {axis: 16}
    outputs = jax.jit(jax.vmap(lambda x: (small(x), gj.copy(**wider)(small)(x))))(TOKENS)
    np.testing.assert_allclose(*outputs, rtol=1e-11, atol=1e-11)


def test_norms_that_are_not_declared_are_named_without_a_batch():
    fewer = {pattern: spec for pattern, spec in zoo.TOWER.items() if "norm" not in pattern}
    fewer |= {"blocks.*.norm.weight": "embed", "blocks.*.norm.bias": "embed"}
    message = r"blocks.0.norm: a LayerNorm averages over 'embed'.*'blocks.0.norm.weight': '~embed'"
    with pytest.raises(AxisError, match=message):
        gj.annotate(zoo.build(zoo.Tower), fewer, **LAYERS)
    bare, specs = zoo.build(lambda: Bare(layer=True)), {"up": "4 -> up", "down": "up -> 5"}
    with pytest.raises(AxisError, match="norm: a LayerNorm averages over 'up'"):
        gj.annotate(bare, specs, statics={"norm.shape": ("up",)})
    with pytest.raises(AxisError, match="norm: a LayerNorm without a gain .* as many as 'up'"):
        gj.annotate(bare, specs)
    assert gj.annotate(bare, specs, statics={"norm.shape": ("6",)})
    gj.annotate(bare, specs | {"norm.weight": "~up"}, statics={"norm.shape": ("up",)})
    gj.annotate(bare, {"up": "4 -> 6", "down": "6 -> 5"})


# Sums over an axis and over other entries ---------------------------------------------------------


class Diluted(eqx.Module):
    """A hidden axis that is divided by a sum in which other numbers stand beside its own."""

    up: eqx.nn.Linear
    scale: Array
    other: Array
    down: eqx.nn.Linear
    repeats: int = eqx.field(static=True)

    def __init__(self, repeats):
        self.up, self.down = (eqx.nn.Linear(a, b, key=zoo.KEY) for a, b in ((4, 6), (6, 5)))
        self.scale, self.other, self.repeats = jnp.ones(6), jnp.ones(2), repeats

    def __call__(self, x):
        h = jnp.tanh(self.up(x))
        both = jnp.concatenate([h, self.other]) ** 2
        rows = jnp.ones((self.repeats, 1)) * both
        mean = jnp.sum(rows.reshape(-1)) / h.size
        return self.down(self.scale * (h / mean))


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_mean_that_other_entries_dilute_fixes_its_axis(repeats):
    model, batch = zoo.build(lambda: Diluted(repeats)), zoo.normal((2, 4))
    small = gj.infer(model, batch)
    assert "up" not in gj.sizes(small)
    assert any("sums over it and over other entries at once" in note for note in small.notes)
    specs: dict[str, Any] = {"up": "4 -> up", "scale": "~up", "other": "2 ->", "down": "up -> 5"}
    with pytest.raises(AxisError, match="sums over it and over other entries at once"):
        gj.annotate(model, specs, example=batch)


class FusedNorm(eqx.Module):
    """One norm over two blocks of a hidden axis."""

    up: eqx.nn.Linear
    norm: eqx.nn.RMSNorm
    down: eqx.nn.Linear

    def __init__(self):
        self.up, self.down = (eqx.nn.Linear(a, b, key=zoo.KEY) for a, b in ((4, 6), (3, 5)))
        self.norm = eqx.nn.RMSNorm(6, use_bias=False)

    def __call__(self, x):
        gate, up = jnp.split(self.norm(self.up(x)), 2)
        return self.down(jax.nn.silu(gate) * up)


def test_a_norm_over_equal_blocks_of_an_axis_is_a_norm_over_the_axis():
    batch = zoo.normal((2, 4))
    small = gj.infer(zoo.build(FusedNorm), batch)
    (axis,) = [axis for axis, size in gj.sizes(small).items() if size == 3]
    specs = {pattern: declaration.spec for pattern, declaration in small.specs}
    assert specs["norm.weight"] == f"(2 ~{axis})" and specs["up.weight"] == f"-> (2 {axis}) 4"
    wider: dict[str, Any] = {axis: 6}
    outputs = jax.jit(jax.vmap(lambda x: (small(x), gj.copy(**wider)(small)(x))))(batch)
    np.testing.assert_allclose(*outputs, rtol=1e-11, atol=1e-11)


class Perceptron(eqx.Module):
    """One hidden layer between which and the head a function of the hidden units stands."""

    up: Array
    down: Array
    between: Any = eqx.field(static=True)

    def __init__(self, between):
        self.between = between
        self.up, self.down = zoo.normal((3, 4)), zoo.normal((4, 2))

    def __call__(self, x):
        return self.between(x @ self.up) @ self.down

    def noisily(self, x, key):
        return self.between(x @ self.up, key) @ self.down


BETWEEN = {
    "reduce_max": lambda h: (
        h - h.max()
    ),  # copies keep it, but the zeros of a new unit or its gate do not
    "reduce_min": lambda h: h / jnp.abs(h).min(),
    "its largest entries": lambda h: jnp.where(h >= jax.lax.top_k(h, 2)[0][-1], h, 0),
    "its order": lambda h: jnp.tanh(jnp.cumsum(h)),
}


@pytest.mark.parametrize("reason", BETWEEN)
def test_hidden_units_that_are_not_alone_in_what_reads_them_are_refused(reason):
    model, batch = Perceptron(BETWEEN[reason]), zoo.normal((2, 3))
    small = gj.infer(model, batch)
    assert list(gj.sizes(small).values()) == [
        2
    ] and f"4 in up, down does not grow: the program takes {reason}" in str(small)
    specs = {"up": "-> 3 hidden", "down": "hidden -> out"}
    with pytest.raises(AxisError, match=f"axis 'hidden' cannot grow: the program takes {reason}"):
        gj.annotate(model, specs, example=batch)


def noisy(h, key):
    return h * jax.random.normal(key, h.shape)


REPEATED = {
    "loop": (
        lambda h: jax.lax.fori_loop(0, h.size, lambda _, h: jnp.sin(h), h),
        "a loop of the program runs as often as its size",
    ),
    "scan": (
        lambda h: jax.lax.scan(lambda h, _: (jnp.sin(h), None), h, None, length=2 * h.size)[0],
        "a loop of the program runs as often as its size",
    ),
    "scan over it": (
        lambda h: h * jax.lax.scan(lambda c, x: (jnp.sin(c + x), None), jnp.zeros(()), h)[0],
        "a loop of the program runs as often as its size",
    ),
    "power": (lambda h: h**h.size, "a setting of integer_pow follows its size"),
    "choice": (
        lambda h: jax.lax.cond(jnp.asarray(h.size) > 5, jnp.sin, jnp.cos, h),
        "a constant that decides on cond follows its size",
    ),
    "key": (
        lambda h: h * jax.random.uniform(jax.random.key(h.size)),
        "a constant that decides on random numbers follows its size",
    ),
    "noise": (
        lambda h: noisy(h, jax.random.key(0)),
        "the program draws as many random numbers, by a key that is a constant",
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_what_a_program_does_as_often_as_an_axis_is_long_fixes_it(name):
    between, why = REPEATED[name]
    model, batch = Perceptron(between), zoo.normal((2, 3))
    small = gj.infer(model, batch)
    assert f"4 in up, down does not grow: {why}" in str(small)
    specs = {"up": "-> 3 hidden", "down": "hidden -> out"}
    with pytest.raises(AxisError, match=f"axis 'hidden' cannot grow: {why}"):
        gj.annotate(model, specs, example=batch)


def test_noise_by_a_key_that_is_an_input_fixes_no_axis():
    """Another draw of dropout is as good as this one: it is the function in distribution."""
    model, keys = Perceptron(noisy), jax.random.split(zoo.KEY, 2)
    small = gj.infer(
        model, (zoo.normal((2, 3)), keys), forward=lambda m, b: jax.vmap(m.noisily)(*b)
    )
    assert list(gj.sizes(small).values()) == [4, 2]


def test_a_block_of_size_0_is_no_block():
    empty = Perceptron(lambda h: jnp.tanh(jnp.concatenate([jnp.roll(h, 0), h[:0]])))
    small = gj.infer(empty, zoo.normal((2, 3)))
    assert {str(declared.spec) for _, declared in small.specs} == {"-> 3 up", "up -> down_out"}


def test_two_axes_that_one_projection_holds_are_one_note():
    """Halves of a fused projection fail for one reason: said once, with both sizes."""
    small = gj.infer(zoo.build(zoo_more.MinGPT), TOKENS)
    (note,) = [note for note in small.notes if "qkv" in note]
    assert note.startswith("4 in h.*.attn.qkv.weight, h.*.attn.qkv.bias, h.*.attn.proj.weight does")
