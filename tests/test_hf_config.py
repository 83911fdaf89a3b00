"""What config.json says, in old and new spellings, and what is refused of it."""

import json
from typing import Any

import pytest

import growjax as gj
from growjax.errors import HuggingFaceError
from tests.folders import assert_same, build, rewritten


_DEFAULT = {"rope_type": "default"}
ROPES = {
    "llama": [
        {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": ..., "rope_scaling": ...},
        {"rope_parameters": ..., "rope_theta": ..., "rope_scaling": ...},
        # What is not empty wins, and the same theta may stand in both
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, "rope_scaling": _DEFAULT},
        {"rope_parameters": _DEFAULT | {"rope_theta": 1e4}, "rope_scaling": {}},
    ],
    "llama tied": [{"rope_parameters": ...}, {"rope_theta": ..., "rope_scaling": ...}],
    "llama scaled": [{"rope_parameters": ...}, {"rope_theta": ..., "rope_scaling": ...}],
    "llama linear": [
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": _DEFAULT, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": ..., "rope_scaling": ...},
    ],
}


def test_a_length_that_is_missing_is_that_of_the_positions(saved):
    model, folder = saved("llama scaled")
    block = json.loads((folder / "config.json").read_text())["rope_parameters"]
    del block["original_max_position_embeddings"]
    change = {"rope_parameters": block, "rope_scaling": ..., "max_position_embeddings": 64}
    assert_same(model, gj.hf.load(rewritten(folder, **change)))
    rewritten(folder, max_position_embeddings=...)
    assert gj.hf.config(folder).scaling.length == 2048  # what transformers takes


@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_in_old_and_new_spelling(name, saved):
    model, folder = saved(name)
    text = (folder / "config.json").read_text()
    for change in ROPES[name]:
        (folder / "config.json").write_text(text)
        assert_same(model, gj.hf.load(rewritten(folder, **change)))


@pytest.mark.parametrize("explicit", [True, False, ...])
@pytest.mark.parametrize(
    "name, flag", [("t5", True), ("t5", ...)] + [("ul2", f) for f in (True, False, ...)]
)
def test_the_head_of_t5_is_tied_by_content_and_scaled_by_flags(name, flag, explicit, saved):
    _, folder = saved(name)
    rewritten(folder, tie_word_embeddings=flag, scale_decoder_outputs=explicit)
    model = gj.hf.load(folder)
    assert (model.head is None) == (name == "t5")
    scaled = explicit if explicit is not ... else flag is not False
    assert (model.output_scale is not None) == scaled


def test_what_t5_derives_from_its_projection_wins_where_it_is_in_the_file(saved):
    _, folder = saved("t5 v1.1")  # gated-gelu
    for changes, expected in {
        ("gelu_new", True): ("gelu_tanh", True),
        ("gelu", True): ("gelu", True),
        ("relu", ...): ("relu", True),
        (..., ...): ("gelu_tanh", True),
    }.items():
        config = gj.hf.config(rewritten(folder, dense_act_fn=changes[0], is_gated_act=changes[1]))
        assert (config.activation, config.glu) == expected
    with pytest.raises(HuggingFaceError, match="wi_0.weight: is not a tensor of this model"):
        gj.hf.load(rewritten(folder, is_gated_act=False))


def test_keys_that_nothing_reads_are_refused_unless_they_are_known_to_change_nothing(saved):
    model, folder = saved("gpt2")
    harmless = {"resid_pdrop": 0.5, "task_specific_params": {"text": {}}, "unsloth_fixed": True}
    assert_same(model, gj.hf.load(rewritten(folder, **harmless, new_norm=None, new_list=[])))
    for value in (True, False, 0, "rms"):
        with pytest.raises(HuggingFaceError, match="new_norm: an unknown key"):
            gj.hf.load(rewritten(folder, new_norm=value))
    assert_same(model, gj.hf.load(folder, ignore=["new_*"]))


def test_spellings_of_one_key_must_agree_and_only_one_is_written(saved, tmp_path):
    model, folder = saved("gpt2")
    assert_same(
        model, gj.hf.load(rewritten(folder, hidden_size=8, n_layer=..., num_hidden_layers=2))
    )
    wide = gj.grow(gj.copy(embed=16, heads=4), model)
    gj.hf.save(wide, tmp_path / "wide", source=folder)
    assert "hidden_size" not in json.loads((tmp_path / "wide" / "config.json").read_text())
    assert_same(wide, gj.hf.load(tmp_path / "wide"))
    with pytest.raises(HuggingFaceError, match="n_embd=8, hidden_size=16 are spellings of one key"):
        gj.hf.load(rewritten(folder, hidden_size=16))


