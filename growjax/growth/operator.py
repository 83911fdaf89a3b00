"""Growth operators: frozen values that describe, as `AxisMap`s, how a model grows."""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PRNGKeyArray

from growjax import maps, values
from growjax.algebra import AxisMap
from growjax.axes import Axes, axes_of, find, get, put
from growjax.cards import Card
from growjax.errors import AxisError, GrowthError, raise_all
from growjax.values import Size


Exactness = Literal["exact", "exact-given-init", "approximate"]
Model = TypeVar("Model")
_STRENGTH: tuple[Exactness, ...] = ("exact", "exact-given-init", "approximate")


@values.base("an operator such as gj.msg(mlp=2048)")
class Operator(eqx.Module):
    """A growth operator. Subclass it, write `maps`, and everything else follows from the axis table.

    `exactness` is the operator's promise: `"exact"` (the same function whatever the new weights hold),
    `"exact-given-init"` (for the values it chooses itself) or `"approximate"` (expect a jump).
    Fields must be static and hashable, so that an operator can be compared, printed and saved
    (`growjax.values`). `GrowthError` lists every field whose value does not fit its annotation.

    **Example**

        class Interleave(gj.Operator):
            factor: int = eqx.field(static=True)
            exactness = "approximate"

            def maps(self, axes):
                return [gj.AxisMap("layers", np.repeat(np.arange(axes.size("layers")), self.factor))]
    """

    exactness: ClassVar[Exactness]
    # The function that makes it, where that is not the class's name in small letters
    written: ClassVar[str] = ""
    # When to use it, its traps and its papers: for `gj.cite` and for the pages of the operators
    card: ClassVar[Card] = Card()
    # Whether it has all of its numbers; one that has not is fitted before it grows (`growth.fits`)
    fitted: ClassVar[bool] = True

    def __check_init__(self):
        values.check(self, GrowthError)

    @property
    def trains(self) -> bool:
        """Whether growing itself trains something, which a plan charges."""
        return False

    @abc.abstractmethod
    def maps(self, axes: Axes) -> Sequence[AxisMap]:
        """The index maps of this operator on a model with these axes, at most one per axis."""

    def __call__(self, model: Model, *, key: PRNGKeyArray | None = None) -> Model:
        """The grown model, as by `gj.grow`: pure, and traceable by `jit`, `vmap` and `grad`.

        Of shapes (`jax.ShapeDtypeStruct`) it is the shapes of the grown model.
        """
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
            return eqx.filter_eval_shape(self, model, key=key)
        for op in atoms(self):
            for move in op.maps(axes_of(model)):
                model = maps.apply(move, model, key)
            model = op.completed(model)
        return model

    def completed(self, model: Model) -> Model:
        """The model after the maps, with what no map moves (a static record, say) brought up to date.

        By default nothing is left to do. It changes no array.
        """
        return model

    def __repr__(self) -> str:
        """As it would be written: `msg(mlp=2048, init='zeros')`."""
        arguments = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("sizes", "matrices"):
                arguments += [f"{axis}={size}" for axis, size in value]
            elif value != field.default:
                arguments.append(f"{field.name}={getattr(value, '__name__', repr(value))}")
        return f"{self.written or type(self).__name__.lower()}({', '.join(arguments)})"


# The most operators of a chain. A plan of shapes is grown by each of them when it is checked.
_ATOMS = 256


@values.register
class Chain(Operator):
    """Operators applied one after the other; made by `chain`. All share the key of a call.

    (Draws are told apart by the leaf and by the index of the coordinate.)
    """

    operators: tuple[Operator, ...]

    def __check_init__(self):
        number = len(atoms(self))
        if number > _ATOMS:
            raise GrowthError(f"operators: expected at most {_ATOMS} in a chain, got {number:,}")
        for op in self.operators:
            check_fitted(op)

    @property
    def trains(self) -> bool:
        """Whether one of its members does."""
        return any(op.trains for op in self.operators)

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """The weakest promise of its members."""
        promises = [_STRENGTH.index(op.exactness) for op in self.operators]
        return _STRENGTH[max(promises, default=0)]

    def maps(self, axes: Axes) -> Sequence[AxisMap]:
        """The maps of a chain of one operator; those of a later one depend on the grown model."""
        if len(atoms(self)) > 1:
            raise GrowthError(
                f"{self}: the maps of a later operator are those of the grown model; take the maps of "
                "one after the other: gj.growth.atoms(chain)"
            )
        return [move for op in atoms(self) for move in op.maps(axes)]

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.operators))})"


