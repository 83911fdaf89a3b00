"""Values as a user writes them, in a module of their own: `test_values.py` saves and reads them.

Some have the bare names of growjax's own classes, on purpose.
"""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import growjax as gj
from growjax import models
from growjax.budget import Clock
from growjax.data import Document
from growjax.nn import Stacked
from growjax.plan.schedule import Rate
from growjax.select import Selector
from growjax.train import Stage
from tests.runs import plan, steps


def twos(key, shape, dtype):
    """An `init=` with a name that an import leads to."""
    return jnp.full(shape, 2, dtype)


class Stack(gj.Operator):
    """Every layer `factor` times, in place; named like growjax's own."""

    factor: int = eqx.field(static=True)
    exactness = "approximate"

    def maps(self, axes):
        return [gj.AxisMap("layers", np.repeat(np.arange(axes.size("layers")), self.factor))]


class EveryOther(gj.Subnet):
    """Every other layer."""

    def maps(self, axes, key, step):
        return [gj.AxisMap("layers", np.arange(0, axes.size("layers"), 2))]


@dataclasses.dataclass(frozen=True)
class Causal:
    """Predict the token before, in reverse order: named like growjax's own, and not the same."""

    length: int
    lookahead = 1
    sentinels = 0
    needs = ()

    @property
    def raw_length(self):
        return self.length

    def __call__(self, window, vocabulary, rng):
        tokens = window.tokens[::-1].copy()
        weights = np.ones(self.length, np.float32)
        return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights}


@dataclasses.dataclass(frozen=True)
class Rows(Clock):
    """Charges sequences, whatever is done with them."""

    unit = "sequences"

    def cost(self, op):
        return op.rows

    @property
    def identity(self):
        return "rows"


@dataclasses.dataclass(frozen=True)
class Counting:
    """Documents of numbers: a source that needs no file."""

    documents_of: int = 40

    def documents(self):
        for n in range(self.documents_of):
            yield Document(f"{n}", " ".join(str(i * (n + 3)) for i in range(300)))

    def fingerprint(self):
        return f"counting {self.documents_of}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Neither registered nor an extension of anything."""

    name: str = "mine"


class Hardest(Selector):
    """The examples with the largest losses."""

    offers: int = eqx.field(static=True, default=2)
    compares: ClassVar[bool] = False

    def choose(self, losses, reference, keep, *, key):
        return jnp.sort(jnp.argsort(-losses)[:keep])


@dataclasses.dataclass(frozen=True)
class Steps(Rate):
    """Down by half at each of some shares of the budget."""

    peak: float
    at_shares: tuple[float, ...] = (0.5,)
    warmup: float = 0.0

    def at(self, done):
        return self.peak * 0.5 ** sum(done >= share for share in self.at_shares)


# Models --------------------------------------------------------------------------------------------


class Block(eqx.Module):
    """What stood before a token, on average, through two matrices; `msg` grows it by its gate."""

    up: jax.Array = gj.param("embed -> hidden")
    down: jax.Array = gj.param("hidden -> embed")
    gate: gj.Gate | None = gj.gate("hidden")

    def __call__(self, x, branch=None):
        before = jnp.cumsum(x, 0) / jnp.arange(1, len(x) + 1)[:, None]
        y = jnp.tanh(gj.gated(before @ self.up, self.gate)) @ self.down
        return x + (y if branch is None else y * branch)


class Mixer(eqx.Module):
    """A decoder without attention: called with tokens, and with nothing else."""

    blocks: Stacked[Block]
    words: jax.Array = gj.param("[vocab] -> embed")
    head: jax.Array = gj.param("embed -> vocab")

    def __call__(self, tokens):
        return self.blocks(self.words[tokens]) @ self.head


class Narrow(Mixer):
    """Gives logits of fewer words than a tokenizer of bytes has."""

    def __call__(self, tokens):
        return super().__call__(tokens)[:, :7]


class Whole(Mixer):
    """Gives whole numbers in place of logits."""

    def __call__(self, tokens):
        return jnp.round(super().__call__(tokens)).astype(jnp.int32)


class Short(eqx.Module):
    """A table of fewer pieces than a tokenizer of bytes has words, and logits of all."""

    hashed: bool = eqx.field(static=True)
    table: jax.Array = gj.param("[pieces] -> embed")
    head: jax.Array = gj.param("embed -> out")

    def __call__(self, tokens):
        pieces = len(self.table)
        return (
            jax.vmap(lambda i: self.table[i])(tokens % pieces if self.hashed else tokens)
            @ self.head
        )


def short(pieces, hashed=False, *, key):
    """A factory of a model whose words have an axis of another name."""
    return Short(hashed, jax.random.normal(key, (pieces, 4)), jnp.ones((4, 384)))


def narrow(layers, width, *, key):
    """A factory of a model of too few words."""
    model = mixer(layers, width, key=key)
    return Narrow(model.blocks, model.words, model.head)


