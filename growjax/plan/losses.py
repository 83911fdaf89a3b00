"""The loss of a plan: the cross-entropy of the targets, or a function of one's own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from growjax.models.protocol import predictions
from growjax.values import register


# (model, one example) -> the loss at each of its T positions, in nats, and the weight of each position
Loss = Callable[[Any, Mapping[str, Array]], tuple[Float[Array, " T"], Float[Array, " T"]]]


@register
def cross_entropy(
    model: Any, example: Mapping[str, Array]
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """The loss of each of the T targets of one example, in nats, and the weight of each.

    `example` is made by an objective of `growjax.data`; its keys determine how the model is called.
    Logits and losses are in float32 at least. Works for every model that has `predict` or is called with
    tokens (`growjax.models.protocol`); any other model needs a loss of its own, `Plan(loss=...)`.

    **Example**

        losses, weights = cross_entropy(model, {"tokens": t, "targets": u, "weights": w})
    """
    logits = predictions(model, example)  # [T, vocab]
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    targets = example["targets"][:, None]
    log_likelihood = jnp.take_along_axis(log_probabilities, targets, axis=-1)[:, 0]
    return -log_likelihood, example["weights"].astype(log_likelihood.dtype)


def drawn_loss(
    model: Any, example: Mapping[str, Array]
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """`cross_entropy` on labels drawn from the model's own predictions, by the example's `key`.

    The expected square of its gradient is the diagonal of the Gauss-Newton matrix (Sophia-G: Liu et al.,
    "Sophia", ICLR 2024).
    """
    logits = jax.lax.stop_gradient(predictions(model, example))
    # The example holds the key's data, an ordinary array, as every other entry of a batch is
    labels = jax.random.categorical(jax.random.wrap_key_data(example["key"]), logits)
    return cross_entropy(model, {**example, "targets": labels})
