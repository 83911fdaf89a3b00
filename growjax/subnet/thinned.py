"""Random tokens: layers in the middle read some of the tokens of a sequence, and pass the others on.

Random-LTD: Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for
Large-scale Transformers", 2022.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from growjax.algebra import AxisMap
from growjax.axes import Axes, axes_of, get, put
from growjax.cards import Card, Paper
from growjax.errors import SubnetError
from growjax.maps import fold_in_name
from growjax.subnet.base import Model, Subnet, check_draw, depth_of
from growjax.values import Size, at_least, check, check_key, register, tuples


_RANDOM_LTD = Paper(
    "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale "
    "Transformers",
    "Yao, Zhewei and Wu, Xiaoxia and Li, Conglong and Holmes, Connor and Zhang, Minjia and Li, Cheng and "
    "He, Yuxiong",
    2022,
    arxiv="2211.11586",
)


@runtime_checkable
class Thinning(Protocol):
    """A stack of blocks that can give each block some of the tokens, such as `growjax.nn.Stacked`."""

    def thinned(self, keys: UInt32[Array, "layers 2"], count: int, keep: tuple[int, ...]) -> Any:
        """The stack whose blocks read `count` tokens each, drawn by a key each but for those of "
        "`keep`."""
        ...


@register
class RandomTokens(Subnet):
    """Random tokens in the layers in the middle; see `random_tokens`."""

    count: Size = eqx.field(static=True)
    stop: Size | None = eqx.field(static=True, default=None)
    steps: Annotated[int, at_least(0, "steps")] = eqx.field(static=True, default=0)
    by: Size = eqx.field(static=True, default=16)
    keep: tuple[int, ...] = eqx.field(static=True, default=(0, -1))
    axis: str = eqx.field(static=True, default="layers")
    card: ClassVar[Card] = Card(
        use="Long sequences: cheaper steps at first by fewer tokens in the layers in the middle, with a "
        "loss on every token.",
        traps=(
            "Each number of tokens is a program of its own: with `by=16` and long sequences there "
            "are many.",
            "The last stretch has to read all tokens, since the model is used so.",
            "First and last layer read all tokens (`keep`); without them the loss suffers.",
        ),
        example="random_tokens(3)",
        papers=(_RANDOM_LTD,),
    )

    def __check_init__(self):
        check(self, SubnetError, "this number of tokens cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if (self.stop is None) != (self.steps == 0):
            yield "stop, steps: the last number of tokens and when; give both or neither"
        elif self.stop is not None and self.stop < self.count:
            yield f"stop: expected {self.count} tokens or more, got {self.stop}"

    def at(self, step: int, *, seed: int = 0) -> "RandomTokens":
        """The number of tokens of one step, a multiple of `by` above the first."""
        check_draw(step, seed)
        return RandomTokens(self._count(step), keep=self.keep, axis=self.axis)

    def steady(self, step: int) -> float:
        """The step at which the number of tokens rises next."""
        if self.stop is None or step >= self.steps:
            return math.inf
        now = self._count(step)
        wanted = min(now - (now - self.count) % self.by + self.by, self.stop)
        return max(
            step + 1, math.ceil((wanted - self.count) / (self.stop - self.count) * self.steps)
        )

    def _count(self, step: int) -> int:
        if self.stop is None:
            return self.count
        if step >= self.steps:
            return self.stop
        more = int((self.stop - self.count) * step / self.steps)
        return self.count + more - more % self.by

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """None: the tokens are no axis of the model."""
        del axes, key, step
        return []

    def __call__(
        self, model: Model, *, key: PRNGKeyArray, step: int | Int[Array, ""] | None = None
    ) -> Model:
        """The model whose layers draw their tokens by this key.

        A sequence of `count` tokens or fewer is read whole. Raises `SubnetError` for a model whose layers
        are not `growjax.nn.Stacked`, and where the number of tokens depends on the step.
        """
        del step
        check_key(key, SubnetError)
        if self.stop is not None:
            raise SubnetError("the number of tokens rises; take tokens.at(step) first")
        table = axes_of(model)
        layers = depth_of(table, self.axis)
        bad = [i for i in self.keep if not -layers <= i < layers]
        if bad:
            raise SubnetError(f"keep: {bad} are not among {layers} {self.axis}")
        keys = jax.random.key_data(jax.random.split(fold_in_name(key, "tokens"), layers))
        places = {s.steps[:-1] for s in table.of_kind("active") if s.own_axis == self.axis}
        stacks = {place: get(model, place) for place in places}
        if not stacks or not all(isinstance(stack, Thinning) for stack in stacks.values()):
            raise SubnetError(
                f"{self.axis}: the blocks of this model cannot read some of the tokens alone; blocks of "
                "growjax.nn.Stacked can"
            )
        thinned = {p: s.thinned(keys, self.count, self.keep) for p, s in stacks.items()}
        return put(model, thinned)


def random_tokens(
    count: int,
    *,
    stop: int | None = None,
    steps: int = 0,
    by: int = 16,
    keep: tuple[int, ...] = (0, -1),
    axis: str = "layers",
) -> RandomTokens:
    """Layers in the middle read `count` random tokens of each sequence, in order (Random-LTD).

    Each layer draws its own; the others pass it unchanged. Positions travel with the tokens, and a token
    sees those before it among the drawn ones. One draw serves all sequences of a step. A step is charged
    for the tokens that each layer reads. Windows, and biases of relative positions (T5), are refused
    (`AxisError`).

    **Arguments**

    - `count`: how many tokens; sequences that are not longer are read whole.
    - `stop`, `steps`: the number rises to `stop` over so many steps, in multiples of `by`. Take the
      length of the sequences, so that training ends on all of them.
    - `keep`: layers that read all tokens (negative counts from the end).
    - `axis`: the stack of layers.

    **Example**

        Stage(tokens=1e9, subnet=gj.random_tokens(128, stop=1024, steps=7_000, by=128))
    """
    return RandomTokens(count, stop, steps, by, tuples(keep), axis)
