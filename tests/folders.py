"""Small models of every family that has a table, and folders to spoil."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from growjax.axes import axes_of, put
from growjax.certificate import call
from growjax.models import (
    BERT,
    GPT,
    T5,
    BERTConfig,
    Decoder,
    DecoderConfig,
    GPTConfig,
    Labels,
    Llama,
    LlamaConfig,
    ModernBERT,
    ModernBERTConfig,
    Sight,
    T5Config,
    T5Encoder,
    T5EncoderConfig,
)
from growjax.nn import RotaryScaling
from growjax.testing import randomise


SIZES: dict[str, Any] = dict(embed=8, heads=2, head_dim=4, mlp=6, vocab=11)
DEEP: dict[str, Any] = SIZES | dict(layers=2, positions=7)
LLAMA: dict[str, Any] = SIZES | dict(layers=2, heads=4, kv_heads=2)
PAIR: dict[str, Any] = SIZES | dict(encoder_layers=2, decoder_layers=3, head_dim=3)
LLAMA3 = RotaryScaling(8.0, low=1.0, high=4.0, length=64)


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**LLAMA | changes)


GEMMA3 = DecoderConfig(
    **{**LLAMA, "layers": 3},
    placement="both",
    plus_one=True,
    qk_norm="head",
    activation="gelu_tanh",
    scale=0.4,
    embed_scale=8**0.5,
    pattern=(Sight(window=3), Sight(window=3), Sight(theta=1e6, scaling=RotaryScaling(2.0))),
    tied=True,
)
NEOX = DecoderConfig(
    **{**LLAMA, "heads": 2, "kv_heads": 2},
    norm="layer",
    parallel=True,
    bias=True,
    o_bias=True,
    mlp_bias=True,
    glu=False,
    activation="gelu",
    turned=2,
)
MIXTRAL = DecoderConfig(**LLAMA, experts=3, z_loss_coef=0.0, pattern=(Sight(window=3),))
QWEN3_MOE = DecoderConfig(
    **LLAMA, experts=3, z_loss_coef=0.0, norm_topk_prob=False, qk_norm="head", aux_loss_coef=0.0
)
QWEN2_MOE = DecoderConfig(
    **LLAMA,
    experts=3,
    z_loss_coef=0.0,
    norm_topk_prob=False,
    bias=True,
    shared_mlp=5,
    shared_gate=True,
)
GEMMA = DecoderConfig(**LLAMA, plus_one=True, embed_scale=8**0.5, activation="gelu_tanh", tied=True)
MODERN = ModernBERTConfig(
    **SIZES, layers=3, pattern=(Sight(theta=100.0), Sight(window=3), Sight(window=3))
)
_ENCODER = {name: size for name, size in PAIR.items() if name != "decoder_layers"}
MODELS: dict[str, tuple[type, Any]] = {
    "gpt2": (GPT, GPTConfig(**DEEP)),
    "gpt2 untied": (GPT, GPTConfig(**DEEP, tied=False, eps=1e-6, activation="gelu")),
    "gpt2 no head": (GPT, GPTConfig(**DEEP, tied=False, head="none")),
    "gpt2 tokens": (GPT, GPTConfig(**DEEP, tied=False, head=Labels(3, "token"))),
    "bert": (BERT, BERTConfig(**DEEP)),
    "bert untied": (BERT, BERTConfig(**DEEP, tied=False, token_types=3)),
    "bert masked words": (BERT, BERTConfig(**DEEP, nsp_head=False, pooler=False)),
    "bert next sentence": (BERT, BERTConfig(**DEEP, mlm_head=False)),
    "bert no head": (BERT, BERTConfig(**DEEP, mlm_head=False, nsp_head=False)),
    "bert no pooler": (BERT, BERTConfig(**DEEP, mlm_head=False, nsp_head=False, pooler=False)),
    "bert classifier": (BERT, BERTConfig(**DEEP, mlm_head=False, nsp_head=False, labels=3)),
    "bert tokens": (
        BERT,
        BERTConfig(
            **DEEP, mlm_head=False, nsp_head=False, pooler=False, labels=3, labelled="token"
        ),
    ),
    "roberta tokens": (
        BERT,
        BERTConfig(
            **DEEP,
            mlm_head=False,
            nsp_head=False,
            pooler=False,
            labels=2,
            labelled="token",
            padding=0,
        ),
    ),
    "roberta": (BERT, BERTConfig(**DEEP, nsp_head=False, pooler=False, padding=0)),
    "roberta classifier": (
        BERT,
        BERTConfig(**DEEP, mlm_head=False, nsp_head=False, labels=2, padding=0),
    ),
    "modernbert": (ModernBERT, MODERN),
    "modernbert classifier": (
        ModernBERT,
        dataclasses.replace(MODERN, mlm_head=False, labels=3, pooling="mean", bias=True),
    ),
    "modernbert tokens": (
        ModernBERT,
        dataclasses.replace(MODERN, mlm_head=False, labels=3, labelled="token"),
    ),
    "llama": (Llama, _llama()),
    "llama no head": (Llama, _llama(head="none")),
    "llama classifier": (Llama, _llama(head=Labels(3, padding=2))),
    "llama tied": (Llama, _llama(tied=True, bias=True, theta=500.0)),
    "llama scaled": (Llama, _llama(head_dim=6, scaling=LLAMA3)),
    "llama linear": (Llama, _llama(kv_heads=4, scaling=RotaryScaling(2.0))),
    "mistral": (Decoder, DecoderConfig(**LLAMA, pattern=(Sight(window=3),))),
    "gemma": (Decoder, GEMMA),
    "gemma3": (Decoder, GEMMA3),
    "olmo2": (
        Decoder,
        DecoderConfig(**LLAMA, placement="after", qk_norm="width", bias=True, o_bias=True),
    ),
    "gpt_neox": (Decoder, NEOX),
    "mixtral": (Decoder, MIXTRAL),
    "qwen3_moe": (Decoder, QWEN3_MOE),
    "qwen2_moe": (Decoder, QWEN2_MOE),
    "t5": (T5, T5Config(**PAIR)),
    "t5 v1.1": (T5, T5Config.v1_1(**PAIR, buckets=8, max_distance=9)),
    "ul2": (T5, T5Config.ul2(**PAIR)),
    "t5 encoder": (T5Encoder, T5EncoderConfig(**_ENCODER, glu=True)),
}


def build(name: str, dtype: Any = jnp.float32, **changes: Any) -> Any:
    """A model of the table with every parameter random, biases and gains too."""
    cls, config = MODELS[name]
    config = dataclasses.replace(config, **changes)
    with mock.patch("jax.random.normal", lambda key, shape: jnp.zeros(shape)):
        made = eqx.filter_jit(lambda key: cls(config, key=key))(jax.random.key(0))
    model = randomise(made)
    slots = [slot for slot in axes_of(model).of_kind("param") if slot.value is not None]
    return put(model, {slot.steps: slot.value.astype(dtype) for slot in slots})


def outputs(model: Any, inputs: Any) -> Any:
    return eqx.filter_jit(call)(model, inputs)


def batch(model: Any) -> Any:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)))
    return (tokens, tokens[:, :4]) if isinstance(model, T5) else tokens


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def rewritten(folder: Path, change: Any = None, **config: Any) -> Path:
    """The folder with its tensors changed by a function and some keys of its config set."""
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        tensors = change(tensors) or tensors
        save_file(tensors, folder / "model.safetensors")
    config_json = json.loads((folder / "config.json").read_text()) | config
    config_json = {key: value for key, value in config_json.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config_json))
    return folder
