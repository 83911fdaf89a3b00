"""The keys of published checkpoints, and those that are written: both are read as they are meant."""

import dataclasses
import json
from typing import Any

import pytest

import growjax as gj
from growjax.errors import HuggingFaceError
from growjax.hf import convert
from growjax.hf.convert import FAMILIES
from growjax.hf.families import LLAMA as LLAMA_FAMILY
from growjax.hf.family import ConfigFile, read_config
from growjax.hf.stock import _alike
from growjax.models import DecoderConfig, Labels, Sight
from growjax.nn import LongRotary
from tests.folders import LLAMA, assert_same, build, rewritten


# What a config.json of the Hub says, with the keys that nothing reads; sizes are those published
COMMON: dict[str, Any] = dict(
    attention_dropout=0.0, initializer_range=0.02, use_cache=True, torch_dtype="bfloat16"
)
GELU = "gelu_pytorch_tanh"
QWEN = dict(num_hidden_layers=24, hidden_size=896, num_attention_heads=14, num_key_value_heads=2)
QWEN |= dict(intermediate_size=4864, vocab_size=151936, rms_norm_eps=1e-6, hidden_act="silu")
GEMMA = dict(num_hidden_layers=26, hidden_size=2304, num_attention_heads=8, num_key_value_heads=4)
GEMMA |= dict(intermediate_size=9216, vocab_size=256000, head_dim=256, attention_bias=False)
PHI = dict(num_hidden_layers=32, hidden_size=3072, num_attention_heads=32, num_key_value_heads=32)
PHI |= dict(intermediate_size=8192, vocab_size=32064, rms_norm_eps=1e-5, hidden_act="silu")
PHI |= dict(original_max_position_embeddings=4096, embd_pdrop=0.0, resid_pdrop=0.0)
SMOL = dict(num_hidden_layers=36, hidden_size=2048, num_attention_heads=16, num_key_value_heads=4)
SMOL |= dict(intermediate_size=11008, vocab_size=128256, hidden_act="silu", mlp_bias=False)
NEOX = dict(num_hidden_layers=44, hidden_size=6144, num_attention_heads=64, vocab_size=50432)
LONG: dict[str, Any] = {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [1.5] * 48}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen 2.5": (
        "qwen2",
        QWEN
        | dict(use_mrope=False, use_sliding_window=False, sliding_window=32768)
        | dict(max_window_layers=24, tie_word_embeddings=True, rope_theta=1e6),
    ),
    "Gemma 2": (
        "gemma2",
        GEMMA
        | dict(hidden_act=GELU, hidden_activation=GELU, cache_implementation="hybrid")
        | dict(sliding_window=4096, sliding_window_size=4096, query_pre_attn_scalar=256)
        | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rope_theta=1e4),
    ),
    "Phi-3 mini 4k": (
        "phi3",
        PHI
        | dict(sliding_window=2047, max_position_embeddings=4096, rope_scaling=None)
        | dict(attention_bias=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}),
    ),
    "Phi-4 mini": (
        "phi3",
        PHI
        | dict(num_attention_heads=24, num_key_value_heads=8, partial_rotary_factor=0.75)
        | dict(attention_bias=False, mlp_bias=False, lm_head_bias=False, rope_scaling=LONG)
        | dict(full_attn_mod=1, interpolate_factor=1, max_position_embeddings=131072),
    ),
    "SmolLM 3": (
        "smollm3",
        SMOL
        | dict(layer_types=["full_attention"] * 36, no_rope_layers=[1, 1, 1, 0] * 9)
        | dict(use_sliding_window=False, sliding_window=None, max_window_layers=28),
    ),
    "GPT-NeoX 20B": (
        "gpt_neox",
        NEOX
        | dict(intermediate_size=24576, hidden_act="gelu_fast", use_parallel_residual=True)
        | dict(rotary_pct=0.25, rotary_emb_base=10000, hidden_dropout_prob=0.0),
    ),
}


def read(model_type: str, keys: dict[str, Any], *names: str) -> Any:
    """The configuration of some keys, beside many tensors of no name that counts, and `names`."""
    family = FAMILIES[model_type]
    file = ConfigFile(keys | {"model_type": model_type}, [*map(str, range(99)), *names])
    config = read_config(family, file, lambda one, other: True)
    file.unread()
    file.check(model_type)
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_read(name):
    model_type, keys = PUBLISHED[name]
    config = read(model_type, COMMON | keys)
    assert config.embed == keys["hidden_size"] and config.layers == keys["num_hidden_layers"]
    if name == "Phi-4 mini":
        assert config.turned == 96 and isinstance(config.pattern[0].scaling, LongRotary)
    if name in ("Gemma 2", "GPT-NeoX 20B"):
        assert config.activation == "gelu_tanh"
    # What they say beside what counts must not contradict it
    for change in (
        {"use_mrope": True},
        {"hidden_act": "relu"} if model_type == "gemma2" else {"attention_bias": 1},
        {"sliding_window_size": 17},
        {"full_attn_mod": 2},
    ):
        if change.keys() & keys.keys():
            with pytest.raises(HuggingFaceError, match=next(iter(change))):
                read(model_type, COMMON | keys | change)


