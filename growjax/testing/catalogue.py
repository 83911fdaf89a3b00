"""Small models with every option that matters for exactness, and the operators that fit each."""

import dataclasses
import functools
import zlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jaxtyping import Array

from growjax import growth, models
from growjax.axes import axes_of, put
from growjax.growth import Chain, Operator, msg


Batch = Array | tuple[Array, ...]
# Small sizes, all different, so that two axes are not confused
LENGTH, VOCAB = 5, 11
TOY = dict(embed=8, heads=2, head_dim=4, mlp=6, vocab=VOCAB)


# Architectures -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A small model of one family, described by its options; hashable, and built from a seed."""

    family: str
    options: tuple[tuple[str, Any], ...] = ()

    def model(self, seed: int = 0, dtype=jnp.float64):
        """The model with every trained array random, biases and gains too, in `dtype`."""
        with jax.enable_x64(True):
            model = randomise(_skeleton(self), seed)
            return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model)

    def batch(self, seed: int = 0, size: int = 2) -> Batch:
        """Token ids `[size, LENGTH]`, the model's input under `vmap`; for a T5 those of both stacks."""
        rng = np.random.default_rng(seed)
        tokens = jnp.asarray(rng.integers(0, VOCAB, (2, size, LENGTH)))
        return (tokens[0], tokens[1, :, :3]) if self.family == "T5" else tokens[0]

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of its stack axes."""
        return ("encoder_layers", "decoder_layers") if self.family == "T5" else ("layers",)

    def __str__(self) -> str:
        return f"{self.family}({', '.join(f'{k}={v}' for k, v in self.options)})"


@functools.cache
def _skeleton(architecture: Architecture):
    with jax.ensure_compile_time_eval():  # arrays, also if the first call is traced: they are kept
        return drawn(architecture)


def drawn(architecture: Architecture) -> Any:
    """The architecture's model as it is born; under `jax.eval_shape`, its shapes."""
    depth = dict.fromkeys(architecture.stacks, 2)
    if architecture.family in ("GPT", "BERT"):
        depth["positions"] = LENGTH + 3
    if architecture.family == "Llama":
        depth["kv_heads"] = 1
    config = getattr(models, f"{architecture.family}Config")
    model = getattr(models, architecture.family)
    options = {**TOY, **depth, **dict(architecture.options)}
    return model(config(remat="everything", **options), key=jax.random.key(0))


def randomise(model, seed: int = 0):
    """The model with every trained array drawn anew, including biases and gains."""
    values = {}
    for slot in axes_of(model).of_kind("param"):
        if slot.value is not None:
            # NumPy draws, which need no compilation; the path makes every leaf's draws differ
            rng = np.random.default_rng([seed, zlib.crc32(slot.path.encode())])
            noise = 0.4 * rng.standard_normal(slot.value.shape)
            values[slot.steps] = jnp.asarray(noise + (slot.init == "ones"), slot.value.dtype)
    return put(model, values)


def _architecture(family: str, **options) -> Architecture:
    return Architecture(family, tuple(options.items()))


ARCHITECTURES: tuple[Architecture, ...] = (
    _architecture("GPT"),
    _architecture("GPT", tied=False, bias=False, qk_norm=True, activation="relu"),
    _architecture("GPT", norm="rms", glu=True, activation="silu", position="rotary"),
    _architecture("GPT", heads=4, kv_heads=2, position="rotary", qk_norm=True, norm="rms"),
    _architecture("GPT", post_norm=True, activation="gelu"),
    _architecture("BERT"),
    _architecture("BERT", post_norm=False, embedding_norm=True, glu=True, activation="silu"),
    _architecture("Llama", heads=2, kv_heads=1),
    _architecture("Llama", heads=4, kv_heads=2, tied=True, qk_norm=True, bias=True),
    _architecture("T5"),
    _architecture("T5", glu=True, activation="gelu_tanh", tied=False),
    _architecture("Llama", heads=2, kv_heads=1, experts=3, shared_experts=1),
)
"""Small models with every option that matters for exactness, each in at least one of them."""


# Operators -----------------------------------------------------------------------------------


