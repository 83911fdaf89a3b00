"""Models that growjax did not write: lists of blocks, sizes kept twice, running statistics, gates."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import maps, testing
from growjax.axes import axes_of
from growjax.errors import AxisError, GateError, GrowthError
from growjax.maps import AxisMap
from growjax.models.protocol import kind_of
from growjax.optim.cells import cells
from tests import zoo


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


Linear = eqx.nn.Linear
X = zoo.normal((2, 5, 8))


def tower(blocks=None, **changes):
    model = zoo.build(zoo.Tower)
    specs = dict(zoo.TOWER)
    return gj.annotate(model, specs, **{"stacks": {"blocks": "layers"}, **changes})


# Lists of blocks ------------------------------------------------------------------------------


def test_a_list_of_blocks_is_an_axis_and_the_model_is_the_users_own():
    small = tower()
    assert gj.sizes(small) == dict(layers=3, mlp=6, embed=8, features=8, classes=3)
    assert type(small.model.blocks) is list and len(small.model.blocks) == 3
    mine = zoo.build(zoo.Tower)
    assert eqx.tree_equal(small.model, mine)
    np.testing.assert_array_equal(small(X[0]), mine(X[0]))


@pytest.mark.parametrize("order", ["top", "interleave"])
def test_depth_operators_copy_the_blocks_of_a_list(order):
    small = tower()
    big = gj.grow(gj.stack(layers=5, order=order), small)
    blocks, source = small.model.blocks, gj.growth.sources(order, 3, 5)
    assert len(big.model.blocks) == 5
    assert all(map(eqx.tree_equal, big.model.blocks, [blocks[i] for i in source]))


def test_new_blocks_with_closed_branches_keep_the_function():
    op = gj.chain(
        gj.stack(layers=6, order="insert", branch="zero"), gj.copy(mlp=9, shares="random")
    )
    testing.assert_contract(op, tower(example=X), X)


def test_what_is_ignored_is_as_long_as_its_list():
    small = tower(ignore=["*.norm.bias", "head.bias"])
    assert len(gj.grow(gj.stack(layers=5), small).model.blocks) == 5
    assert gj.partition(small)[0].tree.blocks.block.norm.bias is None


def test_a_sub_network_takes_a_path_through_a_list():
    small = tower()
    path = gj.random_path(2)(small, key=jax.random.key(0))
    assert len(path.model.blocks) == 2


def test_gradients_of_a_list_are_those_of_the_users_model():
    small = tower()
    trained, rest = gj.partition(small)
    loss = lambda model: jnp.sum(jnp.sin(model(X[0])))  # noqa: E731
    packed = jax.grad(lambda t: loss(eqx.combine(t, rest)))(trained)
    own = eqx.filter_grad(loss)(small.model)
    for a, b in zip(jax.tree.leaves(packed.model), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("up", Linear(8, 7, key=zoo.KEY), "block 2 has other fields or static values than block 0"),
        ("name", "other", "block 2 has other fields or static values than block 0"),
        ("activation", jax.nn.relu, "block 2 has .* at .activation, block 0"),
        ("scale", jnp.ones(3), r"block 2 has shape \(3,\) at .scale, block 0 shape \(2,\)"),
        ("scale", jnp.ones(2, "float32"), "block 2 has float32 at .scale, block 0 float64"),
        ("scale", 1.0, "block 2 has 1.0 at .scale"),
    ],
)
def test_blocks_that_differ_are_refused(field, value, message):
    model = zoo.build(lambda: zoo.Tower(3))
    for block in model.blocks:
        object.__setattr__(block, "scale", jnp.ones(2))
    object.__setattr__(model.blocks[2], field, value)
    with pytest.raises(AxisError, match=message):
        gj.annotate(model, {"*": "a"}, stacks={"blocks": "layers"})


@pytest.mark.parametrize(
    "stacks, message",
    [
        ({"bricks": "layers"}, "stacks pattern 'bricks' matches no list"),
        ({"blocks": "lay ers"}, "blocks: expected the name of an axis, got 'lay ers'"),
        ({"blocks.*.up": "layers"}, "matches no list"),
    ],
)
def test_stacks_that_are_none_are_refused(stacks, message):
    with pytest.raises(AxisError, match=message):
        tower(stacks=stacks)


# Sizes that are kept twice --------------------------------------------------------------------


def test_layers_keep_their_own_sizes_up_to_date():
    big = gj.grow(gj.copy(mlp=9, embed=16), tower()).model
    block = big.blocks[1]
    assert (block.up.in_features, block.up.out_features) == (16, 9)
    assert block.norm.shape == (16,)
    assert "in_features=16" in repr(block.up)


def test_a_static_field_may_be_a_product_or_a_tuple():
    model = zoo.Products(heads=2, width=3, embed=8)
    statics = {"inner": "heads width", "four": "4 embed", "shape": ("embed", "heads width")}
    small = gj.annotate(
        model,
        {"into": "embed -> (heads width)", "out": "(heads width) -> embed"},
        statics=statics | {"heads": "heads"},
    )
    big = eqx.filter_eval_shape(gj.copy(heads=4, embed=16), small).model
    assert (big.inner, big.four, big.shape, big.heads) == (12, 64, (16, 12), 4)


def test_static_fields_of_another_size_are_named():
    model = zoo.Products(heads=2, width=3, embed=8)
    with pytest.raises(AxisError) as caught:
        gj.annotate(
            model,
            {"into": "embed -> (heads width)", "out": "(heads width) -> embed"},
            statics={"heads": "heads", "four": "2 embed", "inner": "heads wdth"},
        )
    assert "four is 32, but '2 embed' makes 16" in str(caught.value)
    assert "inner: unknown axis wdth" in str(caught.value)
    with pytest.raises(AxisError) as caught:
        gj.annotate(
            model,
            {"into": "embed -> (heads width)", "out": "(heads width) -> embed"},
            statics={"heads": ("heads",), "shape": "embed"},
        )
    assert "heads: expected a tuple of numbers for ('heads',), got 2" in str(caught.value)
    assert "shape: expected a number for 'embed', got (" in str(caught.value)


# Ready specs of whole layers ------------------------------------------------------------------


class Held(eqx.Module):
    layer: Any


def conv(into, out):
    return eqx.nn.Conv2d(into, out, 3, key=zoo.KEY)


# The layer, its spec, and its sizes before and after
LAYERS = {
    "linear": (lambda a, b: eqx.nn.Linear(a, b, key=zoo.KEY), "a -> b", (2, 3), (4, 6)),
    "scalar": (lambda b: eqx.nn.Linear(2, b, use_bias=False, key=zoo.KEY), "a -> b", (3,), (6,)),
    "embedding": (lambda a, b: eqx.nn.Embedding(a, b, key=zoo.KEY), "[a] -> b", (2, 3), (4, 6)),
    "layer norm": (lambda a: eqx.nn.LayerNorm(a), "~a", (2,), (4,)),
    "bare norm": (
        lambda a: eqx.nn.LayerNorm(a, use_weight=False, use_bias=False),
        "~a",
        (2,),
        (4,),
    ),
    "rms norm": (lambda a: eqx.nn.RMSNorm(a), "~a ->", (2,), (4,)),
    "attention": (
        lambda a, heads, qk, vo: eqx.nn.MultiheadAttention(
            heads, a, qk_size=qk, vo_size=vo, use_key_bias=True, key=zoo.KEY
        ),
        "a -> heads qk vo",
        (4, 2, 3, 5),
        (8, 4, 6, 10),
    ),
    "conv": (conv, "a -> b", (2, 3), (4, 6)),
    "depthwise": (lambda a: eqx.nn.Conv1d(a, a, 3, groups=a, key=zoo.KEY), "a", (2,), (4,)),
    "gru": (lambda a, b: eqx.nn.GRUCell(a, b, key=zoo.KEY), "a -> b", (2, 3), (4, 6)),
    "lstm": (lambda a, b: eqx.nn.LSTMCell(a, b, key=zoo.KEY), "a -> b", (2, 3), (4, 6)),
    "mlp": (
        lambda a, b, c: eqx.nn.MLP(a, c, b, 2, key=zoo.KEY),
        "a -> b -> c",
        (2, 3, 5),
        (4, 6, 10),
    ),
    "batch norm": (lambda a: eqx.nn.BatchNorm(a, "batch", mode="batch"), "a", (2,), (4,)),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_grown_layer_is_one_that_was_made_with_the_new_sizes(name):
    make, spec, old, new = LAYERS[name]
    small, expected = (eqx.filter_eval_shape(lambda s=s: make(*s)) for s in (old, new))
    model = gj.annotate(Held(small), {"layer": spec})
    sizes = gj.sizes(model)
    free = [axis for axis, size in sizes.items() if not (name == "scalar" and axis == "a")]
    for axis in free:
        double = AxisMap(axis, np.arange(2 * sizes[axis]) % sizes[axis])
        model = eqx.filter_eval_shape(lambda m, d=double: maps.apply(d, m, None), model)
    grown = model.model.layer
    shapes, wanted = (
        [x.shape for x in jax.tree.leaves(m) if hasattr(x, "shape")] for m in (grown, expected)
    )
    assert shapes == wanted
    if name != "batch norm":  # its states are known by objects of their own
        held, made = (jax.tree.structure(m) for m in (grown, expected))
        assert held == made


@pytest.mark.parametrize(
    "layer, spec, message",
    [
        (
            eqx.nn.Linear(2, 3, key=zoo.KEY),
            "a",
            "'a' is no spec of a whole Linear: expected one like",
        ),
        (eqx.nn.Linear(2, 3, key=zoo.KEY), "a -> -", "cannot read '-'"),
        (eqx.nn.Embedding(2, 3, key=zoo.KEY), "a b -> c", "no spec of a whole Embedding"),
        (eqx.nn.PReLU(), "a", "PReLU is no array, and only these layers of eqx.nn"),
        (eqx.nn.LayerNorm(3), "a", "like '~embed'"),
        (eqx.nn.GRUCell(2, 3, key=zoo.KEY), "a -> b -> c", "no spec of a whole GRUCell"),
        (conv(2, 3), "a", "no spec of a whole Conv"),
        (LAYERS["mlp"][0](2, 3, 5), "a -> b", "no spec of a whole MLP"),
        (LAYERS["attention"][0](4, 2, 3, 5), "a -> b", "no spec of a whole MultiheadAttention"),
        (LAYERS["batch norm"][0](4), "a -> b", "no spec of a whole BatchNorm"),
    ],
)
def test_a_spec_that_does_not_fit_a_layer_is_refused(layer, spec, message):
    with pytest.raises(AxisError, match=message):
        gj.annotate(Held(layer), {"layer": spec})


# Norms without parameters ---------------------------------------------------------------------


def test_a_norm_without_parameters_is_declared_by_where_its_gain_would_be():
    norm = eqx.nn.LayerNorm(4, use_weight=False, use_bias=False)
    model = Held({"norm": norm, "up": jnp.ones((4, 3)), "down": jnp.ones((3, 4))})
    specs = {"layer.up": "a -> b", "layer.down": "b -> a"}
    for declared in ({"layer.norm": "~a"}, {"layer.norm.weight": "~a"}):
        small = gj.annotate(model, specs | declared)
        with pytest.raises(GrowthError, match="taken by layer.norm.weight would"):
            gj.copy(a=6)(small)
    assert axes_of(small).normalised("a")


class Scaled(eqx.Module):
    """A root mean square written by hand, with its epsilon as an array."""

    table: Array
    gain: Array
    eps: Array
    head: Array

    def __call__(self, token):
        x = self.table[token]
        return x / jnp.sqrt((x * x).mean() + self.eps) * self.gain @ self.head


def test_an_epsilon_is_a_buffer_that_follows_its_axis():
    table, gain, head = map(jnp.asarray, map(zoo.normal, ((5, 4), (4,), (4, 2))))
    model = Scaled(table, gain, jnp.asarray(0.1), head)
    specs = {"table": "[vocab] -> a", "gain": "~a", "eps": "<a>", "head": "a -> 2"}
    small = gj.annotate(model, specs)
    (eps,) = axes_of(small).of_kind("buffer")
    assert eps.path.endswith("eps")
    grown, x = gj.zeros(a=6)(small, key=zoo.KEY), jnp.arange(5)
    np.testing.assert_allclose(grown.model.eps, 0.1 * 4 / 6)
    outputs = [jax.vmap(m)(x) for m in (small, grown)]
    np.testing.assert_allclose(*outputs, rtol=1e-12, atol=1e-12)


def test_a_buffer_is_declared_by_its_field_and_printed_as_it_is_written():
    model = {"angles": jnp.arange(4.0), "bias": jnp.ones(4)}
    model |= {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    specs = {
        "up": "3 -> mlp",
        "down": "mlp -> 2",
        "angles": gj.buffer("mlp"),
        "bias": gj.param("-> mlp", init="ones"),
    }
    small = gj.annotate(model, specs)
    assert [slot.path for slot in axes_of(small).of_kind("buffer")] == ["angles"]
    assert gj.partition(small)[0].tree["angles"] is None
    grown = gj.grow(gj.zeros(mlp=6), small, key=zoo.KEY).model
    np.testing.assert_array_equal(grown["angles"], [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(grown["bias"], 1)
    again = eval(str(small), {"gj": gj, "model": model})
    assert again.specs == small.specs


@pytest.mark.parametrize(
    "given, message",
    [
        ({"up": 3}, r"pattern 'up': expected a spec .* or gj.buffer\(.*got 3"),
        ({"up": eqx.field(static=True)}, "pattern 'up': expected a spec"),
        ({"up": gj.stacked("layers")}, "pattern 'up': expected a spec"),
        ({"up": gj.gate("mlp")}, r"pattern 'up': a gate declares no array .*gates=\[...\]"),
        ({"up": gj.buffer("3 mlp", born="start")}, "pattern 'up': born: it names an attribute"),
        (["up"], r"specs: expected a dict of patterns, got \['up'\]"),
    ],
)
def test_what_declares_no_array_is_refused(given, message):
    with pytest.raises(AxisError, match=message) as error:
        gj.annotate({"up": zoo.normal((3, 4))}, given)
    assert len(str(error.value).splitlines()) == 2  # and no more of the same


def test_errors_name_arrays_as_the_user_does():
    """Not by where growjax packs them: `tree.blocks.block.down.weight`, nor in an optimizer's state."""
    small = gj.annotate(zoo.build(zoo.Tower), zoo.TOWER, stacks={"blocks": "layers"}, gates=["mlp"])
    assert {"into.weight", "blocks.0.down.weight", "gates[mlp]"} <= set(axes_of(small))
    assert set(axes_of([small])) == {f"0.{path}" for path in axes_of(small)}
    with pytest.raises(GrowthError, match=r"taken by blocks\.0\.norm\.weight would change"):
        gj.grow(gj.copy(embed=9), small)
    opened = gj.ramp(gj.grow(gj.msg(mlp=7), small, key=zoo.KEY), 0.5)
    with pytest.raises(GateError, match=r"gates\[mlp\]: level 0.5"):
        gj.settle(opened)
    tx, trained = optax.adam(0.1), gj.partition(small)[0]
    state = tx.init(trained)
    names = {cell.name for cell in cells(state, trained)}
    assert {"[0].count", "[0].mu.blocks.0.down.weight", "[0].nu.into.bias"} <= names


