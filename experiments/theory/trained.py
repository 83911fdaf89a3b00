"""The same question of trained Transformers: how far is one from itself with a layer removed?

Byte models of several depths, with LayerNorm in their blocks and without it, trained as a whole or by
RaPTr. Without means that blocks read the stream as it is; the norm before the head stays, since it is
what makes the loss a function of the relative change of the last hidden state.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

import growjax as gj
from experiments.study import Line, answer
from experiments.theory.bytes import Bytes, nats
from experiments.theory.experiment import Experiment, Network, half_interval, table
from experiments.theory.fit import Phase, fit, staged
from experiments.theory.stability import distances
from growjax.report.figures import canvas, style
from growjax.report.rows import Answer


NORMS = ("LayerNorm", "no norm")
ARMS = ("full", "RaPTr")
TIMES = ("birth", "boundary", "end")
NETS = list(itertools.product(NORMS, ARMS))


@dataclasses.dataclass(frozen=True)
class Size:
    """`probes` windows of held-out text measure the networks, half of them the constant `mu`."""

    depths: tuple[int, ...]
    embed: int
    heads: int
    length: int
    batch: int
    steps: int
    probes: int
    seeds: int
    rate: float = 2e-3


SIZES = {
    "smoke": Size((4, 8), 16, 2, 16, 4, 30, 8, 2),
    "small": Size((4, 8, 12, 16), 32, 2, 32, 8, 300, 32, 3),
    "paper": Size((6, 12, 18, 24), 512, 8, 256, 64, 20_000, 64, 6, rate=5e-4),
}


class Bare(gj.nn.Norm):
    """A norm that does nothing; its weights are there and get no gradient."""

    def __init__(self, size: int):
        super().__init__(size)

    def __call__(self, x: Array) -> Array:
        return x


def network(size: Size, depth: int, norm: str, key) -> gj.models.GPT:
    """A GPT with an untied head, with or without the norms of its blocks."""
    s = size
    config = gj.models.GPTConfig(
        layers=depth,
        embed=s.embed,
        heads=s.heads,
        head_dim=s.embed // s.heads,
        mlp=4 * s.embed,
        vocab=256,
        positions=s.length,
        tied=False,
        remat="everything",
    )
    model = gj.models.GPT(config, key=key)
    if norm == "LayerNorm":
        return model
    where = lambda m: (m.blocks.block.attention_norm, m.blocks.block.mlp_norm)  # noqa: E731
    bare = eqx.filter_vmap(lambda _: Bare(s.embed))(jnp.arange(depth))
    return eqx.tree_at(where, model, (bare, bare))


def hidden(model: gj.models.GPT, tokens: Array, active: Array) -> Array:
    """The last hidden states `[tokens, embed]` of one window when only the `active` layers run."""
    eye = jnp.eye(model.embedding.table.shape[1])
    bare = eqx.tree_at(lambda m: (m.norm, m.head), model, (eqx.nn.Identity(), eye))
    on = eqx.tree_at(lambda m: m.blocks.active, bare, active, is_leaf=lambda v: v is None)
    return on(tokens)


@eqx.filter_jit
def removals(model: gj.models.GPT, windows: Array, depth: int) -> tuple[Array, Array]:
    """By removed layer, window and byte: the distance over `|F|`, and the loss, the whole's first."""
    flags = jnp.concatenate([jnp.ones((1, depth), bool), ~jnp.eye(depth, dtype=bool)])

    def states(active):
        return jax.vmap(lambda tokens: hidden(model, tokens, active))(windows[:, :-1])

    head = model.head
    assert head is not None
    last = jax.lax.map(states, flags)
    losses = jax.vmap(lambda x: nats(gj.nn.logits(model.norm(x), head), windows))(last)
    return distances(last[0], last[1:]), losses


def probe(model: gj.models.GPT, windows: Array, depth: int) -> dict:
    """Ratios and losses by removed layer, and the change of the loss at the boundary with its bound.

    `mu` is the largest relative Lipschitz quotient over layers and bytes in the first half of the
    windows; the bound is for the second half, so that it may fail.
    """
    ratios, losses = removals(model, windows, depth)
    half = len(windows) // 2
    quotients = jnp.abs(losses[1:] - losses[0]) / jnp.maximum(ratios, 1e-6)
    mu = float(jnp.max(quotients[:, :half]))
    ratios, losses = ratios[:, half:], losses[:, half:]
    whole, removed = float(jnp.mean(losses[0])), jnp.mean(losses[1:], axis=(1, 2))
    by_layer = np.asarray(jnp.mean(ratios, axis=(1, 2)), float)
    return {
        "ratios": by_layer.round(5).tolist(),
        "mean": float(by_layer.mean()),
        "loss": whole,
        "gap": float(jnp.mean(removed)) - whole,
        "mu": mu,
        "bound": mu * float(by_layer.mean()),
    }


