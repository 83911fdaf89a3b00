"""Upcycling: experts from a dense feed-forward, and more experts from some.

Komatsuzaki et al., "Sparse Upcycling", ICLR 2023; He et al., "Upcycling Large Language Models into
Mixture of Experts", 2024 (fine-grained); Nakamura et al., "Drop-Upcycling", ICLR 2025; "Expert
Upcycling", arXiv:2604.19835, 2026.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from growjax import values
from growjax.algebra import NONE, AxisMap, Init
from growjax.axes import Axes, Role, Slot, put
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.operator import Exactness, Operator
from growjax.maps import fold_in_name
from growjax.values import Size


AXIS = "experts"  # as `growjax.nn.Experts` names it


_UPCYCLED = Paper(
    "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    "Komatsuzaki, Aran and Puigcerver, Joan and Lee-Thorp, James and Riquelme Ruiz, Carlos and Mustafa, "
    "Basil and Ainslie, Joshua and Tay, Yi and Dehghani, Mostafa and Houlsby, Neil",
    2023,
    "International Conference on Learning Representations",
    "2212.05055",
)
_FINE_GRAINED = Paper(
    "Upcycling Large Language Models into Mixture of Experts",
    "He, Ethan and Khattar, Abhinav and Prenger, Ryan and Korthikanti, Vijay and Yan, Zijie and Liu, "
    "Tong and Fan, Shiqing and Aithal, Ashwath and Shoeybi, Mohammad and Catanzaro, Bryan",
    2024,
    arxiv="2410.07524",
)
_DROPPED = Paper(
    "Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization",
    "Nakamura, Taishi and Akiba, Takuya and Fujii, Kazuki and Oda, Yusuke and Yokota, Rio and "
    "Suzuki, Jun",
    2025,
    "International Conference on Learning Representations",
    "2502.19261",
)
_MORE_EXPERTS = Paper(
    "Expert Upcycling: Shifting the Compute-Efficient Frontier of Mixture-of-Experts",
    "Dwivedi, Chaitanya and Huang, Binxuan and Gupta, Himanshu and Jayarao, Pratik and Varshney, "
    "Neeraj and Yin, Bing",
    2026,
    arxiv="2604.19835",
)


class ExpertMap(AxisMap):
    """A map along `experts`, whose copies share their gradient and whose entries may be redrawn.

    No leaf consumes the experts of a model: the softmax over the chosen ones divides their outputs. So
    copies get equal parts of a gradient although no leaf takes a share.

    - `via`: the axis of the residual stream.
    - `options`: those of the experts that are made of dense feed-forwards; None for experts that exist.
    - `factor`: multiplies the number of experts a token uses.
    - `alike`: the number of experts whose router columns are drawn as one; 0 copies the old columns.
    - `drop`, `per_matrix`: the share of hidden units redrawn in each expert (see `upcycle`).
    - `noise`: of copies (see `experts`).
    """

    options: tuple[tuple[str, Any], ...] | None = eqx.field(static=True, default=None)
    factor: int = eqx.field(static=True, default=1)
    alike: int = eqx.field(static=True, default=0)
    drop: float = eqx.field(static=True, default=0.0)
    per_matrix: bool = eqx.field(static=True, default=False)
    noise: float = eqx.field(static=True, default=0.0)

    @property
    def born(self) -> bool:
        return self.options is not None

    def dual(self, role: Role) -> Any:
        """Copies get equal parts of the gradient."""
        counts = np.bincount(self.source[self.source >= 0], minlength=1)
        if role not in ("produced", "lookup") or self.gated or counts.max(initial=1) == 1:
            return None
        return np.where(self.source < 0, 1.0, 1 / np.maximum(counts, 1)[self.source])

    def opened(self, model: Any) -> Any:
        """The model with one expert of each feed-forward, or with more experts a token."""
        if self.options is not None:
            return _with_experts(model, dict(self.options))
        return model if self.factor == 1 else _with_more_per_token(model, self.factor)

    def finished(self, slot: Slot, array: Array, *, key: PRNGKeyArray | None) -> Array:
        """A leaf after the gather, with its router columns, dropped units or noise drawn."""
        routes = any(dim.axis == self.axis and dim.role == "produced" for dim in slot.dims)
        draws = self.alike if routes else self.drop or self.noise
        if routes and not self.alike and not (self.noise and self.factor == 1):
            return array
        if not draws and not routes:
            return array
        if key is None:
            raise GrowthError("this operator draws new coordinates: pass key=jax.random.key(...)")
        if routes:
            return self._routed(slot, array, key)
        if self.drop and self._units(slot) is not None:
            array = self._dropped(slot, array, key)
        if self.noise and self.factor > 1:
            array = self._with_noise(slot, array, key)
        return array

    def _routed(self, slot: Slot, array: Array, key: PRNGKeyArray) -> Array:
        """Router columns: fresh ones, equal within each group, or copies with noise."""
        (dim,) = slot.positions(self.axis)
        named = fold_in_name(key, f"{slot.path}:{self.axis}")
        shape = tuple(n for i, n in enumerate(array.shape) if i != dim)

        def draw(index):
            return jax.random.normal(jax.random.fold_in(named, index), shape, array.dtype)

        index = np.arange(self.length)
        if self.alike:
            # A deviation of 0.02, as in "Sparse Upcycling"
            columns = 0.02 * jax.vmap(draw)(jnp.asarray(index // self.alike))
            return jnp.moveaxis(columns, 0, dim)
        columns = jnp.moveaxis(jax.vmap(draw)(jnp.asarray(index)), 0, dim)
        new = self.is_new().reshape((-1,) + (1,) * (array.ndim - dim - 1))
        return array + jnp.where(new, self.noise * _deviation(array) * columns, 0)

    def _dropped(self, slot: Slot, array: Array, key: PRNGKeyArray) -> Array:
        """Some hidden units of each expert redrawn with mean and deviation of what they replace."""
        units, path = self._units(slot), slot.path
        assert units is not None
        lead = [
            i for i, dim in enumerate(slot.dims) if dim.role == "stack" or dim.axis == self.axis
        ]
        # One set of units for all matrices of an expert, in every layer
        owner = path if self.per_matrix else path.rpartition(".")[0]
        count = round(self.drop * array.shape[units])
        if not count:
            return array
        scores = jax.random.uniform(
            fold_in_name(key, f"{owner}:drop"), [array.shape[i] for i in (*lead, units)]
        )
        rank = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)
        chosen = rank < count
        mask = chosen.reshape([n if i in (*lead, units) else 1 for i, n in enumerate(array.shape)])
        over = tuple(i for i in range(array.ndim) if i not in lead)
        mask = jnp.broadcast_to(mask, array.shape)
        mean = jnp.mean(jax.lax.stop_gradient(array), over, where=mask, keepdims=True)
        deviation = _deviation(array, over, where=mask, keepdims=True)
        noise = jax.random.normal(fold_in_name(key, f"{path}:drop"), array.shape, array.dtype)
        return jnp.where(mask, mean + deviation * noise, array)

    def _with_noise(self, slot: Slot, array: Array, key: PRNGKeyArray) -> Array:
        """Noise that sums to zero over the copies of an expert, in leaves that write the stream."""
        if not any(dim.axis == self.via and dim.role == "produced" for dim in slot.dims):
            return array
        (dim,) = slot.positions(self.axis)
        draws = jax.random.normal(
            fold_in_name(key, f"{slot.path}:{self.axis}"), array.shape, array.dtype
        )
        # [copy, source]: copies follow one another, all sources in turn
        sources = self.length // self.factor
        others = np.delete(array.shape, dim)
        draws = jnp.moveaxis(draws, dim, 0).reshape(self.factor, sources, *others)
        draws = (draws - jnp.mean(draws, 0)).reshape(self.length, *others)
        return array + self.noise * _deviation(array) * jnp.moveaxis(draws, 0, dim)

    def _units(self, slot: Slot) -> int | None:
        """The dimension of an expert's array that holds its hidden units; None if it has none."""
        inner = [
            i
            for i, dim in enumerate(slot.dims)
            if dim.role in ("consumed", "produced") and dim.axis not in (self.axis, self.via)
        ]
        return inner[0] if inner else None


