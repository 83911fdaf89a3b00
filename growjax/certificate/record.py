"""The record that a certificate is: what was measured, in print and as JSON."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from growjax.growth.operator import Exactness


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far outputs and loss moved.

    `dtype` is the coarsest that the model computes in, which may not be that of its outputs. `absolute`
    is the largest change of an output; `relative` is that over the largest output, and `floor` the same
    for the permuted model, which differs by rounding alone.
    """

    dtype: str
    absolute: float
    relative: float
    loss: float
    floor: float

    @property
    def limit(self) -> float:
        """The largest relative change that rounding explains.

        1e-12 in float64 and 16 times the epsilon of another dtype, or 16 times the floor if that is more.
        """
        return max(rounding(self.dtype, 1e-12), 16 * self.floor)


def rounding(dtype: str, double: float) -> float:
    """16 times the epsilon of a dtype; `double` in float64."""
    return double if dtype == "float64" else 16 * float(jnp.finfo(dtype).eps)


def agree(difference: Difference, gradient: float | None) -> bool:
    """Whether outputs and gradients (None: not measured) in one dtype differ by rounding alone."""
    # A gradient that is NaN agrees with nothing
    gradients_agree = gradient is None or gradient <= rounding(difference.dtype, 1e-10)
    return difference.relative <= difference.limit and gradients_agree


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The record that `certify` returns; `str` prints it, `to_dict` stores it.

    - `axes`: axis to (old size, new size).
    - `forward`: one `Difference` per dtype.
    - `poison`: fill to whether outputs are bitwise those of the first fill; empty without closed entries.
    - `gradient`: largest relative error of the transposed gradient, in the last dtype of `forward`
      (float64, unless the model casts its numbers); None if approximate.
    - `dead`: axis to the share of its new entries without gradient after one and after two steps.
    - `locked`: axis to the number of copies that moved exactly like their source.
    - `part`: the coordinates of the old model that all but `forward` was measured on, of each axis that
      was cut, such as some layers; None: all of it.
    """

    operator: str
    exactness: Exactness
    axes: dict[str, tuple[int, int]]
    forward: tuple[Difference, ...]
    poison: dict[str, bool]
    gradient: float | None
    dead: dict[str, tuple[float, float]]
    locked: dict[str, int]
    part: dict[str, tuple[int, ...]] | None = None

    @property
    def passed(self) -> bool:
        """Whether the operator does what its exactness class promises (nothing, if approximate)."""
        if self.exactness == "approximate":
            return True
        *native, exact = self.forward
        outputs_agree = all(d.relative <= d.limit for d in native)
        return outputs_agree and agree(exact, self.gradient) and all(self.poison.values())

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return {**dataclasses.asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        """A line for each measurement, below the verdict."""
        if self.exactness == "approximate":
            verdict = "a jump is expected"
        else:
            verdict = "keeps its promise" if self.passed else "BREAKS ITS PROMISE"
        sizes = ", ".join(f"{axis} {a} -> {b}" for axis, (a, b) in self.axes.items())
        lines = [f"{self.operator}: {self.exactness}, {verdict}", f"  axes      {sizes or 'none'}"]
        lines += [
            f"  forward   {d.dtype}: outputs {d.absolute:.1e} abs, {d.relative:.1e} rel "
            f"(noise floor {d.floor:.1e}), loss {d.loss:+.1e}"
            for d in self.forward
        ]
        if self.part is not None:
            counts = ", ".join(f"{len(rows)} {axis}" for axis, rows in self.part.items())
            lines.append(f"  part      all else is measured on {counts} of the old model")
        if self.poison:
            same = [fill for fill, ok in self.poison.items() if ok]
            other = [fill for fill, ok in self.poison.items() if not ok]
            text = f"bitwise equal under {', '.join(same)}" if same else "never equal"
            text += f"; CHANGED by {', '.join(other)}" if other else ""
            lines.append(f"  poison    {text}")
        if self.gradient is not None:
            lines.append(f"  gradient  transpose agrees to {self.gradient:.1e}")
        for axis, (one, two) in self.dead.items():
            lock = f"; {self.locked[axis]} locked to their source" if self.locked.get(axis) else ""
            lines.append(
                f"  liveness  {axis}: {one:.0%} of new entries without gradient after one step, "
                f"{two:.0%} after two{lock}"
            )
        return "\n".join(lines)
