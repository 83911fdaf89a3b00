"""Rows: the leaves that a tensor of a Hugging Face file holds, and the order of its dimensions.

    Row("h.{}.attn.c_proj.weight", "blocks.block.attention.o: (kv_heads group head_dim) embed")

First comes the name of the tensor, with `{}` for the number of the layer. Then comes the leaf, and after
the colon the dimensions of the tensor, by the names of the leaf's axes (`embed2` is the second one of a
square). Brackets join several axes into one dimension. Leaves that share a tensor (`q|k|v`) are
concatenated along its last dimension, and axes that one of them lacks are left out.

`(two pairs)` is `head_dim` in transformers' order of rotary coordinates: the first ones of all pairs
before the second ones. In growjax the two coordinates of a pair are neighbours, `(pairs two)`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import einops
import numpy as np

from growjax.axes import Axes, Slot


# growjax's order of the coordinates of a head, as an einops pattern
_ROTARY = {"head_dim": "(pairs two)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a file, or one for each layer.

    **Fields**

    - `name`: the name of the tensor, with `{}` for the layer.
    - `holds`: the leaves in it, a colon, and its dimensions.
    - `others`: further names that the same tensor may have in a file.
    - `all_names`: whether it is written under all names, and read under the first whatever the others
      hold.
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
        """Whether the row stands for one tensor per layer."""
        return "{}" in self.name

    def names(self, layer: int = 0) -> list[str]:
        """The names that the tensor of a layer may have; the first is the usual one."""
        return [name.format(layer) for name in (self.name, *self.others)]

    def shape(self, table: Axes) -> tuple[int, ...]:
        """The shape of the tensor (of one layer), given the axes of the model."""
        parts = self._parts(table)
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
        """The patterns of one leaf: of its own dimensions, and of those in the tensor."""
        layout = self.holds.partition(":")[2]
        rotary = "pairs" in layout
        slot: Slot = table[leaf]
        axes = [dim.axis for dim in slot.dims if dim.role != "stack"]
        # Einops needs distinct names: the second `embed` of a square is `embed2`
        dims = [f"{axis}2" if axis in axes[:i] else axis for i, axis in enumerate(axes)]
        sizes = {name: table.size(axis) for name, axis in zip(dims, axes, strict=True)}
        if rotary:
            sizes |= {"pairs": sizes.pop("head_dim") // 2, "two": 2}
            dims = [_ROTARY.get(name, name) for name in dims]
        # Brackets and the names of axes that the leaf has
        tokens = [t for t in re.findall(r"[()]|\w+", layout) if t in "()" or t in sizes]
        return _Part(" ".join(dims), " ".join(tokens), sizes, _shape(tokens, sizes))


@dataclasses.dataclass(frozen=True)
class _Part:
    """One leaf of a row: einops patterns of its dimensions in growjax and in the tensor.

    `sizes` are those of the names in the patterns, `shape` that of the leaf's part of the tensor.
    """

    leaf: str
    tensor: str
    sizes: Mapping[str, int]
    shape: tuple[int, ...]


def _shape(tokens: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a pattern, in which a bracket is one dimension."""
    shape, group = [], None  # `group` has the sizes within a bracket, and is None outside
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
    """The rows of a linear layer's weight and bias; the weight is `[out, into]`, or transposed."""
    layout = f"{into} {out}" if transposed else f"{out} {into}"
    return [
        Row(f"{name}.weight", f"{leaf}: {layout}"),
        Row(f"{name}.bias", f"{_bias(leaf)}: {out.removesuffix('2')}"),
    ]


def norm(name: str, leaf: str) -> list[Row]:
    """The rows of the gain and bias of a norm over the residual stream."""
    return [Row(f"{name}.{last}", f"{leaf}.{last}: embed") for last in ("weight", "bias")]


def _bias(leaf: str) -> str:
    """`a.q|k` to `a.q_bias|k_bias`, and `a.weight` to `a.bias`."""
    parent, dot, last = leaf.rpartition(".")
    names = ["bias" if name == "weight" else f"{name}_bias" for name in last.split("|")]
    return f"{parent}{dot}{'|'.join(names)}"
