"""ModernBERT: what it computes, written out, and every growth of it in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import testing
from growjax.errors import PlanError
from growjax.models import ModernBERTConfig, Sight
from growjax.nn import Mask


CONFIG = ModernBERTConfig(
    layers=4,
    embed=8,
    heads=2,
    head_dim=4,
    mlp=6,
    vocab=11,
    pattern=(Sight(theta=100.0), Sight(window=2), Sight(window=2)),
    head_bias=True,
    remat="everything",
)
TOKENS = jnp.asarray([[1, 2, 3, 4, 5], [7, 0, 10, 7, 7]])
OPERATORS: dict[str, Any] = {
    "msg": gj.msg(embed=12, mlp=8, heads=4, layers=5, init="matched"),
    "copy": gj.copy(embed=16, mlp=9, heads=4, shares="random"),
    "zeros": gj.zeros(mlp=9, heads=4),
    "closed": gj.stack(layers=6, order="insert", branch="zero"),
    "vocabulary": gj.vocabulary(16, gate=True),
}


def built(dtype: Any = jnp.float64, **changes: Any) -> Any:
    with jax.enable_x64(True):
        model = dataclasses.replace(CONFIG, **changes).build(jax.random.key(0))
        model = testing.randomise(model)
        return jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, model)


@pytest.mark.parametrize(
    "op",
    [pytest.param(n, marks=() if n in ("msg", "copy") else pytest.mark.slow) for n in OPERATORS],
)
def test_growth_keeps_the_function(op: str):
    testing.assert_preserves(OPERATORS[op], built(), TOKENS)


def test_the_first_layer_has_no_norm_and_windows_reach_to_both_sides():
    """The stream is written out with the parts of the model."""
    with jax.enable_x64(True):
        model, tokens = built(labels=3, mlm_head=False, pooling="mean"), TOKENS[0]
        real = jnp.asarray([True, True, True, True, False])
        output = model(tokens, mask=real)
        x = model.embedding_norm(model.embedding.table[tokens])
        turns = [rotary(jnp.arange(5)) for rotary in (model.rotary, *model.others)]
        places = np.arange(5)
        near = np.abs(places[:, None] - places) < 2
        blocks = [jax.tree.map(lambda a, i=i: a[i], model.blocks.block) for i in range(3)]
        for i, block in enumerate([model.first, *blocks]):
            full = i in (0, 3)
            attention = gj.axes.put(block.attention, {("turn",): None, ("window",): None})
            seen = Mask(pairs=jnp.asarray(np.ones((5, 5), bool) if full else near), keys=real)
            norm = (lambda x: x) if i == 0 else block.attention_norm
            x = x + attention(norm(x), mask=seen, turn=turns[0 if full else 1])
            x = x + block.mlp(block.mlp_norm(x))
        hidden = model.norm(x)
        np.testing.assert_allclose(output.hidden[:4], hidden[:4], atol=1e-12)
        pooled = model.transform(jnp.mean(hidden[:4], 0, keepdims=True))[0]
        scores = pooled @ model.classifier + model.classifier_bias
        np.testing.assert_allclose(output.label_logits, scores, atol=1e-12)
        with pytest.raises(PlanError, match="mlm_head: a ModernBERT is trained through it"):
            model.predict({"tokens": tokens})
