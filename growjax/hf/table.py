"""Rows: which leaves a tensor of a Hugging Face file holds, and in which order its dimensions stand.

    Row("h.{}.attn.c_proj.weight", "blocks.block.attention.o: (kv_heads group head_dim) embed")

The name, `{}` where layers are counted; then the leaf, and after the colon the dimensions of the tensor
by the names that the leaf's own have in the axis table (`embed2` is the second one of a square). Brackets
join several into one. Leaves that share a tensor are joined along its last dimension (`q|k|v`), and axes
that one of them lacks are left out. `(two pairs)` is `head_dim` with the first halves of all rotary pairs
before the second ones; growjax keeps the two of a pair next to each other.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import einops
import numpy as np

from growjax.axes import Axes, Slot


_TURNED = {"head_dim": "(pairs two)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a file, or one a layer.

    `others` are names that the same tensor may have in a file; where `all_names`, it is written under
    each of them, and read under the first.
    """

    name: str
    holds: str
    others: tuple[str, ...] = ()
    all_names: bool = False

    @property
    def leaves(self) -> tuple[str, ...]:
        """The paths of the leaves in it: `a.b.q|k` is `a.b.q` and `a.b.k`."""
        path, _, _ = self.holds.partition(":")
        parent, dot, last = path.rpartition(".")
        return tuple(f"{parent}{dot}{name}" for name in last.split("|"))

    @property
    def layered(self) -> bool:
        """Whether there is one for every layer."""
        return "{}" in self.name

    def names(self, layer: int = 0) -> list[str]:
        """The name of the tensor of a layer, and the others that it may have."""
        return [name.format(layer) for name in (self.name, *self.others)]

    def shape(self, table: Axes) -> tuple[int, ...]:
        """The shape of the tensor."""
        parts = [self._part(table, leaf) for leaf in self.leaves]
        return (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))

    def pack(self, table: Axes, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of one layer, from the leaves' arrays of that layer."""
        parts = [
            einops.rearrange(array, f"{part.leaf} -> {part.tensor}", **part.sizes)
            for array, part in zip(arrays, self._parts(table), strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def unpack(self, table: Axes, tensor: np.ndarray) -> list[np.ndarray]:
        """The leaves' arrays of one layer, from its tensor."""
        parts = self._parts(table)
        cuts = np.cumsum([part.shape[-1] for part in parts])[:-1]
        return [
            einops.rearrange(array, f"{part.tensor} -> {part.leaf}", **part.sizes)
            for array, part in zip(np.split(tensor, cuts, axis=-1), parts, strict=True)
        ]

    def _parts(self, table: Axes) -> "list[_Part]":
        return [self._part(table, leaf) for leaf in self.leaves]

    def _part(self, table: Axes, leaf: str) -> "_Part":
        layout = self.holds.partition(":")[2]
        turned = "pairs" in layout
        slot: Slot = table[leaf]
        axes = [dim.axis for dim in slot.dims if dim.role != "stack"]
        dims = [f"{axis}2" if axis in axes[:i] else axis for i, axis in enumerate(axes)]
        sizes = {name: table.size(axis) for name, axis in zip(dims, axes, strict=True)}
        if turned:
            sizes |= {"pairs": sizes.pop("head_dim") // 2, "two": 2}
        tokens = [t for t in re.findall(r"[()]|\w+", layout) if t in "()" or t in sizes]
        own = " ".join(_TURNED[name] if turned and name in _TURNED else name for name in dims)
        return _Part(own, " ".join(tokens), sizes, _shape(tokens, sizes))


@dataclasses.dataclass(frozen=True)
class _Part:
    """One leaf of a row: its dimensions as patterns of einops, before and after."""

    leaf: str
    tensor: str
    sizes: Mapping[str, int]
    shape: tuple[int, ...]


def _shape(tokens: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape, group = [], None
    for token in tokens:
        if token == "(":
            group = []
        elif token == ")" and group is not None:
            shape.append(math.prod(group))
            group = None
        else:
            (shape if group is None else group).append(sizes[token])
    return tuple(shape)


def linear(name: str, leaf: str, into: str, out: str, *, transposed: bool = False) -> list[Row]:
    """The rows of a linear layer, weight and bias: `[out, into]`, or `[into, out]` if `transposed`."""
    layout = f"{into} {out}" if transposed else f"{out} {into}"
    return [
        Row(f"{name}.weight", f"{leaf}: {layout}"),
        Row(f"{name}.bias", f"{_bias(leaf)}: {out.removesuffix('2')}"),
    ]


def norm(name: str, leaf: str) -> list[Row]:
    """The rows of a norm over the residual stream, gain and bias."""
    return [Row(f"{name}.{last}", f"{leaf}.{last}: embed") for last in ("weight", "bias")]


def _bias(leaf: str) -> str:
    """`a.q|k` to `a.q_bias|k_bias`, and `a.weight` to `a.bias`."""
    parent, dot, last = leaf.rpartition(".")
    names = ["bias" if name == "weight" else f"{name}_bias" for name in last.split("|")]
    return f"{parent}{dot}{'|'.join(names)}"