def _deviation(array: Array, *args: Any, **options: Any) -> Array:
    """The standard deviation, a constant to a gradient: that of a constant array is no number."""
    return jnp.std(jax.lax.stop_gradient(array), *args, **options)


def _stream(axes: Axes) -> str:
    """The axis of the residual stream, which tables produce and norms read; `embed` without one."""
    streams = (axis for axis in axes.sizes if axes.is_stream(axis) and axes.normalised(axis))
    return next(streams, "embed")


def _with_experts(model: Any, options: dict[str, Any]) -> Any:
    """The model with every block that can hold experts given one of each."""
    holds = lambda node: hasattr(type(node), "with_experts")  # noqa: E731
    if not any(map(holds, jax.tree.leaves(model, is_leaf=holds))):
        raise GrowthError(
            f"{type(model).__name__} has no block that can hold experts: a block with a method "
            "`with_experts(**options)`, such as growjax.nn.Block"
        )
    return jax.tree.map(
        lambda n: n.with_experts(**options) if holds(n) else n, model, is_leaf=holds
    )


def _with_more_per_token(model: Any, factor: int) -> Any:
    """The model with so many times the experts a token."""
    chooses = lambda node: hasattr(type(node), "per_token")  # noqa: E731

    def more(node):
        return put(node, {("per_token",): factor * node.per_token}) if chooses(node) else node

    return jax.tree.map(more, model, is_leaf=chooses)


