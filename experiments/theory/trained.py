"""The same question of trained Transformers: how far is one from itself with a layer removed?

Byte models of several depths, with LayerNorm in their blocks and without it, trained as a whole or by
RaPTr. Without means that blocks read the stream as it is; the norm before the head stays, since it is
what makes the loss a function of the relative change of the last hidden state.
"""

import dataclasses
import itertools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import growjax as gj
from experiments.theory.cells import SizeName, cells, interval_half, row, summarise, within
from experiments.theory.fit import Phase, fit, staged
from experiments.theory.stability import distances
from growjax.data import Source, StandardLibrary, Text


NORMS = ("LayerNorm", "no norm")
ARMS = ("full", "RaPTr")
TIMES = ("birth", "boundary", "end")
BYTES = 2**21


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


class Bytes(eqx.Module):
    """Windows of a text, to predict each byte from those before it."""

    text: Array
    batch: int = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def draw(self, key):
        first = jax.random.randint(key, (self.batch, 1), 0, len(self.text) - self.length)
        return self.text[first + jnp.arange(self.length + 1)].astype(jnp.int32)

    def loss(self, model, batch):
        return jnp.mean(nats(jax.vmap(model)(batch[:, :-1]), batch))


def nats(logits: Array, windows: Array) -> Array:
    """The loss of each byte but the first of each window."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def texts(source: Source, size: int = BYTES) -> tuple[Array, Array]:
    """Bytes to train on and bytes held out: one document in ten, or the end of a single one."""
    documents, read = [], 0
    for document in source.documents():
        content = document.content
        data = content.encode() if isinstance(content, str) else bytes(content)
        documents.append(np.frombuffer(data, np.uint8))
        read += len(data)
        if read >= size:
            break
    if len(documents) < 10:
        whole = np.concatenate(documents)
        documents = np.array_split(whole[:size], 10)
    held_out = documents[9::10]
    train = [d for n, d in enumerate(documents) if n % 10 != 9]
    return jnp.asarray(np.concatenate(train)), jnp.asarray(np.concatenate(held_out))


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


def trained_cell(
    size: Size, data: tuple[Array, Array], norm: str, arm: str, depth: int, seed: int
) -> dict:
    """One network at its birth, at the boundary before the last stage, and at the end."""
    s = size
    task = Bytes(data[0], s.batch, s.length)
    windows = Bytes(data[1], s.probes, s.length).draw(jax.random.key(seed))
    born = network(s, depth, norm, jax.random.key(seed))
    run = fit(born, phases(arm, depth, s.steps), task, rate=s.rate, every=s.steps, seed=seed)
    _, (_, boundary), (_, end) = run
    found = [probe(model, windows, depth) for model in (born, boundary, end)]
    return dict(zip(TIMES, found, strict=True))


# Rows and figures --------------------------------------------------------------------------------


def trained(size: SizeName = "smoke", out: Path = Path("out"), text: Path | None = None):
    """Trained Transformers without one layer. `text` is a file to learn; else Python's library is."""
    s = SIZES[size]
    data = texts(StandardLibrary() if text is None else Text(str(text)))
    nets = list(itertools.product(NORMS, ARMS))
    wanted = [(*net, d, i) for i in range(s.seeds) for net in nets for d in s.depths]
    name = size if text is None else f"{size}-{text.stem}"
    path = out / f"trained-{name}.jsonl"
    done = cells(path, wanted, lambda *cell: trained_cell(s, data, *cell))
    found = {tuple(cell["cell"]): cell for cell in done}

    def table(net, time: str, what: str) -> np.ndarray:
        """`[seeds, depths]` of one number."""
        return np.array(
            [[found[(*net, d, i)][time][what] for d in s.depths] for i in range(s.seeds)], float
        )

    command = f"python -m experiments.theory.run trained --size {size}"
    command += "" if text is None else f" --text {text}"
    draw(s, nets, found, table, out / "trained.png")
    return summarise(out, "trained", _rows(s, nets, table, command))


def _rows(s: Size, nets, table, command: str) -> list[dict]:
    logs = np.log(s.depths)
    rows = []

    def ask(question: str, values, low: float, high: float) -> None:
        rows.append(row(question, values, within(values, low, high), command))

    def slope(values):
        return np.polyfit(logs, values.T, 1)[0]

    for net in nets:
        name = f"{net[1]}, {net[0]}"
        slopes = slope(np.log(table(net, "end", "mean")))
        ask(f"{name}: does the mean ratio fall with depth (slope)?", slopes, -np.inf, 0)
        gap = table(net, "boundary", "gap")
        ask(f"{name}: does the mean gap at the boundary fall with depth?", slope(gap), -np.inf, 0)
        ask(f"{name}: is the gap L1 - L2 at the boundary above 0?", gap.mean(1), 0, np.inf)
        share = np.abs(gap) / table(net, "boundary", "bound")
        ask(f"{name}: does the bound hold (worst gap over bound)?", share.max(1), -np.inf, 1)
    for norm in NORMS:
        full, raptr = (np.log(table((norm, arm), "end", "mean")) for arm in ARMS)
        ask(
            f"{norm}: is RaPTr's mean ratio below that of full (log)?",
            (raptr - full).mean(1),
            -9,
            0,
        )
    norm, bare = (slope(np.log(table((n, "full"), "end", "mean"))) for n in NORMS)
    ask("full: is the slope below 0 by more with LayerNorm than without?", norm - bare, -np.inf, 0)
    return rows


def draw(s: Size, nets, found, table, path: Path) -> None:
    """Ratios by layer in the deepest networks; their means, and the gaps, by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    deepest = s.depths[-1]
    for net in nets:
        label = f"{net[1]}, {net[0]}"
        style = {"marker": "o", "markersize": 3, "linestyle": "-" if net[0] == NORMS[0] else "--"}
        color = "tab:blue" if net[1] == "full" else "tab:red"
        lines = [found[(*net, deepest, i)]["end"]["ratios"] for i in range(s.seeds)]
        mean = np.mean(np.array(lines, float), axis=0)
        left.plot(np.arange(1, deepest + 1), mean, color=color, label=label, **style)
        for panel, time, what in ((middle, "end", "mean"), (right, "boundary", "gap")):
            values = table(net, time, what)
            half = interval_half(values)
            panel.errorbar(s.depths, values.mean(0), half, color=color, capsize=2, **style)
    for norm, style in zip(NORMS, ("-", "--"), strict=True):
        values = table((norm, "full"), "birth", "mean").mean(0)
        middle.plot(s.depths, values, style, color="gray", label=f"at birth, {norm}")
    left.set(xlabel="removed layer", ylabel="distance / norm of output", yscale="log")
    left.set_title(f"{deepest} layers, trained", fontsize=10)
    middle.set(xlabel="layers", xscale="log", yscale="log")
    middle.set_title("mean over layers", fontsize=10)
    right.set(xlabel="layers", xscale="log", ylabel="nats per byte")
    right.set_title("L1 - L2 at the boundary", fontsize=10)
    for panel in (middle, right):
        panel.set_xticks(s.depths, [str(d) for d in s.depths])
        panel.minorticks_off()
    left.legend(fontsize=7)
    middle.legend(fontsize=7)
    figure.savefig(path, dpi=120)
