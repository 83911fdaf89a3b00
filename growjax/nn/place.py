"""The platform and the mesh that a program is traced for, which decide how attention is computed.

A program is traced on one machine and may run on another: a plan for a TPU slice is compiled on a laptop.
So the machine's own platform decides only where nothing else is known. The place is part of the key of
JAX's caches of traced programs.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh


# The axis of a mesh that sequences are split over
CONTEXT = "context"


class Place(NamedTuple):
    """Where a program will run.

    - `platform`: "tpu", "gpu" or "cpu"; that of `SHAPES` is none of them.
    - `mesh`: the mesh that its arrays are split over; None on one device, and under `shard_map`, where
      each device holds its own part already.
    """

    platform: str
    mesh: Mesh | None = None

    @property
    def context(self) -> int:
        """The number of devices that one sequence is split over."""
        return 1 if self.mesh is None else self.mesh.shape.get(CONTEXT, 1)

    @property
    def slices(self) -> int:
        """The number of slices of TPUs, or machines with GPUs, that a slower network connects."""
        return 1 if self.mesh is None else slices_of(self.mesh.devices.flat)


def slices_of(devices: Iterable[Any]) -> int:
    """The number of slices that these devices are of."""
    return len({getattr(device, "slice_index", 0) for device in devices})


# Nothing will run: shapes and FLOPs are counted, and kernels need not be there
SHAPES = Place("shapes")

# Values of this context are part of JAX's cache keys
_PLACE: Any = jax.make_user_context(None)


@contextlib.contextmanager
def running_on(place: Place | None) -> Iterator[None]:
    """Trace for this place; None changes nothing.

    **Example**

        with running_on(Place("tpu")):
            program = jax.jit(model).trace(tokens)      # splash attention, on any machine
    """
    if place is None:
        yield
        return
    with _PLACE(place):
        yield


def place_of(mesh: Mesh | AbstractMesh) -> Place | None:
    """The place of programs that run on a mesh; None for an abstract one, whose devices are unknown."""
    if isinstance(mesh, AbstractMesh):
        return None
    platform = mesh.devices.flat[0].platform
    return Place(platform, mesh if mesh.size > 1 else None)


def current() -> Place | None:
    """The place that is traced for, or else this machine; None if that is several devices.

    On several devices without a mesh, the arrays may be split in any way, which a kernel cannot follow.
    """
    if _PLACE.value is not None:
        return _PLACE.value
    device = getattr(jax.config, "jax_default_device", None)
    if isinstance(device, str):
        return Place(device)
    if device is not None:
        return Place(device.platform)
    platform = jax.default_backend()
    return Place(platform) if platform == "cpu" or jax.device_count() == 1 else None