_Share = Annotated[float, values.ranged(0, 1, "a share")]


@values.register
class Upcycle(Operator):
    """Experts from a dense feed-forward; see `upcycle`."""

    experts: Size = eqx.field(static=True)
    per_token: Size = eqx.field(static=True, default=2)
    granularity: Size = eqx.field(static=True, default=1)
    drop: _Share = eqx.field(static=True, default=0.0)
    per_matrix: bool = eqx.field(static=True, default=False)
    norm_topk_prob: bool = eqx.field(static=True, default=True)
    aux_loss_coef: Annotated[float, values.at_least(0)] = eqx.field(static=True, default=0.01)
    z_loss_coef: Annotated[float, values.at_least(0)] = eqx.field(static=True, default=0.001)
    card: ClassVar[Card] = Card(
        use="A mixture of experts from a trained dense model.",
        traps=(
            "Where the softmax is taken before the choice (`norm_topk_prob=False`) the weights of the "
            "chosen experts do not sum to one, and the loss jumps.",
            "Fine-grained experts need the output weights alone multiplied by the granularity: "
            "scaling all three matrices by its cube root is off under SiLU.",
            "Experts are equal at first, and only the router's draw tells tokens apart.",
            "GPT, Llama and Decoder read the balancing losses of their blocks; a BERT or a T5 does not, "
            "and cannot be called once it is a mixture.",
        ),
        example="upcycle(experts=4)",
        papers=(_UPCYCLED,),
        by={"fine": (_FINE_GRAINED,), "drop": (_DROPPED,)},
    )

    def __check_init__(self):
        values.check(self, GrowthError)
        faults = []
        if self.per_token > self.experts:
            faults.append(
                f"per_token: {self.per_token} experts cannot be chosen from {self.experts}"
            )
        if self.experts % self.granularity:
            faults.append(
                f"experts: {self.experts} experts are no whole groups of {self.granularity} shards; "
                "give a multiple of the granularity"
            )
        if self.per_token % self.granularity:
            faults.append(
                f"per_token: {self.per_token} experts a token are no whole groups of "
                f"{self.granularity} shards; give a multiple of the granularity"
            )
        raise_all(GrowthError, "a dense feed-forward cannot be upcycled so:", faults)

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """Copies are exact if the weights of the chosen ones sum to one."""
        sums_to_one = self.norm_topk_prob or self.per_token == self.experts
        return "approximate" if self.drop or not sums_to_one else "exact-given-init"

    @property
    def fine(self) -> bool:
        """Whether experts are shards of the dense feed-forward."""
        return self.granularity > 1

    def maps(self, axes: Axes) -> list[AxisMap]:
        """The axis is born with one expert for every shard of the hidden units, and copied."""
        groups = self.granularity
        if AXIS in axes.sizes:
            raise GrowthError(
                f"the model has {axes.size(AXIS)} experts already; gj.experts makes more of them"
            )
        options = {
            "granularity": groups,
            "per_token": self.per_token,
            "norm_topk_prob": self.norm_topk_prob,
            "aux_loss_coef": self.aux_loss_coef,
            "z_loss_coef": self.z_loss_coef,
        }
        return [
            ExpertMap(
                AXIS,
                np.arange(self.experts) % groups,
                via=_stream(axes),
                options=tuple(options.items()),
                alike=groups,
                drop=self.drop,
                per_matrix=self.per_matrix,
            )
        ]


