"""Every family and variant against transformers: the same numbers in, out, and in again."""

# pyright: reportMissingImports=false
import copy
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

import growjax as gj
from growjax.errors import HuggingFaceError
from growjax.hf.convert import FAMILIES
from tests.hf.oracle import LEFT, MASK, OTHERS, TOKENS, TYPES, outputs, random_model, reloaded


def bert(**changes: Any) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56)
    return hf.BertConfig(vocab_size=61, max_position_embeddings=40, **sizes | changes)


def roberta(cls: Any = hf.RobertaConfig, **changes: Any) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56)
    return cls(vocab_size=61, max_position_embeddings=40, **sizes | changes)


def modernbert(**changes: Any) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=56)
    sizes |= dict(pad_token_id=0, bos_token_id=0, eos_token_id=0, local_attention=10)
    return hf.ModernBertConfig(vocab_size=61, **sizes | changes)


def gpt2(**changes: Any) -> Any:
    sizes = dict(n_embd=32, n_layer=3, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=0)
    return hf.GPT2Config(vocab_size=61, **sizes | changes)


def llama(**changes: Any) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    return hf.LlamaConfig(vocab_size=61, intermediate_size=56, **sizes | changes)


def t5(cls: Any = hf.T5Config, **changes: Any) -> Any:
    sizes = dict(d_model=32, d_kv=12, d_ff=56, num_layers=2, num_decoder_layers=3, num_heads=4)
    return cls(vocab_size=61, decoder_start_token_id=0, **sizes | changes)


def decoder(kind: str, last: Any = "ForCausalLM", **changes: Any) -> tuple[Any, str]:
    """A small model of a family of decoders, with its class, which ends in `last`."""
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=61)
    sizes |= dict(intermediate_size=56, max_position_embeddings=64)
    if kind != "GPTNeoX":
        sizes |= dict(num_key_value_heads=2)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    stem = kind.removesuffix("Text") if last == "ForCausalLM" else kind
    name = f"{stem}{last}"
    return getattr(hf, f"{kind}Config")(**sizes | ids | changes), name


