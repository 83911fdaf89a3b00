"""Where every array lives: the only place that makes a mesh, and axis names become mesh axes.

A `Layout` is three numbers, and each of them is a mesh axis. `data` replicas each hold the whole state;
over `fsdp` devices every parameter, gradient and moment is split along its largest free axis and
gathered layer by layer as the scan needs it (ZeRO-3); over `tensor` devices the heads, the MLP and the
vocabulary are split and activations travel instead. Sequences are split over `data` and `fsdp`.

`jax.pmap` is not used: JAX keeps it in maintenance only, and it cannot express any of this.
"""

import dataclasses
import functools
import itertools
import math
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from growjax.axes import Slot, axes_of, find, get, put
from growjax.errors import LayoutError
from growjax.nn import Stacked
from growjax.values import Range, check, register


AXES = ("data", "fsdp", "tensor")
# The compiler may choose; Explicit axes refuse an embedding table that is split by vocabulary
_TYPES = (AxisType.Auto,) * 3
# Sequences are split over replicas and over the devices that share one replica's state.
BATCH = PartitionSpec(("data", "fsdp"))
# Named axes that may be split over `tensor`; the first that divides wins.
_TENSOR = ("kv_heads", "group", "mlp", "experts", "vocab")

_DEVICES = "a positive number of devices"
_Steps = tuple[str | int, ...]


