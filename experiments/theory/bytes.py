"""Bytes of a text, to predict each from those before it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from growjax.data import Source


# How much of a text is read
BYTES = 2**21


class Bytes(eqx.Module):
    """Windows of a text, to predict each byte from those before it."""

    text: Array
    batch: int = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def draw(self, key):
        first = jax.random.randint(key, (self.batch, 1), 0, len(self.text) - self.length)
        return self.text[first + jnp.arange(self.length + 1)].astype(jnp.int32)

    def loss(self, model, batch):
        return jnp.mean(nats(jax.vmap(model)(batch[:, :-1]), batch))


def nats(logits: Array, windows: Array) -> Array:
    """The loss of each byte but the first of each window."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def texts(source: Source, size: int = BYTES) -> tuple[Array, Array]:
    """Bytes to train on and bytes held out: one document in ten, or the end of a single one."""
    documents, read = [], 0
    for document in source.documents():
        content = document.content
        data = content.encode() if isinstance(content, str) else bytes(content)
        documents.append(np.frombuffer(data, np.uint8))
        read += len(data)
        if read >= size:
            break
    if len(documents) < 10:
        whole = np.concatenate(documents)
        documents = np.array_split(whole[:size], 10)
    held_out = documents[9::10]
    train = [d for n, d in enumerate(documents) if n % 10 != 9]
    return jnp.asarray(np.concatenate(train)), jnp.asarray(np.concatenate(held_out))
