"""The mesh of devices and the sharding of every array, derived from the names of its axes.

A `Layout` gives the sizes of the mesh axes:

- `data`: replicas, each of which holds the whole state.
- `fsdp`: devices that split every parameter, gradient and moment along its largest free axis; parameters
  are gathered layer by layer, as the scan reads them (ZeRO-3).
- `tensor`: devices that split the heads, the MLP and the vocabulary, and send activations instead.
- `experts`: devices that split the experts of a mixture; each runs its own experts on the tokens of all
  of them. A mesh has this axis only where its size is above 1.
- `context`: devices that split each sequence: its activations, and the queries of attention, for which
  they gather all keys (`growjax.nn.split`). A mesh has this axis only where its size is above 1.

The sequences of a batch are split over `data`, `fsdp` and `experts`. `jax.pmap` is not used: JAX only
maintains it, and it has no such meshes.
"""

import atexit
import dataclasses
import functools
import itertools
import math
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from growjax.axes import Slot, axes_of, find, get, put
from growjax.errors import LayoutError
from growjax.nn import Stacked, stacked
from growjax.nn.experts import Experts, Placement
from growjax.nn.place import CONTEXT, slices_of
from growjax.nn.stacked import Name, Remat
from growjax.values import Range, Size, check, register


AXES = ("data", "fsdp", "tensor")
EXPERTS = "experts"
# The rows of a batch are split over replicas, and over the devices that share one replica's state
BATCH = PartitionSpec(("data", "fsdp"))
# Named axes that may be split over `tensor`, the preferred ones first
_TENSOR = ("kv_heads", "group", "mlp", "experts", "vocab")

_DEVICES = "a positive number of devices"
_Steps = tuple[str | int, ...]  # the path of a leaf in a model


