"""Specs: one line of text that names the dimensions of an array, and the sizes that follow from many.

A *spec* names the dimensions in order. The arrow points from the axes that a leaf consumes to
those that it produces, either way round (`"mlp <- embed"` is a `[mlp, embed]` array that consumes
`embed`), and several arrows may be mixed. Around a name:

    embed          no arrow: elementwise (a gain multiplies coordinate by coordinate)
    ~embed         elementwise, and the statistics of a norm are taken over this axis
    [vocab]        looked up by index, not contracted
    <embed>        not a dimension: the leaf scales like a mean square over embed (a norm's epsilon)
    <~embed>       the same of a variance: the norm subtracts its mean (a LayerNorm's epsilon)
    (heads dim)    one dimension of the array that holds two axes, the first one slower
    (3 heads dim)  a number is an axis of that size, which never grows
    (q + k)        one dimension that holds blocks one after the other; every block may have its own
                   arrows: `(heads group dim <- + heads <- dim + heads dim <-) embed`
    layers: ...    before a colon: leading stack axes (`stacked` and `Stacked` add them themselves)
    {axis}         filled in from an attribute of the module
"""

import bisect
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from growjax.errors import AxisError, raise_all


Role = Literal["consumed", "produced", "elementwise", "lookup", "stack"]
_TOKEN = re.compile(r"->|<-|[()]|\[\w+\]|<~?\w+>|~?\w+|\S")
_NAME = re.compile(r"~?[A-Za-z_]\w*|\[[A-Za-z_]\w*\]|[1-9]\d*")
_SUM = re.compile(r"\(([^()]*\+[^()]*)\)")


class Dim(NamedTuple):
    """One axis of one leaf: its name (or number), its role and whether a norm averages over it."""

    axis: str
    role: Role
    normalised: bool = False

    @property
    def literal(self) -> bool:
        """Whether it is a number, the size of an axis that never grows."""
        return self.axis.isdigit()

    def size(self, sizes: Mapping[str, int]) -> int:
        """Its size, given those of all axes."""
        return int(self.axis) if self.literal else sizes[self.axis]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A parsed spec. `groups[i]` is the number of axes that share dimension i of the array.

    Where dimension `summed` is a sum, `parts` are the specs of its terms, and `dims` has every axis of
    theirs.
    """

    dims: tuple[Dim, ...]
    groups: tuple[int, ...]
    means: tuple[str, ...] = ()
    variances: tuple[str, ...] = ()
    parts: tuple["Spec", ...] = ()
    summed: int = 0

    @staticmethod
    @functools.cache
    def parse(text: str) -> "Spec":
        """Read a spec; raises `AxisError` that names the fault.

        **Example**

            Spec.parse("embed -> kv_heads head_dim").dims[0] == Dim("embed", "consumed")
        """
        if sums := list(_SUM.finditer(text)):
            return _parse_sum(text, sums)
        stack, _, body = text.rpartition(":")
        tokens = _TOKEN.findall(body)
        arrows = [i for i, token in enumerate(tokens) if token in ("->", "<-")]

        def role(i: int) -> Role:
            left = max((a for a in arrows if a < i), default=None)
            right = min((a for a in arrows if a > i), default=None)
            into = [left is not None and tokens[left] == "->"]
            into.append(right is not None and tokens[right] == "<-")
            out = [left is not None and tokens[left] == "<-"]
            out.append(right is not None and tokens[right] == "->")
            if any(into) and any(out):
                raise AxisError(
                    f"spec {text!r}: {tokens[i]!r} lies between arrows that make it both "
                    "consumed and produced; let every arrow point from consumed to produced"
                )
            return "produced" if any(into) else "consumed" if any(out) else "elementwise"

        for name in stack.split():
            if not name.isidentifier():
                raise AxisError(f"spec {text!r}: cannot read {name!r}")
        dims = [Dim(name, "stack") for name in stack.split()]
        groups, open_group = [1] * len(dims), None
        means, variances = list[str](), list[str]()
        for i, token in enumerate(tokens):
            if token in ("->", "<-"):
                continue
            elif token == "(" and open_group is None:
                open_group = len(dims)
            elif token == ")" and open_group is not None and open_group < len(dims):
                groups.append(len(dims) - open_group)
                open_group = None
            elif re.fullmatch(r"<~?[A-Za-z_]\w*>", token):
                (variances if "~" in token else means).append(token.strip("<~>"))
            elif (
                token == "*"
                and open_group is not None
                and {tokens[i - 1], *tokens[i + 1 : i + 2]}.isdisjoint("()*")
            ):
                continue  # `(2 * state)` is `(2 state)`
            elif _NAME.fullmatch(token):
                name = token.strip("[]~")
                looked_up = token.startswith("[")
                dims.append(Dim(name, "lookup" if looked_up else role(i), token.startswith("~")))
                if open_group is None:
                    groups.append(1)
            else:
                raise AxisError(f"spec {text!r}: cannot read {token!r}")
        if open_group is not None:
            raise AxisError(f"spec {text!r}: a bracket is not closed")
        return Spec(tuple(dims), tuple(groups), tuple(means), tuple(variances))

    @property
    def terms(self) -> tuple[tuple[tuple[Dim, ...], ...], ...]:
        """For each dimension of the array, the groups of axes whose products add up to its length."""
        if self.parts:
            terms = list(self.parts[0].terms)
            terms[self.summed] = tuple(part.terms[self.summed][0] for part in self.parts)
            return tuple(terms)
        ends = itertools.accumulate(self.groups)
        return tuple((self.dims[n - k : n],) for n, k in zip(ends, self.groups, strict=True))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of an array whose axes have these sizes."""
        return tuple(
            sum(math.prod(dim.size(sizes) for dim in term) for term in terms)
            for terms in self.terms
        )


