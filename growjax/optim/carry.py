"""Optimizer state through a growth operator: moments move by the dual of each map."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from growjax import maps
from growjax.axes import axes_of, find, partition, put
from growjax.errors import StateError, expect_one_of, raise_all
from growjax.growth.operator import Chain, Operator, atoms
from growjax.maps import Moment
from growjax.optim.age import Ages, grown_ages


# What the fields of optimizer states hold, by the names that optax gives them.
_FIRST = (
    "mu",
    "m",
    "m1",
    "m2",
    "trace",
    "momentum",
    "acc_grads",
    "prev_grad",
    "grad",
    "ema",
    "updates",
)
_SECOND = ("nu", "nu_max", "v", "h", "hessian", "sum_of_squares")
_WEIGHT = ("params", "slow_params", "fast_params", "z", "average")
# Between two sets of weights: a new coordinate is the same in both.
_DIFFERENCE = ("offset",)
_MOMENTS: dict[str, Moment] = {
    **dict.fromkeys(_FIRST, "first"),
    **dict.fromkeys(_SECOND, "second"),
    **dict.fromkeys(_WEIGHT, "weight"),
    **dict.fromkeys(_DIFFERENCE, "difference"),
}


def carry(
    op: Operator | Chain,
    state: Any,
    model: Any,
    *,
    key: PRNGKeyArray | None = None,
    copies: Literal["dual", "zero"] = "dual",
    moments: Mapping[str, Moment] | None = None,
) -> Any:
    """The optimizer state of the grown model, for any chain of optax transformations.

    Every subtree shaped like the parameters moves: first moments by the share on the opposite side from
    the weights, second moments by its square, averages of the weights and differences between them as
    the weights. Fresh coordinates are zero. Step counts, schedules and hyper-parameters stay as they are.
    Under plain `optax.adam` a zero moment under an old step count moves new weights by up to 6.6 times
    the learning rate; `growjax.optim.adamw` keeps an age for every coordinate instead.

    **Arguments**

    - `op`: the operator that `model` is about to be grown by.
    - `state`: what `tx.init(gj.partition(model)[0])` and its updates gave (or `tx.init` of the model).
    - `key`: as for `gj.grow`; only shapes are computed with it.
    - `copies`: copied coordinates follow their source by the dual, or start from zero and young.
    - `moments`: what further fields hold: name to "first", "second", "weight" or "difference".

    Raises `StateError` that lists every field whose meaning is not known, and every one whose shape is
    not that of the parameters (factored moments, which must start again).

    **Example**

        state = gj.carry(op, state, small, key=key)
        big = gj.grow(op, small, key=key)
    """
    if not isinstance(op, Operator | Chain):
        raise StateError(f"op: expected an operator such as gj.msg(mlp=2048), got {op!r}")
    expect_one_of(StateError, "copies", copies, ("dual", "zero"))
    for name, moment in (moments or {}).items():
        expect_one_of(StateError, f"moments: {name}", moment, get_args(Moment))
    shapes = eqx.filter_eval_shape(lambda m: m, model)
    return _jitted(op, state, shapes, key, {**_MOMENTS, **(moments or {})}, copies)


@eqx.filter_jit
def _jitted(op, state, model, key, known: Mapping[str, Moment], copies: str):
    for atom in atoms(op):
        for move in atom.maps(axes_of(model)):
            grown = eqx.filter_eval_shape(lambda m, move=move: maps.apply(move, m, key), model)
            # Behind a gate at 0 copies receive no gradient yet, so nothing has been averaged.
            keep = copies == "dual" and not move.gated
            state = _carry_one(move, state, model, grown, known, keep)
            model = grown
    return state


def _carry_one(move, state, model, grown, known: Mapping[str, Moment], keep: bool):
    def shaped(node) -> bool:
        return isinstance(node, type(model) | Ages)

    leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=shaped)
    complaints, moved = [], []
    for path, node in leaves:
        name = _field_name(path)
        if isinstance(node, Ages):
            moved.append(grown_ages(node, move, keep=keep))
        elif not isinstance(node, type(model)):
            moved.append(node)
        elif name not in known:
            complaints.append(
                f"{jax.tree_util.keystr(path)}: what does {name!r} hold? Pass moments={{{name!r}: ...}}: "
                "'first' (like gradients), 'second' (their squares), 'weight' or 'difference' (of such)"
            )
        elif faults := _misshapen(node, model):
            complaints.append(f"{jax.tree_util.keystr(path)}: {faults}")
        else:
            tree = maps.carry_tree(move, model, node, known[name], copies=keep)
            moved.append(_refit(tree, grown))
    raise_all(StateError, "this optimizer state cannot be carried:", complaints)
    return jax.tree_util.tree_unflatten(structure, moved)


def _field_name(path) -> str:
    names = [entry.name for entry in path if hasattr(entry, "name")]
    return names[-1] if names else ""


def _misshapen(tree, model) -> str:
    table = axes_of(model)
    if any(hasattr(find(tree, slot.steps), "shape") for slot in table.of_kind("buffer")):
        return "covers buffers too; initialise the optimizer with gj.partition(model)[0]"
    expected = {s.steps: s.value.shape for s in table.of_kind("param") if s.arrays()}
    found = {steps: getattr(find(tree, steps), "shape", shape) for steps, shape in expected.items()}
    wrong = [f"{'.'.join(map(str, s))} {found[s]}" for s in expected if found[s] != expected[s]]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"not shaped like the parameters ({', '.join(wrong[:3])}{more})" if wrong else ""


def _refit(tree, grown):
    """Put the moved arrays into the structure that the grown model's own state would have."""
    template = jax.tree.map(lambda _: None, partition(grown)[0])
    values = {slot.steps: find(tree, slot.steps) for slot in axes_of(grown).of_kind("param")}
    return put(template, values)
