"""Blocks that zeros in the arrays that produce the stream turn into the identity, and all others."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import maps
from growjax.axes import axes_of
from growjax.errors import AxisError, GrowthError
from tests import zoo


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Block(eqx.Module):
    """A block of one hidden layer, whose program is `run(block, x)`."""

    norm: eqx.nn.LayerNorm
    up: Array
    down: Array
    scale: Array
    run: Callable = eqx.field(static=True)

    def __init__(self, run):
        self.norm, self.run = eqx.nn.LayerNorm(4), run
        self.up, self.down, self.scale = jnp.ones((4, 5)), jnp.ones((5, 4)), jnp.ones(4)

    def branch(self, x):
        return jnp.tanh(jax.vmap(self.norm)(x) @ self.up) @ self.down

    def __call__(self, x):
        return self.run(self, x)


def centred(x):
    """Over time, which is no axis of the model."""
    return x - 0.5 * x.mean(0)


def later(x, first):
    """`x` a step later; `first` stands in front."""
    return jnp.pad(x[:-1], ((1, 0), (0, 0)), constant_values=first)


def second(x, row):
    """`x` with another second row."""
    return jax.lax.dynamic_update_slice(x, row, (1, 0))


def recurrent(block, x):
    """The branch is a scan over time; its carry starts from zeros in every block."""

    def step(h, row):
        h = jnp.tanh(h + row @ block.up)
        return h, h @ block.down

    return jax.lax.scan(step, jnp.zeros(block.up.shape[1]), x)[1]


def last_state(block, x):
    """The stream is replaced by the states of a scan, which begins like those of other blocks."""

    def step(h, row):
        return jnp.tanh(0.5 * h + row * block.scale), h

    return jax.lax.scan(step, jnp.zeros(x.shape[1]), x)[1] + block.branch(x)


def old_states(block, x):
    """The stream is replaced by the states alone, so no expression of the branch is beside them."""

    def step(h, row):
        return jnp.tanh(0.5 * h + row), h

    return jax.lax.scan(step, jnp.zeros(x.shape[1]), x + block.branch(x))[1]


def exchanged(block, image):
    """Rows and columns of a square image change places."""
    return image.swapaxes(0, 1) + jnp.tanh(image @ block.up) @ block.down


CLOSED: dict[str, Callable] = {
    "residual": lambda b, x: x + b.branch(x),
    "difference": lambda b, x: x - b.branch(x),
    "layer scale": lambda b, x: x + b.scale * b.branch(x),
    "activated": lambda b, x: x + jax.nn.gelu(b.branch(x)) + jax.nn.relu(b.branch(x)),
    "one plus a factor": lambda b, x: x * 1.0 + b.branch(x) * x,
    "recurrent": lambda b, x: x + recurrent(b, x),
    "either branch": lambda b, x: jax.lax.cond(
        jnp.asarray(True), lambda: x + b.branch(x), lambda: x + 2 * b.branch(x)
    ),
    "later": lambda b, x: x + later(b.branch(x), 0),
    "same shape": lambda b, x: x.reshape(x.shape).astype(x.dtype) + b.branch(x),
}
OPEN: dict[str, Callable] = {
    "norm at the end": lambda b, x: jax.vmap(b.norm)(x + b.branch(x)),
    "centred at the end": lambda b, x: centred(x + b.branch(x)),
    "factor": lambda b, x: x * b.scale + b.branch(x),
    "bias": lambda b, x: x + b.scale + b.branch(x),
    "no residual branch": lambda b, x: b.branch(x),
    "doubled stream": lambda b, x: x + x + b.branch(x),
    "bent stream": lambda b, x: jnp.tanh(x + b.branch(x)),
    "activation of its own": lambda b, x: x + jnp.cos(b.branch(x)),
    "product": lambda b, x: x * b.branch(x),
    "negated": lambda b, x: b.branch(x) - x,
    "only sometimes": lambda b, x: jax.lax.cond(
        jnp.asarray(True), lambda: centred(x + b.branch(x)), lambda: x + b.branch(x)
    ),
    "chosen": lambda b, x: jnp.where(x > 0, x + b.branch(x), b.branch(x)),
    "turned": lambda b, x: x[::-1] + b.branch(x),
    "states of a scan": last_state,
    "states alone": old_states,
    "exchanged": exchanged,
    "padded with ones": lambda b, x: x + later(b.branch(x), 1),
    "zeros padded with ones": lambda b, x: x + later(jnp.zeros_like(x), 1) + b.branch(x),
}
# Without vmap, which writes slices by another operation
WRITTEN: dict[str, Callable] = {
    "branch": lambda b, x: x + second(b.branch(x), 2 * b.branch(x)[:1]),
    "over the stream": lambda b, x: second(x, jnp.ones_like(x[:1])) + b.branch(x),
    "stream into ones": lambda b, x: second(
        jnp.ones_like(x), 2 * x[1:2] + jnp.tanh(x[1:2] @ b.up) @ b.down
    ),
    "stream into zeros": lambda b, x: x + second(jnp.zeros_like(x), x[:1]) + b.branch(x),
}
SPECS = {
    "into": "features -> embed",
    "*.norm.*": "~embed",
    "*.up": "embed -> mlp",
    "*.down": "mlp -> embed",
    "*.scale": "embed",
    "head": "embed -> out",
}
KEY = jax.random.key(0)
X = zoo.normal((2, 3, 3))
IMAGES = zoo.normal((2, 3, 3, 3))


class Listed(eqx.Module):
    into: Array
    blocks: list[Block]
    head: Array

    def __init__(self, run):
        self.into, self.head = jnp.ones((3, 4)), jnp.ones((4, 2))
        self.blocks = [Block(run) for _ in range(2)]

    def __call__(self, x):
        x = x @ self.into
        for block in self.blocks:
            x = block(x)
        return x @ self.head


def repeated(n, x):
    """As long as a condition on another number holds."""
    step = lambda carry: (carry[0] + 1, jnp.tanh(carry[1]))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0] < n, step, (0, x))[1]


# What a model does after its blocks, by their number
ENDS: dict[str, Callable] = {
    "condition": repeated,
    "length": lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y), x),
    "direction": lambda n, x: jax.lax.cumsum(x, reverse=n % 2 == 0),
    "order": lambda n, x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x, reverse=n % 2 == 0)[1],
    "filled": lambda n, x: jnp.take(x, jnp.array([2, 7]), axis=0, mode="fill", fill_value=float(n)),
}


class Ending(Listed):
    end: Callable = eqx.field(static=True)

    def __init__(self, end):
        super().__init__(CLOSED["residual"])
        self.end = end

    def __call__(self, x):
        x = x @ self.into
        for block in self.blocks:
            x = block(x)
        return self.end(len(self.blocks), x) @ self.head


class Scanned(eqx.Module):
    into: Array
    block: Block
    head: Array

    def __init__(self, run):
        self.into, self.head = jnp.ones((3, 4)), jnp.ones((4, 2))
        self.block = eqx.filter_vmap(lambda _: Block(run))(jnp.arange(2))

    def __call__(self, x):
        arrays, static = eqx.partition(self.block, eqx.is_array)
        step = lambda x, layer: (eqx.combine(layer, static)(x), None)  # noqa: E731
        return jax.lax.scan(step, x @ self.into, arrays)[0] @ self.head


def annotated(kind: type, run: Callable, **options: Any) -> Any:
    model = zoo.build(lambda: kind(run))
    if issubclass(kind, Listed):
        return gj.annotate(model, SPECS, stacks={"blocks": "layers"}, **options)
    specs = {k.replace("*", "block", 1): v for k, v in SPECS.items()}
    specs = {k: f"layers: {v}" if k.startswith("block") else v for k, v in specs.items()}
    return gj.annotate(model, specs, **options)


DEEPER = gj.stack(layers=3, branch="zero")


def keeps_the_function(model, batch=X) -> bool:
    """Whether a third layer without producers of the stream changes the outputs, as a number."""
    move = gj.AxisMap("layers", [0, 1, 1], share=np.array([1.0, 1.0, 0.0]))
    run = jax.jit(jax.vmap(lambda x: (model(x), maps.apply(move, model, None)(x))))
    return bool(np.allclose(*run(batch), rtol=1e-12, atol=1e-12))


@pytest.mark.parametrize("kind", [Listed, Scanned])
@pytest.mark.parametrize("name", [*CLOSED, *OPEN])
def test_zeros_are_refused_wherever_they_would_change_the_function(kind, name):
    batch = IMAGES if name == "exchanged" else X
    model = annotated(kind, {**CLOSED, **OPEN}[name], example=batch)
    assert keeps_the_function(model, batch) == (name in CLOSED)
    if name in CLOSED:
        assert axes_of(model).closings["layers", "embed"] == ""
        assert gj.sizes(eqx.filter_eval_shape(DEEPER, model))["layers"] == 3
        return
    with pytest.raises(GrowthError, match="blocks of 'layers' are not the identity when their"):
        DEEPER(model)
    with pytest.raises(AxisError, match="gates: a block of 'layers' is not the identity"):
        annotated(kind, OPEN[name], example=batch, gates=["layers"])


@pytest.mark.parametrize("kind", [Listed, Scanned])
@pytest.mark.parametrize("name", WRITTEN)
def test_rows_that_a_block_writes_are_read(kind, name):
    first = {"example": X, "forward": lambda model, batch: model(batch[0])}
    model = annotated(kind, WRITTEN[name], **first)
    closed = name == "branch"
    assert keeps_the_function(model) == closed
    assert (axes_of(model).closings["layers", "embed"] == "") == closed


@pytest.mark.parametrize("name", ENDS)
def test_what_follows_the_number_of_blocks_is_seen(name):
    model = zoo.build(lambda: Ending(ENDS[name]))
    model = gj.annotate(model, SPECS, stacks={"blocks": "layers"}, example=X)
    assert not keeps_the_function(model)
    assert axes_of(model).closings["layers", "embed"]


class Divided(Scanned):
    """Every branch is divided by the number of layers, which zeros in it hide."""

    def __call__(self, x):
        arrays, static = eqx.partition(self.block, eqx.is_array)

        def step(x, layer):
            return x + eqx.combine(layer, static).branch(x) / len(self.block.up), None

        return jax.lax.scan(step, x @ self.into, arrays)[0] @ self.head


def test_branches_that_follow_the_number_of_layers_are_not_closed():
    model = annotated(Divided, CLOSED["residual"], example=X)
    assert not keeps_the_function(model)
    with pytest.raises(GrowthError, match="what a block does follows their number"):
        DEEPER(model)


class Fading(Listed):
    """Every branch counts half as much as the one before it, so only one more at the end changes none."""

    def __call__(self, x):
        x = x @ self.into
        for index, block in enumerate(self.blocks):
            x = x + 0.5**index * block.branch(x)
        return x @ self.head


def test_branches_that_follow_their_place_are_not_closed():
    model = annotated(Fading, CLOSED["residual"], example=X)
    assert keeps_the_function(model)
    with pytest.raises(GrowthError, match="what a block does follows its place in the list"):
        DEEPER(model)


class Drawn(Listed):
    """Every branch counts by a random number of its own."""

    def __call__(self, x, key=KEY):
        keys, x = jax.random.split(key, len(self.blocks)), x @ self.into
        for each, block in zip(keys, self.blocks, strict=True):
            x = x + jax.random.uniform(each) * block.branch(x)
        return x @ self.head


def test_branches_by_random_numbers_are_closed_only_if_their_key_is_an_input():
    """By a constant key, a block between others would get the number of the one behind it."""
    model = annotated(Drawn, CLOSED["residual"], example=X)
    with pytest.raises(GrowthError, match="or numbers in it follow how many there are"):
        DEEPER(model)
    keys = jax.random.split(KEY, len(X))
    model = annotated(Drawn, CLOSED["residual"], example=(X, keys))
    assert axes_of(model).closings["layers", "embed"] == ""


def test_what_stays_in_a_block_is_named():
    model = annotated(Listed, OPEN["factor"], example=X)
    with pytest.raises(GrowthError, match=r"zero: blocks\.\*\.scale does not act through"):
        DEEPER(model)
    model = annotated(Scanned, OPEN["centred at the end"], example=X)
    with pytest.raises(GrowthError, match="it ends in a norm, or has no residual branch"):
        DEEPER(model)


def test_what_was_neither_declared_nor_traced_is_refused():
    model = annotated(Listed, CLOSED["residual"])
    with pytest.raises(GrowthError, match=r"give gj.annotate an example=batch, or residual="):
        DEEPER(model)
    with pytest.raises(AxisError, match=r"gates: 'layers': only the program .* residual=\['layers"):
        annotated(Listed, CLOSED["residual"], gates=["layers"])
    with pytest.raises(GrowthError, match="no leaf .* none has out produced"):
        gj.stack(layers=3, branch="zero", stream="out")(model)


def test_a_declared_residual_stack_is_closed_and_a_batch_checks_it():
    model = annotated(Listed, CLOSED["residual"], residual=["layers"])
    assert gj.sizes(DEEPER(model))["layers"] == 3
    assert annotated(Listed, CLOSED["residual"], residual=["layers"], gates=["layers"]).gates
    with pytest.raises(AxisError, match="residual: a block of 'layers' is not the identity"):
        annotated(Listed, OPEN["factor"], residual=["layers"], example=X)
    with pytest.raises(AxisError, match="residual: expected the axis of a stack, got 'mlp'"):
        annotated(Listed, CLOSED["residual"], residual=["mlp"])
    with pytest.raises(AxisError, match=r"residual: expected a list, .*give \['layers'\]"):
        annotated(Listed, CLOSED["residual"], residual="layers")
    with pytest.raises(GrowthError, match="produce 'mlp' are zero"):  # its stream is another one
        gj.stack(layers=3, branch="zero", stream="mlp")(model)


def test_the_blocks_of_an_inferred_model_are_known_and_printed():
    for run, name in ((CLOSED["layer scale"], "closed"), (OPEN["factor"], "open")):
        model = zoo.build(lambda run=run: Listed(run))
        small = gj.infer(model, X)
        assert bool(axes_of(small).closings["layers", "embed"]) == (name == "open")
        assert any("branch='zero'" in note for note in small.notes) == (name == "open")
        printed = eval(str(small), {"gj": gj, "model": model})
        assert printed.residual == small.residual == (("layers",) if name == "closed" else ())