def _parse_sum(text: str, sums: list[re.Match]) -> Spec:
    """A spec one of whose dimensions is a sum: that of every term, put in the place of the sum."""
    if len(sums) > 1:
        raise AxisError(f"spec {text!r}: only one dimension of an array may be a sum")
    before, after = text[: sums[0].start()], text[sums[0].end() :]
    parts = tuple(Spec.parse(f"{before}({term}){after}") for term in sums[0][1].split("+"))
    dims: list[Dim] = []
    groups: list[int] = []
    for alike in zip(*(part.terms for part in parts), strict=True):
        every = dict.fromkeys(dim for (group,) in alike for dim in group)
        dims += every
        groups.append(len(every))
    summed = len(Spec.parse(before).groups)
    first = parts[0]
    return Spec(tuple(dims), tuple(groups), first.means, first.variances, parts, summed)


def solve_sizes(
    arrays: Iterable[tuple[str, Spec, tuple[int, ...]]], known: Mapping[str, int]
) -> dict[str, int]:
    """The size of every axis, from the path, spec and shape of every array and the sizes known already.

    Raises `AxisError` with all disagreements at once.

    **Example**

        solve_sizes([("o", Spec.parse("(heads dim) -> embed"), (6, 8))], {"heads": 2})   # dim=3, embed=8
    """
    complaints: list[str] = []
    seen: dict[str, dict[int, str]] = {name: {n: "given"} for name, n in known.items()}
    shared: list[_Length] = []
    more: set[int] = set()
    for path, spec, shape in arrays:
        terms = spec.terms
        if len(shape) != len(terms):
            names = " ".join(dim.axis for dim in spec.dims) or "no axis"
            complaints.append(
                f"{path}: declared with {len(terms)} dimensions ({names}), but its shape is {shape}"
            )
            more.add(len(shape) - len(terms))
            continue
        for length in map(_Length, [path] * len(terms), terms, shape):
            if length.alone is None:
                shared.append(length)
            else:
                seen.setdefault(length.alone, {}).setdefault(length.length, path)
    sizes = {axis: next(iter(places)) for axis, places in seen.items()}
    # One unknown after the other until nothing changes, so that the order of the arrays does not matter
    pending = list(shared)
    while solvable := [length for length in pending if len(length.unknown(sizes)) == 1]:
        for length in solvable:
            pending.remove(length)
            sizes |= length.solved(sizes)
    complaints += [length.fault(sizes) for length in shared if not length.fits(sizes)]
    for axis, places in seen.items():
        if len(places) > 1:
            where = ", ".join(f"{size} at {path}" for size, path in places.items())
            complaints.append(f"axis {axis!r} has several sizes: {where}")
    if more == {1} and set(seen) <= set(known):
        complaints.append("all have one more: a stack of models grows under eqx.filter_vmap")
    raise_all(AxisError, "the declared axes do not fit the arrays:", complaints)
    return sizes


class _Length(NamedTuple):
    """The length of one dimension of one array: a sum of products of axes."""

    path: str
    terms: tuple[tuple[Dim, ...], ...]
    length: int

    def __str__(self) -> str:
        return f"({' + '.join(' '.join(dim.axis for dim in term) for term in self.terms)})"

    @property
    def alone(self) -> str | None:
        """The axis that has the dimension to itself."""
        (dim, *others), *more = self.terms
        return None if others or more or dim.literal else dim.axis

    def unknown(self, sizes: Mapping[str, int]) -> list[str]:
        """The axes in it that have no size yet."""
        names = dict.fromkeys(dim.axis for term in self.terms for dim in term if not dim.literal)
        return [name for name in names if name not in sizes]

    def total(self, sizes: Mapping[str, int]) -> int:
        """The length that its axes make."""
        return sum(math.prod(dim.size(sizes) for dim in term) for term in self.terms)

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether all sizes are known and make the length."""
        return not self.unknown(sizes) and self.total(sizes) == self.length

    def solved(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The size of its one unknown axis; nothing if no whole number makes the length."""
        for axis in self.unknown(sizes):
            # The length never falls as an axis grows, so the size can be bisected
            tried = range(1, self.length + 1)
            n = 1 + bisect.bisect_left(
                tried, self.length, key=lambda n: self.total({**sizes, axis: n})
            )
            return {axis: n} if self.total({**sizes, axis: n}) == self.length else {}
        return {}

    def fault(self, sizes: Mapping[str, int]) -> str:
        """The message for sizes that do not fit."""
        if self.unknown(sizes):
            return (
                f"{self.path}: cannot split a dimension of {self.length} into {self}; all axes but one "
                "need a size from another leaf, and the last must come out whole"
            )
        return f"{self.path}: {self} makes {self.total(sizes)}, but the dimension is {self.length}"
