"""A small model on a walk under its own gradients, and the growths that optimizer state follows."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import growjax as gj


KEY = jax.random.key(0)
STEPS = 6


class Layers(eqx.Module):
    """Residual layers: an axis that is looked up, produced, consumed, elementwise and stacked."""

    table: Array = gj.param("[vocab] -> embed")
    up: Array = gj.param("layers: embed -> mlp")
    bias: Array = gj.param("layers: -> mlp")
    gain: Array = gj.param("layers: mlp")
    down: Array = gj.param("layers: mlp -> embed")
    head: Array = gj.param("embed -> out")
    gate: gj.Gate | None = gj.gate("layers: mlp")


SHAPES = {
    "table": (4, 3),
    "up": (2, 3, 4),
    "bias": (2, 4),
    "gain": (2, 4),
    "down": (2, 4, 3),
    "head": (3, 2),
}


def loss(model: Layers) -> Array:
    """Large, so that the small constants of optimizers are small next to its gradients."""
    x = model.table
    for layer in range(model.up.shape[0]):
        hidden = jnp.tanh(x @ model.up[layer] + model.bias[layer]) * model.gain[layer]
        x = x + hidden @ model.down[layer]
    y = x @ model.head
    return 1e4 * jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))


class Path(NamedTuple):
    """The models and gradients that an optimizer sees, step by step, and the model afterwards."""

    models: list[Layers]
    gradients: list[Layers]
    last: Layers


class Growth(NamedTuple):
    """An operator, the path of the grown model, and which of its entries are fresh."""

    op: Any
    path: Path
    fresh: dict[str, np.ndarray]
    # Whether nothing that has a history is copied
    adds: bool


OPERATORS = {
    "even copies": gj.copy(mlp=8),
    "uneven copies": gj.chain(gj.copy(mlp=7, shares="random"), gj.copy(embed=5, shares="random")),
    "zeros": gj.zeros(mlp=6, embed=4),
    "gates": gj.msg(mlp=6),
    "layers": gj.stack(layers=4),
}


@functools.cache
def path() -> Path:
    """A walk of the small model from a random start, under its own gradients."""
    rng = np.random.default_rng(0)
    walk = {
        name: rng.normal(size=shape) + 0.05 * np.cumsum(rng.normal(size=(STEPS + 1, *shape)), 0)
        for name, shape in SHAPES.items()
    }
    with jax.enable_x64(True):
        models = layers({name: jnp.asarray(x) for name, x in walk.items()})
        gradients = jax.jit(jax.vmap(jax.grad(loss)))(models)
    every = [jax.tree.map(lambda x, t=t: x[t], models) for t in range(STEPS + 1)]
    return Path(every[:-1], steps(gradients), every[-1])


@functools.cache
def growth(name: str) -> Growth:
    """The path of the model that the small one grows into."""
    op, small = OPERATORS[name], path()
    with jax.enable_x64(True):
        models = [op(model, key=KEY) for model in (*small.models, small.last)]
        if name in ("zeros", "gates"):
            # Before they were added, coordinates had neither gradients nor weights
            models[:-1] = [placed(name, model, models[0]) for model in small.models]
        if "copies" in name:
            # The same function: its gradients are what back-propagation says, not what a rule says
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
            gradients = steps(jax.jit(jax.vmap(jax.grad(loss)))(stacked))
        else:
            gradients = [placed(name, g, models[0]) for g in small.gradients]
    fresh = {field: np.zeros(np.shape(getattr(models[0], field)), bool) for field in SHAPES}
    if name in ("zeros", "gates"):
        for field, shape in SHAPES.items():
            fresh[field][...] = True
            fresh[field][tuple(map(slice, shape))] = False
    trained = [gj.partition(model)[0] for model in models]
    return Growth(op, Path(trained[:-1], gradients, trained[-1]), fresh, name in ("zeros", "gates"))


def layers(fields: dict[str, Any]) -> Layers:
    return Layers(*(fields[name] for name in SHAPES))


def steps(tree: Layers) -> list[Layers]:
    return [jax.tree.map(lambda x, t=t: x[t], tree) for t in range(STEPS)]


def placed(name: str, tree: Layers, like: Layers) -> Layers:
    """Gradients or weights: of layers for each of their copies, of fresh coordinates zero."""
    fields = {}
    for field, shape in SHAPES.items():
        old, new = np.asarray(getattr(tree, field)), np.zeros(np.shape(getattr(like, field)))
        if name == "layers":
            new = old[[0, 1, 0, 1]] if field in ("up", "bias", "gain", "down") else old
        else:
            new[tuple(map(slice, shape))] = old
        fields[field] = jnp.asarray(new)
    return layers(fields)
