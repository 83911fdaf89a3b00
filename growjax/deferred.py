"""Arrays that are read when they are used, a few rows at a time, for models that nobody holds whole."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from growjax.errors import AxisError


# The most bytes of a block of rows, in the dtype that it is read in
BLOCK = 8 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """An array of which `read(start, stop)` makes the entries from `start` to `stop` of one dimension.

    It stands for a leaf of a model. `np.asarray` reads all of it, `leaf[2, 1]` one entry of the first
    dimensions, and multiples and sums with numbers and smaller arrays are deferred too.

    **Example**

        leaf = Deferred((24, 512, 512), np.dtype("float32"), read)      # 24 layers
        leaf[3]                                                         # reads one of them
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[int, int], np.ndarray]
    dim: int = 0

    # NumPy's arrays leave products with this to the methods below
    __array_ufunc__ = None

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read(0, self.shape[self.dim])
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, place: Any) -> np.ndarray:
        place = place if isinstance(place, tuple) else (place,)
        if self.dim or not place:
            return np.asarray(self)[place]
        return self.read(place[0], place[0] + 1)[0][place[1:]]

    def astype(self, dtype: Any) -> "Deferred":
        """The array in another dtype."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return self.by_rows(lambda rows, start, stop: rows.astype(dtype), dtype=dtype)

    def by_rows(
        self, change: Callable[[np.ndarray, int, int], np.ndarray], *, dtype: Any = None
    ) -> "Deferred":
        """The array after `change(rows, start, stop)` of every part of it that is read.

        A change may permute the other dimensions' entries, and keeps the shape.
        """
        dtype = self.dtype if dtype is None else dtype
        read = lambda start, stop: change(self.read(start, stop), start, stop)  # noqa: E731
        return dataclasses.replace(self, dtype=dtype, read=read)

    def blocks(self, most: int = BLOCK) -> Iterator[tuple[int, int]]:
        """The bounds of blocks of at most `most` bytes, or of one row, that cover the array."""
        count = self.shape[self.dim]
        rows = max(1, most * count // max(self.nbytes, 1))
        for start in range(0, count, rows):
            yield start, min(start + rows, count)

    def __mul__(self, other: Any) -> "Deferred":
        return self._with(other, np.multiply)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Deferred":
        return self._with(other, np.divide)

    def __add__(self, other: Any) -> "Deferred":
        return self._with(other, np.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Deferred":
        return self._with(other, np.subtract)

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> "Deferred":
        """The result of an operation with a number, or with an array that broadcasts to this one."""
        # As JAX does, a number takes the dtype of the array
        operand = np.asarray(other).astype(self.dtype)
        if np.broadcast_shapes(operand.shape, self.shape) != self.shape:
            raise AxisError(f"an array of shape {operand.shape} does not fit one of {self.shape}")
        dim = self.dim - self.ndim + operand.ndim

        def change(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
            if dim < 0 or operand.shape[dim] == 1:
                return operation(rows, operand)
            return operation(rows, operand[(slice(None),) * dim + (slice(start, stop),)])

        return self.by_rows(change)