def upcycle(
    *,
    experts: int,
    per_token: int = 2,
    granularity: int = 1,
    drop: float = 0.0,
    per_matrix: bool = False,
    norm_topk_prob: bool = True,
    aux_loss_coef: float = 0.01,
    z_loss_coef: float = 0.001,
) -> Upcycle:
    """Make every dense feed-forward a mixture of `experts`, copies of it behind a fresh router.

    A token's experts are copies, so the function is kept if their weights sum to 1: with
    `norm_topk_prob=True` (top-k, then softmax) for any router, or where `per_token` is `experts`
    (`"exact-given-init"`). With `norm_topk_prob=False` a jump is expected (`"approximate"`).

    **Arguments**

    - `experts`, `per_token`: the number of experts, and how many of them each token uses.
    - `granularity`: the number of shards that the hidden units are split into, one for each expert of a
      group (fine-grained experts, of `mlp / granularity` units). Router columns are equal within a group,
      so that a group is chosen whole, and the weights that read the hidden units are multiplied by
      `granularity`: exact for any activation. Both numbers must be multiples of it.
    - `drop`: Drop-Upcycling: in each expert this share of the hidden units (the paper finds 0.5 best) is
      redrawn, with the mean and deviation of the entries that they replace, matrix by matrix.
      `"approximate"`.
    - `per_matrix`: whether each matrix of an expert draws a set of units of its own, as the published
      code does; the paper has one set for all of them.
    - `norm_topk_prob`, `aux_loss_coef`, `z_loss_coef`: see `growjax.nn.Experts`.

    The experts, and the router, are new coordinates: optimizer state of both starts anew, since every
    expert will see other tokens than the dense feed-forward did. `GrowthError` lists what does not fit.

    **Example**

        big = gj.grow(gj.upcycle(experts=8, per_token=2), small, key=key)
        fine = gj.upcycle(experts=16, per_token=4, granularity=4)      # of a quarter of the units
        gj.upcycle(experts=8, drop=0.5)                                # Drop-Upcycling
    """
    return Upcycle(
        experts,
        per_token,
        granularity,
        drop,
        per_matrix,
        norm_topk_prob,
        aux_loss_coef,
        z_loss_coef,
    )


PerToken = Literal["kept", "scaled"]