@register
@dataclasses.dataclass(frozen=True)
class Layout:
    """The distribution of a run over devices: the sizes of the mesh axes.

    **Fields**

    - `data`: the number of replicas; -1 for the number of devices divided by the other sizes.
    - `fsdp`: the number of devices that share one replica's parameters, gradients and optimizer state.
    - `tensor`: the number of devices that share one layer's heads and units.
    - `experts`: the number of devices that share the experts of a mixture, as far as it divides them.
    - `step`: "auto" lets the compiler place the collectives, from the shardings; "shard_map" writes
      them out, and needs all other sizes but `data` at 1.
    - `own_paths`: each replica draws a sub-network of its own ("shard_map" only).
    - `remat`: what training keeps of the forward pass for the backward pass, which recomputes the rest:
      "none" recomputes nothing, "dots" all but matrix products, "attention" all but what attention reads
      and gives, "full" everything; "offload" is "dots" with the products in the host's memory; "model"
      is the model's own choice.
    - `unroll`: the number of layers that are compiled in a row, in each iteration of the scan.
    - `context`: the number of devices that share one sequence, whose length they must divide.
    - `offload`: what of a layer is kept in the host's memory between the passes, whatever `remat` is:
      "layer inputs", "attention inputs", "attention" (its outputs) and "between branches" (what the
      feed-forward reads).

    Raises `LayoutError` for fields that are invalid or do not fit together.

    **Example**

        Layout(fsdp=8, tensor=2).mesh()       # over all devices: 16 of them a replica
    """

    data: Annotated[int, Range(f"{_DEVICES}, or -1", lambda n: n == -1 or 0 < n < 2**31)] = -1
    fsdp: Annotated[int, Range(_DEVICES, lambda n: 0 < n < 2**31)] = 1
    tensor: Annotated[int, Range(_DEVICES, lambda n: 0 < n < 2**31)] = 1
    step: Literal["auto", "shard_map"] = "auto"
    own_paths: bool = False
    experts: Annotated[int, Range(_DEVICES, lambda n: 0 < n < 2**31)] = 1
    remat: Literal["model", "none", "dots", "attention", "full", "offload"] = "model"
    unroll: Size = 1
    context: Annotated[int, Range(_DEVICES, lambda n: 0 < n < 2**31)] = 1
    offload: tuple[Name, ...] = ()

    @property
    def uses_host(self) -> bool:
        """Whether a training step moves data to the host's memory and back."""
        return self.remat == "offload" or bool(self.offload)

    def __post_init__(self):
        check(self, LayoutError, "this layout cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        shared = self.fsdp, self.tensor, self.experts, self.context
        if self.step == "shard_map" and shared != (1, 1, 1, 1):
            yield "step: 'shard_map' is for replicas alone; set fsdp, tensor, experts and context to 1"
        if self.own_paths and self.step != "shard_map":
            yield "own_paths: only replicas under step='shard_map' can differ"

    @property
    def sizes(self) -> tuple[int, ...]:
        """`data`, `fsdp` and `tensor`, and those of `experts` and `context` that are above 1."""
        return tuple(getattr(self, axis) for axis in self.axes)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of these sizes in the mesh."""
        return (*AXES, *(axis for axis in (EXPERTS, CONTEXT) if getattr(self, axis) > 1))

    @property
    def shared(self) -> int:
        """The number of devices of one replica."""
        return math.prod(self.sizes[1:])

    def resolved(self, devices: int) -> tuple[int, ...]:
        """The sizes for a number of devices; raises `LayoutError` if they do not multiply to it."""
        data = devices // self.shared if self.data == -1 else self.data
        if data * self.shared != devices:
            names = " x ".join(self.axes[1:])
            sizes = " x ".join(map("=".join, zip(self.axes, map(str, self.sizes), strict=True)))
            raise LayoutError(
                f"{sizes} does not make {devices} devices; data=-1 fits if {names} divides them"
            )
        return data, *self.sizes[1:]

    @property
    def _types(self) -> tuple[AxisType, ...]:
        # Auto: the compiler chooses the shardings of results. With Explicit axes, JAX refuses a lookup in
        # an embedding table that is split by vocabulary.
        return (AxisType.Auto,) * len(self.axes)

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over these devices (by default all, of every host).

        Slices of TPUs and machines with GPUs are connected by a slower network. `data` goes across it,
        then `fsdp`; raises `LayoutError` if the other sizes would have to.
        """
        devices = jax.devices() if devices is None else devices
        sizes = self.resolved(len(devices))
        hosts = len({device.process_index for device in devices})
        parts = len(devices) // (self.tensor * self.context)
        if parts % hosts:
            raise LayoutError(
                f"{hosts} hosts cannot share {parts} parts of a batch: each reads rows of its own, so "
                "tensor and context must stay within one; make data or fsdp larger"
            )
        slices = slices_of(devices)
        if slices > 1:
            placed = _over_slices(sizes, slices, devices)
            return Mesh(placed, self.axes, axis_types=self._types)
        try:
            return jax.make_mesh(sizes, self.axes, axis_types=self._types, devices=devices)
        except NotImplementedError:
            # JAX maps each mesh axis to whole axes of the TPU's torus. If that is not possible, as for a
            # size of 2 on a slice of 4x4, two mesh axes share one axis of the torus.
            placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(placed, self.axes, axis_types=self._types)

    def outline(self, devices: int) -> Any:
        """An abstract mesh over a number of devices that need not exist, for shapes and shardings."""
        return AbstractMesh(self.resolved(devices), self.axes, axis_types=self._types)


def _over_slices(sizes: tuple[int, ...], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices of several slices in the order of a mesh: `data` across slices first, then `fsdp`."""
    data, fsdp, *rest = sizes
    across = math.gcd(data, slices), slices // math.gcd(data, slices)
    if fsdp % across[1]:
        raise LayoutError(
            f"data={data} x fsdp={fsdp} cannot be split over {slices} slices, and what else "
            "shares a replica must be of one slice; make data a multiple of the slices"
        )
    within = data // across[0], fsdp // across[1], *rest
    return mesh_utils.create_hybrid_device_mesh(
        within, (*across, *[1] * len(rest)), devices, allow_split_physical_axes=True
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its rows are split over `data`, `fsdp` and `experts`."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def row_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that the rows of a batch are split over."""
    return (*BATCH[0], EXPERTS) if EXPERTS in mesh.shape else BATCH[0]


def row_parts(mesh: Any) -> int:
    """The number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def model_shardings(model: Any, mesh: Mesh) -> Any:
    """A tree like `model` with the `NamedSharding` of each array, from its axes alone.

    `model` may hold arrays or shapes. The matrices of experts are split over `experts` along that axis,
    if it divides evenly. A parameter is split over `tensor` along the first of its head,
    MLP or vocabulary axes that divides evenly, and over `fsdp` along the largest axis left, never along
    a stack of layers (a scan reads one layer at a time). Gates, buffers and parameters that cannot be
    split evenly are replicated; `unsplit` lists the last.
    """
    everywhere = replicated(mesh)
    tree = jax.tree.map(lambda _: everywhere, model)
    slots = axes_of(model).of_kind("param")
    shardings = {s.steps: NamedSharding(mesh, spec_of(s, mesh)) for s in slots if s.arrays()}
    return put(tree, shardings)


def spec_of(slot: Slot, mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter, by the rule of `model_shardings`."""
    # One dimension of the array may be several named axes, merged; the first of them is the outermost
    shape, starts = slot.value.shape, np.cumsum([0, *slot.spec.groups])
    axes = [slot.dims[a:b] for a, b in itertools.pairwise(starts)]
    mesh_axes: list[str | None] = [None] * len(
        shape
    )  # of each dimension, the mesh axis that splits it

    def free(size: int) -> list[int]:
        """The dimensions that can be split in `size` equal parts and are not split yet."""
        return [
            i
            for i, dims in enumerate(axes)
            if mesh_axes[i] is None and shape[i] % size == 0 and dims[0].role != "stack"
        ]

    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if EXPERTS in mesh.shape:
        for i in free(mesh.shape[EXPERTS]):
            if axes[i][0].axis == EXPERTS and axes[i][0].role == "lookup":
                mesh_axes[i] = EXPERTS
    if tensor > 1:
        ranked = [i for name in _TENSOR for i in free(tensor) if axes[i][0].axis == name]
        if ranked:
            mesh_axes[ranked[0]] = "tensor"
    if fsdp > 1 and (dimensions := free(fsdp)):
        mesh_axes[max(dimensions, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*mesh_axes)


def gathered(model: Any, mesh: Mesh) -> Any:
    """The model with each parameter gathered over `fsdp` where it is read, for use under a gradient.

    The layers of a `Stacked` are gathered in its scan, one at a time, and again in the backward pass;
    each gradient is scattered where it is computed. Without this, the compiler splits the activations
    along the parameters' dimensions, and sends activations between devices.
    """
    model = _placed(model, mesh)
    if mesh.shape["fsdp"] == 1:
        return model
    reads = {s.steps: _read_of(s, mesh) for s in axes_of(model).of_kind("param") if s.arrays()}
    values: dict[_Steps, Any] = {}
    stacks: dict[_Steps, dict[_Steps, _Read]] = {}
    for steps, read in reads.items():
        # Lengths of the prefixes of the path that end at a stack; the first is the outermost stack
        ends = [i for i in range(len(steps)) if isinstance(get(model, steps[:i]), Stacked)]
        if ends:
            # The path within the stack (after its field for the block), and the partition of one layer
            inner = stacks.setdefault(steps[: ends[0]], {})
            inner[steps[ends[0] + 1 :]] = read._replace(spec=PartitionSpec(*read.spec[1:]))
        else:
            values[steps] = _gathered(get(model, steps), mesh, read)

    def layer(reads: dict[_Steps, _Read], block: Any) -> Any:
        """One layer of a stack, gathered."""
        return put(block, {s: _gathered(get(block, s), mesh, read) for s, read in reads.items()})

    for steps, inner in stacks.items():
        values[(*steps, "read")] = functools.partial(layer, inner)
    return put(model, values)


def _placed(model: Any, mesh: Mesh) -> Any:
    """The model with the mesh told to its experts, which then send tokens and not weights."""
    if mesh.size == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return model  # in a `shard_map` each device has tokens and weights of its own
    is_mixture = lambda node: isinstance(node, Experts)  # noqa: E731
    if not any(map(is_mixture, jax.tree.leaves(model, is_leaf=is_mixture))):
        return model
    where = Placement(mesh, row_axes(mesh))

    def told(node):
        return put(node, {("placement",): where}) if is_mixture(node) else node

    return jax.tree.map(told, model, is_leaf=is_mixture)


class _Read(NamedTuple):
    """The partition of one parameter, and whether its gradient is summed whole before it is split."""

    spec: PartitionSpec
    sum_whole: bool


def _read_of(slot: Slot, mesh: Mesh) -> _Read:
    """The partition of a parameter and of its gradient under `fsdp`.

    The gradient of a lookup is a sum of rows of activations. If `fsdp` splits the columns of such a
    table, its gradient must be summed whole before it is split; otherwise the compiler sends the columns
    of the activations to the devices that add them.
    """
    spec = spec_of(slot, mesh)
    starts = np.cumsum([0, *slot.spec.groups])[:-1]
    # The matrices of experts are no tables: their gradients are products
    table = all(dim.role != "consumed" for dim in slot.dims)
    looked_up = {i for i, d in enumerate(starts) if table and slot.dims[d].role == "lookup"}
    return _Read(spec, bool(looked_up) and not any(spec[i] == "fsdp" for i in looked_up))


def _gathered(x: jax.Array, mesh: Mesh, read: _Read) -> jax.Array:
    """The parameter gathered over `fsdp`; its gradient is split again."""
    if "fsdp" not in read.spec:
        return x
    split = NamedSharding(mesh, read.spec)
    columns = (None if name == "fsdp" else name for name in read.spec)
    whole = NamedSharding(mesh, PartitionSpec(*columns))

    # By itself, the transpose of a sharding constraint is the same constraint, which would gather the
    # gradient on every device as well
    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, whole)

    def scatter(_, gradient):
        if read.sum_whole:
            gradient = jax.lax.with_sharding_constraint(gradient, whole)
        return (jax.lax.with_sharding_constraint(gradient, split),)

    gather.defvjp(lambda x: (gather(x), None), scatter)
    return gather(x)


def remembering(model: Any, layout: Layout) -> Any:
    """The model with every stack of layers scanned as the layout says."""
    names: dict[str, Remat | None] = {"model": None, "none": "everything", "full": "nothing"}
    remat: Any = names.get(layout.remat, layout.remat)
    return stacked.remembering(model, remat, layout.unroll, layout.offload)


def unsplit(model: Any, mesh: Mesh) -> list[str]:
    """The parameters of two or more dimensions that no axis of the mesh but `data` can split."""
    shared = mesh.size // mesh.shape["data"]
    slots = [s for s in axes_of(model).of_kind("param") if s.arrays() and shared > 1]
    return [s.path for s in slots if len(s.dims) > 1 and not any(spec_of(s, mesh))]


def state_shardings(state: Any, trained: Any, mesh: Mesh) -> Any:
    """The shardings of an optimizer state: arrays of a parameter's shape are split like the parameter."""
    like, everywhere = model_shardings(trained, mesh), replicated(mesh)
    shardings = {
        s.steps: get(like, s.steps) for s in axes_of(trained).of_kind("param") if s.arrays()
    }

    def of(node):
        """The shardings of one moment, a tree like the parameters, or of any other leaf."""
        tree = jax.tree.map(lambda _: everywhere, node)
        if not isinstance(node, type(trained)):
            return tree
        # A masked optimizer has moments of some parameters only, and may have counters for others
        same_shape = {}
        for steps, sharding in shardings.items():
            if getattr(find(node, steps), "shape", None) == get(trained, steps).shape:
                same_shape[steps] = sharding
        return put(tree, same_shape)

    return jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, type(trained)))


