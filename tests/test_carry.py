"""Every factory of optax and every rule of growjax: carried state is that of a fresh run, or refused.

A small model goes along a fixed path, and so does the model that it grows into, under its own gradients.
An optimizer is run along both. What growth makes of the state on the first path has to be the state on
the second, in float64: of every old coordinate. Fresh ones hold what the optimizer starts from, and
averages of the weights are grown as the weights are.
"""

import functools
import importlib.metadata
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import optim
from growjax.axes import put
from growjax.errors import StateError
from growjax.optim.age import Ages, Since
from growjax.optim.rules import AveragedState
from growjax.plan.optimizer import Name, Optimizer
from tests.walks import (
    KEY,
    OPERATORS,
    SHAPES,
    STEPS,
    Growth,
    Layers,
    Path,
    growth,
    path,
)


pytestmark = pytest.mark.filterwarnings("ignore")  # of factories that optax will drop
TOLERANCE = 1e-4  # of the largest entry of an array: the small constants of optimizers
# They count what a fresh run has not had; tests/test_births.py and tests/test_losses.py hold them
COUNTERS = (Ages, gj.Births, Since)
DEEP = os.environ.get("GROWJAX_PROFILE") == "deep"


# Optimizers ----------------------------------------------------------------------------------


ARGUMENTS = {
    "learning_rate": 1e-2,
    "decay": 0.9,
    "step_size": -0.1,
    "max_norm": 1e9,
    "max_delta": 1e9,
    "threshold": 1e9,
    "clipping": 0.01,
    "max_consecutive_errors": 3,
}


def adam() -> Any:
    return optax.adam(1e-2)


def frozen() -> Any:
    return halves(path().last)


def momentum() -> Any:
    return optax.trace(0.9)


def rates() -> Any:
    return optax.linear_schedule(1, 0, 9)


def two() -> dict[Any, Any]:
    return {True: adam(), False: optax.lion(1e-2)}


def late(step: Any, **_: Any) -> Any:
    return step > 1


def halves(params: Any) -> Any:
    """True at matrices, by their rank."""
    return jax.tree.map(lambda x: x.ndim > 2, params)


def sum_of_gradients(updates: Any) -> Any:
    return sum(jnp.sum(u) for u in jax.tree.leaves(updates))


def of_one_example(inner: Any) -> Any:
    """An optimizer that wants the gradients of every example, given those of a batch of one."""

    def update(updates, state, params=None):
        return inner.update(jax.tree.map(lambda g: g[None], updates), state, params)

    return optax.GradientTransformation(inner.init, update)


# Factories that need more than a number, or more than their defaults to have a state worth carrying
BY_HAND: dict[str, Callable[[], Any]] = {
    "optax.MultiSteps": lambda: optax.MultiSteps(adam(), 2),
    "optax.add_noise": lambda: optax.chain(optax.add_noise(0.01, 0.55, 0), optax.trace(0.9)),
    "optax.apply_every": lambda: optax.chain(optax.apply_every(4), optax.scale(-1.0)),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(adam(), 3),
    "optax.chain": lambda: optax.chain(optax.scale_by_adam(), optax.ema(0.9)),
    "optax.conditionally_mask": lambda: optax.conditionally_mask(adam(), late),
    "optax.conditionally_transform": lambda: optax.conditionally_transform(adam(), late),
    "optax.flatten": lambda: optax.flatten(adam()),
    "optax.freeze": lambda: optax.chain(adam(), optax.freeze(frozen())),
    "optax.inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(rates()),
    "optax.inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(1e-2),
    "optax.lookahead": lambda: optax.lookahead(adam(), 5, 0.5),
    "optax.masked": lambda: optax.masked(adam(), halves),
    "optax.measure_with_ema": lambda: optax.measure_with_ema(sum_of_gradients, 0.9),
    "optax.monitor": lambda: optax.chain(optax.monitor({"sum": sum_of_gradients}), adam()),
    "optax.multi_transform": lambda: optax.multi_transform(two(), halves),
    "optax.named_chain": lambda: optax.named_chain(("ema", momentum()), ("mom", optax.scale_by_rms())),
    "optax.noisy_sgd": lambda: optax.noisy_sgd(1e-2, key=0),
    "optax.partition": lambda: optax.partition(two(), halves),
    "optax.rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9, centered=True),
    "optax.scale_by_backtracking_linesearch": lambda: optax.scale_by_backtracking_linesearch(5),
    "optax.scale_by_schedule": lambda: optax.scale_by_schedule(rates()),
    "optax.scale_by_zoom_linesearch": lambda: optax.scale_by_zoom_linesearch(5),
    "optax.selective_transform": lambda: optax.selective_transform(adam(), freeze_mask=frozen()),
    "optax.sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "optax.signum": lambda: optax.signum(1e-2),
    "optax.snapshot": lambda: optax.chain(optax.snapshot("sum", sum_of_gradients), adam()),
    "optax.stateless": lambda: optax.stateless(lambda updates, params: updates),
    "optax.stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda u, p: u),
    "optax.with_extra_args_support": lambda: optax.with_extra_args_support(adam()),
    "optax.contrib.differentially_private_aggregate": lambda: of_one_example(
        optax.contrib.differentially_private_aggregate(1.0, 0.1, 0)
    ),
    "optax.contrib.dpsgd": lambda: of_one_example(optax.contrib.dpsgd(1e-2, 1e9, 0.0, 0, momentum=0.9)),
    "optax.contrib.mechanize": lambda: optax.contrib.mechanize(adam()),
    "optax.contrib.sam": lambda: optax.contrib.sam(adam(), optax.sgd(1e-2)),
    "optax.contrib.schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
    "optax.contrib.split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(adam()),
}  # fmt: skip