def chain(*operators: Operator) -> Chain:
    """Compose operators, first to last.

    **Example**

        gj.chain(gj.msg(mlp=2048), gj.stack(layers=12))
    """
    for op in operators:
        check_operator(op)
    return Chain(tuple(atom for op in operators for atom in atoms(op)))


def check_operator(op: Any) -> None:
    """Raise `GrowthError` for what is no operator, and for one that must be fitted first."""
    if not isinstance(op, Operator):
        raise GrowthError(f"op: expected an operator such as gj.msg(mlp=2048), got {op!r}")
    check_fitted(op)


def check_fitted(op: Operator) -> None:
    """Raise `GrowthError` for an operator that must be fitted first."""
    if not op.fitted:
        raise GrowthError(
            f"op: {op} is fitted to batches before it grows: use growjax.fitting.fit(op, model, batches, "
            "loss, key=key), or give it to a stage of a plan, alone"
        )


def atoms(op: Operator) -> tuple[Operator, ...]:
    """The single operators that a chain, or an operator, consists of."""
    return tuple(a for o in op.operators for a in atoms(o)) if isinstance(op, Chain) else (op,)


def grow(
    op: Operator, model: Model, *, key: PRNGKeyArray | None = None, donate: bool = False
) -> Model:
    """Grow a model: one jit-compiled, pure call of the operator. (`gj.grow` grows a `gj.State` too.)

    **Arguments**

    - `op`: an operator or a chain.
    - `key`: needed by operators that draw new coordinates.
    - `donate`: free the old arrays that grew (shapes change, so they can never be reused).

    Leaves that no map touches are not copied: both models hold the same arrays. Under `jit`, `grad`,
    `vmap` (of a stack of models, say) and `eval_shape` it is the operator itself, with the same value.

    Raises `GrowthError` for parameters that are not finite, unless they are traced, and whatever the
    operator's maps raise (`AxisError`, `GateError`, `GrowthError`), always before anything is computed.

    **Example**

        big = gj.grow(gj.msg(mlp=2048), small, key=jax.random.key(0))
    """
    check_operator(op)
    values.check_key(key, GrowthError)
    abstract = Tracer | jax.ShapeDtypeStruct
    if any(isinstance(leaf, abstract) for leaf in jax.tree.leaves((model, key))):
        # Under a transformation no values can be checked, and no arrays shared or freed
        return op(model, key=key)
    table = axes_of(model)
    floating = [s for s in table.values() if s.arrays() and s.kind in ("param", "buffer")]
    finite = jax.device_get(_finite([slot.value for slot in floating]))
    raise_all(
        GrowthError,
        "these leaves are not finite, and 0 times infinity is not 0:",
        [slot.path for slot, ok in zip(floating, finite, strict=True) if not ok],
    )
    grown = _moved(op, model, key)
    untouched = {
        s.steps: s.value for s in table.values() if s.arrays() and get(grown, s.steps) is None
    }
    grown = put(grown, untouched)
    if donate:
        free(model, grown)
    return grown


def free(old: Any, grown: Any) -> None:
    """Delete the arrays of one tree that another does not hold.

    An array may stand at several places, of which some have grown and others have not. Under a
    transformation nothing is freed.
    """
    leaves = jax.tree.leaves(old)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    held = {id(leaf) for leaf in jax.tree.leaves(grown)}
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and id(leaf) not in held:
            leaf.delete()


@eqx.filter_jit
def _moved(op, model, key):
    """The grown model without the leaves that nothing touches: a program would copy them."""
    small = model
    untouched = {slot.steps for slot in axes_of(model).values() if slot.arrays()}
    for atom in atoms(op):
        table = axes_of(model)
        for move in atom.maps(table):
            untouched -= maps.touched(move, model)
        model = atom(model, key=key)
    # An operator may have a call of its own, which changes more than its maps do
    untouched = {steps for steps in untouched if find(model, steps) is find(small, steps)}
    return put(model, dict.fromkeys(untouched))


@jax.jit
def _finite(arrays):
    # 0 times an infinity or NaN is NaN; the sum is vectorised, unlike `all`
    return [jnp.sum(0 * a) == 0 for a in arrays]


# Requests for sizes --------------------------------------------------------------------------


