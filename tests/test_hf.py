"""Hugging Face folders: what is written is read back to the bit, under the names of each family."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import growjax as gj
from growjax.cli import app
from growjax.errors import HuggingFaceError
from growjax.hf.bert import BERT_
from growjax.hf.convert import FAMILIES
from tests.folders import MODELS, assert_same, build, rewritten


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
    written = json.loads((tmp_path / "half" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
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
    written = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert written["hidden_dropout_prob"] == 0.25 and written["pad_token_id"] == 3
    assert written["hidden_size"] == 16 and written["num_attention_heads"] == 4
    names = {p.name for p in (tmp_path / "wide").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    assert (tmp_path / "wide" / "vocab.txt").read_text() == "[PAD]\n"


def test_nothing_is_overwritten_and_nothing_half_written_stays(saved, tmp_path, monkeypatch):
    model, folder = saved("gpt2")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(HuggingFaceError, match="exists already, and nothing is overwritten"):
        gj.hf.save(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before

    def full(*args, **kwargs):
        raise OSError("no space left")

    # When the header of the weights is written, and the first tensor is not
    monkeypatch.setattr("numpy.ascontiguousarray", full)
    with pytest.raises(OSError, match="no space left"):
        gj.hf.save(model, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    # What a killed process left behind does not stop the next, whatever its number
    (tmp_path / f".empty.{os.getpid()}").mkdir()
    gj.hf.save(model, tmp_path / "empty")
    assert_same(model, gj.hf.load(tmp_path / "empty"))


def test_every_family_is_in_the_table_of_the_command_and_of_the_page(capsys):
    app.cli(prog="growjax", args=["families"])
    printed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].strip()}
    page = (Path(__file__).parents[1] / "docs/huggingface.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert printed - {"model_type"} == set(FAMILIES) == listed & set(FAMILIES)


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
    tensors = load_file(saved(name)[1] / "model.safetensors")
    layers = {f"{LAYERS[name]}.{i}.{k}": v for i in (0, 1) for k, v in LAYER[name].items()}
    assert {k: list(x.shape) for k, x in tensors.items()} == WHOLE[name] | layers


def test_names_and_shapes_of_t5(saved):
    tensors = load_file(saved("t5 v1.1")[1] / "model.safetensors")
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
    assert {k: list(x.shape) for k, x in tensors.items()} == expected


def test_queries_keys_and_values_stand_one_after_the_other(saved):
    model, folder = saved("gpt2")
    stored = load_file(folder / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    attention = model.blocks.block.attention
    for i, leaf in enumerate((attention.q, attention.k, attention.v)):
        np.testing.assert_array_equal(stored[:, 8 * i : 8 * i + 8], leaf[1].reshape(8, 8))


def test_rotary_pairs_are_the_halves_of_a_head(saved):
    model, folder = saved("llama")
    stored = load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    k = model.blocks.block.attention.k[0]  # [embed, kv_heads, head_dim]
    order = [0, 2, 1, 3]
    np.testing.assert_array_equal(stored.reshape(2, 4, 8), np.transpose(k, (1, 2, 0))[:, order])


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
    with pytest.raises(HuggingFaceError, match=f"true, but {head} differs from"):
        gj.hf.load(folder)
    if name != "bert":  # whose bias has another name then
        rewritten(folder, tie_word_embeddings=False)
        assert gj.hf.load(folder).head is not None


def test_what_may_be_left_over_is_said(saved):
    model, folder = saved("bert no head")
    rewritten(folder, lambda t: t | {"score.weight": np.ones((3, 8), np.float32)})
    with pytest.raises(HuggingFaceError, match="score.weight: is not a tensor of this model"):
        gj.hf.load(folder)
    assert_same(model, gj.hf.load(folder, ignore=["score.*"]))


def test_a_classifier_may_be_ignored_as_well(saved):
    model, folder = saved("bert classifier")
    headless = gj.hf.load(folder, ignore=["classifier.*"])
    assert headless.classifier is None and headless.pooler is not None
    rewritten(folder, id2label={"0": "A", "1": "B"})
    with pytest.raises(HuggingFaceError, match=r"expected the shape \[2, 8\], got \[3, 8\]"):
        gj.hf.load(folder)
    rewritten(folder, id2label={"0": "A", "1": "B", "2": "C"}, num_labels=...)
    assert_same(model, gj.hf.load(folder))


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
        "h.7.ln_1.bias: is not a tensor of this model",
    ):
        assert complaint in str(caught.value)
