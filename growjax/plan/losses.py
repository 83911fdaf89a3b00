"""The loss of a plan: the cross-entropy of the targets, or a function of one's own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from growjax.models.protocol import read_tokens, read_with_auxiliary
from growjax.nn import cross_entropies
from growjax.values import register


# The loss at each of T positions, in nats, and the weight of each; and where the model has one, the
# auxiliary loss of the example: training adds it to the weighted mean, evaluation leaves it out
Losses = tuple[Float[Array, "..."], ...]
# (model, one example) -> its losses
Loss = Callable[[Any, Mapping[str, Array]], Losses]


@register
def cross_entropy(model: Any, example: Mapping[str, Array]) -> Losses:
    """The loss of each of the T targets of one example, in nats, and the weight of each.

    A third value follows where the model has one: the auxiliary loss of the example, such as that of a
    mixture of experts. Training adds it to the mean loss of the example; evaluation ignores it.

    `example` is made by an objective of `growjax.data`; its keys determine how the model is called.
    Logits and losses are in float32 at least; if the model has a `readout`, the logits of a long sequence
    are never in memory at once. Works for every model that has `predict` or is called with tokens
    (`growjax.models.protocol`); any other model needs a loss of its own, `Plan(loss=...)`.

    **Example**

        losses, weights = cross_entropy(model, {"tokens": t, "targets": u, "weights": w})
    """
    losses, auxiliary = read_with_auxiliary(cross_entropies, model, example, example["targets"])
    weights = example["weights"].astype(losses.dtype)
    return (losses, weights) if auxiliary is None else (losses, weights, auxiliary)


def objective(losses: Losses, total_weight: Any) -> Float[Array, ""]:
    """The contribution of some rows to the training objective; every array has a leading axis of rows.

    It is the sum of the weighted losses of positions, and of each row's auxiliary loss times the row's
    weight, divided by `total_weight`, the weight of the whole batch.

    **Example**

        objective(jax.vmap(lambda row: cross_entropy(model, row))(rows), jnp.sum(rows["weights"]))
    """
    of_positions, weights, *auxiliary = losses
    total = jnp.sum(of_positions * weights)
    for of_row in auxiliary:
        total = total + jnp.sum(of_row * jnp.sum(weights, axis=-1))
    return total / total_weight


def drawn_loss(
    model: Any, example: Mapping[str, Array]
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """`cross_entropy` on labels drawn from the model's own predictions, by the example's `key`.

    The expected square of its gradient is the diagonal of the Gauss-Newton matrix (Sophia-G: Liu et al.,
    "Sophia", ICLR 2024).
    """

    def losses_of(logits: Array, keys: Array) -> Array:
        labels = jax.vmap(jax.random.categorical)(keys, jax.lax.stop_gradient(logits))
        return cross_entropies(logits, labels)

    # The example holds the key's data, an ordinary array like every other entry. Each position has a key
    # of its own, so that the labels do not depend on the number of positions read at once.
    keys = jax.random.split(jax.random.wrap_key_data(example["key"]), len(example["targets"]))
    losses = read_tokens(losses_of, model, example, keys)
    return losses, example["weights"].astype(losses.dtype)
