"""Folders that hold something else, and what travels with a checkpoint besides its weights."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import growjax as gj
from growjax.errors import HuggingFaceError
from growjax.hf import convert
from growjax.hf.companions import base_model, card_metadata, front_matter
from growjax.hf.families import LLAMA
from growjax.models import Labels
from tests.folders import assert_same, build, rewritten


# Other kinds of folders ---------------------------------------------------------------------------

KINDS = {
    "adapter": (
        {"adapter_config.json", "adapter_model.safetensors"},
        "merge it into its base first",
    ),
    "gguf": ({"model-q4.gguf"}, "model-q4.gguf is quantised for llama.cpp"),
    "pickle": ({"config.json", "pytorch_model.bin"}, "pytorch_model.bin is a pickle"),
    "variant": (
        {"config.json", "model.fp16.safetensors"},
        "rename a variant such as fp16 to model.safet",
    ),
    "shards of a variant": (
        {
            "config.json",
            "model.safetensors.index.fp16.json",
            "model.fp16-00001-of-00002.safetensors",
        },
        "or its index to model.safetensors.index.json",
    ),
    "adapter beside its base": (
        {"config.json", "model.safetensors", "adapter_config.json"},
        "expected a model alone; it holds an adapter",
    ),
    "empty": (set(), "expected config.json in it, got none"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_says_what_to_do(kind, tmp_path):
    names, message = KINDS[kind]
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(HuggingFaceError, match=message):
        gj.hf.load(tmp_path)


def test_prefixes_of_wrappers_are_stripped_with_a_warning(saved):
    model, folder = saved("gpt2")
    wrapped = rewritten(folder, lambda t: {f"module._orig_mod.{name}": x for name, x in t.items()})
    with pytest.warns(UserWarning, match=r"called module\._orig_mod\.\*, as torch.compile"):
        assert_same(model, gj.hf.load(wrapped))
    rewritten(folder, lambda t: t | {"module.x": np.ones(3, np.float32)})
    with pytest.raises(HuggingFaceError, match="is not a tensor of this model"):
        gj.hf.load(folder)  # not all of them have it: no warning, and nothing is stripped


@pytest.mark.parametrize(
    "name, architecture, missing, message",
    [
        ("llama", "LlamaForCausalLM", "lm_head", "lm_head.weight: not in the file"),
        ("t5", "T5Model", "decoder", "T5Model has no head"),
        ("bert no head", "BertForSequenceClassification", "", "pass ignore=['classifier.*'"),
        ("bert no head", 7, "", "classifier.bias: not in the file"),
    ],
)
def test_a_model_without_the_head_or_with_another_one_says_what_to_do(
    name, architecture, missing, message, saved
):
    _, folder = saved(name)

    def behead(tensors):
        other = {} if missing else {"classifier.weight": np.ones((3, 8), np.float32)}
        return {k: x for k, x in tensors.items() if not missing or missing not in k} | other

    named = [architecture] if isinstance(architecture, str) else architecture
    with pytest.raises(HuggingFaceError, match=re.escape(message)):
        gj.hf.load(rewritten(folder, behead, architectures=named))


@pytest.mark.parametrize(
    "keys", [{"architectures": ["T5EncoderModel"]}, {"is_encoder_decoder": False}]
)
def test_a_t5_without_its_decoder_is_an_encoder_if_it_says_so(keys, saved):
    model, folder = saved("t5")
    rewritten(folder, lambda t: {k: x for k, x in t.items() if not k.startswith("decoder.")})
    with pytest.raises(HuggingFaceError, match="decoder.block.0.layer.0.layer_norm.weight: not"):
        gj.hf.load(folder)
    encoder = gj.hf.load(rewritten(folder, **{"architectures": [], **keys}))
    assert isinstance(encoder, gj.models.T5Encoder)
    assert_same(encoder.encoder, model.encoder)


@pytest.mark.parametrize(
    "architecture, head", [("LlamaModel", "none"), ("LlamaForCausalLM", "words"), (7, "words")]
)
def test_a_tied_decoder_has_a_head_unless_the_class_says_that_it_has_none(
    architecture, head, saved
):
    model, folder = saved("llama tied")
    again = gj.hf.load(rewritten(folder, architectures=[architecture]))
    assert again.lm == (head == "words") and again.head is None
    assert_same(model.blocks, again.blocks)


def test_scores_of_labels_are_of_what_the_class_says(saved):
    """Where tensors have one name in classes that score other things."""
    _, folder = saved("llama classifier")
    assert gj.hf.load(folder).classifier.padding == 2
    bias = lambda t: t | {"score.bias": np.ones(3, np.float32)}  # noqa: E731
    rewritten(folder, bias, architectures=["Unknown"])
    assert gj.hf.load(folder).classifier.of == "token"
    rewritten(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(HuggingFaceError, match="score.bias: is not a tensor of this model"):
        gj.hf.load(folder)
    without = gj.hf.load(folder, ignore=["score.*"])
    assert without.classifier is None and not without.lm
    rewritten(folder, lambda t: {k: x for k, x in t.items() if "bias" not in k}, pad_token_id="x")
    with pytest.raises(
        HuggingFaceError, match="pad_token_id: expected an integer or null, got 'x'"
    ):
        gj.hf.load(folder)
    model, folder = saved("modernbert classifier")
    for name, of in (("Sequence", "sequence"), ("Token", "token")):
        again = gj.hf.load(rewritten(folder, architectures=[f"ModernBertFor{name}Classification"]))
        assert again.labelled == of
    with pytest.raises(
        HuggingFaceError, match="scores of a ModernBertForQuestionAnswering are nei"
    ):
        gj.hf.load(rewritten(folder, architectures=["ModernBertForQuestionAnswering"]))
    model, folder = saved("bert tokens")
    pooler = {f"bert.pooler.dense.{n}": np.ones([8, 8][:k], np.float32) for n, k in _POOLER}
    assert_same(model, gj.hf.load(rewritten(folder, lambda t: t | pooler)))
    with pytest.raises(HuggingFaceError, match="labels: what scores tokens has no pooler"):
        gj.hf.save(build("bert tokens", pooler=True), folder.parent / "pooled")


_POOLER = (("weight", 2), ("bias", 1))


def test_a_head_that_transformers_lacks_is_refused(tmp_path):
    labelled = build("olmo2", head=Labels(3, "token"))
    with pytest.raises(HuggingFaceError, match="no Olmo2ForTokenClassification"):
        gj.hf.save(labelled, tmp_path / "out", source=None)


def test_the_relative_bias_that_old_t5_files_have_and_nothing_reads(saved):
    model, folder = saved("t5")
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    old = rewritten(folder, lambda t: t | {name: np.ones((32, 2), np.float32)})
    assert_same(model, gj.hf.load(old))


# What belongs to a checkpoint ---------------------------------------------------------------------


def _with_modules(folder: Path, *, features: int = 8, path: str = "1_Pooling") -> Path:
    modules = [{"path": ""}, {"path": path}, {"path": "2_Normalize"}, {"path": "3_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, config in {
        "1_Pooling": {"word_embedding_dimension": 8, "pooling_mode": "mean"},
        "3_Dense": {"in_features": features, "out_features": 4},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("Apache")
    return folder


def test_modules_of_sentence_transformers_follow_the_width(saved, tmp_path):
    model, folder = saved("bert no head")
    wide = gj.grow(gj.copy(embed=16, heads=4), model)
    gj.hf.save(wide, tmp_path / "wide", source=_with_modules(folder, features=16))
    pooling = json.loads((tmp_path / "wide" / "1_Pooling" / "config.json").read_text())
    assert pooling == {"word_embedding_dimension": 16, "pooling_mode": "mean"}
    # As sentence-transformers 6 writes it; a module with weights of that width is another matter
    renamed = folder / "1_Pooling" / "config.json"
    renamed.write_text(json.dumps({"embedding_dimension": 8}))
    gj.hf.save(wide, tmp_path / "renamed", source=folder)
    pooling = json.loads((tmp_path / "renamed" / "1_Pooling" / "config.json").read_text())
    assert pooling == {"embedding_dimension": 16}
    (folder / "1_Pooling" / "model.safetensors").write_bytes(b"")
    with pytest.raises(HuggingFaceError, match="1_Pooling: its weights read 8 features"):
        gj.hf.save(wide, tmp_path / "lstm", source=folder)
    assert (tmp_path / "wide" / "3_Dense" / "config.json").is_file()
    assert (tmp_path / "wide" / "LICENSE").read_text() == "Apache"
    assert len(json.loads((tmp_path / "wide" / "modules.json").read_text())) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": 8}, "3_Dense: its weights read 8 features, and the model has embed=16"),
        ({"features": 16, "path": "../other"}, "is not the name of a folder in it"),
        ({"features": 16, "path": 3}, "expected objects with a path"),
    ],
)
def test_modules_that_do_not_fit_are_refused(changes, message, saved, tmp_path):
    model, folder = saved("bert no head")
    wide = gj.grow(gj.copy(embed=16, heads=4), model)
    with pytest.raises(HuggingFaceError, match=message):
        gj.hf.save(wide, tmp_path / "wide", source=_with_modules(folder, **changes))
    assert not (tmp_path / "wide").exists()


def test_a_module_that_is_a_link_out_of_the_folder_is_refused(saved, tmp_path):
    model, folder = saved("bert no head")
    (tmp_path / "elsewhere").mkdir()
    (folder / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    (folder / "modules.json").write_text('[{"path": "1_Pooling"}]')
    with pytest.raises(HuggingFaceError, match="a link that leads out of the folder"):
        gj.hf.save(model, tmp_path / "again", source=folder)


def test_code_that_is_not_copied_is_not_named(saved, tmp_path):
    model, folder = saved("gpt2")
    rewritten(folder, auto_map={"AutoModel": "modeling_own.Own"})
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "own"}, "b": 1}')
    gj.hf.save(model, tmp_path / "again", source=folder)
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == {"b": 1}


def test_without_a_source_no_reader_takes_special_ids_of_its_own(tmp_path):
    for name in ("gpt2", "llama", "bert"):
        gj.hf.save(build(name), tmp_path / name, keys={"eos_token_id": 3})
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (None, 3)
    longer = {"max_position_embeddings": 512, "hidden_size": 99}
    gj.hf.save(build("llama"), tmp_path / "longer", keys=longer)
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["hidden_size"]) == (512, 8)


def test_families_that_share_a_class_are_told_apart_by_what_a_model_is(tmp_path, monkeypatch):
    normed = lambda file, same: dataclasses.replace(LLAMA.read(file, same), qk_norm=True)  # noqa: E731
    other = dataclasses.replace(
        LLAMA, model_type="normed", only={"qk_norm": "head"}, limits=_none, read=normed
    )
    monkeypatch.setattr(convert, "FAMILIES", {"llama": LLAMA, "normed": other})
    for qk_norm, expected in {False: "llama", True: "normed"}.items():
        gj.hf.save(build("llama", qk_norm=qk_norm), tmp_path / expected)
        config = json.loads((tmp_path / expected / "config.json").read_text())
        assert config["model_type"] == expected
    twin = dataclasses.replace(LLAMA, model_type="twin")
    monkeypatch.setitem(convert.FAMILIES, "twin", twin)
    rewritten(tmp_path / "llama", model_type="twin")
    gj.hf.save(build("llama"), tmp_path / "twin", source=tmp_path / "llama")
    assert json.loads((tmp_path / "twin" / "config.json").read_text())["model_type"] == "twin"
    wrong = gj.grow(gj.copy(head_dim=8), build("llama"))
    with pytest.raises(HuggingFaceError, match="as llama:(.|\n)*nearest of llama, normed, twin"):
        gj.hf.save(wrong, tmp_path / "wrong")
    # With a source there is no choice
    with pytest.raises(HuggingFaceError, match="as twin:") as caught:
        gj.hf.save(build("llama", qk_norm=True), tmp_path / "other", source=tmp_path / "llama")
    assert "qk_norm: expected None, got 'head'" in str(caught.value)


def _none(config) -> list[str]:
    return []


def test_a_card_names_a_repository_or_a_folder_and_no_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de"
    snapshot.mkdir(parents=True)
    assert base_model(snapshot) == "Qwen/Qwen3-0.6B" == base_model("Qwen/Qwen3-0.6B")
    monkeypatch.chdir(snapshot.parent)
    assert base_model("c1899de") == "Qwen/Qwen3-0.6B" and base_model(".") == "snapshots"
    for odd in ("my: model", "123", "#1"):
        (tmp_path / odd).mkdir()
        assert base_model(tmp_path / odd) == json.dumps(odd)


def test_a_card_keeps_licence_and_language_and_names_its_base(saved, tmp_path):
    _, folder = saved("gpt2")
    front = "license: apache-2.0\nlanguage:\n- en\n- de\ntags:\n- old\n"
    (folder / "README.md").write_text(f"---\n{front}---\n\nlicense: none\n")
    metadata = card_metadata(folder)
    assert metadata == {"license": " apache-2.0", "language": "\n- en\n- de"}
    (folder / "README.md").write_text("# No front matter\n\n---\nlicense: none\n---\n")
    assert card_metadata(folder) == {}
    # What growjax made of growjax's keeps the base of that; the id of a repository stays whole
    assert front_matter(folder).splitlines()[0] == "base_model: gpt2"
    made = f"---\n{front_matter(folder).replace(': gpt2', ': own/base')}---\n"
    (folder / "README.md").write_text(made)
    assert front_matter(folder) == "base_model: own/base\ntags:\n- growjax\n"
    assert base_model("own/base") == "own/base"