def test_two_arrays_of_one_path_are_refused():
    model = {"a.b": zoo.normal((3, 4)), "a": {"b": zoo.normal((3, 4))}}
    with pytest.raises(AxisError, match=r"two arrays have one path(.|\n)*- a\.b$"):
        gj.annotate(model, {"a.b": "3 -> mlp"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"statics": {"up": 3}}, "statics: up: expected a size such as .* got 3"),
        ({"statics": {"up": "mlp/2"}}, "statics: up: expected a size such as .* got 'mlp/2'"),
        ({"stacks": {"up": 3}}, "stacks: up: expected the name of an axis, got 3"),
        ({"stacks": ["up"]}, "stacks: expected a dict of patterns"),
        ({"statics": {3: "mlp"}}, "statics: expected a pattern, got 3"),
        ({"gates": None}, "gates: expected a list of names, got None"),
        ({"residual": [3]}, r"residual: expected a list of names, got \[3\]"),
        ({"stream": 3}, "stream: expected the name of an axis, got 3"),
        ({"example": np.ones(())}, r"the batch: expected arrays .* got the shapes \[\(\)\]"),
        ({"example": ()}, r"the batch: expected arrays .* got the shapes \[\]"),
    ],
)
def test_arguments_of_another_type_are_named(options, message):
    with pytest.raises(AxisError, match=message):
        gj.annotate(Linear(3, 4, use_bias=False, key=zoo.KEY), {"weight": "mlp <- 3"}, **options)
    with pytest.raises(
        AxisError, match="model: expected a module or a dict of arrays, got a NoneType"
    ):
        gj.annotate(None, {})


