"""More models of other people: sizes in a configuration, group norms, convolutions in groups."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.zoo import KEY, Linear


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes as minGPT and its many children keep them."""

    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 8
    vocab_size: int = 11
    block_size: int = 9


class Attention(eqx.Module):
    """Causal attention whose reshapes read the sizes of the configuration."""

    qkv: Linear
    proj: Linear
    config: Config = eqx.field(static=True)

    def __init__(self, config):
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, key=KEY)
        self.proj = Linear(config.n_embd, config.n_embd, key=KEY)
        self.config = config

    def __call__(self, x):
        heads, width = self.config.n_head, self.config.n_embd // self.config.n_head
        parts = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)
        q, k, v = (part.reshape(len(x), heads, width) for part in parts)
        logits = jnp.einsum("thd,shd->hts", q, k)
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
        read = jnp.einsum("hts,shd->thd", jax.nn.softmax(logits), v)
        return jax.vmap(self.proj)(read.reshape(len(x), heads * width))


class ConfigBlock(eqx.Module):
    ln_1: eqx.nn.LayerNorm
    attn: Attention
    ln_2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, config):
        self.ln_1, self.ln_2 = (eqx.nn.LayerNorm(config.n_embd) for _ in range(2))
        self.attn = Attention(config)
        self.mlp = eqx.nn.MLP(config.n_embd, config.n_embd, 4 * config.n_embd, 1, key=KEY)

    def __call__(self, x):
        x = x + self.attn(jax.vmap(self.ln_1)(x))
        return x + jax.vmap(self.mlp)(jax.vmap(self.ln_2)(x))


class MinGPT(eqx.Module):
    """A decoder all of whose modules share one static configuration."""

    wte: eqx.nn.Embedding
    wpe: eqx.nn.Embedding
    h: list[ConfigBlock]
    ln_f: eqx.nn.LayerNorm
    head: Linear
    config: Config = eqx.field(static=True)

    def __init__(self, config: Any = None):
        config = config or Config()
        self.wte = eqx.nn.Embedding(config.vocab_size, config.n_embd, key=KEY)
        self.wpe = eqx.nn.Embedding(config.block_size, config.n_embd, key=KEY)
        self.h = [ConfigBlock(config) for _ in range(config.n_layer)]
        self.ln_f = eqx.nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, use_bias=False, key=KEY)
        self.config = config

    def __call__(self, tokens):
        x = jax.vmap(self.wte)(tokens) + jax.vmap(self.wpe)(jnp.arange(len(tokens)))
        for block in self.h:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.ln_f)(x))


class GroupNormBlock(eqx.Module):
    norm: eqx.nn.GroupNorm
    one: eqx.nn.Conv1d
    two: eqx.nn.Conv1d

    def __init__(self, channels, hidden):
        self.norm = eqx.nn.GroupNorm(2, channels)
        self.one = eqx.nn.Conv1d(channels, hidden, 3, padding=1, key=KEY)
        self.two = eqx.nn.Conv1d(hidden, channels, 3, padding=1, key=KEY)

    def __call__(self, x):
        return x + self.two(jax.nn.relu(self.one(self.norm(x))))


class GroupNormed(eqx.Module):
    """A residual network with norms over groups of its channels."""

    into: eqx.nn.Conv1d
    blocks: list[GroupNormBlock]
    head: Linear

    def __init__(self):
        self.into = eqx.nn.Conv1d(3, 4, 1, key=KEY)
        self.blocks = [GroupNormBlock(4, 6) for _ in range(2)]
        self.head = Linear(4, 2, key=KEY)

    def __call__(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, -1))


class Bottleneck(eqx.Module):
    """A block of ResNeXt: its middle convolution reads its channels in groups."""

    one: eqx.nn.Conv1d
    groups: eqx.nn.Conv1d
    two: eqx.nn.Conv1d

    def __init__(self, channels, hidden, count):
        self.one = eqx.nn.Conv1d(channels, hidden, 1, key=KEY)
        self.groups = eqx.nn.Conv1d(hidden, hidden, 3, padding=1, groups=count, key=KEY)
        self.two = eqx.nn.Conv1d(hidden, channels, 1, key=KEY)

    def __call__(self, x):
        return x + self.two(jax.nn.relu(self.groups(jax.nn.relu(self.one(x)))))


class ResNeXt(eqx.Module):
    """Residual blocks with convolutions in groups, in a list."""

    into: eqx.nn.Conv1d
    blocks: list[Bottleneck]
    head: Linear

    def __init__(self, count=2):
        self.into = eqx.nn.Conv1d(3, 4, 1, key=KEY)
        self.blocks = [Bottleneck(4, 6, count) for _ in range(2)]
        self.head = Linear(4, 2, key=KEY)

    def __call__(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, -1))