def factories() -> dict[str, Callable]:
    """Every function of optax that says it makes a transformation, and its classes that are some."""
    found: dict[str, Callable] = {"optax.MultiSteps": optax.MultiSteps}
    for module in (optax, optax.contrib):
        for name, factory in vars(module).items():
            if inspect.isfunction(factory) and not name.startswith("_"):
                signature = inspect.signature(factory)
                made = "GradientTransformation" in str(signature.return_annotation)
                if made or "learning_rate" in signature.parameters:  # not all of them say it
                    found[f"{module.__name__}.{name}"] = factory
    return found


def built(factory: Callable) -> Any:
    """What a factory makes of its defaults and of the numbers above; None if it wants something else."""
    given = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD:
            if name not in ARGUMENTS:
                return None
            given[name] = ARGUMENTS[name]
    return factory(**given)


class Average(NamedTuple):
    params: Any
    inner: Any


def averaged(inner: Any) -> Any:
    """An optimizer that keeps an average of the weights beside its own state."""

    def update(updates, state, params=None):
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state.params, params)
        updates, after = inner.update(updates, state.inner, params)
        return updates, Average(average, after)

    return optax.GradientTransformation(lambda params: Average(params, inner.init(params)), update)


def own(name: Name, **fields: Any) -> Any:
    decay = 0.0 if "scale_by_parameter" in fields else 0.1
    return Optimizer(name, clip=None, weight_decay=decay, **fields).build()


OWN: dict[str, Callable[[], Any]] = {
    **{f"growjax {name}": functools.partial(own, name) for name in get_args(Name)},
    "growjax scaled": lambda: own("lion", scale_by_parameter=True, new_rate=2.0, new_steps=3),
    "growjax scale_by_sophia": lambda: optim.scale_by_sophia(),
    "an average of the weights": lambda: averaged(optax.chain(optax.scale_by_yogi(), optax.scale(-0.1))),
    "adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(1e9), optax.adamax(1e-2)),
    "weights added to gradients": lambda: optax.chain(optax.add_decayed_weights(0.1), adam()),
    "adagrad, then momentum": lambda: optax.chain(optax.adagrad(1e-2), optax.trace(0.9)),
    "squares of normalised updates": lambda: optax.chain(optax.scale_by_rms(), optax.scale_by_stddev()),
    "an orthogonal trace": lambda: optax.chain(optim.scale_by_muon(), optax.trace(0.9)),
    "accumulated schedule-free": lambda: optax.MultiSteps(optax.contrib.schedule_free_sgd(1e-2), 3),
}  # fmt: skip


def optimizers() -> dict[str, Callable[[], Any]]:
    """All of them, by name."""
    made = {name: functools.partial(built, factory) for name, factory in factories().items()}
    return made | BY_HAND | OWN


