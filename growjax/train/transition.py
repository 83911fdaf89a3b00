"""From one stage to the next: compiled while the old one still trains, checked, and only then kept.

The programs of a run are known from its plan. `Ahead` compiles those of the next stage in a thread, so
that a growth costs the time to move the weights and not the time to compile. `cross` is the growth
itself: a transaction, after which either the new state is certified or nothing has changed.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from growjax.data.objectives import batch_shapes
from growjax.errors import TrainingError
from growjax.parallel import replicated, split_rows
from growjax.train.plan import Plan, birth
from growjax.train.stages import Span, Work
from growjax.train.step import SEED, Controls, Programs, State


# The largest mean change of a loss (nats) that rounding explains, by the type of the activations.
_ROUNDING = {"float64": 1e-9, "float32": 2e-4, "float16": 1e-2, "bfloat16": 4e-2}
Kind = Literal["birth", "grow", "before", "evaluate", "step", "seal"]
Need = tuple[Kind, int, Work | None]


class Ahead:
    """Compiles the programs of a plan, one stage ahead of the training.

    **Arguments**

    - `cache`: compiled programs by a digest of their text, for runs that share some.
    - `background`: False compiles when a program is asked for, and not before.
    - `seal`: whether states will be saved, with a checksum.
    - `reference`: the second model that a selector compares with.

    `compiled` counts the programs that were; `waited` are the seconds that somebody waited for one.
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
        self.plan, self.programs, self.seal, self.reference = plan, programs, seal, reference
        self.cache = {} if cache is None else cache
        self.background = background
        self.compiled, self.waited = 0, 0.0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._lock = threading.Lock()
        self._futures: dict[Need, concurrent.futures.Future] = {}

    def start(self, index: int) -> None:
        """Begin with what stage `index` still needs, then with the stage after it; forget older ones."""
        with self._lock:
            self._futures = {n: f for n, f in self._futures.items() if n[1] >= index}
        if self.background:
            for span in self.plan.spans[index : index + 2]:
                for need in needs(span, first=span.index == index, seal=self.seal):
                    self._submit(need)

    def get(self, need: Need) -> Any:
        """The compiled program, once it is there."""
        start = time.perf_counter()
        program = self._submit(need).result()
        self.waited += time.perf_counter() - start
        return program

    def ready(self, need: Need) -> bool:
        """Whether nobody would have to wait for a program."""
        return need in self._futures and self._futures[need].done()

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, need: Need) -> concurrent.futures.Future:
        with self._lock:
            if need not in self._futures:
                self._futures[need] = self._pool.submit(self._compile, need)
            return self._futures[need]

    def _compile(self, need: Need) -> Any:
        lowered = lower(self.plan, self.programs, need, self.reference)
        # The text has shapes and shardings, but not the trees that they are the leaves of
        text = f"{lowered.in_tree} {lowered.out_tree} {lowered.as_text()}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in self.cache:
            self.cache[digest] = lowered.compile()
            self.compiled += 1
        return self.cache[digest]


def needs(span: Span, *, first: bool, seal: bool = False) -> list[Need]:
    """What a stage needs, in order. The stage that a run starts in has grown already, or was born."""
    grows = span.stage.grow is not None and not first
    growth: list[Need] = [("grow", span.index, None), ("before", span.index, None)] if grows else []
    steps: list[Need] = [("step", span.index, work) for _, work in span.programs]
    saves: list[Need] = [("seal", span.index, None)] if seal else []
    return [*growth, ("evaluate", span.index, None), *saves, *steps]


def lower(plan: Plan, programs: Programs, need: Need, reference: Any = None) -> Any:
    """One program of a plan, lowered for the shapes and shardings it will meet.

    "before" evaluates the model that is about to grow, on the examples of the stage that it grows into.
    """
    kind, index, work = need
    span = plan.spans[index]
    number = functools.partial(jax.ShapeDtypeStruct, (), sharding=replicated(programs.mesh))
    seed = number(SEED.dtype)
    if kind == "birth":
        return programs.birth(functools.partial(birth, plan)).lower(seed)
    shapes = programs.shapes(plan.before(index) if kind in ("grow", "before") else span.model)
    if kind == "grow":
        assert span.stage.grow is not None
        return programs.growth(shapes, span.stage.grow, span.stage.carry).lower(shapes, seed)
    if kind == "seal":
        return programs.seal(shapes).lower(shapes)
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split_rows(programs.mesh)),
        batch_shapes(span.objective, span.offered if kind == "step" else span.batch),
    )
    if kind != "step":
        return programs.evaluate(shapes).lower(shapes, rows, number(jnp.float32))
    assert work is not None
    controls = Controls(number(jnp.float32), number(jnp.float32), number(jnp.int32), seed)
    select = span.stage.select
    second = reference if select is not None and select.compares else None
    return programs.step(shapes, work, select).lower(shapes, rows, controls, second)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What a growth did: the loss on the same tokens before and after, and the seconds it took.

    `change` is the mean absolute change of a token's loss, in nats; `limit` what rounding explains, or
    None where the operator promises nothing.
    """

    operator: str
    exactness: str
    before: float
    after: float
    change: float
    limit: float | None
    grow_seconds: float
    certify_seconds: float


def cross(
    plan: Plan,
    span: Span,
    state: State,
    get: Callable[[Need], Any],
    probe: Callable[[Any, State, float], tuple[np.ndarray, np.ndarray]],
) -> tuple[State, Crossing]:
    """Grow a state into the stage `span`, certify it, and let the old one go.

    `get` gives compiled programs, `probe` the losses and weights that an evaluation program finds on
    tokens that stay the same. Raises `TrainingError` if an operator that promises to change nothing
    changed the loss; the checkpoint from before the growth stands.
    """
    op = span.stage.grow
    assert op is not None
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    grow = get(("grow", span.index, None))
    evaluations = [get((kind, span.index, None)) for kind in ("before", "evaluate")]
    lap()
    old = probe(evaluations[0], state, 1.0)
    seconds = lap()
    grown = jax.block_until_ready(grow(state, np.int32(plan.seed)))
    grow_seconds = lap()
    new = probe(evaluations[1], grown, 0.0)
    certify_seconds = seconds + lap()

    weights = old[1].sum()
    before, after = (float((losses * w).sum() / weights) for losses, w in (old, new))
    change = float((np.abs(new[0] - old[0]) * old[1]).sum() / weights)
    dtype = plan.model.dtype or str(jax.tree.leaves(state.trained)[0].dtype)
    limit = None if op.exactness == "approximate" else _ROUNDING[dtype]
    crossing = Crossing(
        str(op), op.exactness, before, after, change, limit, grow_seconds, certify_seconds
    )
    # `not <=`: a change that is not a number is not a small one
    if limit is not None and not change <= limit:
        raise TrainingError(
            f"plan {plan.name!r}: {op} promises to be {op.exactness}, and changed the loss of a token "
            f"by {change:.3g} nats on average ({before:.6g} -> {after:.6g}), where {dtype} rounding "
            f"explains {limit:g}. The state before the growth is in the last checkpoint"
        )
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return grown, crossing
