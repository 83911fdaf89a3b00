"""Two blocks and `a x1 + b x1 x2`: is the product learned only once both blocks are trained?

The hypothesis: while one random block is trained a step, `x1` is learned and `x1 x2` is not; that comes
with the second phase, of both blocks; and in the reversed order part of it is lost again.
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import growjax as gj
from experiments.theory.cells import SizeName, cells, interval_half, row, summarise, within
from experiments.theory.fit import Phase, fit
from experiments.theory.polynomials import Network, Polynomial, measure, points


WEIGHTS = (0.8, 0.6)  # a and b
ORDERS = {"one, then both": ("one", "both"), "both, then one": ("both", "one")}
SUBNETS = {"one": gj.random_path(1, keep=()), "both": None}


@dataclasses.dataclass(frozen=True)
class Size:
    """`steps` of each phase; `mlps`, the hidden units of a block."""

    mlps: tuple[int, ...]
    steps: int
    every: int
    seeds: int
    bits: int = 8
    embed: int = 16
    batch: int = 128
    rate: float = 1e-3


SIZES = {
    "smoke": Size((32,), 300, 50, 2, rate=3e-3),
    "small": Size((1, 32), 1500, 25, 8),
    "paper": Size((1, 4, 32, 256), 10_000, 50, 16, bits=32, embed=64, batch=512),
}


@eqx.filter_jit
def alone(model: Network, task: Polynomial, x) -> jax.Array:
    """The captured shares of a network that runs one of its blocks, mean over the blocks."""

    def one(active):
        part = eqx.tree_at(lambda m: m.blocks.active, model, active, is_leaf=lambda v: v is None)
        return measure(part, task, x)[0]

    return jnp.mean(jnp.stack([one(row) for row in jnp.eye(2, dtype=bool)]), axis=0)


def blocks_cell(size: Size, mlp: int, order: str, seed: int) -> dict:
    """One run: the shares of `a` and `b` in both blocks together, and in one alone, along the way."""
    s = size
    sets = np.zeros((2, s.bits), bool)
    sets[0, 0] = sets[1, :2] = True
    task = Polynomial(jnp.asarray(sets), jnp.array(WEIGHTS), s.batch)
    k_net, k_x = jax.random.split(jax.random.key(seed))
    net = Network(s.bits, s.embed, mlp, 2, key=k_net)
    x = points(k_x, 2**11, s.bits)
    phases = [Phase(s.steps, SUBNETS[part]) for part in ORDERS[order]]
    steps, both, single, losses = [], [], [], []
    for step, model in fit(net, phases, task, rate=s.rate, every=s.every, seed=seed):
        shares, loss = measure(model, task, x)
        steps.append(step)
        both.append(np.asarray(shares, float).round(4).tolist())
        single.append(np.asarray(alone(model, task, x), float).round(4).tolist())
        losses.append(float(loss))
    return {"steps": steps, "both": both, "alone": single, "loss": losses}


def blocks(size: SizeName = "smoke", out: Path = Path("out")):
    """The coefficient of a product in a network of two blocks, in both orders of training."""
    s = SIZES[size]
    wanted = [(m, order, i) for m in s.mlps for order in ORDERS for i in range(s.seeds)]
    done = cells(out / f"blocks-{size}.jsonl", wanted, lambda *cell: blocks_cell(s, *cell))
    runs: dict[tuple[int, str], list[dict]] = {}
    for cell in done:
        runs.setdefault(tuple(cell["cell"][:2]), []).append(cell)
    command = f"python -m experiments.theory.run blocks --size {size}"
    draw(runs, out / "blocks.png")
    rows = [found for m in s.mlps for found in _rows(m, runs, command)]
    return summarise(out, "blocks", rows)


def fitted(run: dict) -> float:
    """The share of `b` in one block alone when that of `a` first comes within 0.05 of 1."""
    single = np.array(run["alone"])
    near = np.abs(single[:, 0] - 1) < 0.05
    return float(single[near.argmax() if near.any() else -1, 1])


def _rows(mlp: int, runs: dict[tuple[int, str], list[dict]], command: str) -> list[dict]:
    growing, shrinking = (runs[mlp, order] for order in ORDERS)
    half = len(growing[0]["steps"]) // 2
    before = np.array([run["both"][half - 1][1] for run in growing])
    lost = np.array([run["both"][half - 1][1] - run["both"][-1][1] for run in shrinking])
    found = [
        (
            "one block: is less than 0.1 of b learned when a is?",
            [*map(fitted, growing)],
            -np.inf,
            0.1,
        ),
        ("one, then both: does the product come in phase 2 only?", before, -np.inf, 0.1),
        ("both, then one: is over 0.05 of b lost in phase 2?", lost, 0.05, np.inf),
    ]
    for order in ORDERS:
        left = [run["loss"][-1] for run in runs[mlp, order]]
        found.append(
            (f"{order}: does the whole leave less than 1% at the end?", left, -np.inf, 0.01)
        )
    return [
        row(f"{mlp} hidden: {question}", values, within(values, low, high), command)
        for question, values, low, high in found
    ]


def draw(runs: dict[tuple[int, str], list[dict]], path: Path) -> None:
    """A panel for each width and order: what the whole network and one block alone have of a and b."""
    from matplotlib.figure import Figure

    mlps = list(dict.fromkeys(mlp for mlp, _ in runs))
    figure = Figure(figsize=(8, 2.4 * len(mlps) + 0.4), layout="constrained")
    panels = figure.subplots(len(mlps), 2, sharex=True, sharey=True, squeeze=False)
    for panel, ((mlp, order), found) in zip(panels.flat, runs.items(), strict=True):
        steps = np.array(found[0]["steps"])
        for n, color in enumerate(("tab:blue", "tab:red")):
            for where, style in (("both", "-"), ("alone", "--")):
                curves = np.array([run[where] for run in found])[:, :, n]
                mean, half = curves.mean(0), interval_half(curves)
                label = (
                    f"{('x1', 'x1 x2')[n]}, {'whole network' if where == 'both' else 'one block'}"
                )
                panel.plot(steps, mean, style, color=color, label=label, linewidth=1.2)
                panel.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12)
        panel.axvline(steps[-1] / 2, color="gray", linestyle=":", linewidth=0.8)
        panel.axhline(1, color="gray", linewidth=0.6)
        panel.set_title(f"{order}; {mlp} hidden", fontsize=10)
    panels[0, 0].legend(fontsize=7)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("share of the coefficient", fontsize=10)
    figure.savefig(path, dpi=120)
