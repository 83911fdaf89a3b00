"""Models as other people write them with Equinox: plain `eqx.nn` layers, blocks in lists, no growjax."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


Linear = eqx.nn.Linear
KEY = jax.random.key(0)


def normal(shape, seed: int = 0):
    """Random numbers in float64, without a compiled generator."""
    return np.random.default_rng(seed).normal(size=shape)


def filled(model: Any, seed: int = 0) -> Any:
    """The model with random numbers in float64 in its trained arrays."""
    rng = np.random.default_rng(seed)

    def fill(x):
        floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(0.5 * rng.normal(size=x.shape)) if floating else x

    return jax.tree.map(fill, model)


def build(make: Callable[[], Any]) -> Any:
    """A model with random numbers, of which only the shapes are computed by its own code."""
    return filled(eqx.filter_eval_shape(make))


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: Linear
    down: Linear
    activation: Callable
    scale: Any
    name: str = eqx.field(static=True, default="block")

    def __init__(self, embed=8, mlp=6, *, key=KEY):
        self.norm = eqx.nn.LayerNorm(embed)
        self.up, self.down = Linear(embed, mlp, key=key), Linear(mlp, embed, key=key)
        self.activation = jnp.tanh
        self.scale, self.name = None, "block"

    def __call__(self, x):
        return x + jax.vmap(lambda t: self.down(self.activation(self.up(self.norm(t)))))(x)


class Tower(eqx.Module):
    """An input projection, residual blocks in a list, a head."""

    into: Linear
    blocks: list[Block]
    head: Linear

    def __init__(self, depth=3, embed=8, *, key=KEY):
        self.into = Linear(8, embed, key=key)
        self.blocks = [Block(embed, key=key) for _ in range(depth)]
        self.head = Linear(embed, 3, key=key)

    def __call__(self, x):
        x = jax.vmap(self.into)(x)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


TOWER = {
    "into": "features -> embed",
    "blocks.*.norm": "~embed",
    "blocks.*.up": "embed -> mlp",
    "blocks.*.down": "mlp -> embed",
    "head": "embed -> classes",
}


class Products(eqx.Module):
    """Static fields that repeat sizes in other ways than one by one."""

    into: Array
    out: Array
    heads: int = eqx.field(static=True)
    inner: int = eqx.field(static=True)
    four: int = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)

    def __init__(self, heads, width, embed):
        self.heads, self.inner, self.four = heads, heads * width, 4 * embed
        self.shape = (embed, self.inner)
        self.into, self.out = jnp.ones((embed, self.inner)), jnp.ones((self.inner, embed))


class BatchNormBlock(eqx.Module):
    one: eqx.nn.Conv1d
    norm: eqx.nn.BatchNorm
    two: eqx.nn.Conv1d

    def __init__(self, channels, hidden):
        self.one = eqx.nn.Conv1d(channels, hidden, 3, padding=1, key=KEY)
        self.norm = eqx.nn.BatchNorm(hidden, "batch", mode="batch")
        self.two = eqx.nn.Conv1d(hidden, channels, 3, padding=1, key=KEY)

    def __call__(self, x, state):
        y, state = self.norm(self.one(x), state)
        return x + self.two(jax.nn.relu(y)), state


class BatchNormed(eqx.Module):
    """A residual network of convolutions over a sequence, with batch norms."""

    into: eqx.nn.Conv1d
    into_norm: eqx.nn.BatchNorm
    blocks: list[BatchNormBlock]
    head: Linear

    def __init__(self, depth=2):
        self.into = eqx.nn.Conv1d(3, 4, 1, key=KEY)
        self.into_norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
        self.blocks = [BatchNormBlock(4, 6) for _ in range(depth)]
        self.head = Linear(4, 2, key=KEY)

    def __call__(self, x, state):
        x, state = self.into_norm(self.into(x), state)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(jnp.mean(x, -1)), state


BATCH_NORMED = {
    "into": "colours -> channels",
    "into_norm": "channels",
    "blocks.*.one": "channels -> hidden",
    "blocks.*.norm": "hidden",
    "blocks.*.two": "hidden -> channels",
    "head": "channels -> classes",
}


# A vision transformer, a mixer, recurrences ------------------------------------------------------


def embed_rows(layer, x):
    return jax.vmap(layer)(x)


class Encoder(eqx.Module):
    """A block around `eqx.nn.MultiheadAttention`."""

    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, embed, *, key=KEY):
        self.norm1, self.norm2 = eqx.nn.LayerNorm(embed), eqx.nn.LayerNorm(embed)
        self.attention = eqx.nn.MultiheadAttention(
            2, embed, qk_size=3, vo_size=5, use_value_bias=True, key=key
        )
        self.mlp = eqx.nn.MLP(embed, embed, 7, 1, key=key)

    def __call__(self, x):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class ViT(eqx.Module):
    """Patches by a convolution, a class token, positions that are added, encoder blocks in a list."""

    patches: eqx.nn.Conv2d
    token: Array
    positions: Array
    blocks: list[Encoder]
    norm: eqx.nn.LayerNorm
    head: Linear

    def __init__(self):
        self.patches = eqx.nn.Conv2d(3, 8, 2, stride=2, key=KEY)
        self.token, self.positions = jnp.zeros((1, 8)), jnp.zeros((5, 8))
        self.blocks = [Encoder(8) for _ in range(2)]
        self.norm, self.head = eqx.nn.LayerNorm(8), Linear(8, 10, key=KEY)

    def __call__(self, image):
        x = self.patches(image)
        x = x.reshape(x.shape[0], -1).T
        x = jnp.concatenate([self.token, x]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


class MixerBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    tokens: eqx.nn.MLP
    norm2: eqx.nn.LayerNorm
    channels: eqx.nn.MLP

    def __init__(self, patches, embed, *, key=KEY):
        self.norm1, self.norm2 = eqx.nn.LayerNorm((embed,)), eqx.nn.LayerNorm((embed,))
        self.tokens = eqx.nn.MLP(patches, patches, 7, 1, key=key)
        self.channels = eqx.nn.MLP(embed, embed, 9, 1, key=key)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + jax.vmap(self.tokens, 1, 1)(y)
        return x + jax.vmap(self.channels)(jax.vmap(self.norm2)(x))


class Mixer(eqx.Module):
    """An MLP-Mixer: one MLP over patches, one over channels, the mean over patches at the end."""

    into: Linear
    blocks: list[MixerBlock]
    norm: eqx.nn.LayerNorm
    head: Linear

    def __init__(self):
        self.into = Linear(3, 8, key=KEY)
        self.blocks = [MixerBlock(5, 8) for _ in range(2)]
        self.norm, self.head = eqx.nn.LayerNorm(8), Linear(8, 10, key=KEY)

    def __call__(self, x):
        x = jax.vmap(self.into)(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(jax.vmap(self.norm)(x), 0))


class Recurrent(eqx.Module):
    """A GRU or an LSTM, scanned over time from a state of zeros."""

    table: eqx.nn.Embedding
    cell: Any
    head: Linear

    def __init__(self, kind):
        self.table = eqx.nn.Embedding(11, 5, key=KEY)
        self.cell, self.head = kind(5, 6, key=KEY), Linear(6, 11, key=KEY)

    def __call__(self, tokens):
        start = jnp.zeros(self.cell.hidden_size)
        lstm = isinstance(self.cell, eqx.nn.LSTMCell)

        def step(state, token):
            state = self.cell(self.table(token), state)
            return state, self.head(state[0] if lstm else state)

        return jax.lax.scan(step, (start, start) if lstm else start, tokens)[1]


class Mamba(eqx.Module):
    """A selective state space block: a convolution along time, and a scan whose step sizes are data."""

    norm: eqx.nn.RMSNorm
    into: Linear
    conv: eqx.nn.Conv1d
    select: Linear
    step: Linear
    log_a: Array
    skip: Array
    out: Linear
    rank: int = eqx.field(static=True)
    state: int = eqx.field(static=True)

    def __init__(self, embed, inner=6, rank=2, state=3, *, key=KEY):
        self.norm = eqx.nn.RMSNorm(embed)
        self.into = Linear(embed, 2 * inner, use_bias=False, key=key)
        self.conv = eqx.nn.Conv1d(inner, inner, 2, groups=inner, padding=((1, 0),), key=key)
        self.select = Linear(inner, rank + 2 * state, use_bias=False, key=key)
        self.step = Linear(rank, inner, key=key)
        self.log_a, self.skip = jnp.zeros((inner, state)), jnp.ones(inner)
        self.out = Linear(inner, embed, use_bias=False, key=key)
        self.rank, self.state = rank, state

    def __call__(self, x):
        u, z = jnp.split(jax.vmap(self.into)(jax.vmap(self.norm)(x)), 2, axis=-1)
        u = jax.nn.silu(self.conv(u.T).T)
        split = (self.rank, self.rank + self.state)
        dt, b, c = jnp.split(jax.vmap(self.select)(u), split, axis=-1)
        dt = jax.nn.softplus(jax.vmap(self.step)(dt))
        decay = jnp.exp(-jnp.exp(self.log_a) * dt[:, :, None])
        drive = dt[:, :, None] * b[:, None, :] * u[:, :, None]

        def run(h, row):
            decay, drive, c = row
            h = decay * h + drive
            return h, h @ c

        y = jax.lax.scan(run, jnp.zeros(self.log_a.shape), (decay, drive, c))[1]
        return x + jax.vmap(self.out)((y + self.skip * u) * jax.nn.silu(z))


class SoftMoE(eqx.Module):
    """Experts under `filter_vmap`; every slot reads a weighted mean of all tokens (Puigcerver et al.)."""

    norm: eqx.nn.LayerNorm
    slots: Array
    experts: eqx.nn.MLP

    def __init__(self, embed, *, key=KEY):
        self.norm = eqx.nn.LayerNorm(embed)
        self.slots = jnp.zeros((embed, 3, 2))
        make = eqx.filter_vmap(lambda k: eqx.nn.MLP(embed, embed, 6, 1, key=k))
        self.experts = make(jax.random.split(key, 3))

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        logits = jnp.einsum("td,des->tes", h, self.slots)
        dispatch = jax.nn.softmax(logits, axis=0)
        combine = jax.nn.softmax(logits.reshape(len(x), -1), axis=-1).reshape(logits.shape)
        mixed = jnp.einsum("tes,td->esd", dispatch, h)
        done = eqx.filter_vmap(lambda expert, rows: jax.vmap(expert)(rows))(self.experts, mixed)
        return x + jnp.einsum("tes,esd->td", combine, done)


class Llama(eqx.Module):
    """Fused queries, keys and values with grouped queries, a fused gated MLP, rotary positions."""

    norm1: eqx.nn.RMSNorm
    qkv: Linear
    out: Linear
    norm2: eqx.nn.RMSNorm
    gate_up: Linear
    down: Linear
    n_heads: int = eqx.field(static=True)
    n_kv_heads: int = eqx.field(static=True)

    def __init__(self, embed, heads=4, kv_heads=2, width=4, mlp=6, *, key=KEY):
        self.n_heads, self.n_kv_heads = heads, kv_heads
        self.norm1 = eqx.nn.RMSNorm(embed, use_bias=False)
        self.norm2 = eqx.nn.RMSNorm(embed, use_bias=False)
        self.qkv = Linear(embed, (heads + 2 * kv_heads) * width, use_bias=False, key=key)
        self.out = Linear(heads * width, embed, use_bias=False, key=key)
        self.gate_up = Linear(embed, 2 * mlp, use_bias=False, key=key)
        self.down = Linear(mlp, embed, use_bias=False, key=key)

    def __call__(self, x):
        width = self.qkv.weight.shape[0] // (self.n_heads + 2 * self.n_kv_heads)
        h = jax.vmap(self.qkv)(jax.vmap(self.norm1)(x))
        cuts = (self.n_heads * width, (self.n_heads + self.n_kv_heads) * width)
        q, k, v = jnp.split(h, cuts, axis=-1)
        q = q.reshape(len(x), self.n_kv_heads, -1, width)
        k, v = (y.reshape(len(x), self.n_kv_heads, width) for y in (k, v))
        k = rotated(k)
        q = jax.vmap(rotated, 2, 2)(q)
        logits = jnp.einsum("tkgd,skd->kgts", q, k) / 2.0
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
        read = jnp.einsum("kgts,skd->tkgd", jax.nn.softmax(logits), v)
        x = x + jax.vmap(self.out)(read.reshape(len(x), -1))
        gate, up = jnp.split(jax.vmap(self.gate_up)(jax.vmap(self.norm2)(x)), 2, axis=-1)
        return x + jax.vmap(self.down)(jax.nn.silu(gate) * up)


def rotated(x):
    """Rotary positions on `[time, heads, width]`, with frequencies that are computed on the way."""
    half = x.shape[-1] // 2
    angle = jnp.arange(len(x))[:, None] * 100.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Words(eqx.Module):
    """A table, blocks in a list, a norm and a head: the frame of a language model."""

    table: eqx.nn.Embedding
    blocks: list[Any]
    norm: Any
    head: Linear

    def __init__(self, block, norm=eqx.nn.RMSNorm):
        self.table = eqx.nn.Embedding(11, 8, key=KEY)
        self.blocks = [block(8) for _ in range(2)]
        self.norm, self.head = norm(8), Linear(8, 11, use_bias=False, key=KEY)

    def __call__(self, tokens):
        x = jax.vmap(self.table)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


class Tied(eqx.Module):
    """A head that shares the weights of the table, by `eqx.nn.Shared`."""

    shared: eqx.nn.Shared
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm | None

    def __init__(self, norm=True):
        pair = eqx.nn.Embedding(11, 8, key=KEY), Linear(8, 11, use_bias=False, key=KEY)
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
        self.positions = eqx.nn.Embedding(9, 8, key=KEY)
        self.blocks = [Block(8) for _ in range(2)]
        self.norm = eqx.nn.LayerNorm(8) if norm else None

    def __call__(self, tokens):
        table, head = self.shared()
        x = jax.vmap(table)(tokens) + jax.vmap(self.positions)(jnp.arange(len(tokens)))
        for block in self.blocks:
            x = block(x)
        x = x if self.norm is None else jax.vmap(self.norm)(x)
        return jax.vmap(head)(x)
