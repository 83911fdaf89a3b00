"""Hugging Face folders: what is written is read back to the bit, under the names of each family."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import growjax as gj
from growjax.errors import HuggingFaceError
from growjax.hf.bert import BERT_
from tests.folders import MODELS, assert_same, build, rewritten


@pytest.fixture
def saved(tmp_path):
    """Writes a model of the table and says where."""

    def write(name: str) -> tuple[Any, Path]:
        model = build(name)
        gj.hf.save(model, tmp_path / name)
        return model, tmp_path / name

    return write


# There and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"post_norm": False}, {"post_norm": False, "embedding_norm": True, "bias": False}],
)
def test_where_a_bert_has_its_norms_is_read_off_it(changes):
    expected = dataclasses.replace(MODELS["bert"][1], **changes)
    assert BERT_.config_of(build("bert", **changes)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back_to_the_bit(name, tmp_path):
    model = build(name)
    gj.hf.save(model, tmp_path / "once")
    again = gj.hf.load(tmp_path / "once")
    assert_same(model, again)
    gj.hf.save(again, tmp_path / "twice")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_parameters_keep_their_type_unless_another_is_asked_for(name, tmp_path):
    model = build(name, jnp.bfloat16)
    gj.hf.save(model, tmp_path / "half")
    said = json.loads((tmp_path / "half" / "config.json").read_text())
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    assert_same(model, gj.hf.load(tmp_path / "half"))
    wide = gj.hf.load(tmp_path / "half", dtype="float32")
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), model))
    with jax.enable_x64(True):
        model = build(name, jnp.float64)
        gj.hf.save(model, tmp_path / "double")
        assert_same(model, gj.hf.load(tmp_path / "double"))
    with pytest.raises(HuggingFaceError, match="is of type F64; enable x64, or pass dtype"):
        gj.hf.load(tmp_path / "double")


def test_a_large_model_is_written_in_shards(tmp_path):
    model = build("llama")
    gj.hf.save(model, tmp_path / "shards", shard=600)
    files = sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    parts = [load_file(tmp_path / "shards" / file) for file in files]
    for file, tensors in zip(files, parts, strict=True):
        assert sum(x.nbytes for x in tensors.values()) <= 600 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
    total = sum(x.nbytes for tensors in parts for x in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert_same(model, gj.hf.load(tmp_path / "shards"))


def test_tokenizer_and_the_rest_of_the_config_travel(saved, tmp_path):
    model, source = saved("bert")
    rewritten(source, hidden_dropout_prob=0.25, hidden_size=8, pad_token_id=3)
    (source / "tokenizer.json").write_text('{"model": 1}')
    (source / "vocab.txt").write_text("[PAD]\n")
    (source / "notes.md").write_text("mine")
    wide = gj.grow(gj.copy(embed=16, heads=4), model)
    gj.hf.save(wide, tmp_path / "wide", source=source)
    said = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert said["hidden_dropout_prob"] == 0.25 and said["pad_token_id"] == 3
    assert said["hidden_size"] == 16 and said["num_attention_heads"] == 4
    names = {p.name for p in (tmp_path / "wide").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    assert (tmp_path / "wide" / "vocab.txt").read_text() == "[PAD]\n"


def test_nothing_is_overwritten_and_nothing_half_written_stays(saved, tmp_path, monkeypatch):
    model, folder = saved("gpt2")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(HuggingFaceError, match="is there already, and nothing is overwritten"):
        gj.hf.save(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        gj.hf.save(model, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    gj.hf.save(model, tmp_path / "empty")
    assert_same(model, gj.hf.load(tmp_path / "empty"))


# What the files are called -----------------------------------------------------------------------

LAYER = {
    "gpt2": {
        **{f"ln_{i}.{part}": [8] for i in (1, 2) for part in ("weight", "bias")},
        "attn.c_attn.weight": [8, 24],
        "attn.c_attn.bias": [24],
        "attn.c_proj.weight": [8, 8],
        "attn.c_proj.bias": [8],
        "mlp.c_fc.weight": [8, 6],
        "mlp.c_fc.bias": [6],
        "mlp.c_proj.weight": [6, 8],
        "mlp.c_proj.bias": [8],
    },
    "llama": {
        "input_layernorm.weight": [8],
        "self_attn.q_proj.weight": [16, 8],
        "self_attn.k_proj.weight": [8, 8],
        "self_attn.v_proj.weight": [8, 8],
        "self_attn.o_proj.weight": [8, 16],
        "post_attention_layernorm.weight": [8],
        "mlp.gate_proj.weight": [6, 8],
        "mlp.up_proj.weight": [6, 8],
        "mlp.down_proj.weight": [8, 6],
    },
    "bert": {
        **{
            f"attention.{name}.{part}": [8, 8] if part == "weight" else [8]
            for name in ("self.query", "self.key", "self.value", "output.dense")
            for part in ("weight", "bias")
        },
        "attention.output.LayerNorm.weight": [8],
        "attention.output.LayerNorm.bias": [8],
        "intermediate.dense.weight": [6, 8],
        "intermediate.dense.bias": [6],
        "output.dense.weight": [8, 6],
        "output.dense.bias": [8],
        "output.LayerNorm.weight": [8],
        "output.LayerNorm.bias": [8],
    },
}
WHOLE = {
    "gpt2": {
        "transformer.wte.weight": [11, 8],
        "transformer.wpe.weight": [7, 8],
        "transformer.ln_f.weight": [8],
        "transformer.ln_f.bias": [8],
    },
    "llama": {
        "model.embed_tokens.weight": [11, 8],
        "model.norm.weight": [8],
        "lm_head.weight": [11, 8],
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": [11, 8],
        "bert.embeddings.position_embeddings.weight": [7, 8],
        "bert.embeddings.token_type_embeddings.weight": [2, 8],
        "bert.embeddings.LayerNorm.weight": [8],
        "bert.embeddings.LayerNorm.bias": [8],
        "bert.pooler.dense.weight": [8, 8],
        "bert.pooler.dense.bias": [8],
        "cls.predictions.bias": [11],
        "cls.predictions.transform.dense.weight": [8, 8],
        "cls.predictions.transform.dense.bias": [8],
        "cls.predictions.transform.LayerNorm.weight": [8],
        "cls.predictions.transform.LayerNorm.bias": [8],
        "cls.seq_relationship.weight": [2, 8],
        "cls.seq_relationship.bias": [2],
    },
}
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer"}


@pytest.mark.parametrize("name", LAYER)
def test_names_and_shapes_are_those_of_the_family(name, saved):
    found = load_file(saved(name)[1] / "model.safetensors")
    layers = {f"{LAYERS[name]}.{i}.{k}": v for i in (0, 1) for k, v in LAYER[name].items()}
    assert {k: list(x.shape) for k, x in found.items()} == WHOLE[name] | layers


def test_names_and_shapes_of_t5(saved):
    found = load_file(saved("t5 v1.1")[1] / "model.safetensors")
    expected: dict[str, list[int]] = {"shared.weight": [11, 8], "lm_head.weight": [11, 8]}
    for stack, depth, mlp in (("encoder", 2, 1), ("decoder", 3, 2)):
        expected[f"{stack}.final_layer_norm.weight"] = [8]
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        expected[first] = [8, 2]
        for i in range(depth):
            for j, kind in enumerate(["SelfAttention", "EncDecAttention"][:mlp]):
                here = f"{stack}.block.{i}.layer.{j}"
                expected |= {f"{here}.{kind}.{q}.weight": [6, 8] for q in "qkv"}
                expected |= {f"{here}.{kind}.o.weight": [8, 6], f"{here}.layer_norm.weight": [8]}
            here = f"{stack}.block.{i}.layer.{mlp}"
            expected |= {f"{here}.DenseReluDense.wi_{w}.weight": [6, 8] for w in (0, 1)}
            expected[f"{here}.DenseReluDense.wo.weight"] = [8, 6]
            expected[f"{here}.layer_norm.weight"] = [8]
    assert {k: list(x.shape) for k, x in found.items()} == expected


def test_queries_keys_and_values_stand_one_after_the_other(saved):
    model, folder = saved("gpt2")
    found = load_file(folder / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    attention = model.blocks.block.attention
    for i, leaf in enumerate((attention.q, attention.k, attention.v)):
        np.testing.assert_array_equal(found[:, 8 * i : 8 * i + 8], leaf[1].reshape(8, 8))


def test_rotary_pairs_are_the_halves_of_a_head(saved):
    model, folder = saved("llama")
    found = load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    k = model.blocks.block.attention.k[0]  # [embed, kv_heads, head_dim]
    order = [0, 2, 1, 3]
    np.testing.assert_array_equal(found.reshape(2, 4, 8), np.transpose(k, (1, 2, 0))[:, order])


# Other spellings ---------------------------------------------------------------------------------


def test_prefixes_old_names_and_buffers_do_not_matter(saved):
    model, folder = saved("bert")

    def old(tensors):
        renamed = {k.removeprefix("bert."): v for k, v in tensors.items()}
        for new, before in (("LayerNorm.weight", "gamma"), ("LayerNorm.bias", "beta")):
            renamed = {k.replace(new, f"LayerNorm.{before}"): v for k, v in renamed.items()}
        return renamed | {"embeddings.position_ids": np.arange(7)[None]}

    assert_same(model, gj.hf.load(rewritten(folder, old)))
    model, folder = saved("gpt2")

    def hub(tensors):
        renamed = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        return renamed | {"h.0.attn.bias": np.ones((1, 1, 7, 7), np.uint8)}

    assert_same(model, gj.hf.load(rewritten(folder, hub, n_ctx=7, n_positions=...)))


def test_a_tensor_under_two_spellings_is_not_chosen_from(saved):
    _, folder = saved("gpt2")
    rewritten(folder, lambda t: t | {"ln_f.bias": t["transformer.ln_f.bias"] + 1})
    with pytest.raises(HuggingFaceError, match="the same tensor twice"):
        gj.hf.load(folder)


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
    said = (folder / "config.json").read_text()
    for change in ROPES[name]:
        (folder / "config.json").write_text(said)
        assert_same(model, gj.hf.load(rewritten(folder, **change)))


HEADS = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "llama tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_tied_head_may_be_there_once_more_if_it_is_the_same(name, saved):
    words, head = HEADS[name]
    model, folder = saved(name)
    rewritten(folder, lambda t: t | {head: t[words]})
    assert_same(model, gj.hf.load(folder))
    rewritten(folder, lambda t: t | {head: t[head] + 1})
    with pytest.raises(HuggingFaceError, match=f"true, but {head} is there and is not"):
        gj.hf.load(folder)
    if name != "bert":  # whose bias has another name then
        rewritten(folder, tie_word_embeddings=False)
        assert gj.hf.load(folder).head is not None


def test_what_may_be_left_over_is_said(saved):
    model, folder = saved("bert no head")
    rewritten(folder, lambda t: t | {"classifier.weight": np.ones((3, 8), np.float32)})
    with pytest.raises(
        HuggingFaceError, match="classifier.weight: nothing in this model is called"
    ):
        gj.hf.load(folder)
    assert_same(model, gj.hf.load(folder, ignore=["classifier.*"]))


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
    with pytest.raises(HuggingFaceError, match="wi_0.weight: nothing in this model"):
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


def test_other_names_of_the_embedding_of_t5(saved):
    model, folder = saved("t5")

    def alias(tensors):
        words = tensors.pop("shared.weight")
        return tensors | {
            "encoder.embed_tokens.weight": words,
            "decoder.embed_tokens.weight": words,
        }

    assert_same(model, gj.hf.load(rewritten(folder, alias)))
    key = "decoder.embed_tokens.weight"
    rewritten(folder, lambda t: t | {key: t[key] + 1})
    with pytest.raises(HuggingFaceError, match="under other names too, with other numbers"):
        gj.hf.load(folder)


def test_an_untied_bert_uses_the_bias_of_its_decoder(saved):
    model, folder = saved("bert untied")
    assert "cls.predictions.bias" in load_file(folder / "model.safetensors")
    rewritten(folder, lambda t: t | {"cls.predictions.bias": t["cls.predictions.bias"] + 1})
    assert_same(model, gj.hf.load(folder))


# What does not fit -------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_at_once(saved):
    _, folder = saved("gpt2")

    def spoil(tensors):
        del tensors["transformer.h.1.mlp.c_fc.weight"]
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:3]
        tensors["transformer.ln_f.bias"] = np.ones(8, np.int32)
        tensors["transformer.h.7.ln_1.bias"] = np.ones(8, np.float32)

    with pytest.raises(HuggingFaceError) as caught:
        gj.hf.load(rewritten(folder, spoil))
    for complaint in (
        "h.1.mlp.c_fc.weight: not in the file",
        "wpe.weight: expected the shape [7, 8], got [3, 8]",
        "ln_f.bias: is of type I32",
        "h.7.ln_1.bias: nothing in this model is called so",
    ):
        assert complaint in str(caught.value)


CONFIGS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gpt2": [
        ({"n_layer": 3}, "h.2.attn.c_attn.weight: not in the file"),
        ({"n_layer": 1}, "h.1.attn.c_attn.weight: nothing in this model"),
        ({"n_layer": 10**9}, "n_layer: 1000000000 layers, in 28 tensors"),
        ({"n_embd": -1, "n_head": "two"}, "n_head: expected a positive integer, got 'two'"),
        ({"n_head": 3}, "8 cannot be divided by 3 heads"),
        ({"n_embd": 2**40}, "n_embd: expected a positive integer"),
        ({"activation_function": "mish"}, "activation_function: expected one of gelu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "only False can be read, got True"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: expected a positive number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: only None can be read"),
        ({"model_type": "mamba"}, "model_type: expected one of bert, gpt2, llama, t5, got 'mamba'"),
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
            "rope_theta: 10 beside rope_scaling, and 10000.0 in rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor: only 1.0"),
        ({"rope_parameters": {"mscale": 2.0, "beta": 1}}, "rope_parameters.beta: an unknown key"),
        ({"num_key_value_heads": 3}, "4 cannot be divided by 3"),
        ({"head_dim": 3}, "head_dim: rotary positions turn pairs"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type: expected default, linear or llama3",
        ),
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
        ({"num_decoder_layers": None}, "decoder.block.2.layer.0.SelfAttention.k.weight: nothing"),
    ],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_says_why(name, saved):
    _, folder = saved(name)
    said = (folder / "config.json").read_text()
    for change, message in CONFIGS[name]:
        (folder / "config.json").write_text(said)
        with pytest.raises(HuggingFaceError) as caught:
            gj.hf.load(rewritten(folder, **change))
        assert message in str(caught.value)
