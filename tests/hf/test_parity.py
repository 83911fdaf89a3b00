"""Every family and variant against transformers: the same numbers in, out, and in again."""

# pyright: reportMissingImports=false
import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as hf

import growjax as gj
from tests.hf.oracle import MASK, OTHERS, TOKENS, TYPES, outputs, random_model, reloaded


def bert(**changes: Any) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56)
    return hf.BertConfig(vocab_size=61, max_position_embeddings=40, **sizes | changes)


def gpt2(**changes: Any) -> Any:
    sizes = dict(n_embd=32, n_layer=3, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=0)
    return hf.GPT2Config(vocab_size=61, **sizes | changes)


def llama(**changes: Any) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    return hf.LlamaConfig(vocab_size=61, intermediate_size=56, **sizes | changes)


def t5(**changes: Any) -> Any:
    sizes = dict(d_model=32, d_kv=12, d_ff=56, num_layers=2, num_decoder_layers=3, num_heads=4)
    return hf.T5Config(vocab_size=61, decoder_start_token_id=0, **sizes | changes)


V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CASES: dict[str, tuple[Any, str]] = {
    "bert": (bert(), "BertForMaskedLM"),
    "bert both heads": (bert(layer_norm_eps=1e-5), "BertForPreTraining"),
    "bert no head": (bert(hidden_act="gelu_new"), "BertModel"),
    "bert next sentence": (bert(type_vocab_size=3), "BertForNextSentencePrediction"),
    "bert untied": (bert(tie_word_embeddings=False, hidden_act="relu"), "BertForMaskedLM"),
    "gpt2": (gpt2(), "GPT2LMHeadModel"),
    "gpt2 n_inner": (gpt2(n_inner=56, activation_function="gelu"), "GPT2LMHeadModel"),
    "gpt2 untied": (gpt2(tie_word_embeddings=False, layer_norm_epsilon=1e-6), "GPT2LMHeadModel"),
    "llama": (llama(), "LlamaForCausalLM"),
    "llama tied": (llama(tie_word_embeddings=True, rms_norm_eps=1e-5), "LlamaForCausalLM"),
    "llama bias": (llama(attention_bias=True, num_key_value_heads=4), "LlamaForCausalLM"),
    "llama one key": (llama(num_key_value_heads=1, hidden_act="gelu"), "LlamaForCausalLM"),
    "llama head_dim": (llama(head_dim=12), "LlamaForCausalLM"),
    "llama theta": (
        llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
        "LlamaForCausalLM",
    ),
    "llama linear": (
        llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        "LlamaForCausalLM",
    ),
    "llama3": (llama(rope_parameters=LLAMA3), "LlamaForCausalLM"),
    "t5": (t5(), "T5ForConditionalGeneration"),
    "t5 buckets": (
        t5(relative_attention_num_buckets=8, relative_attention_max_distance=12, d_kv=8),
        "T5ForConditionalGeneration",
    ),
    "t5 gelu": (t5(feed_forward_proj="gelu"), "T5ForConditionalGeneration"),
    "t5 v1.1": (t5(**V1_1), "T5ForConditionalGeneration"),
    "ul2": (t5(**V1_1 | {"feed_forward_proj": "gated-silu"}), "T5ForConditionalGeneration"),
    "t5 tied, unscaled": (t5(scale_decoder_outputs=False), "T5ForConditionalGeneration"),
}
# A tied head without a scale is written with one, and the norm before it takes up the difference
FOLDED = "t5 tied, unscaled"
# The bias that counts is that of the decoder
UNUSED = {("bert untied", "cls.predictions.bias")}
# Of the largest output, which is a few units; a wrong epsilon or activation is off by 1e-4 and more
LIMIT = {"bert": 5e-6, "gpt2": 5e-6, "llama": 5e-6, "t5": 2e-5, "ul2": 2e-4}


def ours(model: Any) -> dict[str, np.ndarray]:
    """What a model of growjax computes on the tokens of the oracle, where they are not padding."""
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    if isinstance(model, gj.models.BERT):
        run = jax.vmap(lambda t, m, y: model(t, mask=m, token_types=y))
        found = run(tokens, mask, jnp.asarray(TYPES))
        names = {"mlm_logits": "logits", "nsp_logits": "nsp_logits"}
        names |= (
            {} if model.mlm or model.nsp is not None else {"hidden": "hidden", "pooled": "pooled"}
        )
        got = {name: getattr(found, field) for field, name in names.items()}
    elif isinstance(model, gj.models.T5):
        run = jax.vmap(lambda t, m, d: model(t, d, encoder_mask=m))
        got = {"logits": run(tokens, mask, jnp.asarray(OTHERS))}
    else:
        got = {"logits": jax.vmap(lambda t, m: model(t, mask=m))(tokens, mask)}
    real = lambda x: x[MASK] if x.shape[:2] == MASK.shape else x  # noqa: E731
    return {name: real(np.asarray(x)) for name, x in got.items() if x is not None}


def gap(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


def limit(name: str) -> float:
    return LIMIT["ul2" if name == "t5 v1.1" else name.split()[0].rstrip("3")]


@pytest.mark.parametrize("name", CASES)
def test_parity_in_and_out(name: str, tmp_path: Path):
    theirs = random_model(*CASES[name], own_head=name != FOLDED)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs)
    model = gj.hf.load(tmp_path / "theirs")
    # In float64, or their own rounding, which differs from CPU to CPU, would count as ours
    exact, found = outputs(copy.deepcopy(theirs).double()), ours(model)
    print(name, gap(found, exact), max(np.abs(x).max() for x in exact.values()))
    assert gap(found, exact) <= limit(name)
    gj.hf.save(model, tmp_path / "ours", source=tmp_path / "theirs")
    again = reloaded(tmp_path / "ours")
    assert type(again) is type(theirs)
    for key, value in theirs.state_dict().items():
        if name != FOLDED and (name, key) not in UNUSED:
            assert np.array_equal(again.state_dict()[key], value), key
    assert gap(outputs(again), expected) <= 1e-6
    gj.hf.save(model, tmp_path / "alone")
    assert gap(outputs(reloaded(tmp_path / "alone")), expected) <= 1e-6
