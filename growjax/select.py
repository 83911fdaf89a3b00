"""Batch selection: look at more examples than are trained on, and train on those that seem worth it.

Looking costs a forward pass of every example offered, and a run is charged for it. A selector is a
value like a sub-network: what it chooses is a function of the losses and of the key, always as many as
a batch has, so one program serves every step and a run resumes anywhere.

Selective backprop: Jiang et al. 2019 (arXiv 1910.00762). RHO loss: Mindermann et al., ICML 2022. Both as
measured by Kaddour et al., "No Train No Gain", NeurIPS 2023.
"""

import abc
import collections
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax.errors import SelectError, raise_all
from growjax.maps import fold_in_name
from growjax.values import base, check, fits, ranged, register


# How many batches are looked at: all of them are in memory at once
Batches = Annotated[int, ranged(1, 1000, "a number of batches")]


@base("a selector such as RhoLoss()")
class Selector(eqx.Module):
    """Chooses what a step trains on from several batches: subclass it and write `choose`.

    `offers` says how many batches it looks at, `compares` whether it needs the losses of a second model.
    What looking costs is for the clock to say: one whose forward passes cost nothing shows what a rule
    would gain if it were free.
    """

    offers: eqx.AbstractVar[int]
    compares: eqx.AbstractClassVar[bool]

    def __check_init__(self):
        check(self, SelectError, "this selection cannot be used:")

    @abc.abstractmethod
    def choose(
        self,
        losses: Float[Array, " n"],
        reference: Float[Array, " n"] | None,
        keep: int,
        *,
        key: PRNGKeyArray,
    ) -> Int[Array, " keep"]:
        """The `keep` chosen of n examples, in the order in which they came.

        `losses` are the mean losses of each under the model that is trained, `reference` under the
        second one.
        """


@register
class RhoLoss(Selector):
    """Those whose loss can be reduced most: the model's own minus that of a model trained elsewhere.

    **Fields**

    - `offers`: from how many batches; No Train No Gain takes 2, and 10 where looking is free.

    The second model (`train(..., reference=model)`) is of the same family, trained on other data; both
    see the same masks, since they see the same examples. Ties go to the earlier example.

    **Example**

        Stage(share=1.0, select=RhoLoss(offers=2))
    """

    offers: Batches = eqx.field(static=True, default=2)
    compares: ClassVar[bool] = True

    def choose(self, losses, reference, keep, *, key):
        del key
        if reference is None:
            raise SelectError(
                "reference: RhoLoss compares with a second model's losses; give it one"
            )
        return jnp.sort(jnp.argsort(reference - losses, stable=True)[:keep])


@register
class SelectiveBackprop(Selector):
    """Hard examples more often: with odds `q ** beta`, where q is the percentile of an example's loss.

    **Fields**

    - `beta`: how strongly; 0 trains on everything that is offered.
    - `offers`: from how many batches; None looks at `beta + 1`, of which the published rule keeps one
      on average.

    The published rule (`LossPool`) keeps each example by a coin of its own and waits until a batch is
    full, so that the cost of a step depends on the losses. Here exactly one batch is drawn without
    replacement, with the same odds, from a fixed number of offers, and percentiles are among those: cost,
    shapes and resuming stay exact. Losses are not re-weighted, on purpose, in either.

    **Example**

        Stage(share=1.0, select=SelectiveBackprop(beta=1.0))
    """

    beta: Annotated[float, ranged(0, 1000)] = eqx.field(static=True, default=1.0)
    offers: Batches = eqx.field(static=True)
    compares: ClassVar[bool] = False

    def __init__(self, beta: float = 1.0, offers: int | None = None):
        self.beta = beta
        known = fits(float, beta) and beta >= 0
        self.offers = (math.ceil(beta + 1) if known else 1) if offers is None else offers

    def choose(self, losses, reference, keep, *, key):
        del reference
        q = percentiles(losses, losses)
        # The largest of log-odds plus Gumbel noise: draws without replacement, one after the other
        noise = jax.random.gumbel(fold_in_name(key, "select"), losses.shape)
        order = jnp.argsort(-(self.beta * jnp.log(q) + noise), stable=True)
        return jnp.sort(order[:keep])


def percentiles(losses: Float[Array, " n"], among: Float[Array, " m"]) -> Float[Array, " n"]:
    """The rank of each loss among others as a share, in (0, 1]: `(#less + #not more + 1) / 2m`.

    The largest of m has 1 and the smallest 1/m; ties share the middle of their ranks.
    """
    ordered = jnp.sort(among)
    less = jnp.searchsorted(ordered, losses, side="left")
    not_more = jnp.searchsorted(ordered, losses, side="right")
    return jnp.minimum((less + not_more + 1) / (2 * among.shape[0]), 1.0)


class LossPool:
    """Selective backprop as published: a coin for every example, and a batch whenever one is full.

    For loops of one's own; a plan takes `SelectiveBackprop`. Examples that were kept wait, with losses
    that grow stale, until there are enough of them.

    **Arguments**

    - `batch`: examples of a batch.
    - `beta`: the power of the percentile.
    - `history`: among how many of the last losses a percentile is taken.

    **Example**

        pool = LossPool(batch=32, beta=1.0, seed=0)
        for rows in stream:
            for batch in pool.offer(rows, losses_of(rows)):
                update(batch)
    """

    def __init__(self, batch: int, beta: float = 1.0, *, history: int = 5000, seed: int = 0):
        faults = [
            f"{name}: expected {what}, got {value}"
            for name, what, value, ok in [
                ("batch", "1 or more", batch, batch >= 1),
                ("beta", "0 or more", beta, beta >= 0),
                ("history", "1 or more", history, history >= 1),
            ]
            if not ok
        ]
        raise_all(SelectError, "this pool cannot be used:", faults)
        self.batch, self.beta = batch, beta
        self.history: collections.deque[float] = collections.deque(maxlen=history)
        self.waiting: collections.deque[Mapping[str, Any]] = collections.deque()
        self.rng = np.random.default_rng(seed)

    def offer(self, rows: Mapping[str, np.ndarray], losses: Any) -> list[dict[str, Any]]:
        """The batches that these examples (and those that wait) fill, first come first served."""
        losses = np.asarray(losses, np.float64)
        self.history.extend(losses.tolist())  # before ranking, so that a loss is among its peers
        q = np.asarray(percentiles(jnp.asarray(losses), jnp.asarray(self.history)))
        for i in np.flatnonzero(self.rng.uniform(size=len(q)) < q**self.beta):
            self.waiting.append({name: values[i] for name, values in rows.items()})
        full = []
        while len(self.waiting) >= self.batch:
            taken = [self.waiting.popleft() for _ in range(self.batch)]
            full.append({name: np.stack([row[name] for row in taken]) for name in taken[0]})
        return full
