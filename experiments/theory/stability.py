"""How far is a network from itself with a layer removed? Random networks, four ways to build them."""

import dataclasses
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import growjax as gj
from experiments.theory.cells import SizeName, cells, interval_half, row, summarise
from growjax.axes import param


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


def stability_cell(size: Size, variant: Variant, depth: int, seed: int) -> dict:
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


def removed_cell(size: Size, removed: int, seed: int) -> dict:
    """One residual network with norms that loses `removed` random layers, and what theory expects."""
    key, x, _ = _inputs(size, seed)
    path = gj.random_path(size.depth - removed, keep=())
    paths = [path.sample(size.depth, key=gj.step_key(seed, i)) for i in range(size.draws)]
    kept = np.stack([np.isin(np.arange(size.depth), p) for p in paths])
    flags = jnp.asarray(np.concatenate([np.ones((1, size.depth), bool), kept]))
    whole, *_ = parts = outputs(network("residual + norm", size.depth, size.embed, key), x, flags)
    expected = np.sqrt((~kept / np.arange(2, size.depth + 2)).sum(axis=1))
    return {
        "mean": float(jnp.mean(distances(whole, parts[1:]))),
        "expected": float(expected.mean()),
    }


# Rows and figures -------------------------------------------------------------------------------


def stability(size: SizeName = "smoke", out: Path = Path("out")):
    """The slope of the mean ratio against depth for four networks, and the bound at the boundary."""
    from matplotlib.figure import Figure

    s = SIZES[size]
    wanted = [(v, d, i) for v in VARIANTS for d in s.depths for i in range(s.seeds)]
    done = cells(out / f"stability-{size}.jsonl", wanted, lambda *cell: stability_cell(s, *cell))
    found = {tuple(c["cell"]): c for c in done}
    command = f"python -m experiments.theory.run stability --size {size}"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = []
    for variant, theory in VARIANTS.items():
        means = np.array([[found[variant, d, i]["mean"] for d in s.depths] for i in range(s.seeds)])
        slopes = np.polyfit(np.log(s.depths), np.log(means).T, 1)[0]
        forms = [closed_form(variant, d) for d in s.depths]
        expected = round(float(np.polyfit(np.log(s.depths), np.log(forms), 1)[0]), 3) + 0.0
        for name, slope in (("limit", theory), ("closed form at these depths", expected)):
            near = bool(abs(slopes.mean() - slope) < 0.1)
            question = f"{variant}: is the slope within 0.1 of {slope} ({name})?"
            rows.append(row(question, slopes, near, command))
        deepest = [found[variant, s.depths[-1], i]["ratios"] for i in range(s.seeds)]
        left.plot(np.arange(1, s.depths[-1] + 1), np.mean(deepest, axis=0), label=variant)
        half = interval_half(means)
        right.errorbar(s.depths, means.mean(axis=0), half, marker="o", capsize=2, label=variant)
        right.plot(s.depths, forms, "k:", linewidth=0.8)
    worst = [
        max(c["worst_gap_over_bound"] for c in done if c["cell"][2] == i) for i in range(s.seeds)
    ]
    holds = max(worst) <= 1
    rows.append(row("Does the bound at the boundary hold for every sample?", worst, holds, command))
    depths = np.array(s.depths)
    right.plot([], [], "k:", linewidth=0.8, label="closed forms")
    left.set(xlabel="removed layer", ylabel="distance / norm of output", yscale="log")
    left.set_title(f"{s.depths[-1]} layers", fontsize=10)
    right.set(xlabel="layers", xscale="log", yscale="log")
    right.set_title("mean over layers, 95% interval", fontsize=10)
    right.set_xticks(depths, [str(d) for d in depths])
    right.minorticks_off()
    right.legend(fontsize=7)
    figure.savefig(out / "stability.png", dpi=120)
    return summarise(out, "stability", rows)


def removed(size: SizeName = "smoke", out: Path = Path("out")):
    """Several layers removed at once: does the distance grow as if their errors were orthogonal?"""
    from matplotlib.figure import Figure

    s = SIZES[size]
    counts = [2**i for i in range(s.depth.bit_length() - 1)]
    wanted = [(m, i) for m in counts for i in range(s.seeds)]
    done = cells(out / f"removed-{size}.jsonl", wanted, lambda *cell: removed_cell(s, *cell))
    found = {tuple(c["cell"]): c for c in done}
    ratios = np.array([[found[m, i]["mean"] for m in counts] for i in range(s.seeds)])
    expected = np.array([[found[m, i]["expected"] for m in counts] for i in range(s.seeds)])
    quotient = ratios / expected
    command = f"python -m experiments.theory.run removed --size {size}"
    rows = [
        row(
            f"{m} of {s.depth} layers removed: is the distance sqrt(sum 1/(l+1)) within 15%?",
            quotient[:, j],
            bool(abs(quotient[:, j].mean() - 1) < 0.15),
            command,
        )
        for j, m in enumerate(counts)
    ]
    figure = Figure(figsize=(4.5, 3.6), layout="constrained")
    axes = figure.subplots()
    half = interval_half(ratios)
    axes.errorbar(counts, ratios.mean(axis=0), half, marker="o", capsize=2, label="seen")
    axes.plot(counts, expected.mean(axis=0), "k:", label="sqrt(sum 1/(l+1))")
    axes.set(xlabel=f"layers removed of {s.depth}", ylabel="distance / norm of output")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(out / "removed.png", dpi=120)
    return summarise(out, "removed", rows)
