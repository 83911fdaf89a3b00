"""Operators whose numbers are fitted to batches of data, right before they grow a model.

A `Fit` says how to start, how one batch improves the numbers, and which maps they make. The batches come
from elsewhere: from a run that reaches the growth, or from `growjax.fitting.fit`.
"""

import abc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.growth.operator import Exactness, Model, Operator, check_fitted


class Measure(Protocol):
    """The loss of a batch, and its gradient, as functions of anything that a model is made of."""

    def __call__(self, make: Any, x: Any) -> tuple[Float[Array, ""], Any]:
        """The mean loss of the model `make(x)`, and its gradient with respect to `x`."""
        ...


class Fit(Operator):
    """An operator that is fitted before it grows: subclass it, and write `start`, `improved`, `maps_of`.

    It has a field `batches`, how many batches it is fitted to. As a stage's `grow` it is fitted on the
    run's own data when the growth is due. Elsewhere `growjax.fitting.fit` makes an ordinary operator of
    it. By itself it grows shapes only, and `gj.grow` refuses it.

    `numbers` are whatever it learns: a tree of arrays.
    """

    batches: eqx.AbstractVar[int]
    fitted: ClassVar[bool] = False

    @abc.abstractmethod
    def start(self, model: Any, *, key: PRNGKeyArray) -> Any:
        """The numbers before the first batch, for this model; traced."""

    @abc.abstractmethod
    def improved(self, numbers: Any, model: Any, measure: Measure) -> tuple[Any, Array]:
        """The numbers after one more batch, and its loss; traced."""

    @abc.abstractmethod
    def maps_of(self, axes: Axes, numbers: Any) -> Sequence[AxisMap]:
        """The maps that numbers make, which may be traced; None asks for the shapes of the maps alone."""

    def maps(self, axes: Axes) -> Sequence[AxisMap]:
        """Maps of the right sizes, before there are numbers."""
        return self.maps_of(axes, None)

    @abc.abstractmethod
    def frozen(self, numbers: Any) -> Operator:
        """An ordinary operator with these numbers inside."""

    def faults(self, numbers: Any) -> Iterator[str]:
        """Why a model must not be grown by these numbers; none by default."""
        del numbers
        return iter(())

    def filled(self, numbers: Any) -> "Filled":
        """The operator with numbers that may be traced; it is applied, and never saved."""
        return Filled(self, numbers)

    def __call__(self, model: Model, *, key: PRNGKeyArray | None = None) -> Model:
        """The shapes of the grown model; raises `GrowthError` for a model of numbers."""
        if any(eqx.is_array(x) and not isinstance(x, Tracer) for x in jax.tree.leaves(model)):
            check_fitted(self)
        return super().__call__(model, key=key)


class Filled(Operator):
    """An operator that was just fitted, with its numbers."""

    fit: Fit = eqx.field(static=True)
    numbers: Any

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """That of the fit."""
        return self.fit.exactness

    def maps(self, axes: Axes) -> Sequence[AxisMap]:
        """The maps of its numbers."""
        return self.fit.maps_of(axes, self.numbers)

    def __repr__(self) -> str:
        return repr(self.fit)


def adam(
    weights: Any,
    gradient: Any,
    moments: tuple[Any, Any],
    t: Any,
    *,
    rate: float,
    decay: float = 0.0,
) -> tuple[Any, tuple[Any, Any]]:
    """One step of AdamW, the first with `t = 0`: the weights after it, and the moments.

    Written out, since operators need no optax. Weights keep their dtypes, also where JAX computes in
    float64 besides.
    """
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, moments[1], gradient)

    def moved(w, m, v):
        m, v = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
        return (w - rate * (m / (jnp.sqrt(v) + 1e-8) + decay * w)).astype(w.dtype)

    return jax.tree.map(moved, weights, first, second), (first, second)