CONFIGS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gpt2": [
        ({"n_layer": 3}, "h.2.attn.c_attn.weight: not in the file"),
        ({"n_layer": 1}, "h.1.attn.c_attn.weight: is not a tensor of this model"),
        ({"n_layer": 10**9}, "n_layer: 1000000000 layers, in 28 tensors"),
        ({"n_embd": -1, "n_head": "two"}, "n_head: expected a positive integer, got 'two'"),
        ({"n_head": 3}, "8 cannot be divided by 3 heads"),
        ({"n_embd": 2**40}, "n_embd: expected a positive integer"),
        ({"activation_function": "mish"}, "activation_function: expected one of gelu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "only False can be read, got True"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: expected a positive number"),
        ({"quantization_config": {"bits": 4}}, "quantised (?), and such cannot grow; take"),
        ({"model_type": "mamba"}, "model_type: expected one of bert, roberta, xlm-roberta, modern"),
        ({"model_type": "mamba"}, "got 'mamba': it has layers without attention"),
        ({"model_type": ["gpt2"]}, "model_type: expected one of bert"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"tie_word_embeddings": False}, "lm_head.weight: not in the file"),
    ],
    "bert": [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: only 'absolute'"),
        ({"is_decoder": True}, "is_decoder: only False"),
    ],
    "llama": [
        ({"mlp_bias": True}, "mlp_bias: only False"),
        ({"is_causal": False}, "is_causal: only True can be read, got False"),
        ({"is_causal": None}, "is_causal: only True can be read, got None"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config: only None"),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_theta": 10.0},
            "rope_theta: 10 for rope_scaling, and 10000.0 in rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor: only 1.0"),
        ({"rope_parameters": {"mscale": 2.0, "beta": 1}}, "rope_parameters.beta: an unknown key"),
        ({"num_key_value_heads": 3}, "4 cannot be divided by 3"),
        ({"head_dim": 3}, "head_dim: expected an even number"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type: expected one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor: expected a positive number"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor: expected"),
        ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: only 1.0",
        ),
    ],
    "t5": [
        (
            {"scale_decoder_outputs": None},
            "scale_decoder_outputs: expected true or false, got None",
        ),
        ({"is_encoder_decoder": False}, "is_encoder_decoder: only True"),
        ({"dense_act_fn": "mish"}, "dense_act_fn: expected one of gelu"),
        ({"feed_forward_proj": "half-gelu"}, "feed_forward_proj: expected an activation"),
        ({"relative_attention_num_buckets": 6}, "expected a multiple of 4"),
        ({"num_decoder_layers": None}, "decoder.block.2.layer.0.SelfAttention.k.weight: is not a"),
    ],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_says_why(name, saved):
    _, folder = saved(name)
    text = (folder / "config.json").read_text()
    for change, message in CONFIGS[name]:
        (folder / "config.json").write_text(text)
        with pytest.raises(HuggingFaceError) as caught:
            gj.hf.load(rewritten(folder, **change))
        assert message in str(caught.value)


def test_the_head_of_mt5_is_never_scaled_and_its_feed_forward_is_gated_by_default(saved):
    _, folder = saved("t5")
    rewritten(folder, model_type="mt5", scale_decoder_outputs=...)
    config = gj.hf.config(folder)
    assert config.tied and not config.scale_output and config.activation == "relu"
    rewritten(folder, feed_forward_proj=..., dense_act_fn=..., is_gated_act=...)
    config = gj.hf.config(folder)
    assert config.glu and config.activation == "gelu_tanh"


def test_the_gelu_of_gemma_is_the_tanh_form_by_all_its_names(saved, tmp_path):
    _, folder = saved("gemma")
    for keys in (
        {"hidden_act": "gelu", "hidden_activation": None},
        {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": ..., "hidden_activation": ...},
    ):
        assert gj.hf.config(rewritten(folder, **keys)).activation == "gelu_tanh"
    with pytest.raises(HuggingFaceError, match="hidden_activation: expected that of hidden_act"):
        gj.hf.config(rewritten(folder, hidden_act="gelu", hidden_activation="relu"))
    with pytest.raises(HuggingFaceError, match="in this family a GELU is the tanh form"):
        gj.hf.save(build("gemma", activation="gelu"), tmp_path / "exact", source=folder)


def test_an_activation_keeps_the_name_that_it_has_in_the_files(saved, tmp_path):
    """Other readers know fewer names than transformers: vLLM one of Gemma's."""

    folders = {name: saved(name) for name in ("gemma", "gemma3", "gpt2", "llama")}

    def written(name: str, **keys) -> dict[str, Any]:
        model, folder = folders[name]
        out = tmp_path / f"again {len(list(tmp_path.iterdir()))}"
        gj.hf.save(model, out, source=rewritten(folder, **keys))
        return json.loads((out / "config.json").read_text())

    assert written("gemma3")["hidden_activation"] == "gelu_pytorch_tanh"
    for value in ("gelu_pytorch_tanh", "gelu_new"):
        assert written("gemma3", hidden_activation=value)["hidden_activation"] == value
        assert written("gpt2", activation_function=value)["activation_function"] == value
    assert written("llama", hidden_act="swish")["hidden_act"] == "swish"
    # What Gemma 1 calls gelu is the tanh form, and gets the name of that
    old = written("gemma", hidden_act="gelu", hidden_activation=None)
    assert old["hidden_act"] == "gelu_pytorch_tanh"


def test_positions_of_roberta_need_the_id_of_padding(saved):
    _, folder = saved("roberta")
    for value, message in ((None, "pad_token_id: positions are counted"), (6, "are no real token")):
        with pytest.raises(HuggingFaceError, match=message):
            gj.hf.config(rewritten(folder, pad_token_id=value))


def test_experts_are_as_many_as_there_are_tensors_for_and_windows_of_all_layers_or_none(saved):
    _, folder = saved("qwen3_moe")
    with pytest.raises(HuggingFaceError, match="num_experts: 1000 experts, in"):
        gj.hf.config(rewritten(folder, num_experts=1000, num_local_experts=1000))
    with pytest.raises(HuggingFaceError, match="4 cannot be chosen from 3 experts"):
        gj.hf.config(rewritten(folder, num_experts=3, num_local_experts=..., num_experts_per_tok=4))
    rewritten(folder, num_experts_per_tok=2, max_window_layers=48, sliding_window=4)
    assert gj.hf.config(folder).pattern[0].window is None
    with pytest.raises(HuggingFaceError, match="max_window_layers: old readers leave"):
        gj.hf.config(rewritten(folder, use_sliding_window=True))