# Where copies with a history (of a norm), or shares (of mixed sums), would change what is kept
COPIES = {"even copies", "uneven copies", "layers"}
MULTIPLIED = {"even copies", "uneven copies"}
REFUSED = {
    # Norms of a parameter, or of all
    "optax.lars": COPIES,
    "optax.novograd": COPIES,
    "optax.scale_by_novograd": COPIES,
    "optax.scale_by_distance_over_gradients": COPIES,
    "optax.contrib.dadapt_adamw": COPIES,
    "optax.contrib.dog": COPIES,
    "optax.contrib.dowg": COPIES,
    "optax.contrib.mechanize": COPIES,
    "optax.contrib.momo": COPIES,
    "optax.contrib.momo_adam": COPIES,
    "optax.contrib.prodigy": COPIES,
    "optax.measure_with_ema": COPIES,
    "optax.snapshot": COPIES,
    # Other shapes than those of the parameters
    "optax.flatten": set(OPERATORS),
    "optax.scale_by_lbfgs": set(OPERATORS),
    "optax.scale_by_sm3": set(OPERATORS),
    "optax.sm3": set(OPERATORS),
    # What depends on shapes: noise, and how far an orthogonal matrix goes
    "optax.add_noise": set(OPERATORS),
    "an orthogonal trace": set(OPERATORS),
    # Gradients with weights added to them; a constant that is as large as what is added to it
    "weights added to gradients": MULTIPLIED,
    "adagrad, then momentum": MULTIPLIED,
    # An average of anything, and a state of two structures
    "optax.ema": set(OPERATORS),
    "optax.monitor": set(OPERATORS),
}
# Those that do not run on this model, or ask for more than a gradient and a value
CANNOT_RUN = {
    "optax.lbfgs": "value_fn",
    "optax.lookahead": "fast",
    "optax.scale_by_backtracking_linesearch": "value_fn",
    "optax.scale_by_zoom_linesearch": "value_fn",
    "optax.contrib.galore": "dtype",
    "optax.contrib.scale_by_galore": "dtype",
    "optax.contrib.scale_by_muon": "pytree",
    "optax.contrib.sophia": "obj_fn",
}
KNOWN = importlib.metadata.version("optax") == "0.2.8"
# Without the deep profile: those that were once carried wrong, and every sixth of the others
ONCE_WRONG = (
    "adagrad",
    "adamax",
    "ema",
    "lars",
    "momentum",
    "orthogonal",
    "rmsprop",
    "sm3",
    "yogi",
)


def once_wrong(name: str) -> bool:
    return any(word in name for word in ONCE_WRONG)


def tried() -> list[str]:
    """The optimizers that this profile tries, by name."""
    names = list(optimizers())
    if DEEP:
        return names
    own = {*BY_HAND, *OWN}
    return [n for i, n in enumerate(names) if i % 6 == 0 or n in own or once_wrong(n)]


def operators(name: str) -> tuple[str, ...]:
    """The growths that an optimizer meets: uneven copies first, and one of two others at least."""
    if DEEP:
        return tuple(OPERATORS)
    others = ("zeros", "layers")
    part = others if once_wrong(name) else (others[tried().index(name) % 2],)
    return "uneven copies", *part


def update(optimizer: Any, gradient: Any, later: Any, state: Any, model: Any) -> Any:
    """The state after one update, given what the optimizer asks for."""
    if isinstance(optimizer, optim.Rule):
        more = {"rate": 0.01, "curvature": later, "labels": 8.0}
        return optimizer.update(gradient, state, model, **more)[1]
    if isinstance(optimizer, optax.GradientTransformation):
        optimizer = optax.with_extra_args_support(optimizer)
    try:
        return optimizer.update(gradient, state, model, value=1.0, curvature=later)[1]
    except TypeError:
        return optimizer.update(gradient, state, model)[1]


def run(optimizer: Any, along: Path) -> Any:
    """The state at the end of a path."""

    @eqx.filter_jit  # one program: eagerly, every operation on every shape would be one
    def step(gradient, later, state, model):
        return update(optimizer, gradient, later, state, model)

    state = optimizer.init(along.models[0])
    for n, (model, gradient) in enumerate(zip(along.models, along.gradients, strict=True)):
        state = step(gradient, along.gradients[(n + 1) % STEPS], state, model)
    return state