LONG = dict(short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 4.0])
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
    "qwen2": decoder("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": decoder("Qwen3", head_dim=12, tie_word_embeddings=True),
    "qwen3 yarn": decoder(
        "Qwen3",
        head_dim=16,
        rope_parameters={
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": decoder("Mistral", sliding_window=7, head_dim=12),
    "mistral all": decoder("Mistral", sliding_window=None),
    "olmo2": decoder("Olmo2", attention_bias=True),
    "gemma": decoder("Gemma", head_dim=12),
    "gemma2": decoder("Gemma2", head_dim=12, sliding_window=8, query_pre_attn_scalar=20),
    "gemma2 caps": decoder(
        "Gemma2", head_dim=8, attn_logit_softcapping=0.5, final_logit_softcapping=1.5
    ),
    "gemma3": decoder(
        "Gemma3Text", head_dim=12, sliding_window=8, sliding_window_pattern=3, attention_bias=True
    ),
    "phi3": decoder("Phi3", sliding_window=9),
    "phi3 long": decoder(
        "Phi3",
        original_max_position_embeddings=16,
        rope_parameters=LONG | {"rope_type": "longrope", "partial_rotary_factor": 0.75},
    ),
    "smollm3": decoder("SmolLM3", attention_bias=True, no_rope_layer_interval=3),
    "smollm3 window": decoder(
        "SmolLM3", use_sliding_window=True, sliding_window=5, tie_word_embeddings=False
    ),
    "mixtral": decoder("Mixtral", num_local_experts=3, sliding_window=7, head_dim=12),
    "mixtral all": decoder("Mixtral", num_local_experts=4, num_experts_per_tok=4),
    "olmoe": decoder("Olmoe", num_experts=5, num_experts_per_tok=2, attention_bias=True),
    "qwen3_moe": decoder(
        "Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=12
    ),
    "qwen3_moe window": decoder(
        "Qwen3Moe",
        **dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24),
        **dict(norm_topk_prob=True, use_sliding_window=True, sliding_window=5, head_dim=12),
    ),
    "qwen2_moe": decoder(
        "Qwen2Moe",
        **dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        **dict(shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=5),
    ),
    "gpt_neox": decoder("GPTNeoX"),
    "gpt_neox serial": decoder(
        "GPTNeoX", use_parallel_residual=False, rotary_pct=0.5, attention_bias=False
    ),
    "bert": (bert(), "BertForMaskedLM"),
    "bert both heads": (bert(layer_norm_eps=1e-5), "BertForPreTraining"),
    "bert no head": (bert(hidden_act="gelu_new"), "BertModel"),
    "bert classifier": (bert(num_labels=3), "BertForSequenceClassification"),
    "roberta": (roberta(), "RobertaForMaskedLM"),
    "roberta untied": (roberta(tie_word_embeddings=False), "RobertaForMaskedLM"),
    "roberta classifier": (roberta(pad_token_id=3), "RobertaForSequenceClassification"),
    "xlm-roberta": (roberta(hf.XLMRobertaConfig), "XLMRobertaModel"),
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
    "llama no head": (llama(tie_word_embeddings=True), "LlamaModel"),
    "llama classifier": (llama(num_labels=3, pad_token_id=7), "LlamaForSequenceClassification"),
    "gpt2 no head": (gpt2(), "GPT2Model"),
    "gpt2 classifier": (gpt2(num_labels=3, pad_token_id=5), "GPT2ForSequenceClassification"),
    "gpt2 tokens": (gpt2(num_labels=3), "GPT2ForTokenClassification"),
    "qwen3 no head": decoder("Qwen3", "Model", head_dim=12),
    "qwen3 tokens": decoder("Qwen3", "ForTokenClassification", head_dim=12, num_labels=4),
    "gemma3 no head": decoder("Gemma3Text", "Model", head_dim=12, sliding_window=8),
    "gemma3 classifier": decoder("Gemma3Text", "ForSequenceClassification", head_dim=12),
    "gpt_neox no head": decoder("GPTNeoX", "Model"),
    "gpt_neox tokens": decoder("GPTNeoX", "ForTokenClassification", num_labels=3),
    "qwen3_moe no head": decoder(
        "Qwen3Moe", "Model", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "bert tokens": (bert(num_labels=3), "BertForTokenClassification"),
    "roberta tokens": (roberta(num_labels=3), "RobertaForTokenClassification"),
    "modernbert tokens": (modernbert(num_labels=3), "ModernBertForTokenClassification"),
    "modernbert": (modernbert(num_labels=2), "ModernBertForMaskedLM"),
    "modernbert biases": (
        modernbert(
            **dict(norm_bias=True, attention_bias=True, classifier_bias=True, decoder_bias=False),
            **dict(tie_word_embeddings=False, classifier_activation="relu", local_attention=4),
        ),
        "ModernBertForMaskedLM",
    ),
    "modernbert classifier": (
        modernbert(num_labels=3, classifier_pooling="mean", classifier_bias=True),
        "ModernBertForSequenceClassification",
    ),
    "modernbert no head": (modernbert(local_attention=6), "ModernBertModel"),
    "t5": (t5(), "T5ForConditionalGeneration"),
    "t5 buckets": (
        t5(relative_attention_num_buckets=8, relative_attention_max_distance=12, d_kv=8),
        "T5ForConditionalGeneration",
    ),
    "t5 gelu": (t5(feed_forward_proj="gelu"), "T5ForConditionalGeneration"),
    "t5 v1.1": (t5(**V1_1), "T5ForConditionalGeneration"),
    "ul2": (t5(**V1_1 | {"feed_forward_proj": "gated-silu"}), "T5ForConditionalGeneration"),
    "t5 encoder": (t5(feed_forward_proj="gated-silu", is_encoder_decoder=False), "T5EncoderModel"),
    "mt5": (t5(hf.MT5Config), "MT5ForConditionalGeneration"),
    "mt5 encoder": (t5(hf.MT5Config, tie_word_embeddings=False), "MT5EncoderModel"),
    "t5 tied, unscaled": (t5(scale_decoder_outputs=False), "T5ForConditionalGeneration"),
}
# A tied head without a scale is written with one, and the norm before it takes up the difference
FOLDED = "t5 tied, unscaled"
# The bias that counts is that of the decoder
UNUSED = {("bert untied", "cls.predictions.bias"), ("roberta untied", "lm_head.bias")}
# Of the largest output, which is a few units; a wrong epsilon or activation is off by 1e-4 and more
LIMIT = {"t5": 2e-5, "mt5": 2e-5, "ul2": 2e-4}


def ours(model: Any, real: np.ndarray = MASK) -> dict[str, np.ndarray]:
    """What a model of growjax computes on the tokens of the oracle, where they are not padding."""
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(real)
    if isinstance(model, gj.models.BERT):
        run = jax.vmap(lambda t, m, y: model(t, mask=m, token_types=y))
        outputs_of_ours = run(tokens, mask, jnp.asarray(TYPES))
        names = {name: name for name in ("nsp_logits", "label_logits")} | {"mlm_logits": "logits"}
        headless = not model.mlm and model.nsp is None and model.classifier is None
        names |= {"hidden": "hidden", "pooled": "pooled"} if headless else {}
        got = {name: getattr(outputs_of_ours, field) for field, name in names.items()}
    elif isinstance(model, gj.models.ModernBERT):
        outputs_of_ours = jax.vmap(lambda t, m: model(t, mask=m))(tokens, mask)
        names = {"mlm_logits": "logits", "label_logits": "label_logits"}
        names |= {} if model.transform else {"hidden": "hidden"}
        got = {name: getattr(outputs_of_ours, field) for field, name in names.items()}
    elif isinstance(model, gj.models.T5Encoder):
        got = {"hidden": jax.vmap(lambda t, m: model(t, mask=m))(tokens, mask)}
    elif isinstance(model, gj.models.T5):
        run = jax.vmap(lambda t, m, d: model(t, d, encoder_mask=m))
        got = {"logits": run(tokens, mask, jnp.asarray(OTHERS))}
    else:
        got = {}
        scores = "hidden" if model.classifier is None else "label_logits"
        got["logits" if model.lm else scores] = jax.vmap(lambda t, m: model(t, mask=m))(
            tokens, mask
        )
    shown = lambda x: x[real] if x.shape[:2] == real.shape else x  # noqa: E731
    return {name: shown(np.asarray(x)) for name, x in got.items() if x is not None}


def gap(given: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert given.keys() == expected.keys()
    return max(float(np.abs(given[name] - expected[name]).max()) for name in given)


def limit(name: str) -> float:
    return LIMIT.get("ul2" if name == "t5 v1.1" else name.split()[0], 5e-6)


@pytest.mark.parametrize("name", CASES)
def test_parity_in_and_out(name: str, tmp_path: Path):
    theirs = random_model(*CASES[name], own_head=name != FOLDED)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs)
    model = gj.hf.load(tmp_path / "theirs")
    # In float64, or their own rounding, which differs from CPU to CPU, would count as ours
    exact, result = outputs(copy.deepcopy(theirs).double()), ours(model)
    print(name, gap(result, exact), max(np.abs(x).max() for x in exact.values()))
    scale = max(1.0, *(np.abs(x).max() for x in expected.values()))
    assert gap(result, exact) <= limit(name) * scale
    # In float64 a row of transformers that sees nothing, as before the first token, is not a number
    assert gap(ours(model, LEFT), outputs(theirs, LEFT)) <= 2 * limit(name) * scale
    gj.hf.save(model, tmp_path / "ours", source=tmp_path / "theirs")
    again = reloaded(tmp_path / "ours")
    assert type(again) is type(theirs)
    for key, value in theirs.state_dict().items():
        if name != FOLDED and (name, key) not in UNUSED:
            assert np.array_equal(again.state_dict()[key], value), key
    assert gap(outputs(again), expected) <= 1e-6 * scale
    gj.hf.save(model, tmp_path / "alone")
    assert gap(outputs(reloaded(tmp_path / "alone")), expected) <= 1e-6 * scale


# One member of every family, with names of cases that are not the family's
MEMBERS = {"gemma3_text": "gemma3"}


def by_row(growth: str, model: Any) -> Any:
    """Growth along every axis that a row of `growjax families` lists; copies have random shares."""
    axes = set(re.findall(r"\w+", growth)) - {"together", "with"}
    now = gj.sizes(model)
    now |= {"heads": now["kv_heads"] * now["group"]}
    stacks = {axis for axis in axes if axis.endswith("layers")}
    wide: dict[str, Any] = {axis: 2 * now[axis] for axis in axes - stacks - {"experts", "mlp"}}
    # Only a stream that is no norm's output passes new layers by
    exact: dict[str, Any] = {"order": "insert", "branch": "zero"}
    options = {} if isinstance(model, gj.models.BERT) else exact
    grown: list[Any] = [gj.copy(**wide, mlp=now["mlp"] + 16, shares="random", seed=1)]
    grown += [gj.stack(**{axis: 2 * now[axis]}, **options) for axis in sorted(stacks)]
    if "experts" in axes:
        grown.append(gj.experts(2 * now["experts"], gated=False, per_token="scaled"))
    return gj.chain(*grown)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_row_of_the_families_is_true(family: Any, tmp_path: Path):
    """All that it lists is grown at once, read by transformers, and learns there."""
    name: str = family.model_type
    theirs = random_model(*CASES[MEMBERS.get(name, name)])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs)
    small = gj.hf.load(tmp_path / "theirs")
    grown = gj.grow(by_row(family.growth, small), small, key=jax.random.key(0))
    gj.hf.save(grown, tmp_path / "big", source=tmp_path / "theirs")
    big = reloaded(tmp_path / "big")
    assert type(big) is type(theirs)
    sizes = gj.sizes(gj.hf.load(tmp_path / "big"))
    assert all(sizes[axis] == size for axis, size in gj.sizes(grown).items())
    scale = max(1.0, *(np.abs(x).max() for x in expected.values()))
    wanted = ours(grown) if isinstance(small, gj.models.BERT) else expected
    # The hidden states of a model without a head are wider now
    got = {name: x[tuple(map(slice, wanted[name].shape))] for name, x in outputs(big).items()}
    assert gap(got, wanted) <= limit(family.model_type) * 2 * scale
    if "together" in family.growth:
        with pytest.raises(HuggingFaceError, match="grow heads along with embed"):
            gj.hf.save(gj.grow(gj.copy(embed=2 * gj.sizes(small)["embed"]), small), tmp_path / "no")
    if not isinstance(small, gj.models.Decoder | gj.models.GPT):
        return
    # The first step opens the new layers, whose branches end in zeros
    tokens = torch.from_numpy(TOKENS)
    before = {name: p.detach().clone() for name, p in big.named_parameters()}
    optimizer = torch.optim.AdamW(big.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(3):
        big(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, p in big.named_parameters() if torch.equal(p, before[name])]
    assert not still
    # Of a new layer (every second one) that ends in zeros, copies have equal gradients. Copies of an
    # expert are chosen together, unless noise on the router tells them apart
    twins = [
        name
        for name, p in big.named_parameters()
        if p.ndim == 2 and not re.search(r"[1357]\.|mlp\.gate\.", name)
        if len(torch.unique(p.detach(), dim=0)) < len(p)
    ]
    assert not twins


def test_an_upcycled_model_is_a_mixture_that_writes_the_same_text(tmp_path: Path):
    theirs = random_model(*CASES["llama"])
    theirs.save_pretrained(tmp_path / "theirs")
    small = gj.hf.load(tmp_path / "theirs")
    mixture = gj.grow(gj.upcycle(experts=4), small, key=jax.random.key(0))
    gj.hf.save(mixture, tmp_path / "big", source=tmp_path / "theirs")
    big = reloaded(tmp_path / "big")
    assert type(big) is hf.MixtralForCausalLM
    assert gap(outputs(big), outputs(theirs)) <= 1e-5
    begun = torch.from_numpy(TOKENS[:, :4])
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(big.generate(begun, **options), theirs.generate(begun, **options))