def operators_for(architecture: Architecture) -> tuple[Operator | Chain, ...]:
    """Operators that fit an architecture: every family, every axis, alone and together."""
    options = {**TOY, **dict(architecture.options)}
    heads = options["heads"]
    kv_heads = options.get("kv_heads", heads)
    post_norm = options.get("post_norm", architecture.family == "BERT")
    rms = options.get("norm", "layer") == "rms" or architecture.family in ("Llama", "T5")
    normed = post_norm or options.get("embedding_norm", False)  # the stream is a norm's output
    qk_norm = options.get("qk_norm", False)
    rotary = options.get("position") == "rotary" or architecture.family == "Llama"

    def deep(layers: int) -> dict[str, Any]:
        return {architecture.stacks[0]: layers}

    ops: list[Any] = [
        msg(embed=12),
        msg(mlp=10),
        msg(heads=2 * heads),
        msg(head_dim=6),
        msg(**deep(3)),
        msg(embed=12, mlp=8, heads=2 * heads, kv_heads=2 * kv_heads, **deep(3), init="matched"),
        msg(embed=12, mlp=10, init="copy"),
        growth.chain(msg(mlp=9, init="zeros"), msg(embed=10), msg(**deep(4), order="interleave")),
        growth.copy(mlp=15, shares="random"),
        growth.copy(mlp=9, order="random", kv_heads=kv_heads + 1),
        growth.copy(embed=16, mlp=12, heads=2 * heads),
        growth.copy(head_dim=8),
        growth.zeros(mlp=10, heads=2 * heads),
        growth.stack(**deep(3), order="top"),
        growth.fresh(**deep(3)),
        growth.stack(**deep(4), branch="split"),
    ]
    if not post_norm:
        ops.append(growth.stack(**deep(4), order="insert", branch="zero"))
    if "experts" in options:
        ops += [
            growth.experts(5),
            growth.experts(4, init="normal"),
            growth.experts(6, gated=False, per_token="scaled", noise=0.1),
            growth.experts(5, gated=False, noise=0.1),
        ]
    elif architecture.family in ("GPT", "Llama"):
        ops += [
            growth.upcycle(experts=3),
            growth.upcycle(experts=4, granularity=2),
            growth.upcycle(experts=3, drop=0.5),
        ]
    sizes: dict[str, Any] = dict(embed=2 * options["embed"], mlp=12, kv_heads=2 * kv_heads)
    ops += [
        growth.copy(mlp=9, kv_heads=2 * kv_heads, shares="equal", noise=0.3),
        growth.copy(embed=12, mlp=9, scale="rms"),
        growth.copy(shares="diagonal", **sizes),
        growth.aki(mlp=9),
        growth.warm(mlp=9),
        growth.vocabulary(VOCAB + 5),
        growth.vocabulary(VOCAB + 5, gate=True),
        growth.transplant([*([i] for i in range(VOCAB)), [1, 2]]),
        growth.lemon(mlp=9) if normed else growth.lemon(embed=13, mlp=9),
        growth.between(**deep(3), fill="transport", branch="open" if post_norm else "zero"),
    ]
    if len(architecture.stacks) == 1:
        ops.append(growth.within(growth.zeros(mlp=10), layers=(1,)))
    if rotary:
        ops.append(growth.context(2, how="interpolate"))
    elif architecture.family != "T5":
        ops.append(growth.positions(LENGTH + 6))
    if kv_heads > 1:
        ops.append(growth.pool(kv_heads=1))
    if architecture.family == "GPT" and not (rms or post_norm or options.get("tied", True)):
        ops.append(growth.centred())
    if not qk_norm:
        ops.append(growth.zeros(head_dim=6))
    if rms:
        ops.append(growth.zeros(embed=12))
    if heads > kv_heads:
        ops.append(growth.regroup(kv_heads=heads))
    if not (qk_norm or rotary):
        # Nothing but linear parts touches the coordinates of a head
        mixed = ((0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 1), (0, 0, -1, 1), (0.5, 0, 0, 2))
        ops.append(growth.dense(head_dim=mixed, exact=True))
    return tuple(ops)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator with an architecture that it fits."""

    architecture: Architecture
    operator: Operator | Chain
    seed: int = 0

    def model(self, dtype=jnp.float64):
        """The architecture's model for this seed."""
        return self.architecture.model(self.seed, dtype)

    def batch(self) -> Batch:
        """The architecture's batch for this seed."""
        return self.architecture.batch(self.seed)

    def __str__(self) -> str:
        return f"{self.operator} on {self.architecture}"


def all_cases() -> tuple[Case, ...]:
    """Every operator on every architecture that it claims."""
    return tuple(Case(arch, op) for arch in ARCHITECTURES for op in operators_for(arch))


def architectures() -> st.SearchStrategy[Architecture]:
    """One of `ARCHITECTURES`."""
    return st.sampled_from(ARCHITECTURES)


def cases(*, exactness: tuple[growth.Exactness, ...] | None = None) -> st.SearchStrategy[Case]:
    """An architecture, an operator that fits it, and a seed; only classes in `exactness`, if given."""
    fitting = [c for c in all_cases() if exactness is None or c.operator.exactness in exactness]
    return st.builds(
        lambda case, seed: dataclasses.replace(case, seed=seed),
        st.sampled_from(fitting),
        st.integers(0, 2**16),
    )