def whole(layers, width, *, key):
    """A factory of a model without logits."""
    model = mixer(layers, width, key=key)
    return Whole(model.blocks, model.words, model.head)


def mixer(layers, width, *, key):
    """A factory of declared modules."""
    first, second, third = jax.random.split(key, 3)

    def block(key):
        one, two = jax.random.split(key)
        up, down = (0.3 * jax.random.normal(k, (width, width)) for k in (one, two))
        return Block(up, down, None)

    words = 0.3 * jax.random.normal(first, (384, width))
    head = 0.3 * jax.random.normal(second, (width, 384))
    return Mixer(Stacked(block, layers, remat="everything", key=third), words, head)


class Linears(eqx.Module):
    """Somebody's plain Equinox model, which knows nothing of axes."""

    words: eqx.nn.Embedding
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __call__(self, tokens):
        x = jax.vmap(self.words)(tokens)
        x = jnp.cumsum(x, 0) / jnp.arange(1, len(x) + 1)[:, None]
        return jax.vmap(lambda row: self.down(jnp.tanh(self.up(row))))(x)


LINEARS = {
    "words.weight": "[vocab] embed <-",
    "up.weight": "hidden <- embed",
    "up.bias": "-> hidden",
    "down.weight": "vocab <- hidden",
    "down.bias": "-> vocab",
}


def linears(width, hidden, *, key):
    """A factory of an annotated model."""
    one, two, three = jax.random.split(key, 3)
    model = Linears(
        eqx.nn.Embedding(384, width, key=one),
        eqx.nn.Linear(width, hidden, key=two),
        eqx.nn.Linear(hidden, 384, key=three),
    )
    statics = {"up.out_features": "hidden", "down.in_features": "hidden"}
    return gj.annotate(model, LINEARS, statics=statics)


def parameters(width, hidden, *, key):
    """A factory of a plain dict of arrays, as Flax and Haiku have them."""
    one, two, three = jax.random.split(key, 3)
    tree = {
        "words": {"table": jax.random.normal(one, (384, width))},
        "mlp": {
            "up": 0.3 * jax.random.normal(two, (width, hidden)),
            "down": 0.3 * jax.random.normal(three, (hidden, 384)),
        },
    }
    mlp = {"mlp.up": "embed -> hidden", "mlp.down": "hidden -> vocab"}
    return gj.annotate(tree, {"words.table": "[vocab] -> embed", **mlp})


def bare(*, key):
    """A factory that forgets to say what the axes are."""
    return linears(8, 16, key=key).model


def apply(tree, tokens):
    """The logits of `parameters`."""
    x = tree["words"]["table"][tokens]
    x = jnp.cumsum(x, 0) / jnp.arange(1, len(x) + 1)[:, None]
    return jnp.tanh(x @ tree["mlp"]["up"]) @ tree["mlp"]["down"]


def apply_loss(model, example):
    """A loss of one's own for a model that cannot be called: cross-entropy with a little smoothing."""
    logs = jax.nn.log_softmax(apply(model.model, example["tokens"]))
    chosen = jnp.take_along_axis(logs, example["targets"][:, None], axis=-1)[:, 0]
    return -0.95 * chosen - 0.05 * logs.mean(-1), example["weights"]


# Plans ---------------------------------------------------------------------------------------------


def mixed(**changes):
    """Every kind of stage: gates that open, layers on top, and paths through them."""
    return plan(
        steps(2, "small"),
        steps(4, "wide", grow=gj.msg(hidden=24), ramp=2),
        Stage("deep", grow=gj.stack(layers=4), subnet=gj.path_schedule((3, 4), layers=4, steps=4)),
        **{"model": models.Model("tests.own:mixer", {"layers": 2, "width": 16}), **changes},
    )


def annotated(**changes):
    return plan(
        steps(2, "small"),
        steps(4, "wide", grow=gj.copy(hidden=24, shares="random")),
        **{"model": models.Model(linears, {"width": 8, "hidden": 16}), **changes},
    )


def mapping(**changes):
    return plan(
        steps(2, "small"),
        steps(4, "wide", grow=gj.zeros(hidden=24)),
        **{
            "model": models.Model("tests.own:parameters", {"width": 8, "hidden": 16}),
            "loss": apply_loss,
            **changes,
        },
    )


def everything(**changes):
    """A plan in which next to nothing is growjax's own."""
    return plan(
        steps(6, "reversed", objective=Causal(8)),
        steps(3, "chosen", grow=Stack(2), select=Hardest()),
        steps(3, "half", subnet=EveryOther(), grow=gj.msg(hidden=24, init=twos), ramp=2),
        **{
            "model": models.Model("tests.own:mixer", {"layers": 2, "width": 16}),
            "clock": Rows(),
            "data": Counting(),
            "rate": Steps(1e-2, (0.3, 0.7)),
            **changes,
        },
    )
