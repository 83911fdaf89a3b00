"""What steps of a sub-network and behind gates cost by the TPU compiler, beside a plain step."""

import dataclasses

import jax
import pytest

import growjax as gj
from growjax.data import Causal
from growjax.forecast.pod import compile_for
from growjax.models import GPTConfig
from growjax.train import Layout, Plan, Schedule, Stage
from tests.conftest import DEEP


pytestmark = pytest.mark.skipif(not DEEP, reason="minutes: the deep profile runs it")

# A small vocabulary, so that the head hides nothing of what the layers cost
GPT = GPTConfig(
    layers=2,
    embed=512,
    heads=8,
    head_dim=64,
    mlp=2048,
    vocab=512,
    positions=1024,
    dtype="bfloat16",
)


@pytest.fixture(scope="module", autouse=True)
def whole_compiler():
    """The other tests ask for little optimisation; what is looked at here is what users get."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def cycles(model: GPTConfig, *stages: Stage) -> int:
    """Cycles of the last stage's step on a chip that has the whole state and 8 sequences."""
    of = Plan(
        "step",
        model=model,
        batch=32,
        objective=Causal(1024, packing="concat"),
        rate=Schedule(1e-3),
        stages=stages,
        layout=Layout(remat="attention"),
    )
    steps = [p for p in compile_for(of, "v5e:2x2").programs if p.name.startswith("step")]
    assert steps[-1].stage == len(stages) - 1 and steps[-1].cycles is not None
    return steps[-1].cycles.total


@pytest.fixture(scope="module")
def plain() -> int:
    return cycles(GPT, Stage("only", tokens=1))


def test_a_path_of_half_of_the_layers_costs_what_a_model_of_these_costs(plain):
    """The layers are gathered, their gradients scattered, and the optimizer goes over all of them."""
    double = dataclasses.replace(GPT, layers=4)
    path = cycles(double, Stage("path", tokens=1, subnet=gj.random_path(2)))
    print(f"path of 2 of 4 layers over a model of 2: {path / plain:.4f}")
    assert 1 <= path / plain < 1.03


def test_gates_cost_next_to_nothing(plain):
    small = dataclasses.replace(GPT, embed=256, heads=4, mlp=1024)
    wider = gj.msg(embed=GPT.embed, heads=GPT.heads, mlp=GPT.mlp)
    first = Stage("small", tokens=32 * 1024)
    gated = cycles(small, first, Stage("wide", tokens=32 * 1024, grow=wider, ramp=1))
    print(f"behind gates over a plain step: {gated / plain:.4f}")
    assert gated / plain < 1.03