@pytest.mark.parametrize("name", ["ignore", "gates", "residual"])
def test_a_string_in_place_of_a_list_is_refused(name):
    given: dict[str, Any] = {name: "mlp"}
    with pytest.raises(AxisError, match=rf"{name}: expected a list, got 'mlp'; give \['mlp'\]"):
        gj.annotate({"up": zoo.normal((3, 4))}, {"up": "3 -> mlp"}, **given)


def test_the_average_of_a_model_with_nothing_but_parameters_gets_its_gates():
    """It is its own trained half, and was returned as one: without the gates that hide what is new."""
    model = {"up": zoo.normal((3, 4)), "down": zoo.normal((4, 2))}
    small = gj.annotate(model, {"up": "3 -> mlp", "down": "mlp -> 2"}, gates=["mlp"])
    grown = gj.grow(gj.msg(mlp=6), gj.State(small, average=small), key=zoo.KEY)
    assert eqx.tree_equal(grown.average, grown.model)
    optax.incremental_update(grown.model, grown.average, 0.1)


# Running statistics ---------------------------------------------------------------------------


def test_running_statistics_grow_with_the_model_and_its_list():
    model, state = eqx.nn.make_with_state(zoo.BatchNormed)(3)
    small = gj.annotate(model, zoo.BATCH_NORMED, stacks={"blocks": "layers"}, state=state)
    assert eqx.tree_equal(small.model, model) and eqx.tree_equal(small.state, state)

    def run(model, state, x):
        call = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return call(x, state)

    x = jnp.asarray(zoo.normal((4, 3, 5)))
    y, after = run(small, small.state, x)
    small = small.with_state(after)
    op = gj.chain(
        gj.copy(channels=6, hidden=9, shares="random"),
        gj.stack(layers=5, order="interleave", stream="channels"),
    )
    big = gj.grow(op, small)
    test = eqx.nn.inference_mode(small), eqx.nn.inference_mode(gj.grow(op.operators[0], small))
    outs = [run(m, m.state, x)[0] for m in test]
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-12)
    assert len(big.model.blocks) == 5
    z, last = run(big, big.state, x)  # fresh blocks have statistics of their own
    assert z.shape == y.shape
    assert len(jax.tree.leaves(last)) == len(jax.tree.leaves(big.state)) == 3 * 6
    assert big.with_state(last).tree.blocks.block.norm.batch_state_index.init[0].shape == (5, 9)
    trained, _ = gj.partition(big)
    assert trained.tree.blocks.block.norm.batch_state_index.init == (None, None)


