"""Rotary positions: the frequencies of the pairs of a head, and how they are scaled for long contexts."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from growjax.axes import buffer
from growjax.errors import AxisError
from growjax.values import Size, check, positive, register


@register
@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How frequencies are lowered for contexts that are longer than in training.

    All are divided by `factor` (Chen et al., "Position Interpolation", 2023); or, if `length` is the
    trained context, only those that turn less than `low` times in it, and none that turns
    more than `high` times (Llama 3).

    **Example**

        RotaryScaling(8.0, low=1.0, high=4.0, length=8192)        # Llama 3.1
    """

    factor: Annotated[float, positive()]
    low: Annotated[float, positive()] = 1.0
    high: Annotated[float, positive()] = 4.0
    length: Size | None = None

    def __post_init__(self):
        check(self, AxisError, "these frequencies cannot be scaled:", self._faults)

    def _faults(self) -> Iterator[str]:
        if not self.low < self.high:
            yield f"low, high: expected a low below the high, got {self.low} and {self.high}"

    def __call__(self, freqs: Float[Array, " n"], theta: float) -> Float[Array, " n"]:
        """The frequencies that the model is run with."""
        if self.length is None:
            return freqs / self.factor
        turns = self.length * freqs / (2 * math.pi)
        weight = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return freqs * (weight + (1 - weight) / self.factor)


