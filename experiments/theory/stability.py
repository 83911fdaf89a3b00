"""How far is a network from itself with a layer removed? Random networks, four ways to build them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

import growjax as gj
from experiments.study import Line, answer
from experiments.theory.experiment import Experiment, Network, half_interval, table
from growjax.axes import param
from growjax.report.figures import canvas, style
from growjax.report.rows import Answer


Variant = Literal["residual + norm", "residual", "norm", "residual / sqrt L"]
# The exponent of the mean ratio in the depth as the depth grows
VARIANTS: dict[Variant, float] = {
    "residual + norm": -0.5,
    "residual": 0.0,
    "norm": 0.0,
    "residual / sqrt L": -0.5,
}


def closed_form(variant: Variant, depth: int) -> float:
    """The mean over layers of `|F - F without the layer| / |F|`, for a width without end."""
    layers = np.arange(1, depth + 1)
    return {
        "residual + norm": float(np.mean((layers + 1) ** -0.5)),
        "residual": 0.5**0.5,
        "norm": 2**0.5,
        "residual / sqrt L": (depth + 1) ** -0.5,
    }[variant]


@dataclasses.dataclass(frozen=True)
class Size:
    """`depths` are fitted; `depth` is that of the networks that lose several layers at once."""

    depths: tuple[int, ...]
    embed: int
    seeds: int
    samples: int
    depth: int
    draws: int


SIZES = {
    "smoke": Size((8, 16, 32), 128, 4, 4, 32, 8),
    "small": Size((8, 16, 32, 64, 128), 256, 8, 4, 64, 16),
    "paper": Size((8, 16, 32, 64, 128, 256), 512, 16, 16, 128, 64),
}


class Linear(eqx.Module):
    """`x + W norm(x)`, without the norm or the sum if asked for; `W` has variance 1/embed."""

    residual: bool = eqx.field(static=True)
    norm: gj.nn.Norm | None
    weight: Array = param("embed -> embed")

    def __call__(self, x, *, branch=None):
        y = (x if self.norm is None else self.norm(x)) @ self.weight
        y = y if branch is None else y * branch
        return x + y if self.residual else y


def network(variant: Variant, depth: int, embed: int, key) -> gj.nn.Stacked:
    """A random linear network; a layer whose `active` flag is False is the identity."""

    def block(key):
        norm = gj.nn.Norm(embed, bias=False) if "norm" in variant else None
        return Linear(variant != "norm", norm, gj.nn.normal(key, (embed, embed), embed))

    made = gj.nn.Stacked(block, depth, key=key)
    if variant != "residual / sqrt L":
        return made
    scale = jnp.full(depth, depth**-0.5)
    return eqx.tree_at(lambda m: m.branch, made, scale, is_leaf=lambda x: x is None)


@eqx.filter_jit
def outputs(net: gj.nn.Stacked, x: Array, active: Array) -> Array:
    """The last hidden states `[runs, samples, embed]` under each row of flags `[runs, layers]`."""

    def one(flags):
        return eqx.tree_at(lambda m: m.active, net, flags, is_leaf=lambda x: x is None)(x)

    # Without a norm, states grow as 2^(layers / 2): their squares would overflow.
    last = jax.vmap(one)(active)
    return last / jnp.max(jnp.abs(last))


def distances(whole: Array, parts: Array) -> Array:
    """`|F - F_part| / |F|` for each part and sample."""
    return jnp.linalg.norm(parts - whole, axis=-1) / jnp.linalg.norm(whole, axis=-1)


def boundary(whole: Array, parts: Array, target: Array) -> tuple[Array, Array]:
    """`(gap, bound)` of each sample at the change from one layer removed at random to none.

    The loss `|y / |y| - target|` changes by at most `2 |e| / |y|` when `y` moves by `e`.
    """

    def loss(y):
        return jnp.linalg.norm(y / jnp.linalg.norm(y, axis=-1, keepdims=True) - target, axis=-1)

    gap = jnp.abs(jnp.mean(loss(parts), axis=0) - loss(whole))
    return gap, 2 * jnp.mean(distances(whole, parts), axis=0)


def _inputs(size: Size, seed: int) -> tuple[Array, Array, Array]:
    k_net, k_x, k_target = jax.random.split(gj.step_key(seed, 0), 3)
    target = jax.random.normal(k_target, (size.samples, size.embed)) * size.embed**-0.5
    return k_net, jax.random.normal(k_x, (size.samples, size.embed)), target


def stability_line(size: Size, variant: Variant, depth: int, seed: int) -> Line:
    """One network: the ratio by removed layer, and the loss at the boundary against its bound."""
    key, x, target = _inputs(size, seed)
    flags = jnp.concatenate([jnp.ones((1, depth), bool), ~jnp.eye(depth, dtype=bool)])
    whole, *_ = parts = outputs(network(variant, depth, size.embed, key), x, flags)
    gap, bound = boundary(whole, parts[1:], target)
    ratios = np.asarray(jnp.mean(distances(whole, parts[1:]), axis=1))
    return {
        "ratios": ratios.round(6).tolist(),
        "mean": float(ratios.mean()),
        "gap": float(jnp.mean(gap)),
        "worst_gap_over_bound": float(jnp.max(gap / bound)),
    }


def removed_line(size: Size, removed: int, seed: int) -> Line:
    """One residual network with norms that loses `removed` random layers, and what theory expects."""
    key, x, _ = _inputs(size, seed)
    path = gj.random_path(size.depth - removed, keep=())
    paths = [path.sample(size.depth, key=gj.step_key(seed, i)) for i in range(size.draws)]
    active = np.stack([np.isin(np.arange(size.depth), p) for p in paths])
    flags = jnp.asarray(np.concatenate([np.ones((1, size.depth), bool), active]))
    whole, *_ = parts = outputs(network("residual + norm", size.depth, size.embed, key), x, flags)
    expected = np.sqrt((~active / np.arange(2, size.depth + 2)).sum(axis=1))
    return {
        "mean": float(jnp.mean(distances(whole, parts[1:]))),
        "expected": float(expected.mean()),
    }


# Answers and figures -----------------------------------------------------------------------------


def stability_networks(s: Size) -> list[Network]:
    """Every variant at every depth."""
    return [(f"{depth} layers", v, (v, depth)) for v in VARIANTS for depth in s.depths]


def stability_answers(s: Size, lines: Sequence[Line]) -> list[Answer]:
    """The slope of the mean ratio against depth for four networks, and the bound at the boundary."""
    rows = []
    logs = np.log(s.depths)
    for variant, limit in VARIANTS.items():
        means = table([x for x in lines if x["arm"] == variant], "mean")
        slopes = np.polyfit(logs, np.log(means).T, 1)[0]
        forms = [closed_form(variant, depth) for depth in s.depths]
        at_these = round(float(np.polyfit(logs, np.log(forms), 1)[0]), 3) + 0.0  # no -0.0
        for name, slope in (("limit", limit), ("closed form at these depths", at_these)):
            near = bool(abs(slopes.mean() - slope) < 0.1)
            question = f"{variant}: is the slope within 0.1 of {slope} ({name})?"
            rows.append(answer("stability", question, slopes, verdict=near))
    worst = [
        max(x["worst_gap_over_bound"] for x in lines if x["seed"] == seed)
        for seed in sorted({x["seed"] for x in lines})
    ]
    question = "Does the bound at the boundary hold for every sample?"
    return [*rows, answer("stability", question, worst, verdict=max(worst) <= 1)]


def draw_stability(s: Size, lines: Sequence[Line]) -> Figure:
    """Ratios by removed layer in the deepest networks, and their means by depth."""
    with style():
        figure, (left, right) = canvas(3.6, ncols=2)
        for variant in VARIANTS:
            group = [x for x in lines if x["arm"] == variant]
            deepest = [x["ratios"] for x in group if x["budget"] == f"{s.depths[-1]} layers"]
            left.plot(np.arange(1, s.depths[-1] + 1), np.mean(deepest, axis=0), label=variant)
            means = table(group, "mean")
            bars = {"marker": "o", "capsize": 2, "label": variant}
            right.errorbar(s.depths, means.mean(0), half_interval(means), **bars)
            forms = [closed_form(variant, depth) for depth in s.depths]
            right.plot(s.depths, forms, ":", color="C0", linewidth=0.8)
        right.plot([], [], ":", color="C0", linewidth=0.8, label="closed forms")
        left.set(xlabel="removed layer", ylabel="distance / norm of output", yscale="log")
        left.set_title(f"{s.depths[-1]} layers")
        right.set(xlabel="layers", xscale="log", yscale="log")
        right.set_title("mean over layers")
        right.set_xticks(s.depths, [str(d) for d in s.depths])
        right.minorticks_off()
        right.legend(fontsize=7)
    return figure


def counts(s: Size) -> list[int]:
    """How many layers are removed at once: powers of two, up to half of them."""
    return [2**i for i in range(s.depth.bit_length() - 1)]


def removed_networks(s: Size) -> list[Network]:
    """One network, which loses ever more layers."""
    return [(f"{n} of {s.depth} removed", "residual + norm", (n,)) for n in counts(s)]


def removed_answers(s: Size, lines: Sequence[Line]) -> list[Answer]:
    """Does the distance grow as if the errors of removed layers were orthogonal?"""
    quotients = table(lines, "mean") / table(lines, "expected")
    rows = []
    for count, values in zip(counts(s), quotients.T, strict=True):
        question = (
            f"{count} of {s.depth} layers removed: is the distance sqrt(sum 1/(l+1)) within 15%?"
        )
        near = bool(abs(values.mean() - 1) < 0.15)
        rows.append(answer("removed", question, values, verdict=near))
    return rows


def draw_removed(s: Size, lines: Sequence[Line]) -> Figure:
    """The distance by how many layers are removed, and what orthogonal errors add up to."""
    with style():
        figure, axes = canvas(3.6)
        ratios = table(lines, "mean")
        bars = {"marker": "o", "capsize": 2, "label": "measured"}
        axes.errorbar(counts(s), ratios.mean(0), half_interval(ratios), **bars)
        expected = table(lines, "expected").mean(0)
        axes.plot(counts(s), expected, ":", color="C1", label="sqrt(sum 1/(l+1))")
        axes.set(xlabel=f"layers removed of {s.depth}", ylabel="distance / norm of output")
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=8)
    return figure


STABILITY = Experiment(
    "Random networks without one layer",
    "Relative distances by removed layer, and their means by depth with 95% intervals over seeds; "
    "dotted lines are closed forms.",
    SIZES,
    stability_networks,
    stability_line,
    stability_answers,
    draw_stability,
)
REMOVED = Experiment(
    "Several layers removed at once",
    "The distance with 95% intervals over seeds, and the sum of orthogonal errors.",
    SIZES,
    removed_networks,
    removed_line,
    removed_answers,
    draw_removed,
)
