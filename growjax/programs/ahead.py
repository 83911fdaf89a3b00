"""The programs of a plan, compiled one stage ahead of the training that needs them.

The plan determines the programs of its run. `Ahead` compiles those of the next stage in a thread while
this stage trains, so that a growth takes the time to move the weights and not the time to compile.
"""

import concurrent.futures
import functools
import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from growjax.data.objectives import batch_shapes
from growjax.errors import PlanError, raise_all
from growjax.growth import Fit
from growjax.parallel import replicated, split_rows
from growjax.plan.plan import Plan, reference_faults
from growjax.plan.stages import Span, Work
from growjax.plan.worked import birth
from growjax.programs import fits
from growjax.programs.step import SEED, Controls, Programs


ProgramKind = Literal["birth", "numbers", "fit", "grow", "before", "evaluate", "step", "seal"]
# One program of a run: its kind, the number of the stage, and for a "step" the step's work
Need = tuple[ProgramKind, int, Work | None]


class Ahead:
    """Compiles the programs of a plan, one stage ahead of the training.

    **Arguments**

    - `cache`: compiled programs by a digest of their text, for runs that share some.
    - `background`: whether to compile in advance; if False, a program is compiled when it is requested.
    - `seal`: whether states will be saved, which needs a program for their checksums.
    - `reference`: the second model that selectors compare with, which is put on the mesh.

    Raises `PlanError` for a second model that is missing or does not fit the plan.

    `compiled` is the number of programs compiled so far, `waited` the seconds for which `get` blocked.
    """

    def __init__(
        self,
        plan: Plan,
        programs: Programs,
        *,
        cache: dict[str, Any] | None = None,
        background: bool = True,
        seal: bool = False,
        reference: Any = None,
    ):
        headline = f"plan {plan.name!r} cannot choose by this second model:"
        raise_all(PlanError, headline, reference_faults(plan, reference))
        if reference is not None:
            reference = jax.device_put(reference, replicated(programs.mesh))
        self.plan, self.programs, self.seal, self.reference = plan, programs, seal, reference
        self.cache = {} if cache is None else cache
        self.background = background
        self.compiled, self.waited = 0, 0.0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._lock = threading.Lock()
        self._futures: dict[Need, concurrent.futures.Future] = {}

    def start(self, index: int) -> None:
        """Compile the missing programs of stage `index`, then of the next stage; drop older ones."""
        with self._lock:
            # A run never goes back to an earlier stage
            self._futures = {n: f for n, f in self._futures.items() if n[1] >= index}
        if self.background:
            for span in self.plan.spans[index : index + 2]:
                for need in needs(span, first=span.index == index, seal=self.seal):
                    self._submit(need)

    def change(self, plan: Plan, index: int) -> None:
        """Go on with another plan, of the same stages up to `index`; later programs are lowered again."""
        with self._lock:
            self.plan = plan
            self._futures = {n: f for n, f in self._futures.items() if n[1] <= index}

    def get(self, need: Need, meanwhile: Callable[[], None] | None = None) -> Any:
        """Wait for a compiled program and return it; meanwhile `meanwhile` is called every 0.2 s."""
        start = time.perf_counter()
        future = self._submit(need)
        while meanwhile is not None and not future.done():
            meanwhile()
            concurrent.futures.wait([future], timeout=0.2)
        program = future.result()
        self.waited += time.perf_counter() - start
        return program

    def ready(self, need: Need) -> bool:
        """Whether a program is compiled already, so that `get` returns at once."""
        return need in self._futures and self._futures[need].done()

    def close(self) -> None:
        """Cancel every compilation that has not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, need: Need) -> concurrent.futures.Future:
        with self._lock:
            if need not in self._futures:
                self._futures[need] = self._pool.submit(self._compile, need)
            return self._futures[need]

    def _compile(self, need: Need) -> Any:
        lowered = lower(self.plan, self.programs, need, self.reference)
        # The program's text has shapes and shardings, but neither the structure of its arguments' trees
        # nor the devices of its mesh
        devices = [device.id for device in self.programs.mesh.devices.flat]
        text = f"{devices} {lowered.in_tree} {lowered.out_tree} {lowered.as_text()}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in self.cache:
            self.cache[digest] = lowered.compile()
            self.compiled += 1
        return self.cache[digest]


def needs(span: Span, *, first: bool, seal: bool = False) -> list[Need]:
    """The programs that a stage needs, in the order of their use.

    `first` says that the run starts in this stage, whose model is read or born: it does not grow.
    """
    grows = span.stage.grow is not None and not first
    kinds: list[ProgramKind] = ["numbers", "fit"] if isinstance(span.stage.grow, Fit) else []
    growth: list[Need] = (
        [(kind, span.index, None) for kind in (*kinds, "grow", "before")] if grows else []
    )
    steps: list[Need] = [("step", span.index, work) for _, work in span.programs]
    saves: list[Need] = [("seal", span.index, None)] if seal else []
    return [*growth, ("evaluate", span.index, None), *saves, *steps]


def lower(plan: Plan, programs: Programs, need: Need, reference: Any = None) -> Any:
    """Lower one program of a plan for the shapes and shardings of its arguments.

    "before" evaluates the model that is about to grow, in batches of the stage that it grows into.
    "numbers" and "fit" are the programs of its fit.
    """
    kind, index, work = need
    span = plan.spans[index]
    # The shape of a scalar argument, given its dtype
    scalar = functools.partial(jax.ShapeDtypeStruct, (), sharding=replicated(programs.mesh))
    seed = scalar(SEED.dtype)
    if kind == "birth":
        return programs.birth(functools.partial(birth, plan)).lower(seed)
    # Programs that run before or at the growth take the state of the stage before
    early = kind in ("numbers", "fit", "grow", "before")
    shapes = programs.shapes(plan.model_before(index) if early else span.model)
    op = span.stage.grow
    numbers = fits.numbers_of(programs, op, shapes) if early and isinstance(op, Fit) else None
    if kind == "numbers":
        assert isinstance(op, Fit)
        return fits.start(programs, op, shapes).lower(shapes, seed)
    if kind == "grow":
        assert op is not None
        more = () if numbers is None else (numbers,)
        return programs.growth(shapes, op, span.stage.carry, numbers).lower(shapes, seed, *more)
    if kind == "seal":
        return programs.seal(shapes).lower(shapes)
    if kind in ("step", "fit"):
        rows = batch_shapes(span.objective, span.offered)
    else:
        # Held-out losses are computed with the plan's objective, whatever the stage trains on
        rows = batch_shapes(plan.objective, span.batch)
    sharding = split_rows(programs.mesh)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), rows)
    if kind == "fit":
        assert isinstance(op, Fit)
        return fits.improve(programs, op, shapes).lower(numbers, shapes, rows)
    if kind != "step":
        return programs.evaluate(shapes).lower(shapes, rows, scalar(jnp.float32))
    assert work is not None
    controls = Controls(scalar(jnp.float32), scalar(jnp.float32), scalar(jnp.int32), seed)
    select = span.stage.select
    second = reference if select is not None and select.compares else None
    program = programs.step(shapes, work, select, span.births, span.grown_at)
    return program.lower(shapes, rows, controls, second)
