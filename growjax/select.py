"""Batch selection: the losses of several batches decide which examples a step trains on.

A run is charged for the forward pass over all examples offered. A selector is a value, like a
sub-network. Its choice is a function of the losses and the key, and always has as many examples as a
batch, so one program serves every step, and a run can resume at any step.

Selective backprop: Jiang et al. 2019 (arXiv 1910.00762). RHO loss: Mindermann et al., ICML 2022. Both as
measured by Kaddour et al., "No Train No Gain", NeurIPS 2023.
"""

import abc
import math
from typing import Annotated, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax.cards import Card, Paper
from growjax.errors import SelectError
from growjax.maps import fold_in_name
from growjax.values import base, check, fits, ranged, register


# How many batches are offered to a selector; all of them are in memory at once
Batches = Annotated[int, ranged(1, 1000, "a number of batches")]


_RHO = Paper(
    "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt",
    "Mindermann, Sören and Brauner, Jan and Razzak, Muhammed and Sharma, Mrinank and Kirsch, Andreas and "
    "Xu, Winnie and Höltgen, Benedikt and Gomez, Aidan N. and Morisot, Adrien and Farquhar, "
    "Sebastian and Gal, Yarin",
    2022,
    "International Conference on Machine Learning",
    "2206.07137",
)
_SELECTIVE = Paper(
    "Accelerating Deep Learning by Focusing on the Biggest Losers",
    "Jiang, Angela H. and Wong, Daniel L.-K. and Zhou, Giulio and Andersen, David G. and Dean, "
    "Jeffrey and Ganger, Gregory R. and Joshi, Gauri and Kaminsky, Michael and Kozuch, Michael and "
    "Lipton, Zachary C. and Pillai, Padmanabhan",
    2019,
    arxiv="1910.00762",
)


@base("a selector such as RhoLoss()")
class Selector(eqx.Module):
    """Chooses the examples of a step from several batches. A selector of your own has a `choose`.

    `offers` is the number of batches to choose from, and `compares` whether it needs the losses of a
    second model. The clock has the price of the forward pass: a clock whose forward passes are free shows
    what a selector would gain if they were.
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
        """The indices of `keep` of n examples, ascending.

        `losses` has the mean loss of each example under the model that is trained, `reference` under the
        second model.
        """


@register
class RhoLoss(Selector):
    """The examples with the most reducible loss: the model's loss minus that of a reference model.

    **Fields**

    - `offers`: the number of batches to choose from; No Train No Gain takes 2, and 10 if forward passes
      are free.

    The reference (`train(..., reference=model)`) is a model of the same family, trained on other data.
    Both models read the same examples with the same masks. Of equal examples the earlier one is chosen.

    **Example**

        Stage(share=1.0, select=RhoLoss(offers=2))
    """

    offers: Batches = eqx.field(static=True, default=2)
    compares: ClassVar[bool] = True
    card: ClassVar[Card] = Card(papers=(_RHO,))

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

    - `beta`: how strongly hard examples are preferred; 0 chooses among all with equal odds.
    - `offers`: the number of batches to choose from; None is `beta + 1`, of which the published rule
      keeps one on average.

    The published rule keeps each example with a probability of its own and waits until a batch is full,
    so the cost of a step depends on the losses. This one draws exactly one batch without replacement,
    with the same odds, from a fixed number of batches, and percentiles are among these. So costs and
    shapes are fixed, and a run resumes exactly. As published, losses are not re-weighted.

    **Example**

        Stage(share=1.0, select=SelectiveBackprop(beta=1.0))
    """

    beta: Annotated[float, ranged(0, 1000)] = eqx.field(static=True, default=1.0)
    offers: Batches = eqx.field(static=True)
    compares: ClassVar[bool] = False
    card: ClassVar[Card] = Card(papers=(_SELECTIVE,))

    def __init__(self, beta: float = 1.0, offers: int | None = None):
        self.beta = beta
        if offers is None:
            # A beta out of its range is refused by `check`, which needs an `offers` first
            valid = fits(float, beta) and beta >= 0
            offers = math.ceil(beta + 1) if valid else 1
        self.offers = offers

    def choose(self, losses, reference, keep, *, key):
        del reference
        q = percentiles(losses, losses)
        # The Gumbel trick: the largest of log-odds plus noise are draws without replacement
        noise = jax.random.gumbel(fold_in_name(key, "select"), losses.shape)
        order = jnp.argsort(-(self.beta * jnp.log(q) + noise), stable=True)
        return jnp.sort(order[:keep])


def percentiles(losses: Float[Array, " n"], among: Float[Array, " m"]) -> Float[Array, " n"]:
    """The rank of each loss among others as a share, in (0, 1]: `(#less + #not more + 1) / 2m`.

    The largest of m has 1 and the smallest 1/m; equal losses share the mean of their ranks.
    """
    ordered = jnp.sort(among)
    less = jnp.searchsorted(ordered, losses, side="left")
    not_more = jnp.searchsorted(ordered, losses, side="right")
    return jnp.minimum((less + not_more + 1) / (2 * among.shape[0]), 1.0)
