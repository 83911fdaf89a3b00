"""One training run on one device, from top to bottom.

The step of a stage is compiled before it runs, once for every sub-network size in it. The level of a
ramp and the learning rate are arguments, and a compiled program refuses shapes it was not made for, so
nothing recompiles unnoticed and compile time can be told from training time. Losses are read one step
late, so the host never waits for the step it has just started.

A ramp that is over leaves its gates in place, at 1, until the next stage (or the end) settles them. The
function is the same and open gates cost next to nothing, but dropping them changes the program: at a
boundary, which compiles a new one anyway, that is free; in the middle of a stage it is not.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from growjax.axes import partition, sizes
from growjax.errors import TrainingError
from growjax.gates import ramp, settle
from growjax.growth import grow
from growjax.optim import adamw, carry
from growjax.subnet import Subnet, step_key
from growjax.train.plan import Plan, is_gated


@dataclasses.dataclass(frozen=True)
class Step:
    """What one training step reports; `held_out` only at marks and after the last step.

    `step` counts from 0. `tokens`, `flops` and `seconds` are what the run has used once it is done;
    seconds are those spent training, not compiling, growing or evaluating. Losses are in nats per token:
    `loss` of the part that was trained, on its batch; `held_out` of the whole model.
    """

    stage: int
    step: int
    tokens: int
    flops: int
    seconds: float
    rate: float
    level: float
    loss: float
    held_out: float | None


@dataclasses.dataclass(frozen=True)
class Growth:
    """A growth before `step`: what grew, and the held-out loss just before and just after."""

    stage: int
    step: int
    flops: int
    grew: dict[str, tuple[int, int]]
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class End:
    """The trained model, without gates; the step programs it used; seconds not spent training."""

    model: Any
    programs: int
    compile_seconds: float
    held_out_seconds: float


def next_token_loss(model: Any, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy of each token given those before it, in nats."""
    logits = jax.vmap(model)(tokens[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def train(
    plan: Plan,
    batch: Callable[[int], Int[np.ndarray, "B T"]],
    held_out: Int[np.ndarray, "N T"],
    *,
    every: float = math.inf,
    programs: dict[str, Any] | None = None,
) -> Iterator[Step | Growth | End]:
    """Run a plan: yields a `Step` for each step, a `Growth` for each growth, and at last the `End`.

    **Arguments**

    - `batch`: step n to its tokens `[plan.batch, plan.length + 1]`, a function of n alone.
    - `held_out`: the sequences to evaluate on, whenever `every` more FLOPs have been spent.
    - `programs`: a dict through which runs that follow each other share what they compiled.

    Raises `TrainingError` with the step of the first loss that is not finite.

    **Example**

        for record in train(plan, lambda n: text.batch(seed, n), text.held_out, every=1e12):
            print(record)
    """
    clock, programs = _Clock(), {} if programs is None else programs
    spent, count, late = 0, 0, None
    tx = adamw(1.0, b2=plan.b2, weight_decay=plan.weight_decay)
    with clock.apart("compile", ()):
        trained, rest = partition(plan.build())
        state = tx.init(trained)
    evaluate = None

    def compiled(program: Callable, *args: Any) -> Any:
        with clock.apart("compile", state):
            lowered = eqx.filter_jit(program, donate="all-except-first").lower(*args)
            text = lowered.as_text()
            if text not in programs:
                programs[text] = lowered.compile()
        return programs[text]

    def held_out_loss(level: float) -> float:
        nonlocal evaluate
        given = trained, rest, np.float32(level), held_out
        evaluate = evaluate or compiled(functools.partial(_evaluate, plan.batch), given)
        with clock.apart("held_out", state):
            return float(evaluate(given))

    for index, span in enumerate(plan.spans):
        stage, level = span.stage, 1.0
        if late is not None:
            yield late()
            late = None

        model = eqx.combine(trained, rest)
        if is_gated(model):
            model = settle(ramp(model, 1.0))
            trained, rest = partition(model)
            evaluate = None
        if stage.grow is not None:
            before, old, key = held_out_loss(level), sizes(model), plan.key("grow")
            with clock.apart("compile", state):
                state = carry(stage.grow, state, model, key=key)
                model = grow(stage.grow, model, key=key)
                trained, rest = partition(model)
            evaluate = None
            grew = {a: (old[a], n) for a, n in sizes(model).items() if n != old[a]}
            yield Growth(index, span.start, spent, grew, before, held_out_loss(0.0))

        steps: dict[Subnet | None, Any] = {}
        for i, flops in enumerate(span.flops):
            n, part, level = span.start + i, stage.part(i, plan.seed), stage.level(i)
            rate = plan.learning_rate(spent + flops / 2)
            given = rest, batch(n), np.float32(level), np.float32(rate), np.int32(n)
            if part not in steps:
                program = functools.partial(_step, tx, part, plan.seed)
                steps[part], count = compiled(program, given, trained, state), count + 1
            loss, trained, state = steps[part](given, trained, state)

            if late is not None:  # the step before, now that this one is on its way
                yield late()
            spent += flops
            late = functools.partial(_read, plan, clock, index, n, spent, rate, level, loss)
            last = n == plan.steps - 1
            if last or spent // every > (spent - flops) // every:
                yield late(held_out_loss(level))
                late = None

    model = eqx.combine(trained, rest)
    model = settle(ramp(model, 1.0)) if is_gated(model) else model
    yield End(model, count, clock.spent["compile"], clock.spent["held_out"])


def _step(tx: Any, part: Subnet | None, seed: int, given: tuple, trained: Any, state: Any):
    """One update: the loss before it, the parameters and the optimizer state after it."""
    rest, tokens, level, rate, n = given

    def loss_of(trained):
        model = _opened(eqx.combine(trained, rest), level)
        if part is not None:
            model = part(model, key=step_key(seed, n), step=n)
        return next_token_loss(model, tokens)

    loss, gradients = jax.value_and_grad(loss_of)(trained)
    updates, state = tx.update(gradients, state, trained)
    updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
    return loss, optax.apply_updates(trained, updates), state


def _evaluate(batch: int, given: tuple) -> Float[Array, ""]:
    """The held-out loss, in batches of the training size: it must not need a larger memory."""
    trained, rest, level, held_out = given
    model = _opened(eqx.combine(trained, rest), level)

    def loss(tokens):
        return next_token_loss(model, tokens[None])

    return jnp.mean(jax.lax.map(loss, held_out, batch_size=batch))


def _opened(model: Any, level: Any) -> Any:
    """The model with its gates, if it has any, at this level."""
    return ramp(model, level) if is_gated(model) else model


def _read(
    plan: Plan,
    clock: "_Clock",
    stage: int,
    step: int,
    flops: int,
    rate: float,
    level: float,
    loss: Array,
    held_out: float | None = None,
) -> Step:
    """Wait for a loss and report its step."""
    value = float(loss)
    if not math.isfinite(value):
        raise TrainingError(
            f"plan {plan.name!r}: the loss of step {step} (stage {stage} "
            f"{plan.stages[stage].name!r}, learning rate {rate:.3g}) is {value}; lower the peak or "
            "lengthen the warmup"
        )
    tokens = (step + 1) * plan.batch * plan.length
    return Step(stage, step, tokens, flops, clock.training(), rate, level, value, held_out)


class _Clock:
    """Tells the seconds spent training from those spent on other things."""

    def __init__(self):
        self.start = time.perf_counter()
        self.spent = {"compile": 0.0, "held_out": 0.0}

    def training(self) -> float:
        return time.perf_counter() - self.start - sum(self.spent.values())

    @contextlib.contextmanager
    def apart(self, what: str, running: Any):
        """Time something that is not training, once the steps that are still running are done."""
        jax.block_until_ready(running)
        start = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - start