@register
@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is spread over devices: the sizes of three mesh axes.

    **Fields**

    - `data`: replicas; -1 takes the devices that the other two leave.
    - `fsdp`: devices that share one replica's parameters, gradients and optimizer state.
    - `tensor`: devices that share one layer's heads and units.
    - `step`: "auto" lets the compiler place the collectives from the shardings; "shard_map" writes
      them out, and needs `fsdp` and `tensor` at 1.
    - `own_paths`: each replica draws a sub-network of its own ("shard_map" only).

    Raises `LayoutError` for sizes that make no mesh.

    **Example**

        Layout(fsdp=8, tensor=2).mesh()       # over all devices: 16 of them a replica
    """

    data: Annotated[int, Range(f"{_DEVICES}, or -1", lambda n: n == -1 or 0 < n < 2**31)] = -1
    fsdp: Annotated[int, Range(_DEVICES, lambda n: 0 < n < 2**31)] = 1
    tensor: Annotated[int, Range(_DEVICES, lambda n: 0 < n < 2**31)] = 1
    step: Literal["auto", "shard_map"] = "auto"
    own_paths: bool = False

    def __post_init__(self):
        check(self, LayoutError, "this layout cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if self.step == "shard_map" and (self.fsdp, self.tensor) != (1, 1):
            yield "step: 'shard_map' is for replicas alone; set fsdp and tensor to 1"
        if self.own_paths and self.step != "shard_map":
            yield "own_paths: only replicas under step='shard_map' can differ"

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.data, self.fsdp, self.tensor

    def resolved(self, devices: int) -> tuple[int, int, int]:
        """The three sizes for a number of devices; raises `LayoutError` if they do not multiply to it."""
        shared = self.fsdp * self.tensor
        data = devices // shared if self.data == -1 else self.data
        if data * shared != devices:
            raise LayoutError(
                f"data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not make {devices} "
                "devices; data=-1 takes what is left, if the others divide it"
            )
        return data, self.fsdp, self.tensor

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over these devices (by default all, of every host)."""
        devices = jax.devices() if devices is None else devices
        sizes = self.resolved(len(devices))
        try:
            return jax.make_mesh(sizes, AXES, axis_types=_TYPES, devices=devices)
        except NotImplementedError:
            # No axis of the torus has one of these sizes, such as 2 on a slice of 4x4: two share one
            placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(placed, AXES, axis_types=_TYPES)

    def outline(self, devices: int) -> Any:
        """The mesh over so many devices that need not be there: enough for shapes and shardings."""
        return AbstractMesh(self.resolved(devices), AXES, axis_types=_TYPES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, over every device that is not sharing a layer."""
    return NamedSharding(mesh, BATCH)


def model_shardings(model: Any, mesh: Mesh) -> Any:
    """A tree like `model` with the `NamedSharding` of each array, from its axes alone.

    `model` may hold arrays or shapes. A parameter is split over `tensor` along the first of its head,
    MLP or vocabulary axes that divides evenly, and over `fsdp` along the largest axis left, never along
    a stack of layers (a scan reads one layer at a time). Gates, buffers and what divides by nothing are
    replicated; `unsplit` lists the latter.
    """
    everywhere = replicated(mesh)
    tree = jax.tree.map(lambda _: everywhere, model)
    slots = axes_of(model).of_kind("param")
    found = {s.steps: NamedSharding(mesh, spec_of(s, mesh)) for s in slots if s.arrays()}
    return put(tree, found)


def spec_of(slot: Slot, mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter, by the rule of `model_shardings`."""
    shape, starts = slot.value.shape, np.cumsum([0, *slot.spec.groups])
    axes = [slot.dims[a:b] for a, b in itertools.pairwise(starts)]
    chosen: list[str | None] = [None] * len(shape)

    def free(size: int) -> list[int]:
        """The dimensions that can be split in `size` equal parts and are not split yet."""
        return [
            i
            for i, dims in enumerate(axes)
            if chosen[i] is None and shape[i] % size == 0 and dims[0].role != "stack"
        ]

    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1:
        ranked = [i for name in _TENSOR for i in free(tensor) if axes[i][0].axis == name]
        if ranked:
            chosen[ranked[0]] = "tensor"
    if fsdp > 1 and (large := free(fsdp)):
        chosen[max(large, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*chosen)


def gathered(model: Any, mesh: Mesh) -> Any:
    """The same model, each parameter gathered over `fsdp` where it is read: for use under a gradient.

    The layers of a `Stacked` are gathered by its scan, one at a time and again on the way back, and each
    gradient is scattered where it arises. Left to itself, the compiler splits activations like the
    parameters that they meet, and sends those around.
    """
    if mesh.shape["fsdp"] == 1:
        return model
    reads = {s.steps: _read_of(s, mesh) for s in axes_of(model).of_kind("param") if s.arrays()}
    values: dict[_Steps, Any] = {}
    stacks: dict[_Steps, dict[_Steps, _Read]] = {}
    for steps, read in reads.items():
        ends = [i for i in range(len(steps)) if isinstance(get(model, steps[:i]), Stacked)]
        if ends:
            # Within its stack, and without the dimension of the layers
            inner = stacks.setdefault(steps[: ends[0]], {})
            inner[steps[ends[0] + 1 :]] = read._replace(spec=PartitionSpec(*read.spec[1:]))
        else:
            values[steps] = _gathered(get(model, steps), mesh, read)

    def layer(reads: dict[_Steps, _Read], block: Any) -> Any:
        return put(block, {s: _gathered(get(block, s), mesh, read) for s, read in reads.items()})

    for steps, inner in stacks.items():
        values[(*steps, "read")] = functools.partial(layer, inner)
    return put(model, values)


class _Read(NamedTuple):
    """How one parameter is split, and whether its gradient is summed whole before it is split."""

    spec: PartitionSpec
    sum_whole: bool


def _read_of(slot: Slot, mesh: Mesh) -> _Read:
    """How a parameter is read under `fsdp`.

    The gradient of a lookup adds rows of activations up. Where `fsdp` splits the columns of such a
    table, its gradient must be summed whole before it is split, or the compiler sends the columns of
    the activations to where they are added.
    """
    spec = spec_of(slot, mesh)
    starts = np.cumsum([0, *slot.spec.groups])[:-1]
    looked_up = {i for i, start in enumerate(starts) if slot.dims[start].role == "lookup"}
    return _Read(spec, bool(looked_up) and not any(spec[i] == "fsdp" for i in looked_up))


def _gathered(x: jax.Array, mesh: Mesh, read: _Read) -> jax.Array:
    if "fsdp" not in read.spec:
        return x
    split = NamedSharding(mesh, read.spec)
    columns = (None if name == "fsdp" else name for name in read.spec)
    whole = NamedSharding(mesh, PartitionSpec(*columns))

    # A constraint is its own transpose, and would ask for the whole gradient everywhere
    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, whole)

    def scatter(_, gradient):
        if read.sum_whole:
            gradient = jax.lax.with_sharding_constraint(gradient, whole)
        return (jax.lax.with_sharding_constraint(gradient, split),)

    gather.defvjp(lambda x: (gather(x), None), scatter)
    return gather(x)


def unsplit(model: Any, mesh: Mesh) -> list[str]:
    """The parameters with two or more dimensions that `fsdp` or `tensor` could not split at all."""
    shared = mesh.shape["fsdp"] * mesh.shape["tensor"]
    slots = [s for s in axes_of(model).of_kind("param") if s.arrays() and shared > 1]
    return [s.path for s in slots if len(s.dims) > 1 and not any(spec_of(s, mesh))]


def state_shardings(state: Any, trained: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: what is shaped like the parameters is split like them."""
    like, everywhere = model_shardings(trained, mesh), replicated(mesh)
    where = {s.steps: get(like, s.steps) for s in axes_of(trained).of_kind("param") if s.arrays()}

    def of(node):
        tree = jax.tree.map(lambda _: everywhere, node)
        if not isinstance(node, type(trained)):
            return tree
        # A masked optimizer keeps only a part of the tree, and a counter may stand in a leaf's place.
        shaped = {
            steps: sharding
            for steps, sharding in where.items()
            if getattr(find(node, steps), "shape", None) == get(trained, steps).shape
        }
        return put(tree, shaped)

    return jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, type(trained)))


def per_device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of the fullest device, for arrays or shapes under these shardings."""
    arrays, where = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    return sum(
        math.prod(sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x, sharding in zip(arrays, where, strict=True)
    )


# Many hosts --------------------------------------------------------------------------------------


def connect(
    *, timeout: int = 300, heartbeat: int = 100, quiet: bool = False, **kwargs: Any
) -> None:
    """Join the other hosts of a pod, show who is there, and prove that they can add up.

    On a TPU pod, under Slurm and under MPI nothing has to be said; elsewhere pass what
    `jax.distributed.initialize` takes (`coordinator_address`, `num_processes`, `process_id`), or set
    `GROWJAX_COORDINATOR`, `GROWJAX_PROCESSES` and `GROWJAX_PROCESS`. Call it before any other use of
    JAX. Raises `LayoutError` if a host is missing after `timeout` seconds or the sum is wrong. Later, all
    hosts end when one has not been heard of for `heartbeat` seconds.
    """
    names = {
        "coordinator_address": ("GROWJAX_COORDINATOR", str),
        "num_processes": ("GROWJAX_PROCESSES", int),
        "process_id": ("GROWJAX_PROCESS", int),
    }
    given = {k: read(os.environ[v]) for k, (v, read) in names.items() if v in os.environ}
    given |= kwargs
    try:
        jax.distributed.initialize(
            initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat, **given
        )
    except (RuntimeError, ValueError) as error:
        raise LayoutError(
            f"host {socket.gethostname()} could not join the run within {timeout} s: {error}. Start "
            "every host within that time, with the same coordinator address and number of processes"
        ) from error
    total = self_test()
    if not quiet:
        print(
            f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
            f"{jax.local_device_count()} of {total} {jax.devices()[0].device_kind} devices",
            flush=True,
        )


def keep_programs(default: Path, requested: str = "") -> Path | None:
    """Keep what is compiled in a folder, so that a run that goes on compiles nothing anew.

    `requested` is a folder or "none"; if it is empty, the folder that JAX was told
    (`JAX_COMPILATION_CACHE_DIR`) stays, and `default` is taken if there is none. Returns the folder, or
    None if programs are not kept. Several processes of CPUs keep none: loading such a program ends them
    (JAX 0.10).
    """
    # JAX decides with the first program, and would not look at the settings again
    compilation_cache.reset_cache()
    if requested == "none" or (jax.process_count() > 1 and jax.default_backend() == "cpu"):
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    told = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not requested and told:
        return Path(told)
    folder = Path(requested) if requested else default
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX keeps what took a second or more: a toy plan has none, and waits for fifty
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def self_test() -> int:
    """Sum a one from every device of every host: the number of devices, or a `LayoutError`."""
    mesh = Layout().mesh()
    ones = jax.make_array_from_callback(
        (mesh.size,), split_rows(mesh), lambda index: np.ones(mesh.size, np.float32)[index]
    )
    total = jax.jit(jnp.sum, out_shardings=replicated(mesh))(ones)
    found = int(total.addressable_data(0))
    if found != mesh.size:
        raise LayoutError(f"an all-reduce over {mesh.size} devices summed their ones to {found}")
    return found


def from_host(rows: Any, mesh: Mesh) -> Any:
    """Put this host's rows of a batch (a tree of numpy arrays) where they belong on the mesh."""
    sharding = split_rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