@register
@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: pairs that turn often in the trained context keep their frequency, slow ones are divided.

    Between `fast` and `slow` turns in `length` places, the division by `factor` sets in pair by pair
    (`truncate`: between whole pairs). Queries and keys are multiplied by `magnitude`, which is
    `0.1 log(factor) + 1` if it is None. Peng et al., "YaRN", ICLR 2024.

    **Example**

        YarnScaling(4.0, length=32768)        # Qwen 2.5 and 3 beyond 32,768 tokens
    """

    factor: Annotated[float, positive()]
    length: Size
    fast: Annotated[float, positive()] = 32.0
    slow: Annotated[float, positive()] = 1.0
    magnitude: Annotated[float, positive()] | None = None
    truncate: bool = True

    def __post_init__(self):
        check(self, AxisError, "these frequencies cannot be scaled:")

    def __call__(self, freqs: Float[Array, " n"], theta: float) -> Float[Array, " n"]:
        """The frequencies that the model is run with."""
        pairs = freqs.shape[0]

        def pair(turns: float) -> float:
            """The pair, counted in fractions, that turns so often in the trained context."""
            return pairs * math.log(self.length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        high += 0.001 * (low == high)  # a step instead of a ramp
        divided = jnp.clip((jnp.arange(pairs) - low) / (high - low), 0, 1)
        return freqs / self.factor * divided + freqs * (1 - divided)

    @property
    def size(self) -> float:
        """The factor of queries and keys."""
        if self.magnitude is not None:
            return self.magnitude
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@register
@dataclasses.dataclass(frozen=True)
class LongRotary:
    """LongRoPE: a divisor for each pair, `short` in sequences of at most `length` places, `long` beyond.

    Queries and keys are multiplied by `magnitude`. Ding et al., "LongRoPE", ICML 2024; Phi-3.

    **Example**

        LongRotary(short=(1.0,) * 48, long=(2.0,) * 48, length=4096, magnitude=1.19)
    """

    short: tuple[Annotated[float, positive()], ...]
    long: tuple[Annotated[float, positive()], ...]
    length: Size
    magnitude: Annotated[float, positive()] = 1.0

    def __post_init__(self):
        check(self, AxisError, "these frequencies cannot be scaled:", self._faults)

    def _faults(self) -> Iterator[str]:
        if len(self.short) != len(self.long):
            yield f"short, long: expected equally many, got {len(self.short)} and {len(self.long)}"

    def __call__(self, freqs: Float[Array, " n"], theta: float) -> Float[Array, " n"]:
        """The frequencies in short sequences."""
        return freqs / jnp.asarray(self.short, freqs.dtype)

    @property
    def size(self) -> float:
        """The factor of queries and keys."""
        return self.magnitude


Scaling = RotaryScaling | YarnScaling | LongRotary


class Rotary(eqx.Module):
    """Rotary position embeddings on neighbouring pairs of coordinates.

    The frequencies are data, one per coordinate: a head that grows keeps those it has, and new pairs,
    appended at the end, repeat them. (Halves instead of pairs would have to grow in two places.)
    `theta` and `scaling` record their origin. Only the first `turned` coordinates of a head are turned
    (None: all of them); a frequency of zero leaves the others as they are. Su et al., "RoFormer", 2021.
    """

    freqs: Float[Array, " head_dim"] = buffer("head_dim")
    theta: float = eqx.field(static=True, default=10000.0)
    scaling: Scaling | None = eqx.field(static=True, default=None)
    turned: int | None = eqx.field(static=True, default=None)
    far: Float[Array, " head_dim"] | None = buffer("head_dim", default=None)

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        scaling: Scaling | None = None,
        turned: int | None = None,
    ):
        size = head_dim if turned is None else turned
        if size > head_dim or size % 2:
            raise AxisError(f"turned: expected an even number of at most {head_dim}, got {turned}")
        freqs = theta ** -(jnp.arange(0, size, 2) / max(size, 1))
        if isinstance(scaling, LongRotary) and len(scaling.short) != size // 2:
            raise AxisError(
                f"scaling: expected a divisor for each of the {size // 2} pairs that are turned, got "
                f"{len(scaling.short)}"
            )

        def spread(freqs):
            return jnp.pad(jnp.repeat(freqs, 2), (0, head_dim - size))

        self.freqs = spread(freqs if scaling is None else scaling(freqs, theta))
        self.theta, self.scaling, self.turned, self.far = theta, scaling, turned, None
        if isinstance(scaling, LongRotary):
            self.far = spread(freqs / jnp.asarray(scaling.long, freqs.dtype))

    def __check_init__(self):
        if self.freqs.shape[-1] % 2:
            raise AxisError(
                f"head_dim: rotary positions turn pairs, so it must be even, got {self.freqs.shape[-1]}"
            )

    def stretched(self, by: Any) -> "Rotary":
        """The record of frequencies that `gj.growth.context` has lowered.

        Raises `AxisError` if they were scaled before: files know one scaling. So it does for YaRN in a
        model some of whose layers turn nothing, since it makes the keys of all layers larger.
        """
        if by.how == "yarn" and self.turned == 0:
            raise AxisError(
                "how: some layers have no positions, and their keys must not grow as YaRN's do; give "
                "'interpolate' or 'ntk'"
            )
        if self.scaling is not None:
            raise AxisError(
                f"these frequencies are scaled already, by {self.scaling}; stretch the model that it was "
                "before"
            )
        theta, scaling = self.theta, None
        if by.how == "ntk":
            size = self.freqs.shape[-1] if self.turned is None else self.turned
            theta *= float(by.factor) ** (size / max(size - 2, 1))
        elif by.how == "yarn":
            scaling = RotaryScaling(float(by.factor), float(by.low), float(by.high), by.length)
        else:
            scaling = RotaryScaling(float(by.factor))
        stretched = Rotary(self.freqs.shape[-1], theta, scaling, self.turned)
        return eqx.tree_at(lambda rotary: rotary.freqs, stretched, self.freqs)

    def __call__(self, positions: Int[Array, " T"]) -> tuple[Array, Array]:
        """Cosines and sines `[T, head_dim]`, in float32 at least."""
        freqs = jax.lax.stop_gradient(self.freqs)
        if isinstance(self.scaling, LongRotary) and self.far is not None:
            is_long = jnp.max(positions) >= self.scaling.length
            freqs = jnp.where(is_long, jax.lax.stop_gradient(self.far), freqs)
        angles = positions[:, None] * freqs
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        size = 1.0 if self.scaling is None else getattr(self.scaling, "size", 1.0)
        if size == 1:
            return cos, sin
        return jnp.where(freqs == 0, cos, size * cos), size * sin


def rotate(x: Float[Array, "T ... head_dim"], turn: tuple[Array, Array] | None) -> Array:
    """Turn every pair of coordinates of `x` by its angle at each position."""
    if turn is None:
        return x
    cos, sin = (t.reshape(t.shape[0], *[1] * (x.ndim - 2), -1).astype(x.dtype) for t in turn)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    quarter = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos + quarter * sin
