"""Copying coordinates with shares that sum to one: exact with no gate at all.

Net2Net (Chen et al. 2016), bert2BERT's FPI and AKI (Chen et al. 2022), HyperCloning (Samragh et al.
2024), staged training (Shen et al. 2022), SPARKLING (Yu et al. 2026).
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from growjax import values
from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Finish, Noise, across
from growjax.growth.operator import (
    Exactness,
    Operator,
    Sizes,
    SizesOrLists,
    adds,
    frozen_sizes,
    split_lists,
)


_NET2NET = Paper(
    "Net2Net: Accelerating Learning via Knowledge Transfer",
    "Chen, Tianqi and Goodfellow, Ian and Shlens, Jonathon",
    2016,
    "International Conference on Learning Representations",
    "1511.05641",
)
_BERT2BERT = Paper(
    "bert2BERT: Towards Reusable Pretrained Language Models",
    "Chen, Cheng and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Qin, Yujia and Wang, Fengyu and "
    "Wang, Zhi and Chen, Xiao and Liu, Zhiyuan and Liu, Qun",
    2022,
    "Annual Meeting of the Association for Computational Linguistics",
    "2110.07143",
)
_HYPERCLONING = Paper(
    "Scaling Smart: Accelerating Large Language Model Pre-training with Small Model Initialization",
    "Samragh, Mohammad and Mirzadeh, Iman and Alizadeh Vahid, Keivan and Faghri, Fartash and Cho, Minsik "
    "and Nabi, Moin and Naik, Devang and Farajtabar, Mehrdad",
    2024,
    arxiv="2409.12903",
)
_STAGED = Paper(
    "Staged Training for Transformer Language Models",
    "Shen, Sheng and Walsh, Pete and Keutzer, Kurt and Dodge, Jesse and Peters, Matthew and Beltagy, Iz",
    2022,
    "International Conference on Machine Learning",
    "2203.06211",
)
_SPARKLING = Paper(
    "SPARKLING: Balancing Signal Preservation and Symmetry Breaking for Width-Progressive Learning",
    "Yu, Qifan and Ma, Xinyu and Zhuo, Zhijian and Wang, Minrui and Liu, Deyi and Zhan, Shiyi and Ma, "
    "Yiyuan and Xiang, Liang and Bin, Xingyan and He, Di",
    2026,
    "International Conference on Machine Learning",
    "2602.02472",
)


@values.register
class Copy(Operator):
    """Duplicate coordinates and divide the weights that consume them; see `copy`."""

    sizes: SizesOrLists = eqx.field(static=True)
    order: Literal["cycle", "random"] = eqx.field(static=True, default="cycle")
    shares: Literal["equal", "random", "diagonal"] = eqx.field(static=True, default="random")
    seed: Annotated[int, values.at_least(0)] = eqx.field(static=True, default=0)
    noise: Annotated[float, values.at_least(0)] = eqx.field(static=True, default=0.0)
    scale: Literal["share", "rms"] = eqx.field(static=True, default="share")
    card: ClassVar[Card] = Card(
        use="Width from a trained model at once, without gates or a ramp: above all whole multiples, or "
        "any size of `mlp` and `heads`.",
        traps=(
            "Equal shares give equal gradients: such copies stay equal for ever unless `noise` or "
            '`carry="zero"` tells them apart.',
            "Uneven copies of the residual stream change what LayerNorm and RMSNorm divide by, and are "
            'refused; `gj.lemon`, or `scale="rms"` with a jump, takes such sizes.',
            "Keys and values tiled by hand under grouped queries belong to the wrong queries; here heads "
            "are copied with their group.",
        ),
        example="copy(mlp=9)",
        papers=(_NET2NET, _BERT2BERT),
        by={
            "noise": (_HYPERCLONING,),
            "scale": {"rms": (_SPARKLING,)},
            "shares": {"diagonal": (_STAGED,)},
        },
    )

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """Shares that sum to one keep the function; a kept mean square does only for even copies."""
        return "exact-given-init" if self.scale == "share" else "approximate"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Copies whose shares sum to one for every source."""
        moves = self._copies(axes)
        lists = {axis for axis, size in self.sizes if isinstance(size, tuple)}
        torn = {move.axis for move in moves if move.axis in lists or self.order == "random"}
        faults = _refusals(axes, moves, torn, even=self.scale == "share")
        if self.shares == "diagonal":
            faults += self._block_faults(axes, moves)
        raise_all(GrowthError, "these copies would change the function:", faults)
        if self.shares == "diagonal":
            blocks = Blocks(tuple((move.axis, axes.size(move.axis)) for move in moves))
            moves = [dataclasses.replace(move, finish=blocks) for move in moves]
        return moves

    def _block_faults(self, axes: Axes, moves: list[AxisMap]) -> list[str]:
        """Why matrices cannot be made block-diagonal."""
        olds = {move.axis: axes.size(move.axis) for move in moves}
        faults = []
        if self.noise or self.scale != "share" or self.order != "cycle":
            faults.append("shares='diagonal' copies in turn, without noise or scale")
        for move in moves:
            old = olds[move.axis]
            if move.length % old or np.any(move.source != np.arange(move.length) % old):
                faults.append(f"{move.axis}: blocks need a multiple of {old}, copied in turn")
        if len({move.length // olds[move.axis] for move in moves}) > 1:
            faults.append("blocks need the same multiple of every axis")
        for slot in axes.of_kind("param"):
            for part in slot.parts:
                for role in ("consumed", "produced"):
                    names = [d.axis for d in part.dims if d.axis in olds and d.role == role]
                    if len(names) > 1:
                        faults.append(
                            f"{part.path} has {' and '.join(names)} {role}: grow one of them"
                        )
        return faults

    def _copies(self, axes: Axes) -> list[AxisMap]:
        lists, wanted = split_lists(axes, self.sizes)
        rng = np.random.default_rng(self.seed)
        moves = []
        for axis, size in {**wanted, **{axis: len(s) for axis, s in lists.items()}}.items():
            old = axes.size(axis)
            if axis in lists:
                source = np.asarray(lists[axis])
            elif self.order == "cycle":
                source = np.arange(size) % old
            else:
                source = np.concatenate([np.arange(old), rng.integers(0, old, size - old)])
            finish = Noise(self.noise, "paired") if self.noise else None
            moves.append(AxisMap(axis, source, share=self._share(rng, source, old), finish=finish))
        return moves

    def _share(self, rng: np.random.Generator, source: np.ndarray, old: int) -> np.ndarray:
        if self.scale == "rms":
            # A sum over c copies of one coordinate grows c-fold, and sums of different ones add squares
            counts = np.bincount(source, minlength=old)
            return np.full(len(source), (old / np.sum(counts**2)) ** 0.5)
        weight = (
            rng.uniform(0.5, 1.5, len(source)) if self.shares == "random" else np.ones(len(source))
        )
        return weight / np.bincount(source, weight, minlength=old)[source]


@dataclasses.dataclass(frozen=True)
class Blocks(Finish):
    """Copies that read the copies of their own number alone: block-diagonal matrices.

    `sizes` are the axes that grow with their old sizes, in the order of their maps: the last one that a
    leaf has makes its blocks. What leaves sum to stays, and with it every gradient.
    """

    sizes: tuple[tuple[str, int], ...]

    def applied(self, move, slot, old, new, *, key):
        """Blocks on the diagonal, n times a share of 1/n; leaves with one side alone stay shared."""
        del old, key
        grown = dict(self.sizes)
        if slot.kind != "param" or move.axis != [a for a in grown if slot.positions(a)][-1]:
            return new
        numbers = {
            dim.role: across(np.arange(new.shape[i]) // grown[dim.axis], new.ndim, i)
            for i, dim in enumerate(slot.dims)
            if dim.axis in grown
        }
        if not {"consumed", "produced"} <= set(numbers):
            return new
        copies = move.length // grown[move.axis]
        return new * jnp.where(numbers["consumed"] == numbers["produced"], copies, 0)


def _refusals(axes: Axes, moves: list[AxisMap], torn: set[str], *, even: bool) -> list[str]:
    complaints = []
    for move in moves:
        axis, old = move.axis, axes.size(move.axis)
        counts = np.bincount(move.source, minlength=old)
        norms = [slot.path for slot in axes.normalised(axis) if slot.kind == "param"]
        if axes.roles(axis) & {"stack", "lookup"}:
            complaints.append(
                f"{axis}: nothing sums over it, so copies cannot share; {adds(axes, axis)}"
            )
        elif (counts == 0).any():
            lost = np.flatnonzero(counts == 0).tolist()
            complaints.append(f"{axis}: old coordinates {lost} have no copy and would be lost")
        elif even and norms and len(set(counts)) > 1:
            complaints.append(
                f"{axis}: copies are uneven ({counts.min()} to {counts.max()} of each), so the mean and "
                f"variance taken by {', '.join(norms)} would change; use a multiple of {old}, gj.lemon "
                "or gj.msg"
            )
        elif axis in torn and axes.having(axis, "buffer"):
            complaints.append(
                f"{axis}: {axes.having(axis, 'buffer')[0].path} ties its coordinates together (rotary "
                "pairs); give a size instead of a list, and copy in turn"
            )
    return complaints


def copy(
    *,
    order: Literal["cycle", "random"] = "cycle",
    shares: Literal["equal", "random", "diagonal"] = "random",
    seed: int = 0,
    noise: float = 0.0,
    scale: Literal["share", "rms"] = "share",
    **sizes: int | tuple[int, ...],
) -> Copy:
    """Grow width by copies: to a size, or by an explicit tuple of source coordinates.

    Producers are copied as they are, consumers are divided so that the copies of one coordinate add up
    to it (`"exact-given-init"`). Any multiplicities on `mlp`, `heads` and `head_dim`; even ones on
    an axis that a norm averages over (`embed`), or `GrowthError` says why not.

    **Arguments**

    - `order`: new coordinates copy the old ones in turn, or at random (Net2Net).
    - `shares`: random ones that sum to one, or equal ones. Equal copies receive equal gradients for ever,
      and so are locked, unless something else tells them apart: `noise`, or moments that start anew in
      the copies alone (`gj.carry(copies="zero")`, `Stage(carry="zero")`). Under unequal shares gradients
      do not follow on an axis that norms average over, so optimizer state cannot be carried there.
      `"diagonal"` are equal ones of block-diagonal matrices, `[W 0; 0 W]` for twice the size (staged
      training): a copy reads the copies of its own number. All axes grow to the same multiple.
    - `seed`: for the two random choices.
    - `noise`: noise on the weights that consume copies, added to one and subtracted from the next of each
      pair of copies, so that it cancels. Its deviation is this multiple of their root mean square: 0.1
      is HyperCloning's `snr_db=20`. Optimizer state cannot be carried through it.
    - `scale`: `"share"`, or `"rms"` as in SPARKLING: all consumers have one multiplier, which keeps the
      mean square of what they compute: `1 / sqrt(1 + 3c)` if a share c of the old coordinates is doubled,
      and 1 / copies for whole multiples. It is approximate and takes any size, also where norms average.

    **Example**

        gj.copy(mlp=1536)                                               # Net2Net wider, from 1024
        gj.copy(embed=512, heads=8, mlp=2048, shares="equal", noise=0.1)    # HyperCloning
        gj.copy(embed=384, mlp=1536, scale="rms")                       # SPARKLING, with carry="zero"
    """
    return Copy(frozen_sizes(sizes), order, shares, seed, noise, scale)


@values.register
class AKI(Operator):
    """Copies whose new outputs come from the layer above; see `aki`."""

    sizes: Sizes = eqx.field(static=True)
    order: Literal["cycle", "random"] = eqx.field(static=True, default="cycle")
    seed: Annotated[int, values.at_least(0)] = eqx.field(static=True, default=0)
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="For comparison with the paper, which finds that new outputs from the layer above train "
        "faster than plain copies.",
        traps=(
            "The function is not kept, and the jump grows with the difference between neighbours.",
            "In the last layer new outputs are plain copies, and stay locked if their shares are equal.",
        ),
        example="aki(mlp=12)",
        papers=(_BERT2BERT,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """As copies with equal shares, but for the new outputs of every layer but the last."""
        copies = Copy(self.sizes, self.order, "equal", self.seed, scale="share")
        moves, faults = copies._copies(axes), []
        torn = {move.axis for move in moves} if self.order == "random" else set()
        faults = _refusals(axes, moves, torn, even=False)
        raise_all(GrowthError, "these axes do not grow by copies:", faults)
        return [dataclasses.replace(move, above=True) for move in moves]


def aki(*, order: Literal["cycle", "random"] = "cycle", seed: int = 0, **sizes: int) -> AKI:
    """Grow width by copies whose new outputs come from the layer above (bert2BERT's AKI).

    Weights that consume an axis are divided by the number of copies, as those of `gj.copy`. New outputs
    of a layer are those of the next layer (of its own in the last one), in every array that produces a
    grown axis, those that write a wider stream too. So the function is not kept: the jump is larger than
    that of uneven copies, and the paper ends lower for it. Any sizes fit. Optimizer state of new outputs
    starts anew, with `carry="zero"`; it cannot be inherited.

    **Arguments**

    - `order`, `seed`: new coordinates copy the old ones in turn, or at random.

    **Example**

        gj.aki(embed=768, heads=12, mlp=3072)          # from embed=512, heads=8, mlp=2048
    """
    return AKI(frozen_sizes(sizes), order, seed)
