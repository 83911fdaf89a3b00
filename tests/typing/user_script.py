"""What a user writes, for mypy and pyright in strict mode; `make lint` checks it, nothing runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jaxtyping import Array

import growjax as gj


class MLP(eqx.Module):
    up: Array = gj.param("embed -> mlp")
    down: Array = gj.param("mlp -> embed")
    gate: gj.Gate | None = gj.gate("mlp")

    def __call__(self, x: Array) -> Array:
        return gj.gated(jnp.tanh(x @ self.up), self.gate) @ self.down


class Tower(eqx.Module):
    block: MLP = gj.stacked("layers")
    scale: Array | None = gj.branch("layers")
    on: Array | None = gj.active("layers")


def operators() -> gj.Operator | gj.growth.Chain:
    return gj.chain(gj.msg(mlp=128), gj.copy(mlp=256), gj.zeros(mlp=300), gj.stack(layers=4))


def grow_my_own(model: MLP, batch: Array, key: Array) -> MLP:
    op = gj.copy(mlp=12)
    certificate = gj.certify(op, model, batch, key=key)
    assert_type(certificate, gj.Certificate)
    assert_type(certificate.passed, bool)
    tx = optax.adam(1e-3)
    state = gj.carry(op, tx.init(gj.partition(model)[0]), model, optimizer=tx, key=key)
    assert state is not None
    assert_type(gj.grow(op, model, key=key), MLP)
    assert_type(gj.ramp(model, 0.3), MLP)
    assert_type(gj.settle(model), MLP)
    assert_type(gj.sizes(model), dict[str, int])
    return op(model, key=key)


class Interleave(gj.Operator):
    factor: int = eqx.field(static=True, default=2)
    exactness = "approximate"

    def maps(self, axes: gj.axes.Axes) -> Sequence[gj.AxisMap]:
        layers = np.repeat(np.arange(axes.size("layers")), self.factor)
        return [gj.AxisMap("layers", layers)]


class FirstLayers(gj.Subnet):
    count: int = eqx.field(static=True, default=1)

    def maps(self, axes: gj.axes.Axes, *, key: Array, step: int | Array) -> Sequence[gj.AxisMap]:
        return [gj.AxisMap("layers", np.arange(self.count))]


def my_own_values(model: Tower, key: Array) -> Tower:
    assert_type(Interleave(3)(model), Tower)
    return FirstLayers(2)(gj.grow(Interleave(), model), key=key)


def sub_network(model: gj.models.GPT, key: Array) -> gj.models.GPT:
    path = gj.random_path(3)
    assert_type(path(model, key=key, step=2), gj.models.GPT)
    return gj.random_part(mlp=16)(model, key=gj.step_key(0, 1))


def annotated(model: MLP) -> gj.Annotated:
    return gj.annotate(model, {"*": "a -> b"}, ignore=["nothing"])


def plan_config() -> gj.models.GPTConfig:
    return gj.models.GPTConfig(
        layers=2, embed=32, heads=2, head_dim=16, mlp=64, vocab=384, positions=64
    )


def plan() -> gj.Plan:
    stages = (
        gj.Stage("small", tokens=40_000),
        gj.Stage("wide", tokens=60_000, grow=gj.msg(mlp=128), ramp=10),
    )
    return gj.Plan(
        "first",
        plan_config(),
        stages,
        batch=16,
        objective=gj.data.Causal(64),
        rate=gj.train.Schedule(3e-3),
        data=gj.data.StandardLibrary(),
    )


def train(folder: str) -> float:
    loss = float("inf")
    options = gj.train.Options(held_out=32, save_every=100)
    for record in gj.train.train(plan(), run=folder, options=options):
        if isinstance(record, gj.train.Step) and record.held_out is not None:
            loss = min(loss, record.held_out)
        elif isinstance(record, gj.train.Growth):
            print(record)
    return loss


def interop(folder: str, tokens: Array) -> Array:
    model = gj.hf.load(folder)
    gj.hf.save(model, Path(folder) / "copy")
    gpt = gj.models.GPT(plan_config(), key=jax.random.key(0))
    llama = gj.models.Llama(
        gj.models.LlamaConfig(
            layers=2, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=64, vocab=384
        ),
        key=jax.random.key(0),
    )
    return gpt(tokens) + llama(tokens)


def evaluate(model: gj.models.GPT) -> float:
    tokenizer = gj.data.ByteTokenizer()
    settings = gj.evals.Settings(texts=("held-out.txt",), limit=10)
    scores = gj.evals.evaluate(model, ["bpb", "primitives/copy"], tokenizer, settings)
    language = gj.evals.LanguageModel(model, tokenizer)
    (likelihood,) = language.loglikelihoods([("2 + 2 =", " 4")])
    assert_type(likelihood.logprob, float)
    return scores["bpb"]["bits_per_byte"]


def compare(clock: gj.budget.Clock) -> None:
    print(gj.budget.FlopsClock(), clock, gj.__version__)


if __name__ == "__main__":
    key = jax.random.key(0)
    module = MLP(jax.random.normal(key, (4, 6)), jax.random.normal(key, (6, 4)))
    batch = jax.random.normal(key, (2, 4))
    print(grow_my_own(module, batch, key), operators(), train("runs/first"))
