"""Which monomials of a Boolean polynomial does a network learn, and when? Six ways to train it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

import growjax as gj
from experiments.study import Line, answer, by
from experiments.theory import experiment
from experiments.theory.experiment import Experiment, half_interval
from experiments.theory.fit import Phase, fit, staged
from growjax.axes import param
from growjax.report.figures import canvas, style
from growjax.report.rows import Answer


DEGREES = (1, 2, 3, 4, 5)
TERMS = 4


@dataclasses.dataclass(frozen=True)
class Size:
    """`bits` of input; `points` that the coefficients are measured on."""

    bits: int
    embed: int
    mlp: int
    batch: int
    steps: int
    every: int
    points: int
    seeds: int
    layers: int = 8
    rate: float = 1e-3


SIZES = {
    "smoke": Size(8, 16, 32, 64, 400, 100, 256, 2),
    "small": Size(20, 32, 64, 256, 8000, 100, 2**13, 6),
    "paper": Size(32, 64, 256, 512, 40_000, 500, 2**15, 6),
}


class MLPBlock(eqx.Module):
    """`x + mlp(norm(x))`."""

    norm: gj.nn.Norm
    mlp: gj.nn.MLP

    def __init__(self, embed: int, mlp: int, *, key):
        self.norm = gj.nn.Norm(embed)
        self.mlp = gj.nn.MLP(embed, mlp, activation="relu", key=key)

    def __call__(self, x, *, branch=None):
        y = self.mlp(self.norm(x))
        return x + (y if branch is None else y * branch)


class Network(eqx.Module):
    """A linear map in, residual blocks, a linear map out."""

    blocks: gj.nn.Stacked[MLPBlock]
    into: Array = param("bits -> embed")
    out: Array = param("embed ->")
    bias: Array = param("")

    def __init__(self, bits: int, embed: int, mlp: int, layers: int, *, key):
        k_in, k_blocks, k_out = jax.random.split(key, 3)
        self.into = gj.nn.normal(k_in, (bits, embed), bits)
        self.blocks = gj.nn.Stacked(
            lambda k: MLPBlock(embed, mlp, key=k), layers, remat="everything", key=k_blocks
        )
        self.out = gj.nn.normal(k_out, (embed,), embed)
        self.bias = jnp.zeros(())

    def __call__(self, x: Array) -> Array:
        return self.blocks(x @ self.into) @ self.out + self.bias


class Polynomial(eqx.Module):
    """`sum of c_S prod of x_i over i in S`, learned from uniform points of the cube."""

    sets: Array  # [terms, bits], True where x_i is in S
    coefficients: Array
    batch: int = eqx.field(static=True)

    def values(self, x: Array) -> Array:
        """The monomials `[points, terms]`."""
        return monomials(x, self.sets)

    def draw(self, key):
        return points(key, self.batch, self.sets.shape[1])

    def loss(self, model, batch):
        return jnp.mean((model(batch) - self.values(batch) @ self.coefficients) ** 2)


def monomials(x: Array, sets: Array) -> Array:
    """`prod of x_i over i in S` of each point and set: minus where an odd number of them is -1."""
    odd = (x < 0).astype(jnp.float32) @ sets.T.astype(jnp.float32)
    return 1 - 2 * (odd % 2)


def points(key, count: int, bits: int) -> Array:
    """Uniform points of the cube; one random word a point is enough."""
    words = jax.random.bits(key, (count, 1), jnp.uint32)
    return 1 - 2 * ((words >> jnp.arange(bits, dtype=jnp.uint32)) & 1).astype(jnp.float32)


def staircase(bits: int, seed: int) -> np.ndarray:
    """Sets `[degrees * TERMS, bits]`: half of each degree add a bit to one of the degree before."""
    if bits <= DEGREES[-1]:
        raise ValueError(f"bits: {bits} are too few for {TERMS} terms of degree {DEGREES[-1]}")
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    for degree in DEGREES:
        new: list[np.ndarray] = []
        while len(new) < TERMS:
            row = np.zeros(bits, bool)
            if degree > 1 and len(new) < TERMS // 2:
                row = rows[len(new) - TERMS].copy()
            row[rng.choice(np.flatnonzero(~row), degree - row.sum(), replace=False)] = True
            if not any((row == other).all() for other in new):
                new.append(row)
        rows += new
    return np.array(rows)


def coefficients(model, x: Array, values: Array) -> Array:
    """The coefficient `[terms]` of each monomial in what the whole network computes.

    By least squares: on a sample, monomials are not quite orthogonal, and products would mix them.
    """
    return jnp.linalg.lstsq(values, model(x))[0]


@eqx.filter_jit
def measure(model, task: Polynomial, x: Array) -> tuple[Array, Array]:
    """The captured share of each term, and the loss."""
    learned = coefficients(model, x, task.values(x))
    return learned / task.coefficients, task.loss(model, x)


# Arms --------------------------------------------------------------------------------------------


def arms(layers: int, steps: int) -> dict[str, tuple[int, list[Phase]]]:
    """For each way to train: the layers it is born with, and its phases."""
    quarters = [layers * n // 4 for n in (1, 2, 3, 4)]
    schedule = gj.path_schedule(quarters, layers=layers, steps=steps)
    stacked = [
        Phase(stage.stop - stage.start, grow=gj.stack(layers=n, order="top") if i else None)
        for i, (n, stage) in enumerate(zip(quarters, schedule.stages, strict=True))
    ]
    drops = {
        f"PLD {floor}": gj.progressive_layer_drop(floor=floor, rate=100 / steps)
        for floor in (0.5, 0.25)
    }
    return {
        "full": (layers, [Phase(steps)]),
        "RaPTr": (layers, staged(schedule)),
        **{name: (layers, [Phase(steps, drop)]) for name, drop in drops.items()},
        "constant p": (layers, [Phase(steps, gj.random_path(sum(quarters) // 4))]),
        "stacking": (quarters[0], stacked),
    }


def polynomial_line(size: Size, arm: str, seed: int) -> Line:
    """One training run: what the whole network has captured of each degree, along the way."""
    s = size
    sets = staircase(s.bits, seed)
    task = Polynomial(jnp.asarray(sets), jnp.full(len(sets), len(sets) ** -0.5), s.batch)
    k_net, k_x = jax.random.split(jax.random.key(seed))
    layers, phases = arms(s.layers, s.steps)[arm]
    net = Network(s.bits, s.embed, s.mlp, layers, key=k_net)
    x = points(k_x, s.points, s.bits)
    steps, captured, losses, terms = [], [], [], np.zeros(0)
    for step, model in fit(net, phases, task, rate=s.rate, every=s.every, seed=seed):
        shares, loss = measure(model, task, x)
        terms = np.asarray(shares, float).round(4)
        steps.append(step)
        captured.append(terms.reshape(len(DEGREES), -1).mean(1).round(4).tolist())
        losses.append(float(loss))
    return {"steps": steps, "captured": captured, "loss": losses, "terms": terms.tolist()}


# Rows and figures --------------------------------------------------------------------------------


def reached(steps, captured: np.ndarray, share: float = 0.8) -> np.ndarray:
    """The first step at which each degree is captured to this share; infinite if never."""
    above = np.asarray(captured) >= share
    first = np.asarray(steps, float)[above.argmax(axis=0)]
    return np.where(above.any(axis=0), first, np.inf)


def ordered(times: np.ndarray) -> float:
    """The share of neighbouring degrees of which the lower one is not learned later."""
    return float(np.mean(times[:-1] <= times[1:]))


def extended(run: dict) -> float:
    """In degrees 4 and 5: the share of terms that extend a lower one, minus that of the others."""
    terms = np.array(run["terms"]).reshape(len(DEGREES), TERMS)[3:]
    return float(terms[:, : TERMS // 2].mean() - terms[:, TERMS // 2 :].mean())


def networks(s: Size) -> list[experiment.Network]:
    """One network for each way to train."""
    return [(f"{s.steps} steps", arm, (arm,)) for arm in arms(s.layers, s.steps)]


def answers(s: Size, lines: Sequence[Line]) -> list[Answer]:
    """What is captured of each degree, by each way to train."""
    runs = by(lines, "arm")
    high = {
        arm: np.array([r["captured"][-1][3:] for r in group]).mean(1) for arm, group in runs.items()
    }
    rows = []

    def ask(question: str, values: Sequence[float] | np.ndarray, **limits: Any) -> None:
        rows.append(answer("polynomials", question, values, **limits))

    for other in [arm for arm in runs if arm.startswith("PLD")]:
        question = f"degrees 4 and 5: does RaPTr capture over 0.1 more than {other}?"
        ask(question, high["RaPTr"] - high[other], low=0.1)
        question = f"{other}: does it capture over 0.1 more of terms that extend a lower one?"
        ask(question, [extended(run) for run in runs[other]], low=0.1)
    for other in ("full", "constant p", "stacking"):
        question = f"degrees 4 and 5: is what RaPTr captures within 0.05 of {other}?"
        ask(question, high["RaPTr"] - high[other], low=-0.05, high=0.05)
    for arm, group in runs.items():
        curves = np.array([r["captured"] for r in group])
        shares = [ordered(reached(group[0]["steps"], curve)) for curve in curves]
        in_order = ordered(reached(group[0]["steps"], curves.mean(0))) == 1
        question = (
            f"{arm}: does the mean of seeds reach 0.8 degree by degree (share of pairs in order)?"
        )
        ask(question, shares, verdict=in_order)
    for arm, group in runs.items():
        question = f"{arm}: does the whole network leave less than 5% of the variance at the end?"
        ask(question, [r["loss"][-1] for r in group], high=0.05)
    return rows


def draw(s: Size, lines: Sequence[Line]) -> Figure:
    """One panel for each way to train, one line for each degree."""
    with style():
        figure, panels = canvas(4.6, nrows=2, ncols=3, sharex=True, sharey=True)
        for panel, (arm, group) in zip(panels.flat, by(lines, "arm").items(), strict=True):
            steps = np.array(group[0]["steps"])
            curves = np.array([r["captured"] for r in group])
            for n, degree in enumerate(DEGREES):
                mean, half = curves[:, :, n].mean(0), half_interval(curves[:, :, n])
                (line,) = panel.plot(steps, mean, label=f"degree {degree}", linewidth=1.2)
                band = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
                panel.fill_between(steps, mean - half, mean + half, **band)
            if arm in ("RaPTr", "stacking"):
                for n in (1, 2, 3):
                    panel.axvline(steps[-1] * n / 4, color="C0", linestyle=":", linewidth=0.8)
            panel.axhline(1, color="C0", linewidth=0.6)
            panel.set_title(arm)
            panel.set_ylim(-0.1, 1.6)
        panels.flat[0].legend(fontsize=7, loc="lower right")
        figure.supxlabel("steps", fontsize=9.5)
        figure.supylabel("captured by the whole network", fontsize=9.5)
    return figure


EXPERIMENT = Experiment(
    "Which monomials does a network learn, and when?",
    "The weight that the whole network gives to the monomials of a degree, over the true one; bands are "
    "95% intervals over seeds, dotted lines are where a stage begins.",
    SIZES,
    networks,
    polynomial_line,
    answers,
    draw,
)