def test_a_state_of_another_model_is_refused():
    model, state = eqx.nn.make_with_state(zoo.BatchNormed)(2)
    other, _ = eqx.nn.make_with_state(lambda: {"m": zoo.BatchNormed(2)})()
    with pytest.raises(AxisError, match="state: it has no entry for m.into_norm.batch_counter"):
        gj.annotate(other, {"m.*": "a"}, state=state)
    with pytest.raises(AxisError, match="no stateful layer"):
        gj.annotate(zoo.Block(), {"*": "a"}, state=state)


# Gates from outside ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [dict(mlp=9), dict(embed=11), dict(layers=4), dict(mlp=9, embed=11, layers=4)]
)
def test_plain_layers_grow_by_msg_behind_gates_from_outside(sizes):
    small = tower(gates=["mlp", "embed", "layers"], example=X)
    testing.assert_contract(gj.msg(**sizes), small, X)


def test_gates_from_outside_ramp_and_are_settled():
    small = tower(gates=["mlp", "embed", "layers"], example=X)
    big = gj.grow(gj.msg(mlp=9, embed=11, layers=4), small, key=jax.random.key(1))
    assert not np.allclose(gj.ramp(big, 0.5)(X[0]), small(X[0]))
    opened = gj.ramp(big, 1.0)
    settled = gj.settle(opened)
    np.testing.assert_allclose(settled(X[0]), opened(X[0]), rtol=1e-12)
    assert eqx.tree_equal(settled.model, eqx.tree_at(lambda b: b.gates, settled, {}).model)
    assert type(settled.model.blocks[0].norm) is eqx.nn.LayerNorm
    trained, rest = gj.partition(big)
    assert jax.tree.structure(trained) == jax.tree.structure(gj.partition(settled)[0])
    np.testing.assert_array_equal(eqx.combine(trained, rest)(X[0]), big(X[0]))


def test_a_model_of_shapes_is_read_through_its_gates():
    op = gj.msg(mlp=9, embed=11, layers=4)
    small = tower(gates=["mlp", "embed", "layers"], example=X)
    shapes = eqx.filter_eval_shape(lambda m: op(m, key=jax.random.key(1)), small)
    expected = eqx.filter_eval_shape(lambda m: gj.grow(op, m, key=jax.random.key(1)).model, small)
    assert eqx.tree_equal(shapes.model, expected)
    assert kind_of(shapes) == "causal"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(gates=["mpl"]), "unknown axis 'mpl'"),
        (dict(gates=["classes"]), "'classes': no array consumes it"),
        (dict(gates=["layers"], stream="mlp2"), "no array of the stack produces the stream 'mlp2'"),
    ],
)
def test_axes_that_cannot_be_gated_are_refused(changes, message):
    with pytest.raises(AxisError, match=message):
        tower(**changes)