def phases(arm: str, depth: int, steps: int) -> list[Phase]:
    """RaPTr's three stages, of 1/2, 3/4 and all of the layers; or the whole network for as long."""
    lengths = (depth // 2, 3 * depth // 4, depth)
    stages = staged(gj.path_schedule(lengths, layers=depth, steps=steps))
    return [phase if arm == "RaPTr" else Phase(phase.steps) for phase in stages]


def trained_line(
    size: Size, norm: str, arm: str, depth: int, seed: int, data: tuple[Array, Array]
) -> Line:
    """One network at its birth, at the boundary before the last stage, and at the end."""
    s = size
    task = Bytes(data[0], s.batch, s.length)
    windows = Bytes(data[1], s.probes, s.length).draw(jax.random.key(seed))
    born = network(s, depth, norm, jax.random.key(seed))
    run = fit(born, phases(arm, depth, s.steps), task, rate=s.rate, every=s.steps, seed=seed)
    _, (_, boundary), (_, end) = run
    probes = [probe(model, windows, depth) for model in (born, boundary, end)]
    return dict(zip(TIMES, probes, strict=True))


# Answers and figure ------------------------------------------------------------------------------


def name_of(norm: str, arm: str) -> str:
    """The name of an arm, such as "RaPTr, no norm"."""
    return f"{arm}, {norm}"


def networks(s: Size) -> list[Network]:
    """Every kind of network, at every depth."""
    return [
        (f"{depth} layers", name_of(norm, arm), (norm, arm, depth))
        for norm, arm in NETS
        for depth in s.depths
    ]


def answers(s: Size, lines: Sequence[Line]) -> list[Answer]:
    """What the lines say, of each arm and of arms against each other."""
    logs = np.log(s.depths)
    rows = []

    def ask(question: str, values: np.ndarray, low: float, high: float) -> None:
        rows.append(answer("trained", question, values, low, high))

    def slope(values: np.ndarray) -> np.ndarray:
        return np.polyfit(logs, values.T, 1)[0]

    def values(norm: str, arm: str, *names: str) -> np.ndarray:
        return table([x for x in lines if x["arm"] == name_of(norm, arm)], *names)

    for norm, arm in NETS:
        name = name_of(norm, arm)
        slopes = slope(np.log(values(norm, arm, "end", "mean")))
        ask(f"{name}: does the mean ratio fall with depth (slope)?", slopes, -np.inf, 0)
        gap = values(norm, arm, "boundary", "gap")
        ask(f"{name}: does the mean gap at the boundary fall with depth?", slope(gap), -np.inf, 0)
        ask(f"{name}: is the gap L1 - L2 at the boundary above 0?", gap.mean(1), 0, np.inf)
        share = np.abs(gap) / values(norm, arm, "boundary", "bound")
        ask(f"{name}: does the bound hold (worst gap over bound)?", share.max(1), -np.inf, 1)
    for norm in NORMS:
        full, raptr = (np.log(values(norm, arm, "end", "mean")) for arm in ARMS)
        question = f"{norm}: is RaPTr's mean ratio below that of full (log)?"
        ask(question, (raptr - full).mean(1), -9, 0)
    norm, bare = (slope(np.log(values(n, "full", "end", "mean"))) for n in NORMS)
    ask("full: is the slope below 0 by more with LayerNorm than without?", norm - bare, -np.inf, 0)
    return rows


def draw(s: Size, lines: Sequence[Line]) -> Figure:
    """Ratios by layer in the deepest networks; their means, and the gaps, by depth."""
    deepest = s.depths[-1]
    with style():
        figure, (left, middle, right) = canvas(3.0, ncols=3)
        for norm, arm in NETS:
            group = [x for x in lines if x["arm"] == name_of(norm, arm)]
            look = {
                "marker": "o",
                "markersize": 3,
                "linestyle": "-" if norm == NORMS[0] else "--",
                "color": "C2" if arm == "full" else "C1",
            }
            ratios = [x["end"]["ratios"] for x in group if x["budget"] == f"{deepest} layers"]
            mean = np.mean(np.array(ratios, float), axis=0)
            left.plot(np.arange(1, deepest + 1), mean, label=name_of(norm, arm), **look)
            for panel, time, statistic in ((middle, "end", "mean"), (right, "boundary", "gap")):
                values = table(group, time, statistic)
                half = half_interval(values)
                panel.errorbar(s.depths, values.mean(0), half, capsize=2, **look)
        for norm, dashes in zip(NORMS, ("-", "--"), strict=True):
            group = [x for x in lines if x["arm"] == name_of(norm, "full")]
            values = table(group, "birth", "mean").mean(0)
            middle.plot(s.depths, values, dashes, color="C0", label=f"at birth, {norm}")
        left.set(xlabel="removed layer", ylabel="distance / norm of output", yscale="log")
        left.set_title(f"{deepest} layers, trained")
        middle.set(xlabel="layers", xscale="log", yscale="log")
        middle.set_title("mean over layers")
        right.set(xlabel="layers", xscale="log", ylabel="nats per byte")
        right.set_title("L1 - L2 at the boundary")
        for panel in (middle, right):
            panel.set_xticks(s.depths, [str(d) for d in s.depths])
            panel.minorticks_off()
        left.legend(fontsize=7)
        middle.legend(fontsize=7)
    return figure


EXPERIMENT = Experiment(
    "Trained Transformers without one layer",
    "Relative distances by removed layer and their means by depth, and the change of the loss from one "
    "random layer removed to none. Bars are 95% intervals over seeds.",
    SIZES,
    networks,
    trained_line,
    answers,
    draw,
    reads=True,
)
