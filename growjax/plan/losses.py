"""What a model is trained on: the cross-entropy of every target that counts, or a loss of one's own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from growjax.models.protocol import predictions
from growjax.values import register


# One example -> the loss at each place, in nats, and how much each place counts.
Loss = Callable[[Any, Mapping[str, Array]], tuple[Float[Array, " T"], Float[Array, " T"]]]


@register
def cross_entropy(
    model: Any, example: Mapping[str, Array]
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """The loss of each target of one example, in nats, and its weight.

    `example` is what an objective of `growjax.data` makes; its keys say how the model is called. Logits
    and losses are in float32 at least. Works for every model that has `predict` or is called with tokens
    (`growjax.models.protocol`); another one needs a function like this of its own, `Plan(loss=...)`.

    **Example**

        losses, weights = cross_entropy(model, {"tokens": t, "targets": u, "weights": w})
    """
    scores = predictions(model, example)
    log_probability = jax.nn.log_softmax(scores, axis=-1)
    chosen = jnp.take_along_axis(log_probability, example["targets"][:, None], axis=-1)[:, 0]
    return -chosen, example["weights"].astype(chosen.dtype)


def drawn_loss(
    model: Any, example: Mapping[str, Array]
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """`cross_entropy` on labels that the model itself draws by the example's `key`.

    The square of its gradient is the diagonal of the Gauss-Newton matrix, on average (Sophia-G).
    """
    scores = jax.lax.stop_gradient(predictions(model, example))
    labels = jax.random.categorical(jax.random.wrap_key_data(example["key"]), scores)
    return cross_entropy(model, {**example, "targets": labels})
