"""Depth: lists of source layers, with or without closed branches.

Gradual stacking (Reddi et al. 2023), StackedBERT (Gong et al. 2019), G_stack (Du et al. 2024), MIDAS
(Saunshi et al. 2024), LIDAS (Kapl et al. 2025), SOLAR (Kim et al. 2023), LLaMA-Pro block expansion (Wu et
al. 2024), OpT-DeUS (2025).
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import NONE, AxisMap, Init
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Multiplied, matches
from growjax.growth.operator import (
    Exactness,
    Operator,
    Sizes,
    SizesOrLists,
    frozen_sizes,
    resolve,
    split_lists,
)
from growjax.specs import Dim


Order = Literal["top", "repeat", "interleave", "interpolate", "middle", "centre", "insert"]


_STACKBERT = Paper(
    "Efficient Training of BERT by Progressively Stacking",
    "Gong, Linyuan and He, Di and Li, Zhuohan and Qin, Tao and Wang, Liwei and Liu, Tieyan",
    2019,
    "International Conference on Machine Learning",
)
_GRADUAL = Paper(
    "Efficient Training of Language Models using Few-Shot Learning",
    "Reddi, Sashank J. and Miryoosefi, Sobhan and Karp, Stefani and Krishnan, Shankar and Kale, "
    "Satyen and Kim, Seungyeon and Kumar, Sanjiv",
    2023,
    "International Conference on Machine Learning",
)
_G_STACK = Paper(
    "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training",
    "Du, Wenyu and Luo, Tongxu and Qiu, Zihan and Huang, Zeyu and Shen, Yikang and Cheng, Reynold "
    "and Guo, Yike and Fu, Jie",
    2024,
    "Advances in Neural Information Processing Systems",
    "2405.15319",
)
MASKED = Paper(
    "Masked Structural Growth for 2x Faster Language Model Pre-training",
    "Yao, Yiqun and Zhang, Zheng and Li, Jing and Wang, Yequan",
    2024,
    "International Conference on Learning Representations",
    "2305.02869",
)
_INTERLEAVED = Paper(
    "Multi-level Residual Networks from Dynamical Systems View",
    "Chang, Bo and Meng, Lili and Haber, Eldad and Tung, Frederick and Begert, David",
    2018,
    "International Conference on Learning Representations",
    "1710.10348",
)
_MIDAS = Paper(
    "On the Inductive Bias of Stacking Towards Improving Reasoning",
    "Saunshi, Nikunj and Karp, Stefani and Krishnan, Shankar and Miryoosefi, Sobhan and Reddi, "
    "Sashank J. and Kumar, Sanjiv",
    2024,
    "Advances in Neural Information Processing Systems",
    "2409.19044",
)
_LIDAS = Paper(
    "Do Depth-Grown Models Overcome the Curse of Depth? An In-Depth Analysis",
    "Kapl, Ferdinand and Angelis, Emmanouil and Höppe, Tobias and Maile, Kaitlin and von Oswald, "
    "Johannes and Scherrer, Nino and Bauer, Stefan",
    2025,
    arxiv="2512.08819",
)
_LLAMA_PRO = Paper(
    "LLaMA Pro: Progressive LLaMA with Block Expansion",
    "Wu, Chengyue and Gan, Yukang and Ge, Yixiao and Lu, Zeyu and Wang, Jiahao and Feng, Ye and "
    "Shan, Ying and Luo, Ping",
    2024,
    "Annual Meeting of the Association for Computational Linguistics",
    "2401.02415",
)
_SOLAR = Paper(
    "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
    "Kim, Dahyun and Park, Chanjun and Kim, Sanghoon and Lee, Wonsung and Song, Wonho and others",
    2024,
    "Conference of the North American Chapter of the Association for Computational Linguistics: Industry",
    "2312.15166",
)
FEW_LAYERS = Paper(
    "Scaling Depth Capacity via Zero/One-layer Model Expansion",
    "Bu, Zhiqi and others",
    2026,
    "International Conference on Machine Learning",
    "2511.04981",
)


def sources(order: Order, old: int, new: int) -> np.ndarray:
    """`[new]` the source layer of every layer, for growth from `old` to `new` layers.

    - `"top"`: the last `new - old` layers once more on top (gradual stacking).
    - `"repeat"`: the whole stack again and again, then its last `new % old` layers (G_stack, MSG).
    - `"interleave"`: every layer repeated in place, `floor(i * old / new)`.
    - `"interpolate"`: the top layers doubled in place; beyond twice the depth, more copies of the last
      one (MSG's other order).
    - `"middle"`: the middle block of `new - old` layers duplicated after itself (MIDAS). Where the layers
      do not divide into such blocks, it is the one with as many layers below it as above, or one fewer.
    - `"centre"`: the `new - old` layers around the exact middle duplicated after themselves (LIDAS), from
      `ceil(old / 2) - ceil((new - old) / 2)` on.
    - `"insert"`: a copy after every `old / (new - old)` layers (LLaMA-Pro); `new - old` must divide
      `old`.

    Raises `GrowthError` where the order cannot reach `new`: `"top"`, `"middle"` and `"centre"` go up to
    twice the depth. A list of source layers, `gj.stack(layers=(0, 1, 1, 2))`, has no such limit.

    **Example**

        sources("repeat", 2, 5)        # [0, 1, 0, 1, 1]
    """
    _check_types(order=(Order, order), old=(_Depth, old), new=(_Depth, new))
    _require(new >= old, f"growth never shrinks: from {old} to {new} layers")
    _require(old > 0 or new == 0, f"there is no layer to copy {new} times; gj.fresh(layers={new})")
    extra, layers = new - old, np.arange(old)
    if extra == 0:
        return layers
    if order == "top":
        _require(extra <= old, f"'top' copies the last {extra} layers, but there are {old}")
        return np.concatenate([layers, layers[old - extra :]])
    if order == "repeat":
        return np.concatenate([np.tile(layers, new // old), layers[old - new % old :]])
    if order == "interleave":
        return np.arange(new) * old // new
    if order == "interpolate":
        copies = 1 + (layers >= old - extra)
        copies[-1] += max(extra - old, 0)
        return np.repeat(layers, copies)
    if order == "middle":
        _require(extra <= old, f"'middle' duplicates {extra} layers, but there are {old}")
        blocks = old // extra
        end = -(-blocks // 2) * extra if blocks * extra == old else (old + extra) // 2
        return np.concatenate([layers[:end], layers[end - extra :]])
    if order == "centre":
        _require(extra <= old, f"'centre' duplicates {extra} layers, but there are {old}")
        end = -(-old // 2) + extra // 2
        return np.concatenate([layers[:end], layers[end - extra :]])
    _require(
        extra <= old and old % extra == 0,
        f"'insert' puts one copy after every old/extra layers: {extra} does not divide {old}; give "
        "a list of source layers, such as gj.stack(layers=(0, 1, 1, 2))",
    )
    every = old // extra
    return np.concatenate([[*part, part[-1]] for part in layers.reshape(-1, every)])


def solar(old: int, dropped: int) -> tuple[int, ...]:
    """SOLAR's depth up-scaling: two copies of the stack, without the `dropped` layers at the seam.

    **Example**

        gj.stack(layers=gj.growth.solar(32, dropped=8))       # 48 layers
    """
    _check_types(old=(values.Size, old), dropped=(int, dropped))
    _require(0 <= dropped < old, f"dropped: expected 0 to {old - 1}, got {dropped}")
    return (*range(old - dropped), *range(dropped, old))


# How many layers
_Depth = Annotated[int, values.at_least(0, "layers")]


def _check_types(**arguments: tuple[Any, Any]) -> None:
    """Raise `GrowthError` that lists the arguments, `name=(annotation, value)`, that do not fit."""
    pairs = arguments.items()
    faults = [line for name, (hint, value) in pairs for line in values.faults(hint, value, name)]
    raise_all(GrowthError, "no layers can be listed from these:", faults)


def _require(ok: bool, complaint: str) -> None:
    if not ok:
        raise GrowthError(complaint)


Scales = tuple[tuple[str, float], ...]


@values.register
class Stack(Operator):
    """Copy layers; see `stack`."""

    sizes: SizesOrLists = eqx.field(static=True)
    order: Order = eqx.field(static=True, default="repeat")
    branch: Literal["copy", "zero", "split"] = eqx.field(static=True, default="copy")
    stream: str = eqx.field(static=True, default="embed")
    scale: Scales = eqx.field(static=True, default=())
    card: ClassVar[Card] = Card(
        use="Depth from a trained model: the whole stack once more early in training (G_stack), a few "
        "layers at a time (gradual stacking, MIDAS), or closed copies in a finished model (block "
        "expansion).",
        traps=(
            "The loss jumps, and says little about the end: compare after some hundred steps.",
            'Layers from `branch="zero"` start as the identity; training all of the model with them is '
            "reported to learn features more slowly than plain copies do.",
            "Under a cosine schedule a late growth has little left to train: grow in the stable phase of "
            '"wsd", or early.',
        ),
        example="stack(layers=4)",
        by={
            "pattern": {
                "top": (_GRADUAL,),
                "repeat": (_STACKBERT, _G_STACK),
                "interleave": (_INTERLEAVED,),
                "interpolate": (MASKED,),
                "middle": (_MIDAS,),
                "centre": (_LIDAS,),
                "insert": (_LLAMA_PRO,),
                "solar": (_SOLAR,),
            },
            "branch": {"zero": (_LLAMA_PRO,)},
        },
    )

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """New layers with zeroed branches do nothing; others do."""
        return "exact-given-init" if self.branch == "zero" else "approximate"

    @property
    def pattern(self) -> str:
        """The order; of a list of layers "solar", if it is two overlapping runs, or "list"."""
        lists = [size for _, size in self.sizes if isinstance(size, tuple)]
        if not lists:
            return self.order
        half = len(lists[0]) // 2
        start = lists[0][half] if half else 0
        overlaps = 0 < start < half and lists[0] == (*range(half), *range(start, start + half))
        return "solar" if overlaps else "list"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Copies along the stack axes; the share closes or splits the residual branches."""
        axes.size(self.stream)
        require_stacks(axes, [axis for axis, _ in self.sizes])
        lists, wanted = split_lists(axes, self.sizes)
        arrays = [s.path for a, _ in self.sizes for s in axes.having(a, "param") if s.arrays()]
        raise_all(
            GrowthError,
            "scale: no array of the stack has this name or pattern; its arrays are "
            f"{', '.join(sorted(set(arrays)))}:",
            [name for name, _ in self.scale if not any(matches(path, name) for path in arrays)],
        )
        moves = []
        for axis in [axis for axis, _ in self.sizes if axis in wanted or axis in lists]:
            if axis in lists:
                source = np.asarray(lists[axis])
            else:
                source = sources(self.order, axes.size(axis), wanted[axis])
            moves.append(self._map(axes, axis, source))
        return moves

    def _map(self, axes: Axes, axis: str, source: np.ndarray) -> AxisMap:
        finish = Multiplied(self.scale) if self.scale else None
        move = AxisMap(axis, source, via=self.stream, finish=finish)
        if self.branch == "copy":
            return move
        if self.branch == "zero":
            require_closable(axes, axis, self.stream)
            old, order = axes.size(axis), source[~move.is_new()].tolist()
            if order != list(range(old)):
                raise GrowthError(
                    f"{axis}: with branch='zero' copies do nothing, so the {old} old ones are needed "
                    f"in their order, each before its copies; without copies they are {order}"
                )
            share = np.where(move.is_new(), 0.0, 1.0)
        else:
            share = 1 / np.bincount(source, minlength=axes.size(axis))[source]
        return dataclasses.replace(move, share=share)


@values.register
class Fresh(Operator):
    """Layers that copy nothing; see `fresh`."""

    sizes: Sizes = eqx.field(static=True)
    init: Init = eqx.field(static=True, default="born")
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="Training that starts with no layer or with one, and grows once in the stable phase of a "
        '"wsd" schedule.',
        traps=(
            "Embeddings and head are paid for from the first step: of a small model with a large "
            "vocabulary the saving is far from that of the blocks alone. The clock shows it.",
            "The loss jumps more than with copies, and the rate has to suit fresh layers: without "
            "`Transfer` or Muon it is that of the shallow model.",
        ),
        example="fresh(layers=3)",
        papers=(FEW_LAYERS,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """The old layers, and fresh ones on top of them."""
        wanted = resolve(axes, dict(self.sizes))
        require_stacks(axes, list(wanted))
        return [
            AxisMap(
                axis, [*range(axes.size(axis)), *[NONE] * (n - axes.size(axis))], init=self.init
            )
            for axis, n in wanted.items()
        ]


def require_stacks(axes: Axes, names: list[str]) -> None:
    """Raise `GrowthError` that lists the axes which are no stacks of blocks."""
    raise_all(
        GrowthError,
        "only layers can be stacked; these axes are not stacks of blocks:",
        [axis for axis in names if axes.size(axis) >= 0 and "stack" not in axes.roles(axis)],
    )


def require_closable(axes: Axes, axis: str, stream: str) -> None:
    """Raise `GrowthError` unless blocks are known to be the identity without their branches.

    That a block is `x + f(x)` cannot be read off its axes. A model says so by a multiplier of its
    branches (`gj.branch`), and a trace of somebody else's model shows it.
    """
    raise_all(
        GrowthError,
        "a block that ends in a norm (post-LN) is not the identity when its branches are zero; "
        "use gj.msg(layers=...) or gj.stack without branch='zero':",
        _closing_norms(axes, axis, stream),
    )
    why = axes.closings.get((axis, stream))
    if why:
        raise GrowthError(
            f"blocks of {axis!r} are not the identity when their branches are zero: {why}; use "
            "gj.stack without branch='zero'"
        )
    multiplied = any(slot.own_axis == axis for slot in axes.of_kind("branch"))
    if why is None and not multiplied and _makers(axes, axis, stream):
        raise GrowthError(
            f"only the program shows whether a block of {axis!r} is the identity when the arrays that "
            f"produce {stream!r} are zero: give gj.annotate an example=batch, or residual=[{axis!r}] if "
            f"blocks are x + f(x); a module of your own declares the multiplier of f, gj.branch({axis!r})"
        )


def _makers(axes: Axes, axis: str, stream: str) -> list[tuple[str, Dim]]:
    """The arrays of a stack that produce the stream: the path, and the declaration of that dimension."""
    slots = axes.having(axis, "param")
    return [(s.path, d) for s in slots for d in s.dims if (d.axis, d.role) == (stream, "produced")]


def _closing_norms(axes: Axes, axis: str, stream: str) -> list[str]:
    """Norms of the stack whose output is the stream itself: they produce it."""
    return sorted({path for path, dim in _makers(axes, axis, stream) if dim.normalised})


def stack(
    *,
    order: Order = "repeat",
    branch: Literal["copy", "zero", "split"] = "copy",
    stream: str = "embed",
    scale: Mapping[str, float] | tuple[tuple[str, float], ...] = (),
    **sizes: int | tuple[int, ...],
) -> Stack:
    """Grow depth by copying layers: to a number of layers, or by an explicit list of source layers.

    **Arguments**

    - `layers=12` (or the model's own stack axis, such as `encoder_layers`), or a tuple of sources.
    - `order`: which layers are copied where, see `growjax.growth.sources`.
    - `branch`: `"copy"` copies whole layers (a jump in loss is expected); `"zero"` closes the new
      layers' residual branches, so that the function is kept; `"split"` divides every branch by its
      number of copies, a refinement of the same depth flow.
    - `stream`: the axis of the residual stream.
    - `scale`: multipliers of some arrays in the new layers alone, by name (`"q"`) or by a pattern over
      their path (`"*.attention.?"`). The first layer from a source is not new.

    With `branch="zero"` the arrays of a new layer that produce the stream are zero, so it has to be a
    block `x + f(x)` whose branches end in them. One that ends in a norm, or multiplies the stream, is
    refused. Axes do not show it: the model has a multiplier of its branches (`gj.branch`), or was
    checked with a batch (`gj.annotate(..., example=batch)`, `gj.infer`); `gj.certify` measures it.

    **Example**

        gj.stack(layers=12)                                  # G_stack from 6 or 4 or 3
        gj.stack(layers=(0, 1, 1, 2), scale={"q": 0.9, "k": 0.9})    # colder attention in the copy
        gj.stack(layers=9, order="top")                      # gradual stacking 6-9
        gj.stack(layers=8, order="insert", branch="zero")    # block expansion
    """
    return Stack(frozen_sizes(sizes), order, branch, stream, values.tuples(scale))


def fresh(*, init: Init = "born", **sizes: int) -> Fresh:
    """Grow depth by freshly drawn layers on top of the old ones, without gates.

    Training that starts with no layer or with one (`GPTConfig(layers=0)`) grows so. A jump in loss is
    expected; `gj.msg(layers=..., init="matched")` hides fresh layers behind gates.

    **Arguments**

    - `layers=12` (or the model's own stack axis, such as `encoder_layers`).
    - `init`: how they are drawn: `"born"`, as in a new model (variance 1 / fan-in, biases 0, gains 1),
      `"normal"` (deviation 0.02), `"matched"`, `"zeros"` or a callable
      `(key, shape, dtype) -> array`.

    **Example**

        gj.fresh(layers=12)
    """
    return Fresh(frozen_sizes(sizes), init)
