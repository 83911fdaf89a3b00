"""Two blocks and `a x1 + b x1 x2`: is the product learned only once both blocks are trained?

The hypothesis: while one random block is trained a step, `x1` is learned and `x1 x2` is not; that comes
with the second phase, of both blocks; and in the reversed order part of it is lost again.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import growjax as gj
from experiments.study import Line, answer, by
from experiments.theory import polynomials
from experiments.theory.experiment import Experiment, Network, half_interval
from experiments.theory.fit import Phase, fit
from experiments.theory.polynomials import Polynomial, measure, points
from growjax.report.figures import canvas, style
from growjax.report.rows import Answer


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
def alone(model: polynomials.Network, task: Polynomial, x) -> jax.Array:
    """The captured shares of a network that runs one of its blocks, mean over the blocks."""

    def one(active):
        part = eqx.tree_at(lambda m: m.blocks.active, model, active, is_leaf=lambda v: v is None)
        return measure(part, task, x)[0]

    return jnp.mean(jnp.stack([one(row) for row in jnp.eye(2, dtype=bool)]), axis=0)


def blocks_line(size: Size, mlp: int, order: str, seed: int) -> Line:
    """One run: the shares of `a` and `b` in both blocks together, and in one alone, along the way."""
    s = size
    sets = np.zeros((2, s.bits), bool)
    sets[0, 0] = sets[1, :2] = True
    task = Polynomial(jnp.asarray(sets), jnp.array(WEIGHTS), s.batch)
    k_net, k_x = jax.random.split(jax.random.key(seed))
    net = polynomials.Network(s.bits, s.embed, mlp, 2, key=k_net)
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


def networks(s: Size) -> list[Network]:
    """Both orders, at every width."""
    return [(f"{mlp} hidden", order, (mlp, order)) for mlp in s.mlps for order in ORDERS]


def fitted(run: dict) -> float:
    """The share of `b` in one block alone when that of `a` first comes within 0.05 of 1."""
    single = np.array(run["alone"])
    near = np.abs(single[:, 0] - 1) < 0.05
    return float(single[near.argmax() if near.any() else -1, 1])


def answers(s: Size, lines: Sequence[Line]) -> list[Answer]:
    """The coefficient of the product, at every width and in both orders of training."""
    rows = []
    for width, group in by(lines, "budget").items():
        runs = by(group, "arm")
        growing, shrinking = (runs[order] for order in ORDERS)
        half = len(growing[0]["steps"]) // 2
        alone_at = [fitted(run) for run in growing]
        before = [run["both"][half - 1][1] for run in growing]
        lost = [run["both"][half - 1][1] - run["both"][-1][1] for run in shrinking]
        questions: list[tuple[str, list[float], float, float]] = [
            ("one block: is less than 0.1 of b learned when a is?", alone_at, -np.inf, 0.1),
            ("one, then both: does the product come in phase 2 only?", before, -np.inf, 0.1),
            ("both, then one: is over 0.05 of b lost in phase 2?", lost, 0.05, np.inf),
        ]
        for order in ORDERS:
            left = [run["loss"][-1] for run in runs[order]]
            question = f"{order}: does the whole leave less than 1% at the end?"
            questions.append((question, left, -np.inf, 0.01))
        for question, values, low, high in questions:
            rows.append(answer("blocks", f"{width}: {question}", values, low, high))
    return rows


def draw(s: Size, lines: Sequence[Line]) -> Figure:
    """A panel for each width and order: what the whole network and one block alone have of a and b."""
    runs = by(lines, "budget", "arm")
    with style():
        figure, panels = canvas(
            2.4 * len(s.mlps) + 0.4,
            nrows=len(s.mlps),
            ncols=2,
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        for panel, ((width, order), group) in zip(panels.flat, runs.items(), strict=True):
            steps = np.array(group[0]["steps"])
            for n, term in enumerate(("x1", "x1 x2")):
                for who, part, dashes in (
                    ("whole network", "both", "-"),
                    ("one block", "alone", "--"),
                ):
                    curves = np.array([run[part] for run in group])[:, :, n]
                    mean, half = curves.mean(0), half_interval(curves)
                    look = {"color": f"C{2 - n}", "linestyle": dashes, "linewidth": 1.2}
                    panel.plot(steps, mean, label=f"{term}, {who}", **look)
                    band = {"color": f"C{2 - n}", "alpha": 0.12, "linewidth": 0}
                    panel.fill_between(steps, mean - half, mean + half, **band)
            panel.axvline(steps[-1] / 2, color="C0", linestyle=":", linewidth=0.8)
            panel.axhline(1, color="C0", linewidth=0.6)
            panel.set_title(f"{order}; {width}")
        panels[0, 0].legend(fontsize=7)
        figure.supxlabel("steps", fontsize=9.5)
        figure.supylabel("share of the coefficient", fontsize=9.5)
    return figure


EXPERIMENT = Experiment(
    "Is a product learned only once both blocks are trained?",
    "The share of both coefficients that the whole network has, and one block alone; bands are 95% "
    "intervals over seeds, the dotted line is where the second phase begins.",
    SIZES,
    networks,
    blocks_line,
    answers,
    draw,
)
