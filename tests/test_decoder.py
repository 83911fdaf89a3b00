"""The choices of a decoder: each with every operator in float64, and what they compute."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import growjax as gj
from growjax import testing
from growjax.models import DecoderConfig, Sight
from growjax.nn import LongRotary, RotaryScaling, YarnScaling


LONG = LongRotary((1.0, 2.0), (3.0, 4.0), length=3, magnitude=1.5)
SIZES: dict[str, Any] = dict(
    layers=4, embed=8, heads=4, kv_heads=2, head_dim=4, mlp=6, vocab=11, remat="everything"
)
# Together they have every choice, and every two that meet in one part of the model
CHOICES: dict[str, dict[str, Any]] = {
    "gemma": dict(
        placement="both",
        plus_one=True,
        qk_norm="head",
        pattern=(Sight(window=2, theta=10.0), Sight(theta=100.0, scaling=RotaryScaling(2.0))),
        attention_cap=5.0,
        logit_cap=3.0,
        embed_scale=2.0,
        scale=0.7,
        tied=True,
    ),
    "olmo": dict(placement="after", qk_norm="width", bias=True),
    "neox": dict(
        norm="layer",
        parallel=True,
        turned=2,
        bias=True,
        o_bias=True,
        mlp_bias=True,
        glu=False,
        activation="gelu",
    ),
    "phi": dict(pattern=(Sight(window=3, scaling=LONG),)),
    "smol": dict(
        bias=True, pattern=(Sight(), Sight(window=2, rotary=False), Sight(rotary=False)), tied=True
    ),
    "mixed": dict(
        placement="both",
        plus_one=True,
        qk_norm="width",
        parallel=True,
        o_bias=True,
        turned=2,
        pattern=(Sight(scaling=YarnScaling(4.0, length=8, fast=2.0)),),
    ),
}
OPERATORS: dict[str, Any] = {
    "msg": gj.msg(embed=12, mlp=8, heads=8, kv_heads=4, layers=6, init="matched"),
    "msg head_dim": gj.msg(head_dim=6),
    "msg group": gj.msg(heads=6),
    "copy": gj.chain(gj.copy(embed=16, mlp=9, heads=8, shares="random"), gj.stack(layers=5)),
    "copy head_dim": gj.copy(head_dim=8, kv_heads=4),
    "zeros": gj.zeros(embed=12, mlp=9),
    "closed": gj.stack(layers=8, order="insert", branch="zero"),
    "regroup": gj.regroup(kv_heads=4),
}


def configured(name: str) -> DecoderConfig:
    return DecoderConfig(**SIZES | CHOICES[name])


def built(name: str, dtype: Any = jnp.float64) -> Any:
    with jax.enable_x64(True):
        model = testing.randomise(configured(name).build(jax.random.key(0)))
        return jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, model)


TOKENS = jnp.asarray([[1, 2, 3, 4, 5], [7, 0, 10, 7, 7]])


def fitting(name: str, op: str) -> bool:
    """Whether an operator keeps the function of a model, as far as it says."""
    layer_norm = CHOICES[name].get("norm") == "layer"
    return not (op == "zeros" and layer_norm)


def pairs() -> list[Any]:
    """Every choice with every operator; in the quick profile every operator with two models."""
    quick = {"msg": ("gemma", "mixed"), "copy": ("olmo", "gemma"), "closed": ("gemma", "neox")}
    quick |= {"zeros": ("mixed",), "regroup": ("olmo",), "copy head_dim": ("smol",)}
    quick |= {"msg group": ("mixed",), "msg head_dim": ("phi",)}
    return [
        pytest.param(name, op, marks=() if name in quick[op] else pytest.mark.slow)
        for name in CHOICES
        for op in OPERATORS
        if fitting(name, op)
    ]


@pytest.mark.parametrize(("name", "op"), pairs())
def test_every_choice_keeps_its_function_under_every_operator(name: str, op: str):
    operator = OPERATORS[op]
    if op == "copy":
        operator = gj.growth.atoms(operator)[0]
    testing.assert_preserves(operator, built(name), TOKENS)
