"""A plan compiled for a TPU slice, without a TPU: memory, collectives and estimates of every program.

The TPU compiler runs on any Linux machine; it needs only the `libtpu` wheel and the name of a slice.
Whether each stage fits a chip's memory, and which collectives it runs, is therefore known before a slice
is rented. The real time of a step is not.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from growjax.errors import CostError, LayoutError, raise_all
from growjax.forecast.cycles import Cycles, cycles
from growjax.forecast.dryrun import amount, work_label
from growjax.forecast.memory import cheapest, remedies
from growjax.forecast.speed import DEVICES, Device, Pace, pace_of, pace_table
from growjax.gates import ungated
from growjax.parallel import Layout, per_device_bytes, replicated, row_parts
from growjax.plan.plan import Plan
from growjax.plan.stages import Work
from growjax.programs.ahead import Need, lower, needs
from growjax.programs.step import Programs


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    - `dimensions`: the dimensions of a slice, 2 for 4x4.
    - `accelerator`: the name of its slices in Google Cloud; the count in that name is `per_chip` times
      the number of chips.
    """

    dimensions: int
    accelerator: str
    per_chip: int = 1


GENERATIONS = {
    "v5e": Generation(2, "v5litepod"),
    "v5p": Generation(3, "v5p", per_chip=2),
    "v6e": Generation(2, "v6e"),
}
# v4 is missing: the compiler describes each of its chips as two devices, of which JAX makes no mesh

