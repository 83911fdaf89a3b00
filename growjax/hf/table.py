"""Rows: the leaves that a tensor of a Hugging Face file holds, and the order of its dimensions.

    Row("h.{}.attn.c_proj.weight", "blocks.block.attention.o: (kv_heads group head_dim) embed")

First comes the name of the tensor, with `{}` for the number of the layer, and a second one for that of
the expert. Then comes the leaf, and after the colon the dimensions of the tensor, by the names of the
leaf's axes (`embed2` is the second one of a square, and `1` one of a single entry). Brackets join several
axes into one dimension. Axes that a leaf lacks are left out. Leaves that share a tensor (`q|k|v`) are
concatenated along the dimension `joined` (the last one by default), or, where the layout has the word
`each`, stand there next to each other: `(kv_heads each head_dim) embed` has the queries of the first
group and their key and value before those of the second group.

`turned` is `head_dim` in transformers' order of rotary coordinates: the first ones of all pairs before
the second ones, and then those that are not turned. In growjax the two coordinates of a pair are
neighbours.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import einops
import numpy as np

from growjax.axes import Axes, Slot


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a file, or one for each layer, or for each expert of each layer.

    **Fields**

    - `name`: the name of the tensor, with `{}` for the layer, and for the expert.
    - `holds`: the leaves in it, a colon, and its dimensions.
    - `others`: further names that the same tensor may have in a file.
    - `all_names`: whether it is written under all names, and read under the first whatever the others
      hold.
    - `joined`: the dimension along which leaves are concatenated.
    - `rotated`: how many coordinates of a head are turned, if the layout has `turned` (None: all).
    - `start`: the number of the first layer in the file.
    """

    name: str
    holds: str
    others: tuple[str, ...] = ()
    all_names: bool = False
    joined: int = -1
    rotated: int | None = None
    start: int = 0

    @property
    def leaves(self) -> tuple[str, ...]:
        """The paths of the leaves in it: `a.b.q|k` is `a.b.q` and `a.b.k`."""
        path, _, _ = self.holds.partition(":")
        parent, dot, last = path.rpartition(".")
        return tuple(f"{parent}{dot}{name}" for name in last.split("|"))

    def places(self, table: Axes) -> list[tuple[int, ...]]:
        """The indices of its tensors: layers, or layers and experts, or one empty index."""
        leading = table[self.leaves[0]].dims[: self._leading]
        return list(np.ndindex(*(table.size(dim.axis) for dim in leading)))

    def names(self, place: tuple[int, ...] = ()) -> list[str]:
        """The names that the tensor of a place may have; the first is the usual one."""
        numbers = (place[0] + self.start, *place[1:]) if place else ()
        return [name.format(*numbers) for name in (self.name, *self.others)]

    def shape(self, table: Axes) -> tuple[int, ...]:
        """The shape of one tensor, given the axes of the model."""
        parts = self._parts(table)
        shape = list(parts[0].shape)
        dim = self._dimension(parts)
        shape[dim] = sum(part.shape[dim] for part in parts)
        return tuple(shape)

    def pack(self, table: Axes, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of one place, from the leaves' arrays of that place."""
        parts = self._parts(table)
        pieces = [part.packed(array) for array, part in zip(arrays, parts, strict=True)]
        if self._interleaved:
            # [..., each, ...] with a dimension for every axis, which are then joined
            whole = np.concatenate(pieces, axis=parts[0].each)
            return whole.reshape(self.shape(table))
        return pieces[0] if len(parts) == 1 else np.concatenate(pieces, axis=self.joined)

    def unpack(self, table: Axes, tensor: np.ndarray) -> list[np.ndarray]:
        """The leaves' arrays of one place, from its tensor."""
        parts = self._parts(table)
        if self._interleaved:
            each, shape = parts[0].each, list(parts[0].open_shape)
            ends = np.cumsum([part.open_shape[each] for part in parts])
            shape[each] = ends[-1]
            pieces = np.split(tensor.reshape(shape), ends[:-1], axis=each)
        else:
            cuts = np.cumsum([part.shape[self.joined] for part in parts])[:-1]
            pieces = np.split(tensor, cuts, axis=self.joined)
        return [part.unpacked(piece) for piece, part in zip(pieces, parts, strict=True)]

    def rows(self, table: Axes) -> tuple[str, int] | None:
        """The axis that is the first dimension of its one tensor, and where its one leaf has it.

        None where there are several tensors or leaves, or where that dimension joins several axes.
        """
        parts = self._parts(table)
        if self._leading or len(parts) > 1 or parts[0].tokens[0] == "(":
            return None
        dim = parts[0].leaf.index(parts[0].tokens[0])
        turned = parts[0].turn is not None and parts[0].turn[0] == dim
        return None if turned else (table[self.leaves[0]].dims[dim].axis, dim)

    @property
    def _leading(self) -> int:
        """How many axes of a leaf have a tensor for each of their entries; they come first."""
        return self.name.count("{}")

    @property
    def _interleaved(self) -> bool:
        return bool(re.search(r"\beach\b", self.holds))

    def _dimension(self, parts: "list[_Part]") -> int:
        """The dimension of the tensor in which its leaves are added up."""
        return parts[0].joined if self._interleaved else self.joined

    def _parts(self, table: Axes) -> "list[_Part]":
        return [self._part(table, leaf) for leaf in self.leaves]

    def _part(self, table: Axes, leaf: str) -> "_Part":
        """The patterns of one leaf: of its own dimensions, and of those in the tensor."""
        layout = self.holds.partition(":")[2]
        slot: Slot = table[leaf]
        axes = [dim.axis for dim in slot.dims[self._leading :]]
        # Einops needs distinct names: the second `embed` of a square is `embed2`
        dims = [f"{axis}2" if axis in axes[:i] else axis for i, axis in enumerate(axes)]
        sizes = {name: table.size(axis) for name, axis in zip(dims, axes, strict=True)}
        turn = None
        if re.search(r"\bturned\b", layout) and not leaf.endswith((".v", ".v_bias")):
            turn = dims.index("head_dim"), _turned(sizes["head_dim"], self.rotated)
        layout = re.sub(r"\bturned\b", "head_dim", layout)
        # A dimension of one entry
        sizes["1"] = 1
        # Several queries for one key and one value
        sizes["each"] = sizes["group"] if "group" in sizes else 1
        # Brackets and the names of axes that the leaf has
        tokens = [t for t in re.findall(r"[()]|\w+", layout) if t in "()" or t in sizes]
        return _Part(tuple(dims), tuple(tokens), sizes, turn)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One leaf of a row: its dimensions in growjax, and the tokens of its layout in the tensor.

    `sizes` are those of the names in both. `turn` is the dimension of `head_dim` in the leaf, and the
    order of its coordinates in the tensor, if that is another.
    """

    leaf: tuple[str, ...]
    tokens: tuple[str, ...]
    sizes: Mapping[str, int]
    turn: tuple[int, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf's part of the tensor."""
        return _shape(self.tokens, self.sizes)

    @property
    def names(self) -> list[str]:
        """The axes of the tensor, each by itself."""
        return [token for token in self.tokens if token not in "()"]

    @property
    def open_shape(self) -> tuple[int, ...]:
        """The shape with a dimension for every axis."""
        return tuple(self.sizes[name] for name in self.names)

    @property
    def each(self) -> int:
        """The place of `each` among the axes."""
        return self.names.index("each")

    @property
    def joined(self) -> int:
        """The dimension of the tensor that has `each` in it."""
        depth, dim = 0, -1
        for token in self.tokens:
            dim += depth == 0 and token != ")"
            depth += (token == "(") - (token == ")")
            if token == "each":
                break
        return dim

    @property
    def _pattern(self) -> str:
        """The dimensions of the piece that a leaf is rearranged to, for einops."""
        if "each" not in self.names:
            return " ".join(self.tokens)
        each = "group" if "group" in self.leaf else "1"
        return " ".join(each if name == "each" else name for name in self.names)

    def packed(self, array: np.ndarray) -> np.ndarray:
        """The leaf as it stands in the tensor; with `each`, with a dimension for every axis."""
        if self.turn is not None:
            array = np.take(array, self.turn[1], axis=self.turn[0])
        return einops.rearrange(array, f"{' '.join(self.leaf)} -> {self._pattern}")

    def unpacked(self, piece: np.ndarray) -> np.ndarray:
        """The inverse of `packed`."""
        sizes = {name: self.sizes[name] for name in self.leaf}
        array = einops.rearrange(piece, f"{self._pattern} -> {' '.join(self.leaf)}", **sizes)
        if self.turn is not None:
            array = np.take(array, np.argsort(self.turn[1]), axis=self.turn[0])
        return array


def _turned(head_dim: int, rotated: int | None) -> np.ndarray:
    """growjax's coordinate for every one of transformers: the halves that are turned, then the rest."""
    size = head_dim if rotated is None else rotated
    order = (np.arange(0, size, 2), np.arange(1, size, 2), np.arange(size, head_dim))
    return np.concatenate(order)


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
