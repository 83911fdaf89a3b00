"""A plan compiled for a TPU slice that is not there: memory, collectives and time of every program.

The TPU compiler runs on any Linux machine; all that it needs is the `libtpu` wheel and the name of a
slice. So whether each stage fits a chip's memory, and what travels between chips, is known before
anybody rents one. What cannot be known is how fast a step really is.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from growjax.errors import LayoutError, raise_all
from growjax.forecast.dryrun import amount, said_work
from growjax.forecast.memory import remedies
from growjax.gates import ungated
from growjax.parallel import Layout, per_device_bytes, replicated
from growjax.plan.plan import Plan
from growjax.plan.stages import Work
from growjax.programs.ahead import Need, lower, needs
from growjax.programs.step import Programs


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU: bytes of memory a chip, dimensions of a slice, and how its slices are called.

    The compiler keeps a quarter of a GiB or more of the memory for itself.
    """

    memory: int
    dimensions: int
    accelerator: str
    per_chip: int = 1


GENERATIONS = {
    "v5e": Generation(16 << 30, 2, "v5litepod"),
    "v5p": Generation(95 << 30, 3, "v5p", per_chip=2),
    "v6e": Generation(32 << 30, 2, "v6e"),
}
_RESERVED = 256 << 20
# v4 is missing: this compiler describes its chips as two devices each, which JAX makes no mesh of

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_CALL = re.compile(rf"\b({'|'.join(COLLECTIVES)})(?:-start)?\(")
# How a TPU program says reduce-scatter: an all-reduce in a fusion of its own that keeps a slice
_FUSED = re.compile(r"^%all-reduce-scatter[\w.-]* \(", re.MULTILINE)
_HOST = re.compile(r"\b(?:outfeed|infeed|send|recv)\(|_xla_buffer_placement=\"pinned_host\"")
# What the compiler says when a program does not fit: its size, or that of its temporaries alone
_FULL = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_TEMPORARIES = re.compile(
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of one program, for one chip.

    **Fields**

    - `memory`: bytes that it needs: `arguments`, `results` that do not reuse them, `temporaries`, code.
      A program that does not fit is not compiled, and only `memory` is known.
    - `collectives`: how often each kind stands in the program; a scan's body is there once. A reduce-
      scatter that overlaps with the product before it is a loop of collective-permutes.
    - `to_host`: how many transfers to or from the host's memory it holds.
    - `flops`, `bytes_accessed`, `optimal_seconds`: the compiler's own estimates, a scan's body once;
      None where it has none.
    """

    stage: int
    name: str
    memory: int
    fits: bool
    arguments: int | None = None
    results: int | None = None
    temporaries: int | None = None
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    to_host: int = 0
    flops: float | None = None
    bytes_accessed: float | None = None
    optimal_seconds: float | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Target:
    """What `compile_for` found; it prints as a table. `refusals` say what does not fit and what helps."""

    plan: str
    target: str
    chips: int
    memory: int
    programs: tuple[Compiled, ...]
    refusals: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Raise `LayoutError` with every program that does not fit, if there is one."""
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
            estimate = "unknown" if p.optimal_seconds is None else f"{p.optimal_seconds:.3g}"
            table.add_row(
                Text(f"{p.stage} {p.name}"),
                f"{amount(p.memory)}{'' if p.fits else ' (too much)'}",
                amount(p.temporaries),
                "\n".join(counts) or "none",
                "unknown" if p.flops is None else f"{p.flops:.3g}",
                estimate,
            )
        return Group(table, *(Text(f"refused: {reason}") for reason in self.refusals))


def chips(target: str) -> int:
    """How many chips a slice such as "v5e:16x16" has; raises `LayoutError` for none that is known."""
    generation, _, shape = target.partition(":")
    sizes = shape.split("x")
    known = GENERATIONS.get(generation)
    if (
        known is None
        or len(sizes) != known.dimensions
        or not all(n.isdecimal() and int(n) for n in sizes)
    ):
        examples = ", ".join(
            f"{name}:{'x'.join(['4'] * g.dimensions)} ({g.memory >> 30} GiB a chip)"
            for name, g in GENERATIONS.items()
        )
        raise LayoutError(
            f"target: expected a generation and the shape of a slice, such as {examples}; "
            f"got {target!r}"
        )
    return math.prod(map(int, sizes))


def prepare(target: str) -> None:
    """Make JAX look for no TPU on this machine, and tell the compiler where it is.

    `compile_for` does it; called before any other use of JAX it also keeps JAX from trying first.
    Raises `LayoutError` if the compiler is not installed.
    """
    count, generation = chips(target), GENERATIONS[target.partition(":")[0]]
    if importlib.util.find_spec("libtpu") is None:
        raise LayoutError(
            f"target: compiling for {target} needs the TPU compiler; install growjax[tpu] on Linux. No "
            "TPU is needed"
        )
    settings = {
        # Or it asks a metadata server which machine this is, and waits for an answer
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{generation.accelerator}-{count * generation.per_chip}",
        # No TPU is opened, so another process that compiles, or trains, is not in the way
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        # On a machine without a TPU, importing JAX leaves a warning where the value would be
        if os.environ.get(name, "WARNING").startswith("WARNING"):
            os.environ[name] = value
    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")


def topology(target: str) -> list[Any]:
    """Devices of a slice that are only described: programs can be compiled for them, and not run.

    Raises `LayoutError` if the compiler is not installed or does not know the slice.
    """
    prepare(target)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(target, platform="tpu").devices
    except Exception as error:  # jaxlib raises a class of its own without a public name
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
    """Compile every program of a plan for a TPU slice, on a machine that needs none.

    **Arguments**

    - `target`: such as "v5e:16x16"; the generations are in `GENERATIONS`.
    - `layout`: instead of the plan's.
    - `stages`: only these, by number.
    - `reference`: the second model that a selector compares with, or its shapes; if there is none, it
      is taken to be as large as the model that trains.
    - `workers`: how many programs are compiled at once.

    Raises `LayoutError` if the compiler is not installed, the slice is unknown, or the layout or a batch
    cannot be split over it. What does not fit a chip's memory is in the result.

    **Example**

        print(compile_for(plan, "v5e:4x4").programs[-1].memory)
    """
    layout = plan.layout if layout is None else layout
    plan = dataclasses.replace(plan, layout=layout)
    mesh = layout.mesh(topology(target))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
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
    programs = Programs(plan.optimizer.build(), plan.loss, mesh, layout, plan.accumulate)
    memory = GENERATIONS[target.partition(":")[0]].memory
    wanted = range(len(plan.spans)) if stages is None else stages
    todo = [n for i in wanted for n in needs(plan.spans[i], first=False)]
    with _uncached(), concurrent.futures.ThreadPoolExecutor(workers, "compile") as pool:
        found = tuple(pool.map(lambda need: _compile(plan, programs, need, reference), todo))
    refusals = list(_refusals(plan, mesh.size, memory, todo, found))
    return Target(plan.name, target, mesh.size, memory, found, tuple(refusals))


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's persistent cache: no program for chips that are not here can be loaded from it."""
    before = getattr(jax.config, "jax_enable_compilation_cache", None)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or JAX does not look at the setting again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _compile(plan: Plan, programs: Programs, need: Need, reference: Any) -> Compiled:
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
    except Exception as error:  # jaxlib raises a class of its own without a public name
        return _too_large(programs, plan, need, error, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    text, sizes, costs = program.as_text(), program.memory_analysis(), program.cost_analysis() or {}
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    parts = (sizes.argument_size_in_bytes, results, sizes.temp_size_in_bytes)
    return Compiled(
        stage,
        name,
        sum(parts) + sizes.generated_code_size_in_bytes,
        True,
        arguments=sizes.argument_size_in_bytes,
        results=results,
        temporaries=sizes.temp_size_in_bytes,
        collectives=_collectives(text),
        to_host=len(_HOST.findall(text)),
        flops=_positive(costs, "flops"),
        bytes_accessed=_positive(costs, "bytes accessed"),
        optimal_seconds=_positive(costs, "optimal_seconds"),
        seconds=seconds,
    )


def _too_large(
    programs: Programs, plan: Plan, need: Need, error: Exception, seconds: float
) -> Compiled:
    """What is known of a program that the compiler refused for its size; other errors are raised."""
    span, name = plan.spans[need[1]], _name(need)
    if full := _FULL.search(str(error)):
        number, unit, *_ = full.groups()
        return Compiled(span.index, name, _bytes(number, unit), False, seconds=seconds)
    if full := _TEMPORARIES.search(str(error)):
        shapes = programs.shapes(span.model)
        state = per_device_bytes(shapes, programs.shardings(shapes))
        more = _bytes(*full.groups()[:2])
        return Compiled(span.index, name, state + more, False, temporaries=more, seconds=seconds)
    raise LayoutError(f"stage {span.index}: {name}: it cannot be compiled: {error}") from error


def _collectives(text: str) -> dict[str, int]:
    """How often each kind stands in a compiled program."""
    counts, fused = collections.Counter(_CALL.findall(text)), len(_FUSED.findall(text))
    counts["reduce-scatter"] += fused
    counts["all-reduce"] -= fused
    return {kind: counts[kind] for kind in COLLECTIVES}


def _name(need: Need) -> str:
    kind, _, work = need
    what = {"grow": "growth", "before": "evaluation before it", "evaluate": "evaluation"}
    if kind != "step":
        return what[kind]
    return ", ".join(["step", said_work(work)] if work and work != Work() else ["step"])


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def _positive(costs: Any, name: str) -> float | None:
    """An estimate of the compiler; it says -1 and less where it has none."""
    return found if (found := costs.get(name, 0)) > 0 else None


def _refusals(
    plan: Plan, devices: int, memory: int, todo: Sequence[Need], found: Sequence[Compiled]
) -> Iterator[str]:
    for need, program in zip(todo, found, strict=True):
        where = f"stage {program.stage} {plan.spans[program.stage].stage.name!r}: {program.name}"
        if program.to_host:
            yield f"{where}: moves data to the host {program.to_host} times"
        if not program.fits:
            says = f"{where}: needs {amount(program.memory)} of {amount(memory)} a chip"
            helps = remedies(plan, need, devices, program.memory, memory - _RESERVED)
            yield f"{says}; {helps}"