@values.register
class Experts(Operator):
    """More experts from those there are; see `experts`."""

    number: Size = eqx.field(static=True)
    gated: bool = eqx.field(static=True, default=True)
    per_token: PerToken = eqx.field(static=True, default="kept")
    noise: Annotated[float, values.at_least(0)] = eqx.field(static=True, default=0.0)
    init: Init | Literal["copy"] = eqx.field(static=True, default="copy")
    card: ClassVar[Card] = Card(
        use="More experts for a mixture in the middle of training, at the same number a token.",
        traps=(
            "Plain copies with the same number of experts a token are not exact: both copies of the "
            "winner are chosen, and another expert's slot is lost.",
            "The balancing losses depend on the number of experts; behind a gate they do not jump.",
        ),
        example="experts(5)",
        by={"copied": (_MORE_EXPERTS,)},
    )

    def __check_init__(self):
        values.check(self, GrowthError, "experts cannot grow so:", self._faults)

    def _faults(self) -> Iterator[str]:
        if self.gated and self.per_token == "scaled":
            yield "gated: new experts behind a gate keep per_token; give gated=False"
        if self.gated and self.noise:
            yield "noise: is for copies without a gate; give gated=False, or an init"
        if not self.gated and self.init != "copy":
            yield f"init: new experts without a gate are copies, got {values.short(self.init)}"

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """Behind gates for any content; by copies if as many more are chosen."""
        if self.gated:
            return "exact"
        return "exact-given-init" if self.per_token == "scaled" else "approximate"

    @property
    def copied(self) -> bool:
        """Whether new experts are copies that are chosen at once."""
        return not self.gated

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Copies in turn after the old experts, or fresh ones."""
        if AXIS not in axes.sizes:
            raise GrowthError("the model has no experts; gj.upcycle makes some of a dense one")
        old = axes.size(AXIS)
        faults = []
        if self.number < old:
            faults.append(f"experts: {self.number} is smaller than the model's {old}")
        elif self.per_token == "scaled" and self.number % old:
            faults.append(
                f"experts: per_token='scaled' needs as many copies of each; {self.number} is no multiple "
                f"of {old}"
            )
        raise_all(GrowthError, "these experts cannot be reached:", faults)
        if self.number == old:
            return []
        index = np.arange(self.number)
        source = index % old if self.init == "copy" else np.where(index < old, index, NONE)
        init: Init = "normal" if self.init == "copy" else self.init
        factor = self.number // old if self.per_token == "scaled" else 1
        return [
            ExpertMap(
                AXIS,
                source,
                via=_stream(axes),
                gated=self.gated,
                init=init,
                factor=factor,
                noise=self.noise,
            )
        ]

    def __repr__(self) -> str:
        return super().__repr__().replace("number=", "", 1)


def experts(
    number: int,
    *,
    gated: bool = True,
    per_token: PerToken = "kept",
    noise: float = 0.0,
    init: Init | Literal["copy"] = "copy",
) -> Experts:
    """Grow a mixture to `number` experts: behind a gate, or by copies.

    Behind a gate (`"exact"`) new experts have the router bias log(level). At level 0 they are never
    chosen, whatever they hold; `gj.ramp` opens them and `gj.settle` drops the gate. The auxiliary loss
    does not jump either.

    **Arguments**

    - `gated`: False makes plain copies, with their router columns. Two copies then compete with each
      other: with `per_token="kept"` the winner's copy fills a slot of another expert (`"approximate"`).
    - `per_token`: `"scaled"` multiplies the experts a token by the number of copies, which must be equal
      for all. All copies of a chosen expert are then chosen, each with an equal part of its weight
      (`"exact-given-init"`), at as many times the FLOPs.
    - `noise`: for copies without a gate, relative to the deviation of an array. Equal copies that are
      always chosen together get equal gradients for ever. With `"scaled"` noise that sums to zero over
      the copies of an expert is added to their output weights, and the function is kept; with `"kept"`
      noise is added to the router columns of the new copies.
    - `init`: for gated experts: `"copy"` (old experts in turn), or how fresh ones are drawn, as in
      `gj.msg`.

    Moments of plain copies are divided among them; gated copies start anew. `GrowthError` lists what does
    not fit.

    **Example**

        big = gj.grow(gj.experts(16), small, key=key)                         # from 8, gates at 0
        big = gj.settle(gj.ramp(big, 1.0))
        gj.experts(16, gated=False, per_token="scaled", noise=0.01)           # from 8, 2 a token to 4
    """
    return Experts(number, gated, per_token, noise, init)