# The compiler reserves a quarter of a GiB or more of a chip's memory for itself
_RESERVED = 256 << 20

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_CALL = re.compile(rf"\b({'|'.join(COLLECTIVES)})(?:-start)?\(")
# A reduce-scatter in a TPU program: an all-reduce in a fusion of its own, which returns a slice
_FUSED = re.compile(r"^%all-reduce-scatter[\w.-]* \(", re.MULTILINE)
# What a slice sends to others leaves through the hosts' network, by a runtime of this name
_BETWEEN = re.compile(r"\bsend\(.*_xla_megascale")
# Transfers to or from the host's memory, which the compiler's text calls memory space 5
_HOST = re.compile(
    r"\b(?:outfeed|infeed|send|recv)\((?!.*_xla_megascale)|_xla_buffer_placement=\"pinned_host\""
    r"|S\(5\).* (?:copy|dynamic-slice|dynamic-update-slice)-start\("
)
# The compiler's errors for a program that does not fit: with its size, or that of its temporaries alone
_FULL = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_TEMPORARIES = re.compile(
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled program, for one chip.

    **Fields**

    - `memory`: the bytes that it needs, for `arguments`, `results` that do not reuse their memory,
      `temporaries` and code. A program that does not fit is not compiled, and only `memory` is known.
    - `collectives`: the number of collectives of each kind in the program, the body of a scan counted
      once. A reduce-scatter that overlaps with the product before it is a loop of collective-permutes.
    - `between_slices`: the number of arrays that it sends to other slices.
    - `to_host`: the number of transfers to or from the host's memory.
    - `host_memory`: the bytes of the host's memory that it needs.
    - `flops`, `bytes_accessed`, `optimal_seconds`: the compiler's own estimates, the body of a scan
      counted once; None where it has none.
    - `cycles`: by `growjax.forecast.cycles`, all iterations of a scan counted; None where it cannot.
    - `seconds`: the time that compiling took.
    """

    stage: int
    name: str
    memory: int
    fits: bool
    arguments: int | None = None
    results: int | None = None
    temporaries: int | None = None
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    between_slices: int = 0
    to_host: int = 0
    host_memory: int = 0
    flops: float | None = None
    bytes_accessed: float | None = None
    optimal_seconds: float | None = None
    cycles: Cycles | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Target:
    """The result of `compile_for`; it prints as a table.

    - `refusals`: the programs that do not fit, and the changes of the plan that would make them fit.
    - `paces`: how fast each stage trains, by the compiler's cycles; of stages that were compiled and fit.
    """

    plan: str
    target: str
    chips: int
    memory: int
    programs: tuple[Compiled, ...]
    refusals: tuple[str, ...]
    paces: tuple[Pace, ...] = ()
    names: tuple[str, ...] = ()  # of the plan's stages

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings, lists and dicts, for JSON."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Raise `LayoutError` that lists the programs that do not fit; do nothing if all fit."""
        headline = f"plan {self.plan!r} does not fit {self.target}:"
        raise_all(LayoutError, headline, self.refusals)

    def __rich__(self) -> RenderableType:
        table = Table(
            title=Text(
                f"{self.plan} on {self.target}: {self.chips} chips of {amount(self.memory)}"
            ),
            caption="memory is a chip's; the rest counts the body of a scan once. Compiled in "
            f"{sum(p.seconds for p in self.programs):.0f} s",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("program", overflow="fold")
        for name in ("memory", "temporary", "collectives", "FLOPs", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        for p in self.programs:
            counts = [f"{n} {kind}" for kind, n in p.collectives.items() if n]
            if p.between_slices:
                counts.append(f"{p.between_slices} between slices")
            estimate = "unknown" if p.optimal_seconds is None else f"{p.optimal_seconds:.3g}"
            table.add_row(
                Text(f"{p.stage} {p.name}"),
                f"{amount(p.memory)}{'' if p.fits else ' (too much)'}",
                amount(p.temporaries),
                "\n".join(counts) or "none",
                "unknown" if p.flops is None else f"{p.flops:.3g}",
                estimate,
            )
        reasons = [Text(f"refused: {reason}") for reason in self.refusals]
        if not self.paces:
            return Group(table, *reasons)
        title = "by the compiler's cycles; waiting for other chips and for data is not in it"
        return Group(table, pace_table(title, self.paces, self.names), *reasons)


class _Shape(NamedTuple):
    """A target such as "2xv5e:4x4": slices, the generation's name, and the chips of one slice."""

    slices: int
    generation: str
    one: str
    chips: int


def _shape(target: str) -> _Shape:
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)", target, re.ASCII)
    generation = GENERATIONS.get(match[2]) if match else None
    sizes = [int(n) for n in match[3].split("x")] if match else []
    if match is None or generation is None or len(sizes) != generation.dimensions:
        examples = ", ".join(
            f"{name}:{'x'.join(['4'] * g.dimensions)} ({DEVICES[name].memory >> 30} GiB a chip)"
            for name, g in GENERATIONS.items()
        )
        raise LayoutError(
            f"target: expected a generation and the shape of a slice, such as {examples}, or several "
            f"slices, such as 2xv5e:4x4; got {target!r}"
        )
    return _Shape(int(match[1] or 1), match[2], match[3], math.prod(sizes))


def chips(target: str) -> int:
    """The number of chips of a slice such as "v5e:16x16", or of several, such as "2xv5e:16x16".

    Raises `LayoutError` for an invalid name.
    """
    shape = _shape(target)
    return shape.slices * shape.chips


def prepare(target: str) -> None:
    """Set the environment of the TPU compiler for a slice, and keep JAX from looking for a TPU here.

    `compile_for` calls it. Call it before any other use of JAX, which would look for a TPU first. Raises
    `LayoutError` if the compiler is not installed.
    """
    shape = _shape(target)
    generation = GENERATIONS[shape.generation]
    if importlib.util.find_spec("libtpu") is None:
        raise LayoutError(
            f"target: compiling for {target} needs the TPU compiler; install growjax[tpu] on Linux. No "
            "TPU is needed"
        )
    settings = {
        # Otherwise it asks Google Cloud's metadata server about this machine, and waits for an answer
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{generation.accelerator}-{shape.chips * generation.per_chip}",
        # No TPU is opened, so other processes may load the library at the same time
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        # A value that the user set stays. Importing JAX on a machine without a TPU sets some of these to
        # a text that begins with "WARNING".
        if os.environ.get(name, "WARNING").startswith("WARNING"):
            os.environ[name] = value
    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")


def topology(target: str) -> list[Any]:
    """The devices of a slice or several, as descriptions: programs can be compiled for them, but not run.

    Raises `LayoutError` if the compiler is not installed or does not know the slice.
    """
    prepare(target)
    from jax.experimental import topologies

    shape = _shape(target)
    try:
        return topologies.get_topology_desc(
            f"{shape.generation}:{shape.one}", platform="tpu", num_slices=shape.slices
        ).devices
    except Exception as error:
        # jaxlib raises a class of its own that has no public name
        raise LayoutError(
            f"target: the TPU compiler cannot describe a slice {target}: {error}"
        ) from error


def compile_for(
    plan: Plan,
    target: str,
    *,
    layout: Layout | None = None,
    stages: Sequence[int] | None = None,
    reference: Any = None,
    workers: int = 2,
) -> Target:
    """Compile every program of a plan for a TPU slice, on a machine without a TPU.

    **Arguments**

    - `target`: the slice, such as "v5e:16x16", or several, such as "2xv5e:16x16"; the generations are in
      `GENERATIONS`.
    - `layout`: instead of the plan's.
    - `stages`: the numbers of the stages to compile; by default all.
    - `reference`: the second model that a selector compares with, or its shapes; by default, the shapes
      of the model that trains.
    - `workers`: the number of programs that are compiled at the same time.

    Raises `LayoutError` if the compiler is not installed, the slice is unknown, or the layout or a batch
    cannot be split over it. A program that does not fit a chip's memory is no error: see `refusals`.

    **Example**

        print(compile_for(plan, "v5e:4x4").programs[-1].memory)
    """
    layout = plan.layout if layout is None else layout
    plan = dataclasses.replace(plan, layout=layout)
    mesh = layout.mesh(topology(target))
    ways = row_parts(mesh)
    raise_all(
        LayoutError,
        f"plan {plan.name!r} cannot be split over {target}:",
        [
            f"stage {s.index} {s.stage.name!r}: batch: {s.batch} sequences in {plan.accumulate} parts "
            f"on {ways} devices"
            for s in plan.spans
            if s.batch // plan.accumulate % ways
        ],
    )
    programs = Programs.of(plan, mesh)
    device = DEVICES[_shape(target).generation]
    indices = range(len(plan.spans)) if stages is None else stages
    requested = [need for i in indices for need in needs(plan.spans[i], first=False)]
    with _uncached(), concurrent.futures.ThreadPoolExecutor(workers, "compile") as pool:
        compile_one = functools.partial(_compile, plan, programs, device, reference=reference)
        compiled = tuple(pool.map(compile_one, requested))
    refusals = list(_refusals(plan, target, device, requested, compiled, reference))
    return Target(
        plan.name,
        target,
        mesh.size,
        device.memory,
        compiled,
        tuple(refusals),
        tuple(_paces(plan, mesh.size, device, requested, compiled)),
        tuple(stage.name for stage in plan.stages),
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Switch JAX's persistent cache off: a program for chips of another machine cannot be loaded."""
    before = getattr(jax.config, "jax_enable_compilation_cache", None)
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX reads the setting once, until the cache is reset
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _paces(
    plan: Plan,
    chips: int,
    device: Device,
    requested: Sequence[Need],
    compiled: Sequence[Compiled],
) -> Iterator[Pace]:
    """The pace of every stage all of whose steps have cycles."""
    seconds: dict[int, dict[Work, float]] = {}
    for (kind, stage, work), program in zip(requested, compiled, strict=True):
        if kind == "step" and work is not None and program.cycles is not None:
            seconds.setdefault(stage, {})[work] = program.cycles.total / device.clock
    for stage, of_work in seconds.items():
        span = plan.spans[stage]
        if {work for _, work in span.programs} <= of_work.keys():
            yield pace_of(span, of_work, device, chips)


def _compile(
    plan: Plan, programs: Programs, device: Device, need: Need, *, reference: Any
) -> Compiled:
    """Compile one program and read its memory, collectives and estimates."""
    name, stage = _name(need), need[1]
    everywhere = replicated(programs.mesh)
    second = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        ungated(plan.spans[stage].model) if reference is None else reference,
    )
    lowered = lower(plan, programs, need, second)
    start = time.perf_counter()
    try:
        program = lowered.compile()
    except Exception as error:
        # jaxlib raises a class of its own that has no public name
        return _too_large(programs, plan, need, error, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    text, sizes, costs = program.as_text(), program.memory_analysis(), program.cost_analysis() or {}
    # Results that alias (donated) arguments need no memory of their own
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    try:
        estimate = cycles(text, device.cores)
    except CostError:
        # A kernel of a user's own, or a loop whose length depends on data
        estimate = None
    return Compiled(
        stage,
        name,
        arguments + results + temporaries + sizes.generated_code_size_in_bytes,
        True,
        arguments=arguments,
        results=results,
        temporaries=temporaries,
        collectives=_collectives(text),
        between_slices=len(_BETWEEN.findall(text)),
        to_host=len(_HOST.findall(text)),
        host_memory=sizes.host_temp_size_in_bytes,
        flops=_positive(costs, "flops"),
        bytes_accessed=_positive(costs, "bytes accessed"),
        optimal_seconds=_positive(costs, "optimal_seconds"),
        cycles=estimate,
        seconds=seconds,
    )


def _too_large(
    programs: Programs, plan: Plan, need: Need, error: Exception, seconds: float
) -> Compiled:
    """A program that the compiler refused, with the memory that its error names; else `LayoutError`."""
    span, name = plan.spans[need[1]], _name(need)
    if match := _FULL.search(str(error)):
        number, unit, *_ = match.groups()
        return Compiled(span.index, name, _bytes(number, unit), False, seconds=seconds)
    if match := _TEMPORARIES.search(str(error)):
        # The arguments are the state, of known size
        shapes = programs.shapes(span.model)
        state = per_device_bytes(shapes, programs.shardings(shapes))
        number, unit, *_ = match.groups()
        temporaries = _bytes(number, unit)
        return Compiled(
            span.index, name, state + temporaries, False, temporaries=temporaries, seconds=seconds
        )
    raise LayoutError(f"stage {span.index}: {name}: it cannot be compiled: {error}") from error


def _collectives(text: str) -> dict[str, int]:
    """The number of collectives of each kind in the text of a compiled program."""
    counts, fused = collections.Counter(_CALL.findall(text)), len(_FUSED.findall(text))
    counts["reduce-scatter"] += fused
    counts["all-reduce"] -= fused
    return {kind: counts[kind] for kind in COLLECTIVES}


def _name(need: Need) -> str:
    """The name of a program in the table and in messages."""
    kind, _, work = need
    if kind != "step":
        names = {"numbers": "start of its fit", "fit": "batch of its fit", "grow": "growth"}
        names |= {"before": "evaluation before it", "evaluate": "evaluation"}
        return names[kind]
    if work is None or work == Work():
        return "step"
    return f"step, {work_label(work)}"


def _bytes(number: str, unit: str) -> int:
    """A size in the compiler's errors, such as "17.5" and "G", in bytes."""
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def _positive(costs: Any, name: str) -> float | None:
    """An estimate of the compiler; None where it has none, which it writes as a negative number."""
    value = costs.get(name, 0)
    return value if value > 0 else None


def _refusals(
    plan: Plan,
    target: str,
    device: Device,
    requested: Sequence[Need],
    compiled: Sequence[Compiled],
    reference: Any,
) -> Iterator[str]:
    """The programs that move data to the host or do not fit, with the changes that would help."""
    devices, memory = chips(target), device.memory - _RESERVED

    def measure(need: Need, changed: Plan) -> int | None:
        """The memory of a program of a changed plan, compiled; None if it does not fit."""
        programs = Programs.of(changed, changed.layout.mesh(topology(target)))
        with _uncached():
            program = _compile(changed, programs, device, need, reference=reference)
        return program.memory if program.fits else None

    for need, program in zip(requested, compiled, strict=True):
        where = f"stage {program.stage} {plan.spans[program.stage].stage.name!r}: {program.name}"
        if program.to_host and not plan.layout.uses_host:
            yield f"{where}: moves data to the host {program.to_host} times"
        if not program.fits:
            needed = f"{where}: needs {amount(program.memory)} of {amount(device.memory)} a chip"
            used, compile_it = program.memory, functools.partial(measure, need)
            proven = cheapest(plan, need, devices, used, memory, compile_it)
            estimated = remedies(plan, need, devices, used, memory)
            if proven and not estimated.startswith("any of these"):
                # The estimate finds nothing, and the compiler knows better
                yield f"{needed}; {proven}"
            else:
                yield f"{needed}; {proven or 'no single change makes it fit'}. By estimate, {estimated}"