def resolve(axes: Axes, requested: Mapping[str, int], *, shrink: bool = False) -> dict[str, int]:
    """Turn requested sizes into axis sizes; raises `GrowthError` that lists everything wrong.

    `heads` means query heads: it grows `kv_heads` where every head has its own keys and values, and
    the `group` inside each of them where they are shared. Equal sizes are left out.
    """
    wanted = dict(requested)
    complaints = []
    if "heads" in wanted and "heads" not in axes.sizes and "group" in axes.sizes:
        heads = wanted.pop("heads")
        shared = axes.size("group") > 1
        kv_heads = wanted.get("kv_heads", axes.size("kv_heads") if shared else heads)
        if kv_heads <= 0 or heads % kv_heads:
            complaints.append(
                f"heads={heads} cannot be shared evenly by {kv_heads} key/value heads; choose a "
                "multiple, or set kv_heads as well"
            )
        else:
            wanted |= {"kv_heads": kv_heads, "group": heads // kv_heads}
            if heads // kv_heads < axes.size("group") and not shrink:
                complaints.append(
                    f"heads={heads} over {kv_heads} kv_heads leaves {heads // kv_heads} queries a head, "
                    f"fewer than the model's {axes.size('group')}; ask for more heads"
                )
                del wanted["group"]
    for axis, size in wanted.items():
        old = axes.size(axis)
        if not values.fits(Size, size):
            complaints += values.faults(Size, size, axis)
        elif size < old and not shrink:
            complaints.append(
                f"{axis}={size} is smaller than the model's {old}; growth never shrinks (a "
                "gj.random_path or gj.random_part does, for one step)"
            )
    raise_all(GrowthError, "these sizes cannot be reached:", complaints)
    return {axis: size for axis, size in wanted.items() if size != axes.size(axis)}


def adds(axes: Axes, axis: str) -> str:
    """The operators that grow an axis of layers, or of rows that are looked up, for messages."""
    if "stack" in axes.roles(axis):
        return (
            "gj.stack adds layers (on the command line: stack, or expand, which keeps the function)"
        )
    return (
        "gj.vocabulary adds words, gj.positions positions and gj.experts experts (on the command line: "
        f'--by "vocabulary({axes.size(axis) + 64})")'
    )


def frozen_sizes(sizes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Sizes and lists of sources as a hashable field; NumPy's integers and lists become Python's."""
    return values.tuples(sizes)


def _size_faults(sizes: Any, lists: bool = False, none: bool = False) -> Iterator[str]:
    if not sizes and not none:
        yield "sizes: expected at least one axis and the size to reach, such as mlp=2048"
    named = [axis for axis, _ in sizes]
    for axis in dict.fromkeys(axis for axis in named if named.count(axis) > 1):
        yield f"{axis}: given more than once; give each axis one size"
    for axis, size in sizes:
        if lists and isinstance(size, tuple):
            if not size or not all(values.fits(int, i) for i in size):
                yield f"{axis}: expected the old index of every new coordinate, got {values.short(size)}"
        else:
            yield from values.faults(Size, size, axis)


# Axes and the sizes to reach; with lists, the source of every new coordinate will do as well
Sizes = Annotated[
    tuple[tuple[str, Any], ...],
    values.Faults("sizes such as mlp=2048", _size_faults),
]
SizesOrLists = Annotated[
    tuple[tuple[str, Any], ...],
    values.Faults("sizes such as mlp=2048", functools.partial(_size_faults, lists=True)),
]
# Those of an operator that also does something without any
AnySizes = Annotated[
    tuple[tuple[str, Any], ...],
    values.Faults("sizes such as mlp=2048", functools.partial(_size_faults, none=True)),
]


def split_lists(
    axes: Axes, sizes: Sequence[tuple[str, Any]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Explicit lists of sources, checked, and the sizes that `resolve` makes of the rest."""
    lists = {axis: size for axis, size in sizes if isinstance(size, tuple)}
    complaints = []
    for axis, source in lists.items():
        bad = sorted({i for i in source if not 0 <= i < axes.size(axis)})
        if bad:
            complaints.append(
                f"axis {axis!r}: source {bad} is not among the {axes.size(axis)} old coordinates"
            )
    raise_all(AxisError, "these lists of sources do not fit the model:", complaints)
    resolve(axes, {axis: len(source) for axis, source in lists.items()})
    return lists, resolve(axes, {axis: size for axis, size in sizes if axis not in lists})