def test_padding_of_a_classifier_is_the_default_of_its_family_or_null():
    for model_type, keys, default in (
        ("gemma2", GEMMA, 0),
        ("phi3", PHI, 32000),
        ("olmo2", QWEN, 1),
        ("qwen2", QWEN, None),
    ):
        for given, expected in (({}, default), ({"pad_token_id": None}, None)):
            head = read(model_type, keys | given, "score.weight").head
            assert head == Labels(2, "sequence", expected)
    assert read("phi3", PHI | {"pad_token_id": 7}, "score.weight").head.padding == 7


def test_a_kind_of_rotary_positions_that_is_refused_has_no_other_fault():
    with pytest.raises(HuggingFaceError) as caught:
        read("llama", QWEN | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "mscale": 3.0}})
    assert "got 'dynamic'" in str(caught.value) and "factor" not in str(caught.value)


# Written ------------------------------------------------------------------------------------------


def test_one_key_that_says_two_fields_needs_them_alike(tmp_path):
    """Biases of queries alone are Qwen 2's: as a Llama's they would be left out by its readers."""
    model = build("mistral", pattern=(Sight(),), bias=True)
    gj.hf.save(model, tmp_path / "own")
    keys = json.loads((tmp_path / "own" / "config.json").read_text())
    assert keys["model_type"] == "qwen2"
    assert_same(model, gj.hf.load(tmp_path / "own"))
    lone = DecoderConfig(**LLAMA, bias=True, qk_norm="head")
    (fault,) = FAMILIES["qwen3"].limits(lone)
    assert fault.startswith("attention_bias: one key says them all, and the model has bias=True")
    with pytest.raises(HuggingFaceError, match="the nearest of"):
        gj.hf.save(build("mistral", pattern=(Sight(),), bias=True, qk_norm="head"), tmp_path / "no")


@pytest.mark.parametrize(
    "lie",
    [{"hidden_act": "relu"}, {"rope_theta": 77.0, "rope_parameters": None}, {"rms_norm_eps": 0.1}],
    ids=["word", "number", "epsilon"],
)
def test_keys_that_say_something_else_are_not_written(lie, tmp_path, monkeypatch):
    liar = dataclasses.replace(LLAMA_FAMILY, write=lambda c: LLAMA_FAMILY.write(c) | lie)
    monkeypatch.setattr(convert, "FAMILIES", {"llama": liar})
    with pytest.raises(HuggingFaceError, match=r"expected .*, and the keys of config.json say"):
        gj.hf.save(build("llama"), tmp_path / "lied")
    assert not [*tmp_path.iterdir()]


def test_a_scale_that_is_written_as_an_integer_is_that_scale_in_any_dtype():
    scale = 0.0625 * (1 + 2e-10)
    written = FAMILIES["gemma2"].write(DecoderConfig(**LLAMA, scale=scale))["query_pre_attn_scalar"]
    assert written == 256 and _alike(scale, written**-0.5, "float64")
    assert not _alike(1e-5, 1.1e-5, "bfloat16") and not _alike(None, 1.0, "float32")


def test_keys_of_the_source_do_not_contradict_what_is_written(saved, tmp_path):
    """Names of labels are those of another head; anything else that would count is a fault."""
    _, folder = saved("llama")
    names = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    rewritten(folder, **names)
    scores = build("llama classifier")
    gj.hf.save(scores, tmp_path / "scores", source=folder)
    assert_same(scores, gj.hf.load(tmp_path / "scores"))
    keys = json.loads((tmp_path / "scores" / "config.json").read_text())
    assert keys["num_labels"] == 3 and not names.keys() & keys.keys()
    rewritten(folder, mlp_bias=True)
    with pytest.raises(HuggingFaceError, match="mlp_bias: only False can be read, got True"):
        gj.hf.save(scores, tmp_path / "biased", source=folder)


def test_a_scale_of_scores_that_is_the_default_is_written_as_a_number(tmp_path):
    model = build("gemma3", scale=None)
    gj.hf.save(model, tmp_path / "default")
    assert_same(model, gj.hf.load(tmp_path / "default"))


def test_a_modernbert_of_one_layer(tmp_path):
    model = build("modernbert", layers=1, pattern=(Sight(theta=100.0),))
    gj.hf.save(model, tmp_path / "one")
    assert_same(model, gj.hf.load(tmp_path / "one"))