def arrays(state: Any) -> dict[str, Any]:
    """The arrays of a state by their paths; whole trees like the parameters are `Layers`."""
    nodes = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, (Layers, *COUNTERS))
    )
    return {jax.tree_util.keystr(path): node for path, node in nodes}


def expected(optimizer: Any, grown: Growth, state: Any) -> dict[str, Any]:
    """What the carried state has to hold, by path and field."""
    small, start = path(), arrays(optimizer.init(path().models[0]))
    old, fresh_run = arrays(state), arrays(run(optimizer, grown.path))
    begun = arrays(optimizer.init(grown.path.last))
    found: dict[str, Any] = {}
    for name, node in fresh_run.items():
        if not isinstance(node, Layers):
            # Of what has no history nothing is added to a sum
            found[name] = old[name] if grown.adds else node
            continue
        for field in SHAPES:
            value, first = getattr(node, field), getattr(start[name], field)
            own = getattr(small.models[0], field)
            if not hasattr(first, "shape") or first.shape != own.shape:
                found[f"{name}.{field}"] = getattr(old[name], field) if grown.adds else value
                continue
            if np.array_equal(first, own):
                # An average of the weights: grown as they are
                model = put(small.last, {(field,): getattr(old[name], field)})
                value = getattr(grown.op(model, key=KEY), field)
            anew = getattr(begun[name], field)
            found[f"{name}.{field}"] = np.where(grown.fresh[field], anew, value)
    return found


def assert_carried(optimizer: Any, grown: Growth, state: Any, carried: Any) -> None:
    if isinstance(state, AveragedState):
        # What is judged has to grow; the distance that is kept follows from it
        judged = [
            optimizer.judged(model, s)
            for model, s in ((path().last, state), (grown.path.last, carried))
        ]
        for field in SHAPES:
            model = grown.op(put(path().last, {(field,): getattr(judged[0], field)}), key=KEY)
            near(field, getattr(model, field), getattr(judged[1], field))
    rest = expected(optimizer, grown, state)
    for name, node in arrays(carried).items():
        if isinstance(node, COUNTERS) or ".offset" in name:
            continue
        fields = SHAPES if isinstance(node, Layers) else [None]
        for field in fields:
            value = node if field is None else getattr(node, field)
            key = name if field is None else f"{name}.{field}"
            want = jax.tree.leaves(rest[key])
            for x, y in zip(want, jax.tree.leaves(value), strict=True):
                near(key, x, y)


def near(name: str, want: Any, got: Any) -> None:
    if jnp.issubdtype(jnp.asarray(want).dtype, jax.dtypes.prng_key):
        want, got = map(jax.random.key_data, (want, got))
    want, got = np.asarray(want, float), np.asarray(got, float)
    assert want.shape == got.shape, name
    np.testing.assert_allclose(
        got, want, rtol=0, atol=TOLERANCE * np.abs(want).max(initial=1e-300), err_msg=name
    )


@pytest.mark.parametrize("name", tried())
def test_carried_state_is_that_of_a_fresh_run_or_refused(name):
    refused = set()
    with jax.enable_x64(True):
        optimizer = optimizers()[name]()
        if optimizer is None:
            pytest.skip("wants arguments that this test does not know")
        try:
            state = run(optimizer, path())
        except Exception:
            assert not KNOWN or name in CANNOT_RUN
            with pytest.raises(StateError, match=CANNOT_RUN.get(name, "optimizer")):
                gj.carry(OPERATORS["gates"], (), path().last, optimizer=optimizer, key=KEY)
            return
        for op in operators(name):
            grown = growth(op)
            try:
                with jax.disable_jit():
                    carried = gj.carry(grown.op, state, path().last, optimizer=optimizer, key=KEY)
            except StateError:
                refused.add(op)
            else:
                assert_carried(optimizer, grown, state, carried)
    if KNOWN:
        assert refused == REFUSED.get(name, set()) & set(operators(name))


def test_every_factory_of_optax_is_found_and_made():
    every = factories()
    assert len(every) > 110
    assert {"optax.adam", "optax.contrib.prodigy", "optax.MultiSteps"} <= set(every)
    assert set(REFUSED) | set(CANNOT_RUN) <= set(optimizers())
    if KNOWN:
        assert not [name for name, make in optimizers().items() if make() is None]