def per_device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes on the fullest device, for arrays or shapes with these shardings."""
    total = 0
    for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        total += math.prod(sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    return total


# Many hosts --------------------------------------------------------------------------------------


def connect(
    *, timeout: int = 300, heartbeat: int = 100, quiet: bool = False, **kwargs: Any
) -> None:
    """Join the other hosts of a pod, print the devices, and test a sum over all of them.

    On a TPU pod, under Slurm and under MPI no arguments are needed. Elsewhere pass the arguments of
    `jax.distributed.initialize` (`coordinator_address`, `num_processes`, `process_id`), or set
    `GROWJAX_COORDINATOR`, `GROWJAX_PROCESSES` and `GROWJAX_PROCESS`. Call it before any other use of
    JAX. Raises `LayoutError` if a host is missing after `timeout` seconds or the sum is wrong. From then
    on, all hosts end if one ends with an exception or does not respond, within `heartbeat` seconds.
    """
    arguments: dict[str, Any] = {}
    for name, variable, convert in (
        ("coordinator_address", "GROWJAX_COORDINATOR", str),
        ("num_processes", "GROWJAX_PROCESSES", int),
        ("process_id", "GROWJAX_PROCESS", int),
    ):
        if variable in os.environ:
            arguments[name] = convert(os.environ[variable])
    arguments |= kwargs
    try:
        jax.distributed.initialize(
            initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat, **arguments
        )
    except (RuntimeError, ValueError) as error:
        raise LayoutError(
            f"host {socket.gethostname()} could not join the run within {timeout} s: {error}. Start "
            "every host within that time, with the same coordinator address and number of processes"
        ) from error
    _end_after_errors()
    total = self_test()
    if not quiet:
        print(
            f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
            f"{jax.local_device_count()} of {total} {jax.devices()[0].device_kind} devices",
            flush=True,
        )


def _end_after_errors() -> None:
    """Let this process end as soon as an exception has ended its script.

    JAX's own exit waits for the other hosts (five minutes), which wait for this one in their next sum.
    """
    failed = False
    show = sys.excepthook

    def hook(*error: Any) -> None:
        nonlocal failed
        failed = True
        show(*error)

    def end() -> None:
        if failed:
            # `os._exit` does not flush
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    sys.excepthook = hook
    # Functions registered last run first: after all that the script registers, and before JAX's
    atexit.register(end)


def self_test() -> int:
    """Sum a 1 from every device of every host; returns the number of devices.

    Raises `LayoutError` if the sum is another number.
    """
    mesh = Layout().mesh()
    ones = jax.make_array_from_callback(
        (mesh.size,), split_rows(mesh), lambda index: np.ones(mesh.size, np.float32)[index]
    )
    total = jax.jit(jnp.sum, out_shardings=replicated(mesh))(ones)
    devices = int(total.addressable_data(0))
    if devices != mesh.size:
        raise LayoutError(f"an all-reduce over {mesh.size} devices summed their ones to {devices}")
    return devices


def from_host(rows: Any, mesh: Mesh) -> Any:
    """Put this host's rows of a batch (a tree of NumPy arrays) on its devices, by `split_rows`."""
    sharding = split_rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
